"""python -m bench.export_cost RUN_DIR --results FILE: seconds and host memory of `export --to merged`, checks included.

Memory of the process's own counts, as bench.host_memory has it; what the imports alone take is measured beside it.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench import machine
from bench.host_memory import tree_gib
from fast_ft.common import gpu
from fast_ft.common.atomic_files import write_json

_IMPORTS = "import torch, transformers, peft, bitsandbytes, safetensors.torch, time; time.sleep(3)"
_EVERY = 0.05  #: seconds between two looks


def main(arguments: list[str] | None = None) -> int:
    """Measure, write the result and print its figures; return the exit status."""
    given = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(prog="python -m bench.export_cost", description=__doc__)
    parser.add_argument("run")
    parser.add_argument("--results", type=Path, required=True, help="a JSON for the raw samples")
    options = parser.parse_args(given)
    command = shlex.join(["python", "-m", "bench.export_cost", *given])
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        words = ["-m", "fast_ft", "export", options.run, "--to", "merged", "--output", folder]
        result = {"kind": "export", **machine.stamp(command), "imports": watched(["-c", _IMPORTS]),
                  "export": watched(words)}  # fmt: skip
        merged = Path(folder) / "merged"
        result["bytes"] = sum(path.stat().st_size for path in merged.glob("*.safetensors"))
        result["checked"] = json.loads((merged / "fast_ft_export.json").read_text(encoding="utf-8"))
    write_json(options.results, result)
    print(json.dumps({name: value for name, (value, _) in figures(result).items()} | result["checked"]))
    return 0


def watched(words: Sequence[str]) -> dict[str, Any]:
    """Run a Python process to its end; return its seconds and, ten a second, what its memory was in GiB."""
    started, samples = time.monotonic(), []
    process = subprocess.Popen([sys.executable, *words])
    while process.poll() is None:
        samples.append(tree_gib(process.pid)["own_gib"])
        time.sleep(_EVERY)
    if process.returncode:
        raise SystemExit(f"the command ended with status {process.returncode}")
    return {"seconds": round(time.monotonic() - started, 2), "gib": [*samples[::2], max(samples)]}


def figures(result: dict[str, Any]) -> dict[str, tuple[float, str]]:
    """Return {figure: (value, unit)}."""
    card = gpu.card_slug(result["environment"]["gpu"]["name"])
    size = f"a model of {result['bytes'] / 2**30:.1f} GiB in 16 bits"
    above = max(result["export"]["gib"]) - max(result["imports"]["gib"])
    return {
        f"export.{card}.seconds": (
            result["export"]["seconds"],
            f"s from command to a merged and checked model, {size}",
        ),
        "export.host_gib": (round(above, 2), f"GiB of the process's own memory at most, above its imports, {size}"),
    }


if __name__ == "__main__":
    sys.exit(main())
