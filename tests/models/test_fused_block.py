"""The block's backward pass by hand against autograd, and its Triton kernels against plain torch."""

from __future__ import annotations

import types
from pathlib import Path
from typing import Any

import pytest
import torch

from fast_ft.data.encoding import IGNORE_INDEX, EncodedRow
from fast_ft.generate.engine.fused_model import FusedModel
from fast_ft.hub.families import ModelShape
from fast_ft.models import packed_attention, weight_layout
from fast_ft.models.fused_block import block, dispatch, group_weights, linear_group, ops_torch
from fast_ft.models.fused_block.lora_copies import LoraCopies
from fast_ft.models.loaders import choose
from fast_ft.models.loaders.base import LoadedModel
from fast_ft.models.packed_attention import PackedRows
from fast_ft.plan.run_plan import TrainPlan
from fast_ft.recipe import schema
from fast_ft.train.forward_backward import Passes
from fast_ft.train.micro_batch import MicroBatchShape, lay_out
from fast_ft.train.optimizer import FlatWeights
from tests.helpers.adapters import draw_lora_b
from tests.helpers.bases import save_in_4_bits
from tests.helpers.parts import POCKET


def rows(seed: int = 0) -> list[EncodedRow]:
    draw = torch.Generator().manual_seed(seed)
    made = []
    for index, length in enumerate((5, 17, 9)):
        ids = torch.randint(300, 2000, (length,), generator=draw).tolist()
        made.append(EncodedRow(f"r{index}", ids, [IGNORE_INDEX] * 2 + ids[2:]))
    return made


def gradients(loaded: LoadedModel, recompute_layers: int = 0) -> tuple[float, dict[str, torch.Tensor]]:
    shape = MicroBatchShape(places=3, longest=17, pad_id=0)
    passes = Passes(loaded, FlatWeights(loaded.model), TrainPlan(3, recompute_layers=recompute_layers), shape)
    loaded.model.zero_grad()
    loaded.model.train()
    passes.begin(25, None)
    loss = passes(lay_out(rows(), tokens=32, places=3, pad_id=0), seed=1)
    passes.close()
    return loss.item(), {n: p.grad.clone() for n, p in loaded.model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", ["mha", "gqa", "bias"])
def test_gradients_by_hand_equal_autograds(tiny: Path, tmp_path: Path, kind: str) -> None:
    import transformers

    config = transformers.AutoConfig.from_pretrained(str(tiny))
    small = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2 if kind == "gqa" else 4, "vocab_size": config.vocab_size,
    }  # fmt: skip
    kinds = {"bias": transformers.Qwen2Config}
    torch.manual_seed(3)
    model = transformers.AutoModelForCausalLM.from_config(kinds.get(kind, transformers.LlamaConfig)(**small))
    model.save_pretrained(tmp_path)
    for file in tiny.glob("tokenizer*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    section = schema.Model(name_or_path=str(tmp_path), load_in_4bit=False, max_length=64)
    made = choose.make_loader(section, schema.Lora(r=4, lora_alpha=12), seed=1,
                                name="peft").for_training()  # fmt: skip
    with torch.no_grad():
        for name, weight in made.model.named_parameters():
            if "lora_B" in name or "bias" in name:
                weight.normal_(std=0.2)
    loss, expected = gradients(made)
    assert len(expected) == 2 * 7 * 2 and all(g.abs().max() > 0 for g in expected.values())
    before = {name: weight.clone() for name, weight in made.model.state_dict().items()}
    assert block.install(made.model, made.patches) is None
    for name, weight in made.model.state_dict().items():
        assert weight.equal(before[name]), f"{name} is a view now, of the same values"
    for recomputed in (0, 1):
        ours, found = gradients(made, recomputed)
        assert ours == pytest.approx(loss, rel=1e-6)
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient, rtol=2e-4, atol=1e-6, msg=name)
    ids = torch.randint(300, 2000, (2, 9))
    with torch.no_grad():
        made.model.eval()
        assert made.model(input_ids=ids).logits.isfinite().all(), "outside of passes the layer is as it was"


@pytest.mark.parametrize("first", ["training", "decoding"])
def test_training_and_decoding_share_one_copy_of_the_weights(tiny: Path, first: str) -> None:
    """A sweep trains and answers with one base, in turns: neither may leave the other with a copy of its own."""
    section = schema.Model(name_or_path=str(tiny), load_in_4bit=False, max_length=64)
    made = choose.make_loader(section, schema.Lora(r=4), seed=1, name="peft").for_training()
    if first == "decoding":
        FusedModel(made.model)
    assert block.install(made.model, made.patches) is None
    _, expected = gradients(made)
    layers = made.model.get_base_model().model.layers
    blocks = [layer.forward.block for layer in layers]
    for _ in range(2):
        fused = FusedModel(made.model)
        for layer, each, (_, qkv, _, _, gate_up, _) in zip(layers, blocks, fused.layers, strict=True):
            q, gate = layer.self_attn.q_proj.get_base_layer().weight, layer.mlp.gate_proj.get_base_layer().weight
            for group, product, weight in ((each.groups[0], qkv, q), (each.groups[2], gate_up, gate)):
                whole = group.weights()
                assert whole.data_ptr() == weight.data_ptr()
                with torch.no_grad():  # what decoding multiplies with is that memory, too
                    before = product.base(torch.eye(64)).clone()
                    whole.mul_(2)
                    assert product.base(torch.eye(64)).equal(2 * before)
                    whole.div_(2)
    _, found = gradients(made)
    for name, gradient in expected.items():
        assert found[name].equal(gradient), name


def trained(tiny: Path) -> LoadedModel:
    """The tiny model with our blocks and a LoRA whose matrices are all drawn."""
    section = schema.Model(name_or_path=str(tiny), load_in_4bit=False, max_length=64)
    made = choose.make_loader(section, schema.Lora(r=4), seed=1, name="peft").for_training()
    draw_lora_b(made.model, std=0.2)
    assert block.install(made.model, made.patches) is None
    return made


def loss_of(model: Any) -> torch.Tensor:
    """A number that a pass over two rows leads to."""
    core = model.get_base_model()
    at = packed_attention.PackedRows(torch.tensor([0, 6, 16], dtype=torch.int32), 10)
    with packed_attention.packed_pass(core.config, at):
        ids = torch.arange(300, 316)[None]
        out: torch.Tensor = core.model(input_ids=ids, position_ids=torch.arange(16)[None], use_cache=False)[0]
        return out.pow(3).sum()  # of squares a norm would make the same sum whatever the layers do


def test_gradients_are_added_in_place_or_left_to_autograd(tiny: Path) -> None:
    """Where a matrix has a place for its gradient, a block adds to it; else autograd takes what the block returns."""
    model = trained(tiny).model
    weights = [weight for name, weight in model.named_parameters() if "lora_" in name]
    expected = torch.autograd.grad(loss_of(model), weights)
    places = [torch.full_like(weight, 3.0) for weight in weights]
    for weight, place in zip(weights, places, strict=True):
        weight.grad = place
    loss_of(model).backward()
    for weight, place, gradient in zip(weights, places, expected, strict=True):
        assert weight.grad is place and gradient.abs().max() > 0
        torch.testing.assert_close(place, gradient + 3.0)


def test_each_pass_multiplies_with_the_lora_as_it_is_then(tiny: Path) -> None:
    """Copies of the LoRA's matrices are made once a pass; an optimizer changes the matrices between two passes."""
    model = trained(tiny).model
    first = loss_of(model).item()
    flat = FlatWeights(model)  # gives the matrices other memory
    assert loss_of(model).item() == first
    with torch.no_grad():
        flat.parameter.mul_(2)
    assert loss_of(model).item() != pytest.approx(first, rel=1e-3)
    with torch.no_grad():
        flat.parameter.div_(2)
    assert loss_of(model).item() == first


@pytest.mark.parametrize("wanted", [False, True])
def test_the_first_layers_input_gets_a_gradient_only_where_something_is_trained_below(
    tiny: Path, wanted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = trained(tiny).model
    core, asked = model.get_base_model(), []
    groups = [layer.forward.block.groups[0] for layer in core.model.layers]
    right = type(groups[0]).input_gradient
    monkeypatch.setattr(
        type(groups[0]), "input_gradient", lambda self, *given: (asked.append(self), right(self, *given))[1]
    )
    core.get_input_embeddings().weight.requires_grad_(wanted)
    loss_of(model).backward()
    assert [group in asked for group in groups] == [wanted] + [True] * (len(groups) - 1)
    assert (core.get_input_embeddings().weight.grad is not None) == wanted


def test_a_loss_whose_kernel_is_wrong_is_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any model is trained with this loss, also one that our other kernels do not take."""
    wrong = types.SimpleNamespace(**vars(ops_torch))
    monkeypatch.setattr(dispatch, "ops_for", lambda tensor: wrong)
    assert dispatch.ops_of_the_loss(torch.empty(0)) is wrong
    wrong.cross_entropy_ = lambda logits, target: ops_torch.cross_entropy_(logits, target) * 1.05
    assert dispatch.ops_of_the_loss(torch.empty(0)) is ops_torch
    assert "differs from plain torch" in (dispatch.check(torch.zeros(1), 96, 100, 16) or "")
    wrong.cross_entropy_ = other_torch
    assert dispatch.ops_of_the_loss(torch.empty(0)) is ops_torch


def test_every_layer_is_looked_at_for_what_a_block_does_not_know(tiny: Path, tmp_path: Path) -> None:
    """A base's first layer may be in 16 bits and another one in 4, which a card's kernels alone unpack."""
    skipped = ["lm_head", "model.layers.0.mlp", "model.layers.0.self_attn"]
    base = save_in_4_bits(tmp_path / "base", tiny, skipped)
    section = schema.Model(name_or_path=str(base), max_length=64)
    made = choose.make_loader(section, schema.Lora(r=4), seed=1, name="peft").for_training()
    assert "not NF4 in blocks of 64 on a card" in (block.install(made.model, made.patches) or "")
    assert not hasattr(made.model.get_base_model().model.layers[1].forward, "block"), "the model is as it was"


def test_gradients_over_a_base_of_4_and_16_bits_equal_autograds(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A card's branch on the CPU: a whole group, and one layer of another, were left as they were."""
    skipped = ["lm_head", "model.layers.0.mlp", "model.layers.1.self_attn.v_proj"]
    base = save_in_4_bits(tmp_path / "base", tiny, skipped)
    section = schema.Model(name_or_path=str(base), max_length=64, dtype="float32")
    made = choose.make_loader(section, schema.Lora(r=4), seed=1, name="peft").for_training()
    draw_lora_b(made.model, std=0.2)
    loss, expected = gradients(made)
    monkeypatch.setattr(block.obstacles, "in_layers", lambda core: None)
    assert block.install(made.model, made.patches) is None
    ours, found = gradients(made)
    kinds = [type(group.weights).__name__ for layer in made.model.get_base_model().model.layers
             for group in layer.forward.block.groups]  # fmt: skip
    assert kinds == [*["FourBitWeights"] * 2, *["Weights"] * 2, "MixedWeights", *["FourBitWeights"] * 3]
    assert ours == pytest.approx(loss, rel=1e-4)
    for name, gradient in expected.items():  # bitsandbytes' backward pass on a CPU rounds to 16 bits
        assert ((found[name] - gradient).norm() / gradient.norm()).item() < 0.01, name


def test_what_a_block_does_not_know_is_named(tiny: Path) -> None:
    section = schema.Model(name_or_path=str(tiny), load_in_4bit=False, max_length=64)
    for lora, reason in (
        (schema.Lora(r=4, lora_dropout=0.1), "dropout"),
        (schema.Lora(r=4, use_dora=True), "another kind"),
    ):
        made = choose.make_loader(section, lora, seed=1, name="peft").for_training()
        assert reason in (block.install(made.model, made.patches) or "")


class Lora:
    """A linear layer in 4 bits, or whole, with a LoRA, as PEFT keeps it; or without, where the rank is 0."""

    def __init__(self, outputs: int, rank: int, draw: torch.Generator, bits: int = 4) -> None:
        from bitsandbytes.functional import quantize_4bit

        weight = torch.randn(outputs, 128, generator=draw)
        packed, state = quantize_4bit(weight, blocksize=64, quant_type="nf4")
        parameter: Any = torch.nn.Parameter(packed if bits == 4 else weight, requires_grad=False)
        if bits == 4:
            parameter.quant_state = state
        self.weight, self.bias, self.out_features, self.in_features = parameter, None, outputs, 128
        if rank:
            self.get_base_layer = lambda: types.SimpleNamespace(
                **{k: v for k, v in vars(self).items() if "lora" not in k}
            )
            self.scaling = {"default": 3.0}
            self.lora_A, self.lora_B = (
                {"default": torch.nn.Linear(*n, bias=False)} for n in ((128, rank), (rank, outputs))
            )


@pytest.mark.parametrize(
    ("ranks", "bits"),
    [
        ((8, 8, 8), (4, 4, 4)), ((11, 0, 5), (4, 4, 4)), ((8, 0, 5), (4, 4, 4)), ((0, 0, 0), (4, 4, 4)),
        ((40, 40, 40), (4, 4, 4)), ((8, 8, 8), (4, 4, 32)), ((40, 40, 40), (32, 4, 32)), ((8, 0, 5), (32, 32, 32)),
    ],
)  # fmt: skip
def test_one_product_over_weights_and_lora_is_what_two_are(ranks: tuple[int, ...], bits: tuple[int, ...]) -> None:
    """With room behind x and dy; in fp32, where nothing but the order of sums differs.

    A base may leave one of the layers as it was (llm_int8_skip_modules).
    """
    draw = torch.Generator().manual_seed(2)
    layers: Any = [Lora(*given[:2], draw, given[2]) for given in zip((96, 64, 64), ranks, bits, strict=True)]
    from bitsandbytes.functional import dequantize_4bit

    kept = [
        dequantize_4bit(layer.weight.data, layer.weight.quant_state) if each == 4 else layer.weight.data.clone()
        for layer, each in zip(layers, bits, strict=True)
    ]
    buffer, copies = group_weights.WeightBuffer(), LoraCopies(torch.float32)
    group = linear_group.LinearGroup(layers, torch.float32, buffer, copies)
    torch.testing.assert_close(group.weights(), torch.cat(kept), rtol=0, atol=1e-2)
    assert group.room == (64 if sum(ranks) in (16, 24) and {*bits} == {4} else 0)
    rows = packed_attention.PackedRows(torch.tensor([0, 9], dtype=torch.int32), 9)
    copies.renew(rows)
    x, dy, add = (torch.randn(9, n, generator=draw) for n in (128, 224, 224))
    pad = torch.nn.functional.pad
    plain, beside = group.forward(x, add), group.forward(pad(x, (0, group.room)), add)
    inner, wide = group.inner_gradient(dy), pad(dy, (0, group.room))
    inside = group.inner_gradient(wide)
    for made, expected in (
        (beside[0], plain[0]), (beside[1], plain[1]), (inside, inner),
        (group.input_gradient(wide, inside), group.input_gradient(dy, inner)),
    ):  # fmt: skip
        torch.testing.assert_close(made, expected, rtol=1e-4, atol=1e-4)
    leaf, weight = x.clone().requires_grad_(), group.weights()
    halves = [(a, b) for a, b in zip(group.lora[::2], group.lora[1::2], strict=True)]
    y = (
        add
        + leaf @ weight.t()
        + torch.cat([3.0 * (leaf @ a.t()) @ b.t() if len(a) else leaf.new_zeros(9, len(b)) for a, b in halves], dim=1)
    )
    torch.testing.assert_close(plain[0], y, rtol=1e-4, atol=1e-4)
    trained = [each for each in group.lora if each.numel()]
    expected = torch.autograd.grad(y, [leaf, *trained], dy)
    torch.testing.assert_close(group.input_gradient(dy, inner), expected[0], rtol=1e-4, atol=1e-4)
    found = [each for each in group.lora_gradients(x, dy, inner, plain[1]) if each.numel()]
    for made, right in zip(found, expected[1:], strict=True):
        torch.testing.assert_close(made, right, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("rank", "bits"), [(8, (4, 4)), (3, (4, 4)), (4, (4, 16)), (40, (16, 16))])
def test_what_a_lora_adds_is_not_lost_in_rounding(rank: int, bits: tuple[int, ...]) -> None:
    """In bf16 a young LoRA adds less than half a step of the base's output. On average all of it must arrive."""
    draw = torch.Generator().manual_seed(4)
    layers: Any = [Lora(96, rank, draw, each) for each in bits]
    for layer in layers:
        if layer.weight.dtype == torch.float32:
            layer.weight.data = layer.weight.data.bfloat16()
        layer.lora_A["default"].weight.data = torch.randn(rank, 128, generator=draw)
    copies = LoraCopies(torch.bfloat16)
    group = linear_group.LinearGroup(layers, torch.bfloat16, group_weights.WeightBuffer(), copies)
    x = torch.nn.functional.pad(torch.randn(512, 128, generator=draw).bfloat16(), (0, group.room))
    made = []
    for size in (0.0, 4e-4 * rank**-0.5):
        for layer in layers:
            layer.lora_B["default"].weight.data = size * torch.randn(96, rank, generator=draw.manual_seed(5))
        copies.renew(packed_attention.PackedRows(torch.tensor([0, 512], dtype=torch.int32), 512))
        made.append(group.forward(x.clone())[0].float())
    xa = x[:, :128].float() @ group.a_RE.float().t() * group.scaling
    added = torch.cat([xa[:, i * rank : (i + 1) * rank] @ each.lora_B["default"].weight.bfloat16().float().t()
                       for i, each in enumerate(layers)], dim=1)  # fmt: skip
    assert added.square().mean().sqrt() < 2**-9 * made[0].square().mean().sqrt(), "less than half a step"
    arrived = ((made[1] - made[0]) * added).sum() / added.square().sum()
    assert 0.9 < arrived < 1.1


def test_a_gradients_room_is_found_again_where_a_block_made_it() -> None:
    whole = torch.arange(30.0).view(3, 10).clone()
    part = whole[:, :6].unsqueeze(0).squeeze(0)
    assert block._with_room(part, 4) is whole
    for other in (part.clone(), torch.zeros(3, 11)[:, :6], whole[:, 1:7].clone()):
        found = block._with_room(other, 4)
        assert found.shape == (3, 10) and found[:, :6].equal(other) and not found[:, 6:].any()
    assert block._with_room(whole.t(), 0).is_contiguous()


def test_weights_are_laid_side_by_side_once() -> None:
    """Packed 4-bit weights are columns of bytes. What lies in another order, or elsewhere, is still copied."""
    pieces = [torch.nn.Parameter(torch.full((n, 1), n, dtype=torch.uint8), requires_grad=False) for n in (6, 4, 2)]
    whole = weight_layout.side_by_side(pieces)
    again = weight_layout.side_by_side(pieces)
    assert again.data_ptr() == whole.data_ptr() == pieces[0].data_ptr() and again.equal(whole)
    for others in (pieces[::-1], pieces[::2], [pieces[0], pieces[2].clone()]):
        values = torch.cat([each.data for each in others])
        assert weight_layout.side_by_side(others).equal(values)


def test_a_layers_4_bit_weights_lie_in_one_block_when_a_base_is_loaded() -> None:
    """Groups that are laid side by side later find them so, and leave no holes between weights that stay."""
    section = schema.Model(name_or_path=str(POCKET), load_in_4bit=True, max_length=64)
    model = choose.make_loader(section, schema.Lora(r=4), seed=1, name="peft").for_training().model.get_base_model()
    for layer in model.model.layers:
        packed = [each for each in layer.parameters() if hasattr(each, "quant_state")]
        assert len(packed) == 7
        whole, before = weight_layout.side_by_side(packed), [each.clone() for each in packed]
        assert whole.data_ptr() == packed[0].data_ptr(), "nothing was moved"
        for group in (packed[:3], packed[4:6]):
            assert weight_layout.side_by_side(group).data_ptr() == group[0].data_ptr()
        assert all(each.equal(value) for each, value in zip(packed, before, strict=True))


def test_four_bits_unpack_as_bitsandbytes_does() -> None:
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    weight = torch.randn(96, 256, generator=torch.Generator().manual_seed(1))
    for nested in (False, True):
        packed, state = quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=nested)
        groups = None
        if nested:
            groups = (state.state2.code, state.state2.absmax, torch.full_like(state.state2.absmax, state.offset))
        out = torch.empty(96, 256)
        ops_torch.unpack(packed, state.absmax, groups, out)
        torch.testing.assert_close(out, dequantize_4bit(packed, state).float(), rtol=1e-6, atol=1e-7)


def test_a_check_finds_a_wrong_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    like = torch.zeros(1)
    assert dispatch.check(like, 96, 100, 16) is None
    right = ops_torch.swiglu
    wrong = types.SimpleNamespace(**vars(ops_torch))
    wrong.swiglu = lambda *given: right(*given) * 1.05
    monkeypatch.setattr(dispatch, "ops_for", lambda tensor: wrong)
    assert "differs from plain torch by 0.05" in (dispatch.check(like, 96, 100, 16) or "")


def test_a_check_unpacks_as_training_does_and_finds_a_wrong_group(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights whose 256th block and later ones are wrong: two groups of double quantisation are looked at."""
    right = ops_torch.unpack

    def wrong(packed: torch.Tensor, scale: torch.Tensor, nested: Any, out: torch.Tensor, *lora: torch.Tensor) -> None:
        right(packed, scale, nested, out, *lora)
        if nested is not None:
            out[256:] *= 1.05

    other = types.SimpleNamespace(**vars(ops_torch))
    other.unpack = wrong
    monkeypatch.setattr(dispatch, "ops_for", lambda tensor: other)
    assert "differs from plain torch by" in (dispatch.check(torch.zeros(1), 96, 100, 16) or "")


BACKWARD, ATTEND = packed_attention.backward, packed_attention.attend


def other_torch(*_: Any) -> Any:
    raise TypeError("an argument")


@pytest.mark.parametrize(
    ("name", "wrong", "reason"),
    [
        (
            "backward",
            lambda *given: [each.roll(1, dims=0) for each in BACKWARD(*given)],
            "attention's gradient differs from each row's own",
        ),
        (
            "attend",
            lambda q, k, v, *rest, **named: ATTEND(q * 2, k, v, *rest, **named),
            "attention's result differs from each row's own",
        ),
        ("forward", other_torch, "attention over packed rows does not run here (TypeError: an argument)"),
    ],
    ids=["gradients of other tokens", "another scale", "an operator of another torch"],
)
def test_the_start_up_check_covers_attention(
    monkeypatch: pytest.MonkeyPatch, name: str, wrong: Any, reason: str
) -> None:
    shape = ModelShape(64, 100, 2, 4, 2, 16, 320, False)
    assert block.check(torch.zeros(1), shape) is None
    monkeypatch.setattr(packed_attention, name, wrong)
    assert reason in (block.check(torch.zeros(1), shape) or "")


def test_the_residual_stream_is_rounded_as_seldom_as_pefts(tiny: Path, tmp_path: Path) -> None:
    """A stream's huge numbers carry the rounding of a whole pass: once more in each layer, and losses drift apart."""
    import transformers

    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=6, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=transformers.AutoConfig.from_pretrained(str(tiny)).vocab_size,
    )  # fmt: skip
    torch.manual_seed(3)
    model = transformers.LlamaForCausalLM(config).bfloat16()
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(500)  # far larger than what a layer adds
    model.save_pretrained(tmp_path)
    for file in tiny.glob("tokenizer*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    ids_1T, positions_1T = torch.randint(300, 2000, (1, 256)), torch.arange(256)[None]

    def hidden(dtype: str, *, fused: bool = False) -> torch.Tensor:
        """Return the last hidden states through our blocks or PEFT's layers."""
        section = schema.Model(name_or_path=str(tmp_path), load_in_4bit=False, max_length=256, dtype=dtype)
        made = choose.make_loader(section, schema.Lora(r=4), seed=1, name="peft").for_training()
        with torch.no_grad():
            for name, weight in made.model.named_parameters():
                if "lora_B" in name:
                    weight.copy_(torch.linspace(-0.1, 0.1, weight.numel()).view(weight.shape))
        assert not fused or block.install(made.model, made.patches) is None
        core, packed = made.model.get_base_model(), PackedRows(torch.tensor([0, 256], dtype=torch.int32), 256)
        half = dtype == "bfloat16"
        in_16_bits, row_by_row = torch.autocast("cpu", enabled=half), packed_attention.packed_pass(core.config, packed)
        with torch.no_grad(), in_16_bits, row_by_row:
            return core.model(input_ids=ids_1T, position_ids=positions_1T, use_cache=False)[0].float()

    exact = hidden("float32")
    ours, pefts = ((hidden("bfloat16", fused=fused) - exact).square().mean().sqrt() for fused in (True, False))
    assert ours < 1.1 * pefts
