"""Answers many sequences side by side: the scheduler decides, the model runner computes, in turns.

The host looks at the tokens after each burst only. While all sequences of a decision are replayed, nothing is
computed, but for the prefix that later sequences share.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import Tensor

from fast_ft.common.stopwatch import Stopwatch
from fast_ft.generate.engine.block_manager import PAGE, BlockManager
from fast_ft.generate.engine.fused_model import FusedModel
from fast_ft.generate.engine.kv_cache import KVCache
from fast_ft.generate.engine.model_runner import EngineConfig, ModelRunner
from fast_ft.generate.engine.sampler import Sampler
from fast_ft.generate.engine.scheduler import BURST, Admission, Burst, Scheduler, shapes
from fast_ft.generate.engine.sequence import Sequence


class LLMEngine:
    """A scheduler and a model runner over one cache."""

    def __init__(self, model: FusedModel, cache: KVCache, sampler: Sampler, config: EngineConfig) -> None:
        self.config, self.products = config, ""
        self.runner = ModelRunner(model, cache, sampler, config)
        self.scheduler = Scheduler(
            BlockManager(cache.pages),
            shapes(config.slots, planes=model.planes),
            longest=config.longest,
            end_ids=config.end_ids,
            most_shared=0 if any(model.windows) else config.prefill_tokens,
        )

    @property
    def logits(self) -> Tensor:
        """The logits from which the newest tokens were chosen, one row for each slot."""
        return self.runner.logits

    @property
    def steps_made(self) -> int:
        """The steps that were decoded."""
        return self.runner.steps

    @property
    def cache_tokens(self) -> int:
        """The tokens that the cache holds at most."""
        return self.scheduler.blocks.pages * PAGE

    @property
    def watch(self) -> Stopwatch:
        """What tells how long captures, prefill and steps took."""
        return self.runner.graphs.watch

    @watch.setter
    def watch(self, watch: Stopwatch) -> None:
        self.runner.graphs.watch = watch

    def run(
        self,
        sequences: list[Sequence],
        *,
        burst: int = BURST,
        slots: int | None = None,
        on_look: Callable[[list[Sequence]], None] | None = None,
    ) -> Iterator[Sequence]:
        """Yield each sequence when its answer has ended. InputError where one is too long for the cache.

        `on_look` is called with the live sequences after prefill and after each burst; `self.logits` are then
        those from which their newest tokens were chosen. `slots` fixes the shape of steps.
        """
        scheduler, watch = self.scheduler, self.watch
        scheduler.start(sequences)
        while scheduler.waiting or scheduler.live:
            if finished := scheduler.take_finished():
                for sequence in finished:
                    del sequence.tokens[sequence.limit :]
                    yield sequence
                continue
            decision = scheduler.schedule(burst, slots)
            if isinstance(decision, Admission):
                with watch.during("prefill"):
                    self.prefill(decision)
            else:
                with watch.during("steps"):
                    self.decode(decision)
            if on_look:
                on_look(decision.sequences)

    def prefill(self, admission: Admission) -> None:
        """Draw the next token of each sequence that was admitted."""
        sequences = admission.sequences
        known = _all_known(sequences) and not admission.fills
        chosen = [self.config.pad_id] * len(sequences) if known else self.runner.prefill(admission)
        for sequence, token in zip(sequences, chosen, strict=True):
            sequence.add([token], self.config.pad_id)

    def decode(self, burst: Burst) -> None:
        """Make the burst's tokens."""
        if _all_known(burst.sequences):
            made = [[self.config.pad_id] * min(burst.steps, each.end - len(each.tokens)) for each in burst.sequences]
        else:
            made = self.runner.decode(burst)
        for sequence, tokens in zip(burst.sequences, made, strict=True):
            sequence.add(tokens, self.config.pad_id)


def _all_known(sequences: list[Sequence]) -> bool:
    return all(each.known is not None for each in sequences)
