"""Answers: the adapter, loaded fresh by path, and the test prompts, to pred.json.

generate/engine/scheduler.py does the work, in a pool of slots. Which prompts share the pool, and when one is admitted,
follows from the
test file and the settled plan alone; a run that was stopped is replayed up to where it stood, and goes on.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from fast_ft.common import out_of_memory, seeds
from fast_ft.common.atomic_files import Lines
from fast_ft.common.console import Bar, note
from fast_ft.common.errors import InputError
from fast_ft.common.minutes import AnswerPace, longer
from fast_ft.common.stopwatch import Stopwatch
from fast_ft.data.encoding import Encoder
from fast_ft.data.examples import Prompt
from fast_ft.generate.engine.kv_cache import PAGE, Cache, pages_for
from fast_ft.generate.engine.model_runner import Fused
from fast_ft.generate.engine.prefill import Row
from fast_ft.generate.engine.sampler import Sampler
from fast_ft.generate.engine.scheduler import Pool, shapes
from fast_ft.generate.parity import PARITY, parity
from fast_ft.models.loaders.base import LoadedModel
from fast_ft.recipe import schema


@dataclass(frozen=True)
class Answer:
    """One answer. `tokens` counts new tokens, EOS included; `ended` says whether EOS came before the limit.

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
    cache_tokens: int = 0  #: of the pool; 0 where there was none
    steps: int = 0  #: that were decoded

    @property
    def flat(self) -> list[Answer]:
        """Every answer."""
        return [answer for answers in self.answers.values() for answer in answers]


def generate(
    loaded: LoadedModel,
    encoder: Encoder,
    prompts: Sequence[Prompt],
    section: schema.Generate,
    *,
    seed: int,
    batch_size: int,
    partial: Path,
    cache_tokens: int | None = None,
    dequantise: bool = False,
    title: str = "answers",
    pace: AnswerPace | None = None,
    on_answer: Callable[[], object] = lambda: None,
    watch: Stopwatch | None = None,
) -> Generation:
    """Answer every prompt, `batch_size` at a time at most, with a cache of `cache_tokens` (default: enough for all).

    `pace` cuts answers where they would not all end in time; each prompt has one even so. `partial` keeps finished
    answers, one JSON line each, and is read back on a second start; `on_answer` is called after each. Out of memory
    takes an eighth of slots and cache; InputError where a single prompt does not fit. `watch` divides the seconds
    into set_up, checks, captures, prefill and steps.
    """
    import torch

    ids = [encoder.prompt_ids(prompt.messages) for prompt in prompts]
    check_room(loaded.model.config, prompts, ids, section.max_new_tokens)
    candidates = range(section.num_return_sequences)
    wanted = [(prompt.id, candidate) for prompt in prompts for candidate in candidates]
    answers = _read_partial(partial, set(wanted))
    if any(longer(pace.minutes if pace else None, answer.within) for answer in answers.values()):
        note("note: there are more minutes: all prompts are answered again, at full length")
        answers = {}
        partial.unlink()
    started = time.monotonic()
    notes: list[str] = []
    if pace is not None:
        pace.resume(max((answer.at for answer in answers.values()), default=0.0))
    watch, difference = watch or Stopwatch(), None
    slots, new_tokens, cells, steps = min(batch_size, len(wanted)), 0, 0, 0
    with Bar(title, len(wanted), done=len(answers)) as bar, Lines(partial) as file:
        while len(answers) < len(wanted):
            rows = {
                Row(row, section.max_new_tokens, seeds.derive(seed, "draw", *name), _tokens(answers, name)): name
                for name, row in zip(wanted, (row for row in ids for _ in candidates), strict=True)
            }
            try:
                pool, difference = _settle(loaded, encoder, ids, section, slots, cache_tokens, dequantise, notes, watch)
                before = pool.made  # those of the check
                for answer in _made(pool, rows, answers, encoder, pace, notes):
                    file.add(asdict(answer))
                    on_answer()
                    new_tokens += answer.tokens
                    bar.advance(1, f"{new_tokens / (time.monotonic() - started):,.0f} tokens/s")
                slots, cells, steps = pool.slots, pool.cache.pages * PAGE, pool.made - before
            except torch.OutOfMemoryError:
                pool = None  # with the error's traceback it holds the cache
            if pool is None:
                slots = _fewer(slots, slots * 7 // 8, "out of memory", notes)
                cache_tokens = cache_tokens and cache_tokens * 7 // 8
                out_of_memory.release()
    by_prompt = {prompt.id: [answers[prompt.id, candidate] for candidate in candidates] for prompt in prompts}
    return Generation(by_prompt, time.monotonic() - started, slots, difference, notes, cells, steps)


def predictions(prompts: Sequence[Prompt], answers: dict[str, list[Answer]]) -> dict[str, Any]:
    """Return pred.json's content, in the test file's order: {id: {"input": messages, "output": [text, ...]}}."""
    return {
        prompt.id: {"input": list(prompt.messages), "output": [answer.text for answer in answers[prompt.id]]}
        for prompt in prompts
    }


def make_pool(
    loaded: LoadedModel,
    encoder: Encoder,
    section: schema.Generate,
    *,
    slots: int,
    longest: int,
    cache_tokens: int | None = None,
    dequantise: bool = False,
) -> Pool:
    """Return a pool over the loaded model, for rows of at most `longest` tokens, prompt and answer together."""
    import torch

    fused = Fused(loaded.model, dequantise=dequantise, step_rows=shapes(slots, planes=True))
    if loaded.device == "cuda":
        torch.cuda.empty_cache()  # what was put side by side leaves holes
    return pool_over(fused, encoder, section, slots=slots, longest=longest, cache_tokens=cache_tokens)


def pool_over(
    fused: Fused,
    encoder: Encoder,
    section: schema.Generate,
    *,
    slots: int,
    longest: int,
    cache_tokens: int | None = None,
) -> Pool:
    """Return a pool as `make_pool` does, over weights that are ready."""
    pages = max(pages_for(longest), slots * pages_for(longest) if cache_tokens is None else cache_tokens // PAGE)
    cache = Cache(len(fused.layers), fused.kv_heads, fused.head_dim, pages, fused.dtype, fused.device)
    return Pool(
        fused, cache, Sampler.of(section), slots=slots, eos_id=encoder.eos_id, pad_id=encoder.pad_id, longest=longest
    )


def check_room(config: Any, prompts: Sequence[Prompt], ids: Sequence[Sequence[int]], max_new_tokens: int) -> None:
    """Raise InputError where a prompt and its longest answer do not fit into the model's context."""
    context = getattr(config, "max_position_embeddings", None)
    longest = max(range(len(ids)), key=lambda i: len(ids[i]))
    if context is not None and len(ids[longest]) + max_new_tokens > context:
        raise InputError(
            f"prompt {prompts[longest].id!r} has {len(ids[longest])} tokens; with generate.max_new_tokens "
            f"{max_new_tokens} that is over the model's context of {context}. "
            f"Use at most generate.max_new_tokens={max(0, context - len(ids[longest]))}, or shorten the prompt."
        )


def _settle(
    loaded: LoadedModel, encoder: Encoder, ids: Sequence[Sequence[int]], section: schema.Generate, slots: int,
    cache_tokens: int | None, dequantise: bool, notes: list[str], watch: Stopwatch,
) -> tuple[Pool, float]:  # fmt: skip
    """Return a pool in which batched and single decoding agree, and by how many nats they differ."""
    longest = max(map(len, ids)) + section.max_new_tokens
    while True:
        with watch.during("set_up"):
            pool = make_pool(
                loaded, encoder, section, slots=slots, longest=longest, cache_tokens=cache_tokens, dequantise=dequantise
            )
        pool.graphs.watch = watch
        with watch.during("checks", covers=frozenset({"prefill", "steps"})):
            difference = parity(pool, loaded, encoder, ids, section.max_new_tokens)
        if difference <= PARITY[loaded.dtype] or slots == 1:
            return pool, difference
        slots = _fewer(slots, slots // 2, f"batched and single decoding differ by {difference:.4f} nat", notes)


def _made(
    pool: Pool, rows: dict[Row, tuple[str, int]], answers: dict[tuple[str, int], Answer], encoder: Encoder,
    pace: AnswerPace | None, notes: list[str],
) -> Iterator[Answer]:  # fmt: skip
    """Yield each answer that was not there, as it ends, and put it among `answers`."""
    most = max(row.limit for row in rows)
    look = None if pace is None else _keep_pace(pace, list(rows), most, encoder.eos_id, notes)
    for row in pool.run(list(rows), on_look=look):
        if (name := rows[row]) in answers:
            continue
        ended, length = row.tokens[-1] == encoder.eos_id, len(row.tokens)
        at = 0.0 if pace is None else pace.elapsed()
        within = pace.minutes if pace and not ended and length < most else None
        answers[name] = Answer(name[0], encoder.decode(row.tokens), length, ended, name[1], round(at, 3), within)
        yield answers[name]


def _keep_pace(
    pace: AnswerPace, rows: Sequence[Row], most: int, eos_id: int, notes: list[str]
) -> Callable[[list[Row]], None]:
    """Return what looks at the pool's rows now and then, and shortens those that would not end in time."""

    def look(live: list[Row]) -> None:
        fresh = [row for row in rows if row.known is None]
        open_ = [row for row in fresh if not ended(row)]
        finished = [row.known or len(row.tokens) for row in rows if row.known is not None or ended(row)]
        total = sum(len(row.tokens) for row in fresh)
        limit = pace.limit([len(row.tokens) for row in open_], finished, total, most)
        if limit < most and pace.cut_at is None:
            notes.append(pace.forecast(limit, most))
            note(f"warning: {notes[-1]}")
        if limit < most:
            pace.cut_at = limit
        for row in open_:
            row.limit = min(most, max(len(row.tokens), limit))

    def ended(row: Row) -> bool:
        return bool(row.tokens) and (len(row.tokens) >= row.limit or row.tokens[-1] == eos_id)

    return look


def _fewer(batch_size: int, smaller: int, reason: str, notes: list[str]) -> int:
    if batch_size == 1:
        raise InputError("out of memory with one prompt at a time. Lower generate.max_new_tokens, or free the card.")
    notes.append(f"{reason} in batches of {batch_size}: went on with {smaller}")
    note(notes[-1])
    return smaller


def _tokens(answers: dict[tuple[str, int], Answer], name: tuple[str, int]) -> int | None:
    return answers[name].tokens if name in answers else None


def _read_partial(path: Path, wanted: set[tuple[str, int]]) -> dict[tuple[str, int], Answer]:
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
