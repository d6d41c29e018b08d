"""CUDA graphs of passes and steps. They never run at once, so they share one pool of memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

from fast_ft.common.console import note
from fast_ft.common.stopwatch import Stopwatch

Output = TypeVar("Output")


class Graphs:
    """Captures work where `works`; a first failure ends that, with a note, and the work then runs as it is.

    `watch` tells what captures took, and the pool's prefill and steps.
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
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        aside = stream if stream != torch.cuda.default_stream() else None  # a stream of limited SMs stays the one
        try:
            with self.watch.during("captures"), torch.cuda.graph(graph, pool=self._memory, stream=aside):
                output = work()
        except RuntimeError as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            self.works = False
            note(f"note: decoding without CUDA graphs, more slowly: {str(error)[:300]}")
            return None
        self._memory = graph.pool()
        self.count += 1
        return graph, output
