"""Which module may import which: read from the source, not from what happens to be loaded."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT

PACKAGE = ROOT / "fast_ft"
HEAVY = {"torch", "transformers", "trl", "peft", "unsloth", "bitsandbytes", "datasets", "accelerate"}

#: Each module, after all that it may import, at its top or in its functions. The arrow of docs/design.md runs down.
ORDER = [
    "errors", "streams", "interrupt", "memory", "budget", "stopwatch",
    "terminal", "text_words", "redact", "outside", "results", "folders", "processes",
    "atomic", "seeds", "progress", "ranks",
    "recipe", "recipe_keys", "recipe_yaml", "recipe_errors", "rules", "epoch_loss", "model_files", "hub", "identity",
    "readers", "layouts", "data", "metrics", "similarity", "selection", "leakage", "exclude", "curriculum",
    "shape", "steps", "effects", "lint", "load", "lease", "made", "rundir", "submit.ledger", "environment", "picture",
    "chat_template_process", "chat_template", "codec", "template",
    "cut", "cost", "plan_pool", "plan", "forecast",
    "attention", "recompute", "nf4", "block.plain", "block.kernels", "block.ops", "block.linears", "block.block",
    "tensor_file", "adapter_config", "adapter_file",
    "backends.base", "backends.peft_layers", "backends.unsloth_layers", "backend", "optimizer", "loss", "neftune",
    "passes", "state",
    "checkpoints", "backup",
    "stage_job", "fit", "alike", "setback", "trainer", "train", "follow",
    "prepare", "planning", "base_check",
    "resume",
    "selfcheck",
    "decode.nf4_kernel", "decode.cache", "decode.plain", "decode.kernels", "decode.sampling",
    "decode.products", "decode.four_bits", "decode.checks",
    "decode.fused", "decode.graphs", "decode.prefill", "decode.decode",
    "parity", "generate",
    "judge.stats", "judge.verdicts", "judge.prices", "judge.failure", "judge.post", "judge.endpoint", "judge.rubric",
    "judge.judge", "judge.reference", "judge.judge_openai", "judge.judging",
    "card", "report.facts", "report.page", "report.points", "report.overview", "report.serve", "report.write",
    "phases",
    "guard",
    "train_phase", "generate_phase",
    "pipeline", "doctor.finding", "doctor.versions", "doctor.trial", "doctor.doctor",
    "again", "grid", "chat", "show", "taste", "show_scores",
    "submit.secret_scan", "submit.handin", "submit.submit",
    "submit.bundle", "submit.reproduce",
    "sweep.space", "sweep.validation", "sweep.kept", "sweep.trial", "sweep.price", "sweep.files", "sweep.clock",
    "sweep.journal", "sweep.study", "sweep.inputs", "sweep.job", "sweep.supply", "sweep.workers", "sweep.ray_crew",
    "sweep.driver", "sweep.drawings", "sweep.best", "sweep.page", "sweep.sweep",
    "run_commands", "commands", "words", "__main__",
]  # fmt: skip

#: Where the heavy libraries are named, always inside functions, and which of them.
NAMED = {
    "attention": {"torch", "transformers"},
    "recompute": {"torch"},
    "nf4": {"torch"},
    "block.plain": {"torch"},
    "block.kernels": {"torch"},
    "block.ops": {"torch"},
    "block.linears": {"torch"},
    "block.block": {"torch"},
    "memory": {"torch"},
    "tensor_file": {"torch"},
    "adapter_file": {"peft"},
    "backends.base": {"torch", "transformers"},
    "backends.peft_layers": {"torch", "transformers", "peft"},
    "backends.unsloth_layers": {"torch", "peft", "unsloth"},
    "backend": {"torch", "unsloth"},
    "optimizer": {"torch", "transformers", "bitsandbytes"},
    "loss": {"torch"},
    "fit": {"torch"},
    "ranks": {"torch"},
    "alike": {"torch"},
    "setback": {"torch"},
    "train": {"torch"},
    "trainer": {"torch", "transformers", "trl", "datasets"},
    "state": {"torch"},
    "selfcheck": {"torch"},
    "decode.sampling": {"torch"},
    "decode.nf4_kernel": {"torch"},
    "decode.cache": {"torch"},
    "decode.plain": {"torch"},
    "decode.products": {"torch"},
    "decode.four_bits": {"torch", "bitsandbytes"},
    "decode.checks": {"torch", "bitsandbytes"},
    "decode.fused": {"torch", "transformers"},
    "decode.graphs": {"torch"},
    "decode.prefill": {"torch"},
    "decode.decode": {"torch"},
    "generate": {"torch"},
    "parity": {"torch"},
    "environment": {"torch"},
    "doctor.doctor": {"torch"},
    "forecast": {"torch"},
    "neftune": {"torch"},
    "passes": {"torch"},
    "pocket.pretrain": {"torch", "transformers"},
    "sweep.kept": {"torch"},
}


def modules() -> dict[str, ast.Module]:
    """{module's name within fast_ft: its syntax tree}."""
    return {
        ".".join(path.relative_to(PACKAGE).with_suffix("").parts): ast.parse(path.read_text(encoding="utf-8"))
        for path in sorted(PACKAGE.rglob("*.py"))
        if path.name != "__init__.py"
    }


MODULES = modules()


def imports(tree: ast.Module, module: str, *, top_only: bool) -> Iterator[tuple[str, int]]:
    """(absolute dotted name, line) of every import; names under `if TYPE_CHECKING` are no imports."""

    def visit(node: ast.AST) -> Iterator[tuple[str, int]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                yield from ((alias.name, child.lineno) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                base = child.module or ""
                if child.level:
                    parents = ["fast_ft", *module.split(".")][: -child.level]
                    base = ".".join([*parents, *filter(None, [base])])
                yield base, child.lineno
                yield from ((f"{base}.{alias.name}", child.lineno) for alias in child.names)
            elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                yield from (found for part in child.orelse for found in visit(part))
            elif not (top_only and isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)):
                yield from visit(child)

    return visit(tree)


def own(module: str, *, top_only: bool = False) -> set[str]:
    """The modules of fast_ft that one imports."""
    names = {name.removeprefix("fast_ft.") for name, _ in imports(MODULES[module], module, top_only=top_only)}
    return names & MODULES.keys() - {module}


@pytest.mark.parametrize("module", MODULES)
def test_heavy_libraries_are_imported_inside_functions_only(module: str) -> None:
    at_top = [(name, line) for name, line in imports(MODULES[module], module, top_only=True)]
    assert not [(name, line) for name, line in at_top if name.split(".")[0] in HEAVY]


@pytest.mark.parametrize("module", MODULES)
def test_heavy_libraries_are_named_where_the_rule_says(module: str) -> None:
    named = {name.split(".")[0] for name, _ in imports(MODULES[module], module, top_only=False)} & HEAVY
    assert named == NAMED.get(module, set())


def test_unsloth_is_named_where_a_backend_is_made_only() -> None:
    naming = {
        module
        for module, tree in MODULES.items()
        for name, _ in imports(tree, module, top_only=False)
        if name.split(".")[0] in ("unsloth", "unsloth_zoo")
    }
    assert naming == {"backend", "backends.unsloth_layers"}


def test_the_order_names_every_module_once() -> None:
    assert sorted(ORDER) == sorted(name for name in MODULES if not name.startswith("pocket."))


@pytest.mark.parametrize("module", ORDER)
def test_a_module_imports_only_what_stands_before_it(module: str) -> None:
    assert own(module) <= set(ORDER[: ORDER.index(module)])


def test_train_generate_and_judge_never_import_one_another() -> None:
    parts = [
        {"train", "trainer", "optimizer", "state"},
        {"generate", *(name for name in ORDER if name.startswith("decode."))},
        {name for name in ORDER if name.startswith("judge.")},
    ]
    for part in parts:
        others = set().union(*parts) - part
        for module in part & MODULES.keys():
            assert not own(module) & others, module


def test_only_the_pocket_imports_the_pocket() -> None:
    for module in MODULES:
        if not module.startswith("pocket."):
            assert not [name for name in own(module) if name.startswith("pocket")], module


def test_modules_import_without_cycles() -> None:
    done: set[str] = set()

    def visit(module: str, above: tuple[str, ...]) -> None:
        assert module not in above, " -> ".join([*above, module])
        if module not in done:
            for other in sorted(own(module)):
                visit(other, (*above, module))
            done.add(module)

    for module in MODULES:
        visit(module, ())


def test_the_rules_see_what_they_are_for() -> None:
    tree = ast.parse(
        "import torch.nn\nfrom . import train\nif TYPE_CHECKING:\n    import trl\ndef f():\n    from peft import x\n"
    )
    top = {name for name, _ in imports(tree, "generate", top_only=True)}
    assert top == {"torch.nn", "fast_ft", "fast_ft.train"}
    assert {name for name, _ in imports(tree, "generate", top_only=False)} - top == {"peft", "peft.x"}
    assert Path(PACKAGE / "__main__.py").is_file()
