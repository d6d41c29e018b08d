"""Measurements of bench.decode over long answers: what an 8-bit cache is worth. Used by bench/decode_measures.py."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from bench.clock import empty_cache, reset_peak
from bench.decode_subject import Subject
from bench.timed import timed_run
from fast_ft.generate.engine.block_manager import PAGE
from fast_ft.generate.engine.scheduler import BURST, Burst
from fast_ft.generate.engine.sequence import Sequence

_KINDS = ("16bit", "8bit")
LONG = 1024  #: new tokens of each answer


def long(subject: Subject) -> Iterator[dict[str, Any]]:
    """Yield a run of all prompts with answers of full length, from a 16-bit cache and from one of 8 bits."""

    def _once(kv_cache: str) -> dict[str, Any]:
        reset_peak()
        pool = subject.pool(None, LONG, subject.workspaces[0], kv_cache=kv_cache)
        list(pool.run([Sequence(row, 3) for row in subject.ids[:40]]))  # kernels are compiled, shapes captured
        pool.restart_clocks()
        return timed_run(subject.shape, pool, [Sequence(row, LONG, key=index) for index, row in enumerate(subject.ids)])

    for kv_cache in _KINDS:
        yield {"kv_cache": kv_cache} | subject.with_room(_once, kv_cache)


def steady(subject: Subject) -> Iterator[dict[str, Any]]:
    """Yield the rate of steps in the middle of such a run: as many rows as the cache holds, of all ages alike.

    It takes seconds where `long` takes minutes. Prefill, preemption, and the run's first and last rows are not in it.
    """

    def _once(kv_cache: str) -> dict[str, Any]:
        pool = subject.pool(None, LONG, subject.workspaces[0], kv_cache=kv_cache)
        blocks, slots = pool.scheduler.blocks, pool.config.slots
        usual = sum(map(len, subject.ids)) / len(subject.ids) + LONG / 2 + PAGE
        count = max(1, min(slots, len(subject.ids), int(blocks.pages * PAGE / usual)))
        made = [1 + int((LONG - 5 * BURST) * (index + 0.5) / count) for index in range(count)]
        rows = [Sequence(row, LONG, key=n, tokens=[5] * made[n]) for n, row in enumerate(subject.ids[:count])]
        blocks.clear()
        rows = [row for row in rows if blocks.grow(row, row.length(4 * BURST))]
        burst = Burst(rows, BURST, pool.scheduler.shape_for(len(rows)))
        pool.decode(burst)  # captures
        pool.restart_clocks()
        for _ in range(3):
            pool.decode(burst)
        return {
            "tokens": len(rows) * pool.steps, "seconds": round(pool.burst_seconds, 4), "rows": len(rows),
            "slots": burst.slots, "cells": blocks.pages * PAGE,
            "mean_context": round(sum(row.length() for row in rows) / len(rows), 1),
        }  # fmt: skip

    for kv_cache in _KINDS:
        yield {"kv_cache": kv_cache} | subject.with_room(_once, kv_cache)
        empty_cache()
