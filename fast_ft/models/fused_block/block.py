"""A Llama block's forward pass, and its backward pass by hand.

    x --norm--> qkv --rotate--> attention --out--(+x)--> mid --norm--> gate, up --swiglu--> down --(+mid)--> y

What autograd would keep is 1.3 times as much and passes over memory more often: here the norms and swiglu's result are
computed again from what is kept anyway, gradients are written over values, residuals are added inside of products, and
q, k, v are one product, as are gate and up. Each 4-bit weight is turned to 16 bits once forward and once backward.
Qwen3 has a norm over each head of q and k before they are rotated; Mistral and Qwen2 may attend within a window.

Kept for each token: x, q, k, v, attention's result, mid, gate, up; in a 7B 2.8 MiB over all layers. Where q and k have
norms, also q and k before these.

Shapes: T tokens, E hidden, H heads, G KV heads, D head dimension, M inner size of the MLP.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from fast_ft.hub.families import FamilySpec, ModelShape
from fast_ft.models import packed_attention
from fast_ft.models.fused_block import dispatch, obstacles
from fast_ft.models.fused_block.group_weights import WeightBuffer
from fast_ft.models.fused_block.linear_group import LinearGroup
from fast_ft.models.fused_block.lora_copies import LoraCopies
from fast_ft.models.packed_attention import PackedRows

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from peft import PeftModel
    from torch import Tensor, nn
    from torch.autograd.function import FunctionCtx

    from fast_ft.models.patches import ModelPatches


def install(model: PeftModel, patches: ModelPatches) -> str | None:
    """Let a model's decoder layers train through Blocks, until `patches` is undone.

    Return why that cannot be, where it cannot, and leave the model as it is. Only passes within
    packed_attention.packed_pass go through Blocks; evaluation and generation go as before.
    """
    core = model.get_base_model()
    family, embedding = FamilySpec.from_config(core.config.to_dict()), core.get_input_embeddings().weight
    if reason := obstacles.unknown(family) or obstacles.in_layers(core):
        return reason
    buffer, copies = WeightBuffer(), LoraCopies(embedding.dtype)
    for index, layer in enumerate(core.model.layers):
        block = Block(layer, family, index, embedding.dtype, buffer, copies)
        patches.replace(layer, "forward", _TrainingForward(block, layer.forward))
    if embedding.is_cuda:
        torch.cuda.empty_cache()  # the pieces that the layers' weights were in before
    return None


class _TrainingForward:
    """A layer's forward: the block within a pass over packed rows, else the layer's own."""

    def __init__(self, block: Block, former: Callable[..., Any]) -> None:
        self.block, self.former = block, former

    def __call__(self, hidden_1TE: Tensor, *args: Any, **kwargs: Any) -> Any:
        rows = packed_attention.current_rows()
        if rows is None:
            return self.former(hidden_1TE, *args, **kwargs)
        cos_1TD, sin_1TD = kwargs["position_embeddings"]
        return self.block(hidden_1TE, cos_1TD, sin_1TD, rows)


class Block:
    """One layer's weights, in groups that share an input, and its pass."""

    def __init__(
        self, layer: nn.Module, family: FamilySpec, index: int, dtype: torch.dtype, buffer: WeightBuffer,
        copies: LoraCopies,
    ) -> None:  # fmt: skip
        attn, mlp, shape = layer.self_attn, layer.mlp, family.shape
        self.norm_1, self.norm_2 = layer.input_layernorm.weight, layer.post_attention_layernorm.weight
        self.qk_norms = [attn.q_norm.weight, attn.k_norm.weight] if family.qk_norms else []
        self.eps, self.window, self.size = family.eps, family.windows[index], shape.head_dim
        self.heads, self.kv_heads = shape.num_attention_heads, shape.num_key_value_heads
        qkv, gate_up = [attn.q_proj, attn.k_proj, attn.v_proj], [mlp.gate_proj, mlp.up_proj]
        parts = (qkv, [attn.o_proj], gate_up, [mlp.down_proj])
        self.groups = [LinearGroup(modules, dtype, buffer, copies) for modules in parts]
        self.lora = [weight for group in self.groups for weight in group.lora]
        self._copies = copies

    def __call__(self, hidden_1TE: Tensor, cos_1TD: Tensor, sin_1TD: Tensor, rows: PackedRows) -> Tensor:
        """Return the layer's output, (1, T, E)."""
        self._copies.renew(rows)
        # squeezed, not indexed: the gradient of an index is a copy
        y_TE = BlockPass.apply(hidden_1TE.squeeze(0), self, cos_1TD[0], sin_1TD[0], rows, *self.lora)
        return y_TE.unsqueeze(0)

    def add_gradients(self, grads: Sequence[Tensor]) -> Sequence[Tensor | None]:
        """Add gradients to those that the LoRA's matrices have, in one kernel; return what is left to autograd.

        Training gives each matrix a place for its gradient before a pass (train/optimizer.py); without, autograd adds.
        """
        pairs = [(weight.grad, grad) for weight, grad in zip(self.lora, grads, strict=True) if weight.numel()]
        if any(place is None for place, _ in pairs):
            return grads
        whole = [pair for pair in pairs if pair[1].is_contiguous()]
        if whole:
            torch._foreach_add_(*(list(side) for side in zip(*whole, strict=True)))
        for place, grad in pairs:
            if not grad.is_contiguous():  # B's of several layers are blocks of one product
                place.add_(grad)
        return [None] * len(grads)

    def heads_of(self, qkv_TN: Tensor) -> list[Tensor]:
        """Return q, k and v, each (1, T, H or G, D)."""
        parts = qkv_TN.view(1, len(qkv_TN), -1, self.size)
        return list(parts.split([self.heads, self.kv_heads, self.kv_heads], dim=2))

    def rotated(self, qkv_TN: Tensor) -> Tensor:
        """Return q's and k's heads, (T, H + G, D), to be rotated in place."""
        return qkv_TN.view(len(qkv_TN), -1, self.size)[:, : self.heads + self.kv_heads]

    def normalise_(self, qkv_TN: Tensor) -> tuple[Tensor, ...]:
        """Put the norms of q's and k's heads in their places; return both as they were, and the norms' scales.

        They are (T H, D), (T G, D), (T H,) and (T G,); nothing where the family has no such norms.
        """
        ops, raw, scales = dispatch.ops_for(qkv_TN), [], []
        for heads_TND, weight in zip(self._normed_heads(qkv_TN), self.qk_norms, strict=True):
            raw.append(heads_TND.clone(memory_format=torch.contiguous_format).view(-1, self.size))
            norm, scale = ops.rms_norm(raw[-1], weight, self.eps)
            heads_TND.copy_(norm.view(heads_TND.shape))
            scales.append(scale)
        return (*raw, *scales)

    def normalise_backward_(self, grad_TN: Tensor, kept: tuple[Tensor, ...]) -> None:
        """Put the gradients of q and k before their norms in the places of those after them."""
        count = len(self.qk_norms)
        ops, raw, scales = dispatch.ops_for(grad_TN), kept[:count], kept[count:]
        parts = zip(self._normed_heads(grad_TN), self.qk_norms, raw, scales, strict=True)
        for heads_TND, weight, before, scale in parts:
            grad = heads_TND.reshape(-1, self.size).contiguous()
            through, _ = ops.rms_norm_backward(grad, before, weight, scale, torch.zeros_like(grad))
            heads_TND.copy_(through.view(heads_TND.shape))

    def _normed_heads(self, qkv_TN: Tensor) -> Sequence[Tensor]:
        heads = [self.heads, self.kv_heads, self.kv_heads]
        return qkv_TN.view(len(qkv_TN), -1, self.size).split(heads, dim=1)[: len(self.qk_norms)]


class BlockPass(torch.autograd.Function):
    """A block's forward and backward pass as autograd sees it: x (T, E), and the LoRA's matrices as in Block.lora."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, x_TE: Tensor, block: Block, cos_TD: Tensor, sin_TD: Tensor, rows: PackedRows, *lora: Tensor
    ) -> Tensor:
        """Return the layer's output, (T, E), and keep what `backward` needs."""
        ops, (qkv, out, gate_up, down) = dispatch.ops_for(x_TE), block.groups
        x_TE = x_TE.contiguous()
        norm_TX, scale_1 = ops.rms_norm(x_TE, block.norm_1, block.eps, qkv.room)
        qkv_TN, xa_qkv = qkv.forward(norm_TX)
        kept_norms = block.normalise_(qkv_TN)
        ops.rotate_(block.rotated(qkv_TN), cos_TD, sin_TD)
        q, k, v = block.heads_of(qkv_TN)
        mixed_THD, kept_mixed = packed_attention.forward(q, k, v, rows, block.window)
        mixed_TN = mixed_THD.reshape(len(x_TE), -1)
        mid_TE, xa_out = out.forward(mixed_TN, add_TN=x_TE)
        norm_TX, scale_2 = ops.rms_norm(mid_TE, block.norm_2, block.eps, gate_up.room)
        gate_up_TN, xa_gate_up = gate_up.forward(norm_TX)
        y_TE, xa_down = down.forward(ops.swiglu(gate_up_TN, down.room), add_TN=mid_TE)
        ctx.block, ctx.rows, ctx.norms = block, rows, len(kept_norms)
        ctx.save_for_backward(
            x_TE, scale_1, qkv_TN, mixed_TN, mid_TE, scale_2, gate_up_TN, cos_TD, sin_TD, xa_qkv, xa_out, xa_gate_up,
            xa_down, *kept_norms, *kept_mixed,
        )  # fmt: skip
        return y_TE

    @staticmethod
    def backward(ctx: FunctionCtx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of x, where it is wanted, and of the LoRA's matrices, given the output's, (T, E)."""
        block, rows = ctx.block, ctx.rows
        x_TE, scale_1, qkv_TN, mixed_TN, mid_TE, scale_2, gate_up_TN, cos_TD, sin_TD, *kept = ctx.saved_tensors
        xa_qkv, xa_out, xa_gate_up, xa_down, *kept = kept
        kept_norms, kept_mixed = tuple(kept[: ctx.norms]), tuple(kept[ctx.norms :])
        ops, (qkv, out, gate_up, down) = dispatch.ops_for(x_TE), block.groups
        dy_TX = _with_room(grads[0], down.room)
        dy_TE = dy_TX[:, : x_TE.shape[1]]

        inner_TR = down.inner_gradient(dy_TX)
        dh_TM = down.input_gradient(dy_TX, inner_TR)
        ops.swiglu_backward_(gate_up_TN, dh_TM)  # gate and up are their gradients now, dh is h again
        grads_down = down.lora_gradients(dh_TM, dy_TE, inner_TR, xa_down)
        del dh_TM
        inner_TR = gate_up.inner_gradient(gate_up_TN)
        dnorm_TE = gate_up.input_gradient(gate_up_TN, inner_TR)
        dmid_TX, norm_TE = ops.rms_norm_backward(dnorm_TE, mid_TE, block.norm_2, scale_2, dy_TE, out.room)
        grads_gate_up = gate_up.lora_gradients(norm_TE, gate_up_TN, inner_TR, xa_gate_up)
        dmid_TE = dmid_TX[:, : x_TE.shape[1]]
        del dnorm_TE, norm_TE

        inner_TR = out.inner_gradient(dmid_TX)
        dmixed_TN = out.input_gradient(dmid_TX, inner_TR)
        grads_out = out.lora_gradients(mixed_TN, dmid_TE, inner_TR, xa_out)
        q, k, v = block.heads_of(qkv_TN)
        grads_qkv_THD = packed_attention.backward(
            dmixed_TN.view(q.shape), q, k, v, mixed_TN.view(q.shape), kept_mixed, rows, block.window
        )
        dqkv_TX = ops.rotate_back(*grads_qkv_THD, cos_TD, sin_TD, qkv.room)
        del grads_qkv_THD
        dqkv_TN = dqkv_TX[:, : qkv_TN.shape[1]]
        block.normalise_backward_(dqkv_TN, kept_norms)
        inner_TR = qkv.inner_gradient(dqkv_TX)
        if ctx.needs_input_grad[0]:
            dnorm_TE = qkv.input_gradient(dqkv_TX, inner_TR)
            dx_TX, norm_TE = ops.rms_norm_backward(dnorm_TE, x_TE, block.norm_1, scale_1, dmid_TE, down.room)
            dx_TE = dx_TX[:, : x_TE.shape[1]]  # the layer below finds the room again, if its LoRA is as wide
        else:  # the first layer, below which nothing is trained
            dx_TE, (norm_TE, _) = None, ops.rms_norm(x_TE, block.norm_1, block.eps)
        grads_qkv = qkv.lora_gradients(norm_TE, dqkv_TN, inner_TR, xa_qkv)
        left = block.add_gradients([*grads_qkv, *grads_out, *grads_gate_up, *grads_down])
        return (dx_TE, None, None, None, None, *left)


def _with_room(grad_TE: Tensor, room: int) -> Tensor:
    """Return a gradient with `room` columns of zeros behind it: what a block made it a part of, or else a copy."""
    whole, wanted = grad_TE._base, (len(grad_TE), grad_TE.shape[1] + room)
    if whole is not None and (whole.shape, whole.stride()) == (wanted, grad_TE.stride()):
        assert grad_TE.data_ptr() == whole.data_ptr(), "the room is behind"
        return whole
    return torch.nn.functional.pad(grad_TE, (0, room)) if room else grad_TE.contiguous()


def check(like: Tensor, shape: ModelShape) -> str | None:
    """Return why the kernels, or attention, cannot be relied on with tensors of `like`'s device and dtype, or None."""
    heads = (shape.num_attention_heads, shape.num_key_value_heads, shape.head_dim)
    between = dispatch.check(like, shape.hidden_size, shape.intermediate_size, shape.head_dim)
    return between or packed_attention.check(like, *heads)
