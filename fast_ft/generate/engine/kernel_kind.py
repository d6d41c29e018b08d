"""What decoding's kernels are compiled for, and therefore checked for."""

from __future__ import annotations

from dataclasses import dataclass, replace

from fast_ft.generate.engine import nf4_linear
from fast_ft.models.nf4 import Order


@dataclass(frozen=True)
class Kind:
    """What the kernels are compiled for. `steps`: how many rows a step may have; `planes`: as FusedModel's, by `way`.

    `hidden` and `inner` are the model's hidden size and its MLP's. `device` names the index of a card, as "cuda:0".
    `kv_bits`: 16, the model's dtype, or 8. `ranks`: of each product's LoRA, as InRegisters pads them; 0: none.
    `mixed`: other products stand between those by the way, as where a base leaves some layers in 16 bits.
    """

    heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    inner: int
    dtype: str
    device: str
    steps: tuple[int, ...]
    planes: bool
    way: nf4_linear.Way | None = None
    kv_bits: int = 16
    ranks: tuple[int, int, int, int] = (0, 0, 0, 0)
    mixed: bool = False

    def by(self, way: nf4_linear.Way | None) -> Kind:
        """Return the same with few rows' products by a way; None: no product decodes in registers."""
        return replace(self, way=way, planes=way is not None, mixed=self.mixed and way is not None)

    @property
    def orders(self) -> list[Order]:
        """The orders in which products want x: of one kind of step or another."""
        if not self.planes or self.way is None:
            return [Order.ROWS]
        wanted = {self.way.order_for(rows) for rows in self.steps if rows <= nf4_linear.FEW}
        return sorted(wanted | {Order.ROWS} if self.mixed else wanted)

    @property
    def halves(self) -> tuple[int, int, int, int]:
        """The ranks of which the kernels between products compute LoRA's first half: none without a `way`."""
        return self.ranks if self.way is not None else (0, 0, 0, 0)

    @property
    def products(self) -> list[tuple[int, int]]:
        """(outputs, inputs) of a layer's products: q, k and v side by side, o, gate and up side by side, down."""
        mixed = self.heads * self.head_dim
        qkv = mixed + 2 * self.kv_heads * self.head_dim
        return [(qkv, self.hidden), (self.hidden, mixed), (2 * self.inner, self.hidden), (self.hidden, self.inner)]
