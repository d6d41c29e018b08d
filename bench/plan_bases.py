"""The random bases of the plan's checks: their shapes, and their folders, which are written on the CPU.

    python -m bench.plan_bases TOKENIZER_FOLDER [NAME ...]

They lie in the machine's folder for temporary files, and are kept there: a card waits for none of them twice.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench import random_checkpoint
from bench.process import run_process
from fast_ft.recipe import policy_ntu_hw5

_ALL = {"max_position_embeddings": 4096, "hidden_act": "silu", "rms_norm_eps": 1e-5}
_MOST_SECONDS = 300
#: The bases' shapes: Llama-2-7B's, and those of four families' models, some of them less deep. On none of the last four
#: a constant was fitted.
BASES: Mapping[str, Mapping[str, Any]] = {
    "llama-2-7b": {**_ALL, **policy_ntu_hw5.LLAMA_2_7B, "tie_word_embeddings": False},
    "qwen2.5-7b": {
        **_ALL, "model_type": "qwen2", "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 10,
        "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064, "tie_word_embeddings": False,
    },
    "llama-3.2-3b": {
        **_ALL, "model_type": "llama", "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 14,
        "num_attention_heads": 24, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128256,
        "tie_word_embeddings": True,
    },
    "smollm2-1.7b": {
        **_ALL, "model_type": "llama", "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 24,
        "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 49152, "tie_word_embeddings": True,
    },
    "llama-2-13b": {
        **_ALL, "model_type": "llama", "hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 12,
        "num_attention_heads": 40, "num_key_value_heads": 40, "vocab_size": 32000, "tie_word_embeddings": False,
    },
}  # fmt: skip


def folder(name: str) -> Path:
    """Return where a base lies, once it is written."""
    return Path(tempfile.gettempdir()) / "fast_ft-plan-bases" / name


def write(names: Sequence[str], tokenizer: Path, log: Path) -> None:
    """Write the bases that are missing, in a process of its own that sees no card."""
    if missing := [name for name in names if not folder(name).is_dir()]:
        run_process([sys.executable, "-m", "bench.plan_bases", str(tokenizer), *missing], log, _MOST_SECONDS)


def main(arguments: Sequence[str]) -> int:
    """Write the bases that are named, or all."""
    parser = argparse.ArgumentParser("python -m bench.plan_bases", description=__doc__)
    parser.add_argument("tokenizer", type=Path, help="a tokenizer's folder")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(BASES)}; default: all")
    options = parser.parse_args(arguments)
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    for name in options.names or BASES:
        part = folder(name).with_name(f"{name}.{os.getpid()}")
        random_checkpoint.write(part, BASES[name], options.tokenizer)
        if not folder(name).exists():
            part.rename(folder(name))  # a folder of that name is whole
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
