"""The pocket world: deterministic data, no leak from the held-out prompts, a tokenizer like Llama's, a small base."""

from __future__ import annotations

import itertools
import json
import random
import statistics
from collections import Counter

import pytest

from tools.pocket import dataset, tasks, text

HERE = dataset.HERE
BASE = HERE / "base"
NAMES = ("train.json", "test.json", "references.json", "fresh.json", "fresh_references.json")


def load(name: str) -> list[dict]:
    return json.loads((HERE / name).read_text(encoding="utf-8"))


def ranks(values: list[float]) -> list[float]:
    """Ranks from 1, ties sharing their mean."""
    order = sorted(values)
    first, count = {v: i for i, v in reversed(list(enumerate(order)))}, Counter(order)
    return [first[v] + (count[v] + 1) / 2 for v in values]


def test_the_shipped_files_are_what_the_generator_makes():
    made = dataset.files()
    assert sorted(made) == sorted(NAMES)
    for name, content in made.items():
        assert (HERE / name).read_bytes() == content.encode(), f"{name}: run python -m fast_ft.pocket"


def test_the_card_states_the_digests():
    card = (HERE / "README.md").read_text(encoding="utf-8")
    for name in (*NAMES, "base/tokenizer.json", "base/model.safetensors"):
        assert dataset.digest_of(HERE / name) in card, name


def test_layout_and_sizes():
    rows = load("train.json")
    assert len(rows) == 2000 and len({row["id"] for row in rows}) == 2000
    for row in rows:
        assert sorted(row) == ["conversations", "id", "score"], "nothing in a row may tell its hidden quality"
        assert [turn["from"] for turn in row["conversations"]] == ["human", "gpt"]
        assert row["score"] * 2 == int(row["score"] * 2) and 1.0 <= row["score"] <= 5.0
    for name, answers, count in (("test", "references", 100), ("fresh", "fresh_references", 300)):
        prompts, references = load(f"{name}.json"), load(f"{answers}.json")
        assert len(prompts) == len(references) == count
        assert all(len(row["conversations"]) == 1 for row in prompts)
        assert [(r["id"], r["conversations"][0]) for r in prompts] == [
            (r["id"], r["conversations"][0]) for r in references
        ]
        assert len({row["skill"] for row in prompts}) >= 12


def test_a_third_of_the_rows_are_bad_and_lengths_vary():
    rows = dataset.train_rows()
    kinds = Counter(row.kind for row in rows)
    bad = sum(kinds[kind] for kind in ("rambling", "cut off", "wrong", "other question"))
    assert 0.30 <= bad / len(rows) <= 0.36
    lengths = [len(row.response.split()) for row in rows]
    assert min(lengths) <= 2 and max(lengths) >= 40
    assert {tasks.BY_NAME[row.fact.family].steps for row in rows} == {1, 2, 3}


def test_no_bad_row_holds_the_canonical_answer():
    for row in dataset.train_rows():
        if row.kind in ("cut off", "wrong", "other question"):
            assert row.response != dataset.answer(row.fact), row


def test_score_follows_hidden_quality_as_imperfectly_as_stated():
    rows = dataset.train_rows()
    spearman = statistics.correlation(ranks([r.quality for r in rows]), ranks([r.score for r in rows]))
    assert 0.5 <= spearman <= 0.7
    assert f"{spearman:.2f}" in (HERE / "README.md").read_text(encoding="utf-8")


def test_what_docs_pocket_counts_is_there():
    page = (HERE.parents[1] / "docs" / "pocket.md").read_text(encoding="utf-8")
    rows = dataset.train_rows()
    best = [row.kind for row in rows if row.score == 5.0]
    kinds, of_best = (Counter(each) for each in ([row.kind for row in rows], best))
    manner = ("curt", "padded")
    good, other = (round(100 * n / len(best)) for n in (of_best["good"], sum(of_best[kind] for kind in manner)))
    bad = 100 - good - other
    assert f"of the rows with the best score, {good} in 100 are good, {other} curt or padded, {bad} bad" in page
    other = round(100 * sum(kinds[kind] for kind in manner) / len(rows))
    bad = round(100 * sum(n for kind, n in kinds.items() if kind not in (*manner, "good")) / len(rows))
    assert f"A random 100 holds some {bad} bad rows and {other} right ones in another manner" in page


def test_no_fact_asked_in_test_or_fresh_is_asked_or_answered_in_train():
    asked = {
        split: {fact.key for fact, _ in dataset.questions(split, n)} for split, n in (("test", 100), ("fresh", 300))
    }
    train = {row.fact.key for row in dataset.train_rows()}
    assert not train & asked["test"] and not train & asked["fresh"] and not asked["test"] & asked["fresh"]
    # Rambling rows tell of other facts too: no answer of a held-out prompt may stand in any row.
    rows = [" ".join(turn["value"].lower() for turn in row["conversations"]) for row in load("train.json")]
    prompts = {row["conversations"][0]["value"].lower() for row in load("train.json")}
    for name in ("references.json", "fresh_references.json"):
        for held in load(name):
            prompt, answer = (turn["value"].lower() for turn in held["conversations"])
            assert prompt not in prompts, held["id"]
            if held["skill"] != "last":  # "The last word is egg." tells nothing of which list was asked about
                assert not any(answer in row for row in rows), held["id"]


def test_running_text_holds_the_facts_but_no_prompt():
    said = "\n".join(itertools.islice(text.paragraphs(0), 20_000)).lower()
    assert "[inst]" not in said
    for row in load("test.json") + load("fresh.json"):
        assert row["conversations"][0]["value"].lower() not in said, row
    for family, split in itertools.product(("capital", "food", "plural", "sum"), ("test", "fresh")):
        for fact in tasks.facts():
            if fact.family == family and dataset.splits()[fact.key] == split:
                assert dataset.answer(fact).lower() in said, fact


def test_the_text_makes_up_lists_of_its_own():
    lists = {fact.key for fact in tasks.facts() if fact.family == "sort"}
    rng = random.Random(0)
    drawn = [text.draw(rng) for _ in range(3000)]
    assert not lists & {fact.key for fact in drawn if fact.family in ("sort", "last")}


@pytest.fixture(scope="module")
def tokenizer():
    tokenizers = pytest.importorskip("tokenizers")
    return tokenizers.Tokenizer.from_file(str(BASE / "tokenizer.json"))


TEXTS = ["[INST] What is 12 plus 7? [/INST]", "héllo <0x41>  two", "日本 🙂\tx\ny", "a", " led", ""]


def test_tokenizer_acts_like_llamas(tokenizer):
    assert [tokenizer.id_to_token(i) for i in range(4)] == ["<unk>", "<s>", "</s>", "<0x00>"]
    pieces = tokenizer.encode("The 12,  é", add_special_tokens=False).tokens
    assert pieces == ["▁The", "▁", "1", "2", ",", "▁", "▁", "<0xC3>", "<0xA9>"]
    answers = [row["conversations"][1]["value"] for row in load("train.json")]
    for sample in TEXTS + answers[:300]:
        assert tokenizer.decode(tokenizer.encode(sample, add_special_tokens=False).ids) == sample


def test_transformers_reads_the_same_tokenizer(tokenizer):
    AutoTokenizer = pytest.importorskip("transformers").AutoTokenizer
    theirs = AutoTokenizer.from_pretrained(str(BASE))
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id, theirs.unk_token_id) == (1, 2, 0, 0)
    for sample in TEXTS + [turn["value"] for row in load("train.json")[:200] for turn in row["conversations"]]:
        ids = tokenizer.encode(sample, add_special_tokens=False).ids
        assert theirs.encode(sample, add_special_tokens=False) == ids
        assert theirs.decode(ids) == sample


def test_the_base_is_a_small_llama():
    config = json.loads((BASE / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"] and config["hidden_size"] % 64 == 0
    assert (BASE / "model.safetensors").stat().st_size <= 8e6
    assert json.loads((BASE / "generation_config.json").read_text())["do_sample"] is False
