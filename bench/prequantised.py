"""python -m bench.prequantised BASE OUT: write a base model in doubly quantised NF4, as Unsloth publishes its bases."""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path


def main(arguments: Sequence[str]) -> int:
    """Quantise, save, and copy the tokenizer."""
    parser = argparse.ArgumentParser("python -m bench.prequantised", description=__doc__)
    parser.add_argument("base", type=Path, help="a model's folder")
    parser.add_argument("out", type=Path, help="the folder that is written")
    options = parser.parse_args(arguments)
    base, out = options.base, options.out
    import torch
    import transformers

    quantisation = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float16,
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(
        str(base),
        dtype=torch.float16,
        device_map={"": 0},
        quantization_config=quantisation,
        use_safetensors=True,
        trust_remote_code=False,
        local_files_only=True,
    )
    model.save_pretrained(str(out))
    for file in [*base.glob("tokenizer*"), *base.glob("special_tokens*")]:
        shutil.copy(file, out)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
