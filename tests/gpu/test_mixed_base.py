"""Our blocks over a stored base of which some layers have 4 bits and some 16, beside PEFT's own layers.

Run on a machine with an NVIDIA GPU: pytest -m gpu tests/gpu/test_mixed_base.py
"""

from __future__ import annotations

from pathlib import Path

import pytest

pytestmark = pytest.mark.gpu

POCKET = Path(__file__).parents[2] / "fast_ft" / "pocket"


def test_our_blocks_train_it_as_pefts_layers_do(tmp_path: Path) -> None:
    import torch

    from bench.agreement import disagreements, first_step
    from fast_ft.data.dataset import load_pool
    from fast_ft.data.encoding import Encoder
    from fast_ft.models.loaders import choose
    from fast_ft.plan.run_plan import TrainPlan
    from fast_ft.recipe import schema
    from tests.helpers.bases import save_in_4_bits

    skipped = ["lm_head", "model.layers.0.mlp", "model.layers.1.self_attn.v_proj"]
    base = save_in_4_bits(tmp_path / "base", POCKET / "base", skipped)
    encoder = Encoder(base)
    rows = [encoder.row(each) for each in load_pool(schema.Data(train=str(POCKET / "train.json"))).examples(range(8))]
    section = schema.Model(name_or_path=str(base), dtype="float16", max_length=512)
    found = {}
    for name in ("peft", "fused"):
        loaded = choose.make_loader(section, schema.Lora(), seed=1, name=name).for_training()
        if name == "fused":
            layers = loaded.model.get_base_model().model.layers
            kinds = {type(group.weights).__name__ for layer in layers for group in layer.forward.block.groups}
            assert kinds == {"FourBitWeights", "MixedWeights", "Weights"}
        torch.manual_seed(3)
        with torch.no_grad():
            for key, weight in loaded.model.named_parameters():
                if "lora_B" in key:
                    weight.normal_(std=0.02)
        found[name] = first_step(loaded, rows, pad_id=0, plan=TrainPlan(8), work_folder=tmp_path)
    assert disagreements(found["peft"], found["fused"]) == []
