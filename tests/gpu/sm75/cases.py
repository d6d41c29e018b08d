"""A T4's code path on a newer card. test_sm75.py runs this file in a process of its own: it changes Triton for good.

    python -m pytest -m gpu tests/gpu/sm75/cases.py

With SM75_RESULT=FILE, what was executed is kept as a raw result. Speed here means nothing. The last test counts what
was executed, so it wants all the others before it.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("no NVIDIA GPU", allow_module_level=True)

from tests.gpu.sm75 import hook  # before Triton compiles anything

hook.pretend_t4()

from tests.gpu.sm75 import inventory  # noqa: E402
from tests.gpu.sm75.calls import HEAD, HIDDEN, INNER, Call, calls  # noqa: E402
from tests.helpers.parts import POCKET  # noqa: E402

pytestmark = pytest.mark.gpu

#: Two layers of a shape that our blocks take, wide enough that 4-bit weights are cut as a 7B's are.
WIDE = {
    "model_type": "llama", "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 2048, "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5, "hidden_act": "silu",
}  # fmt: skip


@pytest.mark.parametrize("call", calls(small=False).values(), ids=calls(small=False))
def test_a_kernel_says_what_torch_says(call: Call) -> None:
    torch.manual_seed(0)
    pairs = list(call("cuda"))
    assert pairs
    for made, expected, within in pairs:
        made, expected = made.float(), expected.float()
        assert bool(torch.isfinite(made).all()) == bool(torch.isfinite(expected).all())
        assert ((made - expected).norm() / expected.norm().clamp(min=1e-12)).item() < within


@pytest.mark.parametrize("kv_heads", [32, 8])
def test_the_start_up_check_of_training_passes(kv_heads: int) -> None:
    from fast_ft.hub.families import ModelShape
    from fast_ft.models.fused_block import block

    shape = ModelShape(HIDDEN, INNER, 32, 32, kv_heads, HEAD, 32000, False)
    assert block.check(torch.empty(1, dtype=torch.float16, device="cuda"), shape) is None


def test_the_start_up_check_of_decoding_passes_and_products_are_bitsandbytes() -> None:
    from fast_ft.generate.engine import ops_torch
    from fast_ft.generate.engine.fused_model import FusedModel
    from fast_ft.generate.engine.nf4_linear import fused_rows
    from fast_ft.models.random_base import random_model

    model = FusedModel(random_model(WIDE, "float16"))
    assert model.ops is not ops_torch, "Triton's kernels were refused"
    assert not model.planes and fused_rows(model.device) == 64


def test_the_cuda_product_for_it_says_what_bitsandbytes_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing chooses it yet. Here the driver compiles its PTX for sm_75; its times mean nothing."""
    from fast_ft.generate.engine import nf4_turing, nvrtc
    from fast_ft.generate.engine.product_times import time_products

    def portable(source: str, options: tuple[str, ...], capability: tuple[int, int]) -> bytes:
        assert capability == (7, 5)
        return nvrtc.compiled(source, options, capability, portable=True)

    monkeypatch.setattr(nf4_turing, "compiled", portable)
    nf4_turing.kernel.cache_clear()
    found = time_products([(4096, 4096), (1000, 192)], [1, 16, 31, 64], "float16", "cuda:0")
    print(*found, sep="\n")
    assert {each["way"] for each in found} == {"bitsandbytes", nf4_turing.NAME}
    assert all(each["off"] < 0.002 for each in found), "a failed one has no difference"


def test_a_pool_decodes_as_the_model_does_and_its_steps_are_captured() -> None:
    from bench.agreement_decode import teacher_forced
    from fast_ft.generate.engine.fused_model import FusedModel
    from fast_ft.generate.engine.kv_cache import KVCache
    from fast_ft.generate.engine.llm_engine import LLMEngine
    from fast_ft.generate.engine.model_runner import EngineConfig
    from fast_ft.generate.engine.sampler import Sampler
    from fast_ft.generate.engine.sequence import Sequence
    from fast_ft.models.random_base import random_model

    model = random_model(WIDE, "float16")
    parts = FusedModel(model)
    config = EngineConfig(slots=16, longest=200, end_ids=(2,), pad_id=0)
    engine = LLMEngine(parts, KVCache(parts, 120), Sampler(False), config)
    prompts = [[1, *(3 + (7 * i + j) % 300 for j in range(5 + 3 * i))] for i in range(24)]
    rows = [Sequence(prompt, 4 + index, key=index) for index, prompt in enumerate(prompts)]
    list(engine.run(rows))
    assert engine.runner.graphs.works and engine.runner.graphs.count, "bitsandbytes' products were not captured"
    assert teacher_forced(model, prompts, [row.tokens for row in rows])["argmax_agrees"] >= 0.98


@pytest.mark.parametrize("quantised", [False, True], ids=["16 bits", "4 bits"])
def test_a_whole_run_trains_and_answers(tmp_path: Path, quantised: bool) -> None:
    """From a recipe to answers through our own blocks, in fp16, as `auto` chooses it on a T4; the loss falls."""
    from fast_ft.pipeline.run import run
    from fast_ft.recipe.loader import validated

    data = POCKET.parent
    tree: dict[str, Any] = {
        "output_dir": str(tmp_path / "run"),
        "model": {
            "name_or_path": str(wide_base(tmp_path) if quantised else POCKET), "max_length": 256, "backend": "fused",
            "load_in_4bit": quantised,
        },
        "data": {"train": str(data / "train.json"), "test": str(data / "test.json")},
        "select": {"take": 16},
        "train": {
            "effective_batch_size": 8, "num_train_epochs": 6, "warmup_steps": 0, "learning_rate": 2e-3,
            "gradient_checkpointing": True,
        },
        "generate": {"do_sample": False, "max_new_tokens": 16},
        "judge": {"kind": "none", "base_prompts": 0},
    }  # fmt: skip
    run(validated(tree, {}, "test"), "test.yaml")
    trained = json.loads((tmp_path / "run" / "manifest.json").read_text())["phases"]["train"]
    assert (trained["backend"], trained["dtype"]) == ("fused", "float16")
    assert trained["last_epoch_loss"] < 0.95 * trained["first_epoch_loss"]
    assert len(json.loads((tmp_path / "run" / "pred.json").read_text())) == 100


def wide_base(folder: Path) -> Path:
    """Write a random base of WIDE's shape, with the pocket's tokenizer."""
    import shutil

    import transformers

    torch.manual_seed(1)
    config = transformers.LlamaConfig(**{**WIDE, "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2})
    transformers.LlamaForCausalLM(config).save_pretrained(str(folder / "base"))
    for path in POCKET.glob("tokenizer*"):
        shutil.copy(path, folder / "base")
    return folder / "base"


def test_every_kernel_of_a_t4_was_executed(request: pytest.FixtureRequest) -> None:
    missing = inventory.COVERED - hook.seen
    assert not missing, f"never launched as sm_75: {sorted(missing)}"
    assert not hook.seen & set(inventory.NOT_ON_A_T4), "a T4 ran what it is said never to run"
    print(f"executed as sm_75: {len(hook.seen)} kernels of {len(inventory.kernels())}")
    if path := os.environ.get("SM75_RESULT"):
        write_result(Path(path), failed=request.session.testsfailed, tests=request.session.testscollected)


def write_result(path: Path, *, failed: int, tests: int) -> None:
    """Keep what was executed, as a raw result that figures are made of."""
    from bench import machine

    content = {
        "kind": "sm75", **machine.stamp("python -m pytest -m gpu tests/gpu/test_sm75.py"), "tests": tests,
        "failed": failed, "executed": sorted(".".join(each) for each in hook.seen),
        "on_a_t4": sorted(".".join(each) for each in inventory.COVERED),
        "not_on_a_t4": {".".join(each): reason for each, reason in inventory.NOT_ON_A_T4.items()},
    }  # fmt: skip
    path.write_text(json.dumps(content, indent=1), encoding="utf-8")
