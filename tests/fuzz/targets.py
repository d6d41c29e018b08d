"""What the fuzzers feed: a parser for each kind of file, files to begin with, and changes that keep the form of JSON.

A target takes any bytes. Only InputError may come out of the parser, and the target swallows that.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import json
import os
import random
import tempfile
from collections.abc import Callable
from email.message import Message
from pathlib import Path
from typing import Any
from unittest import mock

from fast_ft.cli.show_runs import as_json, print_runs
from fast_ft.cli.show_scores import print_scores
from fast_ft.common import atomic_files, environment
from fast_ft.common.errors import InputError
from fast_ft.data.dataset import Data, load_pool, load_prompts, load_references
from fast_ft.homework import archive, checks, ledger, package, public_scores, reproduce
from fast_ft.judge import client, client_errors, openai_judge, post, request_form
from fast_ft.judge import reply_cache as verdict_file
from fast_ft.judge.scoring import Group, Item, Judgment, summarise
from fast_ft.pipeline import judge_phase
from fast_ft.recipe import loader
from fast_ft.recipe.schema import Judge, Range, Search
from fast_ft.report import comparison, overview, result, run_data
from fast_ft.run import artifacts
from fast_ft.run.folder import RunDir, differences
from fast_ft.run.listing import list_runs
from fast_ft.sweep import cost_estimate, files, report
from fast_ft.sweep.axis import Axis
from fast_ft.sweep.clock import Clock
from fast_ft.sweep.search_space import SearchSpace
from fast_ft.sweep.study import Study
from tests.helpers.parts import POCKET, ROOT

FOLDER = Path(tempfile.mkdtemp(prefix="fuzz-"))
RUN = FOLDER / "run"
RECIPE = loader.load_recipe(ROOT / "recipes" / "quickstart.yaml")
TURN = {"role": "user", "content": "Why?"}
PRED = {"a": {"input": [TURN], "output": ["So."]}, "b": {"input": [TURN], "output": ["No."]}}
CELLS = {"count": 2, "missing": 0, "missing_share": 0.0, "mean": 0.5, "low": 0.1, "high": 0.9, "deviation": 0.1}
MATCH = {"exact_match": 0.5, "rouge_l": 0.6, "chrf": 0.7, "length_ratio": 1.0}
REFERENCE = {
    "kind": "reference", "notes": ["Text."], "pred": "0" * 64, **CELLS, **MATCH, "by_skill": {"sum": CELLS | MATCH},
    "by_difficulty": {"3": CELLS | MATCH}, "base": CELLS | MATCH | {"by_skill": {}, "prompts": {"a": {"score": 0.0}}},
    "gain": {"sentence": "More.", "count": 2},
    "prompts": {"a": {"score": 1.0, "exact_match": True}, "b": {"score": None, "problem": "x"}},
}  # fmt: skip
OPENAI = {
    "kind": "openai", "model": "m", "labelled": "pairwise", "answered_by": ["m"], "scale": [1, 10], "notes": [],
    **CELLS, "reference_mean": 8.0, "swapped": {"order_effect": 0.2}, "baselines": {"simple": 2.4}, "by_skill": {},
    "prompts": {"a": {"score": 7.0, "reply": "8 7", "reference_score": 8.0, "swapped": {"score": 7.0, "reply": "7 8"}}},
}  # fmt: skip
MANIFEST = {
    "recipe": {
        "model": {"name_or_path": "m"}, "lora": {"r": 4}, "judge": {}, "seed": 1, "data": {"train": "absent.json"},
        "budget": {"memory_gib": 15, "train_minutes": 1.5, "generate_minutes": None}, "rules": None,
    },
    "recipe_file": "a.yaml", "recipe_digest": "0", "started": "2026-01-01", "leakage": {"hits": []}, "notes": ["Text."],
    "phases": {
        "train": {"seconds": 1.0, "peak_gib": 2.5, "last_loss": 0.5, "finished": "2026-01-01", "backend": "peft"},
        "generate": {"seconds": 2, "decoding_seconds": 1.5, "answers": 2}, "judge": {"seconds": 0.1, "mean": 0.5},
    },
    "rows": [{"id": "a", "digest": "0"}], "stages": [{"name": "all", "ids": ["a"]}], "digests": {"pred": "0"},
    "environment": {"python": "3.11", "system": "Linux", "packages": {"torch": "2.13.0", "trl": None}, "gpu": None},
    "model": {"name_or_path": "m", "commit": None, "config": {"quantization_config": {"load_in_4bit": True}}},
}  # fmt: skip
LOG = [{"stage": "all", "step": 1, "loss": 2.0, "seconds": 0.1}, {"stage": "all", "step": 2, "loss": 1.5}]
#: What a sweep's journal keeps of a finished trial.
TRIAL: dict[str, Any] = {
    "state": "finished", "folder": "sweep/trials/12345678", "training": "0" * 16, "scores": {"a": 0.25, "b": 0.75},
    "priced": None, "seconds": {"all": 9.0, "steps": 5.0}, "times": {}, "minutes": 0.2, "worker": 0, "trained_in": None,
    "work": [100, 2, 6], "took": {"steps": 5.0, "answers": 2.0, "all": 9.0, "load": 1.0}, "changed": {},
    "proof": {"rows": ["0" * 16], "in_validation": [], "in_test": []},
}  # fmt: skip
SWEPT = FOLDER / "sweep"
SEARCH = Search(
    space={"lora.r": (4, 8), "train.learning_rate": Range(low=1e-4, high=1e-3)}, sampler="random", objective="chrf"
)
SPACE = SearchSpace(
    (Axis("lora.r", ("4", "8")), Axis("train.learning_rate", range=Range(low=1e-4, high=1e-3))),
    {"lora.r": "4", "train.learning_rate": 2e-4}, (),
)  # fmt: skip
SWEEP: dict[str, Any] = {
    "recipe": {"seed": 1, "output_dir": "a", "lora": {"r": 4}, "search": SEARCH.model_dump(mode="json")},
    "recipe_file": "a.yaml", "started": "2026-01-01", "environment": {}, "trials": [], "seconds": 1.0,
    "validation": {"file": "0" * 64, "prompts": ["0" * 16], "in_test": []}, "test": {"prompts": ["0" * 16]},
    "own": 0,
}  # fmt: skip
AXIS_R = '{"name": "CategoricalDistribution", "attributes": {"choices": ["4", "8"]}}'
AXIS_RATE = '{"name": "FloatDistribution", "attributes": {"step": null, "low": 0.0001, "high": 0.001, "log": false}}'
DAY = "2026-01-01T00:00:00+00:00"
#: The lines of a journal, in Optuna's form: a finished trial, one that came to nothing, one in flight, one not begun.
JOURNAL: list[dict[str, Any]] = [
    {"op_code": 0, "study_name": "sweep", "directions": [2]},
    {"op_code": 2, "study_id": 0, "user_attr": {"inputs": {"the training rows": "0"}}},
    {"op_code": 4, "study_id": 0, "datetime_start": None, "state": 4, "value": None, "values": None,
     "distributions": {}, "params": {}, "user_attrs": {}, "intermediate_values": {},
     "system_attrs": {"fixed_params": {"lora.r": "4", "train.learning_rate": 2e-4}}},
    {"op_code": 6, "trial_id": 0, "state": 0, "values": None, "datetime_start": DAY},
    {"op_code": 5, "trial_id": 0, "param_name": "lora.r", "param_value_internal": 0, "distribution": AXIS_R},
    {"op_code": 5, "trial_id": 0, "param_name": "train.learning_rate", "param_value_internal": 2e-4,
     "distribution": AXIS_RATE},
    {"op_code": 7, "trial_id": 0, "step": 1, "intermediate_value": 0.4},
    {"op_code": 8, "trial_id": 0, "user_attr": {"facts": TRIAL}},
    {"op_code": 6, "trial_id": 0, "state": 1, "values": [0.5], "datetime_complete": DAY},
    {"op_code": 4, "study_id": 0, "datetime_start": DAY},
    {"op_code": 8, "trial_id": 1, "user_attr": {"facts": {"state": "no result", "reason": "lost"}}},
    {"op_code": 6, "trial_id": 1, "state": 3, "values": None, "datetime_complete": DAY},
    {"op_code": 4, "study_id": 0, "datetime_start": DAY},
    {"op_code": 5, "trial_id": 2, "param_name": "lora.r", "param_value_internal": 1, "distribution": AXIS_R},
    {"op_code": 5, "trial_id": 2, "param_name": "train.learning_rate", "param_value_internal": 3e-4,
     "distribution": AXIS_RATE},
    {"op_code": 4, "study_id": 0, "datetime_start": None, "state": 4, "value": None, "values": None,
     "distributions": {}, "params": {}, "user_attrs": {}, "intermediate_values": {},
     "system_attrs": {"fixed_params": {"lora.r": "8", "train.learning_rate": 4e-4}}},
]  # fmt: skip
ROWS = [
    {"id": "a", "conversations": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "So."}], "score": 4.5},
    {"id": 7, "messages": [TURN, {"role": "assistant", "content": "No."}]},
    {"instruction": "Add.", "input": "1 1", "output": "2"},
    {"idx": 1, "Skill": "Math", "Difficulty": 3, "Instruction": "Add 1 and 1."},
    {"prompt": "Why?", "completion": "So."},
]
SUBMISSIONS = [
    {"score": 4.25, "at": "2025-04-05T13:30:00+00:00", "pred": "0" * 64},
    {"score": 4, "at": "2025-04-06 21:30", "note": "by hand"},
]
AT = {"OPENAI_BASE_URL": "http://127.0.0.1:9/v1", "OPENAI_API_KEY": "sk-0123456789"}
ITEM = Item("Why?", "So.", "No.")
JUDGE = Judge(kind="openai", references="r.json", max_retries=0, dollars_per_million_tokens=(1, 1))
COMPLETION = {
    "id": "x", "object": "chat.completion", "created": 0, "model": "m", "usage": {"prompt_tokens": 9},
    "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "8 7\nGood."}}],
}  # fmt: skip
REFUSAL = {"error": {"message": "slow down", "type": "x", "code": "rate"}}
#: Values that stand where others are expected.
ODD: list[Any] = [
    None, True, False, 0, -1, 1, 10**400, 1e308, -1e-308, 2**63, "", "x", " ", "\x00", "\ud800", "\u2028", "é" * 50,
    "7", "../../x", [], {}, [[]], [None], {"": ""}, [1, "a", None], "nan", ">= 4", "1..2", "{recipe}", "a" * 10_000,
]  # fmt: skip


def recipe(data: bytes) -> None:
    """A recipe file; from the last line that begins with `+` on, overrides."""
    text, *overrides = data.split(b"\n+")
    path = FOLDER / "recipe.yaml"
    path.write_bytes(text)
    words = [word.decode("utf-8", "surrogateescape") for word in overrides[:4]]
    loaded = loader.load_recipe(path, words)
    loader.digest(loader.with_overrides(loaded, ["lora.r=4"]))


def data(data: bytes) -> None:
    """A data file as training rows, as prompts and as references."""
    path = FOLDER / "rows.json"
    path.write_bytes(data)
    error: InputError | None = None
    for train_on in ("all", "last"):
        try:
            pool = load_pool(Data(train=str(path), train_on=train_on))
            pool.examples(range(len(pool)))
        except InputError as caught:
            error = caught
    for read in (load_prompts, load_references):
        try:
            read(str(path))
        except InputError as caught:
            error = caught
    if error is not None:
        raise error


def pred(data: bytes) -> None:
    """A pred.json, as the judge, the hand-in's check and the report read it."""
    folder = _run(pred=data)
    checks._answers(folder.pred, [])
    run_data.answers([run_data.read_run(folder)])
    judge_phase._items(folder.pred, None)


def scores(data: bytes) -> None:
    """A scores.json, as `judge` prints it, `runs` lists it and the report shows it."""
    folder = _run(scores=data)
    list_runs(FOLDER)
    run = run_data.read_run(folder)
    run_data.answers([run])
    result.result(run)
    overview.settings(run, [])
    comparison.compared([run, run])
    with contextlib.redirect_stdout(io.StringIO()):
        print_scores(folder)


def manifest(data: bytes) -> None:
    """A manifest.json, as `runs` lists it, the report shows it and the hand-in's check reads it."""
    folder = _run(manifest=data)
    list_runs(FOLDER)
    ledger.read(FOLDER)
    run = run_data.read_run(RunDir.at(RUN))
    result.result(run)
    overview.settings(run, [])
    comparison.compared([run, run])
    list(checks.by_manifest(RECIPE, folder.record()))


def submissions(data: bytes) -> None:
    """A submissions.json, as `runs` lists it and as a public score is added to it."""
    folder = _run()
    path = folder.root / public_scores.FILE
    path.write_bytes(data)
    content = ledger.read(FOLDER)
    content.sentences()
    with contextlib.redirect_stdout(io.StringIO()):
        print_runs(content, FOLDER)
        as_json(content)
    try:
        ledger.record(folder, 4.0)
        assert public_scores.submissions(folder), "what is written can be read"
    finally:
        path.unlink()


def zips(data: bytes) -> None:
    """A submission's zip, as `reproduce` reads it. Bytes that are no zip are packed as its two JSON files."""
    path = FOLDER / "x.zip"
    if not data.startswith(b"PK"):
        parts = data.split(b"\n+", 1)
        files = {"manifest.json": parts[0], "pred.json": parts[1] if len(parts) > 1 else json.dumps(PRED).encode()}
        data = package.packed(files, "top")
    path.write_bytes(data)
    theirs = archive.read(path)
    checks.by_manifest(theirs.recipe, theirs.manifest)
    own = {"data.train": "a", "data.test": "b", "output_dir": "c", "model.name_or_path": str(POCKET)}
    recipe = reproduce.replayed(theirs, own)
    list(reproduce.beforehand(theirs, recipe))


def _handed_in() -> dict[str, Any]:
    """A manifest as a zip holds it."""
    recipe = loader.resolved(RECIPE)
    digest = hashlib.sha256(json.dumps(PRED).encode()).hexdigest()
    train, generate = {"backend": "peft", "dtype": "float32"}, {"batch_size": 2}
    return MANIFEST | {
        "recipe": recipe, "recipe_digest": loader.content_digest(recipe), "digests": {"pred": digest, "adapter": "0"},
        "phases": {"train": train, "generate": generate}, "plan": {"micro_batch": 4, "generation_batch": 2},
        "model": MANIFEST["model"] | {"revision": None, "weights": {"model.safetensors": "sha256:0"}},
        "generated_with": recipe["generate"] | {"test": "b"},
    }  # fmt: skip


def reply(data: bytes) -> None:
    """A judge's reply: as an answer that is scored, as a refusal of each kind, and compressed."""
    head = data[:40].decode("latin-1")
    client_errors.retry_after({"retry-after": head})
    headers = Message()
    headers["location"] = " ".join(head.split())
    with environment.during(AT):
        asked = client.Endpoint(JUDGE)
    for status in (307, 400, 401, 429, 500):
        try:
            asked._read(post.HttpReply(status, headers, data))
        except client_errors.Failure as failure:
            str(failure).encode()
            request_form.RequestForm().asked_for(failure.error)
    for coding in ("gzip", "deflate", head):
        with contextlib.suppress(post.Broken, post.TooLong):
            assert len(post._unpacked(data, coding)) <= post.MOST
    _judged(post.HttpReply(200, headers, data), b"")


def verdicts(data: bytes) -> None:
    """A verdicts.jsonl, as a judge reads it, adds to it and finds all in it that was paid for."""
    first = _judged(post.HttpReply(200, Message(), json.dumps(COMPLETION).encode()), data)
    kept = (FOLDER / verdict_file.FILE).read_bytes()
    again = _judged(post.HttpReply(500, Message(), b""), kept)
    assert first.score == again.score == 7 and first.details == again.details, "a reply that was kept is not found"


def _judged(answer: post.HttpReply, kept: bytes) -> Judgment:
    """Score ITEM by a kept reply or, where none holds a score, by a server's answer; write that down, and read it."""
    path, scores = FOLDER / verdict_file.FILE, FOLDER / "scores.json"
    path.write_bytes(kept)
    sent = mock.patch.object(post, "post", lambda *_: answer)
    with environment.during(AT), sent, mock.patch.object(os, "fsync", lambda fd: None):
        store = verdict_file.ReplyCache(path)
        judge = openai_judge.OpenAIJudge(JUDGE, store)
        judge.open(0.0)
        with store.locked():
            judge.forget_unreadable([ITEM])
            judge.estimate([ITEM])
            judgment = judge(*ITEM)
        atomic_files.write_json(scores, OPENAI | summarise({"a": judgment}, Group(), 0) | judge.facts())
    artifacts.read_scores(scores)
    return judgment


def _key() -> str:
    """Return the key of what is asked about ITEM."""
    with environment.during(AT):
        judge = openai_judge.OpenAIJudge(JUDGE, verdict_file.ReplyCache(FOLDER / "none"))
    return judge._key(next(judge._questions(*ITEM)))


_there: dict[Path, bytes] = {}
_MANIFEST, _PRED, _REFERENCE = (json.dumps(each).encode() for each in (MANIFEST, PRED, REFERENCE))
_LOG = "".join(json.dumps(line) + "\n" for line in LOG).encode()


def _run(pred: bytes | None = None, scores: bytes | None = None, manifest: bytes | None = None) -> RunDir:
    folder = RunDir(RUN)
    RUN.mkdir(exist_ok=True)
    _write(folder.manifest_path, _MANIFEST if manifest is None else manifest)
    _write(folder.pred, _PRED if pred is None else pred)
    _write(folder.base_pred, _PRED)
    _write(folder.log, _LOG)
    _write(folder.scores, _REFERENCE if scores is None else scores)
    return folder


def _write(path: Path, content: bytes) -> None:
    """Write a file that no target's parser writes, where it does not hold this content yet."""
    if _there.get(path) != content:
        path.write_bytes(content)
        _there[path] = content


def sweep(data: bytes) -> None:
    """A sweep.json, as the same command reads it and goes on to the page."""
    _swept()
    (SWEPT / "sweep.json").write_bytes(data)
    there = files.read_sweep(SWEPT / "sweep.json")
    if differences(there["recipe"], SWEEP["recipe"]):
        raise InputError("another recipe")
    _page(there, [TRIAL | {"number": 0, "point": SPACE.own, "value": 0.5, "stages": {}}])


def clock(data: bytes) -> None:
    """A sweep's clock.json."""
    SWEPT.mkdir(exist_ok=True)
    (SWEPT / "clock.json").write_bytes(data)
    assert Clock(SWEPT / "clock.json", 3600.0).left <= 3600.0


def journal(data: bytes) -> None:
    """A sweep's study.journal, as the same command reads it, goes on with it and shows it."""
    _swept()
    path = SWEPT / "study.journal"
    path.write_bytes(data)
    study = Study(path, SEARCH, SPACE, 1)
    study.check()
    for point in study.interrupted():
        study.fail(study.ask(point), "stopped")
    study.same_inputs({"the training rows": "0"})
    study.finish(study.ask(), 0.25, **TRIAL)
    records = study.records()
    cost_estimate.seconds(cost_estimate.Work(10, 2, 6), cost_estimate.measured(records))
    _page(SWEEP, records)


def _swept() -> None:
    SWEPT.mkdir(exist_ok=True)
    for name in ("sweep.json", "study.journal", "report.html"):
        (SWEPT / name).unlink(missing_ok=True)


def _page(there: dict[str, Any], trials: list[dict[str, Any]]) -> None:
    best = {"number": trials[-1]["number"], "value": trials[-1]["value"], "run": None, "sentence": "Best of 1."}
    written = there | {"trials": trials, "seconds": 1.0, "hours": None, "ended": "over", "best": best}
    atomic_files.write_json(SWEPT / "sweep.json", written)
    report.write(SWEPT)


TARGETS: dict[str, Callable[[bytes], None]] = {
    "recipe": recipe,
    "data": data,
    "pred": pred,
    "scores": scores,
    "manifest": manifest,
    "submissions": submissions,
    "zips": zips,
}


def _seeds() -> dict[str, list[bytes]]:
    recipes = [path.read_bytes() for path in sorted((ROOT / "recipes").glob("*.yaml"))]
    odd_yaml = [b"a: &a [*a]\n", b"? [a]: b\n", b"%YAML 1.2\n---\n!!python/object:os.system x\n", b"<<: {a: 1}\n"]
    overridden = [
        recipes[0] + b"\n+lora.r=32\n+curriculum.stages.0.name=x",
        recipes[1] + b"\n+select.where={score: '> 1'}",
    ]
    rows = [json.dumps(ROWS[:1]), json.dumps(ROWS), *map(json.dumps, ROWS), "\n".join(map(json.dumps, ROWS))]
    pred = json.dumps(PRED).encode()
    rows += [json.dumps({"data": ROWS[:1]}), json.dumps(PRED)]
    return {
        "recipe": [*recipes, *odd_yaml, *overridden],
        "data": [*(text.encode() for text in rows), b"PAR1", b"ARROW1\0\0", b"\xff\xff\xff\xff\x10\0\0\0", b"\x80\x04"],
        "pred": [json.dumps(PRED).encode()],
        "scores": [json.dumps(REFERENCE).encode(), json.dumps(OPENAI).encode()],
        "manifest": [json.dumps(MANIFEST).encode()],
        "submissions": [json.dumps({"submissions": SUBMISSIONS}).encode()],
        "zips": [
            json.dumps(_handed_in()).encode(),
            json.dumps(_handed_in()).encode() + b"\n+" + json.dumps(PRED).encode(),
            package.packed({"manifest.json": json.dumps(_handed_in()).encode(), "pred.json": pred}, "top"),
        ],
    }


SEEDS = _seeds()

TARGETS |= {"reply": reply, "verdicts": verdicts}
KEPT = {
    "key": _key(),
    "reply": "8 7\n\ud83d",
    "model": "m",
    "rubric": "r",
    "prompt_tokens": 9,
    "completion_tokens": None,
}
SEEDS |= {
    "reply": [json.dumps(COMPLETION).encode(), json.dumps(REFUSAL).encode(), gzip.compress(b"x" * 99), b"<html>"],
    "verdicts": [
        b"\n".join(json.dumps(KEPT | {"key": key}).encode() for key in (KEPT["key"], "0", "1")),
        json.dumps(KEPT).encode(),
        json.dumps(KEPT, ensure_ascii=False).encode("utf-8", "surrogatepass"),
    ],
}


TARGETS |= {"sweep": sweep, "clock": clock, "journal": journal}
SEEDS |= {
    "sweep": [json.dumps(SWEEP).encode()],
    "clock": [b'{"seconds": 12.5}'],
    "journal": [b"".join(json.dumps(line | {"worker_id": "w"}).encode() + b"\n" for line in JOURNAL)],
}


def run(name: str, content: bytes) -> bool:
    """Feed a target; return whether it took the bytes. Anything but InputError comes out."""
    try:
        TARGETS[name](content)
    except InputError as error:
        str(error).encode("utf-8", "surrogatepass")
        return False
    return True


def changed(content: bytes, chance: random.Random) -> bytes:
    """Change a file: a value within JSON or YAML for another, where it is one; else, or as well, some of its bytes."""
    if chance.random() < 0.7:
        import yaml

        try:
            value = yaml.load(content, yaml.CBaseLoader) if chance.random() < 0.1 else json.loads(content)
        except (ValueError, RecursionError, yaml.YAMLError):
            return _bytes(content, chance)
        for _ in range(chance.choice((1, 1, 1, 2, 4))):
            value = _value(value, chance)
        try:
            return json.dumps(value).encode()  # JSON is YAML
        except (ValueError, RecursionError):
            return content
    return _bytes(content, chance)


def _value(value: Any, chance: random.Random) -> Any:
    """Return the value with one place in it changed, dropped, doubled or renamed."""
    if isinstance(value, dict) and value and chance.random() < 0.9:
        key = chance.choice(list(value))
        kind = chance.random()
        if kind < 0.1:
            return {k: v for k, v in value.items() if k != key}
        if kind < 0.2:
            return {**value, chance.choice(["", "x", "prompts", "output", key + "x", "__class__"]): value[key]}
        return {**value, key: _value(value[key], chance)}
    if isinstance(value, list) and value and chance.random() < 0.9:
        place = chance.randrange(len(value))
        kind = chance.random()
        if kind < 0.1:
            return value[:place] + value[place + 1 :]
        if kind < 0.2:
            return [*value, value[place]]
        return [*value[:place], _value(value[place], chance), *value[place + 1 :]]
    return chance.choice(ODD)


def _bytes(content: bytes, chance: random.Random) -> bytes:
    made = bytearray(content)
    for _ in range(chance.choice((1, 2, 4, 16))):
        place = chance.randrange(len(made) + 1)
        kind = chance.randrange(5)
        if kind == 0:
            del made[place : place + chance.choice((1, 4, 64))]
        elif kind == 1:
            made[place:place] = chance.choice(TOKENS)
        elif kind == 2:
            made[place:place] = bytes(chance.randrange(256) for _ in range(chance.choice((1, 2, 8))))
        elif kind == 3 and place < len(made):
            made[place] ^= 1 << chance.randrange(8)
        else:
            start = chance.randrange(len(made) + 1)
            made[place:place] = made[start : start + chance.choice((4, 32, 256))]
    return bytes(made[:100_000])


TOKENS = [
    b"{", b"}", b"[", b"]", b'"', b":", b",", b"\n", b"- ", b"null", b"NaN", b"Infinity", b"1e999", b"-", b"\\ud800",
    b"\xef\xbb\xbf", b"&a ", b"*a", b"!!python/name:os ", b"<<: ", b"? ", b"|\n", b"#", b"%TAG ! x", b"\t", b"\0",
    b"\xff", b"[" * 2000, b'{"a":' * 2000, b"9" * 5000, b"\r\n", b"---\n", b"'", b"\xc2\x85", b"\xe2\x80\xa8",
]  # fmt: skip
