"""Products of a few rows in fp32 on a CPU: weights in the order in which oneDNN's kernels read them, the LoRA in them.

Such a product takes as long as its weights take to read, and these kernels read them faster than MKL's do from rows.
The weights are there twice then, so models of more than MOST_BYTES go without, as do other dtypes and devices. Many
rows, as in a prompt's pass, are multiplied by the plain product.

Shapes: T rows, E inputs, N outputs, R ranks.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from fast_ft.common import out_of_memory
from fast_ft.generate.engine.projections import Linear, Product, bias_of, dense
from fast_ft.models.weight_layout import side_by_side

MOST_BYTES = 2**30  #: of weights that are packed
FEW = 32  #: rows from which on the plain product is as fast


def serves(core: Any) -> bool:
    """Return whether a model's products can be packed here."""
    linears = [module for module in core.modules() if isinstance(module, nn.Linear)]
    weights = [module.weight for module in linears]
    are_plain = all(type(each) is nn.Linear for each in linears) and all(
        each.dtype == torch.float32 and each.device.type == "cpu" for each in weights
    )
    return are_plain and sum(each.nbytes for each in weights) <= MOST_BYTES and _works()


class PackedLinear:
    """Call it with TE; it returns TN: by the packed weights for FEW rows at most, else by `plain`.

    `weight_NE` is fp32 on a CPU; it is copied.
    """

    def __init__(self, weight_NE: Tensor, bias_N: Tensor | None, plain: Linear) -> None:
        self.bias_N, self.plain = bias_N, plain
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight_NE.detach().contiguous(), 8)

    def __call__(self, x_TE: Tensor) -> Tensor:
        if len(x_TE) > FEW:
            return self.plain(x_TE)
        return torch.ops.mkldnn._linear_pointwise(x_TE.contiguous(), self._packed, self.bias_N, "none", [], "")


class PackedProduct(Product):
    """A Product whose few rows are multiplied by packed weights, to which LoRA and DoRA were added once and for all."""

    def __init__(self, modules: Sequence[nn.Module], bases: Sequence[Any]) -> None:
        super().__init__(modules, dense(bases), torch.float32)
        whole_NE = side_by_side([base.weight for base in bases])
        if self.size_N is not None:
            whole_NE = whole_NE * self.size_N[:, None]
        if self.a_ER is not None and self.b_RN is not None:
            whole_NE = torch.addmm(whole_NE, self.b_RN.t(), self.a_ER.t())
        self._few = PackedLinear(whole_NE, bias_of(bases), super().__call__)

    def __call__(self, x_TE: Tensor, few: bool = False, first: None = None) -> Tensor:
        return self._few(x_TE)


@functools.cache
def _works() -> bool:
    """Return whether this torch has oneDNN's product, and it multiplies as the plain one does."""
    if not torch.backends.mkldnn.is_available():
        return False
    draw = torch.Generator().manual_seed(0)
    x_TE, weight_NE, bias_N = (torch.randn(*size, generator=draw) for size in ((3, 40), (24, 40), (24,)))
    plain_TN = linear(x_TE, weight_NE, bias_N)
    try:
        with torch.inference_mode():
            made_TN = PackedLinear(weight_NE, bias_N, lambda x: linear(x, weight_NE, bias_N))(x_TE)
    except (RuntimeError, AttributeError, TypeError) as error:  # the operators are torch's own affair, and may change
        if out_of_memory.is_short(error):
            raise
        return False
    return torch.allclose(made_TN, plain_TN, rtol=1e-4, atol=1e-5)
