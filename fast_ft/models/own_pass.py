"""Does a loaded model give the same numbers through our pass over packed rows as through its own forward pass?

Asked once after loading, of 16 tokens in two rows that lie one behind the other. Where what config.json says does not
make a difference, but the loaded model does, this is where it shows: before the first step.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fast_ft.models import packed_attention
from fast_ft.models.packed_attention import PackedRows

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import Tensor

_LENGTHS = (6, 10)  #: tokens of the rows
#: Mean difference that rounding explains, in nats per token: a 4-bit product on a CPU differs by some 1e-4 with the
#: rows in it, in fp32 too. A wrong mask, position or scale shows as a tenth of a nat or more.
_ROUNDING = {"float32": 2e-3, "float16": 0.02, "bfloat16": 0.1}


def difference(model: PeftModel, dtype: str) -> str | None:
    """Return why our pass cannot be relied on for this model, or None where it agrees with the model's own.

    The mean difference in a token's log-probability, in nats, is compared with what rounding in `dtype` explains.
    """
    import torch

    core, device = model.get_base_model(), next(model.parameters()).device
    was_training = model.training
    model.train()  # in evaluation mode bitsandbytes packs 4-bit weights again on a CPU
    for module in model.modules():
        if type(module).__name__ == "Dropout":
            module.eval()
    size = core.get_input_embeddings().weight.shape[0]
    draw = torch.Generator().manual_seed(0)
    ids_1T = torch.randint(0, size, (1, sum(_LENGTHS)), generator=draw).to(device)
    try:
        half = dtype != "float32"  # as training's passes have it
        with torch.no_grad(), torch.autocast(device.type, getattr(torch, dtype) if half else None, enabled=half):
            ours_TV = torch.log_softmax(_packed(core, ids_1T), dim=-1)
            theirs = [core(input_ids=row_1T, use_cache=False).logits[0] for row_1T in ids_1T.split(_LENGTHS, dim=1)]
            theirs_TV = torch.log_softmax(torch.cat(theirs).float(), dim=-1)
            next_T1 = ids_1T[0].roll(-1)[:, None]
            off = (ours_TV.gather(1, next_T1) - theirs_TV.gather(1, next_T1)).abs().mean().item()
    except (AttributeError, KeyError, TypeError) as error:
        return f"our pass does not run through it ({type(error).__name__}: {str(error)[:100]})"
    finally:
        model.train(was_training)
    if not off <= _ROUNDING[dtype]:  # a NaN, too
        return f"our pass differs from the model's own by {off:.4f} nat per token; {_ROUNDING[dtype]} is rounding"
    return None


def _packed(core: PeftModel, ids_1T: Tensor) -> Tensor:
    """Return fp32 logits, TV, as training's passes and its loss see them."""
    import torch

    starts = torch.tensor([0, _LENGTHS[0], sum(_LENGTHS)], dtype=torch.int32, device=ids_1T.device)
    positions_1T = torch.cat([torch.arange(length) for length in _LENGTHS])[None].to(ids_1T.device)
    with packed_attention.packed_pass(core.config, PackedRows(starts, max(_LENGTHS))):
        hidden_1TE = core.model(input_ids=ids_1T, position_ids=positions_1T, use_cache=False)[0]
    weight_VE = core.lm_head.weight
    return (hidden_1TE[0].to(weight_VE.dtype) @ weight_VE.t()).float()
