"""python -m bench.decode --base DIR --prompts FILE [--only fixed,plain,...]: decoding, one JSON line a measurement.

With --results FILE the raw samples are kept there; `python -m bench --adopt FILE` takes the figures out of them.

    steps    one captured step, in ms, at several pool sizes and ways with 4-bit weights; --profile: its kernels
    check    greedy answers, captured and twice; teacher-forced through the model's own forward pass
    fixed    every prompt, --limit new tokens each: prefill, capture and all
    plain    transformers' generate on one batch of each size, of prompts of like length
    static   the same with a static cache;  compiled: and a compiled forward pass, on the first size
    mixed    answers as long as Alpaca's long ones (mean 250, up to 1,024): refill; and the pool in batches, each to
             its end, in steps that stay as wide and in steps that shrink with what is left
    unsloth  Unsloth on one batch of each size, in a process of its own; 1 is the homework notebook's way
    llama.cpp  llama-batched-bench, from the folder --llama, on a Q4_K_M model of the same shape
    long     every prompt with 1,024 new tokens, from a 16-bit cache and from one of 8 bits
    steady   steps in the middle of such answers, from both caches
    products the 4-bit products of one step, 64 rows
    before   `fixed` by the checkout at --against

The adapter is r = 16 on all linear layers with random B unless --adapter names one. No answer ends at EOS, so that all
ways do the same work. Memory is capped at --cap GiB, the CUDA context included. With --sms N the measurements run on N
of the card's SMs, without flash and cuDNN attention: a T4-class emulation, not a T4.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from pathlib import Path
from typing import Any

from bench import machine
from bench.decode_measures import MEASURES
from bench.decode_subject import Subject
from bench.emulation import LABEL
from fast_ft.common.atomic_files import write_json
from fast_ft.plan.decode_pool import PREFILL_TOKENS


def main() -> int:
    """Run the measurements asked for; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.decode", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--base", required=True, help="a Llama-like base model's folder")
    parser.add_argument("--tokenizer", help="a folder with the tokenizer; default: the base model's")
    parser.add_argument("--prompts", required=True, help="a file of prompts, in any layout")
    parser.add_argument("--random", action="store_true", help="draw the weights; of the base config.json and tokenizer")
    parser.add_argument("--adapter", type=Path, help="an adapter's folder; default: a random one")
    parser.add_argument("--only", default="steps,check,fixed,plain,mixed", help="of: " + ",".join(MEASURES))
    parser.add_argument("--limit", type=int, default=128, help="new tokens a prompt")
    parser.add_argument("--take", type=int, default=150, help="use this number of prompts, the first of the file")
    parser.add_argument("--cap", type=float, default=14.7, help="GiB, the CUDA context included; 0: no cap")
    parser.add_argument("--slots", default="auto", help="pool sizes for fixed and steps, as 75,150; auto: the plan's")
    parser.add_argument("--cells", type=int, help="tokens in the cache; default: the plan's for these slots")
    parser.add_argument("--prefill", type=int, default=PREFILL_TOKENS, help="tokens of prompts in one pass")
    parser.add_argument("--workspace", default="96", help="MiB for dequantised weights: 0 is 16-bit weights throughout")
    parser.add_argument("--batches", default="32,48,64", help="batch sizes for plain")
    parser.add_argument("--unsloth-batches", default="1,16,32,48", help="batch sizes for unsloth")
    parser.add_argument("--llama", type=Path, metavar="FOLDER", help="llama-batched-bench and its libraries")
    parser.add_argument("--llama-batches", default="1,8,32,48,64,96,128", help="answers at once for llama.cpp")
    parser.add_argument("--llama-caches", default="q8_0,q8_0-unified,f16", help="its kinds of cache")
    parser.add_argument("--llama-prompt", type=int, help="tokens of its prompts; default: the mean of the prompts")
    parser.add_argument("--llama-ubatch", default=512, type=int, help="llama.cpp's -ub")
    parser.add_argument("--lengths", type=Path, help="a file of rows whose responses give the lengths for mixed")
    parser.add_argument("--draws", type=int, default=5, help="draws of lengths for mixed")
    parser.add_argument("--against", type=Path, help="an older checkout, for before")
    parser.add_argument("--sms", type=int, help="use this number of the card's SMs; 8 of an H200's are a T4's class")
    parser.add_argument("--dtype", default="float16")
    parser.add_argument("--repeat", type=int, default=3, help="runs of fixed, each with a pool of its own")
    parser.add_argument("--results", type=Path, help="a JSON for the raw samples")
    parser.add_argument("--profile", action="store_true")
    options = parser.parse_args()
    names = options.only.split(",")
    if unknown := [name for name in names if name not in MEASURES]:
        parser.error(f"--only: {unknown[0]!r} is none of {', '.join(MEASURES)}")
    if "llama.cpp" in names and options.llama is None:
        parser.error("--only llama.cpp needs --llama FOLDER")
    record = Record(options)
    subject = Subject(options, record.keep)
    record.result["settings"]["prompt_tokens"] = [len(row) for row in subject.ids]
    for name in names:
        for measured in MEASURES[name](subject):
            record.keep(name, measured)
    return 0


class Record:
    """Everything that was measured, in a file that is rewritten whole after each measurement."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.path: Path | None = options.results
        settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()}
        self.result: dict[str, Any] = {
            "kind": "decode",
            **machine.stamp(shlex.join(["python", "-m", "bench.decode", *sys.argv[1:]])),
            "label": LABEL if options.sms else None,
            "settings": settings,
            "measurements": [],
        }

    def keep(self, name: str, measured: dict[str, Any]) -> None:
        """Print a measurement, and write all so far."""
        print(json.dumps({"name": name, **measured}), flush=True)
        self.result["measurements"].append({"name": name, **measured})
        if self.path:
            write_json(self.path, self.result)


if __name__ == "__main__":
    sys.exit(main())
