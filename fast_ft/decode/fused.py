"""A Llama-like model's weights, in as few products as possible, and one pass over a flat row of tokens.

transformers' own forward takes some 60 kernels a layer with PEFT's LoRA in fp32; here it is about 30, of static
shape, and fit for a CUDA graph. q, k, v are one product, gate and up another. Each LoRA is two: all A matrices
stacked, all B matrices block-diagonal. The weights are those of the loaded model, whichever backend loaded it; where
they are put side by side, the model's own parameters become views, so nothing is held twice.

Shapes: T tokens, E hidden, H heads, D head dimension, N outputs, R ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from fast_ft.errors import InputError

#: (layer, q_THD, k_THD, v_THD) -> what attention gives, THD. It also writes k and v to the cache.
Attend = Callable[[int, Any, Any, Any], Any]

_STEADY_ROPE = ("default", "linear", "llama3", "yarn")  #: kinds whose frequencies do not move with the length


class Fused:
    """The model as prefill and decoding see it. `dequantise` turns NF4 weights to 16 bits once and for all."""

    def __init__(self, model: Any, *, dequantise: bool = False, workspace_mib: int = 96) -> None:
        import torch

        core = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.config = core.config
        _check_structure(core)
        self.embed, self.head = core.get_input_embeddings(), core.get_output_embeddings()
        self.dtype, self.device = self.embed.weight.dtype, self.embed.weight.device
        self.norm, self.eps = core.model.norm.weight, self.config.rms_norm_eps
        attention = core.model.layers[0].self_attn
        self.head_dim = attention.head_dim
        self.heads = self.config.num_attention_heads
        self.kv_heads = self.config.num_key_value_heads
        self._frequencies, self._rope_scale = _rope(self.config, self.head_dim, self.device)
        # dequantised weights pass through one buffer, small enough to stay in a large card's cache in part
        self._space = (
            torch.empty(workspace_mib * 2**19, dtype=self.dtype, device=self.device) if self._nf4(core) else None
        )
        with torch.no_grad():
            self.layers = [self._layer(layer, dequantise) for layer in core.model.layers]
        if dequantise:
            self._space = None

    def forward(self, ids_T: Any, position_T: Any, attend: Attend) -> Any:
        """Return the last hidden states, normalised, TE."""
        import torch
        from torch.nn.functional import rms_norm, silu

        count, width = len(ids_T), (self.norm.shape[0],)
        angle_TD = (position_T[:, None].float() * self._frequencies).repeat(1, 2)[:, None]
        cos, sin = (angle_TD.cos() * self._rope_scale).to(self.dtype), angle_TD.sin() * self._rope_scale
        half = self.head_dim // 2
        sin = torch.cat((-sin[..., :half], sin[..., half:]), dim=-1).to(self.dtype)
        rotated = self.heads + self.kv_heads
        x_TE = self.embed(ids_T)
        for index, (norm_1, qkv, out, norm_2, gate_up, down) in enumerate(self.layers):
            qkv_THD = qkv(rms_norm(x_TE, width, norm_1, self.eps)).view(count, -1, self.head_dim)
            qk_THD = qkv_THD[:, :rotated]
            qk_THD = torch.addcmul(qk_THD * cos, qk_THD.roll(half, dims=-1), sin)
            mixed_THD = attend(index, qk_THD[:, : self.heads], qk_THD[:, self.heads :], qkv_THD[:, rotated:])
            x_TE = x_TE + out(mixed_THD.reshape(count, -1))
            gate_T, up_T = gate_up(rms_norm(x_TE, width, norm_2, self.eps)).chunk(2, dim=-1)
            x_TE = x_TE + down(silu(gate_T) * up_T)
        return rms_norm(x_TE, width, self.norm, self.eps)

    def logits(self, hidden_TE: Any) -> Any:
        """Return fp32 logits, TV."""
        return self.head(hidden_TE).float()

    def _layer(self, layer: Any, dequantise: bool) -> tuple[Any, ...]:
        a, m = layer.self_attn, layer.mlp

        def product(*modules: Any) -> Product:
            return Product(modules, self.dtype, self._space, dequantise)

        return (
            layer.input_layernorm.weight, product(a.q_proj, a.k_proj, a.v_proj), product(a.o_proj),
            layer.post_attention_layernorm.weight, product(m.gate_proj, m.up_proj), product(m.down_proj),
        )  # fmt: skip

    @staticmethod
    def _nf4(core: Any) -> bool:
        weight = _base(core.model.layers[0].mlp.down_proj).weight
        return weight.is_cuda and hasattr(weight, "quant_state")


class Product:
    """Linear layers with one input, side by side, and their LoRA. Call it with TE; it returns TN."""

    def __init__(self, modules: Sequence[Any], dtype: Any, space: Any, dequantise: bool) -> None:
        bases = [_base(module) for module in modules]
        self.a_ER, self.b_RN = _lora(modules, dtype)
        if all(type(base).__name__ == "Linear" for base in bases):
            self.base = _dense(bases)
        elif all(base.weight.is_cuda and hasattr(base.weight, "quant_state") for base in bases):
            self.base = _dequantised(bases, dtype) if dequantise else _nf4(bases, dtype, space)
        else:  # 4 bits on a CPU, whose packing is bitsandbytes' own affair
            self.base = _apart(bases)

    def __call__(self, x_TE: Any) -> Any:
        y_TN = self.base(x_TE)
        return y_TN if self.a_ER is None else y_TN.addmm_(x_TE @ self.a_ER, self.b_RN)


def _base(module: Any) -> Any:
    return module.get_base_layer() if hasattr(module, "get_base_layer") else module


def _lora(modules: Sequence[Any], dtype: Any) -> tuple[Any, Any]:
    """Return (A stacked, ER; B block-diagonal and scaled, RN), or (None, None) where no adapter is active."""
    import torch

    a_parts, b_parts, at = [], [], 0
    width = sum(_base(module).out_features for module in modules)
    for module in modules:
        wide = _base(module).out_features
        if hasattr(module, "lora_A") and not module.disable_adapters:
            for name in module.active_adapters:
                a, b = module.lora_A[name].weight, module.lora_B[name].weight
                row = torch.zeros(b.shape[1], width, dtype=dtype, device=b.device)
                row[:, at : at + wide] = (b.float() * module.scaling[name]).T.to(dtype)
                a_parts.append(a.to(dtype))
                b_parts.append(row)
        at += wide
    return (torch.cat(a_parts).T.contiguous(), torch.cat(b_parts)) if a_parts else (None, None)


def _bias(bases: Sequence[Any]) -> Any:
    import torch

    return torch.cat([base.bias for base in bases]) if bases[0].bias is not None else None


def _side_by_side(bases: Sequence[Any]) -> Any:
    """Return the weights of all, one after the other; the layers' own become views of it."""
    import torch

    if len(bases) == 1:
        return bases[0].weight.data
    whole = torch.cat([base.weight.data for base in bases])
    at = 0
    for base in bases:
        rows = len(base.weight)
        base.weight.data = whole[at : at + rows]
        at += rows
    return whole


def _dense(bases: Sequence[Any]) -> Callable[[Any], Any]:
    from torch.nn.functional import linear

    weight_NE, bias_N = _side_by_side(bases), _bias(bases)
    return lambda x_TE: linear(x_TE, weight_NE, bias_N)


def _apart(bases: Sequence[Any]) -> Callable[[Any], Any]:
    import torch

    return lambda x_TE: torch.cat([base(x_TE) for base in bases], dim=-1)


def _dequantised(bases: Sequence[Any], dtype: Any) -> Callable[[Any], Any]:
    import torch
    from bitsandbytes.functional import dequantize_4bit
    from torch.nn.functional import linear

    parts = [dequantize_4bit(base.weight.data, base.weight.quant_state).to(dtype) for base in bases]
    weight_NE, bias_N = torch.cat(parts), _bias(bases)
    return lambda x_TE: linear(x_TE, weight_NE, bias_N)


def _nf4(bases: Sequence[Any], dtype: Any, space: Any) -> Callable[[Any], Any]:
    """4-bit weights: bitsandbytes' fused product for few rows, else dequantised piece by piece into `space`.

    The scales' own quantisation is undone once (0.4 GiB in a 7B), which saves two kernels a weight and step.
    """
    import bitsandbytes as bnb
    import torch

    def scales(state: Any) -> Any:
        return (
            bnb.functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
            if state.nested
            else state.absmax
        )

    states = [base.weight.quant_state for base in bases]
    packed, absmax = _side_by_side(bases).view(-1), torch.cat([scales(state).float() for state in states])
    inputs, outputs = states[0].shape[1], sum(state.shape[0] for state in states)
    block, kind, bias_N = states[0].blocksize, states[0].quant_type, _bias(bases)

    def state(start: int, stop: int) -> Any:
        part = absmax[start * inputs // block : stop * inputs // block]
        return bnb.functional.QuantState(part, torch.Size((stop - start, inputs)), states[0].code, block, kind, dtype)

    pieces = -(-outputs // (space.numel() // inputs))
    rows = -(-outputs // pieces)
    cuts = [(a, min(a + rows, outputs)) for a in range(0, outputs, rows)]
    parts = [
        (a, b, packed[a * inputs // 2 : b * inputs // 2], state(a, b), space[: (b - a) * inputs].view(b - a, inputs))
        for a, b in cuts
    ]
    whole, few = state(0, outputs), fused_rows(packed.device)

    def product(x_TE: Any) -> Any:
        if len(x_TE) <= few:
            y_TN = bnb.matmul_4bit(x_TE, packed, whole)
        else:
            y_TN = x_TE.new_empty(len(x_TE), outputs)
            for a, b, piece, piece_state, weight_NE in parts:
                bnb.functional.dequantize_4bit(piece, piece_state, out=weight_NE)
                torch.mm(x_TE, weight_NE.T, out=y_TN[:, a:b])
        return y_TN if bias_N is None else y_TN.add_(bias_N)

    return product


def fused_rows(device: Any) -> int:
    """Up to how many rows bitsandbytes' fused 4-bit product beats dequantising (its dispatch table, 0.50)."""
    import torch

    return {(7, 5): 64, (8, 0): 16, (8, 6): 64, (8, 9): 64, (9, 0): 16}.get(
        torch.cuda.get_device_capability(device), 16
    )


def _rope(config: Any, head_dim: int, device: Any) -> tuple[Any, float]:
    """Return rotary frequencies, fp32, one for each pair, and the factor on cos and sin."""
    import torch
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    kind = config.rope_parameters.get("rope_type", "default")
    if kind not in _STEADY_ROPE:
        raise InputError(
            f"the base model's rope_type {kind!r} is not supported in decoding; {', '.join(_STEADY_ROPE)} are."
        )
    if kind != "default":
        return ROPE_INIT_FUNCTIONS[kind](config, device)
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    return (1.0 / config.rope_parameters["rope_theta"] ** exponent).to(device), 1.0


def _check_structure(core: Any) -> None:
    layer = core.model.layers[0]
    named = {name for name, _ in layer.self_attn.named_children()}
    plain = {"q_proj", "k_proj", "v_proj", "o_proj"} <= named and not any("norm" in name for name in named)
    plain &= {"gate_proj", "up_proj", "down_proj"} <= {name for name, _ in layer.mlp.named_children()}
    if not plain or core.config.hidden_act != "silu" or getattr(core.config, "sliding_window", None):
        raise InputError(
            f"decoding supports Llama's blocks only; the base model (model_type {core.config.model_type!r}) has others."
        )
