"""python -m bench.real --base FILE.gguf: do our blocks, Unsloth and PEFT agree on a real model? On one NVIDIA card.

Each way is a process, since importing Unsloth patches transformers; the three run side by side (bench/real_ways.py). In
each: fp16 and bf16, over a 4-bit and a 16-bit base, STEPS steps over our own rows, from one initial adapter whose B
matrices are not zero.

What is compared with what:

    to PEFT      a way's gradients, and its losses, with PEFT's in the same dtype over the same base.
    to fp32      a way's gradients with those of PEFT in fp32, over the very weights that the way computes with: the
                 base as this dtype holds it, 4 bits turned to 16. PEFT itself is measured so too.
    to itself    PEFT with PEFT in passes of two rows: the same sums, rounded in another order.
    all rows     the first two again, of one step over all rows. Rounding averages out there; a mistake does not.

Gradients are those of STEPS steps of eight rows at the initial adapter; their median and the least are kept. One step
says little in bf16: its 8 bits round a few huge activations, and now and then the gradients of eight rows turn by four
times the usual angle, in one way or in another. `problems` says where the bars are.

Decoding: the engine's greedy answers, taken through transformers' own forward pass of the same model.
Which kernels ran is printed and kept: hidden 576 is no size for each of them.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.real_ways import AGAIN, ALL_ROWS, BORDER, EXACT, SETUPS, STEPS, WAYS, Gradients, child

COSINE, LOSS, ARGMAX = 0.999, 0.005, 0.99  #: least cosine, most difference of the loss, least share of tokens
#: How often the distance from fp32 (1 - cosine, or the mean loss's) may be PEFT's own, and what may be added to it.
TIMES, MORE = 2, 1e-4


def main() -> int:
    """Measure, write bench/results/real-CARD.json, and print the figures."""
    parser = argparse.ArgumentParser(prog="python -m bench.real", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--base", required=True, help="the model: a folder or a .gguf file")
    parser.add_argument("--results", type=Path, help="the raw result; default: bench/results/real-CARD.json")
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--train", type=Path, help="in place of all this: ways of choosing 100 of these rows")
    parser.add_argument("--held-out", type=Path, help="with --train: other rows of the same source")
    parser.add_argument("--samples", type=Path, default=Path("runs/choices"), help="with --train: a folder of samples")
    parser.add_argument("--processes", type=int, default=4, help="with --train: side by side on the card")
    parser.add_argument("--minutes", type=float, default=3.0, help="with --train: no run begins after these")
    parser.add_argument("--capture", action="store_true", help="with --train: replay passes from CUDA graphs")
    parser.add_argument("--only", default="", help="with --train: these choices, separated by commas")
    options = parser.parse_args()
    if options.train or options.held_out:
        if not (options.train and options.held_out):
            parser.error("--train and --held-out go together")
        from bench import choices_measure

        choices_measure.measure(
            choices_measure.Call(
                options.base, options.train, options.held_out, options.samples, options.processes, options.minutes,
                capture=options.capture, only=tuple(filter(None, options.only.split(","))), target=options.results,
            )
        )  # fmt: skip
        return 0
    if options.way:
        child(options.way, options.base, options.results)
        return 0
    result = measure(options.base, options.results)
    print(json.dumps({name: value for name, (value, _) in headline(result).items()}))
    print(f"under the bar: {'; '.join(problems(result)) or 'nothing'}")
    return 0


def measure(base: str, target: Path | None = None) -> dict[str, Any]:
    """Return the raw result of all ways, written to `target` too. RuntimeError with a way's own words if it fails."""
    from bench import figures, machine
    from fast_ft.common.atomic_files import write_json
    from fast_ft.hub import download

    folder, started = str(download.model_folder(base).absolute()), time.monotonic()
    with tempfile.TemporaryDirectory() as place:
        outs = {way: Path(place) / f"{way}.json" for way in WAYS}
        running = {
            way: subprocess.Popen(
                [sys.executable, "-m", "bench.real", "--base", folder, "--way", way, "--results", str(out)],
                cwd=machine.ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
            )
            for way, out in outs.items()
        }  # fmt: skip
        said = {way: process.communicate()[1] for way, process in running.items()}
        if failed := [way for way, process in running.items() if process.returncode]:
            raise RuntimeError(f"{failed[0]}: {said[failed[0]][-3000:]}")
        ways = {way: json.loads(out.read_text(encoding="utf-8")) for way, out in outs.items()}
        gradients = {way: out.with_suffix(".safetensors") for way, out in outs.items()}
        made = {way: _load(path) for way, path in gradients.items()}
        compared, again = _compared(ways, made), _again(made["peft"])
    result = {
        "kind": "real", **machine.stamp("python -m bench.real --base models/smollm2-135m-instruct.gguf"),
        "seconds": round(time.monotonic() - started, 1), "ways": ways, "compared": compared,
        "again": again,
    }  # fmt: skip
    write_json(target or figures.RESULTS / f"real-{machine.slug_of(result)}.json", result)
    return result


def headline(result: dict[str, Any]) -> dict[str, tuple[float, str]]:
    """Return {figure: (value, unit)}, computed from the raw samples."""
    compared, peft = result["compared"], result["ways"]["peft"]

    def least(key: str, entries: list[dict[str, Any]]) -> float:
        return min(each[key] for each in entries)

    own = [each for each in compared if each["way"] == "fused"]
    alone = [each for each in peft["training"].values() if "cosine_to_fp32" in each]
    of_peft = [{"way": "peft", "setup": setup, **peft["training"][setup]} for setup in SETUPS]
    to_peft = "cosine of gradients of eight rows to PEFT's in the same dtype, median of ten steps"
    found = {
        "real.grad_cosine_worst": (least("cosine", compared), f"{to_peft}, worst of all ways"),
        "real.grad_cosine_worst_matrix": (least("cosine_worst_matrix", compared), "the same of one LoRA matrix"),
        "real.grad_cosine_own_worst": (least("cosine", own), f"{to_peft}, worst of our blocks'"),
        "real.grad_cosine_all_rows_worst": (least("cosine_all_rows", compared), "the same of all rows in one step"),
        "real.grad_cosine_to_fp32_own_worst": (least("cosine_to_fp32", own), "cosine of our blocks' to fp32's"),
        "real.grad_cosine_to_fp32_own_least": (least("cosine_to_fp32_least", own), "the same, least of ten steps"),
        "real.grad_cosine_to_fp32_peft_worst": (least("cosine_to_fp32", alone), "cosine of PEFT's own to fp32's"),
        "real.grad_cosine_to_fp32_peft_least": (least("cosine_to_fp32_least", alone), "the same, least of ten steps"),
        "real.grad_cosine_peft_again_worst": (
            least("cosine", result["again"]), "cosine of PEFT's to PEFT's own in passes of two rows",
        ),
        "real.loss_apart_worst": (max(map(_apart, compared)), "largest difference of a step's loss, as a share"),
        "real.loss_apart_own_worst": (max(map(_apart, own)), "the same of our blocks"),
    }  # fmt: skip
    for each in [*compared, *of_peft]:
        if each["setup"].startswith("bfloat16"):
            way, bits = {"fused": "own"}.get(each["way"], each["way"]), each["setup"].partition("/")[2]
            name, unit = f"real.bf16_loss_off_{way}_{bits}", f"difference of ten steps' mean loss from fp32's, {way}"
            found[name] = (_to_fp32(result, each), f"{unit}, bf16 over a base of {bits} bits")
    for name, answers in peft["decoding"].items():
        found[f"real.argmax_agreement_{name}"] = (answers["argmax_agrees"], "share of greedy tokens, teacher-forced")
    return found


def problems(result: dict[str, Any], ways: Sequence[str] = WAYS) -> list[str]:
    """Say what of some ways, and of decoding, misses its bar, in words.

    A way may be TIMES as far from fp32 as PEFT itself is: the median of its steps' gradients, and in bf16 the mean of
    its losses, too. In bf16 two ways are as far from each other as both are from fp32. In fp16 rounding is far below
    COSINE and LOSS, and each step is compared with PEFT's.
    """
    alone, found = result["ways"]["peft"]["training"], []
    for each in result["compared"]:
        if each["way"] not in ways:
            continue
        peft = alone[each["setup"]]
        texts = [f"cosine of all rows {each['cosine_all_rows']}"] if each["cosine_all_rows"] < COSINE else []
        own, pefts = each["cosine_to_fp32"], peft["cosine_to_fp32"]
        texts += [f"cosine to fp32 {own}, PEFT's {pefts}"] if not 1 - own <= TIMES * (1 - pefts) + MORE else []
        if each["setup"].startswith("float16"):
            texts += [f"cosine {each['cosine_least']}"] if each["cosine_least"] < COSINE else []
            texts += [f"losses {_apart(each):.4f} apart"] if not _apart(each) <= LOSS else []
        else:
            off, pefts = _to_fp32(result, each), _to_fp32(result, {"setup": each["setup"], **peft})
            texts += [f"mean loss {off} from fp32's, PEFT's {pefts}"] if not off <= TIMES * pefts + MORE else []
        texts += ["a step was skipped"] if each["skipped"] else []
        found += [f"{each['way']}, {each['setup']}: {text}" for text in texts]
    decoding = result["ways"]["peft"]["decoding"]
    return found + [
        f"{name}: argmax {got}" for name, each in decoding.items() if (got := each["argmax_agrees"]) < ARGMAX
    ]


def _apart(each: dict[str, Any]) -> float:
    return round(max(abs(a - b) / b for a, b in zip(each["losses"], each["losses_of_peft"], strict=True)), 6)


def _to_fp32(result: dict[str, Any], each: dict[str, Any]) -> float:
    """Return how far the mean of the losses is from that of fp32 over the same weights, as a share."""
    exact = result["ways"]["peft"]["training"][EXACT + each["setup"]]["losses"]
    return round(abs(sum(each["losses"]) / sum(exact) - 1), 6)


def _compared(ways: dict[str, Any], gradients: dict[str, dict[str, Gradients]]) -> list[dict[str, Any]]:
    """Return how far each way but PEFT is from PEFT, and from fp32; PEFT's own distance from fp32 goes to its entry."""
    found, peft = [], gradients["peft"]
    for way in WAYS:
        for setup in SETUPS:
            mine, ours = gradients[way], ways[way]["training"][setup]
            to_fp32 = _cosines("cosine_to_fp32", mine[setup], peft[EXACT + setup])
            to_fp32 |= _cosines("cosine_to_fp32_all_rows", mine[setup + ALL_ROWS], peft[EXACT + setup + ALL_ROWS])
            if way == "peft":
                ours |= to_fp32
                continue
            to_peft = _cosines("cosine", mine[setup], peft[setup])
            to_peft |= _cosines("cosine_all_rows", mine[setup + ALL_ROWS], peft[setup + ALL_ROWS])
            found.append(
                {
                    "way": way, "setup": setup, **to_peft, **to_fp32, "losses": ours["losses"],
                    "losses_of_peft": ways["peft"]["training"][setup]["losses"], "skipped": sum(ours["skipped"]),
                }
            )  # fmt: skip
    return found


def _again(peft: dict[str, Gradients]) -> list[dict[str, Any]]:
    """Return how far PEFT is from itself in passes of two rows."""
    return [{"setup": setup, **_cosines("cosine", peft[AGAIN + setup], peft[setup])} for setup in SETUPS]


def _cosines(name: str, some: Gradients, others: Gradients) -> dict[str, Any]:
    """Return the cosine of all gradients of a step together, median and least of the steps; and each step's.

    NAME_worst_matrix is the median of the steps' smallest cosine of a matrix.
    """
    import torch

    from bench.agreement import cosine_of

    wholes, matrices = [], []
    for a, b in zip(some, others, strict=True):
        assert a.keys() == b.keys(), f"weights with a gradient on one side only: {sorted(a.keys() ^ b.keys())[:2]}"
        wholes.append(round(cosine_of(*(torch.cat([side[key].flatten() for key in a]) for side in (a, b))), 6))
        matrices.append(min(cosine_of(a[key], b[key]) for key in a))
    return {
        name: round(statistics.median(wholes), 6), f"{name}_least": min(wholes), f"{name}_steps": wholes,
        f"{name}_worst_matrix": round(statistics.median(matrices), 6),
    }  # fmt: skip


def _load(path: Path) -> dict[str, Gradients]:
    from safetensors.torch import load_file

    found: dict[str, Gradients] = {}
    for key, gradient in load_file(str(path)).items():
        setup, step, weight = key.split(BORDER)
        steps = found.setdefault(setup, [{} for _ in range(STEPS if ALL_ROWS not in setup else 1)])
        steps[int(step)][weight] = gradient
    return found


if __name__ == "__main__":
    sys.exit(main())
