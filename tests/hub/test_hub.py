"""Model folders and the hub: a real HTTP server on this machine stands in for it. Nothing leaves the machine."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import struct
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from fast_ft.common import signals
from fast_ft.common.errors import InputError
from fast_ft.hub import download
from tests.helpers.patience import PATIENCE, wait_until

TOKEN = "hf_secretsecretsecretsecretsecretsecr"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def safetensors(values: int = 8) -> bytes:
    header = json.dumps({"w": {"dtype": "U8", "shape": [values], "data_offsets": [0, values]}}).encode()
    return struct.pack("<Q", len(header)) + header + bytes(values)


class Hub:
    """What the server answers: a status for everything, or files, some cut short, some refused."""

    def __init__(self) -> None:
        self.status = 200
        self.gated = False
        self.cut = ""
        self.endless = ""
        self.over = threading.Event()
        self.sizes: dict[str, int] = {}  # sizes claimed by the metadata
        self.files = {
            "config.json": b'{"model_type": "llama"}',
            "tokenizer.json": b"{}",
            "model.safetensors": safetensors(),
            "pytorch_model.bin": b"pickle",
            "modeling.py": b"code",
            "onnx/config.json": b"{}",
        }
        self.fetched: list[str] = []


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    state = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            pass

        def answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
            self.send_response(status)
            for key, value in ({"Content-Length": str(len(body))} | (headers or {})).items():
                self.send_header(key, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            path = self.path.split("?")[0]
            sizes = {name: state.sizes.get(name, len(body)) for name, body in state.files.items()}
            if state.status != 200:
                # An unkind hub, which sends the token back.
                return self.answer(state.status, b"no", {"X-Error-Message": f"token {TOKEN} refused"})
            if "/tree/" in path:
                rows = [{"type": "file", "path": name, "size": size, "oid": name} for name, size in sizes.items()]
                return self.answer(200, json.dumps(rows).encode())
            if path.startswith("/api/"):
                siblings = [{"rfilename": name, "size": size} for name, size in sizes.items()]
                return self.answer(200, json.dumps({"id": "o/m", "sha": COMMIT, "siblings": siblings}).encode())
            if state.gated:
                return self.answer(403, b"", {"X-Error-Code": "GatedRepo", "X-Error-Message": f"gated {TOKEN}"})
            name = path.split(f"/{COMMIT}/")[-1]
            body = state.files[name]
            headers = {"ETag": f'"{name}"', "X-Repo-Commit": COMMIT}
            if self.command == "GET":
                state.fetched.append(name)
                if name == state.endless:
                    self.answer(200, body[:20], headers | {"Content-Length": "1000000"})
                    while not state.over.wait(0.02):
                        self.wfile.write(b" ")
                    self.close_connection = True
                    return None
                if name == state.cut:
                    self.answer(200, body[:20], headers | {"Content-Length": str(len(body))})
                    self.close_connection = True
                    return None
            return self.answer(200, body, headers)

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=http.serve_forever, args=(0.02,), daemon=True).start()
    set_up_client(tmp_path, monkeypatch, http.server_address[1])
    yield state
    state.over.set()
    http.shutdown()
    http.server_close()


def set_up_client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, port: int) -> None:
    from huggingface_hub import constants, file_download

    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{port}")
    # The client builds this one from ENDPOINT when it is imported.
    template = f"http://127.0.0.1:{port}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(file_download.time, "sleep", lambda _: None)  # the client's pauses between attempts
    monkeypatch.setenv("HF_TOKEN", TOKEN)


def refused(name: str = "o/m", **options: Any) -> str:
    with pytest.raises(InputError) as caught:
        download.model_folder(name, **options)
    said = str(caught.value)
    assert TOKEN not in said and "\n" not in said and name in said
    assert caught.value.__suppress_context__ or caught.value.__context__ is None
    return said


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (401, "401 (not authorised)|misspelt, or private|HF_TOKEN"),
        (403, "403|accept the licence on http://127.0.0.1|/o/m|HF_TOKEN"),
        (404, "404 (not found)|check the spelling"),
        (429, "429 (too many requests)|wait some minutes"),
        (503, "503 (its own trouble)|try again later"),
    ],
)
def test_what_the_hub_refuses(server: Hub, status: int, words: str) -> None:
    server.status = status
    said = refused()
    assert all(word in said for word in words.split("|")), said


def test_a_gated_model_shows_its_files_but_not_their_content(server: Hub) -> None:
    server.gated = True
    assert "accept the licence" in refused()


def test_only_safe_files_are_fetched_and_then_kept(server: Hub) -> None:
    folder = download.model_folder("o/m")
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors", "tokenizer.json"]
    assert sorted(server.fetched) == ["config.json", "model.safetensors", "tokenizer.json"]
    server.status = 503  # what is in the cache is used while the hub is down
    assert download.model_folder("o/m") == folder


def test_a_tokenizer_comes_without_weights(server: Hub) -> None:
    download.tokenizer_folder("o/m")
    assert sorted(server.fetched) == ["config.json", "tokenizer.json"]


def test_a_download_cut_in_the_middle_goes_on_with_the_next_run(server: Hub) -> None:
    server.cut = "model.safetensors"
    assert "interrupted" in refused()
    server.cut = ""
    assert download.model_folder("o/m").is_dir()


def test_pickles_on_the_hub_are_refused_before_a_download(server: Hub) -> None:
    del server.files["model.safetensors"]
    assert "pytorch_model.bin" in refused() and server.fetched == []


def test_too_little_room_is_seen_before_a_download(server: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type("Usage", (), {"free": 5_900_000_000})
    monkeypatch.setattr(download.shutil, "disk_usage", lambda _: usage)
    server.sizes = {"model.safetensors": 3_900_000_000}
    said = refused()
    assert "takes 3.9 GB" in said and "6.0 GB of room" in said and "5.9 GB free" in said and server.fetched == []


def test_a_dataset_brings_its_rows_only(server: Hub) -> None:
    server.files = {"data/train.parquet": b"PAR1", "README.md": b"x", "load.py": b"x"}
    assert (download.fetch_dataset("o/d") / "data" / "train.parquet").is_file()
    assert server.fetched == ["data/train.parquet"]


def test_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        set_up_client(tmp_path, monkeypatch, free.getsockname()[1])  # bound, not listening: refused
        assert "cannot be reached" in refused()


def test_offline_with_nothing_cached(server: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE" in refused() and server.fetched == []


@pytest.mark.parametrize("name", ["./nowhere", "a/b/c", "~/nowhere", "/nowhere/at/all", "folder/"])
def test_a_path_is_never_asked_of_the_hub(name: str, server: Hub) -> None:
    assert "there is no folder" in refused(name)


def test_an_impossible_id(server: Hub) -> None:
    assert "neither a folder here nor a hub id" in refused("spaces in it")


def folder_with(tmp_path: Path, files: dict[str, bytes]) -> str:
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    return str(tmp_path)


CONFIG = {"config.json": b'{"model_type": "llama"}'}


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({}, "no config.json"),
        ({"adapter_config.json": b"{}"}, "is an adapter, not a base model"),
        ({"config.json": b"{"}, "not valid JSON"),
        ({"config.json": b"[]"}, "holds no JSON object"),
        ({"config.json": b"{}"}, "no model_type"),
        (CONFIG, "holds no weights"),
        (CONFIG | {"pytorch_model.bin": b"x"}, "save_pretrained"),
        (CONFIG | {"model.safetensors": safetensors()[:-1]}, "cut short"),
        (CONFIG | {"model.safetensors": b"abc"}, "cut short or no safetensors"),
        (CONFIG | {"model.safetensors": b"version https://git-lfs\n"}, "git-lfs pointer"),
        (CONFIG | {"model.safetensors.index.json": b'{"weight_map": {"w": "a.safetensors"}}'}, "lacks 1 of 1"),
        (CONFIG | {"model.safetensors.index.json": b"{}"}, "garbled"),
    ],
)
def test_local_folders_that_are_no_models(tmp_path: Path, files: dict[str, bytes], words: str) -> None:
    name = folder_with(tmp_path, files)
    assert words in refused(name)


def test_a_local_model(tmp_path: Path) -> None:
    name = folder_with(tmp_path, CONFIG | {"model.safetensors": safetensors()})
    assert download.model_folder(name) == tmp_path
    with pytest.raises(InputError, match="holds no tokenizer"):
        download.tokenizer_folder(name)
    with pytest.raises(InputError, match="is a file"):
        download.model_folder(f"{name}/config.json")


def fetching() -> None:
    """In a process of its own: a command that fetches a model."""
    signals.GRACE = 0.1
    signals.end_in_time()
    try:
        download.model_folder("o/m")
    except KeyboardInterrupt:
        sys.exit(130)


def test_a_download_that_goes_on_for_ever_ends_with_a_signal(server: Hub) -> None:
    server.endless = "model.safetensors"
    process = multiprocessing.get_context("fork").Process(target=fetching)
    process.start()
    try:
        wait_until(lambda: server.endless in server.fetched, process.is_alive)
        os.kill(process.pid or 0, signal.SIGTERM)
        process.join(PATIENCE)
        assert process.exitcode == 130
    finally:
        process.kill()
