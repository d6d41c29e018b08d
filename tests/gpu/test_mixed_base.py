"""Our blocks over a stored base of which some layers have 4 bits and some 16, beside PEFT's own layers.

Run on a machine with an NVIDIA GPU: pytest -m gpu tests/gpu/test_mixed_base.py
"""

from __future__ import annotations

from pathlib import Path

import pytest

pytestmark = pytest.mark.gpu


def test_our_blocks_train_it_as_pefts_layers_do(tmp_path: Path) -> None:
    import torch

    from fast_ft.models.loaders import choose
    from fast_ft.recipe import schema
    from tests.helpers.bases import save_in_4_bits
    from tests.helpers.parts import POCKET
    from tests.models.test_fused_block import gradients

    skipped = ["lm_head", "model.layers.0.mlp", "model.layers.1.self_attn.v_proj"]
    base = save_in_4_bits(tmp_path / "base", POCKET, skipped)
    section = schema.Model(name_or_path=str(base), dtype="float16", max_length=64)
    found = {}
    for name in ("peft", "fused"):
        loaded = choose.make_loader(section, schema.Lora(r=8), seed=1, name=name).for_training()
        torch.manual_seed(3)
        with torch.no_grad():
            for key, weight in loaded.model.named_parameters():
                if "lora_B" in key:
                    weight.normal_(std=0.05)
        found[name] = gradients(loaded)
    layers = loaded.model.get_base_model().model.layers
    kinds = {type(group.weights).__name__ for layer in layers for group in layer.forward.block.groups}
    assert kinds == {"FourBitWeights", "MixedWeights", "Weights"}
    (loss, expected), (ours, made) = found["peft"], found["fused"]
    assert ours == pytest.approx(loss, rel=2e-3)
    both = [torch.cat([grads[key].float().flatten() for key in sorted(expected)]) for grads in (expected, made)]
    assert torch.cosine_similarity(*both, dim=0).item() > 0.999
