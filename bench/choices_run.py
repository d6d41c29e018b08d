"""One process that trains one choice after another over a base that stays loaded, and measures each on held-out rows.

Several such processes share a list of runs: whoever makes a run's file in the folder of claims does the run.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from bench import choices, machine
from fast_ft.common import gpu, seeds
from fast_ft.common.stopwatch import Stopwatch
from fast_ft.data import asked_length, dataset
from fast_ft.data.encoding import IGNORE_INDEX, EncodedRow, Encoder
from fast_ft.data.examples import Example
from fast_ft.data.folding import fold, ngrams
from fast_ft.data.prepare import prepare
from fast_ft.recipe import schema

LONG_WORDS = 150  #: a held-out row with a longer response is one of the long ones
ASKED, OTHERS = 32, 32  #: held-out prompts that are answered: those that ask for a length, and others
MOST_ASKED = 300  #: words; more would not fit into the new tokens
MOST_TOKENS, _BATCH_TOKENS = 2048, 8192


@dataclass(frozen=True)
class Order:
    """What a process is asked for. deadline: time.time() after which no run begins. capture: with CUDA graphs."""

    base: str
    train: str
    held_out: str
    samples: str
    claims: str
    deadline: float
    template: Literal["llama-2", "llama-3.1", "tokenizer"] = "tokenizer"
    capture: bool = False
    only: tuple[str, ...] = ()  #: names of choices; empty: all


class Worker:
    """The base, the held-out rows, and the runs that this process did."""

    def __init__(self, order: Order) -> None:
        from fast_ft.sweep.resident_model import ResidentLoader

        self.order, self.loader = order, ResidentLoader()
        self.model = {
            "name_or_path": order.base, "template": order.template, "load_in_4bit": False, "max_length": MOST_TOKENS,
            "backend": "peft" if gpu.gpu() is None else "fused",
        }  # fmt: skip
        self.encoder = Encoder(Path(order.base), order.template)
        pool = dataset.load_pool(schema.Data(train=order.held_out))
        examples = pool.examples(range(len(pool)))
        self.rows = {
            name: [row for row in map(self.encoder.row, part) if len(row.input_ids) <= MOST_TOKENS]
            for name, part in groups(examples).items()
        }
        self.prompts = prompts(examples)

    def work(self) -> None:
        """Do runs while there are any and there is time."""
        done, longest = finished(Path(self.order.samples).parent), 0.0
        for choice, seed in choices.plan():
            name = f"{choice.name}-{seed}"
            if name in done or (self.order.only and choice.name not in self.order.only):
                continue
            if time.time() + longest > self.order.deadline:
                break
            if not claimed(Path(self.order.claims), name):
                continue
            started = time.time()
            line = json.dumps(self.run(choice, seed))
            with Path(self.order.samples).open("a", encoding="utf-8") as file:  # one file a process: no line is torn
                file.write(line + "\n")
            longest = max(longest, time.time() - started)

    def run(self, choice: choices.Choice, seed: int) -> dict[str, Any]:
        """Train a choice and return its sample: numbers and row ids, no text."""
        watch = Stopwatch()
        recipe = choices.recipe(choice, seed, self.model, self.order.train)
        with watch.during("load"):
            self.loader.use(recipe)
        losses: list[float] = []
        ids: list[str] = []
        if choice.base:
            with watch.during("load"):
                loaded = self.loader.for_training()
        else:
            with watch.during("rows"):
                prepared = prepare(recipe)
            ids = [example.id for example in prepared.examples]
            with watch.during("load"):
                loaded = self.loader.for_training()
            with watch.during("train"):
                losses = self._train(loaded, recipe, prepared.jobs)
        loaded.model.eval()
        with watch.during("held_out"):
            nats = {name: self._nats(loaded.model, rows) for name, rows in self.rows.items()}
        with watch.during("answers"):
            answers = self._answers(loaded, recipe)
        loaded.free()
        return {
            "choice": choice.name, "seed": seed, "steps": len(losses), "losses": [round(x, 5) for x in losses],
            "rows": ids, "nats": nats, "answers": answers,
            "commit": machine.commit(), "at": round(time.time(), 1),
            "seconds": {name: round(x, 2) for name, x in watch.seconds().items()},
        }  # fmt: skip

    def _train(self, loaded: Any, recipe: schema.Recipe, jobs: list[Any]) -> list[float]:
        from fast_ft.plan.run_plan import TrainPlan
        from fast_ft.train.session import TrainSession
        from fast_ft.train.task import TrainCallbacks, TrainTask

        entries: list[dict[str, Any]] = []
        task = TrainTask(jobs, recipe.train, recipe.curriculum.carry, recipe.seed, self.encoder.pad_id)
        plan = TrainPlan(8, capture=self.order.capture and loaded.device == "cuda", backend=loaded.backend)
        with tempfile.TemporaryDirectory() as folder:
            session = TrainSession(loaded, task, plan, Path(folder), TrainCallbacks(on_step=entries.append))
            session.run()
        return [entry["loss"] for entry in entries]

    def _nats(self, model: Any, rows: list[EncodedRow]) -> list[float]:
        """Return [nats in all, response tokens] of some rows."""
        from fast_ft.models.adapter_check import log_probabilities

        total, count = 0.0, 0
        ordered = sorted(rows, key=lambda row: len(row.input_ids))
        while ordered:
            width = len(ordered[-1].input_ids)
            part = [ordered.pop() for _ in range(min(len(ordered), max(1, _BATCH_TOKENS // width)))]
            starts = [next(at for at, label in enumerate(row.labels) if label != IGNORE_INDEX) for row in part]
            for values in log_probabilities(model, [row.input_ids for row in part], starts, self.encoder.pad_id):
                total -= sum(values)
                count += len(values)
        return [round(total, 3), count]

    def _answers(self, loaded: Any, recipe: schema.Recipe) -> list[dict[str, Any]]:
        """Answer the held-out prompts; return what was counted of each answer."""
        import torch

        from fast_ft.generate.engine.sequence import Sequence
        from fast_ft.generate.engine_setup import make_engine
        from fast_ft.plan.decode_pool import DecodePlan

        ids = [self.encoder.prompt_ids([{"role": "user", "content": each.prompt}]) for each in self.prompts]
        most = recipe.generate.max_new_tokens
        engine = make_engine(loaded, self.encoder, recipe.generate, DecodePlan(len(ids)), max(map(len, ids)) + most)
        rows = [
            Sequence(row, most, seeds.derive(recipe.seed, "draw", each.id, 0))
            for row, each in zip(ids, self.prompts, strict=True)
        ]
        with torch.inference_mode():
            list(engine.run(rows))
        return [
            counted(each, self.encoder.decode(row.tokens), len(row.tokens), row.tokens[-1] in self.encoder.end_ids)
            for each, row in zip(self.prompts, rows, strict=True)
        ]


def groups(examples: list[Example]) -> dict[str, list[Example]]:
    """Return the held-out rows apart: those with long responses, and the others."""
    found: dict[str, list[Example]] = {"usual": [], "long": []}
    for each in examples:
        found["long" if len(each.response.split()) > LONG_WORDS else "usual"].append(each)
    return found


def prompts(examples: list[Example]) -> list[Example]:
    """Return the held-out rows whose prompts are answered: the first that ask for a length, and others."""
    asks = {each.id: asked_length.asked_words(each.prompt) for each in examples}
    asking = [each for each in examples if (asked := asks[each.id]) and asked[0] <= MOST_ASKED]
    others = [each for each in examples if asks[each.id] is None and len(each.response.split()) <= LONG_WORDS]
    return asking[:ASKED] + others[:OTHERS]


def counted(row: Example, answer: str, tokens: int, ended: bool) -> dict[str, Any]:
    """Return what is kept of an answer: its length, its end, how far it misses an asked length, distinct 3-grams."""
    words = fold(answer).split()
    grams = [tuple(words[at : at + 3]) for at in range(len(words) - 2)]
    asked = asked_length.asked_words(row.prompt) is not None
    return {
        "id": row.id, "tokens": tokens, "words": len(answer.split()), "ended": ended,
        "missed": round(asked_length.missed(row.prompt, answer), 4) if asked else None,
        "distinct": round(len(ngrams(words, 3)) / len(grams), 4) if grams else None,
    }  # fmt: skip


def claimed(folder: Path, name: str) -> bool:
    """Claim a run; return whether nobody had."""
    try:
        os.close(os.open(folder / name, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True


def finished(folder: Path) -> set[str]:
    """Return the names of the runs whose samples lie in a folder."""
    return {f"{each['choice']}-{each['seed']}" for each in samples(folder)}


def samples(folder: Path) -> list[dict[str, Any]]:
    """Return the samples of all processes and calls, in the order of the plan; each run once."""
    order = {f"{choice.name}-{seed}": at for at, (choice, seed) in enumerate(choices.plan())}
    found: dict[str, dict[str, Any]] = {}
    for path in sorted(folder.glob("*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                each = json.loads(line)
            except ValueError:  # the call was stopped while a process wrote its last line
                continue
            found.setdefault(f"{each['choice']}-{each['seed']}", each)
    return sorted(found.values(), key=lambda each: order.get(f"{each['choice']}-{each['seed']}", len(order)))


if __name__ == "__main__":
    worker = Worker(Order(**json.loads(sys.argv[1])))
    print(json.dumps({"ready": time.time(), "commit": machine.commit()}), flush=True)
    worker.work()
