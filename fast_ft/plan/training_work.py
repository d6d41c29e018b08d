"""What the cost of training depends on beside the model's shape: the card's rates, and what the recipe says."""

from __future__ import annotations

from dataclasses import dataclass

LOSS_POSITIONS = 1024  #: whose logits exist at a time (train/loss.py)
UNPACK_BYTES = 3.1  #: of memory traffic take as long as turning one 4-bit weight to 16 bits, by bitsandbytes
_FLASH_SINCE, _FLASH_WIDEST = (8, 0), 128  #: compute capability and head dimension (models/flash_attention.py)


@dataclass(frozen=True)
class Rates:
    """What a card and its host reach in training.

    `tflops`: TFLOP/s in 16-bit products. `gb_per_s`: of its memory. `attention`: TFLOP/s in torch's memory-efficient
    attention, each row counted as if it were somewhat longer; None: those of products. `launch`: the host's time to
    launch a kernel, over that of the host that the constants are of.
    """

    tflops: float
    gb_per_s: float
    attention: float | None = None
    launch: float = 1.0


@dataclass(frozen=True)
class Training:
    """What the recipe and the card say of training that costs memory or time."""

    r: int
    optim: str
    load_in_4bit: bool
    backend: str  #: as models/loaders/choose.py names them: they keep different activations
    rows: int  #: in an effective batch
    longest: int  #: row, in tokens
    draws: bool = False  #: dropout: a layer that is computed again must then draw the same, which a graph cannot
    unpack_bytes: float = UNPACK_BYTES
    flash: bool = False  #: attention is torch's flash attention
    qk_norms: bool = False  #: q and k have norms of their own
    whole_weights: int = 0  #: of modules that are trained whole (lora.modules_to_save)
    offloaded: bool = False  #: inputs of layers that are computed again lie in the host's memory
    loss_positions: int = LOSS_POSITIONS  #: whose logits exist at a time
    logit_bytes: int = 6  #: that live for each of these logits, through other layers than our own blocks


def takes_flash(capability: tuple[int, int] | None, head_dim: int) -> bool:
    """Return whether our own blocks attend by torch's flash attention on a card of this compute capability."""
    return capability is not None and capability >= _FLASH_SINCE and head_dim % 8 == 0 and head_dim <= _FLASH_WIDEST
