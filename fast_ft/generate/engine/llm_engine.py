"""A pool of slots that answers rows side by side: paged cache, refill, and one decode step captured in a CUDA graph.

    waiting -> admit (prefill, several prompts a pass) -> live -> bursts of 8 steps -> ended
                  ^                                         |
                  +---- set aside when no page is left -----+

The host looks at the tokens after each burst only. What it decides there (who is admitted, who is set aside, which
pool shape runs next) follows from the rows' lengths alone, never from timing. So a run that was stopped is replayed:
rows whose answers are known already keep their places and lengths, and nothing is computed while all rows are such.

Shapes: S slots, T tokens, V vocabulary, W pages in a row of the table.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from fast_ft.common.errors import InputError
from fast_ft.generate.engine import nf4_linear
from fast_ft.generate.engine.cuda_graphs import Graphs
from fast_ft.generate.engine.kv_cache import PAGE, Cache, pages_for
from fast_ft.generate.engine.model_runner import Fused
from fast_ft.generate.engine.prefill import Prefill, Row
from fast_ft.generate.engine.sampler import Sampler

BURST = 8  #: steps between two looks at the tokens
#: New tokens for which a row is given room when it is admitted. Rows of all ages share the cache, and what ends makes
#: room for what grows, so few are best (of 1 to 384, replayed with answers of 100 to 1,024 tokens). Where that was too
#: hopeful, the youngest row is set aside, and its tokens are prefilled again.
AHEAD = 32
_SMALLEST = 4  #: slots
_TILE = 16  #: rows that products take at once: a step of fewer takes as long
_GROUPS = 8  #: of rows that are admitted at once fill the slots
_TOKEN, _LENGTH, _MADE, _LIMIT, _LIVE, _KEY, _STOPS, _TABLE = range(8)  #: columns of the state


class Pool:
    """`slots` rows at a time, over one cache. `captures` is false on a CPU; there the same steps run uncaptured."""

    def __init__(
        self, fused: Fused, cache: Cache, sampler: Sampler, *,
        slots: int, eos_id: int, pad_id: int, longest: int, prefill_tokens: int = 2048, captures: bool = True,
    ) -> None:  # fmt: skip
        import torch

        self.fused, self.cache, self.sampler = fused, cache, sampler
        self.slots, self.eos_id, self.pad_id = slots, eos_id, pad_id
        self.longest = longest
        self.graphs = Graphs(works=captures and fused.device.type == "cuda")
        self.prefill = Prefill(fused, cache, self.graphs, most=prefill_tokens)
        self.shapes = shapes(slots, planes=fused.planes)
        self._captured: dict[tuple[int, int], Any] = {}
        self.made = 0  #: steps

        def zeros(*shape: int, dtype: Any = torch.int64) -> Any:
            return torch.zeros(*shape, dtype=dtype, device=fused.device)

        vocabulary = fused.head.weight.shape[0]
        self.state = zeros(slots, _TABLE + longest // PAGE + 1)
        self.chunk, self.tick = zeros(slots, BURST), zeros(1)
        self.logits = zeros(slots, vocabulary, dtype=torch.float32)
        self.seen = zeros(slots, vocabulary, dtype=torch.bool) if sampler.penalises else None

    def run(
        self, rows: Sequence[Row], *, burst: int = BURST, shape: int | None = None,
        on_look: Callable[[list[Row]], None] | None = None,
    ) -> Iterator[Row]:  # fmt: skip
        """Yield each row when its answer has ended. InputError where one is too long for the pool.

        `on_look` is called with the live rows after prefill and after each burst; `self.logits` are then those from
        which their newest tokens were chosen. `shape` fixes the pool's shape.
        """
        for row in rows:
            self._check(row)
        self.cache.clear()
        waiting, live = deque(rows), list[Row]()
        while waiting or live:
            # What is over is found anew each time: a limit may have been lowered since, of a waiting row too.
            if over := [*self._take_over(live), *self._take_over(waiting)]:
                for row in over:
                    del row.tokens[row.limit :]
                    yield row
                continue
            if looked := self._admit(waiting, live):
                with self.graphs.watch.during("prefill"):
                    self._prefill(looked)
                live += looked
            else:
                steps = min(burst, BURST, max(row.limit - len(row.tokens) for row in live))
                self._make_room(live, waiting, steps)
                with self.graphs.watch.during("steps"):
                    self._burst(live, steps, shape)
                looked = live
            if on_look:
                on_look(looked)

    # What the host decides, from lengths alone

    def shape_for(self, rows: int) -> int:
        """Return the smallest of the shapes that holds so many rows."""
        return next(slots for slots in reversed(self.shapes) if slots >= rows)

    def _check(self, row: Row) -> None:
        need = len(row.prompt) + row.limit
        if need > self.longest or pages_for(need) > self.cache.pages:
            raise InputError(
                f"a prompt of {len(row.prompt)} tokens and {row.limit} new ones do not fit into the pool's cache of "
                f"{self.cache.pages * PAGE} tokens. Lower generate.max_new_tokens, or free memory on the card."
            )

    def _admit(self, waiting: deque[Row], live: list[Row]) -> list[Row]:
        """Take rows from the front while there is a slot and room for what they and the live ones may come to.

        Several at a time, since a pass over one prompt takes nearly as long as one over eight: as long as rows are
        live, an eighth of the slots must be free at once, or enough for all that wait.
        """
        held = sum(max(_room(row), len(row.pages)) for row in live)
        count = 0
        for row in waiting:
            held += _room(row)
            if len(live) + count == self.slots or (held > self.cache.pages and (live or count)):
                break
            count += 1
        if live and count < min(len(waiting), self.slots // _GROUPS):
            return []
        fresh = [waiting.popleft() for _ in range(count)]
        for row in fresh:
            self._grow(row, row.length())
        return fresh

    def _make_room(self, live: list[Row], waiting: deque[Row], steps: int) -> None:
        """Give each live row pages for its next steps, the oldest first; where none is left, set the youngest aside."""
        for row in list(live):
            while row in live and not self._grow(row, row.length(steps)):
                youngest = live.pop()
                self._release(youngest)
                waiting.appendleft(youngest)

    def _grow(self, row: Row, length: int) -> bool:
        while len(row.pages) < pages_for(length):
            if not self.cache.free:
                return False
            row.pages.append(self.cache.free.pop())
        return True

    def _release(self, row: Row) -> None:
        self.cache.free += reversed(row.pages)
        row.pages.clear()

    def _is_over(self, row: Row) -> bool:
        if row.known is None and row.tokens and row.tokens[-1] == self.eos_id:
            return True
        return len(row.tokens) >= row.end

    def _take_over(self, rows: list[Row] | deque[Row]) -> list[Row]:
        """Take the rows that are over out of `rows`, give their pages back, and return them."""
        over = [row for row in rows if self._is_over(row)]
        for row in over:
            rows.remove(row)
            self._release(row)
        return over

    # What the device computes

    def _prefill(self, rows: list[Row]) -> None:
        """Fill the cache with the rows' tokens and draw the next one of each."""
        import torch

        if all(row.known is not None for row in rows):
            for row in rows:
                row.tokens.append(self.pad_id)
            return
        count = len(rows)
        listed = [[row.key for row in rows], [len(row.tokens) for row in rows]]
        key_S, made_S = (torch.tensor(each, device=self.fused.device) for each in listed)
        with torch.inference_mode():
            self.prefill.run(rows, self.logits)
            seen_SV = self._seen_by(rows)
            chosen = self.sampler.choose(self.logits[:count], key_S, made_S, seen_SV).tolist()
        for row, token in zip(rows, chosen, strict=True):
            row.tokens.append(token if row.known is None else self.pad_id)

    def _seen_by(self, rows: list[Row]) -> Any:
        """Mark the tokens that each row holds, for the repetition penalty; None without one."""
        if self.seen is None:
            return None
        self.seen.zero_()
        for mark_V, row in zip(self.seen, rows, strict=False):
            mark_V[[*row.prompt, *row.tokens]] = True
        return self.seen[: len(rows)]

    def _burst(self, live: list[Row], steps: int, shape: int | None) -> None:
        """Make `steps` tokens for each live row."""
        import numpy as np
        import torch

        if all(row.known is not None for row in live):
            for row in live:
                row.tokens += [self.pad_id] * min(steps, row.end - len(row.tokens))
            return
        slots = shape or self.shape_for(len(live))
        multiple = self.fused.ops.COLUMNS  # 0: attention needs no number of columns
        columns = multiple and -(-max(row.length(steps) for row in live) // multiple) * multiple
        width = self.state.shape[1]
        state = np.zeros((slots, width), dtype=np.int64)  # torch takes ten times as long to fill rows
        for slot, row in enumerate(live):
            made = len(row.tokens)
            head = [row.tokens[-1], row.length() - 1, made, row.end, 1, row.key, row.known is None]
            state[slot, : _TABLE + len(row.pages)] = [*head, *row.pages]
        with torch.inference_mode():
            self.state[:slots].copy_(torch.from_numpy(state))
            self.tick.zero_()
            self._seen_by(live)
            self._steps(slots, min(columns, (width - _TABLE) * PAGE), steps)
            self.made += steps
            chunk = self.chunk[: len(live), :steps].tolist()
        for row, tokens in zip(live, chunk, strict=True):
            row.tokens += [token if row.known is None else self.pad_id for token in tokens if token >= 0]

    def _steps(self, slots: int, columns: int, count: int) -> None:
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

    def _step(self, slots: int, columns: int) -> None:
        """One token for each slot, from device state to device state. A slot that has ended stays where it is."""
        import torch

        fused, state = self.fused, self.state[:slots]
        token, length, made, limit, live, key, stops = state[:, :_TABLE].unbind(1)
        table = state[:, _TABLE:]
        cell_S = table.gather(1, (length // PAGE)[:, None])[:, 0] * PAGE + length % PAGE

        def attend(layer: int, qkv: Any, cos_sin: Any) -> Any:
            keys, values = self.cache.keys[layer], self.cache.values[layer]
            q_SHD, _, _ = fused.ops.rotate_into_cache(qkv, fused.heads, cos_sin, cell_S, keys, values)
            return fused.ops.paged_attention(q_SHD, keys, values, table, length, columns=columns, planes=planes)

        planes = fused.planes and slots <= nf4_linear.FEW
        logits_SV = fused.logits(fused.forward(token, length, attend, planes=planes))
        self.logits[:slots].copy_(logits_SV)
        seen_SV = self.seen[:slots] if self.seen is not None else None
        fresh_S = self.sampler.choose(logits_SV, key, made, seen_SV)
        alive_S = live.bool()
        self.chunk[:slots].index_copy_(1, self.tick, torch.where(alive_S, fresh_S, -1)[:, None])
        self.tick += 1
        token.copy_(torch.where(alive_S, fresh_S, token))
        made += live
        length += live
        live.mul_((made < limit) & ~(stops.bool() & (token == self.eos_id)))
        if seen_SV is not None:
            seen_SV.scatter_(1, token[:, None], True)


def shapes(slots: int, *, planes: bool) -> list[int]:
    """Return how many rows a pool's steps may have: a few numbers, since each is captured."""
    found = [slots]
    while (fewer := (found[-1] + 1) // 2) >= (_TILE if planes else _SMALLEST):
        found.append(fewer)
    return found


def _room(row: Row) -> int:
    """Return the pages that are held free for a row when rows are admitted."""
    return pages_for(len(row.prompt) + min(row.limit, max(len(row.tokens) + BURST, AHEAD)))
