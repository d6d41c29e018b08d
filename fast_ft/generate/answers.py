"""Answers: the adapter, loaded fresh by path, and the test prompts, to pred.json.

generate/engine/ does the work, in a pool of slots. Which prompts share the pool, and when one is admitted, follows from
the test file and the plan alone. A run that was stopped is replayed up to where it stood, and goes on.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter, ValidationError

from fast_ft.common import out_of_memory, seeds
from fast_ft.common.atomic_files import Lines
from fast_ft.common.console import Bar, note
from fast_ft.common.minutes import AnswerPace, longer
from fast_ft.common.stopwatch import Stopwatch
from fast_ft.data.encoding import Encoder
from fast_ft.data.examples import Prompt
from fast_ft.generate.engine.sequence import Sequence
from fast_ft.generate.engine_setup import make_engine
from fast_ft.generate.pace import Cuts, told
from fast_ft.generate.parity import allowed, parity
from fast_ft.generate.plan_in_use import PlanInUse
from fast_ft.models.loaders.base import LoadedModel
from fast_ft.plan import base_fits
from fast_ft.plan.decode_pool import DecodePlan
from fast_ft.recipe import schema

if TYPE_CHECKING:
    from fast_ft.generate.engine_setup import Engine

Name = tuple[str, int]  #: a prompt's id, and which of its answers


@dataclass(frozen=True)
class Answer:
    """One answer. `tokens` counts new tokens, the end token included; `ended` says whether that came before the limit.

    `candidate` counts the answers to one prompt, from 0.
    """

    id: str
    text: str
    tokens: int
    ended: bool
    candidate: int = 0
    at: float = 0.0  #: seconds into answering, with a budget of minutes; earlier sessions count
    within: float | None = None  #: the minutes of the budget that cut it short


@dataclass(frozen=True)
class Generation:
    """All answers, by prompt id and candidate; what was settled; and sentences for the manifest."""

    answers: dict[str, list[Answer]]
    seconds: float
    batch_size: int
    parity: float | None  #: nats, batched against single; None where all answers were there, so nothing was measured
    notes: list[str]
    #: As it was given, but for what memory took from it, and with the products that were chosen.
    plan: DecodePlan = field(default_factory=DecodePlan)
    cache_tokens: int = 0  #: of the pool; 0 where there was none
    steps: int = 0  #: that were decoded

    @property
    def flat(self) -> list[Answer]:
        """Every answer."""
        return [answer for answers in self.answers.values() for answer in answers]


@dataclass(frozen=True)
class Task:
    """How a set of prompts is answered, beside the recipe's section.

    `partial` keeps finished answers, one JSON line each, and is read back on a second start; `on_answer` is called
    after each, and `on_products` before the first, with DecodePlan's. `on_plan` is called where memory ran out, with
    the plan that a resumed run begins with. `pace` cuts answers where they would not all end in time; each prompt has
    one even so. `watch` divides the seconds into set_up, checks, captures, prefill and steps.
    """

    seed: int
    partial: Path
    title: str = "answers"
    pace: AnswerPace | None = None
    on_answer: Callable[[], object] = lambda: None
    on_products: Callable[[str], object] = lambda products: None
    on_plan: Callable[[DecodePlan], object] = lambda plan: None
    watch: Stopwatch = field(default_factory=Stopwatch)
    prompt_ids: list[list[int]] | None = None  #: the prompts' token ids, where they are known already


def generate(
    loaded: LoadedModel, encoder: Encoder, prompts: list[Prompt], section: schema.Generate, plan: DecodePlan, task: Task
) -> Generation:
    """Answer every prompt, `plan.slots` at a time at most.

    Where memory runs out, plan_in_use.py says what is given up. InputError where a prompt and its answer do not fit
    into the model's context, or memory does not do for one prompt at a time.
    """
    started, work = time.monotonic(), _Work(loaded, encoder, prompts, section, plan, task)
    with Bar(task.title, len(work.wanted), done=len(work.answers)) as bar, Lines(task.partial) as file:

        def done(answer: Answer) -> None:
            file.add(asdict(answer))
            task.on_answer()
            bar.advance(1, f"{work.new_tokens / (time.monotonic() - started):,.0f} tokens/s")

        while len(work.answers) < len(work.wanted):
            work.attempt(done)
    by_prompt = {
        prompt.id: [work.answers[prompt.id, candidate] for candidate in range(section.num_return_sequences)]
        for prompt in prompts
    }
    return Generation(
        by_prompt, time.monotonic() - started, work.plan.now.slots, work.difference,
        work.plan.notes + told(task.pace, work.answers.values(), task.title), work.plan.kept, work.cache_tokens,
        work.steps,
    )  # fmt: skip


class _Work:
    """What one call of `generate` works at: the answers so far, what is told of them, and the plan."""

    def __init__(
        self, loaded: LoadedModel, encoder: Encoder, prompts: list[Prompt], section: schema.Generate, plan: DecodePlan,
        task: Task,
    ) -> None:  # fmt: skip
        self.loaded, self.encoder, self.section, self.task = loaded, encoder, section, task
        self.ids = task.prompt_ids or [encoder.prompt_ids(prompt.messages) for prompt in prompts]
        context = getattr(loaded.model.config, "max_position_embeddings", None)
        base_fits.check_room(context, prompts, self.ids, section.max_new_tokens)  # before any file is touched
        candidates = range(section.num_return_sequences)
        self.wanted: list[Name] = [(prompt.id, candidate) for prompt in prompts for candidate in candidates]
        self.answers = _read_partial(task.partial, set(self.wanted))
        minutes = task.pace.minutes if task.pace else None
        if any(longer(minutes, answer.within) for answer in self.answers.values()):
            note("note: there are more minutes: all prompts are answered again, at full length")
            self.answers = {}
            task.partial.unlink()
        if task.pace is not None:
            task.pace.resume(max((answer.at for answer in self.answers.values()), default=0.0))
        self.difference: float | None = None
        self.new_tokens = self.cache_tokens = self.steps = 0
        longest = max(map(len, self.ids)) + section.max_new_tokens
        self.plan = PlanInUse(plan, answers=len(self.wanted), longest=longest, on_plan=task.on_plan)

    def attempt(self, done: Callable[[Answer], None]) -> None:
        """Make the answers that are missing by the plan; where it does not do, take another one for the rest."""
        is_short = agrees = False
        try:
            agrees = self._answer(done)
        except Exception as error:
            if not out_of_memory.is_short(error):
                raise
            is_short = True
        if agrees:
            return
        if is_short:  # outside of the handler, whose error holds the engine
            self.plan.take_less_memory()
        elif not self.plan.take_fewer_slots(self.difference or 0.0):
            self.loaded.general = f"our decoding differs from the model's own by {self.difference:.4f} nat"
            self.plan.say(f"{self.loaded.general}: transformers' generate answers, more slowly")
            self.plan.take_all_slots()
        out_of_memory.release()  # no two engines are there at once

    def _answer(self, done: Callable[[Answer], None]) -> bool:
        """Make the answers that are missing; return whether batched and single decoding agree, without which none is.

        The engine, with its cache and its graphs, belongs to this call alone. Raises what out_of_memory.is_short knows.
        """
        sequences, plan, watch = self._sequences(), self.plan.now, self.task.watch
        with watch.during("set_up"):
            engine = make_engine(self.loaded, self.encoder, self.section, plan, self.plan.longest)
        engine.watch = watch
        with watch.during("checks", covers=frozenset({"prefill", "steps"})):
            self.difference = parity(engine, self.loaded, self.ids, self.section.max_new_tokens)
        agrees = self.difference <= allowed(self.loaded.dtype, plan.kv_cache)
        if not (agrees or (plan.slots == 1 and self.loaded.general is not None)):
            return False
        if engine.products:
            self.plan.take_products(engine.products)
            self.task.on_products(engine.products)
        before = engine.steps_made  # those of the check
        for answer in self._made(engine, sequences):
            self.new_tokens += answer.tokens
            done(answer)
        self.cache_tokens, self.steps = engine.cache_tokens, engine.steps_made - before
        return True

    def _sequences(self) -> dict[Sequence, Name]:
        section, seed = self.section, self.task.seed
        prompts = [ids for ids in self.ids for _ in range(section.num_return_sequences)]
        return {
            Sequence(ids, section.max_new_tokens, seeds.derive(seed, "draw", *name), self._known(name)): name
            for name, ids in zip(self.wanted, prompts, strict=True)
        }

    def _known(self, name: Name) -> int | None:
        return self.answers[name].tokens if name in self.answers else None

    def _made(self, engine: Engine, sequences: dict[Sequence, Name]) -> Iterator[Answer]:
        """Yield each answer that was not there, as it ends, and put it among the answers."""
        most, pace, end_ids = self.section.max_new_tokens, self.task.pace, self.encoder.end_ids
        look = None if pace is None else Cuts(pace, sequences, self.answers.values(), most, end_ids).look
        for sequence in engine.run(list(sequences), on_look=look):
            if (name := sequences[sequence]) in self.answers:
                continue
            ended, length = sequence.tokens[-1] in end_ids, len(sequence.tokens)
            at = 0.0 if pace is None else pace.elapsed()
            within = pace.minutes if pace and not ended and length < most else None
            text = self.encoder.decode(sequence.tokens)
            self.answers[name] = Answer(name[0], text, length, ended, name[1], round(at, 3), within)
            yield self.answers[name]


def predictions(prompts: list[Prompt], answers: dict[str, list[Answer]]) -> dict[str, Any]:
    """Return pred.json's content, in the test file's order: {id: {"input": messages, "output": [text, ...]}}."""
    return {
        prompt.id: {"input": list(prompt.messages), "output": [answer.text for answer in answers[prompt.id]]}
        for prompt in prompts
    }


def _read_partial(path: Path, wanted: set[Name]) -> dict[Name, Answer]:
    """Return the finished answers of a stopped run. A last line that was cut off is left out, and cut from the file."""
    if not path.is_file():
        return {}
    answers, whole, kind = {}, 0, TypeAdapter(Answer)
    for line in path.read_bytes().splitlines(keepends=True):
        try:
            answer = kind.validate_json(line, strict=True)
        except ValidationError:
            break
        if not line.endswith(b"\n"):
            break
        whole += len(line)
        if (answer.id, answer.candidate) in wanted:
            answers[answer.id, answer.candidate] = answer
    with path.open("r+b") as file:
        file.truncate(whole)
    return answers
