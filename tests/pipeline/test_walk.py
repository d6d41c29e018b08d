"""Random walks of one run through stops, kills, budgets, other decoding and other judges, and where they end.

A walk is a row of starts, each of which may be stopped or killed before any of its writes to the disk. Its last start
is the recipe's command, with no budget and undisturbed. Where no budget bound on the way, the folder then holds what a
straight run with the same settings leaves. Else it is complete, and its files agree with each other.
"""

from __future__ import annotations

import contextlib
import json
import random
import signal
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from fast_ft.common import atomic_files
from fast_ft.common.errors import BudgetMissed
from fast_ft.data.prepare import prepare
from fast_ft.homework import checks
from fast_ft.pipeline import resume
from fast_ft.pipeline.preview import preview
from fast_ft.pipeline.rerun import generate_again, judge_again
from fast_ft.pipeline.run import run
from fast_ft.recipe.loader import load_recipe
from fast_ft.run.folder import RunDir
from tests.helpers.killed import run_until, start_function
from tests.helpers.parts import answered, write_recipe
from tests.helpers.patience import PATIENCE

STEPS, PROMPTS = 10, 5
DECODING = (["generate.max_new_tokens=6"], ["generate.max_new_tokens=4", "generate.temperature=1.3"])
JUDGES = ("judge.references={folder}/a.json", "judge.references={folder}/b.json")
#: The clock moves by 12 s a step and 10 s an answer; "tight" ends training after some steps, or cuts answers.
BUDGETS = {
    "none": [],
    "ample": ["budget.train_minutes=90", "budget.generate_minutes=90"],
    "tight training": ["budget.train_minutes=1.4"],
    "tight answers": ["budget.generate_minutes=0.25"],
}
TICKS = {"log.jsonl": 12.0, "pred.partial.jsonl": 10.0}
#: Of the manifest's facts about phases: what is measured, and what depends on where a run was stopped.
MEASURED = {
    "seconds", "finished", "training_seconds", "decoding_seconds", "peak_gib", "batched_difference_nats", "seconds_by",
    "decoding_steps",
}  # fmt: skip


class Stop(KeyboardInterrupt):
    """Ctrl-C, at a write that was chosen."""


@dataclass
class Disk:
    """Stands before every write: moves the clock, counts, and stops the program at the write with number `stop`."""

    stop: int = 0
    count: int = 0
    seconds: float = 0.0

    def __call__(self, what: str, path: Path) -> None:
        self.count += 1
        if what == "append":
            self.seconds += TICKS.get(path.name, 0.0)
        if self.count == self.stop:
            raise Stop

    def clock(self) -> float:
        return self.seconds


@contextlib.contextmanager
def disk(stop: int = 0) -> Iterator[Disk]:
    former, atomic_files.before = atomic_files.before, Disk(stop)
    try:
        yield atomic_files.before
    finally:
        atomic_files.before = former


class World:
    """A recipe with its data, and what straight runs of it leave, by settings."""

    def __init__(self, folder: Path, base: Path, rows: Path, prompts: Path) -> None:
        self.folder = folder
        for name, text in (("a.json", "The hat is red."), ("b.json", "No.")):
            (folder / name).write_text(answered(prompts, text))
        values = {
            "output_dir": str(folder / "run"), "train.save_steps": 2, "lora.lora_dropout": 0.1,
            "curriculum.stages": [
                {"name": "easy", "upto": 0.5, "num_train_epochs": 3},
                {"name": "all", "upto": 1.0, "num_train_epochs": 1},
            ],
            "generate.do_sample": True, "judge.kind": "reference", "judge.references": str(folder / "a.json"),
            "judge.base_prompts": 2,
        }  # fmt: skip
        self.path = write_recipe(folder, base, rows, prompts, values)
        self._straight: dict[tuple[int, int], dict[str, Any]] = {}
        self.touches = 0

    def settings(self, decoding: int, judging: int) -> list[str]:
        return [*DECODING[decoding], JUDGES[judging].format(folder=self.folder)]

    def straight(self, decoding: int, judging: int) -> dict[str, Any]:
        """What a run that nothing disturbs leaves."""
        if (decoding, judging) not in self._straight:
            root = self.folder / f"straight-{decoding}{judging}"
            with disk() as touched:
                run(load_recipe(self.path, [*self.settings(decoding, judging), f"output_dir={root}"]), self.path)
            self._straight[decoding, judging] = outcome(root)
            self.touches = self.touches or touched.count
        return self._straight[decoding, judging]


@dataclass
class Walk:
    """One walk: its run folder, the settings as they are now, and what was done, to be shown where it ends wrong."""

    world: World
    root: Path
    rng: random.Random
    budgets: list[str]
    decoding: int = 0
    judging: int = 0
    bound: bool = False  # by a budget, or perhaps so
    done: list[str] = field(default_factory=list)

    def overrides(self, budget: str = "none") -> list[str]:
        return [*self.world.settings(self.decoding, self.judging), *BUDGETS[budget], f"output_dir={self.root}"]

    def phase(self, name: str) -> bool:
        return (self.root / "manifest.json").is_file() and RunDir.at(self.root).done(name) is not None

    def step(self, kills: bool) -> None:
        """Take one step: change what the recipe says, perhaps, then start a command that may be disturbed."""
        if self.rng.random() < 0.4:
            self.decoding = self.rng.randrange(len(DECODING))
        if self.rng.random() < 0.3:
            self.judging = self.rng.randrange(len(JUDGES))
        ways = [self.start, self.start, *([self.kill, self.kill] if kills else [])]
        ways += [self.generate, self.generate] if self.phase("train") else [self.taste]
        ways += [self.rejudge] if self.phase("generate") else []
        self.rng.choice(ways)()

    def start(self) -> None:
        budget = self.rng.choice(self.budgets)
        ends = {"tight training": "train", "tight answers": "judge"}
        self.bound |= budget in ends and not self.phase(ends[budget])
        with self._disturbed(f"start {self.decoding} {self.judging}, {budget}") as touched:
            run(load_recipe(self.world.path, self.overrides(budget)), self.world.path, clock=touched.clock)

    def kill(self) -> None:
        touch = self.rng.randint(1, self.world.touches)
        self.done.append(f"start {self.decoding} {self.judging}, killed at {touch}")
        errors = self.world.folder / "errors"
        arguments = [str(self.world.path), *self.overrides()]
        process = start_function(run_until, touch, arguments, str(errors))
        process.join(PATIENCE)
        assert process.exitcode in (0, 3, -signal.SIGKILL), errors.read_text()[-2000:]

    def taste(self) -> None:
        with self._disturbed("taste"):
            preview(load_recipe(self.world.path, self.overrides()), self.world.path, self.rng.randint(1, STEPS))

    def generate(self) -> None:
        decoding = self.rng.randrange(len(DECODING))
        with self._disturbed(f"generate {decoding}"):
            generate_again(self.root, DECODING[decoding])

    def rejudge(self) -> None:
        judging = self.rng.randrange(len(JUDGES))
        with self._disturbed(f"judge {judging}"):
            judge_again(self.root, [JUDGES[judging].format(folder=self.world.folder)])

    @contextlib.contextmanager
    def _disturbed(self, what: str) -> Iterator[Disk]:
        """Do something that is stopped before one of its writes, or not."""
        stop = self.rng.choice((0, self.rng.randint(1, self.world.touches)))
        self.done.append(f"{what}, stopped at {stop}" if stop else what)
        with disk(stop) as touched, contextlib.suppress(Stop, BudgetMissed):
            yield touched

    def end(self) -> None:
        """Start the recipe's command once more, undisturbed, and look at what is there."""
        before = kept(self.root)
        with contextlib.suppress(BudgetMissed):
            run(load_recipe(self.world.path, self.overrides()), self.world.path)
        agree(self.root, load_recipe(self.world.path, self.overrides()))
        assert before <= kept(self.root), "answers and scores that were there are there or kept aside"
        if not self.bound:
            assert outcome(self.root) == self.world.straight(self.decoding, self.judging)
        made = {path: path.read_bytes() for path in self.root.rglob("*") if path.is_file()}
        with contextlib.suppress(BudgetMissed):
            run(load_recipe(self.world.path, self.overrides()), self.world.path)
        assert {path: path.read_bytes() for path in self.root.rglob("*") if path.is_file()} == made, "it is done"


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def log(root: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (root / "log.jsonl").read_text().splitlines()]


def kept(root: Path) -> set[bytes]:
    """All answers and scores in a folder, under whatever name."""
    return {path.read_bytes() for pattern in ("*pred*.json", "scores*.json") for path in root.glob(pattern)}


def outcome(root: Path) -> dict[str, Any]:
    """What must not depend on the way that a run took."""
    manifest = read(root / "manifest.json")
    facts = {name: {k: v for k, v in f.items() if k not in MEASURED} for name, f in manifest["phases"].items()}
    recipe = {key: value for key, value in manifest["recipe"].items() if key not in ("output_dir", "budget")}
    files = sorted(str(path.relative_to(root)) for path in root.rglob("*") if not aside(path.relative_to(root)))
    return {
        "adapter": atomic_files.sha256_file(root / "adapter" / "adapter_model.safetensors"),
        "answers": [(root / name).read_bytes() for name in ("pred.json", "base_pred.json", "answers.json")],
        "scores": read(root / "scores.json"),
        "steps": [(line["step"], line["loss"], line["learning_rate"], line["tokens"]) for line in log(root)],
        "phases": facts,
        "recipe": recipe,
        **{key: manifest[key] for key in ("rows", "stages", "digests", "leakage", "notes", "plan", "generated_with")},
        "judged_with": manifest["judged_with"],
        "files": files,
    }


def aside(path: Path) -> bool:
    """What a straight run has none of: former answers and scores, a taste's look and its checkpoint."""
    former = path.name.startswith(("pred-", "base_pred-", "scores-", "taste.json"))
    return former or (path.parts[0] == "checkpoints" and f"step-{STEPS}" not in path.parts)


def agree(root: Path, recipe: Any) -> None:
    """Assert that the run in a folder is complete, and that its files say the same."""
    folder, manifest = RunDir.at(root), read(root / "manifest.json")
    phases, wanted = manifest["phases"], recipe.model_dump(mode="json")
    assert set(phases) == {"train", "generate", "judge"}
    assert not resume.compare(folder, recipe, prepare(recipe)).any()
    assert {v.rule for v in checks.broken(checks.check(folder))} <= {"4-bits"}
    assert [line["step"] for line in log(root)] == list(range(1, phases["train"]["steps"] + 1))
    assert phases["train"]["tokens"] == sum(line["tokens"] for line in log(root))
    assert manifest["plan"] == read(root / "plan.json")
    assert (manifest["generated_with"], manifest["judged_with"]) == (wanted["generate"], wanted["judge"])
    pred, ends, scores = read(root / "pred.json"), read(root / "answers.json"), read(root / "scores.json")
    assert list(pred) == list(ends["tuned"]) == list(scores["prompts"]) and len(pred) == phases["generate"]["answers"]
    assert phases["generate"]["new_tokens"] == sum(end["tokens"] for end in ends["tuned"].values())
    assert len(ends.get("base", {})) == phases["generate"]["base_answers"]
    assert (root / "base_pred.json").is_file() == bool(phases["generate"]["base_answers"]) == ("base" in scores)
    assert scores["pred"] == atomic_files.sha256_file(root / "pred.json") and scores["judged_with"] == wanted["judge"]
    assert phases["judge"]["mean"] == scores["mean"]
    for path in root.glob("*pred-????????.json"):
        assert path.stem.endswith(atomic_files.sha256_file(path)[:8])
    spent = ("taste", "pred.partial.jsonl", "base_pred.partial.jsonl")
    assert not [path for path in root.rglob("*") if path.name.startswith(".") or path.name in spent]
    assert (root / "report.html").is_file()


FREE = ["none", "none", "ample"]  #: budgets that bind nothing


def walk(world: World, seed: int, length: int, *, kills: bool, budgets: list[str]) -> None:
    rng = random.Random(seed)
    world.straight(0, 0)
    taken = Walk(world, world.folder / f"walk-{seed}", rng, budgets)
    try:
        for _ in range(length):
            taken.step(kills)
        taken.end()
    except BaseException:
        print(f"seed {seed}: ", *taken.done, f"end {taken.decoding} {taken.judging}", sep="\n  ")
        raise


@pytest.fixture(scope="module")
def world(tiny: Path, train_file: Path, test_file: Path, tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("walks"), tiny, train_file, test_file)


@pytest.mark.parametrize("seed", [0, 2, 3])
def test_a_walk_through_stops_decoding_and_judges_ends_like_a_straight_run(world: World, seed: int) -> None:
    walk(world, seed, 4, kills=False, budgets=FREE)


@pytest.mark.parametrize("seed", range(100, 102))
def test_a_walk_on_which_budgets_bind_ends_complete_and_agrees_with_itself(world: World, seed: int) -> None:
    walk(world, seed, 4, kills=False, budgets=list(BUDGETS))


def test_a_walk_through_kills_ends_like_a_straight_run(world: World) -> None:
    walk(world, 200, 3, kills=True, budgets=FREE)


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(1000, 1060))
def test_many_walks(world: World, seed: int) -> None:
    walk(world, seed, 3 + seed % 6, kills=True, budgets=FREE if seed % 3 else list(BUDGETS))
