"""A Llama-like model's weights, in as few products as possible, and one pass over a flat row of tokens.

transformers' own forward takes some 60 kernels a layer with PEFT's LoRA in fp32. Here it is, by count, 9 to 11 where a
card decodes 4-bit weights in registers. They are of static shape, and fit for a CUDA graph. q, k, v are one product,
gate and up another (projections.py). What lies between is in ops_triton.py or, in plain torch, in ops_torch.py. The
weights are those of the loaded model, whichever loader made it.

Shapes: T tokens, E hidden, H heads, D head dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import rms_norm

from fast_ft.common import out_of_memory
from fast_ft.common.console import note
from fast_ft.common.errors import InputError
from fast_ft.generate.engine import kernel_checks, nf4_linear, ops_torch, packed_linear
from fast_ft.generate.engine.first_half import FirstHalf
from fast_ft.generate.engine.group_products import GroupProducts, groups_of, is_decodable
from fast_ft.generate.engine.projections import Linear, base_of, ranks_of
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
    and for a cache of `kv_bits`. `ops` is the module ops_triton or ops_torch. `planes`: there are products that decode
    4-bit weights in registers for few rows; which ones do hangs on each one's weights (group_products.py). What makes
    x for a product makes it in the order that this product wants. InputError where `unknown` finds something.
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
        self.notes: list[str] = []  #: why kernels that were asked for are not used
        groups = [group for layer in core.model.layers for group in groups_of(layer)]
        decodable = [] if dequantise else [group for group in groups if is_decodable(group)]
        kind = self._kind(groups, len(decodable), tuple(step_rows), kv_bits)
        bases = [base_of(module) for group in decodable for module in group]
        self.ops, self._way = self._kernels(kind, bases, wanted=kernels and self.device.type == "cuda")
        packs = packed_linear.serves(core)
        product = GroupProducts(self.dtype, self.device, self._way, dequantise, packs, workspace_mib)
        with torch.no_grad():
            self._multiply_by_head: Linear = self.head
            if packs:
                self._multiply_by_head = packed_linear.PackedLinear(self.head.weight, self.head.bias, self.head)
            self.layers = [_layer(layer, product) for layer in core.model.layers]
            norms = [self._head_norms(layer) for layer in core.model.layers] if self.family.qk_norms else []
        self._norms_ND: list[Tensor] = norms
        self.dequantised_at: frozenset[int] = frozenset()  #: rows of steps whose weights are dequantised all the same

    @property
    def planes(self) -> bool:
        """Whether there are products that decode 4-bit weights in registers for few rows."""
        return self._way is not None

    @property
    def way_name(self) -> str | None:
        """What a plan calls the kernel for few rows; None without one."""
        return self._way.__name__.rpartition(".")[2] if self._way is not None else None

    def order(self, layer: int, rows: int) -> Order:
        """Return the order in which attention must leave that many rows of a step for a layer's next product."""
        return self.layers[layer][2].order(rows) if self.takes_few(rows) else Order.ROWS

    def takes_few(self, rows: int) -> bool:
        """Return whether steps of that many rows decode 4-bit weights in registers."""
        return self.planes and rows <= nf4_linear.FEW and rows not in self.dequantised_at

    @property
    def few_rows(self) -> str | None:
        """The name of the kernel that decodes 4-bit weights in registers for few rows; None without one."""
        return self._way.NAME if self._way is not None else None

    def forward(
        self, ids_T: Tensor, position_T: Tensor, attend: Attend, *, few: bool = False, keep_P: Tensor | None = None
    ) -> Tensor:
        """Return the last hidden states, normalised, TE; with `keep_P` only those of these tokens, PE.

        `few` decodes 4-bit weights in registers; attend must then give the model's `order` for that many rows.
        """
        ops, eps = self.ops, self.eps
        cos_sin = ops.rope(position_T, self._frequencies, self._rope_scale, self.dtype)
        x_TE, delta = self.embed(ids_T), None

        def first(product: Any) -> FirstHalf | None:
            return product.first(len(ids_T)) if few else None

        def order(product: Any) -> Order:
            return product.order(len(ids_T)) if few else Order.ROWS

        for index, (norm_1, qkv, out, norm_2, gate_up, down) in enumerate(self.layers):
            before = first(qkv)
            hidden_TE = ops.add_norm(x_TE, delta, norm_1, eps, order=order(qkv), first=before)
            qkv_TN, before = self._normed(index, qkv(hidden_TE, few, before)), first(out)
            mixed_TN = attend(index, qkv_TN, cos_sin, before)
            if keep_P is not None and index == len(self.layers) - 1:
                mixed_TN, x_TE = mixed_TN[keep_P], x_TE[keep_P]
            delta, before = out(mixed_TN, few, before), first(gate_up)
            hidden_TE = ops.add_norm(x_TE, delta, norm_2, eps, order=order(gate_up), first=before)
            both_TN, before = gate_up(hidden_TE, few, before), first(down)
            delta = down(ops.gated(both_TN, self.dtype, order=order(down), first=before), few, before)
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

    def _kind(
        self, groups: Sequence[Sequence[Any]], decodable: int, steps: tuple[int, ...], kv_bits: int
    ) -> kernel_checks.Kind:
        """Return what kernels are checked for where `decodable` groups of layers can be decoded in registers."""
        qkv, out, gate_up, down = map(ranks_of, groups[:4])
        return kernel_checks.Kind(
            heads=self.heads, kv_heads=self.kv_heads, head_dim=self.head_dim, hidden=self.family.shape.hidden_size,
            inner=self.family.shape.intermediate_size, dtype=str(self.dtype).removeprefix("torch."),
            device=str(self.device), steps=steps, planes=decodable > 0, kv_bits=kv_bits,
            ranks=(qkv, out, gate_up, down), mixed=0 < decodable < len(groups),
        )  # fmt: skip

    def _kernels(
        self, kind: kernel_checks.Kind, bases: Sequence[Any], *, wanted: bool
    ) -> tuple[Any, nf4_linear.Way | None]:
        """Return the module of Triton kernels and the way for few rows, where `wanted` and as far as they work here.

        Else the module is ops_torch, and the way None. `bases` are the layers that can be decoded in registers.
        """
        if not wanted:
            return ops_torch, None
        way = self._way_that_works(kind, bases) if bases else None
        ops = self._kernels_between(kind.by(way))
        return ops, None if ops is ops_torch else way

    def _way_that_works(self, kind: kernel_checks.Kind, bases: Sequence[Any]) -> nf4_linear.Way | None:
        """Return the first way of decoding in registers that works here; a note says why another did not."""
        for way in nf4_linear.ways():
            try:
                for base in bases:
                    nf4_linear.check_layer(way, base)
                kernel_checks.products(kind.by(way))
            except Exception as error:  # a compiler on a card that it does not know may fail in any way
                if out_of_memory.is_short(error):
                    raise
                self._note(f"4-bit products not by {way.NAME}, so more slowly: {_first_words(error)}")
            else:
                return way
        return None

    def _kernels_between(self, kind: kernel_checks.Kind) -> Any:
        """Return the module of Triton kernels if it works here and agrees with plain torch; else plain, and say why."""
        try:
            from fast_ft.generate.engine import ops_triton

            kernel_checks.attention(kind, ops_triton)
        except Exception as error:
            if out_of_memory.is_short(error):
                raise
            self._note(f"decoding without the Triton kernels, more slowly: {_first_words(error)}")
            return ops_torch
        return ops_triton

    def _note(self, text: str) -> None:
        self.notes.append(text)
        note(f"note: {text}")


def _layer(layer: Any, product: GroupProducts) -> tuple[Any, ...]:
    """Return a block's norms and products in the order in which a pass takes them."""
    qkv, out, gate_up, down = map(product, groups_of(layer))
    return layer.input_layernorm.weight, qkv, out, layer.post_attention_layernorm.weight, gate_up, down


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
