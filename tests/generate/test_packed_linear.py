"""fp32 products of a few rows on a CPU: packed weights give what the plain ones give, LoRA and DoRA included."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fast_ft.generate.engine import packed_linear
from fast_ft.generate.engine.fused_model import FusedModel
from fast_ft.generate.engine.packed_linear import FEW, PackedProduct
from fast_ft.generate.engine.projections import Product, dense
from fast_ft.models.loaders import choose
from fast_ft.recipe import schema


def peft_model(folder: Path, *, dtype: str = "float32", dora: bool = False) -> Any:
    section = schema.Model(name_or_path=str(folder), load_in_4bit=False, max_length=64, dtype=dtype)
    lora = schema.Lora(r=4, lora_alpha=12, use_dora=dora)
    model = choose.make_loader(section, lora, seed=1, name="peft").for_training().model
    draw = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.copy_(torch.randn(weight.shape, generator=draw) * 0.2)
            elif "magnitude" in name:
                weight.mul_(1 + 0.2 * torch.rand(weight.shape, generator=draw))
    return model.eval().requires_grad_(False)


@pytest.mark.parametrize("kind", ["no bias", "bias", "dora"])
def test_few_rows_are_what_the_plain_product_makes_of_them(tiny: Path, kind: str) -> None:
    layer = peft_model(tiny, dora=kind == "dora").get_base_model().model.layers[0].self_attn
    modules = [layer.q_proj, layer.k_proj, layer.v_proj]
    bases = [module.get_base_layer() for module in modules]
    if kind == "bias":
        for number, base in enumerate(bases):
            base.bias = torch.nn.Parameter(torch.linspace(-1, 1 + number, base.out_features), requires_grad=False)
    plain, packed = Product(modules, dense(bases), torch.float32), PackedProduct(modules, bases)
    for count in (1, 3, FEW, FEW + 1):
        x_TE = torch.randn(count, bases[0].in_features, generator=torch.Generator().manual_seed(count))
        with torch.inference_mode():
            expected_TN, base_TN, found_TN = plain(x_TE), plain.base(x_TE), packed(x_TE)
        torch.testing.assert_close(found_TN, expected_TN, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(expected_TN, base_TN, rtol=1e-2), "the adapter changes something"
        assert found_TN.equal(expected_TN) or count <= FEW, "many rows are multiplied as before"


def test_only_plain_fp32_weights_that_are_not_too_large_are_packed(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert packed_linear._works()
    model = peft_model(tiny)
    made = FusedModel(model)
    assert all(type(product) is PackedProduct for layer in made.layers for product in layer if callable(product))
    weights = sum(w.nbytes for name, w in model.named_parameters() if "norm" not in name and "embed" not in name)
    monkeypatch.setattr(packed_linear, "MOST_BYTES", weights)
    assert packed_linear.serves(model.get_base_model())
    monkeypatch.setattr(packed_linear, "MOST_BYTES", weights - 1)
    assert type(FusedModel(model).layers[0][1]) is Product
    monkeypatch.undo()
    assert type(FusedModel(peft_model(tiny, dtype="bfloat16")).layers[0][1]) is Product


def test_a_torch_without_the_operator_goes_the_plain_way(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", lambda *_: torch.zeros(3, 24))
    packed_linear._works.cache_clear()
    try:
        assert type(FusedModel(peft_model(tiny)).layers[0][1]) is Product
    finally:
        packed_linear._works.cache_clear()
