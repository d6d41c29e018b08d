"""The doctor: each finding with its remedy; the self-test is a run."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from fast_ft.cli import commands
from fast_ft.cli.main import main
from fast_ft.common import gpu
from fast_ft.doctor import doctor, versions
from fast_ft.doctor.findings import Finding
from tests.helpers.patience import PATIENCE

CARD = {"name": "Tesla T4", "memory": "15360 MiB", "driver": "580.1"}


def by_name(findings: Any) -> dict[str, Finding]:
    return {each.name: each for each in findings}


@pytest.fixture(scope="module")
def findings() -> list[Finding]:
    """What is found here, once: the self-test takes seconds."""
    return doctor.examine()


def test_doctor_names_everything_and_trains_and_decodes(findings: list[Finding]) -> None:
    names = [each.name for each in findings]
    wanted = ["Python", "GPU", "versions", "memory", "disk", "hub", "package index", "self-test"]
    assert [name for name in wanted if name not in names] == []
    tested = by_name(findings)["self-test"]
    assert tested.level == "fine" and "2 steps through" in tested.text and " tokens in " in tested.text
    assert all(each.remedy for each in findings if each.level in ("warning", "broken"))


def test_doctor_prints_and_gives_json_and_a_status(
    findings: list[Finding], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "examine", lambda: findings)
    assert main(["doctor"]) == 0
    assert "a run will work here" in capsys.readouterr().out
    assert main(["doctor", "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["works"] is True and len(content["findings"]) == len(findings)
    bad = Finding("CUDA\x1b[2J", "broken", "the \x1b[31mdriver is too old " * 9, "update it")
    monkeypatch.setattr(doctor, "examine", lambda: [*findings, bad])
    assert main(["doctor"]) == 3 == commands.COMMANDS["doctor"](type("Options", (), {"json": True}))
    out = capsys.readouterr().out
    assert "\x1b" not in out and "BROKEN" in out and "-> update it" in out and '"works": false' in out


def test_the_pins_themselves_are_no_known_break() -> None:
    for on_gpu in (False, True):
        found = versions.pins(on_gpu)
        assert found is not None and len(found[1]) > 20
        have = {each.name: next(iter(each.specifier)).version for each in found[1]}
        have |= {"torch": "2.13.0", "certifi": "2026.10.18"}
        assert not [each for each in versions.known_pairs(on_gpu, have) if each.level == "broken"]


BROKEN = [
    (False, {"trl": "1.15.0"}, "trl", "Triton"),
    (True, {"unsloth": "2026.10.8", "certifi": "2026.10.18"}, "unsloth", "certifi"),
    (True, {"unsloth": "2026.10.7", "transformers": "5.18.0"}, "transformers", "up to 5.17.0"),
    (True, {"unsloth": "2026.10.7", "trl": "1.16.0"}, "trl", "up to 1.15.0"),
    (True, {"unsloth": "2026.10.7", "datasets": "5.0.0"}, "datasets", "below 5"),
    (True, {"unsloth": "2026.10.7", "torch": "2.15.0"}, "torch", "below 2.15"),
    (False, {"transformers": "4.57.1"}, "transformers", "transformers 5"),
    (False, {"bitsandbytes": "0.48.2"}, "bitsandbytes", "0.49"),
]


@pytest.mark.parametrize(("gpu", "have", "name", "words"), BROKEN)
def test_known_pairs_are_named_with_their_remedy(gpu: bool, have: dict[str, str], name: str, words: str) -> None:
    (found,) = versions.known_pairs(gpu, dict(have))
    assert (found.name, found.level) == (name, "broken") and words in found.text and "pip install" in found.remedy
    assert list(versions.known_pairs(gpu, {})) == []


def test_xformers_beside_another_torch_is_a_note() -> None:
    have: dict[str, str | None] = {"xformers": "0.0.35", "torch": "2.11.0+cu130"}
    (found,) = versions.known_pairs(True, have)
    assert found.level == "note" and "PyTorch's attention" in found.text
    assert list(versions.known_pairs(True, have | {"torch": "2.10.0"})) == []


def test_missing_and_other_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    real = versions.installed
    monkeypatch.setattr(versions, "installed", lambda name: {"peft": None, "trl": "1.2.0"}.get(name, real(name)))
    packages, other = versions.against_pins(False)
    assert packages.level == "broken" and packages.text == "missing: peft==0.21.0"
    assert other.level == "warning" and "trl 1.2.0 (==1.14.2)" in other.text
    assert "requirements-cpu.txt" in packages.remedy and "requirements-cpu.txt" in other.remedy


def test_a_card_that_torch_does_not_see_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("torch sees a GPU here")
    card, cuda = doctor._card(CARD)
    assert card.text == "Tesla T4, 15360 MiB, driver 580.1" and cuda.level == "broken" and cuda.remedy
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    _, cuda = doctor._card(CARD)
    assert cuda.level == "fine" and "7.5: no bfloat16" in cuda.text


def test_too_little_room_is_a_warning(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(gpu, "free_gpu_gib", lambda: 3.0)
    usage = type("Usage", (), {"free": 2**29})
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: usage)
    found = by_name([*doctor._room(CARD), *doctor._room_on_card(CARD)])
    assert found["disk"].level == found["hub cache"].level == found["GPU memory"].level == "warning"
    assert "HF_HOME" in found["hub cache"].remedy and "nvidia-smi" in found["GPU memory"].remedy


def test_the_network_is_asked_for_two_seconds_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    over = threading.Event()

    def ask(url: str) -> None:
        if url == constants.ENDPOINT:
            over.wait(PATIENCE)
        raise ConnectionError

    for seconds in (0.2, 2.0, 20.0):  # on a busy machine a thread may not even begin within the first
        monkeypatch.setattr(doctor, "SECONDS", seconds)
        started = time.monotonic()
        found = by_name(doctor.network(ask))
        assert time.monotonic() - started < PATIENCE / 2, "the hub's answer is not waited for"
        assert f"no answer within {seconds:g} s" in found["hub"].text and found["hub"].level == "note"
        if "ConnectionError" in found["package index"].text:
            break
    over.set()
    assert "ConnectionError" in found["package index"].text
    monkeypatch.setattr(doctor, "SECONDS", PATIENCE)
    assert {each.text for each in doctor.network(lambda url: None)} == {"reachable"}
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "not asked" in by_name(doctor.network(lambda url: None))["hub"].text


def test_a_self_test_that_fails_is_broken(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)  # from where there is no fast_ft to import
    monkeypatch.setattr(versions, "ROOT", tmp_path)
    monkeypatch.setenv("PYTHONPATH", "")
    (found,) = doctor.self_test()
    assert found.level == "broken" and "fast_ft" in found.text and "fast_ft.doctor.smoke_run" in found.remedy
    facts = {
        "backend": "peft",
        "dtype": "float32",
        "steps": 2,
        "train_seconds": 1.0,
        "tokens": 8,
        "decode_seconds": 1.0,
    }
    for losses, tokens in (([5.0, float("nan")], 8), ([5.0, 6.0], 8), ([5.0, 4.0], 0)):
        (found,) = doctor.judged(facts | {"losses": losses, "tokens": tokens}, 9.0)
        assert found.level == "broken" and found.remedy
