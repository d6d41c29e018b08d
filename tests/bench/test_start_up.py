"""What the benches of start-up and host memory read and count, on this machine and from given samples."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from bench import host_memory, start_up
from bench.__main__ import figures_of
from fast_ft.common.errors import InputError

ENVIRONMENT = {"gpu": {"name": "NVIDIA H100 80GB HBM3"}}


def test_figures_are_by_the_warm_run_and_the_imports_of_the_same_call() -> None:
    runs = {"cold": {"total": 60.0}, "warm": {"total": 41.0}}
    found = figures_of(
        {"kind": "start", "environment": ENVIRONMENT, "module": "unsloth", "imports": [30.0, 32.0], "runs": runs}
    )
    assert {name: value for name, (value, _) in found.items()} == {
        "start.h100.first_step_seconds": 41.0,
        "start.h100.over_import_seconds": 10.0,
    }
    host = {"kind": "host", "environment": ENVIRONMENT, "recipe": "strong", "limit_gib": 9.31}
    found = figures_of(host | {"peaks": {"loading": 3.2, "training": 4.256, "answering": 4.1}})
    assert found["load.host_gib"][0] == 4.26 and "under a limit of 9.31 GiB" in found["load.host_gib"][1]


def test_memory_is_that_of_a_process_and_its_children() -> None:
    """A parent with a child that holds 64 MiB."""
    child = "import time; held = bytearray(b'x' * (64 << 20)); print('there', flush=True); time.sleep(60)"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    process = subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None and process.stdout.readline()
        found = host_memory.tree_gib(process.pid)
        assert 0.0625 < found["own_gib"] < 0.2 and found["with_files_gib"] > found["own_gib"]
    finally:
        for each in host_memory._tree(process.pid)[::-1]:
            subprocess.run(["kill", str(each)], check=False)
        process.wait()
    assert host_memory.tree_gib(process.pid) == {"own_gib": 0.0, "with_files_gib": 0.0}


def test_a_command_that_fails_is_shown(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with pytest.raises(InputError, match=r"status 2 before its first step(.|\n)*no_such\.yaml"):
        start_up.first_step(["no_such.yaml"], tmp_path / "run", log, {})
    with pytest.raises(InputError, match="fails here"):
        start_up.import_seconds("no_such_module")
    phases = {"phases": {}, "start_up": {"total": 1.0}}
    (tmp_path / "manifest.json").write_text(json.dumps(phases))
    assert host_memory._phase(tmp_path) == "training"
