"""Several processes train one recipe: as one would, up to rounding; and what happens when one of them stops or dies.

The processes are started as torchrun starts them, by its variables, but forked from a server that has imported the
libraries. One test, marked soak, goes through torchrun and accelerate themselves.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from safetensors.numpy import load_file

from fast_ft.cli.main import main
from fast_ft.common import console, process_group
from fast_ft.common.errors import InputError
from fast_ft.plan.micro_batches import share
from fast_ft.train.worker import follow
from tests.helpers.killed import run, start, start_function
from tests.helpers.parts import ROOT, write_recipe
from tests.helpers.patience import PATIENCE, wait_until
from tests.helpers.ports import free_port

STEPS = 10
#: Of losses and of the adapter's largest weight. The pocket's sums are of some thousand fp32 numbers, each rounded to
#: 6e-8 of itself, added up in another order; AdamW's first steps divide by the gradient's own size, so that a weight
#: whose gradient is near 0 may move by a share of the learning rate: hence more than one rounding, but no more than
#: a tenth of a learning rate of 0.01.
LOSS, WEIGHT = 1e-5, 1e-3


def begin(recipe: Path, folder: Path, *overrides: str, size: int = 2, command: str = "train") -> list[BaseProcess]:
    """Start the processes of `torchrun --nproc-per-node SIZE -m fast_ft COMMAND RECIPE output_dir=FOLDER`."""
    words = [command, str(recipe), f"output_dir={folder}", *overrides]
    return [
        start(words, folder.with_name(f"{folder.name}.{rank}"), **variables)
        for rank, variables in enumerate(launched(size))
    ]


def launched(size: int) -> list[dict[str, str]]:
    """What torchrun tells each process."""
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(size)}
    return [where | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(size)]


def statuses(processes: list[BaseProcess], within: float = PATIENCE) -> list[int | None]:
    until = time.monotonic() + within
    for process in processes:
        process.join(max(0.1, until - time.monotonic()))
    found = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    return found


def said(folder: Path, rank: int = 0) -> str:
    """What a process printed; transformers says one thing where it was imported before we could ask it not to."""
    text = folder.with_name(f"{folder.name}.{rank}").read_text(encoding="utf-8")
    return "".join(line for line in text.splitlines(keepends=True) if not line.startswith("[transformers]"))


def log(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]


def adapter(folder: Path) -> dict[str, Any]:
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def assert_equal_up_to_rounding(one: Path, other: Path) -> None:
    pairs = list(zip(log(one), log(other), strict=True))
    assert [(a["step"], a["tokens"], a["supervised_tokens"], a["learning_rate"]) for a, _ in pairs] == [
        (b["step"], b["tokens"], b["supervised_tokens"], b["learning_rate"]) for _, b in pairs
    ]
    assert max(abs(a["loss"] - b["loss"]) for a, b in pairs) < LOSS
    assert max(abs(a["grad_norm"] / b["grad_norm"] - 1) for a, b in pairs) < 1e-3
    left, right = adapter(one), adapter(other)
    assert left.keys() == right.keys()
    largest = max(float(np.abs(each).max()) for each in left.values())
    assert max(float(np.abs(left[name] - right[name]).max()) for name in left) < WEIGHT * largest


def begin_and_pause(after: int, recipe: Path, folder: Path, *overrides: str) -> list[BaseProcess]:
    """begin() two processes to train, and wait until the first has stopped itself (SIGSTOP) after a step.

    So whatever befalls the two then, it comes between the same two steps however busy the machine is.
    """
    words = ["train", str(recipe), f"output_dir={folder}", *overrides]
    processes = [
        start_function(run_and_pause, after, words, str(folder.with_name(f"{folder.name}.{rank}")), variables)
        for rank, variables in enumerate(launched(2))
    ]
    first = psutil.Process(processes[0].pid)
    try:
        wait_until(
            lambda: first.status() == psutil.STATUS_STOPPED,
            lambda: all(each.exitcode is None for each in processes),
            lambda: said(folder),
        )
        assert len(log(folder)) == after
    except BaseException:
        statuses(processes, within=0)  # Python would wait for a stopped process at its end
        raise
    return processes


def run_and_pause(after: int, words: list[str], errors: str, environment: dict[str, str]) -> None:
    """Run a command in the child as killed.run does; its first process stops itself after this number of steps."""
    from fast_ft.pipeline import train_phase

    class Pausing(console.Bar):
        def advance(self, by: int = 1, facts: str = "") -> None:
            super().advance(by, facts)
            if self.done == after:
                os.kill(os.getpid(), signal.SIGSTOP)

    if environment["RANK"] == "0":
        train_phase.Bar = Pausing  # type: ignore[misc]
    run(words, errors, environment)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, tiny: Path, train_file: Path, test_file: Path) -> tuple[Path, Path]:
    """A recipe of ten steps of 4 rows, the last of an epoch of 2; and the run that one process made of it."""
    folder = tmp_path_factory.mktemp("alone")
    changes = {"select.take": 18, "curriculum.stages": [], "train.num_train_epochs": 2, "train.save_steps": 3}
    small = write_recipe(folder, tiny, train_file, test_file, changes | {"train.max_grad_norm": 0.5})
    assert main(["train", str(small), f"output_dir={folder / 'run'}"]) == 0
    assert len(log(folder / "run")) == STEPS
    return small, folder / "run"


def test_two_processes_train_what_one_does(alone: tuple[Path, Path], tmp_path: Path) -> None:
    small, whole = alone
    folder = tmp_path / "both"
    processes = begin(small, folder)
    assert statuses(processes) == [0, 0], said(folder)
    assert_equal_up_to_rounding(whole, folder)
    assert json.loads((folder / "plan.json").read_text())["world_size"] == 2
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["phases"]["train"]["world_size"] == 2
    assert not [text for text in manifest["notes"] if "not equal" in text], "weights stayed the same in all"
    assert said(folder, 1) == "", "only the first one speaks"
    names = [{str(path.relative_to(root)) for path in root.rglob("*")} for root in (whole, folder)]
    assert names[0] == names[1], "and only the first one writes"


def test_killed_and_gone_on_with_in_two_processes_and_then_in_one(alone: tuple[Path, Path], tmp_path: Path) -> None:
    small, whole = alone
    folder = tmp_path / "killed"
    for process in (first := begin_and_pause(4, small, folder)):
        process.kill()
    statuses(first)
    second = begin_and_pause(6, small, folder)
    for kind in (signal.SIGTERM, signal.SIGCONT):
        os.kill(second[0].pid or 0, kind)  # the first one alone: all stop after the same step
    assert statuses(second) == [130, 0], said(folder)
    done = len(log(folder))
    assert done < STEPS and (folder / "checkpoints" / f"step-{done}").is_dir()
    assert main(["train", str(small), f"output_dir={folder}"]) == 0
    assert_equal_up_to_rounding(whole, folder)
    notes = json.loads((folder / "manifest.json").read_text())["notes"]
    assert any("goes on in 1 processes, after 2" in text for text in notes)


def test_a_taste_in_two_processes_is_gone_on_with(alone: tuple[Path, Path], tmp_path: Path) -> None:
    """--stop-after: the first process alone answers meanwhile, and no process waits for another for ever."""
    small, whole = alone
    folder = tmp_path / "taste"
    processes = begin(small, folder, "--stop-after", "4", command="run")
    assert statuses(processes) == [0, 0], said(folder)
    assert len(log(folder)) == 4 and len(json.loads((folder / "taste.json").read_text())["answers"]) == 5
    assert said(folder, 1) == ""
    assert main(["train", str(small), f"output_dir={folder}"]) == 0
    assert_equal_up_to_rounding(whole, folder)


def test_where_one_process_dies_all_end_and_no_step_is_lost(alone: tuple[Path, Path], tmp_path: Path) -> None:
    small, folder = alone[0], tmp_path / "run"
    processes = begin_and_pause(3, small, folder, "train.save_steps=null")
    processes[1].kill()
    os.kill(processes[0].pid or 0, signal.SIGCONT)
    assert statuses(processes) == [130, -signal.SIGKILL]
    done = len(log(folder))
    assert 3 <= done < STEPS and (folder / "checkpoints" / f"step-{done}").is_dir()
    assert "another process of this training has ended" in said(folder)
    folder = tmp_path / "other"
    processes = begin_and_pause(3, small, folder)
    processes[0].kill()
    assert statuses(processes) == [-signal.SIGKILL, 0]


# One of two has trouble: both must settle for the same


def session_of(rank: int, base: str, folder: str, variables: dict[str, str], trouble: str) -> None:
    """In the child: train the sessions of test_train, with some trouble in one process; leave what came of it."""
    import torch

    from fast_ft.common import console
    from fast_ft.common.minutes import TrainPace
    from fast_ft.models import lora_files
    from fast_ft.models.loaders import choose
    from fast_ft.plan.run_plan import TrainPlan
    from fast_ft.recipe import schema
    from fast_ft.train.session import TrainSession
    from fast_ft.train.task import TrainCallbacks, TrainTask
    from tests.train.test_train import make_jobs, make_rows

    os.environ.update(variables)
    here = process_group.enter()
    here.begin()
    if rank > 0:
        console.be_silent()
    model = schema.Model(name_or_path=base, max_length=64, load_in_4bit=False)
    maker = choose.make_loader(model, schema.Lora(r=4, lora_alpha=8), seed=7 + rank, name="peft")
    section = schema.Train(
        effective_batch_size=4, warmup_steps=2, optim="adamw_torch", learning_rate=0.01, max_bad_steps=2
    )
    lines: list[dict[str, Any]] = []
    validation = make_rows(6, seed=3) if rank == 0 else []  # it measures alone
    task = TrainTask(make_jobs(make_rows(12)), section, schema.Carry(), seed=7, pad_id=0, validation=validation)
    pace = None
    if "time" in trouble and rank == 0:
        # three steps a minute; a step is counted before its line is there
        pace = TrainPace(1.0, [1] * task.total, clock=lambda: 20.0 * (len(lines) + 1), since=0.0)
    callbacks = TrainCallbacks(on_step=lines.append)
    session = TrainSession(maker.for_training(), task, TrainPlan(4, world_size=2), Path(folder), callbacks, pace, here)
    seen = [0]

    def full(module: Any, given: tuple[Any, ...]) -> None:
        if given[0].shape[1] > 16:
            raise torch.OutOfMemoryError("as a small card would")

    def spoilt(module: Any, given: Any, output: Any) -> Any:
        seen[0] += 1
        return output * float("inf") if seen[0] in (3, 4) else output

    def no_room_to_measure(module: Any, given: tuple[Any, ...]) -> None:
        if not torch.is_grad_enabled() and given[0].shape[1] > (0 if "at all" in trouble else 24):
            raise torch.OutOfMemoryError("as a small card would")

    embeddings = session.loaded.model.get_input_embeddings()
    if "memory" in trouble and rank == 1:
        embeddings.register_forward_pre_hook(full)
    if "measuring" in trouble and rank == 0:
        embeddings.register_forward_pre_hook(no_room_to_measure)
    if trouble == "numbers" and rank == 1:
        embeddings.register_forward_hook(spoilt)
    session.run()
    weights = torch.cat([each.flatten() for each in lora_files.weights(session.loaded.model).values()])
    found = {
        "losses": [line["loss"] for line in lines], "skipped": [line["skipped"] for line in lines],
        "rates": [line["learning_rate"] for line in lines], "tokens": session.steps.plan.most_tokens,
        "out_of_memory": session.steps.out_of_memory, "out_of_time": session.out_of_time, "weights": weights.tolist(),
        "notes": session.notes, "validation": [line["validation_loss"] for line in lines if "validation_loss" in line],
    }  # fmt: skip
    here.leave()
    (Path(folder) / f"{rank}.json").write_text(json.dumps(found))


def session_in(size: int, base: Path, folder: Path, trouble: str = "none") -> dict[str, Any]:
    """Train in this number of processes; all must have come to the same."""
    folder.mkdir()
    processes = [
        start_function(session_of, rank, str(base), str(folder), variables, trouble)
        for rank, variables in enumerate(launched(size))
    ]
    assert statuses(processes) == [0] * size
    first, *others = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(size)]
    for other in others:
        differs = {key for key in first if str(first[key]) != str(other[key])}
        assert differs <= {"notes", "validation"}, "NaN are equal too"
    return first


def test_trouble_in_one_of_two_is_settled_alike_in_both(tiny: Path, tmp_path: Path) -> None:
    plain = session_in(3, tiny, tmp_path / "plain")  # in steps of two rows one of three has nothing to do
    assert len(plain["losses"]) == 7 and not plain["notes"]
    assert len(plain["validation"]) == 2
    measuring = session_in(2, tiny, tmp_path / "measuring", "measuring")
    assert measuring["losses"] == pytest.approx(plain["losses"], abs=LOSS) and not measuring["notes"]
    assert measuring["validation"] == pytest.approx(plain["validation"], abs=LOSS) and measuring["out_of_memory"] == 0
    short = session_in(2, tiny, tmp_path / "short", "memory, time, measuring at all")
    assert short["out_of_memory"] > 0 and short["tokens"] <= 24
    assert short["out_of_time"] and len(short["losses"]) == 3
    assert short["losses"] == pytest.approx(plain["losses"][:3], abs=LOSS)
    assert not short["validation"] and any("is not measured from step 3 on" in text for text in short["notes"])
    spoilt = session_in(2, tiny, tmp_path / "numbers", "numbers")
    assert spoilt["skipped"].count(True) == 2 and len(spoilt["losses"]) == 2 + 2 + 7
    assert spoilt["rates"][-5:] == pytest.approx([rate / 2 for rate in plain["rates"][-5:]])
    assert "the learning rate is halved" in spoilt["notes"][0]


def no_room(*given: Any, **named: Any) -> None:
    raise InputError("no room here")


def start_one_without_room(words: list[str], errors: str, environment: dict[str, str]) -> None:
    """In the child: killed.run, where the last process cannot load the model."""
    from fast_ft.models.loaders import choose

    if environment["RANK"] != "0":
        choose.make_loader = no_room
    run(words, errors, environment)


def test_a_model_that_does_not_load_in_one_process_is_told_by_the_first(
    alone: tuple[Path, Path], tmp_path: Path
) -> None:
    words = ["train", str(alone[0]), f"output_dir={tmp_path / 'run'}"]
    processes = [
        start_function(start_one_without_room, words, str(tmp_path / f"run.{rank}"), variables)
        for rank, variables in enumerate(launched(2))
    ]
    assert statuses(processes) == [2, 0]
    assert "error: process 1 of 2: no room here" in said(tmp_path / "run") and "error" not in said(tmp_path / "run", 1)


# Who is who


def test_a_launchers_variables_are_taken_out_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process_group, "_here", process_group.ALONE)
    for name, value in {**launched(4)[3], "LOCAL_WORLD_SIZE": "4", "ACCELERATE_MIXED_PRECISION": "bf16"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    place = process_group.enter()
    assert (place.rank, place.size, place.first) == (3, 4, False) and process_group.here() is place
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "7", "each process has a GPU of its own"
    assert not {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "ACCELERATE_MIXED_PRECISION"} & set(os.environ)
    alone = process_group.enter()
    assert alone.size == 1 and alone.first and os.environ["CUDA_VISIBLE_DEVICES"] == "7"


def test_accelerate_that_started_one_process_only_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(process_group, "_here", process_group.ALONE)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    monkeypatch.setenv("MASTER_PORT", "29500")
    assert process_group.enter().size == 1
    assert "accelerate started one process only" in capsys.readouterr().err


def test_one_process_alone_never_touches_torch_distributed() -> None:
    one = process_group.Ranks()
    assert one.begin() and one.share([1]) == [1] and one.most([2, 3]) == [2, 3] and not one.any(False)
    one.sum(object())
    one.agree("no one to hear it")
    one.leave()
    one.end()


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE=two: whole numbers"),
        ({"WORLD_SIZE": "2", "RANK": "2", "MASTER_ADDR": "127.0.0.1"}, "RANK=2, WORLD_SIZE=2.*torchrun"),
        ({"WORLD_SIZE": "2", "RANK": "0"}, "MASTER_ADDR=None.*torchrun"),
    ],
)
def test_variables_that_make_no_sense_are_a_clear_error(
    monkeypatch: pytest.MonkeyPatch, values: dict[str, str], match: str
) -> None:
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=match):
        process_group.enter()


def test_shares_are_balanced_and_whole() -> None:
    assert share([5, 90, 7, 80, 6], 2) == [[1, 0], [2, 3, 4]] or share([5, 90, 7, 80, 6], 2) == [[0, 1], [2, 3, 4]]
    assert share([3, 4], 1) == [[0, 1]]
    assert share([3], 3) == [[0], [], []]


def test_what_several_processes_cannot_do_is_said_by_one_of_them(alone: tuple[Path, Path], tmp_path: Path) -> None:
    small = alone[0]
    sweep = begin(small, tmp_path / "sweep", command="sweep")
    wrong = begin(small, tmp_path / "wrong", "train.learning_rate=fast")
    assert statuses(sweep) == [2, 0] and statuses(wrong) == [2, 0]
    assert "several processes (WORLD_SIZE=2) train a recipe; sweep is for one" in said(tmp_path / "sweep")
    assert "learning_rate" in said(tmp_path / "wrong")
    assert not any("error:" in said(tmp_path / name, 1) for name in ("sweep", "wrong"))


@pytest.mark.soak
def test_torchrun_and_accelerate_start_it(alone: tuple[Path, Path], tmp_path: Path) -> None:
    small, whole = alone
    for name, launcher in {
        "torchrun": ["torch.distributed.run", "--nproc-per-node", "2"],
        "accelerate": ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"],
    }.items():
        words = [sys.executable, "-m", *launcher, "-m", "fast_ft", str(small), f"output_dir={tmp_path / name}"]
        ended = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=300)
        assert ended.returncode == 0, ended.stderr[-3000:]
        assert_equal_up_to_rounding(whole, tmp_path / name)
        assert len(json.loads((tmp_path / name / "pred.json").read_text())) == 5, "and answers, in the first one"
        assert "ParallelMode" not in ended.stderr


@pytest.mark.parametrize(
    ("error", "ended", "status"),
    [
        (ZeroDivisionError("a bug"), True, 0), (ZeroDivisionError("a bug"), False, 1), (process_group.Lost(), True, 0),
        (process_group.Lost(), False, 1), (InputError("wrong"), False, 2),
    ],
)  # fmt: skip
def test_a_followers_bug_shows_its_traceback_though_process_0_ends_the_run(
    error: Exception, ended: bool, status: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Follower(process_group.Ranks):
        def begin(self) -> bool:
            raise error

        def ended(self, within: float) -> bool:
            return ended

    monkeypatch.setattr(console, "_silent", False)
    monkeypatch.setenv("TQDM_DISABLE", "1")
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    assert follow(Follower(1, 2)) == status
    said = capsys.readouterr().err
    if isinstance(error, ZeroDivisionError):
        assert said.startswith("error: process 1 of 2:\nTraceback") and said.endswith("ZeroDivisionError: a bug\n")
        assert said.count("Traceback") == 1 and "in begin" in said
    else:
        assert said == ("" if ended else f"error: process 1 of 2: {error}\n")
