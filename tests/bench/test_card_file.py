"""Ten minutes of a card's owner: what is announced, measured, written, left out, and read back into the README."""

from __future__ import annotations

import copy
import getpass
import json
import os
import platform
import re
import signal
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bench import __main__ as bench
from bench import (
    card_base,
    card_file,
    card_layers,
    card_parts,
    card_rates,
    card_table,
    figures,
    machine,
    prose,
    submit_file,
)
from bench.card_file import PARTS, SECONDS, Order
from bench.card_scale import Scale
from fast_ft.common import gpu
from fast_ft.common.errors import InputError
from fast_ft.doctor.findings import Finding, as_json
from fast_ft.hub.families import TARGET_MODULES
from tests.helpers.patience import PATIENCE, wait_until

SMALL = Scale(
    config={
        "model_type": "llama", "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 300, "rms_norm_eps": 1e-5,
    },
    layers=1, matrix=64, window=0.01, least=0.1, most=0.2, copied=1000, launches=100, rows=4, row_tokens=16, steps=8,
    simple_rows=20, simple_tokens=8, slots=(2, 4), length=16,
)  # fmt: skip
T4 = {"name": "Tesla T4", "memory": "15360 MiB", "driver": "580.1"}
Run = Callable[..., int | str]


def here(command: list[str], log: Path, timeout: float, out: Path | None = None) -> int:
    """Run a part as process.run_process does, but in this process, where the libraries are imported already."""
    if out is not None:
        warned = Finding("hub", "note", f"not reachable by {platform.node()}: see /home/someone/.cache/hub", "look")
        out.write_text(json.dumps(as_json([Finding("GPU", "fine", "Tesla T4"), warned])))
        return 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", command[2:])
        return card_parts.main()


@pytest.fixture(scope="module")
def content(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What all parts measure on a CPU, at a small scale; the file holds the same."""
    order = Order(tmp_path_factory.mktemp("card") / "submit-cpu.json", scale=SMALL)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(card_file, "run_process", here)
        made = card_file.measure(order)
    assert json.loads(order.path.read_text()) == json.loads(json.dumps(made))
    return made


@pytest.fixture
def t4(content: dict[str, Any]) -> dict[str, Any]:
    """A made sample: the file of a CPU, changed into a T4's whose Unsloth did what our layers did, half as fast."""
    sample = copy.deepcopy(content)
    sample["environment"]["gpu"] = dict(T4)
    parts = sample["parts"]
    parts["unsloth"] = copy.deepcopy(parts["ours"])
    for way, seconds in (("ours", 2.0), ("unsloth", 4.0)):
        parts[way]["tokens_per_step"] = 2048
        for step in parts[way]["steps"]:
            step["seconds"] = seconds
    parts["rates"] |= {"tflops": [41.9, 30.0, 24.04], "gb_per_s": 258.6, "launches_per_s": 123456.0}
    parts["whole"]["simple"]["seconds"] = 45.0
    for way, ms in (("ours", 61.2), ("bitsandbytes", 84.4)):
        parts["whole"]["decode"][way]["steps"] = [
            {"slots": 16, "ms_a_step": 30.0}, {"slots": 64, "ms_a_step": ms}
        ]  # fmt: skip
    sample["partial"] = False
    return sample


def test_every_part_is_measured_and_one_that_fails_does_not_stop_the_rest(content: dict[str, Any]) -> None:
    parts = content["parts"]
    assert list(parts) == [part.name for part in PARTS]
    assert [name for name, part in parts.items() if "failed" in part] == ["unsloth"]
    assert parts["unsloth"]["failed"].startswith("Unavailable: model.backend: 'unsloth' cannot be used here")
    assert "\n" not in parts["unsloth"]["failed"]
    assert content["partial"] and not content["stopped"] and content["settings"]["random_weights"]
    rates, whole, ours = parts["rates"], parts["whole"], parts["ours"]
    assert rates["tflops"] and rates["gb_per_s"] > 0 and rates["launches_per_s"] > 0
    assert whole["simple"]["steps"] == whole["simple"]["planned_steps"] == 3 == len(whole["simple"]["step_seconds"])
    assert whole["simple"]["tokens"] == [64, 64, 32]
    assert [step["slots"] for step in whole["decode"]["ours"]["steps"]] == [2, 4]
    assert [step["slots_filled"] for step in whole["decode"]["bitsandbytes"]["steps"]] == [2, 4]
    assert len(ours["steps"]) == 8 and len(ours["gradient"]["sketch"]) == 2048 and ours["tokens_per_step"] == 64
    assert {step["supervised_tokens"] for step in ours["steps"]} == {32}
    assert [each["name"] for each in parts["doctor"]["findings"]] == ["GPU", "hub"] and parts["doctor"]["works"]


def test_a_way_that_is_stopped_leaves_the_steps_that_it_took(tmp_path: Path) -> None:
    kept: dict[str, Any] = {}

    def keep(name: str, value: Any) -> None:
        kept[name] = copy.deepcopy(value)
        if name == "steps" and len(value) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        card_layers.measure(SMALL, keep, tmp_path, "fused", time.monotonic())
    assert len(kept["steps"]) == 3 and all(step["loss"] > 0 and step["seconds"] > 0 for step in kept["steps"])
    assert kept["tokens_per_step"] == 64 and card_table._speed(kept) is None, "they are warm-up"


def test_a_base_of_ones_own_takes_the_random_ones_place(tiny: Path, tmp_path: Path) -> None:
    order = Order(tmp_path / "a.json", str(tiny), SMALL, parts=(PARTS[1],))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(card_file, "run_process", here)
        made = card_file.measure(order)
    assert not made["partial"] and made["settings"]["random_weights"] is False
    assert made["parts"]["whole"]["simple"]["steps"] == 3 and len(made["parts"]["whole"]["decode"]) == 2
    assert str(tiny) not in json.dumps(made) and f"The 7B is read from {tiny}" in card_file.announcement(order, "T4")


def test_the_written_adapter_is_what_every_loader_makes(tmp_path: Path) -> None:
    """Unsloth's loader makes it from the recipe's numbers, PEFT's reads its file: another scale would be other work."""
    card_base.as_folder(tmp_path, SMALL.config, "auto")
    written = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (written["r"], written["lora_alpha"]) == (card_base.LORA.r, card_base.LORA.lora_alpha)
    assert sorted(written["target_modules"]) == sorted(TARGET_MODULES) and written["lora_dropout"] == 0
    assert card_base.LORA.target_modules == "all-linear" and card_base.LORA.lora_dropout == 0
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    assert config["quantization_config"]["bnb_4bit_quant_type"] == "nf4" and config["num_hidden_layers"] == 2


def test_the_file_names_nobody(content: dict[str, Any]) -> None:
    text = json.dumps(content)
    for private in (platform.node(), str(Path.cwd()), str(Path.home()), f'"{getpass.getuser()}"', "someone", "/tmp"):
        assert not re.search(rf"(?<!\w){re.escape(private)}(?!\w)", text), private
    assert content["parts"]["doctor"]["findings"][1]["text"] == "not reachable by MACHINE: see PATH"


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("OSError: /home/ada/.cache/x.so: cannot open", "OSError: PATH: cannot open"),
        ("at ~/models/7b and C:\\Users\\Ada\\7b", "at PATH and PATH"),
        ("GET https://user:pw@host.example/api?k=1 failed", "GET ADDRESS failed"),
        ("see /home/Ada Lovelace and /home/Ada Lovelace/x.json", "see PATH and PATH/x.json"),
        ("ada@example.org on 10.0.0.12", "MAIL on IP"),
        ("torch 2.11.0+cu130, 3/4 of it, fp16/bf16, driver 580.95.05", None),
        ("gpu-box-7 and adalovelace", "MACHINE and USER"),
        ("key sk-12345678", "key [MY_API_KEY]"),
        ({"a": ["/etc/passwd", 1, None, True]}, {"a": ["PATH", 1, None, True]}),
    ],
)
def test_texts_lose_paths_addresses_names_and_keys(text: Any, left: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "node", lambda: "gpu-box-7")
    monkeypatch.setattr(getpass, "getuser", lambda: "adalovelace")
    monkeypatch.setenv("MY_API_KEY", "sk-12345678")
    monkeypatch.setenv("HOME", "/home/Ada Lovelace")
    assert submit_file.without_names(text) == (text if left is None else left)


def test_the_boxes_stay_below_ten_minutes_and_later_parts_get_what_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits: list[float] = []
    monkeypatch.setattr(card_file, "time", SimpleNamespace(monotonic=lambda: 7.0))  # the parts here take no time
    monkeypatch.setattr(card_file, "run_process", lambda command, log, timeout, out=None: limits.append(timeout) or 0)
    card_file.measure(Order(tmp_path / "a.json"))
    assert sum(part.seconds for part in PARTS) <= SECONDS < 600
    assert limits[0] == SECONDS - sum(part.seconds for part in PARTS[1:]), "no more than leaves room for the later ones"
    assert all(limit >= part.seconds for limit, part in zip(limits, PARTS, strict=True))
    assert limits[-1] == SECONDS, "what the first ones did not use"


@pytest.mark.parametrize(
    ("status", "says"),
    [("nothing after 110 s", "not done after 110 s"), (-9, "ended by SIGKILL"), (1, "status 1: the last line")],
)
def test_a_part_that_does_not_end_leaves_its_reason_and_what_it_had(
    status: int | str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(command: list[str], log: Path, timeout: float, out: Path | None = None) -> int | str:
        log.write_text("a traceback\nthe last line\n")
        (log.with_suffix(".json")).write_text('{"tflops": [40.0, 38.0]}')
        return status if log.stem == "rates" else 0

    monkeypatch.setattr(card_file, "run_process", run)
    made = card_file.measure(Order(tmp_path / "a.json"))
    assert (made["parts"]["rates"]["failed"], made["parts"]["rates"]["tflops"]) == (says, [40.0, 38.0])
    assert list(made["parts"]) == [part.name for part in PARTS] and made["partial"]


def test_the_doctors_own_findings_are_no_failure_of_the_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(card_file, "run_process", lambda command, log, timeout, out=None: 3 if out else 0)
    made = card_file.measure(Order(tmp_path / "a.json"))
    assert "failed" not in made["parts"]["doctor"] and not made["partial"]


def test_ctrl_c_in_a_real_part_leaves_a_file_that_says_so(tmp_path: Path) -> None:
    """The products would take ten minutes; the process that makes them ends, too."""
    script = (
        "import sys; from pathlib import Path; from dataclasses import replace; from bench import __main__, card_file\n"
        "from tests.bench.test_card_file import SMALL\n"
        "order = card_file.Order(Path(sys.argv[1]), scale=replace(SMALL, least=600, most=600))\n"
        "sys.exit(__main__.measure_card(order))\n"
    )
    path, work = tmp_path / "submit-t4.json", tmp_path / "work"
    work.mkdir()
    environment = {**os.environ, "TMPDIR": str(work), "PYTHONPATH": str(machine.ROOT)}
    with subprocess.Popen(
        [sys.executable, "-c", script, str(path)], stdout=subprocess.PIPE, text=True, env=environment, cwd=tmp_path
    ) as process:
        wait_until(
            lambda: any("tflops" in path.read_text() for path in work.glob("bench-*/rates.json")),
            lambda: process.poll() is None,
        )
        (job,) = work.glob("bench-*/rates.job.json")
        process.send_signal(signal.SIGINT)
        said, _ = process.communicate(timeout=PATIENCE)
    made = json.loads(path.read_text())
    assert process.returncode == 130 and made["stopped"] and made["partial"]
    assert made["parts"]["rates"]["failed"] == card_file.STOPPED and made["parts"]["rates"]["tflops"]
    assert list(made["parts"]) == ["rates"] and not list(work.iterdir()), "what was on the disk is gone"
    assert "not whole (rates, whole, doctor, ours, unsloth)" in said and str(path) in said
    running = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout
    assert str(job) not in running


def options(**values: Any) -> Namespace:
    given = {"recipe": None, "overrides": [], "submit_file": "", "quick": True, "results": Path("results")}
    return Namespace(**given | values)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"recipe": "recipes/simple.yaml"}, "recipes/simple.yaml: --quick --submit-file measures the same"),
        ({"overrides": ["lora.r=8"]}, "lora.r=8: --quick --submit-file measures the same"),
        ({"overrides": ["model.name_or_path=meta/llama"]}, "no such folder"),
    ],
)
def test_what_has_no_effect_is_refused_before_anything_is_measured(
    values: dict[str, Any], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "gpu", lambda: T4)
    monkeypatch.setattr(card_file, "_torch_sees_it", lambda: True)
    with pytest.raises(InputError, match=says):
        card_file.order(options(**values))


def test_a_machine_without_a_card_or_disk_is_told_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu, "gpu", lambda: None)
    assert bench.main(["--quick", "--submit-file"]) == 2
    assert "torch sees none. `python -m fast_ft doctor` says why" in capsys.readouterr().err
    monkeypatch.setattr(gpu, "gpu", lambda: T4)
    monkeypatch.setattr(card_file, "_torch_sees_it", lambda: True)
    assert card_file.order(options(results=tmp_path / "new")).path == tmp_path / "new" / "submit-t4.json"
    base = machine.ROOT / "fast_ft" / "pocket" / "base"
    assert card_file.order(options(overrides=[f"model.name_or_path={base}"], results=tmp_path)).base == str(base)
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="nothing can be written there"):
        card_file.order(options(results=tmp_path / "file" / "results"))
    monkeypatch.setattr(card_file, "DISK_GIB", 1e9)
    with pytest.raises(InputError, match="point TMPDIR at another disk"):
        card_file.order(options())


def test_it_says_what_it_will_do_before_it_does_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu, "gpu", lambda: T4)
    monkeypatch.setattr(card_file, "_torch_sees_it", lambda: True)
    said: list[str] = []

    def run(command: list[str], log: Path, timeout: float, out: Path | None = None) -> int:
        said.append(capsys.readouterr().out)
        return 0

    monkeypatch.setattr(card_file, "run_process", run)
    assert bench.main(["--quick", "--submit-file", "--results", str(tmp_path)]) == 0
    before, after = said[0], capsys.readouterr().out
    assert before.startswith("This measures Tesla T4 in at most 10 minutes.")
    assert all(part.what in before for part in PARTS)
    for words in (
        "Download: nothing",
        "2.5 GiB",
        "It will not hold your name",
        "Ctrl-C ends it early",
        "submit-t4.json",
    ):
        assert words in before, words
    assert "/issues/new" in after and "docs/t4.md" in after and "not whole" not in after


def test_why_a_card_slows_down_is_asked_of_nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert card_rates.state() is None
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho '585 MHz, 76, 69.50 W, 70.00 W, P0'\n")
    smi.chmod(0o755)
    found = card_rates.state()
    assert found is not None and found["clocks.sm"] == "585 MHz" and found["power.limit"] == "70.00 W"


def test_a_rate_has_settled_when_it_falls_no_more() -> None:
    assert not card_rates.settled([40.0] * 19)
    assert card_rates.settled([40.0] * 20) and card_rates.settled([41.0] * 30 + [24.0] * 20)
    assert not card_rates.settled([40 - 0.1 * place for place in range(40)])


def test_a_received_file_fills_a_row_of_the_readme(
    t4: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.json").write_text(json.dumps(t4))
    sent = card_table.received(tmp_path)
    monkeypatch.setattr(card_table, "received", lambda: sent)
    readme = prose.rendered(machine.ROOT / "README.md")
    head, row = (line for line in readme.splitlines() if line.startswith(("| received from", "| Tesla T4")))
    assert head.startswith("| received from an owner, not by us | TFLOP/s, first and last |")
    assert row == (
        f"| Tesla T4, {t4['date']} | 41.9, 24.0 | 259 | 123,456 | 1,024, 512 (they agree) | 0.8 min | 61 ms, 84 ms "
        "(64 answers at once) | a run works |"
    )
    assert card_table.NONE not in readme and figures.received(tmp_path) == []


def other_loss(parts: dict[str, Any]) -> None:
    parts["unsloth"]["steps"][0]["loss"] *= 1.01


def other_gradient(parts: dict[str, Any]) -> None:
    parts["unsloth"]["gradient"]["sketch"] = parts["unsloth"]["gradient"]["sketch"][::-1]


@pytest.mark.parametrize("spoil", [other_loss, other_gradient])
def test_two_ways_that_did_other_work_are_not_compared(t4: dict[str, Any], spoil: Any) -> None:
    spoil(t4["parts"])
    found = card_table.facts(t4, "a.json")
    assert found["training"] == {"ours": 1024, "unsloth": 512, "agrees": False}
    assert "(they differ: not compared)" in card_table.markdown([found])


def test_without_a_finite_gradient_nothing_is_said_of_agreement(t4: dict[str, Any]) -> None:
    t4["parts"]["ours"]["gradient"] = {}
    assert card_table.facts(t4, "a.json")["training"]["agrees"] is None


def test_unsloth_is_not_tried_behind_libraries_that_it_patches(tmp_path: Path) -> None:
    order = Order(tmp_path / "a.json", scale=SMALL, parts=(PARTS[4],))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(card_file, "run_process", here)
        made = card_file.measure(order)
    assert made["parts"]["unsloth"]["failed"] == "InputError: the part `ours` has left no base to load"


WITHOUT_TORCH = """
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "torch":
            raise ModuleNotFoundError("No module named 'torch'", name="torch")
sys.meta_path.insert(0, Missing())
from bench import card_file
from bench.__main__ import main
card_file.gpu.gpu = lambda: {"name": "Tesla T4", "memory": "15360 MiB", "driver": "580.1"}
sys.exit(main(["--quick", "--submit-file"]))
"""


def test_without_torch_it_says_where_to_look() -> None:
    done = subprocess.run([sys.executable, "-c", WITHOUT_TORCH], capture_output=True, text=True, cwd=machine.ROOT)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert "torch sees none. `python -m fast_ft doctor` says why" in done.stderr


def test_a_file_that_is_not_whole_shows_what_it_has(content: dict[str, Any]) -> None:
    only = copy.deepcopy(content) | {"environment": {"gpu": T4}}
    only["parts"] = {"rates": {"failed": card_file.STOPPED, "tflops": [40.0, 38.0]}}
    row = card_table.markdown([card_table.facts(only, "a.json")]).splitlines()[2]
    assert (
        row == f"| Tesla T4, {content['date']}, not whole | 40.0, 38.0 | - | - | -, - (not compared) | - | -, - | - |"
    )
    unfinished = copy.deepcopy(content) | {"environment": {"gpu": T4}}
    unfinished["parts"]["whole"]["simple"]["steps"] = 2
    assert card_table.facts(unfinished, "a.json")["simple_minutes"] is None


@pytest.mark.parametrize(
    "spoil",
    [
        lambda sample: sample["environment"]["gpu"].update(name="T4 | <img src=x>"),
        lambda sample: sample["environment"].update(gpu=None),
        lambda sample: sample["parts"]["rates"].update(tflops=["9 | x"]),
        lambda sample: sample["parts"]["rates"].update(gb_per_s=float("inf")),
        lambda sample: sample["parts"]["ours"]["steps"][7].update(seconds="<b>"),
        lambda sample: sample["parts"]["whole"].update(decode=[1]),
        lambda sample: sample.update(parts=3),
        lambda sample: sample.update(date="[x](y)"),
    ],
)
def test_a_received_file_of_another_kind_is_refused_by_its_name(spoil: Any, t4: dict[str, Any], tmp_path: Path) -> None:
    spoil(t4)
    (tmp_path / "odd.json").write_text(json.dumps(t4))
    with pytest.raises(InputError, match=r"odd\.json: not a file of `python -m bench --quick --submit-file`"):
        card_table.received(tmp_path)
