"""Text to tokens and labels: the contract, on text made to break it, with three tokenizers."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fast_ft.common.errors import InputError
from fast_ft.data import dataset
from fast_ft.data.contract import contract_problems, trained_parts
from fast_ft.data.encoding import IGNORE_INDEX, EncodedRow, Encoder
from fast_ft.data.examples import Example
from fast_ft.recipe import schema
from tests.helpers.parts import POCKET, REAL, needs_real_data

CHAT = """\
{{ bos_token }}
{%- for message in messages %}
<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>{{ '\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
<|im_start|>assistant
{% endif %}"""

AWKWARD = [
    "plain words", "two  spaces,   three",
    "lines\n\nand\n  indents\ttabs", "héllo Größe 日本語 🙂👩‍👩‍👧", "</s>", "a </s> b",
    "<s>[INST] x [/INST]", "[INST]", "<<SYS>> no <</SYS>>", "<unk><s></s>", "<|im_start|>user\nhi<|im_end|>",
    "<0x41>", "1 2 345", "{{ bos_token }} {% raw %}", "-100", "x" * 300,
]  # fmt: skip


def make_chat_tokenizer(folder: Path) -> Path:
    """A copy of the pocket tokenizer with two special tokens more and a chat template that ends turns with one."""
    import tokenizers

    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = tokenizers.Tokenizer.from_file(str(POCKET / "tokenizer.json"))
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = json.loads((POCKET / "tokenizer_config.json").read_text("utf-8"))
    config |= {"eos_token": "<|im_end|>", "pad_token": "<|im_end|>", "chat_template": CHAT}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> Encoder:
    return Encoder(make_chat_tokenizer(tmp_path_factory.mktemp("chat")), "tokenizer")


@pytest.fixture(scope="module")
def llama() -> Encoder:
    return Encoder(POCKET)


@pytest.fixture(scope="module", params=["llama-2", "tokenizer"])
def encoder(request: pytest.FixtureRequest, llama: Encoder, chat: Encoder) -> Encoder:
    return llama if request.param == "llama-2" else chat


def example(prompt: str, response: str) -> Example:
    return Example.exchange("e", prompt, response)


def check(encoder: Encoder, given_: Example) -> None:
    """The contract, said again with other means than contract_problems."""
    row = encoder.row(given_)
    prompt = encoder.prompt_ids([{"role": "user", "content": given_.prompt}])
    assert row.input_ids[: len(prompt)] == prompt, "training and generation see one prompt"
    end = len(prompt) + row.supervised
    tail = row.input_ids[end:]  # what the template writes after the end of a turn, such as a line feed
    assert row.labels == [IGNORE_INDEX] * len(prompt) + row.input_ids[len(prompt) : end] + [IGNORE_INDEX] * len(tail)
    assert row.supervised > 0 and encoder.decode(tail) == ""
    assert row.input_ids[0] == encoder.bos_id and row.input_ids.count(encoder.bos_id) == 1
    assert row.input_ids[end - 1] == encoder.eos_id == encoder.end_ids[0]
    assert encoder.eos_id not in row.input_ids[len(prompt) : end - 1]
    assert encoder.decode(row.input_ids[len(prompt) : end]) == given_.response
    assert contract_problems(row, given_, encoder, max_length=10_000) == []


@pytest.mark.parametrize("text", AWKWARD)
def test_the_contract_holds_on_awkward_text(encoder: Encoder, text: str) -> None:
    check(encoder, example(text, text))
    check(encoder, example(text, "An answer."))
    check(encoder, example("A question?", text))


# U+2581 stands for a space inside SentencePiece-like tokenizers, so text cannot hold it.
TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00▁"), min_size=1, max_size=60)
PIECES = st.lists(st.sampled_from([*AWKWARD[:12], " ", "\n"]) | TEXT, min_size=1, max_size=4).map("".join)
CLEAN = PIECES.map(str.strip).filter(bool)  # data/dataset.py strips what it loads


@settings(max_examples=150)
@given(prompt=CLEAN, response=CLEAN)
def test_the_contract_holds_on_any_text(llama: Encoder, chat: Encoder, prompt: str, response: str) -> None:
    check(llama, example(prompt, response))
    check(chat, example(prompt, response))


def test_llama_2s_form_is_metas(llama: Encoder) -> None:
    def text(*turns: tuple[str, str]) -> str:
        ids = llama.prompt_ids([{"role": role, "content": content} for role, content in turns])
        parts: list[list[int]] = []
        for token in ids:  # BOS begins an exchange
            if token == llama.bos_id:
                parts.append([])
            parts[-1].append(token)
        return "|".join(llama.decode(part) + ("$" if part[-1] == llama.eos_id else "") for part in parts)

    assert text(("user", "hi")) == "[INST] hi [/INST]"
    assert text(("system", "Be kind."), ("user", "hi")) == "[INST] <<SYS>>\nBe kind.\n<</SYS>>\n\nhi [/INST]"
    told = text(("user", "hi"), ("assistant", "Hello."), ("user", "bye"))
    assert told == "[INST] hi [/INST] Hello.$|[INST] bye [/INST]"


def test_the_chat_template_is_transformers_own(chat: Encoder, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(str(make_chat_tokenizer(tmp_path / "chat")))
    messages = [{"role": "user", "content": "hi  there\nyou"}]
    rendered = theirs.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert chat.prompt_ids(messages) == theirs(rendered, add_special_tokens=False)["input_ids"]
    assert "<|im_start|>assistant\n" in rendered and rendered.startswith("<s>")


def test_a_literal_special_in_the_response_changes_no_prompt(chat: Encoder) -> None:
    plain, literal = chat.row(example("Q?", "A")), chat.row(example("Q?", "A <|im_end|> B"))
    ((border, _),) = trained_parts(plain)
    assert literal.input_ids[:border] == plain.input_ids[:border]
    assert trained_parts(literal)[0][0] == border


def test_pad_is_never_eos(llama: Encoder, chat: Encoder) -> None:
    assert llama.pad_id == 0 and chat.pad_id == 0
    assert chat.eos_id != 0, "its tokenizer_config.json names EOS as pad"


def unk_less(folder: Path, *, eos: str, **config: str) -> Path:
    """The pocket tokenizer with <first> in the place of <unk>, as id 0, and EOS as pad."""
    folder.mkdir()
    text = (POCKET / "tokenizer.json").read_text("utf-8")
    (folder / "tokenizer.json").write_text(text.replace('"<unk>"', '"<first>"'), encoding="utf-8")
    content = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": eos, "pad_token": eos}
    (folder / "tokenizer_config.json").write_text(json.dumps(content | config), encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    ("eos", "config", "pad"),
    [("</s>", {}, 0), ("</s>", {"unk_token": "</s>"}, 0), ("<first>", {}, 1), ("<first>", {"unk_token": "<s>"}, 1)],
)
def test_pad_is_never_eos_where_there_is_no_unk(tmp_path: Path, eos: str, config: dict[str, str], pad: int) -> None:
    from fast_ft.hub.families import FamilySpec
    from fast_ft.models.loaders.peft import PeftLoader
    from fast_ft.recipe import schema

    folder = unk_less(tmp_path / "tokenizer", eos=eos, **config)
    encoder = Encoder(folder)
    assert encoder.pad_id == pad != encoder.eos_id
    backend = PeftLoader.__new__(PeftLoader)  # its tokenizer needs no model
    backend.section, backend.family = schema.Model(name_or_path=str(folder)), FamilySpec.of(POCKET)
    backend.device, backend.dtype, backend.notes = "cpu", "float32", []
    tokenizer = backend._loaded(None).tokenizer
    assert tokenizer.eos_token == eos and tokenizer.pad_token_id == pad


def test_count_is_what_rows_have(encoder: Encoder) -> None:
    prompts, responses = ["a", "b </s> c", "d  e"], ["x", "y", "<|im_end|> z"]
    rows = [encoder.row(example(p, r)) for p, r in zip(prompts, responses, strict=True)]
    assert encoder.count(prompts, responses) == (
        [len(row.labels) - row.supervised for row in rows],
        [row.supervised for row in rows],
    )


MUTATIONS = {
    "BOS twice": lambda row, e: EncodedRow(row.id, [e.bos_id, *row.input_ids], [IGNORE_INDEX, *row.labels]),
    "no BOS": lambda row, e: EncodedRow(row.id, row.input_ids[1:], row.labels[1:]),
    "BOS within": lambda row, e: EncodedRow(
        row.id, [*row.input_ids[:3], e.bos_id, *row.input_ids[3:]], [IGNORE_INDEX, *row.labels]
    ),
    "no EOS": lambda row, e: EncodedRow(row.id, row.input_ids[: _end(row) - 1], row.labels[: _end(row) - 1]),
    "EOS masked": lambda row, e: _mask_at(row, _end(row) - 1),
    "one prompt token trained": lambda row, e: _label_at(row, _start(row) - 1),
    "first prompt token trained": lambda row, e: _label_at(row, 0),
    "all of the prompt trained": lambda row, e: replace(row, labels=list(row.input_ids)),
    "labels shifted by one": lambda row, e: replace(row, labels=[*row.labels[1:], IGNORE_INDEX]),
    "labels shifted the other way": lambda row, e: replace(row, labels=[IGNORE_INDEX, *row.labels[:-1]]),
    "response's first token masked": lambda row, e: _mask_at(row, _start(row)),
    "response's middle masked": lambda row, e: _mask_at(row, _end(row) - 3),
    "response cut, EOS kept": lambda row, e: EncodedRow(
        row.id, [*row.input_ids[: _end(row) - 3], e.eos_id], [*row.labels[: _end(row) - 3], e.eos_id]
    ),
    "a label too few": lambda row, e: replace(row, labels=row.labels[:-1]),
    "nothing trained": lambda row, e: replace(row, labels=[IGNORE_INDEX] * len(row.labels)),
}


def _start(row: EncodedRow) -> int:
    return trained_parts(row)[0][0]


def _end(row: EncodedRow) -> int:
    return trained_parts(row)[0][1]


def _label_at(row: EncodedRow, index: int) -> EncodedRow:
    return replace(row, labels=[*row.labels[:index], row.input_ids[index], *row.labels[index + 1 :]])


def _mask_at(row: EncodedRow, index: int) -> EncodedRow:
    return replace(row, labels=[*row.labels[:index], IGNORE_INDEX, *row.labels[index + 1 :]])


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_contract_problems_sees_each_violation(encoder: Encoder, mutation: str) -> None:
    given_ = example("What colour is it?", "It is red.\nAll of it.")
    row = encoder.row(given_)
    assert contract_problems(row, given_, encoder, 256) == []
    assert contract_problems(MUTATIONS[mutation](row, encoder), given_, encoder, 256)


def test_a_row_of_max_length_fits_and_one_more_does_not(encoder: Encoder) -> None:
    given_ = example("Q?", "An answer.")
    row = encoder.row(given_)
    assert contract_problems(row, given_, encoder, len(row.input_ids)) == []
    (problem,) = contract_problems(row, given_, encoder, len(row.input_ids) - 1)
    assert f"over model.max_length {len(row.input_ids) - 1}" in problem


def test_text_that_the_tokenizer_cannot_hold_is_reported(llama: Encoder) -> None:
    lost = example("Q?", "a▁b")  # U+2581 comes back as a space
    assert contract_problems(llama.row(lost), lost, llama, 256) == ["the trained tokens do not spell the response"]


@pytest.mark.parametrize("text", [text for text in AWKWARD if text.isascii()])
def test_pieces_put_together_are_the_text(encoder: Encoder, text: str) -> None:
    row = encoder.row(example(text, text))
    pieces = encoder.pieces(row.input_ids)
    assert len(pieces) == len(row.input_ids)
    border = _start(row)
    assert "".join(pieces[border:]).strip() == text and text in "".join(pieces[:border])


def test_pieces_show_a_character_of_several_bytes_once(llama: Encoder) -> None:
    ids = llama.row(example("Q?", "a 🙂 b")).input_ids
    assert "".join(llama.pieces(ids)).endswith("a 🙂 b")


def test_wrong_tokenizers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no tokenizer here"):
        Encoder(tmp_path)
    with pytest.raises(InputError, match="no chat template"):
        Encoder(POCKET, "tokenizer")
    broken = make_chat_tokenizer(tmp_path / "broken")
    (broken / "chat_template.jinja").write_text("{% if %}")
    with pytest.raises(InputError, match="does not compile"):
        Encoder(broken, "tokenizer")
    (broken / "chat_template.jinja").write_text("{{ raise_exception('only French') }}")
    with pytest.raises(InputError, match="only French"):
        Encoder(broken, "tokenizer").prompt_ids([{"role": "user", "content": "hi"}])
    (broken / "chat_template.jinja").write_text("{{ nothing.of.this }}")
    with pytest.raises(InputError, match="chat template fails"):
        Encoder(broken, "tokenizer").prompt_ids([{"role": "user", "content": "hi"}])
    (broken / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    with pytest.raises(InputError, match="does not give the prompt, then the response"):
        Encoder(broken, "tokenizer").row(example("Q?", "A"))
    (broken / "tokenizer_config.json").write_text("{")
    with pytest.raises(InputError, match="not valid JSON"):
        Encoder(broken)
    (broken / "tokenizer_config.json").write_text('{"eos_token": "<nowhere>"}')
    with pytest.raises(InputError, match="'<nowhere>' is not in its vocabulary"):
        Encoder(broken)
    (broken / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match=r"tokenizer\.json: not a readable tokenizer"):
        Encoder(broken)


def test_a_chat_template_runs_in_a_sandbox(tmp_path: Path) -> None:
    folder = make_chat_tokenizer(tmp_path / "evil")
    (folder / "chat_template.jinja").write_text("{{ ''.__class__.__mro__[1].__subclasses__() }}")
    with pytest.raises(InputError, match="chat template fails"):
        Encoder(folder, "tokenizer").prompt_ids([{"role": "user", "content": "hi"}])


# Llama's own tokenizer and real rows

LLAMA_HI = [1, 518, 25580, 29962, 7251, 518, 29914, 25580, 29962]


@pytest.fixture(scope="module")
def real() -> Encoder:
    return Encoder(REAL / "llama2_tokenizer")


@needs_real_data
def test_llamas_own_ids(real: Encoder) -> None:
    assert real.prompt_ids([{"role": "user", "content": "hi"}]) == LLAMA_HI
    assert (real.bos_id, real.eos_id, real.pad_id) == (1, 2, 0)
    with pytest.raises(InputError, match="no chat template"):
        Encoder(REAL / "llama2_tokenizer", "tokenizer")


@needs_real_data
def test_a_bare_sentencepiece_model_is_read_alike(real: Encoder, tmp_path: Path) -> None:
    shutil.copy(REAL / "llama2_tokenizer" / "tokenizer.model", tmp_path)
    assert Encoder(tmp_path).prompt_ids([{"role": "user", "content": "hi"}]) == LLAMA_HI


@needs_real_data
@pytest.mark.parametrize("text", AWKWARD)
def test_the_contract_holds_on_awkward_text_with_llamas_tokenizer(real: Encoder, text: str) -> None:
    check(real, example(text, text))


@needs_real_data
@pytest.mark.parametrize("name", ["filtered_alpaca_1k_longest", "filtered_alpaca_1k_score.json"])
def test_the_contract_holds_on_real_rows(real: Encoder, llama: Encoder, name: str) -> None:
    pool = dataset.load_pool(schema.Data(train=str(REAL / name)))
    examples = pool.examples(range(len(pool)))
    assert len(examples) == 1000
    for each in examples:
        check(real, each)
    for each in examples[:100]:
        check(llama, each)
