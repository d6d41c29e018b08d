"""Plans against measurements: five runs, on none of which a constant of the planner was fitted.

Each run goes through fast_ft itself, with its model loaded again. All run in one process, since importing the libraries
takes as long as any of them. Between two runs the allocator's cache is emptied and its peak reset, and the memory that
is still allocated is recorded.
`python -m bench.plan_checks JOB.json`.
"""

from __future__ import annotations

import gc
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench import emulation, ours
from bench.watch import Watch
from fast_ft.common.atomic_files import write_json
from fast_ft.data import dataset, encoding
from fast_ft.hub.families import GIB
from fast_ft.recipe import loader
from fast_ft.recipe.schema import Recipe

STEPS, WARM_UP = 8, 2
_MOST_LEFT_GIB = 0.1  #: the most that may be left of the run before when the next one begins
_LONG_ROWS, _CAPPED = "r = 8, rows of 2,048 tokens", "a cap of 10 GiB"
#: What each run changes in the bench's recipe.
CASES: dict[str, list[str]] = {
    _LONG_ROWS: ["lora.r=8"],
    "r = 64": ["lora.r=64", "lora.lora_alpha=128"],
    "the 100 longest rows": ["select.rank_by.conversation_tokens=1.0"],
    "50 short rows": ["select.rank_by.conversation_tokens=-1.0", "select.take=50"],
    _CAPPED: [],
}


def main() -> int:
    """Run all cases of a job: recipe, overrides, out, cap_gib, started."""
    job: dict[str, Any] = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    cases: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        for number, (case, changes) in enumerate(CASES.items()):
            if job["only"] and case not in job["only"]:
                continue
            work = Path(name) / str(number)
            work.mkdir()
            overrides = [*job["overrides"], *changes]
            if case == _LONG_ROWS:
                rows = long_rows(loader.load_recipe(job["recipe"], job["overrides"]), work / "rows.json")
                overrides.append(f"data.train={rows}")
            cap = 10.0 if case == _CAPPED else job["cap_gib"]
            cases[case] = run(job, overrides, work, cap)
            write_json(Path(job["out"]), cases)  # at once: what follows may not end in time
    return 0


def run(job: dict[str, Any], overrides: list[str], work: Path, cap_gib: float) -> dict[str, Any]:
    """Train a few steps and return what was planned and what was measured."""
    left = _emptied()
    limits, watch = emulation.Limits(cap_gib, None, False), Watch(time.monotonic())
    given = {"recipe": job["recipe"], "overrides": overrides, "adapter": None, "work": str(work), "stop_after": STEPS}
    try:
        found = ours.run(given, limits, watch)
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":
            raise
        return {"overrides": overrides[len(job["overrides"]) :], "out_of_memory": True, "planned_gib": 0.0}
    facts = limits.to_json()
    seconds = [step["seconds"] for step in watch.steps][WARM_UP:]
    planned = (found["predicted"]["step_seconds"] or [0.0] * STEPS)[WARM_UP : len(watch.steps)]
    return {
        "overrides": [each for each in overrides[len(job["overrides"]) :] if not each.startswith("data.train=")],
        "plan": found["plan"],
        "plan_at_the_end": found["plan_at_the_end"],
        "allocated_at_start_gib": round(left, 3),
        "planned_gib": found["predicted"]["peak_gib"] or 0.0,
        "measured_gib": round(facts["peak_reserved_gib"] + facts["context_after_gib"], 3),
        "peak_reserved_gib": facts["peak_reserved_gib"],
        "context_gib": facts["context_after_gib"],
        "planned_step_seconds": planned,
        "measured_step_seconds": seconds,
        "planned_seconds": round(statistics.median(planned), 4),
        "measured_seconds": round(statistics.median(seconds), 4),
        "cap_gib": cap_gib,
        "rates": facts["rates"],
    }


def _emptied() -> float:
    """Free the memory of the run before; return the GiB still allocated, which would count as the next run's."""
    gc.collect()
    torch: Any = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():  # the first run; fast_ft sets the allocator's options first
        return 0.0
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return float(torch.cuda.memory_allocated() / GIB)


def long_rows(recipe: Recipe, path: Path, tokens: int = 2048, count: int = 64) -> Path:
    """Write rows of at most `tokens` tokens, prompt included: responses of the recipe's file, one behind the other."""
    encoder = encoding.load_encoder(recipe.model)
    pool = dataset.load_pool(recipe.data)
    words = " ".join(each.response for each in pool.examples(range(len(pool)))).split(" ")
    rows, at = [], 0
    for number in range(count):
        prompt = f"Write text number {number}."
        (asked,), _ = encoder.count([prompt], [])
        taken = tokens  # words; fewer than tokens
        while True:
            text = " ".join(words[(at + i) % len(words)] for i in range(taken))
            _, (answer,) = encoder.count([], [text])
            if asked + answer <= tokens:
                break
            taken -= max(1, (asked + answer - tokens) // 3)
        at += taken
        turns = [{"from": "human", "value": prompt}, {"from": "gpt", "value": text}]
        rows.append({"id": f"long-{number}", "conversations": turns})
    write_json(path, rows)
    return path


def figures(result: dict[str, Any]) -> dict[str, tuple[float, str]]:
    """Return the worst share by which peak and step time were missed; nothing unless all five runs are there."""
    cases = result["cases"]
    if set(cases) != set(CASES) or any(_unsound(case) for case in cases.values()):
        return {}
    memory, seconds = missed(cases)
    return {
        "plan.peak_error": (round(memory, 4), "planned peak memory against measured, worst of five runs"),
        "plan.minutes_error": (round(seconds, 4), "planned step time against measured, worst of five runs"),
    }


def missed(cases: dict[str, Any]) -> tuple[float, float]:
    """Return the worst shares by which peak memory and step time were missed."""
    memory = max(abs(case["planned_gib"] / case["measured_gib"] - 1) for case in cases.values())
    seconds = max(
        abs(statistics.median(case["planned_step_seconds"]) / statistics.median(case["measured_step_seconds"]) - 1)
        for case in cases.values()
    )
    return memory, seconds


def _unsound(case: dict[str, Any]) -> bool:
    return bool(case.get("out_of_memory") or not case["planned_gib"] or case["allocated_at_start_gib"] > _MOST_LEFT_GIB)


if __name__ == "__main__":
    sys.exit(main())
