"""What a request to a judge model costs, before it is sent: tokens from bytes, and a small table of prices."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from fast_ft.common.console import note
from fast_ft.common.wording import counted
from fast_ft.recipe.schema import Judge as Section

#: Dollars per million tokens, (prompt, reply): OpenAI's list prices as third parties gave them in spring 2026. A newer
#: price goes into the recipe: judge.dollars_per_million_tokens.
PRICES = {
    "gpt-4o-mini": (0.15, 0.60),
    "gpt-4o": (2.50, 10.00),
    "gpt-4.1": (2.00, 8.00),
    "gpt-4.1-mini": (0.40, 1.60),
    "gpt-4.1-nano": (0.10, 0.40),
}


@dataclass(frozen=True, slots=True)
class Estimate:
    """What judging would take: requests to send and replies already there, tokens and dollars at most."""

    requests: int
    cached: int
    prompt_tokens: int
    reply_tokens: int
    dollars: float | None

    def __str__(self) -> str:
        money = "at a price that is not known" if self.dollars is None else f"at most {self.dollars:.2f} dollars"
        tokens = f"about {self.prompt_tokens:,} tokens to read and up to {self.reply_tokens:,} to write"
        there = f"; {counted(self.cached, 'reply', 'replies')} kept from before" if self.cached else ""
        return (
            f"{counted(self.requests, 'request')}, {tokens}, {money}{there}"
            if self.requests
            else f"nothing to ask{there}"
        )


def price(section: Section) -> tuple[float, float] | None:
    """Return dollars per million tokens, (prompt, reply), or None where neither the recipe nor the table knows them."""
    return section.dollars_per_million_tokens or PRICES.get(re.sub(r"-\d{4}-\d\d-\d\d$", "", section.model))


def bounded(section: Section, given: Collection[str]) -> Section:
    """Return the judge's section of a run folder with the caps that hold for whoever judges it.

    The folder may come from elsewhere, and its recipe would spend the money of whoever judges. So a cap is at most the
    schema's default, and a price at least the table's, unless it is `given` (a dotted key) on the command line.
    """
    usual = Section()
    changes: dict[str, Any] = {}
    for key in ("max_requests", "max_minutes", "max_dollars"):
        asked, most = getattr(section, key), getattr(usual, key)
        if asked > most and f"judge.{key}" not in given:
            changes[key] = most
            note(
                f"note: judge.{key}: the folder's recipe allows {asked:g}, and {most:g} holds here, unless you write "
                f"judge.{key}={asked:g}"
            )
    own, key = section.dollars_per_million_tokens, "dollars_per_million_tokens"
    known = price(section.model_copy(update={key: None}))
    if own is not None and known is not None and f"judge.{key}" not in given:
        changes[key] = tuple(map(max, own, known))
    return section.model_copy(update=changes)


def tokens_of(text: str) -> int:
    """Return about how many tokens a text has, rather too many: a third of its UTF-8 bytes."""
    return len(text.encode("utf-8", "replace")) // 3 + 1


def dollars(prices: tuple[float, float] | None, prompt_tokens: int, reply_tokens: int) -> float:
    """Return the cost of this many tokens in dollars; 0 where the price is unknown."""
    return 0.0 if prices is None else (prompt_tokens * prices[0] + reply_tokens * prices[1]) / 1e6
