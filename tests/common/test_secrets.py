"""Keys in the environment reach no file, no log, no traceback and no process list that the project writes."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from fast_ft.cli.main import main
from fast_ft.common import console, redaction
from tests.helpers.parts import ROOT, RecipeFactory

KEYS = {name: f"marked-{name.lower()}-0f3a9c" for name in ("HF_TOKEN", "OPENAI_API_KEY", "WANDB_API_KEY")}


@pytest.fixture(autouse=True)
def marked(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in KEYS.items():
        monkeypatch.setenv(name, value)


class Watch:
    """What this process did while `on`: the files that it opened to write, and the processes that it started."""

    def __init__(self) -> None:
        self.on, self.files, self.started = False, set[str](), list[str]()
        sys.addaudithook(self.see)

    def see(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.on:
            return
        if event == "open" and isinstance(arguments[0], str | bytes) and arguments[2] & (os.O_WRONLY | os.O_RDWR):
            self.files.add(os.fsdecode(arguments[0]))
        elif event in ("subprocess.Popen", "os.exec", "os.posix_spawn", "os.system"):
            self.started.append(repr(arguments[:2]))
        elif event == "os.rename":
            self.files.add(os.fsdecode(arguments[1]))


WATCH = Watch()  # a hook cannot be taken away again, so there is one


@pytest.fixture
def telltale(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A judge that refuses, and says back every header that it was sent."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            body = json.dumps({"error": {"message": f"no: {dict(self.headers)}", "type": "invalid"}}).encode()
            self.send_response(401)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("OPENAI_BASE_URL", f"http://127.0.0.1:{server.server_port}/v1")
    yield
    server.shutdown()
    server.server_close()


def test_a_run_a_refused_judge_a_report_and_a_zip_hold_no_key(
    telltale: None,
    recipe_file: RecipeFactory,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG)
    rows = [{"id": f"q{i}", "prompt": f"Name cup {i}.", "response": f"It is cup {i}."} for i in range(3)]
    references = tmp_path / "references.json"
    references.write_text(json.dumps(rows), encoding="utf-8")
    judge = {"kind": "openai", "references": str(references), "max_retries": 0}
    output = {"output_dir": str(tmp_path / "run"), "data.test": str(references), "judge": judge}
    path = str(recipe_file(output))
    WATCH.on = True
    try:
        assert main([path]) == main([path]) == 2, "the judge refuses, and again"
        assert main(["report", str(tmp_path / "run")]) == 0
        assert main(["submit", str(tmp_path / "run"), "--student-id", "b12901001", "--output", str(tmp_path)]) == 0
    finally:
        WATCH.on = False
    written = {Path(name) for name in WATCH.files if Path(name).is_file() and not name.startswith(("/dev/", "/proc/"))}
    written |= {file for file in tmp_path.rglob("*") if file.is_file()}
    names = {file.name for file in written}
    assert names >= {
        "manifest.json",
        "log.jsonl",
        "report.html",
        "pred.json",
        "b12901001_hw5.zip",
        "adapter_config.json",
    }
    spoken = capfd.readouterr()
    texts = [spoken.out, spoken.err, caplog.text, *WATCH.started]
    assert "[OPENAI_API_KEY]" in spoken.err or "[key]" in spoken.err, "the server did say it back"
    for file in written:
        texts.append(file.read_bytes().decode("utf-8", "replace"))
        if zipfile.is_zipfile(file):
            with zipfile.ZipFile(file) as archive:
                texts += [archive.read(name).decode("utf-8", "replace") for name in archive.namelist()]
    for text in texts:
        assert not [name for name, value in KEYS.items() if value in text]


def test_notes_hold_no_key(capsys: pytest.CaptureFixture[str]) -> None:
    console.note(f"header: Bearer {KEYS['HF_TOKEN']}, {KEYS['WANDB_API_KEY']}")
    assert capsys.readouterr().err == "header: Bearer [HF_TOKEN], [WANDB_API_KEY]\n"
    assert redaction.redacted("nothing to see") == "nothing to see"


@pytest.mark.parametrize("where", ["main", "thread"])
def test_a_bugs_traceback_holds_no_key_and_ends_with_1(where: str, tmp_path: Path) -> None:
    """A bug whose message is what a library was given."""
    program = f"""
import os, runpy, sys, threading
from fast_ft.cli import main
def bug(options):
    def fail():
        cause = KeyError(os.environ["OPENAI_API_KEY"])
        raise RuntimeError("Authorization: Bearer " + os.environ["HF_TOKEN"]) from cause
    if {where!r} == "main":
        fail()
    thread = threading.Thread(target=fail)
    thread.start()
    thread.join()
    return 1
main.COMMANDS["schema"] = bug
sys.argv = ["fast_ft", "schema"]
runpy.run_module("fast_ft", run_name="__main__")
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" in done.stderr and "[HF_TOKEN]" in done.stderr
    assert not [name for name, value in KEYS.items() if value in done.stderr + done.stdout]
