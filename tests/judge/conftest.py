"""A judge's server on loopback, and run folders with answers to judge."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fast_ft.judge import client, post
from fast_ft.recipe.loader import load_recipe
from fast_ft.run.folder import RunDir
from tests.helpers.judge_server import Faults, JudgeServer
from tests.helpers.judged import COUNT, KEY
from tests.helpers.parts import POCKET, write_recipe
from tests.helpers.patience import PATIENCE


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OPENAI_BASE_URL", "OPENAI_API_KEY", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., JudgeServer]]:
    """Start a server with these faults, and set the environment to it."""
    running = []

    def start(faults: Faults = lambda *_: "") -> JudgeServer:
        server = JudgeServer(faults)
        running.append(server.running())
        monkeypatch.setenv("OPENAI_BASE_URL", running[-1].__enter__())
        monkeypatch.setenv("OPENAI_API_KEY", KEY)
        return server

    yield start
    for each in running:
        each.__exit__(None, None, None)


@pytest.fixture
def ended(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Set once a command lets no further request begin: after Ctrl-C, at a cap, where a server is given up."""
    ended, stop = threading.Event(), client.Endpoint.stop

    def stop_and_say(self: client.Endpoint) -> None:
        stop(self)
        ended.set()

    monkeypatch.setattr(client.Endpoint, "stop", stop_and_say)
    return ended


@pytest.fixture
def hurry(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Let judge.timeout_seconds hold for the first request about a question alone; all others have PATIENCE.

    On a busy machine any other reply might take longer than the fraction of a second that a test wants to wait for.
    """

    def first_about(question: str) -> None:
        exchange, left = post.post, [question.encode()]

        def timed(url: str, body: bytes, headers: dict[str, str], seconds: float) -> post.HttpReply:
            if not (left and left[0] in body):
                return exchange(url, body, headers, PATIENCE)
            left.clear()
            return exchange(url, body, headers, seconds)

        monkeypatch.setattr(post, "post", timed)

    return first_about


@pytest.fixture
def runs(train_file: Path, tmp_path: Path) -> Callable[..., RunDir]:
    """Make run folders with answers and no adapter: run("a", "tuned") answers with "tuned <id>"."""
    ids = [str(i) for i in range(COUNT)]
    rows = [
        {"idx": i, "Skill": ("Math", "Code")[i % 2], "Difficulty": i % 3, "Instruction": f"Q {i}?"}
        for i in range(COUNT)
    ]
    test = tmp_path / "test.jsonl"
    test.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    references = tmp_path / "references.json"
    references.write_text(json.dumps([{"id": i, "prompt": f"Q {i}?", "response": f"It is {i}."} for i in ids]))

    def make(name: str, words: str = "tuned", base: int = 0, **judge: Any) -> RunDir:
        section = {"kind": "openai", "references": str(references), "max_retries": 5} | judge
        section.setdefault("timeout_seconds", PATIENCE)
        changes = {"judge": section, "output_dir": str(tmp_path / "runs" / name)}
        path = write_recipe(tmp_path, POCKET, train_file, test, changes)
        folder = RunDir.open(load_recipe(path, []), path)
        for target, said, count in ((folder.pred, words, COUNT), (folder.base_pred, "base", base)):
            content = {
                i: {"input": [{"role": "user", "content": f"Q {i}?"}], "output": [f"{said} {i}"]} for i in ids[:count]
            }
            if count:
                target.write_text(json.dumps(content), encoding="utf-8")
        return folder

    return make
