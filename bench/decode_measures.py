"""The measurements of bench.decode: each takes the subject and yields results. Used by bench/decode.py."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

from bench import decode_long, decode_peers
from bench.clock import empty_cache, reset_peak, say
from bench.decode_subject import Subject
from bench.timed import timed_run
from fast_ft.data import dataset
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
        return timed_run(
            subject.shape, pool, [Sequence(row, limit, key=index) for index, row in enumerate(subject.ids)]
        )

    for workspace in subject.workspaces:
        for slots in subject.slots:
            subject.with_room(_warm_up, slots, workspace)
            for _ in range(subject.options.repeat):
                yield {"workspace_mib": workspace} | subject.with_room(_once, slots, workspace)


def mixed(subject: Subject) -> Iterator[dict[str, Any]]:
    """Yield runs with answers of mixed lengths, of --draws draws of them: with refill, and of the first draw in batches
    that shrink or keep their shape, too."""

    def _once(lengths: list[int], refill: bool, shrinks: bool) -> dict[str, Any]:
        reset_peak()
        pool = subject.pool(None, LONGEST, subject.workspaces[0])
        rows = [Sequence(row, LONGEST, key=index) for index, row in enumerate(subject.ids)]
        pool.forced.update(zip(rows, lengths, strict=True))  # the scheduler holds this very dictionary
        return timed_run(subject.shape, pool, rows, refill, shrinks)

    for draw in range(subject.options.draws):
        lengths = _lengths(subject, draw)
        for refill, shrinks in ((True, True), (False, False), (False, True))[: 1 if draw else 3]:
            named = {"refill": refill, "shrinks": shrinks, "draw": draw, "mean_length": sum(lengths) / len(lengths)}
            yield named | subject.with_room(_once, lengths, refill, shrinks)


def products(subject: Subject) -> Iterator[dict[str, Any]]:
    """Yield the ms of all of a step's products, LoRA's second half included, replayed from a graph of their own."""
    import torch

    pool = subject.pool(None, subject.options.limit, subject.workspaces[0])
    model, rows = pool.runner.model, 64

    def _work() -> None:
        for _, *parts in model.layers:
            for product in (parts[0], parts[1], parts[3], parts[4]):
                first = product.first(rows) if model.planes else None
                product(given[product.inputs], model.planes, first)

    with torch.inference_mode():
        sizes = {product.inputs for _, *parts in model.layers for product in (parts[0], parts[1], parts[3], parts[4])}
        given = {size: torch.randn(rows, size, device=model.device).to(model.dtype) for size in sizes}
        milliseconds = pool.graph_milliseconds(_work)
    yield {"rows": rows, "milliseconds": milliseconds, "planes": model.planes, "few_rows": model.few_rows}


def before(subject: Subject) -> Iterator[dict[str, Any]]:
    """Yield what `fixed` yields by the checkout at --against, in a process of its own; this one frees its model first.

    The weights, the prompts and the settings are the same.
    """
    options = subject.options
    subject.free()
    words = [
        "--base", options.base, "--prompts", options.prompts, "--only", "fixed", "--limit", options.limit, "--take",
        options.take, "--cap", options.cap, "--dtype", options.dtype, "--repeat", options.repeat,
        *(["--tokenizer", options.tokenizer] if options.tokenizer else []), *(["--random"] if options.random else []),
        *(["--adapter", options.adapter] if options.adapter else []),
    ]  # fmt: skip
    command = [sys.executable, "-m", "bench.decode", *map(str, words)]
    paths = os.pathsep.join([str(options.against), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        command, cwd=options.against, env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True
    )
    if done.returncode:
        yield {"failed": done.stderr[-1500:]}
        return
    for line in done.stdout.splitlines():
        if line.startswith('{"name": "fixed"'):
            yield json.loads(line) | {"name": "before"}


MEASURES = {
    "steps": steps, "check": check, "fixed": fixed, "plain": decode_peers.plain, "static": decode_peers.static,
    "compiled": decode_peers.compiled, "mixed": mixed, "unsloth": decode_peers.unsloth,
    "llama.cpp": decode_peers.llama_cpp, "long": decode_long.long, "steady": decode_long.steady, "products": products,
    "before": before,
}  # fmt: skip


def _lengths(subject: Subject, seed: int) -> list[int]:
    """Lengths of long Alpaca responses, scaled to the mean; without a file a log-normal like them."""
    draw = random.Random(seed)
    if subject.options.lengths:
        pool = dataset.load_pool(schema.Data(train=str(subject.options.lengths)))
        counts = subject.encoder.count_pool(pool)[1]
        picked = [float(count) for count in draw.choices(counts, k=len(subject.ids))]
    else:
        picked = [205 + draw.lognormvariate(4.4, 0.9) for _ in subject.ids]
    scale = MEAN * len(picked) / sum(picked)
    return [max(1, min(LONGEST, round(each * scale))) for each in picked]
