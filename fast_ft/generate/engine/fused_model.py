"""A Llama-like model's weights, in as few products as possible, and one pass over a flat row of tokens.

transformers' own forward takes some 60 kernels a layer with PEFT's LoRA in fp32. Here it is, by count, 9 to 11 where a
card decodes 4-bit weights in registers. They are of static shape, and fit for a CUDA graph. q, k, v are one product,
gate and up another (projections.py). What lies between is in ops_triton.py or, in plain torch, in ops_torch.py. The
weights are those of the loaded model, whichever loader made it.

Shapes: T tokens, E hidden, H heads, D head dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import rms_norm

from fast_ft.common.console import note
from fast_ft.common.errors import InputError
from fast_ft.generate.engine import kernel_checks, nf4_linear, ops_torch, packed_linear
from fast_ft.generate.engine.first_half import FirstHalf
from fast_ft.generate.engine.projections import Linear, Product, apart, base_of, dense, has_dora, ranks_of
from fast_ft.hub.families import TARGET_MODULES, FamilySpec
from fast_ft.models.nf4 import Order

if TYPE_CHECKING:
    from transformers import PretrainedConfig

#: (layer, q, k and v side by side, rope, what to compute beside) -> what attention gives, TE. It writes k and v to the
#: cache, too.
Attend = Callable[[int, Tensor, tuple[Tensor, Tensor], FirstHalf | None], Tensor]


class FusedModel:
    """The model as prefill and decoding see it. `dequantise` turns NF4 weights to 16 bits once and for all.

    `kernels` false does without Triton. Kernels are checked for the numbers of rows that a step may have, `step_rows`,
    and for a cache of `kv_bits`. `ops` is the module ops_triton or ops_torch. `planes`: 4-bit weights are decoded in
    registers for few rows, which then come in the `order` that the product wants. InputError where `unknown` finds
    something.
    """

    def __init__(
        self, model: nn.Module, *, dequantise: bool = False, workspace_mib: int = 96, kernels: bool = True,
        step_rows: Sequence[int] = (3, 64, nf4_linear.FEW), kv_bits: int = 16,
    ) -> None:  # fmt: skip
        core: Any = model.get_base_model() if hasattr(model, "get_base_model") else model
        if problem := unknown(core):
            raise InputError(f"decoding by our engine does not know this base model: {problem}.")
        self.family = FamilySpec.from_config(core.config.to_dict())
        self.windows = self.family.windows
        self.embed, self.head = core.get_input_embeddings(), core.get_output_embeddings()
        # an embedding or a head that a trainer still holds is in fp32
        self.dtype, self.device = core.model.norm.weight.dtype, self.embed.weight.device
        self.norm, self.eps, shape = core.model.norm.weight, self.family.eps, self.family.shape
        self.head_dim, self.heads, self.kv_heads = shape.head_dim, shape.num_attention_heads, shape.num_key_value_heads
        self._frequencies, self._rope_scale = _rope(core.config, self.family, self.device)
        self.ops: Any = ops_torch
        self.notes: list[str] = []  #: why kernels that were asked for are not used
        self.planes = self._is_nf4_on_gpu(core) and not dequantise and not has_dora(list(core.modules()))
        self._space: Tensor | None = None
        if self.planes:
            # dequantised weights pass through one buffer, small enough to stay in a large card's cache in part
            self._space = torch.empty(workspace_mib * 2**19, dtype=self.dtype, device=self.device)
        self._take_kernels(core, tuple(step_rows), kv_bits, wanted=kernels and self.device.type == "cuda")
        self._packs = packed_linear.serves(core)
        with torch.no_grad():
            self._multiply_by_head: Linear = self.head
            if self._packs:
                self._multiply_by_head = packed_linear.PackedLinear(self.head.weight, self.head.bias, self.head)
            self.layers = [self._layer(layer) for layer in core.model.layers]
            norms = [self._head_norms(layer) for layer in core.model.layers] if self.family.qk_norms else []
        self._norms_ND: list[Tensor] = norms
        self.dequantised_at: frozenset[int] = frozenset()  #: rows of steps whose weights are dequantised all the same

    @property
    def way_name(self) -> str | None:
        """What a plan calls the kernel for few rows; None without one."""
        return self._way.__name__.rpartition(".")[2] if self.planes and self._way is not None else None

    def order(self, rows: int) -> Order:
        """Return the order in which a step's products want that many rows of x."""
        return self._way.order_for(rows) if self._way is not None and self.takes_few(rows) else Order.ROWS

    def takes_few(self, rows: int) -> bool:
        """Return whether steps of that many rows decode 4-bit weights in registers."""
        return self.planes and rows <= nf4_linear.FEW and rows not in self.dequantised_at

    @property
    def few_rows(self) -> str | None:
        """The name of the kernel that decodes 4-bit weights in registers for few rows; None without one."""
        return self._way.NAME if self.planes and self._way is not None else None

    def forward(
        self, ids_T: Tensor, position_T: Tensor, attend: Attend, *, few: bool = False, keep_P: Tensor | None = None
    ) -> Tensor:
        """Return the last hidden states, normalised, TE; with `keep_P` only those of these tokens, PE.

        `few` decodes 4-bit weights in registers; attend must then give the model's `order` for that many rows.
        """
        ops, eps, order = self.ops, self.eps, self.order(len(ids_T)) if few else Order.ROWS
        cos_sin = ops.rope(position_T, self._frequencies, self._rope_scale, self.dtype)
        x_TE, delta = self.embed(ids_T), None

        def first(product: Any) -> FirstHalf | None:
            return product.first(len(ids_T)) if few else None

        for index, (norm_1, qkv, out, norm_2, gate_up, down) in enumerate(self.layers):
            before = first(qkv)
            hidden_TE = ops.add_norm(x_TE, delta, norm_1, eps, order=order, first=before)
            qkv_TN, before = self._normed(index, qkv(hidden_TE, few, before)), first(out)
            mixed_TN = attend(index, qkv_TN, cos_sin, before)
            if keep_P is not None and index == len(self.layers) - 1:
                mixed_TN, x_TE = mixed_TN[keep_P], x_TE[keep_P]
            delta, before = out(mixed_TN, few, before), first(gate_up)
            hidden_TE = ops.add_norm(x_TE, delta, norm_2, eps, order=order, first=before)
            both_TN, before = gate_up(hidden_TE, few, before), first(down)
            delta = down(ops.gated(both_TN, self.dtype, order=order, first=before), few, before)
        return ops.add_norm(x_TE, delta, self.norm, eps)

    def logits(self, hidden_TE: Tensor) -> Tensor:
        """Return fp32 logits, TV."""
        return self._multiply_by_head(hidden_TE).float()

    def _normed(self, index: int, qkv: Tensor) -> Tensor:
        """Return a layer's q, k and v with the norms over q's and k's heads, where the family has them.

        A product that was left in parts, (parts, T, columns), is added up for these.
        """
        if not self._norms_ND:
            return qkv
        whole = qkv.sum(dim=0).to(self.dtype) if qkv.dim() == 3 else qkv
        norm_ND = self._norms_ND[index]
        qk_TND = whole.view(len(whole), -1, self.head_dim)[:, : len(norm_ND)]
        qk_TND.copy_(rms_norm(qk_TND, (self.head_dim,), None, self.eps) * norm_ND)
        return whole

    def _head_norms(self, layer: Any) -> Tensor:
        """Return the norms' weights over each of q's and k's heads, (H + G, D)."""
        q_D, k_D = layer.self_attn.q_norm.weight, layer.self_attn.k_norm.weight
        return torch.cat([q_D.expand(self.heads, -1), k_D.expand(self.kv_heads, -1)])

    def _layer(self, layer: Any) -> tuple[Any, ...]:
        a, m = layer.self_attn, layer.mlp
        return (
            layer.input_layernorm.weight, self._product(a.q_proj, a.k_proj, a.v_proj), self._product(a.o_proj),
            layer.post_attention_layernorm.weight, self._product(m.gate_proj, m.up_proj), self._product(m.down_proj),
        )  # fmt: skip

    def _product(self, *modules: nn.Module) -> nf4_linear.InRegisters | Product:
        bases = [base_of(module) for module in modules]
        if self.planes:
            assert self._space is not None
            assert self._way is not None
            return nf4_linear.InRegisters(self._way, modules, bases, self.dtype, self._space)
        if self._packs:
            return packed_linear.PackedProduct(modules, bases)
        if all(type(base).__name__ == "Linear" for base in bases):
            base: Linear = dense(bases)
        elif not all(base.weight.is_cuda and hasattr(base.weight, "quant_state") for base in bases):
            base = apart(bases)
        elif self._space is None:
            base = nf4_linear.dequantised(bases, self.dtype)
        else:
            base = nf4_linear.pieces(bases, self.dtype, self._space)
        return Product(modules, base, self.dtype)

    def _take_kernels(self, core: Any, step_rows: tuple[int, ...], kv_bits: int, *, wanted: bool) -> None:
        """Settle on Triton's kernels, all or but for products, where they work and are `wanted`."""
        dtype = str(self.dtype).removeprefix("torch.")
        kind = kernel_checks.Kind(
            heads=self.heads, kv_heads=self.kv_heads, head_dim=self.head_dim, hidden=self.family.shape.hidden_size,
            inner=self.family.shape.intermediate_size, dtype=dtype, device=str(self.device), steps=step_rows,
            planes=self.planes, kv_bits=kv_bits, ranks=self._ranks(core.model.layers[0]),
        )  # fmt: skip
        self._way = self._way_that_works(core, kind) if self.planes and wanted else None
        self.planes = self._way is not None
        if wanted:
            self.ops = self._kernels(replace(kind, planes=self.planes, way=self._way))
        self.planes = self.planes and self.ops is not ops_torch

    @staticmethod
    def _ranks(layer: Any) -> tuple[int, int, int, int]:
        a, m = layer.self_attn, layer.mlp
        qkv, gate_up = (a.q_proj, a.k_proj, a.v_proj), (m.gate_proj, m.up_proj)
        return ranks_of(qkv), ranks_of([a.o_proj]), ranks_of(gate_up), ranks_of([m.down_proj])

    @staticmethod
    def _is_nf4_on_gpu(core: Any) -> bool:
        weight = base_of(core.model.layers[0].mlp.down_proj).weight
        return weight.is_cuda and hasattr(weight, "quant_state")

    def _way_that_works(self, core: Any, kind: kernel_checks.Kind) -> nf4_linear.Way | None:
        """Return the first way of decoding in registers that works here; a note says why another did not."""
        layer = core.model.layers[0]
        for way in nf4_linear.ways():
            try:
                for each in (layer.self_attn.q_proj, layer.self_attn.o_proj, layer.mlp.gate_proj, layer.mlp.down_proj):
                    nf4_linear.check_layer(way, base_of(each))
                kernel_checks.products(replace(kind, way=way))
            except Exception as error:  # a compiler on a card that it does not know may fail in any way
                self._note(f"4-bit products not by {way.NAME}, so more slowly: {_first_words(error)}")
            else:
                return way
        return None

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


def unknown(model: nn.Module) -> str | None:
    """Return what of a loaded model our decoding does not know, or None."""
    core: Any = model.get_base_model() if hasattr(model, "get_base_model") else model
    family = FamilySpec.from_config(core.config.to_dict())
    if family.general is not None:
        return family.general
    layer = core.model.layers[0]
    named = {name for part in (layer.self_attn, layer.mlp) for name, _ in part.named_children()}
    norms = {name for name in named if "norm" in name}
    if not set(TARGET_MODULES) <= named or norms != ({"q_norm", "k_norm"} if family.qk_norms else set()):
        return f"the loaded model's blocks are not those of {family.model_type}"
    return None


def _rope(config: PretrainedConfig, family: FamilySpec, device: torch.device) -> tuple[Tensor, float]:
    """Return rotary frequencies as transformers has them, fp32, one for each pair, and the factor on cos and sin."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    if family.rope != "default":
        return ROPE_INIT_FUNCTIONS[family.rope](config, device)
    exponent = torch.arange(0, family.shape.head_dim, 2, dtype=torch.float32) / family.shape.head_dim
    return (1.0 / config.rope_parameters["rope_theta"] ** exponent).to(device), 1.0
