"""Plans against measurements: five runs, on none of which a constant of the planner was fitted.

Each run goes through fast_ft itself, in a process of its own, as a user's does: what a run before left in the card's
context would count as this one's. The processes load their libraries side by side, and use the card in turn. The bases
are random, of five shapes (bench/plan_bases.py). `python -m bench.plan_checks JOB.json` is one run.
"""

from __future__ import annotations

import json
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench import emulation, machine, ours, plan_bases
from bench.clock import say
from bench.process import WaitingProcess, card_to_itself, wait_for_turn
from bench.step_log import StepLog
from bench.training import Order
from fast_ft.common.atomic_files import write_json
from fast_ft.data import dataset, encoding
from fast_ft.data.prepare import PreparedData
from fast_ft.hub import download
from fast_ft.recipe import loader
from fast_ft.recipe.schema import Recipe
from fast_ft.run.folder import now

STEPS, WARM_UP = 24, 4


@dataclass(frozen=True)
class Case:
    """What a run changes in the bench's recipe. `row_tokens`: the length of rows that are made of the recipe's."""

    overrides: tuple[str, ...]
    cap_gib: float
    base: str = "llama-2-7b"
    row_tokens: int | None = None


CASES: dict[str, Case] = {
    "Llama-2-7B, r = 24, rows of 300 to 500 tokens, 11 GiB": Case(
        ("lora.r=24", "lora.lora_alpha=48", "select.where={conversation_tokens: '300..500'}", "select.take=64"),
        11.0,
    ),
    "Llama-2-13B's shape, 12 layers, r = 8, 6 GiB": Case(("lora.r=8", "select.take=64"), 6.0, base="llama-2-13b"),
    "Qwen2.5-7B's shape, 10 layers, bfloat16, 8 GiB": Case(
        ("model.dtype=bfloat16", "select.take=64"), 8.0, base="qwen2.5-7b"
    ),
    "SmolLM2-1.7B's shape, 12 rows of 768 tokens a step, 7 GiB": Case(
        ("train.effective_batch_size=12", "select.take=96"),
        7.0, base="smollm2-1.7b", row_tokens=768,
    ),
    "Llama-3.2-3B's shape, 14 layers, no graphs, the longest rows, 12 GiB": Case(
        ("train.capture=false", "select.rank_by.conversation_tokens=1.0", "lora.r=32", "select.take=64"),
        12.0, base="llama-3.2-3b",
    ),
}  # fmt: skip


def measure(order: Order) -> dict[str, Any]:
    """Run the runs that the result does not hold yet; return the result, which is written after each of them.

    Their bases are written first. A base of Llama-2-7B's shape is the recipe's, where that is a folder. A run whose
    process fails is told, and left out.
    """
    path = order.path
    fresh: dict[str, Any] = {
        "kind": "plans", **machine.stamp(order.command), "steps": STEPS, "warm_up": WARM_UP,
        "process": "each run in its own", "cases": {},
    }  # fmt: skip
    result = json.loads(path.read_text(encoding="utf-8")) if path.is_file() and not order.again else fresh
    if result["environment"]["program"] != fresh["environment"]["program"]:
        result = fresh  # another planner: nothing is kept
    left = [name for name in CASES if name not in result["cases"]]
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        jobs = [_job(order, name, Path(folder), number) for number, name in enumerate(left)]
        runs = [_begin(job) for job in jobs]
        try:
            log = path.parent / "logs" / f"{path.stem}-bases.log"
            wanted = [CASES[job["case"]].base for job in jobs if not Path(job["base"]).is_dir()]
            if wanted:
                plan_bases.write(wanted, Path(jobs[0]["tokenizer"]), log)
            for job, run_of_it in zip(jobs, runs, strict=True):
                status = run_of_it.run(order.timeout)
                if status != 0:
                    _tell(job, status)
                    run_of_it.end()
                    continue
                result["cases"][job["case"]] = json.loads(Path(job["out"]).read_text(encoding="utf-8"))
                write_json(path, result | {"date": now()})  # at once: what follows may not end in time
        finally:
            for each in runs:
                each.end()
    return result


def _job(order: Order, name: str, folder: Path, number: int) -> dict[str, Any]:
    recipe, shape = loader.load_recipe(order.recipe, order.overrides), CASES[name].base
    given = Path(recipe.model.name_or_path)
    there = shape == "llama-2-7b" and given.is_dir()
    log = order.path.parent / "logs" / f"{order.path.stem}-{number}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    return {
        "case": name, "changes": asdict(CASES[name]), "recipe": order.recipe, "overrides": list(order.overrides),
        "log": str(log),
        "base": str(given if there else plan_bases.folder(shape)), "tokenizer": str(_tokenizer(recipe)),
        "work": str(folder / str(number)), "out": str(folder / f"{number}.json"),
    }  # fmt: skip


def _tokenizer(recipe: Recipe) -> Path:
    return download.tokenizer_folder(recipe.model.tokenizer or recipe.model.name_or_path, recipe.model.revision)


def _begin(job: dict[str, Any]) -> WaitingProcess:
    Path(job["work"]).mkdir(parents=True)
    file = Path(job["out"]).with_suffix(".job.json")
    file.write_text(json.dumps(job), encoding="utf-8")
    return WaitingProcess([sys.executable, "-m", "bench.plan_checks", str(file)], Path(job["log"]))


def _tell(job: dict[str, Any], status: int | str) -> None:
    lines = Path(job["log"]).read_text(encoding="utf-8", errors="replace").splitlines()[-12:]
    say(f"{job['case']} failed ({status}); {job['log']} ends with:\n  " + "\n  ".join(lines))


def main() -> int:
    """Run one case of a job: changes, recipe, overrides, base, tokenizer, out, work. It waits for its turn."""
    job: dict[str, Any] = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    case, work = Case(**job["changes"]), Path(job["work"])
    named = [f"model.name_or_path={job['base']}", f"model.tokenizer={job['tokenizer']}", "model.backend=fused"]
    overrides = [*job["overrides"], *named, *case.overrides]
    recipe = loader.load_recipe(job["recipe"], overrides)
    if case.row_tokens is not None:
        overrides.append(f"data.train={long_rows(recipe, work / 'rows.json', case.row_tokens)}")
        recipe = loader.load_recipe(job["recipe"], overrides)
    prepared = ours.prepared_rows(recipe)
    import datasets  # noqa: F401  # what loads for seconds and touches no card
    import torch  # noqa: F401
    import transformers  # noqa: F401

    wait_for_turn()
    with card_to_itself():
        write_json(Path(job["out"]), job["changes"] | run(recipe, prepared, work, case.cap_gib))
    return 0


def run(recipe: Recipe, prepared: PreparedData, work: Path, cap_gib: float) -> dict[str, Any]:
    """Train a few steps as a user's run does, and return what was planned and what was measured."""
    from fast_ft.models.loaders import choose
    from fast_ft.plan import planner
    from fast_ft.plan.run_plan import RunPlan
    from fast_ft.train.session import TrainSession
    from fast_ft.train.task import TrainCallbacks

    limits, log = emulation.Limits(cap_gib, None, False), StepLog(WARM_UP)
    maker = choose.make_loader(recipe.model, recipe.lora, seed=recipe.seed)
    limits.begin()
    card = planner.card_here()
    settled = planner.settle(recipe, prepared, ours.family(recipe), backend=maker.name, card=card)
    predicted = ours.predicted(recipe, prepared, settled, maker.name, card)
    loaded = maker.for_training()
    task = ours.task_of(recipe, prepared, STEPS)
    session = TrainSession(loaded, task, settled.train, work, TrainCallbacks(on_step=log))
    log.follow(session)
    session.run()
    facts = limits.to_json()
    seconds = log.seconds
    planned = (predicted["step_seconds"] or [0.0] * STEPS)[WARM_UP : len(log.lines)]
    return {
        "plan": settled.to_json(),
        "plan_at_the_end": RunPlan(session.steps.plan, settled.decode).to_json(),
        "planned_gib": predicted["peak_gib"] or 0.0,
        "measured_gib": round(facts["peak_reserved_gib"] + facts["context_after_gib"], 3),
        "peak_reserved_gib": facts["peak_reserved_gib"],
        "context_gib": facts["context_after_gib"],
        "tokens": [line["tokens"] for line in log.lines],
        "planned_step_seconds": planned,
        "measured_step_seconds": seconds,
        "planned_seconds": round(sum(planned) / len(planned), 5),
        "measured_seconds": round(sum(seconds) / len(seconds), 5),
        "cap_gib": cap_gib,
        "rates": facts["rates"],
    }


def long_rows(recipe: Recipe, path: Path, tokens: int, count: int = 96) -> Path:
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
        abs(sum(case["planned_step_seconds"]) / sum(case["measured_step_seconds"]) - 1) for case in cases.values()
    )
    return memory, seconds


def _unsound(case: dict[str, Any]) -> bool:
    """Whether a run took another plan than the one that is judged, or none."""
    return not case["planned_gib"] or case["plan_at_the_end"] != case["plan"]


if __name__ == "__main__":
    sys.exit(main())
