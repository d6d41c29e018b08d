"""Plans against measurements: five runs, on none of which a constant of the planner was fitted.

Each run goes through fast_ft itself, in a process of its own, as a user's does: what a run before left in the card's
context would count as this one's. The bases are random, of two shapes, and written once.
`python -m bench.plan_checks JOB.json`.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import emulation, machine, ours
from bench.training import Order, run_way
from bench.watch import Watch
from fast_ft.common.atomic_files import write_json
from fast_ft.data import dataset, encoding
from fast_ft.hub import download
from fast_ft.recipe import loader, policy_ntu_hw5
from fast_ft.recipe.schema import Recipe
from fast_ft.run.folder import now

STEPS, WARM_UP = 8, 2
#: The bases' shapes. The second one is Mistral-7B's, half as deep: fewer key heads, a wider MLP.
BASES: Mapping[str, Mapping[str, Any]] = {
    "llama": policy_ntu_hw5.LLAMA_2_7B,
    "mistral": {
        "model_type": "mistral", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 16,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 32000,
        "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "hidden_act": "silu", "tie_word_embeddings": False,
        "sliding_window": None,
    },
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """What a run changes in the bench's recipe. `row_tokens`: the length of rows that are made of the recipe's."""

    overrides: tuple[str, ...]
    cap_gib: float
    base: str = "llama"
    row_tokens: int | None = None


CASES: dict[str, Case] = {
    "r = 32, rows of 250 to 400 tokens": Case(
        ("lora.r=32", "lora.lora_alpha=64", "select.where={conversation_tokens: '250..400'}", "select.take=64"), 14.7
    ),
    "bfloat16, rows of 1,024 tokens, 12 GiB": Case(("model.dtype=bfloat16",), 12.0, row_tokens=1024),
    "no graphs, the longest rows, 30 GiB": Case(
        ("train.capture=false", "select.rank_by.conversation_tokens=1.0"), 30.0
    ),
    "Mistral's shape, 16 layers, r = 8, 9 GiB": Case(("lora.r=8",), 9.0, base="mistral"),
    "16 rows a step, 7.2 GiB": Case(("train.effective_batch_size=16",), 7.2),
}


def measure(order: Order) -> dict[str, Any]:
    """Run the runs that the result does not hold yet; return the result, which is written after each of them.

    Their bases are written once for each shape. A run whose process fails is told, and left out.
    """
    path = order.path
    fresh: dict[str, Any] = {
        "kind": "plans", **machine.stamp(order.command), "steps": STEPS, "warm_up": WARM_UP,
        "process": "each run in its own", "cases": {},
    }  # fmt: skip
    result = json.loads(path.read_text(encoding="utf-8")) if path.is_file() and not order.again else fresh
    if result["environment"]["program"] != fresh["environment"]["program"]:
        result = fresh  # another planner: nothing is kept
    recipe = loader.load_recipe(order.recipe, order.overrides)
    tokenizer = download.tokenizer_folder(recipe.model.tokenizer or recipe.model.name_or_path, recipe.model.revision)
    left = [name for name in CASES if name not in result["cases"]]
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        for number, name in enumerate(left):
            shape = CASES[name].base
            log = path.parent / "logs" / f"{path.stem}-{number}.log"
            job: dict[str, Any] = {
                "way": name, "case": name, "recipe": order.recipe, "overrides": list(order.overrides),
                "base": str(Path(folder) / shape), "work": str(Path(folder) / str(number)),
                "out": str(Path(folder) / f"{number}.json"),
            }  # fmt: skip
            if not Path(job["base"]).is_dir():
                base = {"way": f"base {shape}", "config": dict(BASES[shape]), "tokenizer": str(tokenizer)}
                run_way({**job, **base}, log, order.timeout, module="bench.random_checkpoint")
            if (found := run_way(job, log, order.timeout, module="bench.plan_checks")) is not None:
                result["cases"][name] = found
                write_json(path, result | {"date": now()})  # at once: what follows may not end in time
    return result


def main() -> int:
    """Run one case of a job: case, recipe, overrides, base, out, work."""
    job: dict[str, Any] = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    case, work = CASES[job["case"]], Path(job["work"])
    overrides = [*job["overrides"], f"model.name_or_path={job['base']}", *case.overrides]
    if case.row_tokens is not None:
        rows = long_rows(loader.load_recipe(job["recipe"], overrides), work / "rows.json", case.row_tokens)
        overrides.append(f"data.train={rows}")
    write_json(Path(job["out"]), run(job["recipe"], overrides, work, case))
    return 0


def run(recipe: str, overrides: list[str], work: Path, case: Case) -> dict[str, Any]:
    """Train a few steps and return what was planned and what was measured."""
    limits, watch = emulation.Limits(case.cap_gib, None, False), Watch(time.monotonic())
    given = {
        "recipe": recipe,
        "way": "fast_ft",
        "overrides": overrides,
        "adapter": None,
        "work": str(work),
        "stop_after": STEPS,
    }
    about = {"overrides": list(case.overrides), "base": case.base, "row_tokens": case.row_tokens}
    try:
        found = ours.run(given, limits, watch)
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":
            raise
        return {**about, "out_of_memory": True, "planned_gib": 0.0}
    facts = limits.to_json()
    seconds = [step["seconds"] for step in watch.steps][WARM_UP:]
    planned = (found["predicted"]["step_seconds"] or [0.0] * STEPS)[WARM_UP : len(watch.steps)]
    return {
        **about,
        "plan": found["plan"],
        "plan_at_the_end": found["plan_at_the_end"],
        "planned_gib": found["predicted"]["peak_gib"] or 0.0,
        "measured_gib": round(facts["peak_reserved_gib"] + facts["context_after_gib"], 3),
        "peak_reserved_gib": facts["peak_reserved_gib"],
        "context_gib": facts["context_after_gib"],
        "planned_step_seconds": planned,
        "measured_step_seconds": seconds,
        "planned_seconds": round(statistics.median(planned), 4),
        "measured_seconds": round(statistics.median(seconds), 4),
        "cap_gib": case.cap_gib,
        "rates": facts["rates"],
        "seconds_by": watch.stamps,
    }


def long_rows(recipe: Recipe, path: Path, tokens: int, count: int = 64) -> Path:
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
    """Return by how much peak and step time were missed; nothing unless all five runs are there and went as planned."""
    cases = result["cases"]
    if set(cases) != set(CASES) or any(_unsound(case) for case in cases.values()):
        return {}
    memory, seconds = missed(cases)
    over = max(case["measured_gib"] / case["planned_gib"] - 1 for case in cases.values())
    return {
        "plan.peak_error": (round(memory, 4), "planned peak memory against measured, worst of five runs"),
        "plan.peak_over": (round(max(0.0, over), 4), "measured peak memory above the planned, worst of five runs"),
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
    """Whether a run took another plan than the one that is judged, or none."""
    return bool(case.get("out_of_memory") or not case["planned_gib"] or case["plan_at_the_end"] != case["plan"])


if __name__ == "__main__":
    sys.exit(main())
