"""A Llama-like model's weights, in as few products as possible, and one pass over a flat row of tokens.

transformers' own forward takes some 60 kernels a layer with PEFT's LoRA in fp32; here it is 13 on a GPU, of static
shape, and fit for a CUDA graph. q, k, v are one product, gate and up another (projections.py). What lies between is in
ops_triton.py or, in plain torch, in ops_torch.py. The weights are those of the loaded model, whichever loader made it.

Shapes: T tokens, E hidden, H heads, D head dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fast_ft.common.console import note
from fast_ft.common.errors import InputError
from fast_ft.generate.engine import kernel_checks, nf4_linear, ops_torch
from fast_ft.generate.engine.projections import Linear, Product, apart, base_of, dense

#: (layer, q, k and v side by side, rope) -> what attention gives, TE. It also writes k and v to the cache.
Attend = Callable[[int, Tensor, tuple[Tensor, Tensor]], Tensor]

_STEADY_ROPE = ("default", "linear", "llama3", "yarn")  #: kinds whose frequencies do not move with the length


class FusedModel:
    """The model as prefill and decoding see it. `dequantise` turns NF4 weights to 16 bits once and for all.

    `kernels` false does without Triton. Kernels are checked for the numbers of rows that a step may have, `step_rows`.
    `ops` is the module ops_triton or ops_torch. `planes`: 4-bit weights are decoded in registers for few rows.
    InputError where the model's blocks are not Llama's.
    """

    def __init__(
        self, model: nn.Module, *, dequantise: bool = False, workspace_mib: int = 96, kernels: bool = True,
        step_rows: Sequence[int] = (3, 64, nf4_linear.FEW),
    ) -> None:  # fmt: skip
        core: Any = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.config = core.config
        _check_structure(core)
        self.embed, self.head = core.get_input_embeddings(), core.get_output_embeddings()
        self.dtype, self.device = self.embed.weight.dtype, self.embed.weight.device
        self.norm, self.eps = core.model.norm.weight, self.config.rms_norm_eps
        self.head_dim = core.model.layers[0].self_attn.head_dim
        self.heads = self.config.num_attention_heads
        self.kv_heads = self.config.num_key_value_heads
        self._frequencies, self._rope_scale = _rope(self.config, self.head_dim, self.device)
        self.ops: Any = ops_torch
        self.notes: list[str] = []  #: why kernels that were asked for are not used
        self.planes = self._is_nf4_on_gpu(core) and not dequantise
        self._space: Tensor | None = None
        if self.planes:
            # dequantised weights pass through one buffer, small enough to stay in a large card's cache in part
            self._space = torch.empty(workspace_mib * 2**19, dtype=self.dtype, device=self.device)
        self._take_kernels(core, tuple(step_rows), wanted=kernels and self.device.type == "cuda")
        with torch.no_grad():
            self.layers = [self._layer(layer) for layer in core.model.layers]

    def forward(self, ids_T: Tensor, position_T: Tensor, attend: Attend, *, planes: bool = False) -> Tensor:
        """Return the last hidden states, normalised, TE. With `planes`, attend's columns must be in plane order."""
        ops, eps = self.ops, self.eps
        cos_sin = ops.rope(position_T, self._frequencies, self._rope_scale, self.dtype)
        x_TE, delta = self.embed(ids_T), None
        for index, (norm_1, qkv, out, norm_2, gate_up, down) in enumerate(self.layers):
            hidden_TE = ops.add_norm(x_TE, delta, norm_1, eps, planes=planes)
            mixed_TE = attend(index, qkv(hidden_TE, planes), cos_sin)
            hidden_TE = ops.add_norm(x_TE, out(mixed_TE, planes), norm_2, eps, planes=planes)
            delta = down(ops.gated(gate_up(hidden_TE, planes), self.dtype, planes=planes), planes)
        return ops.add_norm(x_TE, delta, self.norm, eps)

    def logits(self, hidden_TE: Tensor) -> Tensor:
        """Return fp32 logits, TV."""
        return self.head(hidden_TE).float()

    def _layer(self, layer: Any) -> tuple[Any, ...]:
        a, m = layer.self_attn, layer.mlp
        return (
            layer.input_layernorm.weight, self._product(a.q_proj, a.k_proj, a.v_proj), self._product(a.o_proj),
            layer.post_attention_layernorm.weight, self._product(m.gate_proj, m.up_proj), self._product(m.down_proj),
        )  # fmt: skip

    def _product(self, *modules: nn.Module) -> Callable[[Tensor, bool], Tensor]:
        bases = [base_of(module) for module in modules]
        if self.planes:
            assert self._space is not None
            return nf4_linear.Planes(modules, bases, self.dtype, self._space)
        if all(type(base).__name__ == "Linear" for base in bases):
            base: Linear = dense(bases)
        elif not all(base.weight.is_cuda and hasattr(base.weight, "quant_state") for base in bases):
            base = apart(bases)
        elif self._space is None:
            base = nf4_linear.dequantised(bases, self.dtype)
        else:
            base = nf4_linear.pieces(bases, self.dtype, self._space)
        return Product(modules, base, self.dtype)

    def _take_kernels(self, core: Any, step_rows: tuple[int, ...], *, wanted: bool) -> None:
        """Settle on Triton's kernels, all or but for products, where they work and are `wanted`."""
        dtype = str(self.dtype).removeprefix("torch.")
        kind = kernel_checks.Kind(
            heads=self.heads, kv_heads=self.kv_heads, head_dim=self.head_dim, hidden=self.config.hidden_size,
            inner=self.config.intermediate_size, dtype=dtype, device=str(self.device), steps=step_rows,
            planes=self.planes,
        )  # fmt: skip
        self.planes = self.planes and wanted and self._can_decode_in_registers(core, kind)
        if wanted:
            self.ops = self._kernels(replace(kind, planes=self.planes))
        self.planes = self.planes and self.ops is not ops_torch

    @staticmethod
    def _is_nf4_on_gpu(core: Any) -> bool:
        weight = base_of(core.model.layers[0].mlp.down_proj).weight
        return weight.is_cuda and hasattr(weight, "quant_state")

    def _can_decode_in_registers(self, core: Any, kind: kernel_checks.Kind) -> bool:
        """Whether the product's kernel works here; if not, a note says why."""
        layer = core.model.layers[0]
        try:
            for module in (layer.self_attn.q_proj, layer.self_attn.o_proj, layer.mlp.gate_proj, layer.mlp.down_proj):
                nf4_linear.check_planes(base_of(module))
            kernel_checks.products(kind)
        except Exception as error:  # a compiler on a card that it does not know may fail in any way
            self._note(f"4-bit products by bitsandbytes, more slowly: {_first_words(error)}")
            return False
        return True

    def _kernels(self, kind: kernel_checks.Kind) -> Any:
        """Return the module of Triton kernels if it works here and agrees with plain torch; else plain, and say why."""
        try:
            from fast_ft.generate.engine import ops_triton

            kernel_checks.attention(kind, ops_triton)
        except Exception as error:
            self._note(f"decoding without the Triton kernels, more slowly: {_first_words(error)}")
            return ops_torch
        return ops_triton

    def _note(self, text: str) -> None:
        self.notes.append(text)
        note(f"note: {text}")


def _first_words(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error)[:300]}"


def _rope(config: Any, head_dim: int, device: torch.device) -> tuple[Tensor, float]:
    """Return rotary frequencies, fp32, one for each pair, and the factor on cos and sin."""
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
