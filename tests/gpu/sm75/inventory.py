"""Every Triton kernel of fast_ft, by its source, and which of them a T4 (compute capability 7.5) runs."""

from __future__ import annotations

import ast
from pathlib import Path

from tests.helpers.parts import ROOT

Kernel = tuple[str, str]  #: module below fast_ft, function

_FUSED, _UNPACK = "models.fused_block.ops_triton", "models.fused_block.unpack_triton"
_ADAMW = "train.adamw_8bit_triton"
_ENGINE, _NF4 = "generate.engine.ops_triton", "generate.engine.nf4_triton"
_PAGES, _DRAW = "generate.engine.attention_triton", "generate.engine.draw_triton"
_FIRST = "generate.engine.first_half_triton"
#: What calls.py launches. A kernel that is new belongs here, with a call of its own there, or below.
COVERED: frozenset[Kernel] = frozenset(
    {
        (_FUSED, "_rms_norm"), (_FUSED, "_rms_norm_backward"), (_FUSED, "_rotate"), (_FUSED, "_rotate_back"),
        (_FUSED, "_swiglu"),
        (_FUSED, "_swiglu_backward"), (_UNPACK, "_unpack"), (_FUSED, "_cross_entropy"), (_ADAMW, "_step"),
        (_PAGES, "_attend"), (_ENGINE, "_rotate"), (_ENGINE, "_add_norm"), (_ENGINE, "_gate"), (_DRAW, "_draw"),
    }
)  # fmt: skip
#: Parts of the kernels above: each is compiled within one that calls it.
WITHIN: dict[Kernel, Kernel] = {
    (_UNPACK, "pairs"): (_UNPACK, "_unpack"),
    (_FUSED, "_clear"): (_FUSED, "_rms_norm"),
    (_ADAMW, "_unit"): (_ADAMW, "_step"),
    (_ADAMW, "_code_of"): (_ADAMW, "_step"),
    (_FIRST, "begin"): (_ENGINE, "_gate"),
    (_FIRST, "place"): (_ENGINE, "_gate"),
    (_FIRST, "share"): (_ENGINE, "_gate"),
    (_FIRST, "gather"): (_ENGINE, "_gate"),
    (_PAGES, "_wide"): (_PAGES, "_attend"),
    (_PAGES, "_finish"): (_PAGES, "_attend"),
    (_ENGINE, "_spread"): (_ENGINE, "_rotate"),
    (_DRAW, "_ordered"): (_DRAW, "_draw"),
    (_DRAW, "_mix"): (_DRAW, "_draw"),
}
#: Kernels that a T4 never runs, and why.
NOT_ON_A_T4: dict[Kernel, str] = {
    (_ENGINE, "_add_norm_first"): "LoRA's first half beside a norm, for products that are decoded in registers",
    (_FIRST, "_apart"): "LoRA's first half of many rows, for the same products",
    (_FIRST, "column_at"): "a part of _apart",
    (_FIRST, "fetch"): "early launches, which begin with 9.0",
    (_NF4, "_product"): "nf4_linear.check_shapes refuses it below 8.0, where tl.dot has no tensor cores",
    (_NF4, "_decode"): "a part of _product",
    (_NF4, "_dequantise"): "of the same products, for more rows",
}


def kernels() -> set[Kernel]:
    """Return every function of fast_ft with triton.jit or triton.autotune above it."""
    found = set()
    package = ROOT / "fast_ft"
    for path in sorted(package.rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        if "triton" in text:
            module = ".".join(path.relative_to(package).with_suffix("").parts)
            found |= {(module, name) for name in _jitted(ast.parse(text))}
    return found


def _jitted(tree: ast.Module) -> list[str]:
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    return [each.name for each in functions if any(_is_jit(line) for line in each.decorator_list)]


def _is_jit(decorator: ast.expr) -> bool:
    text = ast.unparse(decorator).partition("(")[0]
    return text.rpartition(".")[2] in ("jit", "autotune", "heuristics") and "torch" not in text


def kernel_of(module: str, name: str) -> Kernel:
    """Return a kernel as the inventory names it, by its function's own module."""
    return module.removeprefix("fast_ft."), name


def source_of(kernel: Kernel) -> Path:
    """Return the file that a kernel stands in."""
    return ROOT / "fast_ft" / (kernel[0].replace(".", "/") + ".py")
