"""Other ways of training the same rows: how each differs from the others, in the words of its own library."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Peer:
    """How one way differs from the others. `rows` x `accumulation` is the effective batch.

    checkpointing: True, False, or "unsloth", which is Unsloth's own kind. kept_layers: layers whose activations Unsloth
    keeps all the same (checkpoint_skip_layers). token_budget: the value of UNSLOTH_TOKEN_BUDGET; a step's rows are
    passed through the model in pieces of at most this number of tokens, and no row is cut. packed: rows are packed
    into sequences of this length, so that a step holds other rows than everybody else's. liger: Liger's kernels.
    """

    rows: int
    accumulation: int
    library: Literal["unsloth", "trl"] = "unsloth"
    checkpointing: str | bool = "unsloth"
    kept_layers: int = 0
    lora_dropout: float = 0.0
    padding_free: bool = True
    token_budget: int | None = None
    packed: int | None = None
    liger: bool = False
    note: str = ""
    not_emulated: str = ""  #: why the T4-class emulation leaves it out, where arithmetic and not Python takes the time

    @property
    def unsloth(self) -> bool:
        """Whether Unsloth runs it; else TRL with PEFT, transformers and bitsandbytes."""
        return self.library == "unsloth"

    @property
    def about(self) -> str:
        """Every setting that differs between ways, in one line."""
        keeping = f'checkpointing "{self.checkpointing}"' if isinstance(self.checkpointing, str) else (
            "checkpointing" if self.checkpointing else "nothing checkpointed"
        )  # fmt: skip
        words = [
            "Unsloth" if self.unsloth else "TRL, PEFT and bitsandbytes",
            f"batch {self.rows}, accumulation {self.accumulation}",
            f"UNSLOTH_TOKEN_BUDGET={self.token_budget}" if self.token_budget else "",
            f"packed to {self.packed:,} tokens" if self.packed else "padding-free" if self.padding_free else "padded",
            keeping + (f", {self.kept_layers} layers kept" if self.kept_layers else ""),
            "Liger's kernels" if self.liger else "",
            f"dropout {self.lora_dropout:g}" if self.lora_dropout else "",
            self.note,
        ]
        return ", ".join(word for word in words if word)


AS_BUDGET = "as unsloth-budget: no step of the bench's recipe has more than 4,096 tokens"
MORE_KEPT = "computes again what unsloth-budget-kept, or its like in TRL, keeps: a third more arithmetic"
TOO_LARGE = "does not fit into the same memory on the whole card"
WITH_PADDING = "as trl-padding-free, with padding"


def _unsloth(rows: int, accumulation: int, **settings: object) -> Peer:
    return Peer(rows, accumulation, **settings)  # type: ignore[arg-type]


def _trl(rows: int, accumulation: int, **settings: object) -> Peer:
    return Peer(rows, accumulation, "trl", **({"checkpointing": True} | settings))  # type: ignore[arg-type]


#: In the order in which a survey runs them: what promises most comes first.
PEERS = {
    "unsloth-budget-kept": _unsloth(8, 1, token_budget=2048, checkpointing=False),
    "unsloth-budget": _unsloth(8, 1, token_budget=4096, not_emulated=MORE_KEPT),
    "trl-liger": _trl(8, 1, liger=True, not_emulated=MORE_KEPT),
    "unsloth-packed-4096": _unsloth(1, 1, packed=4096, not_emulated=MORE_KEPT),
    "unsloth-packed-2048-kept": _unsloth(1, 2, packed=2048, checkpointing=False),
    "unsloth-4x2-kept": _unsloth(4, 2, checkpointing=False),
    "trl-liger-kept": _trl(4, 2, liger=True, checkpointing=False),
    "trl-padding-free": _trl(8, 1, not_emulated=MORE_KEPT),
    "trl-padding-free-kept": _trl(4, 2, checkpointing=False),
    "unsloth-8x1-skip-16": _unsloth(8, 1, kept_layers=16, not_emulated=MORE_KEPT),
    "unsloth-8x1-skip-24": _unsloth(8, 1, kept_layers=24, not_emulated=MORE_KEPT),
    "unsloth-8x1": _unsloth(8, 1, not_emulated=AS_BUDGET),
    "unsloth-notebook": _unsloth(2, 4, note="the homework notebook's own settings", not_emulated=MORE_KEPT),
    "unsloth-budget-skip-24": _unsloth(8, 1, token_budget=2048, kept_layers=24, not_emulated=MORE_KEPT),
    "unsloth-packed-2048": _unsloth(1, 2, packed=2048, not_emulated=MORE_KEPT),
    "unsloth-budget-2048": _unsloth(8, 1, token_budget=2048, not_emulated=MORE_KEPT),
    "trl-8x1": _trl(8, 1, padding_free=False, not_emulated=WITH_PADDING),
    "trl-peft": _trl(2, 4, padding_free=False, not_emulated=WITH_PADDING),
    "unsloth-8x1-kept": _unsloth(8, 1, checkpointing=False, not_emulated=TOO_LARGE),
    "unsloth-budget-8192": _unsloth(8, 1, token_budget=8192, not_emulated=AS_BUDGET),
    "unsloth-budget-4096-kept": _unsloth(8, 1, token_budget=4096, checkpointing=False, not_emulated=TOO_LARGE),
    "unsloth-notebook-as-is": _unsloth(
        2, 4, lora_dropout=0.05, padding_free=False, note="the notebook as students change it: DataCollatorForSeq2Seq",
        not_emulated="as unsloth-notebook, with padding",
    ),
}  # fmt: skip
