"""Bases of which some layers have 4 bits and some 16: each group is multiplied as its own weights ask.

A card's branches run here on the CPU: bitsandbytes' weights say that they lie on a card, and a way in plain torch
stands for the kernels that decode in registers. It wants columns in an order of its own and leaves parts, as they do.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from fast_ft.generate.engine import group_products, kernel_checks, kernel_compare, nf4_linear, ops_torch, product_choice
from fast_ft.generate.engine.first_half import FirstHalf
from fast_ft.generate.engine.fused_model import FusedModel
from fast_ft.generate.engine.projections import Product
from fast_ft.generate.engine.scheduler import shapes
from fast_ft.models import nf4
from fast_ft.models.loaders import choose
from fast_ft.models.loaders.base import LoaderBase
from fast_ft.pipeline import adapter_loading
from fast_ft.plan.decode_pool import DecodePlan
from fast_ft.recipe import schema
from tests.helpers.adapters import draw_lora_b
from tests.helpers.bases import save_in_4_bits
from tests.helpers.parts import save_random_llama

#: A block's MLP, one of three layers that share an input, and the layers of no other group.
SKIPPED = ["lm_head", "model.layers.0.mlp", "model.layers.1.self_attn.v_proj"]


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bases")
    return save_in_4_bits(folder / "mixed", save_random_llama(folder / "whole", hidden=128, layers=3), SKIPPED)


def maker_of(base: Path, **lora: Any) -> LoaderBase:
    section = schema.Model(name_or_path=str(base), max_length=64, dtype="bfloat16")
    return choose.make_loader(section, schema.Lora(r=4, lora_alpha=8, **lora), seed=1, name="peft")


def tuned(base: Path, **lora: Any) -> Any:
    """A model in training mode: in the other one a CPU's 4-bit weights are packed again at the first pass."""
    model = maker_of(base, **lora).for_training().model
    torch.manual_seed(3)
    draw_lora_b(model, std=0.2)
    return model


def decoded(words: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """The weights of a product in registers, (N, K) fp32."""
    packed = words.contiguous().view(torch.uint8)
    codes = torch.stack((packed >> 4, packed & 15), dim=-1).flatten(1)
    pairs = scales.T.contiguous().view(torch.bfloat16).view(len(words), -1, 2)
    scale = pairs.float().sum(dim=-1) * nf4.FACTOR["bfloat16"]
    return torch.tensor(nf4.CODES)[codes.long()] * scale.repeat_interleave(nf4.BLOCK, dim=1)


def whole(x: torch.Tensor) -> torch.Tensor:
    return x.sum(dim=0).to(torch.bfloat16) if x.dim() == 3 else x


WAY: Any = ModuleType("a.way_of_ours")
WAY.NAME, WAY.MULTIPLE, WAY.CAPABILITY, WAY.NEWEST = "a way", 128, (0, 0), None
WAY.order_for = lambda rows: nf4.Order.PLANES
WAY.parts_for = lambda *given: 2


def _product(x: torch.Tensor, words: Any, scales: Any, xa: torch.Tensor | None, b: Any) -> torch.Tensor:
    y = x.float() @ nf4.to_planes(decoded(words, scales)).T
    return torch.stack([y, torch.zeros_like(y) if xa is None else xa.float() @ b.float().T])


WAY.product = _product


def _add_norm(
    x: Any, delta: Any, weight: Any, eps: float, *, order: nf4.Order = nf4.Order.ROWS, first: Any = None
) -> torch.Tensor:
    made = ops_torch.add_norm(x, None if delta is None else whole(delta), weight, eps, first=first)
    return nf4.arranged(made, order)


OPS = SimpleNamespace(
    **vars(ops_torch)
    | {
        "add_norm": _add_norm,
        "gated": lambda x, dtype, *, order, first: nf4.arranged(ops_torch.gated(whole(x), dtype, first=first), order),
    }
)


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> list[kernel_checks.Kind]:
    """4-bit weights seem to lie on a card, on which WAY and OPS work; what these were checked for."""
    import bitsandbytes

    asked: list[kernel_checks.Kind] = []

    def kernels(self: Any, kind: kernel_checks.Kind, bases: Any, *, wanted: bool) -> Any:
        asked.append(kind.by(WAY if bases else None))
        return (OPS, WAY) if bases else (OPS, None)

    def dequantise(words: torch.Tensor, scales: torch.Tensor, out: torch.Tensor) -> None:
        out.copy_(decoded(words, scales))

    kernel: Any = SimpleNamespace(dequantise=dequantise)
    monkeypatch.setitem(sys.modules, "fast_ft.generate.engine.nf4_triton", kernel)
    monkeypatch.setattr(sys.modules["fast_ft.generate.engine"], "nf4_triton", kernel, raising=False)
    monkeypatch.setattr(FusedModel, "_kernels", kernels)
    monkeypatch.setattr(bitsandbytes.nn.Params4bit, "is_cuda", property(lambda weight: True), raising=False)
    monkeypatch.setattr(nf4_linear, "fused_rows", lambda device: 0)
    right = bitsandbytes.functional.dequantize_4bit

    def into(packed: Any, state: Any, out: torch.Tensor | None = None) -> torch.Tensor:
        """As on a card: a CPU's build writes into no given tensor."""
        made: torch.Tensor = right(packed, state)
        return made if out is None else out.copy_(made)

    monkeypatch.setattr(bitsandbytes.functional, "dequantize_4bit", into)
    return asked


def hidden(fused: FusedModel, rows: int, *, few: bool) -> torch.Tensor:
    """What a pass gives whose attention lets each token see itself alone; its values stand for what it mixes."""
    width = fused.heads * fused.head_dim

    def attend(layer: int, qkv: torch.Tensor, rope: Any, first: FirstHalf | None) -> torch.Tensor:
        mixed = whole(qkv)[:, -width:].contiguous()
        if first is not None:
            torch.mm(mixed, first.a_ER, out=first.xa_TR)
        return nf4.arranged(mixed, fused.order(layer, rows) if few else nf4.Order.ROWS)

    with torch.no_grad():
        return fused.forward(torch.arange(300, 300 + rows), torch.arange(rows), attend, few=few).float()


def kinds(fused: FusedModel) -> str:
    """R for each product in registers, p for each other one, a word for each layer."""
    products = [(layer[1], layer[2], layer[4], layer[5]) for layer in fused.layers]
    return " ".join("".join("R" if isinstance(p, nf4_linear.InRegisters) else "p" for p in row) for row in products)


@pytest.mark.parametrize(
    ("lora", "expected"),
    [
        ({}, "RRpp pRRR RRRR"),
        ({"target_modules": ("q_proj", "v_proj"), "use_dora": True}, "pRpp pRRR pRRR"),
        ({"use_dora": True}, "pppp pppp pppp"),
    ],
    ids=["plain", "dora on some", "dora on all"],
)
def test_each_group_is_multiplied_as_its_own_weights_ask(
    mixed: Path, lora: dict[str, Any], expected: str, card: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is turned to 16 bits for good, which no plan counts; and what is made says the same as PEFT's layers."""
    monkeypatch.setattr(group_products, "dequantised", lambda *given: pytest.fail("held in 16 bits"))
    model = tuned(mixed, **lora)
    fused = FusedModel(model)
    assert kinds(fused) == expected and fused.planes == ("R" in expected)
    assert card[-1].mixed == ("R" in expected)
    made = [hidden(fused, 3, few=fused.planes), hidden(fused, 20, few=False)]
    monkeypatch.undo()
    plain = FusedModel(model)
    for each in made:
        right = hidden(plain, len(each), few=False)
        assert ((each - right).norm() / right.norm()).item() < 0.03


def test_where_memory_allows_4_bit_layers_alone_become_16_bit_ones(mixed: Path, card: Any) -> None:
    model = tuned(mixed)
    fused = FusedModel(model, dequantise=True)
    assert kinds(fused) == "pppp pppp pppp" and not fused.planes
    gate = model.get_base_model().model.layers[0].mlp.gate_proj.base_layer.weight
    with torch.no_grad():
        before = fused.layers[0][4].base(torch.eye(128, dtype=torch.bfloat16))
        gate.mul_(2)
        after = fused.layers[0][4].base(torch.eye(128, dtype=torch.bfloat16))
    assert after[:, : len(gate)].equal(2 * before[:, : len(gate)]), "16-bit weights are not copied"


def test_a_base_of_4_bits_throughout_is_multiplied_as_ever(
    mixed: Path, tmp_path: Path, card: list[kernel_checks.Kind]
) -> None:
    base = save_in_4_bits(tmp_path / "base", save_random_llama(tmp_path / "whole", hidden=128), None)
    fused = FusedModel(tuned(base))
    assert kinds(fused) == "RRRR RRRR" and not card[-1].mixed and card[-1].orders == [nf4.Order.PLANES]
    assert [fused.order(layer, 3) for layer in (0, 1)] == [nf4.Order.PLANES] * 2


@pytest.mark.parametrize("lora", [{}, {"target_modules": ("o_proj",), "use_dora": True}, {"use_dora": True}], ids=str)
def test_kernels_are_compiled_ahead_for_what_decoding_asks(
    mixed: Path, lora: dict[str, Any], card: list[kernel_checks.Kind], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A check that was made ahead for another kind would be made again, while the card waits."""
    asked: list[kernel_checks.Kind] = []
    monkeypatch.setattr(kernel_checks, "ahead", lambda kind, *given: asked.append(kind))
    maker = maker_of(mixed, **lora)
    recipe: Any = SimpleNamespace(model=maker.section, lora=maker.lora, generate=schema.Generate())
    monkeypatch.setattr(adapter_loading, "base_family", lambda recipe: maker.family)
    FusedModel(tuned(mixed, **lora), step_rows=shapes(8, planes=True))
    maker.device = "cuda"
    adapter_loading._compile_ahead(recipe, SimpleNamespace(prompts=[0] * 8), DecodePlan(8), maker)  # type: ignore[arg-type]
    (ahead,) = asked
    assert replace(ahead.by(WAY if ahead.planes else None), device="cpu") == card[-1]


def test_products_in_registers_alone_decide_over_their_speed(
    mixed: Path, card: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    timed: list[str] = []
    monkeypatch.setattr(product_choice, "Graphs", lambda works: SimpleNamespace(capture=lambda work: work()))
    monkeypatch.setattr(product_choice, "_timed", lambda work: 1.0)
    for kind in (nf4_linear.InRegisters, Product):
        monkeypatch.setattr(
            kind, "__call__", lambda self, x, few=False, first=None: timed.append(type(self).__name__)
        )  # fmt: skip
    fused = FusedModel(tuned(mixed))
    assert product_choice.choose(fused, (3,), "") == "3:way_of_ours"
    assert timed == ["InRegisters"] * 4 * 9, "the base's nine such products, run and captured, in both ways"


def test_products_between_others_are_compared_as_these_leave_and_want_rows() -> None:
    """Parts or none, an order or none, x A or none: whatever may meet is compiled by the check."""
    met: set[tuple[int, nf4.Order, bool]] = set()

    def gated(
        x: torch.Tensor, dtype: Any, *, order: nf4.Order = nf4.Order.ROWS, first: FirstHalf | None = None
    ) -> torch.Tensor:
        met.add((len(x) if x.dim() == 3 else 1, order, first is not None))
        made = ops_torch.gated(x.sum(dim=0) if x.dim() == 3 else x, dtype, first=first)
        return nf4.arranged(made, order)

    def summed(x: Any, delta: Any, *given: Any, order: nf4.Order = nf4.Order.ROWS, **named: Any) -> torch.Tensor:
        delta = delta.sum(dim=0) if delta is not None and delta.dim() == 3 else delta
        return nf4.arranged(ops_torch.add_norm(x, delta, *given, **named), order)

    made = {
        "gated": gated,
        "add_norm": summed,
        "paged_attention": lambda *given, order, **named: nf4.arranged(
            ops_torch.paged_attention(*given, **named), order
        ),
        "rotate_into_cache": lambda qkv, *given: ops_torch.rotate_into_cache(
            qkv.sum(dim=0) if qkv.dim() == 3 else qkv, *given
        ),
        "FUSES": True,
        "splits_for": lambda rows, heads: 1,
    }
    kind = kernel_checks.Kind(
        heads=4, kv_heads=2, head_dim=32, hidden=128, inner=256, dtype="float32", device="cpu", steps=(8,),
        planes=True, mixed=True, way=WAY, ranks=(16, 16, 16, 16),
    )  # fmt: skip
    on_card = replace(kind, device="cuda:0")
    assert kernel_compare._parts(on_card, kind.products) == [1, 2]
    assert kernel_compare._parts(replace(on_card, mixed=False), kind.products) == [2]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel_checks, "_passed", set())
        patch.setattr(kernel_compare, "_parts", lambda kind, shapes: [1, 2])
        kernel_checks.attention(kind, SimpleNamespace(**vars(ops_torch) | made))
    everything = {(parts, order, half) for parts in (1, 2) for order in nf4.Order for half in (True, False)}
    assert met == {each for each in everything if each[1] != nf4.Order.PIECES}
