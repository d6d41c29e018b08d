"""Which linear layers of a stored base have 4 bits, by config.json's quantization_config.

bitsandbytes' configuration may name modules that were left in 16 bits (llm_int8_skip_modules), as Unsloth's dynamic
repositories do. Without such a list transformers leaves the head alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

HEAD = "lm_head"


@dataclass(frozen=True)
class Quantisation:
    """`skipped`: what llm_int8_skip_modules names, in the words of whoever stored the base; None: it names nothing."""

    skipped: tuple[str, ...] | None = None

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Quantisation | None:
        """Return what config.json's content says; None where the base is not quantised."""
        given = config.get("quantization_config")
        if not given:
            return None
        names = given.get("llm_int8_skip_modules") if isinstance(given, dict) else None
        return cls(tuple(map(str, names)) if isinstance(names, list) else None)

    def leaves(self, name: str) -> bool:
        """Return whether the layer of this dotted name is left in 16 bits.

        Source: transformers' `should_convert_module`. A name in the list is a regular expression there, which a whole
        name or its start fits, or it is a name's end. Of regular expressions this knows `.*`, the one that occurs.
        """
        if self.skipped is None:
            return name == HEAD
        return any(name.endswith(each) or _begins(name, each.split(".*")) for each in self.skipped)


def _begins(name: str, pieces: list[str]) -> bool:
    """Return whether a name begins with the first piece, and the others follow somewhere behind it, in their order."""
    if not name.startswith(pieces[0]):
        return False
    at = len(pieces[0])
    for piece in pieces[1:]:
        if (found := name.find(piece, at)) < 0:
            return False
        at = found + len(piece)
    return True
