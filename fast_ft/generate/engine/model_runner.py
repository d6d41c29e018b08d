"""What the device computes: prompts' passes, and one decoding step that is captured in a CUDA graph.

Shapes: S slots, T tokens, V vocabulary, W pages in a row of the table.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fast_ft.common import out_of_memory
from fast_ft.common.console import note
from fast_ft.generate.engine import kernel_checks
from fast_ft.generate.engine.block_manager import PAGE
from fast_ft.generate.engine.cuda_graphs import Graphs
from fast_ft.generate.engine.first_half import FirstHalf
from fast_ft.generate.engine.fused_model import FusedModel
from fast_ft.generate.engine.kv_cache import KVCache
from fast_ft.generate.engine.prefill import Prefill
from fast_ft.generate.engine.sampler import Sampler, fits
from fast_ft.generate.engine.scheduler import BURST, Admission, Burst
from fast_ft.generate.engine.sequence import Sequence
from fast_ft.plan.decode_pool import PREFILL_TOKENS

if TYPE_CHECKING:
    from fast_ft.generate.engine.draw_triton import Draw


@dataclass(frozen=True)
class EngineConfig:
    """`slots` sequences at a time, of at most `longest` tokens each, prompt and answer together.

    A pass over prompts has at most `prefill_tokens` tokens. `captures` false runs every step uncaptured, as on a CPU.
    """

    slots: int
    longest: int
    end_ids: tuple[int, ...]  #: each of them ends an answer
    pad_id: int
    prefill_tokens: int = PREFILL_TOKENS
    captures: bool = True


class SlotState(NamedTuple):
    """A slot's numbers on the device: the first columns of the state. The slot's block table follows them."""

    token: Any  #: the newest one
    length: Any  #: tokens in the cache, which is where the newest one's keys and values go
    made: Any  #: tokens of the answer so far
    limit: Any
    live: Any  #: 1 until the answer ends
    key: Any  #: of the row's draws
    stops: Any  #: whether an end token ends the answer; in a replay its known length does


_COLUMNS = len(SlotState._fields)
_TABLE = _COLUMNS  #: the column at which the block table begins


class ModelRunner:
    """Runs one model over one cache, for as many slots as the config says."""

    def __init__(self, model: FusedModel, cache: KVCache, sampler: Sampler, config: EngineConfig) -> None:
        self.model, self.cache, self.sampler, self.config = model, cache, sampler, config
        self.graphs = Graphs(works=config.captures and model.device.type == "cuda")
        self.steps = 0  #: that were made
        self._prefill = Prefill(model, cache, self.graphs, most=config.prefill_tokens)
        self._captured: dict[tuple[int, int], torch.cuda.CUDAGraph] = {}
        self._foreseen: set[int] = set()  #: slots of steps that were to be captured ahead

        def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(*shape, dtype=dtype, device=model.device)

        slots, vocabulary = config.slots, model.head.weight.shape[0]
        self.ends = torch.tensor(config.end_ids, dtype=torch.int64, device=model.device)
        self.state = zeros(slots, _TABLE + config.longest // PAGE + 1)
        self.chunk, self.tick = zeros(slots, BURST), zeros(1)
        self.logits = zeros(slots, vocabulary, dtype=torch.float32)  #: of which the newest tokens were chosen
        self.draw = self._draw(slots, vocabulary)
        self.seen = zeros(slots, vocabulary, dtype=torch.bool) if sampler.penalises else None

    def _draw(self, slots: int, vocabulary: int) -> Draw | None:
        """Return the kernel that ends a step, where there is one for this sampler."""
        head: Tensor = self.model.head.weight
        if not (self.model.ops.FUSES and fits(self.sampler, vocabulary)):
            return None
        try:
            from fast_ft.generate.engine import draw_triton

            kernel_checks.drawing(self.sampler, vocabulary, head.dtype, head.device)
        except Exception as error:  # a compiler on a card that it does not know may fail in any way
            if out_of_memory.is_short(error):
                raise
            note(f"note: tokens are drawn by plain torch, more slowly: {type(error).__name__}: {str(error)[:300]}")
            return None
        return draw_triton.Draw(self.sampler, slots, self.ends)

    def prefill(self, admission: Admission) -> list[int]:
        """Fill the cache with the sequences' tokens, and return the next token of each."""
        sequences, device = admission.sequences, self.model.device
        count = len(sequences)
        key_S = torch.tensor([each.key for each in sequences], device=device)
        made_S = torch.tensor([len(each.tokens) for each in sequences], device=device)
        with torch.inference_mode():
            self._prefill.run(admission, self.logits)
            seen_SV = self._mark_seen(sequences)
            chosen_S = self.sampler.choose(self.logits[:count], key_S, made_S, seen_SV)
            self._capture_ahead(admission.then)
            return chosen_S.tolist()

    def decode(self, burst: Burst) -> list[list[int]]:
        """Return the new tokens of each of the burst's sequences: as many as it has steps, or fewer where one ends."""
        sequences, steps = burst.sequences, burst.steps
        multiple = self.model.ops.COLUMNS  # 0: attention needs no number of columns
        if multiple and not self.graphs.works:
            multiple = PAGE  # each number of columns is a captured step of its own; without captures the fewest serve
        columns = multiple and -(-max(each.length(steps) for each in sequences) // multiple) * multiple
        width = self.state.shape[1]
        state = np.zeros((burst.slots, width), dtype=np.int64)  # torch takes ten times as long to fill rows
        for slot, each in enumerate(sequences):
            state[slot, :_COLUMNS] = SlotState(
                token=each.tokens[-1], length=each.length() - 1, made=len(each.tokens), limit=each.end, live=1,
                key=each.key, stops=each.known is None,
            )  # fmt: skip
            state[slot, _TABLE : _TABLE + len(each.block_table)] = each.block_table
        with torch.inference_mode():
            self.state[: burst.slots].copy_(torch.from_numpy(state))
            self.tick.zero_()
            self._mark_seen(sequences)
            self._run_steps(burst.slots, min(columns, (width - _TABLE) * PAGE), steps)
            self.steps += steps
            if burst.others_wait:
                self._prefill.capture_ahead()
            else:
                self._capture_ahead(burst.then)
            chunk = self.chunk[: len(sequences), :steps].tolist()
        return [[token for token in tokens if token >= 0] for tokens in chunk]

    def _mark_seen(self, sequences: list[Sequence]) -> Tensor | None:
        """Mark the tokens that each sequence holds, for the repetition penalty; None without one."""
        if self.seen is None:
            return None
        self.seen.zero_()
        for mark_V, each in zip(self.seen, sequences, strict=False):
            mark_V[[*each.prompt, *each.tokens]] = True
        return self.seen[: len(sequences)]

    def _run_steps(self, slots: int, columns: int, count: int) -> None:
        shape = (slots, columns)
        if self.graphs.works and shape not in self._captured:
            with self.graphs.watch.during("captures"):
                self._step(*shape)  # warms up what the capture will record, and is one of the steps
                if captured := self.graphs.capture(lambda: self._step(*shape)):
                    self._captured[shape] = captured[0]
            count -= 1
        graph = self._captured.get(shape)
        for _ in range(count):
            graph.replay() if graph else self._step(*shape)

    def _capture_ahead(self, slots: int | None) -> None:
        """Capture the step of that many slots, once, while the card computes what it was given; nothing is run."""
        if slots is None or self.model.ops.COLUMNS or slots in self._foreseen or (slots, 0) in self._captured:
            return
        self._foreseen.add(slots)
        if captured := self.graphs.capture_ahead(lambda: self._step(slots, 0)):
            self._captured[slots, 0] = captured[0]

    def _step(self, slots: int, columns: int) -> None:
        """Make one token for each slot, from device state to device state. A slot that has ended stays where it is."""
        model, state = self.model, self.state[:slots]
        slot = SlotState(*state[:, :_COLUMNS].unbind(1))
        table_SW = state[:, _TABLE:]
        cell_S = table_SW.gather(1, (slot.length // PAGE)[:, None])[:, 0] * PAGE + slot.length % PAGE

        def attend(layer: int, qkv: Tensor, cos_sin: tuple[Tensor, Tensor], first: FirstHalf | None) -> Tensor:
            keys, values, scales = self.cache.layer(layer)
            q_SHD, _, _ = model.ops.rotate_into_cache(qkv, model.heads, cos_sin, cell_S, keys, values, scales)
            return model.ops.paged_attention(
                q_SHD, keys, values, table_SW, slot.length, columns=columns, order=model.order(layer, slots),
                window=model.windows[layer], scales=scales, first=first,
            )  # fmt: skip

        few = model.takes_few(slots)
        hidden_SE = model.forward(slot.token, slot.length, attend, few=few)
        if self.draw is not None:
            self.draw(model.head(hidden_SE), self.logits, state, self.chunk, self.tick)
            self.tick += 1
            return
        logits_SV = model.logits(hidden_SE)
        self.logits[:slots].copy_(logits_SV)
        seen_SV = self.seen[:slots] if self.seen is not None else None
        fresh_S = self.sampler.choose(logits_SV, slot.key, slot.made, seen_SV)
        alive_S = slot.live.bool()
        self.chunk[:slots].index_copy_(1, self.tick, torch.where(alive_S, fresh_S, -1)[:, None])
        self.tick += 1
        slot.token.copy_(torch.where(alive_S, fresh_S, slot.token))
        slot.made.add_(slot.live)
        slot.length.add_(slot.live)
        ends_S = slot.stops.bool() & (slot.token[:, None] == self.ends).any(1)
        slot.live.mul_((slot.made < slot.limit) & ~ends_S)
        if seen_SV is not None:
            seen_SV.scatter_(1, slot.token[:, None], True)
