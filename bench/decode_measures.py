"""The measurements of bench.decode: each takes the subject and yields results. Used by bench/decode.py."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

from bench import decode_peers
from bench.clock import clock, empty_cache, peak_gib, reset_peak, say
from bench.decode_subject import Subject
from bench.timed import TimedEngine, step_bytes
from fast_ft.common import gpu
from fast_ft.data import dataset
from fast_ft.generate.engine.block_manager import PAGE
from fast_ft.generate.engine.sequence import Sequence
from fast_ft.recipe import schema

LONGEST, MEAN = 1024, 250  #: new tokens of answers of mixed length


def steps(subject: Subject) -> Iterator[dict[str, Any]]:
    """Yield the ms of one step at each pool size and workspace, and print the step's kernels with --profile."""
    for workspace in subject.workspaces:
        for slots in subject.slots:
            pool = subject.pool(slots, max(300, subject.options.limit), workspace)
            yield {"workspace_mib": workspace, "slots": pool.config.slots, **pool.step_milliseconds(200)}
            if subject.options.profile:
                say(pool.profile(200))
            del pool
            empty_cache()


def check(subject: Subject) -> Iterator[dict[str, Any]]:
    """Yield whether greedy answers come out the same twice, and how far the model's own forward pass agrees."""
    from bench.agreement_decode import teacher_forced

    pool = subject.pool(None, 64, subject.workspaces[0], greedy=True)
    made = []
    for _ in range(2):
        rows = [Sequence(row, 64) for row in subject.ids[:24]]
        list(pool.run(rows))
        made.append([row.tokens for row in rows])
    yield {"same_twice": made[0] == made[1], "captured": pool.runner.graphs.works, "graphs": pool.runner.graphs.count,
           **teacher_forced(subject.model, subject.ids[:24], made[0])}  # fmt: skip


def fixed(subject: Subject) -> Iterator[dict[str, Any]]:
    """Yield a run of all prompts with --limit new tokens each, --repeat times for each workspace and pool size."""
    limit = subject.options.limit

    def _warm_up(slots: int | None, workspace: int) -> dict[str, Any]:
        """Let kernels be compiled and libraries loaded, once in a process; no pool or graph of it is kept."""
        pool = subject.pool(slots, limit, workspace)
        list(pool.run([Sequence(row, 2 + index % 3) for index, row in enumerate(subject.ids)], burst=2))
        return {}

    def _once(slots: int | None, workspace: int) -> dict[str, Any]:
        reset_peak()
        pool = subject.pool(slots, limit, workspace)
        return _timed(subject, pool, [Sequence(row, limit, key=index) for index, row in enumerate(subject.ids)])

    for workspace in subject.workspaces:
        for slots in subject.slots:
            subject.with_room(_warm_up, slots, workspace)
            for _ in range(subject.options.repeat):
                yield {"workspace_mib": workspace} | subject.with_room(_once, slots, workspace)


def mixed(subject: Subject) -> Iterator[dict[str, Any]]:
    """Yield a run with answers of mixed lengths: with refill, and in batches that shrink or keep their shape."""
    lengths = _lengths(subject)

    def _once(refill: bool, shrinks: bool) -> dict[str, Any]:
        reset_peak()
        pool = subject.pool(None, LONGEST, subject.workspaces[0])
        rows = [Sequence(row, LONGEST, key=index) for index, row in enumerate(subject.ids)]
        pool.forced.update(zip(rows, lengths, strict=True))  # the scheduler holds this very dictionary
        return _timed(subject, pool, rows, refill, shrinks)

    for refill, shrinks in ((True, True), (False, False), (False, True)):
        named = {"refill": refill, "shrinks": shrinks, "mean_length": sum(lengths) / len(lengths)}
        yield named | subject.with_room(_once, refill, shrinks)


MEASURES = {
    "steps": steps, "check": check, "fixed": fixed, "plain": decode_peers.plain, "static": decode_peers.static,
    "compiled": decode_peers.compiled, "mixed": mixed, "unsloth": decode_peers.unsloth,
    "llama.cpp": decode_peers.llama_cpp,
}  # fmt: skip


def _timed(
    subject: Subject, pool: TimedEngine, rows: list[Sequence], refill: bool = True, shrinks: bool = True
) -> dict[str, Any]:
    """Run rows, all of them or in batches of the pool's slots. Batches that do not shrink keep their first shape."""
    groups = [rows] if refill else [rows[i : i + pool.config.slots] for i in range(0, len(rows), pool.config.slots)]

    def _work() -> None:
        for group in groups:
            list(pool.run(group, slots=None if shrinks else pool.scheduler.shape_for(len(group))))

    seconds = clock(_work)
    tokens = sum(min(len(row.tokens), pool.forced.get(row, len(row.tokens))) for row in rows)
    cells = sum(sum(range(len(row.prompt), len(row.prompt) + len(row.tokens))) for row in rows)
    return {
        "tokens": tokens, "seconds": round(seconds, 4), "tokens_per_s": round(tokens / seconds, 1),
        "slots": pool.config.slots, "cells": pool.scheduler.blocks.pages * PAGE, "steps": pool.steps,
        "prefill_seconds": round(pool.prefill_seconds, 4), "burst_seconds": round(pool.burst_seconds, 4),
        "capture_seconds": round(pool.capture_seconds, 4),
        "steps_by_slots": {slots: [count, round(spent, 4)] for slots, (count, spent) in pool.by_slots.items()},
        "set_aside": pool.preempted, "weight_bytes": step_bytes(subject.shape), "cells_read": cells,
        "bytes_a_cell": subject.shape.kv_bytes, "planes": pool.runner.model.planes,
        "few_rows": pool.runner.model.few_rows,
        "captured": pool.runner.graphs.works, "graphs": pool.runner.graphs.count, "peak_gib": _peak(),
    }  # fmt: skip


def _lengths(subject: Subject) -> list[int]:
    """Lengths of long Alpaca responses, scaled to the mean; without a file a log-normal like them."""
    draw = random.Random(0)
    if subject.options.lengths:
        pool = dataset.load_pool(schema.Data(train=str(subject.options.lengths)))
        counts = subject.encoder.count_pool(pool)[1]
        picked = [float(count) for count in draw.choices(counts, k=len(subject.ids))]
    else:
        picked = [205 + draw.lognormvariate(4.4, 0.9) for _ in subject.ids]
    scale = MEAN * len(picked) / sum(picked)
    return [max(1, min(LONGEST, round(each * scale))) for each in picked]


def _peak() -> float:
    """GiB reserved at most since the last reset, with the context as it is now."""
    return peak_gib(gpu.context_gib())
