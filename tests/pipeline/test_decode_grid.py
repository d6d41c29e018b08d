"""Many ways to decode from one load, and a talk in the terminal."""

from __future__ import annotations

import io
import itertools
import json
import os
import shutil
import signal
import sys
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fast_ft.cli.chat import chat
from fast_ft.cli.main import main
from fast_ft.common import atomic_files
from fast_ft.common.errors import InputError
from fast_ft.generate.engine.block_manager import PAGE
from fast_ft.generate.engine.fused_model import FusedModel
from fast_ft.generate.engine.kv_cache import KVCache
from fast_ft.generate.engine.model_runner import ModelRunner
from fast_ft.pipeline import adapter_loading
from fast_ft.pipeline.decode_grid import grid
from fast_ft.pipeline.run import run
from fast_ft.recipe.loader import load_recipe
from tests.helpers.parts import write_recipe


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny: Path, train_file: Path, test_file: Path) -> Path:
    recipe = write_recipe(tmp_path_factory.mktemp("grid"), tiny, train_file, test_file, {"curriculum": {}})
    return run(load_recipe(recipe, ["train.max_steps=2"]), recipe).root


def test_each_point_has_a_file_named_by_it(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["generate", str(folder), "--grid", "temperature=0.5,2.5", "top_p=0.7,1.0", "generate.do_sample=true"]
    assert main(command) == 0
    names = [f"grid/pred-temperature{t}-top_p{p}.json" for t in ("0.5", "2.5") for p in ("0.7", "1.0")]
    said = [line.split("  ")[0] for line in capsys.readouterr().out.splitlines()]
    assert said == [f"{folder}/{name}" for name in names]
    summary = json.loads((folder / "grid" / "grid.json").read_text())
    assert [point["file"] for point in summary] == names
    assert all(0 <= point["ended_at_eos"] <= 1 and point["mean_tokens"] <= 6 for point in summary)
    preds = [json.loads((folder / name).read_text()) for name in names]
    assert all(list(pred) == list(preds[0]) for pred in preds) and preds[0] != preds[3]
    assert not list(folder.rglob("*.partial.jsonl"))
    assert not list(folder.glob("pred-*")), "the run folder itself stays as it was"


def test_a_points_answers_are_those_of_generate_with_its_values(folder: Path) -> None:
    grid(folder, ["temperature=1.5", "generate.do_sample=true", "generate.num_return_sequences=2"])
    assert main(["generate", str(folder), "generate.temperature=1.5", "generate.do_sample=true"]) == 0
    alone = json.loads((folder / "pred.json").read_text())
    pairs = json.loads((folder / "grid" / "pred-temperature1.5.json").read_text())
    assert {key: entry["output"][:1] for key, entry in pairs.items()} == {k: e["output"] for k, e in alone.items()}
    assert any(a != b for a, b in (entry["output"] for entry in pairs.values()))


@pytest.mark.parametrize("change", ["the adapter", "the prompts behind the same path"])
def test_a_stopped_grid_goes_on_with_the_answers_of_the_same_adapter_and_prompts_only(
    change: str, tmp_path: Path, tiny: Path, train_file: Path, test_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = shutil.copy(test_file, tmp_path / "prompts.json")
    path = write_recipe(tmp_path, tiny, train_file, prompts, {"curriculum": {}, "output_dir": str(tmp_path / "run")})
    run(load_recipe(path, ["train.max_steps=2"]), path)

    def stopping(what: str, file: Path) -> None:
        if what == "append" and file.parent.name == "grid" and file.is_file() and file.stat().st_size:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(atomic_files, "before", stopping)
        grid(tmp_path / "run", ["max_new_tokens=6,5"])
    assert list((tmp_path / "run" / "grid").glob("*.partial.jsonl")), "answers to go on with"
    if change == "the adapter":
        longer = ["train.max_steps=4", "train.learning_rate=0.5"]
        folder = run(load_recipe(path, longer), path, force_resume=True)
    else:
        rows = json.loads(prompts.read_text(encoding="utf-8"))
        rows[0]["conversations"][0]["value"], rows[1]["conversations"][0]["value"] = (
            each["conversations"][0]["value"] for each in rows[1::-1]
        )
        prompts.write_text(json.dumps(rows), encoding="utf-8")
        folder = run(load_recipe(path, ["train.max_steps=2"]), path)
    grid(folder.root, ["max_new_tokens=6,5"])
    made = (folder.root / "grid" / "pred-max_new_tokens6.json").read_bytes()
    assert json.loads(made) == json.loads(folder.pred.read_bytes())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "--grid needs values to try"),
        (["temperature=hot"], "generate.temperature"),
        (["heat=1,2"], "heat"),
        (["temperature=1", "train.learning_rate=1"], "only generate"),
        (["temperature="], "--grid temperature=: a value is missing"),
        (["temperature=0.3,,0.7"], "a value is missing"),
        (["temperature=0.3", "temperature=0.7"], "temperature was given before"),
        (["temperature=0.3,0.7", "generate.temperature=0.5"], "in one place only"),
        (
            ["generate.do_sample=true", "temperature=0.3,0.30"],
            r"temperature0\.3 and temperature0\.30 are the same settings",
        ),
        (
            [f"top_k={','.join(map(str, range(300)))}", f"max_new_tokens={','.join(map(str, range(1, 301)))}"],
            "90,000 points",
        ),
        (["temperature=0.3,0.7"], "What works: generate.do_sample=true generate.temperature=0.3"),
        (["do_sample=true,false", "temperature=0.3,0.7"], "What works: generate.do_sample=true"),
    ],
)
def test_wrong_axes_are_said_before_a_model_is_loaded(folder: Path, words: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        grid(folder, words)


def test_a_talk_streams_remembers_and_forgets(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second, again, *_ = talk(
        folder, "What colour is the hat?", "And the cup?", "", "What colour is the hat?", "x " * 400
    )
    assert first == again and first != second
    assert "cut off after 9 tokens" in (notes := capsys.readouterr().err) and "context is 256" in notes


def talk(folder: Path, *lines: str, out: io.StringIO | None = None) -> list[str]:
    """What chat writes to `out` (default: a stream of its own) for these lines, a line an answer."""
    said, out = iter(lines), out or io.StringIO()

    def ask(prompt: str) -> str:
        try:
            return next(said)
        except StopIteration:
            raise EOFError from None

    chat(folder, ["generate.max_new_tokens=9"], ask=ask, out=out)
    return out.getvalue().splitlines()[:-1]


def test_base_and_tuned_answer_beside_each_other(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hat = "What colour is the hat?"
    alone, base, tuned, base_on, tuned_on, again = talk(folder, hat, "", "/base", hat, "And?", "/base", "", hat)
    assert (tuned, again) == (f"tuned: {alone}", alone)
    assert base.startswith("base: ") and base.removeprefix("base: ") != alone
    assert base_on.removeprefix("base: ") != tuned_on.removeprefix("tuned: ")
    assert "The base model answers too" in (notes := capsys.readouterr().err) and "tuned model answers alone" in notes
    untrained = talk(folder, "/base", hat)
    assert untrained == [base, tuned], "the sides do not disturb each other"


def test_ctrl_c_stops_an_answer_and_not_the_talk(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hat, cup = "What colour is the hat?", "And the cup?"
    (whole,) = talk(folder, hat)

    class Out(io.StringIO):
        def write(self, text: str) -> int:
            if text and not self.getvalue():  # at the first words
                os.kill(os.getpid(), signal.SIGINT)
            return super().write(text)

    before = signal.getsignal(signal.SIGINT)
    stopped, other = talk(folder, hat, "", cup, out=Out())
    assert whole.startswith(stopped) and stopped != whole and other
    assert "(stopped after " in capsys.readouterr().err and signal.getsignal(signal.SIGINT) is before


def test_a_system_turn_begins_a_new_talk_and_stays(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hat = "What colour is the hat?"
    plain, told, kept, after = talk(folder, hat, "/system Answer as a cup would.", hat, "", hat, "/system", hat)
    assert plain == after and told == kept != plain
    err = capsys.readouterr().err
    assert "with this system turn" in err and "without a system turn" in err


def test_the_temperature_can_be_changed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hat = "What colour is the hat?"
    likely, drawn, again = talk(folder, hat, "/temperature 3", "", hat, "/temperature 0", "", hat)
    assert likely == again != drawn
    assert talk(folder, "/temperature hot", "/temperature -1", "/temperature nan", "/temperature", hat) == [likely]
    assert capsys.readouterr().err.count("it takes a number, at least 0") == 4


def test_commands_are_listed_and_a_wrong_one_is_no_text(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert talk(folder, "/help", "/bsae", "/base now") == []
    err = capsys.readouterr().err
    assert all(word in err for word in ("/base ", "/system TEXT", "/temperature X", "/bsae: there is no such command"))
    assert "/base now: it takes nothing" in err
    (answer,) = talk(folder, "//etc/hosts")
    assert answer


def test_a_talk_reserves_what_it_needs_and_not_the_whole_context(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache grows with the talk, up to the context, and the former one is let go first."""
    made: list[int] = []
    alive: list[weakref.ref[KVCache]] = []

    class Counted(KVCache):
        def __init__(self, model: Any, pages: int, **named: Any) -> None:
            assert not any(cache() is not None for cache in alive), "two caches at once"
            super().__init__(model, pages, **named)
            alive.append(weakref.ref(self))
            made.append(pages * PAGE)

    monkeypatch.setattr("fast_ft.generate.engine.kv_cache.KVCache", Counted)
    said = iter(["Why?", "A cup?", *["What colour is the hat?"] * 30])

    def ask(prompt: str) -> str:
        try:
            return next(said)
        except StopIteration:
            raise EOFError from None

    chat(folder, ["generate.max_new_tokens=9"], ask=ask, out=io.StringIO())
    assert made[0] < 64 and 2 < len(made) < 6 and made == sorted(made)
    assert made[-1] <= 256, "the context"


def test_a_talk_gives_up_weights_in_16_bits_where_memory_does_not_do(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are there by the plan of a card whose memory others have taken since."""
    settle = adapter_loading.decode_plan
    monkeypatch.setattr(adapter_loading, "decode_plan", lambda *given: replace(settle(*given), dequantise=True))
    made, asked = FusedModel.__init__, list[bool]()

    def small(self: FusedModel, model: Any, *, dequantise: bool, **options: Any) -> None:
        asked.append(dequantise)
        if dequantise:
            raise RuntimeError("CUDA: out of memory")
        made(self, model, **options)

    monkeypatch.setattr(FusedModel, "__init__", small)
    assert len(talk(folder, "Why?", "And the hat?")) == 2
    assert asked == [True, False]


def fails_at(monkeypatch: pytest.MonkeyPatch, owner: type, name: str, *calls: int) -> None:
    """Let memory run out at these calls of a method, counted from 1."""
    function, count = getattr(owner, name), itertools.count(1)

    def short(*given: Any, **options: Any) -> Any:
        if next(count) in calls:
            raise torch.OutOfMemoryError("as a small card would")
        return function(*given, **options)

    monkeypatch.setattr(owner, name, short)


def test_memory_that_runs_out_in_an_answer_costs_that_answer_and_not_the_talk(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An answer of 9 tokens is one of the prompt's pass and two bursts of 4."""
    hat, cup = "What colour is the hat?", "And the cup?"
    first, second = talk(folder, hat, cup)
    capsys.readouterr()
    made, caches = KVCache.__init__, list[weakref.ref[KVCache]]()

    def counted(self: KVCache, *given: Any, **options: Any) -> None:
        assert not any(cache() is not None for cache in caches), "the answer that failed holds its cache"
        made(self, *given, **options)
        caches.append(weakref.ref(self))

    with monkeypatch.context() as patch:
        patch.setattr(KVCache, "__init__", counted)
        fails_at(patch, ModelRunner, "decode", 4)  # in the middle of the second answer
        one, part, two = talk(folder, hat, "And a text that is not answered?", cup)
    assert (one, two) == (first, second), "what was said is what was answered"
    assert part, "what was made of it was shown, and the line ended"
    said = capsys.readouterr().err
    assert said.count("Memory ran out over the answer to ") == 1 and "Traceback" not in said
    assert "send an empty line to forget what was said, or start chat again with a generate.max_new_tokens" in said
    with monkeypatch.context() as patch:
        fails_at(patch, ModelRunner, "prefill", 1)
        assert talk(folder, cup, hat, cup) == [first, second]
    assert "ask in fewer words, or start chat again" in capsys.readouterr().err
    with monkeypatch.context() as patch:
        fails_at(patch, KVCache, "__init__", 1, 2, 3)  # for both sides of the first, and one of the second
        said_by = talk(folder, "/base", hat, hat)
    assert said_by[:3] == ["base: ", "tuned: ", "base: "] and said_by[3] == f"tuned: {first}", "each side by itself"
    assert capsys.readouterr().err.count("write /base to have one model answer") == 3


def test_a_text_that_is_too_long_leaves_what_was_said_before_it(folder: Path) -> None:
    hat, cup = "What colour is the hat?", "And the cup?"
    assert talk(folder, hat, "x " * 400, cup) == talk(folder, hat, cup)


def test_an_engine_with_room_to_spare_gives_it_up_before_an_answer_fails(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = (" ".join(["What colour is the hat?"] * 3), "And the cup?")
    wanted = talk(folder, *lines)
    capsys.readouterr()
    asked, made = list[int](), KVCache.__init__

    def small(self: KVCache, model: Any, pages: int, **options: Any) -> None:
        asked.append(pages)
        if pages >= 2 * asked[0] - 1:
            raise torch.OutOfMemoryError("as a small card would")
        made(self, model, pages, **options)

    monkeypatch.setattr(KVCache, "__init__", small)
    assert talk(folder, *lines) == wanted
    assert len(asked) == 3 and asked[0] < asked[2] < asked[1], "twice as long at first, then what the talk needs"
    assert capsys.readouterr().err.count("the answer begins again, in less memory") == 1


def test_transformers_draws_no_bars_in_a_terminal(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.utils import logging

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    logging.enable_progress_bar()
    monkeypatch.setattr(sys, "stderr", err := Terminal())
    grid(folder, ["top_k=3", "generate.do_sample=true"])
    assert "Loading weights" not in err.getvalue() and "top_k3" in err.getvalue()
    assert not logging.is_progress_bar_enabled()
