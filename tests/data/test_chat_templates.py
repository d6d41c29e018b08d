"""A tokenizer's own chat template: rendered as transformers renders it, proven for every turn, or refused by turn."""

from __future__ import annotations

import datetime as dt
import json
from pathlib import Path
from typing import Any

import pytest

from fast_ft.common.errors import InputError
from fast_ft.data import prepare
from fast_ft.data.contract import contract_problems, lost_character, trained_parts
from fast_ft.data.encoding import IGNORE_INDEX, Encoder
from fast_ft.data.examples import Example, Message
from fast_ft.recipe.loader import load_recipe
from tests.helpers.chat_tokenizers import given, make_folder
from tests.helpers.parts import POCKET, write_recipe

HEAD = "{{ '<|im_start|>' + message['role'] + '\\n' }}"
LOOP = "{% for message in messages %}" + HEAD + "BODY{{ '<|im_end|>\\n' }}{% endfor %}"
TAIL = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
TALK = (
    Message("system", "Be <kind> & 'brief'."), Message("user", "Hi \"you\"?"),
    Message("assistant", "Yes.\nHello.", True),
    Message("user", "Bye"), Message("assistant", "See you!", True),
)  # fmt: skip
MIDDLE = (*TALK[1:3], TALK[0], *TALK[3:])
CALL = {"type": "function", "function": {"name": "look", "arguments": {"at": "the sky"}}}


def chatml(body: str = "{{ message['content'] }}") -> str:
    return LOOP.replace("BODY", body) + TAIL


def encoder(folder: Path, template: Any, **changes: Any) -> Encoder:
    return Encoder(
        make_folder(folder / "tokenizer", "pocket", "chatml", chat_template=template, **changes), "tokenizer"
    )


def row(*messages: Message, tools: tuple[Any, ...] = ()) -> Example:
    return Example("e", messages, None, tools)


def theirs(folder: Path) -> Any:
    transformers = pytest.importorskip("transformers")
    return transformers.AutoTokenizer.from_pretrained(str(folder / "tokenizer"))


AS_TRANSFORMERS: dict[str, Any] = {
    "named": [{"name": "default", "template": chatml()}, {"name": "tool_use", "template": "no"}],
    "generation": chatml("{% generation %}{{ message['content'] }}{% endgeneration %}"),
    "generation trimmed": chatml("{%- generation -%} {{ message.content }} {%- endgeneration -%}"),
    "strftime": "<|im_start|>system\nToday is {{ strftime_now('%d %b %Y') }}<|im_end|>\n" + chatml(),
    "tojson": chatml("{{ message['content'] | tojson }}"),
    "tojson of all": chatml("{{ message.content | tojson(ensure_ascii=False, indent=2, separators=(',', ':')) }}"),
    "tojson of questions": chatml(
        "{% if message.role == 'user' %}{{ message.content | tojson }}{% else %}{{ message.content }}{% endif %}"
    ),
    "loop controls": chatml("{% if not message.content %}{% continue %}{% endif %}{{ message.content }}"),
    "undefined BOS": "{{ bos_token }}{% if bos_token is defined %}!{% endif %}" + chatml(),
    "no tools": chatml() + "{% if tools is none and documents is none %}{{ '' }}{% else %}{{ 1 / 0 }}{% endif %}",
    "pad": "{{ pad_token }}" + chatml(),
}


@pytest.mark.parametrize("case", AS_TRANSFORMERS)
def test_what_templates_ask_for_is_there(case: str, tmp_path: Path) -> None:
    today = dt.date.today()
    try:
        is_as_transformers_has_it(case, tmp_path / "once")
    except AssertionError:
        if dt.date.today() == today:
            raise
        is_as_transformers_has_it(case, tmp_path / "again")  # midnight came between two of the texts


def is_as_transformers_has_it(case: str, tmp_path: Path) -> None:
    made = encoder(tmp_path, AS_TRANSFORMERS[case], bos_token=None)
    for messages in (TALK, MIDDLE):
        example = row(*messages)
        got = made.row(example)
        turns = [each.turn for each in messages]
        assert got.input_ids == theirs(tmp_path).apply_chat_template(turns, return_dict=True)["input_ids"]
        asked = theirs(tmp_path).apply_chat_template(turns[:-1], add_generation_prompt=True, return_dict=True)
        assert made.prompt_ids(turns[:-1]) == asked["input_ids"]
        assert contract_problems(got, example, made, 512) == []


def test_names_of_tokens_come_from_either_file(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "tokenizer", "pocket", "chatml", eos_token=..., pad_token=...)
    (folder / "special_tokens_map.json").write_text('{"eos_token": {"content": "<|im_end|>"}, "pad_token": "<unk>"}')
    made = Encoder(folder, "tokenizer")
    end = made.tokenizer.token_id("<|im_end|>")
    assert made.eos_id == end and made.end_ids == (end,) and made.row(row(*TALK)).input_ids.count(end) == 5


def test_tokens_that_the_vocabulary_lacks_come_from_added_tokens(tmp_path: Path) -> None:
    import tokenizers

    folder = make_folder(tmp_path / "tokenizer", "pocket", "chatml")
    whole = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    added = {each.content: id_ for id_, each in whole.get_added_tokens_decoder().items() if id_ > 2}
    expected = Encoder(folder, "tokenizer").row(row(*TALK)).input_ids
    (folder / "tokenizer.json").write_bytes((POCKET / "tokenizer.json").read_bytes())
    (folder / "added_tokens.json").write_text(json.dumps(added))
    assert Encoder(folder, "tokenizer").row(row(*TALK)).input_ids == expected
    (folder / "added_tokens.json").write_text(json.dumps({each: id_ + 7 for each, id_ in added.items()}))
    with pytest.raises(InputError, match=r"<\|im_end\|>' is not in its vocabulary"):
        Encoder(folder, "tokenizer")


def test_a_bos_that_begins_each_turn_is_the_templates_own(tmp_path: Path) -> None:
    """As SmolLM2 has it: <|im_start|> is its BOS."""
    made = encoder(tmp_path, chatml(), bos_token="<|im_start|>")
    example = row(*TALK)
    got = made.row(example)
    assert got.input_ids.count(made.bos_id or -1) == 5 and contract_problems(got, example, made, 512) == []
    literal = row(Message("user", "Say <|im_start|>"), Message("assistant", "<|im_start|>", True))
    assert made.row(literal).input_ids.count(made.bos_id or -1) == 2
    assert [text for text, control in made.shown(got.input_ids) if control][:3] == [
        "<|im_start|>",
        "<|im_end|>",
        "<|im_start|>",
    ]


def test_every_end_of_turn_ends_an_answer(tmp_path: Path) -> None:
    """Qwen2.5's base has another EOS than its template; Llama 3's generation_config.json names several."""
    made = encoder(tmp_path, chatml(), eos_token="</s>")
    own, eos = (made.tokenizer.token_id(token) for token in ("<|im_end|>", "</s>"))
    assert made.end_ids == (own, eos) and made.row(row(*TALK)).input_ids.count(own) == 5
    folder = tmp_path / "tokenizer"
    more = made.tokenizer.token_id("<|eot_id|>")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [eos, more, 300]}))
    assert Encoder(folder, "tokenizer").end_ids == (own, eos, more), "300 is an ordinary token"
    assert Encoder(folder, "llama-2").end_ids == (eos, more) and Encoder(folder, ends=[own]).end_ids[-1] == own
    assert made.pad_id not in made.end_ids


def test_an_end_that_its_files_do_not_call_a_control_token_is_one(tmp_path: Path) -> None:
    import tokenizers

    folder = make_folder(
        tmp_path / "tokenizer",
        "pocket",
        "chatml",
        eos_token="</s>",
        chat_template=chatml().replace("im_end", "end_of_turn"),
    )
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_tokens(["<|end_of_turn|>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    made, example = Encoder(folder, "tokenizer"), row(*TALK)
    got = made.row(example)
    assert contract_problems(got, example, made, 512) == [] and made.end_ids[0] == tokenizer.token_to_id(
        "<|end_of_turn|>"
    )
    assert made.decode(got.input_ids[slice(*trained_parts(got)[1])]) == "See you!"


SYSTEM_LAST = (
    "{% if messages[0].role == 'system' %}{% set system = messages[0].content %}{% set messages = messages[1:] %}"
    "{% else %}{% set system = '' %}{% endif %}{% for message in messages %}" + HEAD
    + "{% if message.role == 'user' and loop.revindex0 <= 1 %}{{ system }}{% endif %}"
    "{{ message.content }}<|im_end|>\n{% endfor %}" + TAIL
)  # fmt: skip
SYSTEMS_FIRST = (
    "{% for message in messages if message.role == 'system' %}" + HEAD + "{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% for message in messages if message.role != 'system' %}" + HEAD + "{{ message.content }}<|im_end|>\n{% endfor %}"
) + TAIL  # fmt: skip
WRONG: dict[str, tuple[str, tuple[Message, ...], str]] = {
    "moves a system turn": (SYSTEMS_FIRST, MIDDLE, r"turn 3 \(system\): the chat template moves this turn"),
    "leaves a system turn out": (
        chatml("{% if message.role != 'system' %}{{ message.content }}{% endif %}"), MIDDLE, r"turn 3 \(system\).* out",
    ),
    "writes a turn twice": (chatml("{{ message.content * 2 }}"), TALK, r"turn 1 \(system\).* 2 times"),
    "changes a text": (
        chatml("{{ message.content.replace('Hello', 'Bye') }}"), TALK, r"turn 3 \(assistant\): .* changes its text",
    ),
    "cuts a text": (chatml("{{ message.content[:9] }}"), TALK, r"turn 1 \(system\): .* changes its text"),
    "ends no answer": (
        "{% for message in messages %}{{ message.role + ': ' + message.content + '\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}", TALK, r"turn 3 \(assistant\): .* token that ends it",
    ),
    "has no beginning of an answer": (chatml().replace(TAIL, ""), TALK, r"turn 3 .*add_generation_prompt"),
    "begins an answer otherwise": (
        chatml().replace("assistant\\n' }}{% endif", "assistant\\nHm. ' }}{% endif"), TALK,
        r"turn 3 .*add_generation_prompt",
    ),
    "refuses the roles": (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system here') }}{% endif %}" + chatml(), TALK,
        "no system here",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_a_template_that_loses_text_is_refused_by_turn(case: str, tmp_path: Path) -> None:
    template, messages, words = WRONG[case]
    with pytest.raises(InputError, match=words):
        encoder(tmp_path, template).row(row(*messages))


def test_a_system_turn_at_the_front_may_be_written_later_and_that_is_told(tmp_path: Path) -> None:
    made, example = encoder(tmp_path, SYSTEM_LAST), row(*TALK)
    found = made.conversation(example)
    assert found.remarks == ["the chat template puts the system turn into a later turn"]
    assert found.context_differs == [True, False] and found.texts == ["Yes.\nHello.", "See you!"]
    assert contract_problems(made.row(example), example, made, 512) == []
    turns = [each.turn for each in TALK]
    assert found.ids == theirs(tmp_path).apply_chat_template(turns, return_dict=True)["input_ids"]


REASONS = (
    "{% if message.reasoning_content %}<think>\n{{ message.reasoning_content }}\n</think>\n\n{% endif %}"
    "{{ message.content }}{% for call in message.tool_calls %}\n<tool_call>{{ call.function | tojson }}</tool_call>"
    "{% endfor %}"
)
QWEN3 = chatml(
    "{% set content = message.content %}{% set thought = '' %}{% if '</think>' in content %}"
    "{% set thought = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}"
    "{% set content = content.split('</think>')[-1].lstrip('\\n') %}{% endif %}"
    "{% if message.role == 'assistant' and loop.last %}<think>\n{{ thought }}\n</think>\n\n{% endif %}{{ content }}"
)


def test_what_a_template_renders_beside_the_text_is_trained(tmp_path: Path) -> None:
    made = encoder(
        tmp_path, REASONS.join(["{% for message in messages %}" + HEAD, "{{ '<|im_end|>\\n' }}{% endfor %}" + TAIL])
    )
    more = {"reasoning_content": "Up is blue.", "tool_calls": [CALL], "name": "Ann"}
    example = row(TALK[1], Message("assistant", "Blue.", True, more))
    found = made.conversation(example)
    assert found.texts == [
        '<think>\nUp is blue.\n</think>\n\nBlue.<tool_call>{"name": "look", "arguments": {"at": "the sky"}}</tool_call>'
    ]
    assert found.remarks == ["the chat template leaves out the turns' name"]
    assert contract_problems(made.row(example), example, made, 512) == []
    silent = row(TALK[1], Message("assistant", "", True, {"tool_calls": [CALL]}), Message("tool", "x"), TALK[2])
    assert made.conversation(silent).texts[0].startswith("<tool_call>")
    assert contract_problems(made.row(silent), silent, made, 512) == []


@pytest.mark.parametrize(
    ("field", "value"), [("tool_calls", [CALL]), ("reasoning_content", "Hm."), ("thinking", "Hm.")]
)
def test_what_a_template_leaves_out_is_refused_by_field(field: str, value: Any, tmp_path: Path) -> None:
    made = encoder(tmp_path, chatml())
    with pytest.raises(InputError, match=rf"turn 2 \(assistant\), {field}: the chat template leaves it out"):
        made.row(row(TALK[1], Message("assistant", "Blue.", True, {field: value})))
    with pytest.raises(InputError, match=rf"turn 2 \(assistant\), {field}: Llama 2's form"):
        Encoder(POCKET).row(row(TALK[1], Message("assistant", "Blue.", True, {field: value})))
    with pytest.raises(InputError, match=r"^tools: the chat template leaves it out"):
        made.row(row(*TALK, tools=({"name": "look"},)))
    with pytest.raises(InputError, match=r"^tools: Llama 2's form"):
        Encoder(POCKET).row(row(*TALK, tools=({"name": "look"},)))


def test_tools_go_to_the_template_for_tools(tmp_path: Path) -> None:
    named = [
        {"name": "default", "template": chatml()},
        {"name": "tool_use", "template": "{{ tools | tojson }}" + chatml()},
    ]
    made, tool = encoder(tmp_path, named), {"type": "function", "function": {"name": "look"}}
    example = row(*TALK, tools=(tool,))
    turns = [each.turn for each in TALK]
    expected = theirs(tmp_path).apply_chat_template(turns, tools=[tool], return_dict=True)["input_ids"]
    assert made.row(example).input_ids == expected and contract_problems(made.row(example), example, made, 512) == []


def test_calls_cannot_write_control_tokens(tmp_path: Path) -> None:
    made = encoder(tmp_path, chatml(REASONS))
    for more in ({"reasoning_content": "a <|im_end|> b"}, {"tool_calls": [{"name": "<|im_start|>"}]}):
        with pytest.raises(InputError, match=rf"turn 2 \(assistant\), {next(iter(more))}: holds the text of a control"):
            made.row(row(TALK[1], Message("assistant", "Blue.", True, more)))


def test_a_reasoning_models_answer_is_kept_whole_or_refused(tmp_path: Path) -> None:
    made = encoder(tmp_path, QWEN3)
    thought = Message("assistant", "<think>\nHm.\n</think>\n\nBlue.", True)
    found = made.conversation(row(TALK[1], thought))
    assert found.texts == [thought.content]
    assert made.conversation(row(*TALK)).texts == ["Yes.\nHello.", "<think>\n\n</think>\n\nSee you!"]
    with pytest.raises(
        InputError, match=r"turn 2 \(assistant\): the chat template leaves this turn, or a part of it, out"
    ):
        made.row(row(TALK[1], thought, *TALK[3:]))


def test_llama_3_1s_form_on_another_tokenizer() -> None:
    """Headers are text, and the tokenizer's own EOS ends each turn, the system turn with its dates among them."""
    made = Encoder(POCKET, "llama-3.1")
    header = "<|start_header_id|>{}<|end_header_id|>\n\n"
    dates = "Cutting Knowledge Date: December 2023\nToday Date: 26 July 2024\n\n"
    for messages in (TALK[1:], TALK):
        system = messages[0].content if messages[0].role == "system" else ""
        pieces = [header.format("system") + dates + system]
        pieces += [header.format(each.role) + each.content for each in messages if each.role != "system"]
        example = row(*messages)
        got = made.row(example)
        assert got.input_ids[0] == made.bos_id and got.input_ids.count(made.eos_id) == len(pieces)
        shown = "".join(text for text, _ in made.shown(got.input_ids[1:]))
        assert shown.split("</s>")[:-1] == pieces and contract_problems(got, example, made, 512) == []
        assert made.end_ids == (made.eos_id,)


def test_llama_3_1s_form_on_its_own_tokenizer(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "tokenizer", "bytes", "llama3", eos_token="</s>")
    made, example = Encoder(folder, "llama-3.1"), row(*TALK)
    got = made.row(example)
    assert made.tokenizer.controls[made.end_ids[0]] == "<|eot_id|>" and contract_problems(got, example, made, 512) == []
    names = [made.tokenizer.controls[id_] for id_ in made.control_ids(got.input_ids)]
    assert names == ["<s>", *["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"] * 5]


def test_a_character_that_cannot_be_held_is_named_and_droppable(tmp_path: Path) -> None:
    rows = [
        {"id": f"r{n}", "prompt": f"Question {n}?", "response": text} for n, text in enumerate(["Fine.", "a▁b", "So."])
    ]
    train = tmp_path / "train.json"
    train.write_text(json.dumps(rows), encoding="utf-8")
    path = write_recipe(
        tmp_path, POCKET, train, train,
        {"data.test": None, "select": {}, "curriculum": {}, "model.max_length": 256},
    )  # fmt: skip
    with pytest.raises(InputError) as caught:
        prepare.prepare(load_recipe(path))
    for words in ("row 'r1', turn 2 (assistant)", "U+2581 LOWER ONE EIGHTH BLOCK", "data.unencodable: drop"):
        assert words in str(caught.value)
    found = prepare.prepare(load_recipe(path, ["data.unencodable=drop"]))
    assert [each.id for each in found.examples] == ["r0", "r2"]
    assert any("1 selected row dropped (data.unencodable), the first: row 'r1'" in note for note in found.notes)


def test_without_completion_only_loss_an_answer_whose_loss_is_off_has_none(tmp_path: Path) -> None:
    bad = {"role": "assistant", "content": "BAD.", "weight": 0}
    hi, hello = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}
    train = tmp_path / "train.json"
    train.write_text(json.dumps([{"messages": [hi, bad, hi, hello]}, {"messages": [hi, hello]}]))
    changes = {"data.test": None, "select": {}, "curriculum": {}, "train.completion_only_loss": False}
    found = prepare.prepare(load_recipe(write_recipe(tmp_path, POCKET, train, train, changes)))
    first, second = found.jobs[0].rows
    masked = [id_ for id_, label in zip(first.input_ids, first.labels, strict=True) if label == IGNORE_INDEX]
    assert found.encoder.decode(masked) == "BAD." and second.labels == second.input_ids


def test_an_nfc_tokenizer_cannot_hold_a_letter_and_its_accent_apart(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "tokenizer", "bytes", "chatml")
    content = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    (folder / "tokenizer.json").write_text(json.dumps(content | {"normalizer": {"type": "NFC"}}), encoding="utf-8")
    made = Encoder(folder, "tokenizer")
    assert lost_character("Cafe\u0301 is nice.", made) == "U+0301 COMBINING ACUTE ACCENT"
    assert lost_character("Caf\u00e9 is nice.", made) is None


def test_a_prompt_that_the_template_cannot_hold_is_named_before_anything_is_loaded(tmp_path: Path) -> None:
    system = {"role": "system", "content": "French now."}
    hi, hello = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}
    train, test = tmp_path / "train.json", tmp_path / "test.json"
    train.write_text(json.dumps([{"prompt": f"Question {n}?", "response": f"Yes {n}."} for n in range(4)]))
    test.write_text(json.dumps([{"id": "q", "messages": [hi, hello, system, hi]}]))
    path = write_recipe(tmp_path, POCKET, train, test, {"select": {}, "curriculum": {}})
    with pytest.raises(InputError, match=r"test\.json, prompt 'q', turn 3 \(system\): Llama 2's form has no place"):
        prepare.prepare(load_recipe(path))
    test.write_text(json.dumps([{"id": "q", "messages": [system, hi]}, {"id": "r", "prompt": "a▁b"}]))
    found = prepare.prepare(load_recipe(path))
    assert any("prompt 'r', turn 1 (user): " in note and "U+2581" in note for note in found.notes)
    assert "<<SYS>>\nFrench now.\n<</SYS>>\n\nHi" in found.encoder.decode(found.prompt_ids[0])


@pytest.mark.parametrize(
    ("words", "new", "remedy"),
    [
        (600, 16, r"no token is left for an answer\. Shorten the prompt, or leave it out"),
        (480, 100, r"Use at most generate\.max_new_tokens=\d\d, or shorten the prompt"),
    ],
)
def test_a_prompt_without_room_for_its_answer_is_refused_before_training(
    words: int, new: int, remedy: str, tmp_path: Path
) -> None:
    train, test = tmp_path / "train.json", tmp_path / "test.json"
    train.write_text(json.dumps([{"prompt": f"Question {n}?", "response": f"Yes {n}."} for n in range(4)]))
    test.write_text(json.dumps([{"id": "short", "prompt": "Hi"}, {"id": "long", "prompt": "word " * words}]))
    changes = {"select": {}, "curriculum": {}, "generate.max_new_tokens": new}
    with pytest.raises(InputError, match=rf"test\.json: prompt 'long' has \d+ tokens.* context of 512.*{remedy}"):
        prepare.prepare(load_recipe(write_recipe(tmp_path, POCKET, train, test, changes)))


def test_a_token_never_reaches_over_the_border_of_prompt_and_answer(tmp_path: Path) -> None:
    """ "A: " ends with a space, which the tokenizer would join with the answer's first word."""
    template = (
        "{% for message in messages %}{{ ('Q: ' if message.role == 'user' else 'A: ') + message.content }}"
        "{{ '<|im_end|>' }}{% endfor %}{% if add_generation_prompt %}{{ 'A: ' }}{% endif %}"
    )
    made, example = encoder(tmp_path, template), row(*TALK[1:])
    got = made.row(example)
    assert contract_problems(got, example, made, 512) == []
    for (start, _), index in zip(trained_parts(got), (1, 3), strict=True):
        asked = [each.turn for each in example.messages[:index]]
        assert got.input_ids[:start] == made.prompt_ids(asked)
    turns = [each.turn for each in example.messages]
    joined = theirs(tmp_path).apply_chat_template(turns, return_dict=True)["input_ids"]
    assert got.input_ids != joined
    assert made.decode(got.input_ids).split() == made.decode(joined).split()


def test_the_published_forms_are_what_they_say(tmp_path: Path) -> None:
    """The helper's template of Llama 2 and our own form differ by the space before EOS alone."""
    folder = make_folder(tmp_path / "tokenizer", "pocket", "llama2")
    assert "{% generation %}" in given("llama2", generation=True)
    ours, made = Encoder(folder).row(row(*TALK)), Encoder(folder, "tokenizer").row(row(*TALK))
    texts = [Encoder(folder).decode(each.input_ids) for each in (ours, made)]
    assert texts[0] != texts[1] and "".join(texts[0].split()) == "".join(texts[1].split())
