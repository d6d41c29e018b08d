"""The judge against a real OpenAI-compatible server: `transformers serve`, with two small models of our own."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import sys
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fast_ft.cli.main import main
from fast_ft.recipe.loader import load_recipe
from fast_ft.run.folder import RunDir
from tests.helpers.killed import start_function
from tests.helpers.parts import POCKET, write_recipe
from tests.helpers.patience import wait_until
from tests.helpers.ports import free_port

COUNT = 5
SAID = "8,7\nGood"


def save_parrot(folder: Path) -> str:
    """Write a Llama whose next token hangs on the last one alone: after [/INST] it says SAID, whatever was asked."""
    import torch
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(str(POCKET))
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("[/INST]", SAID)]
    chain = [ids[0][-1], *ids[1], 2]
    assert len(set(chain)) == len(chain), "each token has one successor"
    config = transformers.LlamaConfig(
        vocab_size=2048, hidden_size=256, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
        num_key_value_heads=1, max_position_embeddings=4096, bos_token_id=1, eos_token_id=2, pad_token_id=0,
        tie_word_embeddings=False,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    torch.manual_seed(0)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        directions = torch.nn.functional.normalize(torch.randn(2048, 256), dim=-1)
        model.model.embed_tokens.weight.copy_(directions)
        model.lm_head.weight.zero_()
        for token, following in itertools.pairwise(chain):
            model.lm_head.weight[following] += directions[token]
    model.save_pretrained(str(folder))
    return with_template(folder)


def with_template(folder: Path) -> str:
    for path in POCKET.glob("tokenizer*"):
        shutil.copy(path, folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["chat_template"] = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}[/INST]"
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return str(folder)


def serve(port: int, log: str) -> None:
    """In the child: what `transformers serve` does."""
    file = os.open(log, os.O_WRONLY | os.O_CREAT)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.environ["HF_HUB_OFFLINE"] = "1"
    from transformers.cli.transformers import main as transformers

    sys.argv = ["transformers", "serve", "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    transformers()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[], str]]:
    """A `transformers serve` that loads the model it is asked for; called, it waits until that is up: its address."""
    pytest.importorskip("fastapi")
    port = free_port()
    log = tmp_path_factory.mktemp("serve") / "log"
    process = start_function(serve, port, str(log))

    def address() -> str:
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

        def is_up() -> bool:
            with contextlib.suppress(OSError):
                opener.open(f"http://127.0.0.1:{port}/health", timeout=10).close()
                return True
            return False

        wait_until(is_up, process.is_alive, log.read_text)
        return f"http://127.0.0.1:{port}/v1"

    try:
        yield address
    finally:
        process.terminate()
        process.join()


def test_a_real_server_judges(
    server: Callable[[], str],
    train_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """One model replies with scores; the pocket base, no judge at all, with what cannot be read. No key is needed."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    parrot = save_parrot(tmp_path / "parrot")
    babbler = with_template(Path(shutil.copytree(POCKET, tmp_path / "babbler")))
    rows = [{"id": str(i), "prompt": f"Q {i}?", "response": f"It is {i}."} for i in range(COUNT)]
    for name in ("test", "references"):
        (tmp_path / name).write_text(json.dumps(rows))
        (tmp_path / name).rename(tmp_path / f"{name}.json")
    changes = {
        "judge": {"kind": "openai", "references": str(tmp_path / "references.json"), "model": parrot, "concurrency": 2},
        "output_dir": str(tmp_path / "runs" / "a"),
    }
    path = write_recipe(tmp_path, POCKET, train_file, tmp_path / "test.json", changes)
    folder = RunDir.open(load_recipe(path, []), path)
    answers = {
        str(i): {"input": [{"role": "user", "content": f"Q {i}?"}], "output": [f"Perhaps {i}."]} for i in range(COUNT)
    }
    folder.pred.write_text(json.dumps(answers))

    monkeypatch.setenv("OPENAI_BASE_URL", server())
    assert main(["judge", str(folder.root)]) == 0, capsys.readouterr().err
    scores = json.loads(folder.scores.read_text())
    assert scores["mean"] == 7 and scores["reference_mean"] == 8 and scores["missing"] == 0
    assert scores["prompts"]["3"]["reply"] == SAID
    assert scores["asked"]["requests"] == COUNT and scores["asked"]["prompt_tokens"] > 100 * COUNT
    assert main(["judge", str(folder.root)]) == 0
    assert json.loads(folder.scores.read_text())["asked"]["requests"] == 0

    capsys.readouterr()
    assert main(["judge", str(folder.root), f"judge.model={babbler}"]) == 3
    assert "5 of 5 scores are missing" in capsys.readouterr().err
    scores = json.loads(folder.scores.read_text())
    assert scores["mean"] is None and all("unreadable" in each["problem"] for each in scores["prompts"].values())
