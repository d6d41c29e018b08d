"""python -m bench.decode_cpu: eight prompts of a small real model on this machine's CPU, in fp32, greedily.

    python -m bench.decode_cpu --base models/smollm2-135m-instruct.gguf [--against FOLDER]

What is timed is `generate.answers.generate` whole: the engine, its check against the model alone, and all answers. Each
run is a process of its own. --against names another checkout of the project, whose fast_ft runs in turns with this one.
The load that the machine had before each run stands beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

PROMPTS = (
    "What is the capital of France?", "Why is the sky blue?", "How do I boil an egg?", "Tell me about whales.",
    "What is a prime number?", "Who wrote Hamlet?", "Give me three tips for sleeping well.", "What causes tides?",
)  # fmt: skip
MOST = 96  #: new tokens a prompt


def main() -> int:
    """Measure, and write bench/results/decode-cpu.json."""
    parser = argparse.ArgumentParser(prog="python -m bench.decode_cpu", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--base", required=True, help="the model: a folder or a .gguf file")
    parser.add_argument("--against", type=Path, help="another checkout, to be measured in turns with this one")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(measured(options.base)))
        return 0
    from bench import figures, machine
    from fast_ft.common.atomic_files import write_json
    from fast_ft.hub import download

    base = str(download.model_folder(options.base).absolute())  # a checkout of old reads no .gguf file
    checkouts = {"now": machine.ROOT, **({"before": options.against.absolute()} if options.against else {})}
    runs: list[dict[str, Any]] = []
    for _ in range(options.repeat):
        for name, root in reversed(checkouts.items()):
            runs.append({"program": name, **_run(root, base)})
            print(json.dumps(runs[-1]), flush=True)
    command = "python -m bench.decode_cpu --base models/smollm2-135m-instruct.gguf"
    result = {"kind": "decode-cpu", **machine.stamp(command), "prompts": list(PROMPTS), "most": MOST, "runs": runs}
    write_json(figures.RESULTS / "decode-cpu.json", result)
    print({name: value for name, (value, _) in headline(result).items()})
    return 0


def headline(result: dict[str, Any]) -> dict[str, tuple[float, str]]:
    """Return {figure: (value, unit)}: median rates, and over the older checkout where one was measured in turns.

    Decoding is prefill and steps, as in `bench.decode`; the second rate counts the engine's making and its check too.
    """
    alone: dict[str, list[float]] = {}
    for run in result["runs"]:
        spent = run["seconds_by"]["prefill"] + run["seconds_by"]["steps"]
        alone.setdefault(run["program"], []).append(run["new_tokens"] / spent)
    median = {name: statistics.median(values) for name, values in alone.items()}
    whole = statistics.median(
        each["new_tokens"] / each["seconds"] for each in result["runs"] if each["program"] == "now"
    )
    found = {
        "decode.cpu_smollm_tokens_per_s": (round(median["now"], 1), "new tokens/s, prefill and steps"),
        "decode.cpu_smollm_with_checks_tokens_per_s": (round(whole, 1), "new tokens/s, set-up and check included"),
    }
    if "before" in median:
        found["decode.cpu_smollm_vs_start"] = (round(median["now"] / median["before"], 2), "times, in turns")
    return found


def measured(base: str) -> dict[str, Any]:
    """Return one run of all prompts by the fast_ft that is imported."""
    from fast_ft.common import environment

    environment.at_start()  # as a command does, before torch is there
    import torch

    from fast_ft.common.stopwatch import Stopwatch
    from fast_ft.data.encoding import Encoder
    from fast_ft.data.examples import Prompt
    from fast_ft.generate.answers import Task, generate
    from fast_ft.models.loaders import choose
    from fast_ft.plan.decode_pool import DecodePlan
    from fast_ft.recipe import schema

    encoder = Encoder(Path(base), "tokenizer")
    prompts = [
        Prompt(id=str(index), messages=({"role": "user", "content": text},)) for index, text in enumerate(PROMPTS)
    ]
    section = schema.Model(name_or_path=base, dtype="float32", load_in_4bit=False, template="tokenizer")
    loaded = choose.make_loader(section, schema.Lora(r=16), seed=1, name="peft").for_training()
    loaded.model.eval().requires_grad_(False)
    load, watch = os.getloadavg()[0], Stopwatch()
    with tempfile.TemporaryDirectory() as folder:
        task = Task(seed=1, partial=Path(folder) / "partial.jsonl", watch=watch)
        greedy = schema.Generate(do_sample=False, max_new_tokens=MOST)
        started, cpu = time.monotonic(), time.process_time()
        made = generate(loaded, encoder, prompts, greedy, DecodePlan(len(prompts)), task)
        seconds, cpu = time.monotonic() - started, time.process_time() - cpu
    return {
        "new_tokens": sum(answer.tokens for answer in made.flat), "seconds": round(seconds, 3),
        "cpu_seconds": round(cpu, 3), "seconds_by": {k: round(v, 3) for k, v in watch.seconds().items()},
        "load_before": load, "threads": torch.get_num_threads(), "answers": [answer.text for answer in made.flat],
    }  # fmt: skip


def _run(root: Path, base: str) -> dict[str, Any]:
    """Return what one process measured, with fast_ft of the checkout at `root`."""
    words = [sys.executable, "-P", str(Path(__file__).absolute()), "--base", base, "--child"]
    done = subprocess.run(words, env=os.environ | {"PYTHONPATH": str(root)}, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    sys.exit(main())
