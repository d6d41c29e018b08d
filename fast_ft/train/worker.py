"""What every process but the first does in a training of several: the same steps, on its share of each batch.

All that it needs comes from process 0, which has read the recipe and the rows. It writes no file, prints nothing while
all goes well, and leaves when training is over.
"""

from __future__ import annotations

import sys
import tempfile
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fast_ft.common import console, environment, gpu, out_of_memory
from fast_ft.common.errors import InputError
from fast_ft.common.process_group import Lost, Ranks
from fast_ft.common.signals import interruptible
from fast_ft.data.batches import StageJob
from fast_ft.data.encoding import EncodedRow
from fast_ft.models.loaders import choose
from fast_ft.plan.run_plan import TrainPlan
from fast_ft.recipe.schema import Recipe
from fast_ft.train.session import TrainSession
from fast_ft.train.task import TrainTask

_LAST_WORD = 10.0  #: seconds in which process 0 may still say itself what went wrong


@dataclass(frozen=True)
class Order:
    """What process 0 lets the others train: see task.TrainTask. `backend` is the name of its own loader."""

    recipe: Recipe
    jobs: Sequence[StageJob]
    pad_id: int
    plan: TrainPlan
    backend: str
    stop_after: int | None

    def to_json(self) -> dict[str, Any]:
        """Return what `from_json` reads, as values that JSON can hold."""
        return {**vars(self), "recipe": self.recipe.model_dump_json(), "plan": asdict(self.plan),
                "jobs": [asdict(job) for job in self.jobs]}  # fmt: skip

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Order:
        """Return the order that process 0 shared."""
        jobs = [StageJob(**job | {"rows": [EncodedRow(**row) for row in job["rows"]]}) for job in content["jobs"]]
        recipe, plan = Recipe.model_validate_json(content["recipe"]), TrainPlan(**content["plan"])
        return cls(**content | {"recipe": recipe, "jobs": jobs, "plan": plan})

    def task(self) -> TrainTask:
        """Return what to train; trackers are process 0's alone."""
        section = self.recipe.train.model_copy(update={"report_to": "none"})
        carry, seed = self.recipe.curriculum.carry, self.recipe.seed
        return TrainTask(self.jobs, section, carry, seed, self.pad_id, self.stop_after)


def follow(ranks: Ranks) -> int:
    """Train along with process 0, and return the exit status.

    It is 0 where training ended in good order, and where process 0 has said what went wrong: a launcher ends all
    processes as soon as one has another status, and process 0 may be saving.
    """
    console.be_silent()
    environment.without_progress_bars()
    environment.expand_segments()  # NCCL touches the card before a backend is made
    try:
        with interruptible():
            if ranks.begin():
                _train(ranks, Order.from_json(ranks.share(None)))
    except KeyboardInterrupt:
        return 0
    except Exception as error:
        is_bug = not isinstance(error, InputError | Lost)
        if is_bug:  # process 0 can say no more than that this process has ended
            print(f"error: process {ranks.rank} of {ranks.size}:", file=sys.stderr)
            traceback.print_exception(error)
        if ranks.ended(within=_LAST_WORD):
            return 0
        if not is_bug:
            print(f"error: process {ranks.rank} of {ranks.size}: {error}", file=sys.stderr)
        return 2 if isinstance(error, InputError) else 1
    return 0


def _train(ranks: Ranks, order: Order) -> None:
    recipe, problem = order.recipe, None
    try:
        if recipe.train.deterministic:
            gpu.be_deterministic()
        if recipe.budget.memory_gib != "auto":
            gpu.cap_gpu_gib(float(recipe.budget.memory_gib))
        maker = choose.make_loader(recipe.model, recipe.lora, seed=recipe.seed, name=order.backend)
        with out_of_memory.explained("loading the base model", out_of_memory.LOADING):
            loaded = maker.for_training()
    except InputError as error:
        problem = str(error)
    ranks.agree(problem)
    with tempfile.TemporaryDirectory() as folder:
        TrainSession(loaded, order.task(), order.plan, Path(folder), ranks=ranks).run()
    ranks.leave()
