"""fast_ft as a way of training: its own modules, called as pipeline/train_phase.py calls them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.emulation import Limits
from bench.watch import Watch
from fast_ft.common import gpu
from fast_ft.data.batches import batches
from fast_ft.data.prepare import PreparedData, prepare
from fast_ft.hub import download
from fast_ft.hub.families import FamilySpec
from fast_ft.models import lora_files
from fast_ft.models.loaders import choose
from fast_ft.plan import cards, planner, plans
from fast_ft.plan.run_plan import RunPlan
from fast_ft.plan.ways import ways
from fast_ft.recipe import loader
from fast_ft.recipe.schema import Recipe, Train
from fast_ft.train.task import TrainTask

if TYPE_CHECKING:
    from fast_ft.train.session import TrainSession

#: Ways that are fast_ft, and the overrides that each puts over the recipe: Unsloth's layers run in the same passes.
WAYS: dict[str, tuple[str, ...]] = {"fast_ft": (), "fast_ft-unsloth": ("model.backend=unsloth",)}


def _in_order(count: int, section: Train) -> list[list[int]]:
    epochs, size = section.num_train_epochs, section.effective_batch_size
    return batches(count, epochs, size, shuffled=False, seed=0, stage=0)[: section.max_steps]


def prepared_rows(recipe: Recipe) -> PreparedData:
    """Select and tokenise a recipe's rows, which must make one stage.

    Its batches hold the rows in the order of selection, the same in every epoch. The other ways get them in that order.
    """
    found = prepare(recipe)
    jobs = [replace(job, batches=_in_order(len(job.rows), recipe.train)) for job in found.jobs]
    return replace(found, jobs=jobs)


def run(job: dict[str, Any], limits: Limits, watch: Watch) -> dict[str, Any]:
    """Train as the job says; return plan and predictions. See bench.way for what a job holds."""
    recipe = loader.load_recipe(job["recipe"], [*job["overrides"], *WAYS[job["way"]]])
    prepared = prepared_rows(recipe)
    maker = choose.make_loader(recipe.model, recipe.lora, seed=recipe.seed, ways=ways(recipe, gpu.capability()).names)
    import peft  # noqa: F401  # with Unsloth all three are there by now
    import transformers  # noqa: F401
    import trl  # noqa: F401

    from fast_ft.train.session import TrainSession

    watch.stamp("imported")
    watch.leave_out(limits.take_turn)
    limits.begin()
    with limits.stream():
        card = planner.card_here()
    settled = planner.settle(recipe, prepared, family(recipe), backend=maker.name, card=card)
    loaded = maker.for_training()
    if job["adapter"]:
        lora_files.load(loaded.model, Path(job["adapter"]))
    watch.stamp("loaded")
    task = task_of(recipe, prepared, job["stop_after"])
    session = TrainSession(loaded, task, settled.train, Path(job["work"]) / "stages")
    with limits.stream():
        train(session, watch)
    watch.stamp("trained")
    folder = Path(job["work"]) / "adapter"
    folder.mkdir(parents=True, exist_ok=True)
    lora_files.save(loaded.model, folder, recipe.model.name_or_path, "")
    watch.stamp("saved")
    found = {
        "backend": loaded.backend,
        "dtype": loaded.dtype,
        "plan": settled.to_json(),
        "plan_at_the_end": replace(settled, train=session.steps.plan).to_json(),
        "predicted": predicted(recipe, prepared, settled, maker.name, card),
    }
    loaded.free()
    return found


def predicted(
    recipe: Recipe, prepared: PreparedData, settled: RunPlan, backend_name: str, card: cards.Card | None
) -> dict[str, Any]:
    """Return the plan's peak GiB and seconds of each step, before anything has run; None without a card."""
    if card is None:
        return {"peak_gib": None, "step_seconds": None}
    shape = family(recipe).shape
    work = planner.training(recipe, prepared, family(recipe), backend=backend_name, card=card)
    steps = planner.step_lengths(recipe, prepared)
    seconds = [round(plans.step_seconds(shape, work, settled.train, step, card.expected), 5) for step in steps]
    return {"peak_gib": settled.train.train_gib, "step_seconds": seconds}


def family(recipe: Recipe) -> FamilySpec:
    """Return what the base model's configuration says."""
    return download.family(recipe.model.name_or_path, recipe.model.revision)


def task_of(recipe: Recipe, prepared: PreparedData, stop_after: int) -> TrainTask:
    """Return a recipe's rows as training takes them, ended after this number of steps."""
    jobs, carry = prepared.jobs, recipe.curriculum.carry
    return TrainTask(jobs, recipe.train, carry, recipe.seed, prepared.encoder.pad_id, stop_after)


def train(session: TrainSession, watch: Watch) -> None:
    """Run the session's only stage as TrainSession.run does, watched, for as many steps as the task says."""
    from fast_ft.train.sft_trainer import StageTrainer  # unsloth, if it is used, was imported with the model

    passes, stop_after = session.steps.passes, session.task.stop_after or session.task.total
    lay_out, begin = passes.lay_out, passes.begin

    def seen(rows: Any) -> Any:
        micro = lay_out(rows)
        watch.saw(micro.tokens_4T[0], micro.tokens_4T[1])
        return micro

    def begun(*given: Any) -> None:
        watch.forget()  # a step that is done again after an out-of-memory error counts once
        begin(*given)

    vars(passes).update(lay_out=seen, begin=begun)
    trainer = StageTrainer(session)
    watch.attach(trainer, stop_after=stop_after)
    try:
        trainer.train()
    finally:
        passes.close()
