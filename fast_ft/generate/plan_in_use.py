"""The plan by which answers are made now, and what is given up where memory or the answers' check refuses it. No torch.

It is the plan's one owner while answers are made: answers.py makes an engine by `now`, lets go of it, and asks here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from fast_ft.common.console import note
from fast_ft.common.errors import InputError
from fast_ft.generate.engine.block_manager import PAGE, pages_for
from fast_ft.plan.decode_pool import DecodePlan


class PlanInUse:
    """A plan for `answers` answers of sequences with at most `longest` tokens each, prompt and answer together.

    `now` is what is tried. `kept` is the plan as it was given, but for what memory took from it: `on_plan` is told of
    that, since a run which is resumed has to begin with it. `notes` are sentences for the manifest.
    """

    def __init__(
        self, given: DecodePlan, *, answers: int, longest: int, on_plan: Callable[[DecodePlan], object]
    ) -> None:
        self.kept, self.longest, self.notes = given, longest, list[str]()
        self._answers, self._on_plan = answers, on_plan
        self.now = self._whole()

    def _whole(self) -> DecodePlan:
        """Return the plan that is kept, with no more slots than there are answers."""
        return replace(self.kept, slots=min(self.kept.slots, self._answers))

    def take_less_memory(self) -> None:
        """Give up what costs least: weights in 16 bits, then cache that is never filled, then an eighth of all slots.

        InputError where nothing is left to give up.
        """
        former, slots, cells = self.now, self.now.slots, self.now.cache_tokens
        most = slots * pages_for(self.longest) * PAGE
        if former.dequantise:
            self.now = replace(former, dequantise=False)
            self.say("out of memory with weights dequantised to 16 bits: went on with weights in 4 bits")
        elif cells is not None and cells > most:
            self.now = replace(former, cache_tokens=most)
            self.say(f"out of memory with a cache of {cells} tokens: went on with {most}")
        elif slots > 1:
            self.now = replace(former, slots=slots * 7 // 8, cache_tokens=cells and cells * 7 // 8)
            self.say(f"out of memory in batches of {slots}: went on with {self.now.slots}")
        else:
            raise InputError(
                "out of memory with one prompt at a time. Lower generate.max_new_tokens, or free memory, that of the "
                "card where there is one."
            )
        self.kept = replace(self.now, slots=self.kept.slots if self.now.slots == slots else self.now.slots)
        self._on_plan(self.kept)

    def take_fewer_slots(self, nats: float) -> bool:
        """Take half of the slots, and return whether there was more than one.

        `nats`: the mean difference between batched and single decoding.
        """
        former = self.now.slots
        if former > 1:
            self.now = replace(self.now, slots=former // 2)
            self.say(f"batched and single decoding differ by {nats:.4f} nat in batches of {former}: went on with "
                     f"{self.now.slots}")  # fmt: skip
        return former > 1

    def take_all_slots(self) -> None:
        """Take all slots again that memory has room for: another engine answers."""
        self.now = self._whole()

    def take_products(self, products: str) -> None:
        """Obey from now on what was chosen, as DecodePlan has it: engines to come time no number of rows again."""
        self.now, self.kept = replace(self.now, products=products), replace(self.kept, products=products)

    def say(self, text: str) -> None:
        """Show a sentence, and note it for the manifest."""
        self.notes.append(text)
        note(f"note: {text}")
