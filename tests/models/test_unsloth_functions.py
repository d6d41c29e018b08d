"""Which functions a layer runs through: Unsloth's where its loader is asked for, and none of ours between them."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bench.step_trace import trace
from fast_ft.data.encoding import IGNORE_INDEX, EncodedRow
from fast_ft.models.fused_block import block
from fast_ft.models.loaders import choose, unsloth
from fast_ft.models.loaders.base import LoadedModel
from fast_ft.plan.run_plan import TrainPlan
from fast_ft.recipe import schema
from fast_ft.train.forward_backward import Passes
from fast_ft.train.micro_batch import MicroBatchShape
from fast_ft.train.optimizer import FlatWeights


def named(path: str) -> Callable[..., None]:
    """Return a function that says of itself that it was defined at this place."""

    def function(*_: Any) -> None: ...

    function.__module__, function.__qualname__ = path.rsplit(".", 1)
    return function


def loaded(base: Path) -> LoadedModel:
    section = schema.Model(name_or_path=str(base), load_in_4bit=False, max_length=64)
    return choose.make_loader(section, schema.Lora(r=4), seed=1, name="peft").for_training()


def as_unsloth_leaves_it(made: LoadedModel) -> None:
    """Put functions of Unsloth's names where Unsloth's loader puts its own."""
    for layer in made.model.get_base_model().model.layers:
        layer.self_attn.apply_qkv = named(unsloth.FUNCTIONS["q, k, v with LoRA"])
        layer.self_attn.apply_o = named(unsloth.FUNCTIONS["o with LoRA"])
        layer.mlp.forward = types.MethodType(named(unsloth.FUNCTIONS["MLP with LoRA"]), layer.mlp)


def test_what_does_not_run_through_unsloth_is_counted(tiny: Path) -> None:
    made = loaded(tiny)
    assert "q, k, v with LoRA of 2; o with LoRA of 2; MLP with LoRA of 2" in (
        unsloth.not_through_unsloth(made.model) or ""
    )
    as_unsloth_leaves_it(made)
    assert unsloth.not_through_unsloth(made.model) is None
    layer = made.model.get_base_model().model.layers[1]
    layer.mlp.forward = type(layer.mlp).forward.__get__(layer.mlp)
    assert "MLP with LoRA of 1" in (unsloth.not_through_unsloth(made.model) or "")


@pytest.mark.parametrize("recomputed", [0, 1])
def test_our_passes_leave_unsloths_functions_where_they_are(tiny: Path, recomputed: int) -> None:
    """Batching, recomputed layers and noise are ours; what a layer computes is not touched."""
    made = loaded(tiny)
    as_unsloth_leaves_it(made)
    layers = made.model.get_base_model().model.layers
    before = [unsloth.name_of(layer.forward) for layer in layers]
    shape = MicroBatchShape(places=3, longest=17, pad_id=0)
    plan = TrainPlan(3, recompute_layers=recomputed)
    passes = Passes(made, FlatWeights(made.model), plan, shape, noise_alpha=5.0)
    passes.open()
    assert unsloth.not_through_unsloth(made.model) is None
    for index, layer in enumerate(layers):
        inner = layer.forward
        if index < recomputed:
            assert isinstance(inner, functools.partial)
            inner = inner.args[0]  # the checkpoint calls this
        assert unsloth.name_of(inner) == before[index]
        for norm in (layer.input_layernorm, layer.post_attention_layernorm):
            assert "forward" not in vars(norm)
    passes.close()


def test_a_trace_tells_our_blocks_from_pefts_layers(tiny: Path) -> None:
    """The card's test reads this trace: it must show a block of ours where there is one, forward and backward."""
    made = loaded(tiny)
    rows = [EncodedRow(f"r{n}", [300 + n] * 9, [IGNORE_INDEX] * 2 + [300 + n] * 7) for n in range(2)]
    plain = trace(made, rows)
    assert plain["forward"]["peft.tuners.lora.layer.Linear.forward"] == 14
    assert not any("fused_block.block" in name for name in plain["forward"])  # the loss is ours with any layers
    assert block.install(made.model, made.patches) is None
    ours = trace(made, rows)
    assert ours["forward"]["fast_ft.models.fused_block.block.BlockPass.forward"] == 2
    assert ours["backward"]["BlockPassBackward"] == 2
    assert "peft.tuners.lora.layer.Linear.forward" not in ours["forward"]
