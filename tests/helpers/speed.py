"""How fast this machine is at the moment: bars of seconds were set on another one, which had nothing else to do."""

from __future__ import annotations

import json
import resource
import time
from collections.abc import Callable

#: Processor seconds of `_work` on the machine that the bars were set on, with nothing beside it.
REFERENCE = 0.06


def slowness() -> float:
    """Return how many times longer than REFERENCE this machine takes for the same work; 1 where it is faster.

    Of the processor's own time: a core that is shared, or clocked down, takes more of it for the same work.
    """
    began = time.process_time()
    _work()
    return max(1.0, (time.process_time() - began) / REFERENCE)


def child_seconds(start: Callable[[], object], bar: float) -> float:
    """Return the processor's seconds of what `start` starts and waits for, at this machine's speed, over its slowness.

    The least of five tries is returned, and the first that is within the bar: neighbours disturb in bursts.
    """
    found = []
    for _ in range(5):
        slow, before = slowness(), resource.getrusage(resource.RUSAGE_CHILDREN)
        start()
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        took = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        found.append(took / max(slow, slowness()))
        if found[-1] <= bar:
            break
    return min(found)


def _work() -> None:
    words = [f"word{n * 7919 % 5003}" for n in range(60_000)]
    text = " ".join(words)
    counts: dict[str, int] = {}
    for word in text.split():
        counts[word.upper()] = counts.get(word.upper(), 0) + 1
    for _ in range(2):
        json.loads(json.dumps([words[:20_000], counts]))
    sorted(words, key=lambda word: word[::-1])
