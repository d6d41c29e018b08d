"""One seed in the recipe, and one seed or generator derived from it for each place that draws.

No random state has to be saved: whoever goes on with a run derives the same numbers again. Whatever draws asks this
module, so that no two places draw the same numbers by accident.
"""

from __future__ import annotations

import hashlib
import random


def derive(seed: int, *place: int | str) -> int:
    """Return a 63-bit seed for one place in a run, such as ("train", stage, step); torch takes it."""
    text = "/".join(str(part) for part in (seed, *place))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator(seed: int, *place: int | str) -> random.Random:
    """Return Python's generator for one place in a run, such as ("validation",).

    It is seeded with the text "seed/place", which Python hashes itself, and without a place with the number. `derive`
    would serve as well, but adapters and validation sets that are there already were drawn in this way.
    """
    return random.Random("/".join(str(part) for part in (seed, *place)) if place else seed)
