"""What a profile of training steps holds: the card's busy time within and outside of the pass, gaps, calls and waits.

`digest` reads the events of torch's profiler (a Chrome trace) and keeps what `host_share` is computed from.
"""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

PASS = "forward_and_backward"
STEP = "step_begins"
_KERNELS = ("kernel", "gpu_memcpy", "gpu_memset")
_HOST = ("cuda_runtime", "cuda_driver")
Span = tuple[float, float]  #: begin and end, in us


def digest(events: Sequence[Mapping[str, Any]], count: int) -> dict[str, Any]:
    """Return the kernels of `count` whole steps, in tenths of a us since the first of them, and what the host did.

    A step runs from the first kernel of its forward pass to that of the next step's. The first step is left out.
    """
    passes = sorted(_span(each) for each in events if each.get("name") == PASS and each.get("cat") == "user_annotation")
    begins = sorted(
        _span(each)[0] for each in events if each.get("name") == STEP and each.get("cat") == "user_annotation"
    )
    launches = {
        each["args"]["correlation"]: each for each in events
        if each.get("cat") in _HOST and "correlation" in each.get("args", {})
    }  # fmt: skip
    kernels = sorted((each for each in events if each.get("cat") in _KERNELS), key=lambda each: float(each["ts"]))
    inside, first = [], [float("inf")] * len(begins)
    for kernel in kernels:
        launch = launches.get(kernel["args"].get("correlation"))
        at = float(launch["ts"]) if launch is not None else -1.0
        within = any(begin <= at <= end for begin, end in passes)
        inside.append(within)
        if within:
            step = sum(begin <= at for begin in begins) - 1
            first[step] = min(first[step], float(kernel["ts"]))
    since, until = first[1], first[1 + count]
    chosen = [
        (each, within) for each, within in zip(kernels, inside, strict=True) if since <= float(each["ts"]) < until
    ]
    return {
        "steps": count,
        "first_kernels": [round((each - since) * 10) for each in first[1 : 2 + count]],
        "pass": _packed([_span(each) for each, within in chosen if within], since),
        "other": _packed([_span(each) for each, within in chosen if not within], since),
        "launches": len([each for each in launches.values() if since <= float(each["ts"]) < until]),
        "kernels": len(chosen),
        "top": _top(chosen),
        "gaps": _gaps([_span(each) for each, _ in chosen], since, events),
        "calls": _calls(events, since, until),
    }


def _span(event: Mapping[str, Any]) -> Span:
    return float(event["ts"]), float(event["ts"]) + float(event["dur"])


def _packed(spans: Sequence[Span], since: float) -> list[int]:
    """Return the union of spans as one list, in tenths of a us: the wait before each, and its length."""
    packed, at = [], 0
    for begin, end in union(spans):
        start, stop = round((begin - since) * 10), round((end - since) * 10)
        packed += [start - at, stop - start]
        at = stop
    return packed


def union(spans: Sequence[Span]) -> list[Span]:
    """Return the times that are within at least one span, in order; spans less than 1 ns apart are one."""
    found: list[Span] = []
    for begin, end in sorted(spans):
        if found and begin <= found[-1][1] + 0.001:
            found[-1] = (found[-1][0], max(found[-1][1], end))
        else:
            found.append((begin, end))
    return found


def _top(chosen: Sequence[tuple[Mapping[str, Any], bool]]) -> list[dict[str, Any]]:
    seconds: dict[tuple[str, bool], list[float]] = defaultdict(list)
    for each, within in chosen:
        seconds[str(each["name"])[:110], within].append(float(each["dur"]))
    ranked = sorted(seconds.items(), key=lambda item: -sum(item[1]))
    rows = [{"name": name, "pass": within, "ms": round(sum(us) / 1e3, 3), "count": len(us)}
            for (name, within), us in ranked]  # fmt: skip
    return rows[:30] + [row for row in rows[30:] if not row["pass"]][:20]


def _gaps(spans: Sequence[Span], since: float, events: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the longest times without a kernel, and the outermost operations that the host was in then."""
    busy = union(spans)
    gaps = sorted(((b[0] - a[1], a[1], b[0]) for a, b in itertools.pairwise(busy)), reverse=True)[:14]
    host = [each for each in events if each.get("cat") in (*_HOST, "cpu_op", "user_annotation", "python_function")]
    found = []
    for length, begin, end in gaps:
        during: Counter[str] = Counter()
        for each in host:
            start, stop = _span(each)
            if start < end and stop > begin:
                during[str(each["name"])[:60]] += round(min(stop, end) - max(start, begin))
        found.append({"us": round(length), "at_us": round(begin - since), "host": dict(during.most_common(8))})
    return found


def _calls(events: Sequence[Mapping[str, Any]], since: float, until: float) -> dict[str, list[float]]:
    """Return how often each function of the CUDA runtime was called, and its ms."""
    found: dict[str, list[float]] = defaultdict(lambda: [0, 0.0])
    for each in events:
        if each.get("cat") in _HOST and since <= float(each["ts"]) < until:
            found[each["name"]][0] += 1
            found[each["name"]][1] += float(each["dur"]) / 1e3
    return {name: [count, round(ms, 3)] for name, (count, ms) in sorted(found.items(), key=lambda item: -item[1][1])}


def waits(events: Sequence[Mapping[str, Any]], least_us: float = 100.0) -> list[dict[str, Any]]:
    """Return the calls of the runtime that took long, with the Python functions around each, the innermost first."""
    python = [each for each in events if each.get("cat") == "python_function" and float(each["dur"]) >= least_us]
    found: Counter[tuple[str, str]] = Counter()
    seconds: Counter[tuple[str, str]] = Counter()
    for each in events:
        if each.get("cat") not in _HOST or float(each["dur"]) < least_us:
            continue
        begin, end = _span(each)
        around = [p for p in python if _span(p)[0] <= begin and _span(p)[1] >= end and p["tid"] == each["tid"]]
        names = [str(p["name"]).rpartition("site-packages/")[2] for p in sorted(around, key=lambda p: float(p["dur"]))]
        key = (str(each["name"]), " < ".join(name for name in names if "built-in" not in name)[:400])
        found[key] += 1
        seconds[key] += round(float(each["dur"]))
    return [{"call": call, "stack": stack, "count": found[call, stack], "us": us}
            for (call, stack), us in seconds.most_common(24)]  # fmt: skip


def busy_us(packed: Sequence[int]) -> float:
    """Return the us of a packed list of spans."""
    return sum(packed[1::2]) / 10


def host_share(result: Mapping[str, Any]) -> float:
    """Return 1 less the busy time of the pass's kernels over the wall time of the profiled steps."""
    wall = (result["first_kernels"][-1] - result["first_kernels"][0]) / 10
    return 1 - busy_us(result["pass"]) / wall
