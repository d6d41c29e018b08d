"""CUDA graphs of passes and steps. They never run at once, so they share one pool of memory."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from fast_ft.common import out_of_memory
from fast_ft.common.console import note
from fast_ft.common.stopwatch import Stopwatch

Output = TypeVar("Output")


class Graphs:
    """Captures work where `works`; a failure ends that, with a note, and the work then runs as it is.

    `watch` tells what captures took, and the pool's prefill and steps. What is captured ahead, while the card computes
    something else, waits for nothing and gives no memory back: torch.cuda.graph does both.
    """

    def __init__(self, *, works: bool) -> None:
        self.works = works
        self.count = 0
        self.watch = Stopwatch()
        self._memory: Any = None

    def capture(self, work: Callable[[], Output]) -> tuple[torch.cuda.CUDAGraph, Output] | None:
        """Return (the graph, what `work` returned in it), or None where it cannot be captured. Nothing has run then.

        `work` must have run before, so that all that is made at a first use is there.
        """
        if not self.works:
            return None
        graph = torch.cuda.CUDAGraph()
        try:
            with self.watch.during("captures"), torch.cuda.graph(graph, pool=self._memory, stream=_limited()):
                output = work()
        except RuntimeError as error:
            if out_of_memory.is_short(error):
                raise
            self.works = False
            note(f"note: decoding without CUDA graphs, more slowly: {str(error)[:300]}")
            return None
        return self._kept(graph), output

    def capture_ahead(self, work: Callable[[], Output]) -> tuple[torch.cuda.CUDAGraph, Output] | None:
        """Return what `capture` does, without waiting for what the card computes; None where that does not succeed.

        `work` need not have run before: where it cannot be captured at its first use, `capture` may do it later on.
        """
        if not self.works:
            return None
        graph, stream = torch.cuda.CUDAGraph(), _limited() or _aside()
        try:
            with torch.cuda.stream(stream):
                graph.capture_begin(pool=self._memory)
                try:
                    output = work()
                finally:
                    graph.capture_end()
        except RuntimeError:
            return None
        return self._kept(graph), output

    def _kept(self, graph: torch.cuda.CUDAGraph) -> torch.cuda.CUDAGraph:
        """Count a graph that was captured, and let the next one use its memory; return it."""
        self._memory = graph.pool()
        self.count += 1
        return graph


@functools.cache
def _aside() -> torch.cuda.Stream:
    """Return the stream on which work is captured ahead: one in a process, since cuBLAS keeps 32 MiB for each."""
    return torch.cuda.Stream()


def _limited() -> torch.cuda.Stream | None:
    """Return the stream of limited SMs, if that is the current one: what runs there is captured there."""
    stream = torch.cuda.current_stream()
    return stream if stream != torch.cuda.default_stream() else None
