"""How many tokens all prompts begin with, such as those of a system prompt. The KV cache holds these tokens once."""

from __future__ import annotations

from collections.abc import Collection

_WORTH = 8  #: prompts share their start where that saves at least an eighth of the tokens that prefill computes


def shared_start(prompts: Collection[tuple[int, ...]], most: int) -> int:
    """Return how many tokens, at most `most`, all of these different prompts begin with; 0 where these save too little.

    Each prompt keeps a token of its own, whose logits are wanted.
    """
    if len(prompts) < 2:
        return 0
    one, other = min(prompts), max(prompts)  # these two differ first
    alike = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), len(one))
    alike = min(alike, most, min(map(len, prompts)) - 1)
    return alike if alike * (len(prompts) - 1) * _WORTH >= sum(map(len, prompts)) else 0
