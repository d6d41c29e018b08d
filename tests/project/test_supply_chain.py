"""requirements-cpu.lock: everything that a CPU run installs beside torch, each file by its hash."""

from __future__ import annotations

import re
import shutil
import subprocess

from packaging.requirements import Requirement

from tests.helpers.parts import ROOT

LOCK = (ROOT / "requirements-cpu.lock").read_text(encoding="utf-8")
#: {name: [(version, marker, hashes)]}; a package has an entry for each version that some Python takes
ENTRIES: dict[str, list[tuple[str, str, list[str]]]] = {}
for _name, _version, _marker, _hashes in re.findall(
    r"^([a-z0-9-]+)==(\S+)(?: ; (.*?))? \\\n((?: +--hash=sha256:[0-9a-f]{64}(?: \\\n|\n))+)", LOCK, re.MULTILINE
):
    ENTRIES.setdefault(_name, []).append((_version, _marker, re.findall("[0-9a-f]{64}", _hashes)))


def requirements() -> list[Requirement]:
    lines = (ROOT / "requirements-cpu.txt").read_text(encoding="utf-8").splitlines()
    return [Requirement(line.partition("#")[0].strip()) for line in lines if line.partition("#")[0].strip()]


def test_every_line_of_the_lock_is_a_version_with_hashes() -> None:
    lines = [line for line in LOCK.splitlines() if line and not line.startswith(("#", "    --hash=sha256:"))]
    assert len(lines) == sum(map(len, ENTRIES.values())) > 80
    assert all(hashes for entries in ENTRIES.values() for _, _, hashes in entries)
    assert "://" not in LOCK and "--index" not in LOCK


def test_the_lock_holds_what_the_requirements_ask_for_and_no_torch() -> None:
    for each in requirements():
        if each.name == "torch":
            continue
        entries = ENTRIES.get(re.sub(r"[-_.]+", "-", each.name).lower())
        assert entries, f"{each.name}: not in the lock; make lock writes it again"
        for version, _, _ in entries:
            assert each.specifier.contains(version), f"{each.name}: {version} is locked; make lock writes it again"
    assert not [name for name in ENTRIES if name.startswith(("torch", "triton", "nvidia", "cuda"))]


def test_make_installs_torch_first_and_the_rest_by_hash() -> None:
    assert shutil.which("make")
    done = subprocess.run(
        ["make", "--dry-run", "--always-make", ".venv/run-ready", "PYTHON=python3"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    lines = [line for line in done.stdout.splitlines() if " -m pip install " in line]
    installs = [line.split("check --no-compile ", 1)[1] for line in lines]
    (torch,) = [each for each in requirements() if each.name == "torch"]
    if shutil.which("nvidia-smi") and subprocess.run(["nvidia-smi", "-L"], capture_output=True).stdout:
        assert installs == ["-r requirements.txt"]
    else:
        assert Requirement(installs[0].strip('"')) == torch
        assert installs[1:] == ["--require-hashes -r requirements-cpu.lock"]
