"""Small real parts that tests share: two models, our own rows and prompts, a recipe that runs on a CPU in seconds."""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib
import json
import os
import random
import signal
import sys
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

# Before torch is imported: one thread, since `make test` gives each core a worker of its own; no network. Commands that
# tests start inherit both.
for library in ("OMP", "MKL", "OPENBLAS"):
    os.environ.setdefault(f"{library}_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # spinning threads make a shared machine six times slower
os.environ.setdefault("HF_HUB_OFFLINE", "1")
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job inherits it ignored

from tests.helpers import cheap  # noqa: E402 - after the environment
from tests.helpers.parts import COLOURS, THINGS, RecipeFactory, save_random_llama, write_recipe  # noqa: E402 - after the environment

cheap.wait_for_no_disk()
# Everyone draws the same examples, and no clock ends a test: `make soak` looks for new ones (tests/fuzz).
settings.register_profile(
    "same for all", derandomize=True, database=None, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("same for all")

#: Files that fork processes from helpers/killed.py's server. They go to one worker: each worker's own server would
#: import the libraries again.
FORKING = (
    "test_several_processes", "test_smollm", "test_cli", "test_walk", "test_kill", "test_judge_served", "test_judge",
    "test_killed",
)  # fmt: skip
#: Files that take longest, the longest first, so that no worker is left with one of them at the end.
LONG = (
    *FORKING, "test_engine", "test_minutes", "test_sweep", "test_resume", "test_report_browser", "test_fuzz",
    "test_reproduce", "test_wheel", "test_sanity_checks", "test_train", "test_submit", "test_out_of_memory",
    "test_backup", "test_sweep_workers", "test_answers", "test_running_ahead", "test_best_peer", "test_doctor",
    "test_adapter_kinds", "test_decode_grid", "test_bench", "test_run", "test_ways", "test_disk", "test_validation",
    "test_card_file", "test_notebook", "test_signals", "test_selection", "test_kv_cache", "test_chat_templates",
    "test_preview", "test_lock", "test_jinja_sandbox", "test_merged", "test_gguf", "test_pace", "test_decoding",
    "test_masks", "test_kernels", "test_figures_decode", "test_hostile", "test_test_command", "test_pocket",
    "test_imports",
)  # fmt: skip


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Give each file to one worker, and all that fork to the same."""
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file: str = super()._split_scope(nodeid)
            return "forking" if Path(file).stem in FORKING else file

    return Scheduling(config, log) if config.getvalue("dist") == "loadfile" else None


def pytest_configure(config: pytest.Config) -> None:
    """Keep the order of LONG under xdist too, which by itself starts with the files of most tests."""
    if hasattr(config.option, "loadscopereorder"):
        config.option.loadscopereorder = False


def pytest_sessionstart(session: pytest.Session) -> None:
    """Let each worker import a part of the tests' files first: what it compiles, the others read a moment later.

    All of them import all files. In one order they would compile each file at the same time, on a fresh checkout.
    """
    if "PYTEST_XDIST_WORKER" in os.environ and session.config.args == session.config.getini("testpaths"):
        own, workers = int(os.environ["PYTEST_XDIST_WORKER"][2:]), int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
        with cheap.imports():
            for path in sorted(Path(__file__).parent.rglob("test_*.py"))[own::workers]:
                with contextlib.suppress(Exception, pytest.skip.Exception):  # the collection says it where it belongs
                    importlib.import_module(".".join(path.relative_to(session.config.rootpath).with_suffix("").parts))


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    with cheap.imports():
        return (yield)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    order = {name: place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Draw pictures truly where the mark `pictures` says so; a worker's first test that draws does so, too.

    Whatever draws numbers without a generator of its own draws the same ones in any worker and after any other test.
    """
    cheap.draw(truly=item.get_closest_marker("pictures") is not None)
    random.seed(0)
    if numpy := sys.modules.get("numpy"):
        numpy.random.seed(0)
    if torch := sys.modules.get("torch"):
        torch.manual_seed(0)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say loudly that no browser was there: a skipped test is one letter among a thousand."""
    skipped = [each for each in terminalreporter.stats.get("skipped", []) if "test_report_browser" in each.nodeid]
    if skipped:
        terminalreporter.section("THE BROWSER TESTS DID NOT RUN", red=True, bold=True)
        terminalreporter.line(f"{len(skipped)} tests of the report were skipped: {skipped[0].longrepr[2]}", red=True)


@pytest.fixture(scope="session", autouse=True)
def cheap_collections() -> Iterator[None]:
    freeze = cheap.FreezeImports()
    # Answering sets aside what is there and takes it back at its end; then each collection would walk it again.
    unfreeze, gc.unfreeze = gc.unfreeze, lambda: None
    gc.callbacks.append(freeze)
    yield
    gc.callbacks.remove(freeze)
    gc.unfreeze = unfreeze


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random Llama of two layers: enough wherever loss need not mean anything."""
    return save_random_llama(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def train_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 scored rows of our own, with responses of 3 to 26 words."""
    rows = []
    for i in range(24):
        colour, thing = COLOURS[i % 10], THINGS[i * 7 % 10]
        answer = f"The {thing} is {colour}." + "".join(f" It is not {c}." for c in COLOURS[: i % 6] if c != colour)
        turns = [{"from": "human", "value": f"What colour is {thing} {i}?"}, {"from": "gpt", "value": answer}]
        rows.append({"id": f"r{i}", "conversations": turns, "score": 3.0 + i % 5 / 2})
    path = tmp_path_factory.mktemp("data") / "train.json"
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def test_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five prompts of our own, of different lengths, in no order of length."""
    prompts = ["Name a hat.", "Where is the cup now?", "Why?", "Is the tent gold, or is it green, or teal?", "A bell?"]
    rows = [
        {"id": f"t{i}", "conversations": [{"from": "human", "value": prompt}]}
        for i, prompt in zip((4, 0, 3, 1, 2), prompts, strict=True)
    ]
    path = tmp_path_factory.mktemp("data") / "test.json"
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path


@pytest.fixture
def recipe_file(tiny: Path, train_file: Path, test_file: Path, tmp_path: Path) -> RecipeFactory:
    """write_recipe into the test's own folder."""
    return functools.partial(write_recipe, tmp_path, tiny, train_file, test_file)
