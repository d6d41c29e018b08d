"""One seed in the recipe, one derived seed for each place that draws: no random state has to be saved."""

from __future__ import annotations

import hashlib


def derive(seed: int, *place: int | str) -> int:
    """Return a 63-bit seed for one place in a run, such as ("train", stage, step)."""
    text = "/".join(str(part) for part in (seed, *place))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
