"""Which room may import which: read from the source, imports in functions and under TYPE_CHECKING included."""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator

import pytest

from tests.helpers.parts import ROOT

PACKAGE = ROOT / "fast_ft"

#: Each room, after all rooms that it may import.
ROOMS = [
    "common", "hub", "recipe", "run", "data", "models", "plan", "train", "generate", "judge", "report", "pipeline",
    "export", "homework", "sweep", "doctor", "cli",
]  # fmt: skip
HEAVY = {"torch", "transformers", "trl", "peft", "unsloth", "unsloth_zoo", "bitsandbytes", "datasets", "accelerate"}
#: Rooms that `pipeline` imports late: torch may stand at the top of their modules.
ENGINES = ("train.", "generate.engine.", "models.fused_block.")
#: Modules that are imported in functions only, after a loader was made (and with it unsloth, where that is used).
LATE_MODULES = {
    "train.sft_trainer": {"torch", "datasets", "transformers", "trl"},
    "train.sft_settings": {"torch", "trl"},
    "train.adamw_8bit": {"bitsandbytes"},
}
#: Rooms and modules that answer without any heavy library, in functions too, but for those named.
LIGHT = {"hub": set(), "recipe": set(), "run": set(), "judge": set(), "report": set(), "homework": set()}


#: {module's name within fast_ft: its file}
MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}


@functools.cache
def tree(module: str) -> ast.Module:
    return ast.parse(MODULES[module].read_text(encoding="utf-8"))


def imports(program: ast.AST, *, top_only: bool = False) -> Iterator[str]:
    """Yield the absolute dotted name of every import; with top_only, of those that run when the module is imported."""
    for child in ast.iter_child_nodes(program):
        if isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert not child.level, "imports are absolute"
            yield child.module or ""
            yield from (f"{child.module}.{alias.name}" for alias in child.names)
        elif top_only and isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            for part in child.orelse:
                yield from imports(part, top_only=True)
        elif isinstance(child, ast.expr) or (top_only and isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef)):
            continue  # no expression holds an import
        else:
            yield from imports(child, top_only=top_only)


@functools.cache
def own(module: str) -> set[str]:
    """The modules of fast_ft that one imports, anywhere in it."""
    names = {name.removeprefix("fast_ft.") for name in imports(tree(module))}
    found = names & MODULES.keys() - {module, ""}
    return {name for name in found if not any(other.startswith(f"{name}.") for other in found)}


def room(module: str) -> str:
    return module.split(".")[0]


def test_every_module_lives_in_a_room() -> None:
    loose = {path.name for path in PACKAGE.glob("*.py")}
    assert loose == {"__init__.py", "__main__.py"}
    rooms = {path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert rooms <= {*ROOMS, "pocket"}
    for name in rooms:
        assert ast.get_docstring(tree(name)), f"{name}/__init__.py does not say what the room is for"


@pytest.mark.parametrize("module", [name for name in MODULES if room(name) in ROOMS])
def test_a_room_imports_only_rooms_above_it(module: str) -> None:
    allowed = ROOMS[: ROOMS.index(room(module)) + 1]
    assert {name for name in own(module) if room(name) not in allowed} == set()


@pytest.mark.parametrize("module", [name for name in MODULES if room(name) in ("train", "generate", "judge")])
def test_the_engines_know_neither_one_another_nor_the_run_folder(module: str) -> None:
    others = {"train", "generate", "judge", "run", "pipeline"} - {room(module)}
    assert {name for name in own(module) if room(name) in others} == set()


def test_modules_import_without_circles() -> None:
    done: set[str] = set()

    def visit(module: str, above: tuple[str, ...]) -> None:
        assert module not in above, " -> ".join([*above, module])
        if module not in done:
            for other in sorted(own(module)):
                visit(other, (*above, module))
            done.add(module)

    for module in MODULES:
        visit(module, ())


@pytest.mark.parametrize("module", MODULES)
def test_heavy_libraries_load_late(module: str) -> None:
    at_top = {name.split(".")[0] for name in imports(tree(module), top_only=True)} & HEAVY
    allowed = {"torch"} if module.startswith(ENGINES) else set()
    assert at_top <= allowed | LATE_MODULES.get(module, set())


@pytest.mark.parametrize("module", [name for name in MODULES if room(name) in LIGHT])
def test_light_rooms_never_name_a_heavy_library(module: str) -> None:
    assert {name.split(".")[0] for name in imports(tree(module))} & HEAVY <= {"datasets"}


def test_unsloth_is_named_in_its_loader_only() -> None:
    naming = {
        module
        for module in MODULES
        if {name.split(".")[0] for name in imports(tree(module))} & {"unsloth", "unsloth_zoo"}
    }
    assert naming == {"models.loaders.unsloth"}


def test_nothing_imports_the_pocket_and_the_program_no_bench() -> None:
    for module in MODULES:
        assert not [name for name in imports(tree(module)) if name.split(".")[0] in ("bench", "tools", "tests")], module
        assert room(module) == "pocket" or not [name for name in own(module) if room(name) == "pocket"], module


def test_the_rules_see_what_they_are_for() -> None:
    program = ast.parse("import torch.nn\nif TYPE_CHECKING:\n    import trl\ndef f():\n    from peft import x\n")
    assert set(imports(program, top_only=True)) == {"torch.nn"}
    assert set(imports(program)) == {"torch.nn", "trl", "peft", "peft.x"}
