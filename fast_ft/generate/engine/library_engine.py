"""Answers by transformers' own `generate`, in batches: for models on the general way, which our engine does not know.

Prompts are padded on the left. Tokens are drawn by our sampler from a hash of (seed, prompt, candidate, token), so an
answer does not hang on its neighbours' draws. Batches follow from the prompts and the plan alone: a run that was
stopped computes each batch that is not known whole once more, in the same shapes.

Shapes: S rows of a batch, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from fast_ft.common.stopwatch import Stopwatch
from fast_ft.generate.engine.model_runner import EngineConfig
from fast_ft.generate.engine.sampler import Sampler
from fast_ft.generate.engine.scheduler import BURST
from fast_ft.generate.engine.sequence import Sequence
from fast_ft.hub.families import FamilySpec
from fast_ft.models.loaders.base import LoadedModel


class LibraryEngine:
    """Answers sequences as LLMEngine does, `config.slots` at a time.

    `logits` (live rows, V) are those from which the newest tokens of the rows in `on_look` were chosen.
    """

    def __init__(self, loaded: LoadedModel, sampler: Sampler, config: EngineConfig) -> None:
        self.model: Any = loaded.model.get_base_model()
        self.sampler, self.config, self.watch = sampler, config, Stopwatch()
        self.logits = torch.empty(0)
        self.steps_made, self.products = 0, ""
        self._alone_beyond = FamilySpec.from_config(self.model.config.to_dict()).alone_beyond

    @property
    def cache_tokens(self) -> int:
        """The tokens that the caches of a batch may hold."""
        return self.config.slots * self.config.longest

    def run(
        self,
        sequences: list[Sequence],
        *,
        burst: int = BURST,
        slots: int | None = None,
        on_look: Callable[[list[Sequence]], None] | None = None,
    ) -> Iterator[Sequence]:
        """Yield each sequence after its batch.

        `on_look` is called with the live ones, after their first token and every `burst` tokens, as by LLMEngine.
        """
        for batch in self.batches(sequences, slots or self.config.slots):
            if all(each.known is not None for each in batch):
                for each in batch:
                    each.add([self.config.pad_id] * each.end, self.config.pad_id)
            else:
                with self.watch.during("steps"):
                    self._answer(_Batch(self, batch, burst, on_look))
            for each in batch:
                del each.tokens[each.limit :]
                yield each

    def batches(self, sequences: list[Sequence], slots: int) -> list[list[Sequence]]:
        """Return the sequences in batches, those of like length together; some of a moving rope are alone."""
        made: list[list[Sequence]] = []
        for each in sorted(sequences, key=lambda sequence: len(sequence.prompt)):
            if made and len(made[-1]) < slots and not self._is_alone(each) and not self._is_alone(made[-1][0]):
                made[-1].append(each)
            else:
                made.append([each])
        return made

    def _is_alone(self, sequence: Sequence) -> bool:
        whole = len(sequence.prompt) + sequence.limit
        return self._alone_beyond is not None and whole > self._alone_beyond

    def _answer(self, batch: _Batch) -> None:
        """Let `generate` answer a batch; the batch chooses each token and says when all rows have ended."""
        from transformers import GenerationConfig

        pad, rows, device = self.config.pad_id, batch.rows, self.model.device
        width = max(len(row.prompt) for row in rows)
        ids = [[pad] * (width - len(row.prompt)) + row.prompt for row in rows]
        mask = [[0] * (width - len(row.prompt)) + [1] * len(row.prompt) for row in rows]
        settings = GenerationConfig(
            max_new_tokens=max(row.end for row in rows), do_sample=False, num_beams=1, pad_token_id=pad, use_cache=True
        )
        former, self.model.generation_config = self.model.generation_config, GenerationConfig()  # the base's own wishes
        try:
            self.model.generate(
                input_ids=torch.tensor(ids, device=device),
                attention_mask=torch.tensor(mask, device=device),
                generation_config=settings,
                logits_processor=[batch],
                stopping_criteria=[_Ended(batch)],
            )
        finally:
            self.model.generation_config = former


class _Batch:
    """Rows that are answered together: chooses their tokens by our sampler and adds them to the live sequences."""

    def __init__(
        self,
        engine: LibraryEngine,
        rows: list[Sequence],
        burst: int,
        on_look: Callable[[list[Sequence]], None] | None,
    ) -> None:
        self.engine, self.rows, self.burst, self.on_look = engine, rows, burst, on_look
        self.count = 0  #: tokens made of each row that has not ended
        self.seen_SV: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return scores (S, V) in which each row's chosen token alone is possible."""
        engine, logits_SV = self.engine, scores.float()
        key_S = torch.tensor([row.key for row in self.rows], device=scores.device)
        count_S = torch.full_like(key_S, self.count)
        fresh_S = engine.sampler.choose(logits_SV, key_S, count_S, self._seen(logits_SV))
        if self.seen_SV is not None:
            self.seen_SV.scatter_(1, fresh_S[:, None], True)
        live = [index for index, row in enumerate(self.rows) if not self.ended(row)]
        for index, token in zip(live, fresh_S[live].tolist(), strict=True):
            self.rows[index].tokens.append(token)
        engine.logits = logits_SV[live]
        engine.steps_made += 1
        self.count += 1
        if self.on_look and (self.count - 1) % self.burst == 0:
            self.on_look([self.rows[index] for index in live])
        return torch.full_like(scores, -torch.inf).scatter_(1, fresh_S[:, None], 0.0)

    def ended(self, row: Sequence) -> bool:
        """Return whether a row has ended, by an end token or at its limit."""
        is_over = row.known is None and row.tokens and row.tokens[-1] in self.engine.config.end_ids
        return bool(is_over) or len(row.tokens) >= row.end

    def _seen(self, logits_SV: Tensor) -> Tensor | None:
        """Return which tokens each row holds, (S, V), for the repetition penalty; None without one."""
        if self.seen_SV is None and self.engine.sampler.penalises:
            self.seen_SV = torch.zeros_like(logits_SV, dtype=torch.bool)
            for mark_V, row in zip(self.seen_SV, self.rows, strict=True):
                mark_V[row.prompt] = True
        return self.seen_SV


class _Ended:
    """Tells `generate` which rows have ended."""

    def __init__(self, batch: _Batch) -> None:
        self.batch = batch

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        """Return (S,), true where a row has ended."""
        return torch.tensor([self.batch.ended(row) for row in self.batch.rows], device=input_ids.device)
