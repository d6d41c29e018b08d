"""What a request to a judge model costs, before it is sent: tokens from bytes, and a small table of prices."""

from __future__ import annotations

import re

from fast_ft.recipe import Judge as Section

#: Dollars per million tokens, (prompt, reply): OpenAI's list prices as third parties gave them in spring 2026. A newer
#: price goes into the recipe: judge.dollars_per_million_tokens.
PRICES = {
    "gpt-4o-mini": (0.15, 0.60),
    "gpt-4o": (2.50, 10.00),
    "gpt-4.1": (2.00, 8.00),
    "gpt-4.1-mini": (0.40, 1.60),
    "gpt-4.1-nano": (0.10, 0.40),
}


def price(section: Section) -> tuple[float, float] | None:
    """Return dollars per million tokens, (prompt, reply), or None where neither the recipe nor the table knows them."""
    return section.dollars_per_million_tokens or PRICES.get(re.sub(r"-\d{4}-\d\d-\d\d$", "", section.model))


def tokens_of(text: str) -> int:
    """Return about how many tokens a text has, rather too many: a third of its UTF-8 bytes."""
    return len(text.encode("utf-8", "replace")) // 3 + 1


def dollars(prices: tuple[float, float] | None, prompt_tokens: int, reply_tokens: int) -> float:
    """Return what so many tokens cost; 0 where the price is unknown."""
    return 0.0 if prices is None else (prompt_tokens * prices[0] + reply_tokens * prices[1]) / 1e6
