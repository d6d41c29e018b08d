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
from fast_ft.models.fused_block import block, dispatch, ops_torch
from fast_ft.models.loaders import choose
from fast_ft.models.loaders.base import LoadedModel
from fast_ft.models.packed_attention import PackedRows
from fast_ft.plan.plans import TrainPlan
from fast_ft.recipe import schema
from fast_ft.train.forward_backward import Passes
from fast_ft.train.micro_batch import MicroBatchShape, lay_out
from fast_ft.train.optimizer import FlatWeights


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
                whole = group._weights()
                assert whole.data_ptr() == weight.data_ptr()
                with torch.no_grad():  # what decoding multiplies with is that memory, too
                    before = product.base(torch.eye(64)).clone()
                    whole.mul_(2)
                    assert product.base(torch.eye(64)).equal(2 * before)
                    whole.div_(2)
    _, found = gradients(made)
    for name, gradient in expected.items():
        assert found[name].equal(gradient), name


def test_what_a_block_does_not_know_is_named(tiny: Path) -> None:
    section = schema.Model(name_or_path=str(tiny), load_in_4bit=False, max_length=64)
    for lora, reason in (
        (schema.Lora(r=4, lora_dropout=0.1), "dropout"),
        (schema.Lora(r=4, use_dora=True), "another kind"),
    ):
        made = choose.make_loader(section, lora, seed=1, name="peft").for_training()
        assert reason in (block.install(made.model, made.patches) or "")


def test_weights_are_laid_side_by_side_once() -> None:
    """Packed 4-bit weights are columns of bytes. What lies in another order, or elsewhere, is still copied."""
    pieces = [torch.nn.Parameter(torch.full((n, 1), n, dtype=torch.uint8), requires_grad=False) for n in (6, 4, 2)]
    whole = weight_layout.side_by_side(pieces)
    again = weight_layout.side_by_side(pieces)
    assert again.data_ptr() == whole.data_ptr() == pieces[0].data_ptr() and again.equal(whole)
    for others in (pieces[::-1], pieces[::2], [pieces[0], pieces[2].clone()]):
        values = torch.cat([each.data for each in others])
        assert weight_layout.side_by_side(others).equal(values)


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
    wrong.swiglu = lambda gate_up: right(gate_up) * 1.05
    monkeypatch.setattr(dispatch, "ops_for", lambda tensor: wrong)
    assert "differs from plain torch by 0.05" in (dispatch.check(like, 96, 100, 16) or "")


def test_a_check_unpacks_as_training_does_and_finds_a_wrong_group(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights whose 256th block and later ones are wrong: two groups of double quantisation are looked at."""
    right = ops_torch.unpack

    def wrong(packed: torch.Tensor, scale: torch.Tensor, nested: Any, out: torch.Tensor) -> None:
        right(packed, scale, nested, out)
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
            lambda *given: BACKWARD(*given).roll(1, dims=0),
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
