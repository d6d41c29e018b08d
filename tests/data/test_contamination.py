"""data/contamination.py: what the certificate finds, and what it does not take for a hit."""

import json

from fast_ft.data.contamination import certificate
from fast_ft.data.examples import Example, Prompt

LEAD = "Below is an instruction that describes a task. Write a response that appropriately completes the request. "
LONG = "Explain in simple words how the tides of the sea follow the moon and the sun"


def example(id_, prompt):
    return Example.exchange(id_, prompt, "An answer.")


def asked(id_, text):
    return Prompt(id_, ({"role": "user", "content": text},))


def hits(train, test):
    found = certificate([example("e", train)], [asked("p", test)])["hits"]
    return [hit["kind"] for hit in found]


def test_kinds_of_hits():
    assert hits("Name a river.", "Name a river.") == ["exact"]
    assert hits(f"{LEAD}### Instruction: Name a river.", "Name a river.") == ["exact"]
    assert hits("Name a river", "name a RIVER!") == ["normalised"]
    assert hits(f"{LONG}, please.", f"Now: {LONG}?") == ["13-gram"]
    assert hits("Name a river.", "Name a lake.") == []


def test_the_lead_sentence_and_equal_ids_are_no_hits():
    rows = [example("identity_1", f"{LEAD}### Instruction: Name a river.")]
    found = certificate(rows, [asked("identity_1", f"{LEAD}### Instruction: Write a poem.")])
    assert found["hits"] == []


def test_twelve_words_in_common_are_no_hit():
    twelve = " ".join(LONG.split()[:12])
    assert hits(f"{twelve} one", f"{twelve} two") == []
    assert hits(f"{twelve} one", f"{twelve} one two") == ["13-gram"]


def test_a_script_without_spaces_has_words_too():
    tides = "请用简单的话说明海潮为什么随着月亮和太阳涨落"
    assert hits(f"{tides}，谢谢。", f"问题：{tides}？") == ["13-gram"]
    assert hits(tides[:12] + "甲", tides[:12] + "乙") == []


def test_it_counts_and_is_ready_for_json():
    rows = [example("a", "Go."), example("b", "Stay.")]
    found = certificate(iter(rows), iter([asked("1", "Stay."), asked("2", "stay"), asked("3", "Run.")]))
    assert (found["examples"], found["prompts"]) == (2, 3)
    assert found["hits"] == [
        {"example": "b", "prompt": "1", "kind": "exact"},
        {"example": "b", "prompt": "2", "kind": "normalised"},
    ]
    assert "13 words" in found["method"] and json.loads(json.dumps(found)) == found
    assert certificate([], [])["hits"] == []
