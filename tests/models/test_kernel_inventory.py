"""Each Triton kernel is either executed as a T4 would run it, or listed with the reason why a T4 never runs it."""

from __future__ import annotations

import ast

import pytest

from tests.gpu.sm75 import inventory
from tests.gpu.sm75.inventory import COVERED, NOT_ON_A_T4, WITHIN


def test_every_kernel_is_covered_or_listed_with_a_reason() -> None:
    listed = COVERED | set(WITHIN) | set(NOT_ON_A_T4)
    unknown, gone = inventory.kernels() - listed, listed - inventory.kernels()
    assert not unknown, f"in neither tests/gpu/sm75/calls.py nor inventory.NOT_ON_A_T4: {sorted(unknown)}"
    assert not gone, f"listed, and no longer there: {sorted(gone)}"


def test_a_new_kernel_is_noticed() -> None:
    text = (
        "import triton\nfrom triton import jit\n@triton.jit\ndef one(x): pass\n"
        "@triton.jit(do_not_specialize=['x'])\ndef two(x): pass\n@jit\ndef three(x): pass\n"
        "@triton.autotune(configs=[], key=[])\n@triton.jit\ndef four(x): pass\n@torch.jit.script\ndef none(x): pass\n"
    )
    assert inventory._jitted(ast.parse(text)) == ["one", "two", "three", "four"]


@pytest.mark.parametrize("part", sorted(WITHIN))
def test_a_part_is_called_by_the_kernel_that_covers_it(part: inventory.Kernel) -> None:
    whole = WITHIN[part]
    assert whole in COVERED
    tree = ast.parse(inventory.source_of(whole).read_text(encoding="utf-8"))
    (body,) = (each for each in ast.walk(tree) if isinstance(each, ast.FunctionDef) and each.name == whole[1])
    called = {ast.unparse(each.func) for each in ast.walk(body) if isinstance(each, ast.Call)}
    assert part[1] in called


def test_the_start_up_check_of_a_t4_runs_no_first_half_of_a_product(monkeypatch: pytest.MonkeyPatch) -> None:
    """A T4's products are bitsandbytes': it has no way of products whose LoRA begins beside a norm."""
    from types import ModuleType
    from typing import Any

    from fast_ft.generate.engine import kernel_checks, kernel_compare, ops_torch
    from fast_ft.generate.engine.kernel_kind import Kind

    ordered: Any = ModuleType("a way of products")
    ordered.PLANES = False
    made, plain = list[int](), kernel_compare.first_half

    def first_half(a_ER: Any, tokens: int) -> Any:
        made.append(tokens)
        return plain(a_ER, tokens)

    monkeypatch.setattr(kernel_compare, "first_half", first_half)
    about: dict[str, Any] = {
        "heads": 4, "kv_heads": 2, "head_dim": 32, "hidden": 128, "inner": 256, "dtype": "float32", "device": "cpu",
        "steps": (8, 4), "planes": False, "ranks": (16, 16, 16, 16),
    }  # fmt: skip
    monkeypatch.setattr(kernel_compare, "_split", kernel_compare._whole)  # plain torch takes no parts
    for _, check in kernel_checks._layer_checks(Kind(**about), ops_torch):
        check()
    assert not made
    for _, check in kernel_checks._layer_checks(Kind(**about, way=ordered), ops_torch):
        check()
    assert made, "the check would run them with such products"


@pytest.mark.soak
def test_kernels_compile_for_a_t4_without_a_card_and_spill_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton is pinned in the Makefile as it is on cards; ptxas comes with it."""
    pytest.importorskip("triton", reason="Triton is there on Linux only")
    from triton import knobs

    from tests.gpu.sm75 import compile as compiling

    monkeypatch.setattr(knobs.compilation, "always_compile", True)
    found = compiling.compiled()
    assert {(each["module"], each["name"]) for each in found} == COVERED
    for each in found:
        print(each)
        assert each["target"] == "sm_75", each
        assert each["spilled"] == each["stack"] == 0, f"{each['name']} spills registers to memory"
        assert each["registers"] <= 128, each
        assert each["shared"] <= compiling.SHARED_BYTES * each["warps"] // 32, each  # its share of an SM, by threads
