"""The planner's model of a T4 against what others published of theirs; nobody who works on this program had one.

`python -m bench.calibration` prints how far the model is off. The runs, their sources and what is derived about them
stand in bench/results/published-t4.json.

* Seconds: one number, the rate of products, is fitted on each run in turn, and predicts all the others.
* Peak memory: nothing is fitted. Runs of 7B to 14B are compared; smaller and larger ones are shown.
* Decoding: a host's time of one step and a row's time are fitted on batch 1 and the largest; batch 8 is predicted.

Every other number is the planner's, or was measured apart from these runs and stands in the file with its source.
"""

from __future__ import annotations

import argparse
import json
import statistics
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from fast_ft.hub.families import ModelShape
from fast_ft.plan import cards, cost_model, decode_time, memory_model
from fast_ft.plan.constants import MEMORY
from fast_ft.plan.training_work import UNPACK_BYTES, Rates, Training

PUBLISHED = Path(__file__).parent / "results" / "published-t4.json"
_JUDGED_BILLIONS = range(7, 15)  #: parameters of the runs whose peak is judged
_ALL_POSITIONS = 2**31  #: Unsloth's loss holds the logits of all of them


@dataclass(frozen=True)
class Run:
    """A published run: what it printed, and a pass of it as the model needs it."""

    what: str
    seconds: float
    peak_gib: float
    unsloth: str
    billions: int
    shape: ModelShape
    training: Training
    steps: int
    passes_a_step: int
    tokens: int  #: of a pass, padding included, in the mean
    row: float  #: tokens that a token's row has
    widest: int  #: tokens of the largest pass
    recompute_layers: int


def runs(content: dict[str, Any] | None = None) -> list[Run]:
    """Return the published runs, of the file or of `content`."""
    content = content or _content()
    return [_run(each, content) for each in content["runs"]]


def _run(entry: dict[str, Any], content: dict[str, Any]) -> Run:
    shape, tokens, rows = ModelShape(**content["shapes"][entry["shape"]]), content["tokens"], entry["rows_a_pass"]
    longest = tokens["longest_of_480"] if rows == 2 else tokens["longest_of_240"]
    row = {"padded": tokens["longer_of_two"] if rows == 2 else tokens["mean_row"], "padding-free": tokens["mean_row"]}
    if (packed := entry["batching"].startswith("packed")) is True:
        mean = longest = tokens["packed_row"]
    else:
        mean = row[entry["batching"]]
    widest = longest + (rows - 1) * (tokens["mean_row"] if entry["batching"] == "padding-free" else longest)
    share, t4 = (1.0 if packed else entry["tokens_share"]), cards.card("t4")
    old = content["unpack_seconds_a_weight"] * t4.gb_per_s * 1e9
    training = Training(
        r=entry["r"], optim="adamw_8bit", load_in_4bit=True, backend="unsloth", rows=rows,
        longest=round(longest * share),
        unpack_bytes=old if entry["unpacking"].startswith("before") else UNPACK_BYTES,
        offloaded=entry.get("inputs") != "on the card", loss_positions=_ALL_POSITIONS,
    )  # fmt: skip
    return Run(
        entry["what"], entry["seconds"], entry["peak_gib"], entry["unsloth"], entry["billions"], shape, training,
        entry["steps"], entry["passes_a_step"], round(rows * mean * share), mean * share, round(widest * share),
        shape.num_hidden_layers if entry["recompute"] else 0,
    )  # fmt: skip


def seconds_of(run: Run, tflops: float, attention_share: float | None = None) -> float:
    """Return the seconds that the planner's model gives a published run at this rate of products.

    `attention_share`: attention does this share of that rate; None: it has the card's own rate.
    """
    t4 = cards.card("t4")
    rates = Rates(tflops, t4.gb_per_s, t4.attention if attention_share is None else attention_share * tflops)
    one = cost_model.pass_seconds(
        run.shape, run.training, rates, run.tokens, run.recompute_layers, row=run.row, capture=False
    )
    return run.steps * (run.passes_a_step * max(one.card, one.host) + cost_model.STEP_SECONDS)


def rate_of(run: Run, attention_share: float | None = None) -> float:
    """Return the TFLOP/s at which the model gives a published run its seconds."""
    low, high = 1.0, 1000.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if seconds_of(run, middle, attention_share) > run.seconds else (low, middle)
    return (low + high) / 2


def leave_one_out(found: list[Run], attention_share: float | None = None) -> list[dict[str, Any]]:
    """Return for each run the rate that it alone gives, and the shares by which that rate misses all the others."""
    folds = []
    for fitted in found:
        rate = rate_of(fitted, attention_share)
        errors = {
            each.what: round(seconds_of(each, rate, attention_share) / each.seconds - 1, 4)
            for each in found
            if each != fitted
        }
        folds.append({"fitted": fitted.what, "tflops": round(rate, 2), "errors": errors})
    return folds


def peak_gib(run: Run) -> float:
    """Return the peak that the planner's model of memory gives a published run, without the CUDA context."""
    taken = memory_model.fixed_gib(run.shape, run.training) - MEMORY["context_gib"]
    return taken + memory_model.pass_gib(run.shape, run.training, run.widest, run.recompute_layers)


def decoded(entry: dict[str, Any], content: dict[str, Any] | None = None) -> dict[str, Any]:
    """Return a decoding series' predicted tokens/s at batch 8, and the share by which that misses.

    A step takes the longer of the host's time, which is the whole step at batch 1, and of reading the weights; each row
    adds as much as the largest batch says.
    """
    content = content or _content()
    shape, speeds = ModelShape(**content["shapes"][entry["shape"]]), entry["tokens_per_s"]
    bandwidth, largest = cards.card("t4").gb_per_s * 1e9, max(map(int, speeds))
    read = decode_time.step_seconds(shape, Rates(1e9, bandwidth / 1e9), 0, 0, 2.0)
    unpacked = shape.linear_weights * content["unpack_seconds_a_weight"] if entry["weights"] == "unpacked" else 0.0
    step = max(1 / speeds["1"], read + unpacked)
    a_row = (largest / speeds[str(largest)] - step) / largest
    predicted = 8 / (step + 8 * a_row)
    return {"what": entry["what"], "published": speeds["8"], "predicted": round(predicted, 1),
            "error": round(predicted / speeds["8"] - 1, 4)}  # fmt: skip


def summary(content: dict[str, Any] | None = None) -> dict[str, Any]:
    """Return all folds, peaks and decoding predictions, and the worst and the median of their errors.

    `otherwise` says what the worst errors would be with two assumptions made another way: attention that slows down
    with products, at half their rate, and the longest row of 480 by the mean of all draws in place of the median.
    """
    content = content or _content()
    found = runs(content)
    folds = leave_one_out(found)
    peaks = _peaks(found)
    decoding = [decoded(each, content) for each in content["decoding"]]
    rates = [fold["tflops"] for fold in folds]
    longer = {**content, "tokens": content["tokens"] | {"longest_of_480": content["tokens"]["longest_of_480_mean"]}}
    return {
        "folds": folds,
        "peaks": peaks,
        "decoding": decoding,
        "tflops": [min(rates), max(rates)],
        "seconds_error": _errors(folds),
        "peak_error": _worst(peaks),
        "decode_error": max(abs(each["error"]) for each in decoding),
        "otherwise": {
            "attention_at_half": _errors(leave_one_out(found, 0.5))["worst"],
            "longest_row_by_mean": _worst(_peaks(runs(longer))),
        },
    }


def _errors(folds: list[dict[str, Any]]) -> dict[str, float]:
    errors = [abs(error) for fold in folds for error in fold["errors"].values()]
    return {"median": round(statistics.median(errors), 4), "worst": max(errors)}


def _peaks(found: list[Run]) -> list[dict[str, Any]]:
    predicted = [(run, peak_gib(run)) for run in found]
    return [
        {
            "what": run.what,
            "unsloth": run.unsloth,
            "published": run.peak_gib,
            "predicted": round(gib, 2),
            "error": round(gib / run.peak_gib - 1, 4),
            "judged": run.billions in _JUDGED_BILLIONS,
        }
        for run, gib in predicted
    ]


def _worst(peaks: list[dict[str, Any]]) -> float:
    return max(abs(float(each["error"])) for each in peaks if each["judged"])


@cache
def _content() -> dict[str, Any]:
    content: dict[str, Any] = json.loads(PUBLISHED.read_text(encoding="utf-8"))
    return content


def figures(content: dict[str, Any]) -> dict[str, tuple[float, str]]:
    """Return {figure: (value, unit)}: how far the model of a T4 is from what others published."""
    found = summary(content)
    count = len(found["folds"])
    return {
        "t4.seconds_error_median": (
            found["seconds_error"]["median"],
            f"planned seconds against {count} published runs on T4s, each run fitting the one rate in turn, median",
        ),
        "t4.seconds_error_worst": (found["seconds_error"]["worst"], "the same, worst"),
        "t4.peak_error_worst": (found["peak_error"], "planned peak memory against the published, 7B to 14B, worst"),
        "t4.decode_error_worst": (
            found["decode_error"],
            f"decoding on a T4 at batch 8, predicted from batch 1 and 32, worst of {len(found['decoding'])} series",
        ),
    }


def markdown(found: dict[str, Any]) -> str:
    """Return the published runs as a table in Markdown: what each gives alone, and what the model says of it."""
    lines = [
        "| run, Unsloth's version | alone it gives, TFLOP/s | worst miss of the others | GiB published | predicted |",
        "|---" * 5 + "|",
    ]
    for fold, peak in zip(found["folds"], found["peaks"], strict=True):
        worst = max(fold["errors"], key=lambda name: abs(fold["errors"][name]))
        lines.append(
            f"| {fold['fitted']}, {peak['unsloth']} | {fold['tflops']:.1f} | {worst} {fold['errors'][worst]:+.0%} | "
            f"{peak['published']:.2f} | {peak['predicted']:.2f} ({peak['error']:+.0%}) |"
        )
    lines += [
        "",
        "| decoding, Qwen2.5-3B | tokens/s at batch 8, published | predicted |",
        "|---" * 3 + "|",
        *(
            f"| {e['what']} | {e['published']:.1f} | {e['predicted']:.1f} ({e['error']:+.0%}) |"
            for e in found["decoding"]
        ),
    ]
    return "\n".join(lines)


def main() -> None:
    """Print every prediction beside what was published."""
    found = summary()
    print(markdown(found))
    print(json.dumps({key: value for key, value in found.items() if key not in ("folds", "peaks", "decoding")}))


if __name__ == "__main__":
    argparse.ArgumentParser("python -m bench.calibration", description=__doc__).parse_args()
    main()
