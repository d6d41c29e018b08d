"""A check of a kernel for which there is no memory says nothing of the kernel: fewer slots are the answer to that."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import fast_ft.generate.engine
from fast_ft.generate.engine import cuda_graphs, kernel_checks, nf4_linear, ops_torch, packed_linear
from fast_ft.generate.engine.fused_model import FusedModel
from fast_ft.generate.engine.model_runner import ModelRunner
from fast_ft.generate.engine.sampler import Sampler
from fast_ft.models import packed_attention
from fast_ft.models.fused_block import dispatch
from fast_ft.models.loaders import choose
from fast_ft.recipe import schema

SHORT = [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"), RuntimeError("CUDA error: out of memory")]
BROKEN = RuntimeError("CUDA error: no kernel image is available")


@pytest.fixture(scope="module")
def model(tiny: Path) -> FusedModel:
    section = schema.Model(name_or_path=str(tiny), load_in_4bit=False)
    return FusedModel(choose.make_loader(section, schema.Lora(r=4), seed=1, name="peft").for_training().model)


@pytest.fixture(autouse=True)
def card(monkeypatch: pytest.MonkeyPatch) -> None:
    """Modules that need Triton, and CUDA's graphs, as far as a failing check gets."""
    for name in ("ops_triton", "draw_triton"):
        module: Any = SimpleNamespace(**vars(ops_torch) | {"Draw": None})
        monkeypatch.setitem(sys.modules, f"fast_ft.generate.engine.{name}", module)
        monkeypatch.setattr(fast_ft.generate.engine, name, module, raising=False)
    monkeypatch.setattr(nf4_linear, "ways", lambda: [SimpleNamespace(NAME="a way", __name__="a.way")])
    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, **given: contextlib.nullcontext())
    monkeypatch.setattr(cuda_graphs, "_limited", lambda: None)


def raising(error: Exception) -> Callable[..., Any]:
    def work(*given: Any, **named: Any) -> Any:
        raise error

    return work


def kind() -> kernel_checks.Kind:
    return kernel_checks.Kind(
        heads=2, kv_heads=2, head_dim=32, hidden=64, inner=128, dtype="float16", device="cpu", steps=(3,), planes=True
    )


def between_products(model: FusedModel, error: Exception, patch: pytest.MonkeyPatch) -> bool:
    patch.setattr(kernel_checks, "attention", raising(error))
    return model._kernels(kind(), [], wanted=True) == (ops_torch, None)


def in_registers(model: FusedModel, error: Exception, patch: pytest.MonkeyPatch) -> bool:
    patch.setattr(kernel_checks, "attention", lambda *given: None)
    patch.setattr(kernel_checks, "products", raising(error))
    patch.setattr(nf4_linear, "check_layer", lambda *given: None)
    return model._kernels(kind(), [None], wanted=True)[1] is None


def drawing(model: FusedModel, error: Exception, patch: pytest.MonkeyPatch) -> bool:
    patch.setattr(kernel_checks, "drawing", raising(error))
    head, ops = torch.zeros(2048, 1), SimpleNamespace(FUSES=True)
    runner: Any = SimpleNamespace(
        sampler=Sampler(False), model=SimpleNamespace(ops=ops, head=SimpleNamespace(weight=head))
    )
    return ModelRunner._draw(runner, 4, 2048) is None


def captures(model: FusedModel, error: Exception, patch: pytest.MonkeyPatch) -> bool:
    graphs = cuda_graphs.Graphs(works=True)
    return graphs.capture(raising(error)) is None and not graphs.works


def blocks(model: FusedModel, error: Exception, patch: pytest.MonkeyPatch) -> bool:
    patch.setattr(dispatch, "ops_for", lambda like: SimpleNamespace(**vars(ops_torch) | {"rms_norm": raising(error)}))
    return "do not run here" in (dispatch.check(torch.zeros(1), 8, 8, 8) or "")


def attention(model: FusedModel, error: Exception, patch: pytest.MonkeyPatch) -> bool:
    patch.setattr(packed_attention, "forward", raising(error))
    return "does not run here" in (packed_attention.check(torch.zeros(1), 2, 2, 8) or "")


def packed(model: FusedModel, error: Exception, patch: pytest.MonkeyPatch) -> bool:
    patch.setattr(packed_linear, "PackedLinear", raising(error))
    return not packed_linear._works.__wrapped__()


CHECKS = [between_products, in_registers, drawing, captures, blocks, attention, packed]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_a_check_without_memory_is_not_a_broken_kernel(
    check: Callable[..., bool], model: FusedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    for error in SHORT:
        with pytest.raises(type(error)) as raised:
            check(model, error, monkeypatch)
        assert raised.value is error
    assert check(model, BROKEN, monkeypatch), "whatever else goes wrong, the plain way is taken"
