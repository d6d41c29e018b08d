"""Where weights lie in memory: several parameters in one block, so that one kernel takes them all.

Only this module points a parameter at other memory for good. The values stay what they were, so nothing has to be
taken back: training, decoding and the optimizer read the same numbers wherever they lie.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.nn import Parameter


def side_by_side(parameters: Sequence[Parameter]) -> Tensor:
    """Return parameters (n, ...) one after the other, (sum of n, ...); they themselves become views of the result.

    Parameters that lie so already are not moved: in a sweep, training's blocks and decoding share one copy.
    """
    import torch

    if len(parameters) == 1:
        return parameters[0].data
    if _are_side_by_side(parameters):
        first = parameters[0].data
        return first.as_strided((sum(map(len, parameters)), *first.shape[1:]), first.stride())
    whole = torch.cat([each.data for each in parameters])
    start = 0
    for each in parameters:
        each.data = whole[start : start + len(each)]
        start += len(each)
    return whole


def by_layer(layers: Iterable[nn.Module]) -> None:
    """Put each layer's 4-bit weights in one block of memory, in the layer's own order: q, k, v, o, gate, up, down.

    Groups of them are side by side then. Groups that are put side by side later leave holes where their weights were,
    in between weights that stay: a 7B loses 0.8 GiB to them. What a whole layer leaves is one hole, which the next
    layer fits.
    """
    import torch

    for layer in layers:
        packed = [each for each in layer.parameters() if hasattr(each, "quant_state")]
        if packed:
            side_by_side(packed)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _are_side_by_side(parameters: Sequence[Parameter]) -> bool:
    memory, at = parameters[0].untyped_storage().data_ptr(), parameters[0].storage_offset()
    for each in parameters:
        if not each.is_contiguous() or (each.untyped_storage().data_ptr(), each.storage_offset()) != (memory, at):
            return False
        at += each.numel()
    return True


def flatten(parameters: Sequence[Parameter]) -> Tensor:
    """Return all parameters' values in one flat tensor; they themselves become views of it, of their own shapes."""
    import torch

    flat = torch.cat([each.data.flatten() for each in parameters])
    sizes = [each.numel() for each in parameters]
    for each, part in zip(parameters, flat.split(sizes), strict=True):
        each.data = part.view_as(each)
    return flat
