"""Tokenizers with control tokens and chat templates, made from the pocket's tokenizer and from a byte-level one."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from tests.helpers.parts import POCKET

#: `@<` and `@>` stand for {% generation %} and {% endgeneration %}.
TEMPLATES = {
    "llama2": (
        "{% if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}{% set system = messages[0]['content'] %}"
        "{% else %}{% set rest = messages %}{% set system = false %}{% endif %}"
        "{% for message in rest %}"
        "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles') }}{% endif %}"
        "{% if loop.index0 == 0 and system %}{% set content = '<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' + "
        "message['content'] %}{% else %}{% set content = message['content'] %}{% endif %}"
        "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
        "{% else %}@<{{ ' '  + content.strip() + ' ' + eos_token }}@>{% endif %}{% endfor %}"
    ),
    "llama3": (
        "{% set loop_messages = messages %}{% for message in loop_messages %}"
        "{% set head = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' %}"
        "{% if loop.index0 == 0 %}{% set head = bos_token + head %}{% endif %}{{ head }}"
        "{% if message['role'] == 'assistant' %}@<{{ message['content'] | trim + '<|eot_id|>' }}@>"
        "{% else %}{{ message['content'] | trim + '<|eot_id|>' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
    ),
    "chatml": (
        "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
        "{% if message['role'] == 'assistant' %}@<{{ message['content'] + '<|im_end|>' }}@>"
        "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    ),
    "mistral": (
        "{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}"
        "{% set rest = messages[1:] %}{% else %}{% set rest = messages %}{% endif %}"
        "{{ bos_token }}{% for message in rest %}{% if message['role'] == 'user' %}"
        "{% if loop.last and system is defined %}{{ '[INST] ' + system + '\\n\\n' + message['content'] + '[/INST]' }}"
        "{% else %}{{ '[INST] ' + message['content'] + '[/INST]' }}{% endif %}"
        "{% else %}@<{{ ' ' + message['content'] + eos_token }}@>{% endif %}{% endfor %}"
    ),
}
CONTROLS = ("<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "[INST]", "[/INST]")
ENDS = {"llama2": "</s>", "llama3": "<|eot_id|>", "chatml": "<|im_end|>", "mistral": "</s>"}


def given(template: str, *, generation: bool = False) -> str:
    opening, closing = ("{% generation %}", "{% endgeneration %}") if generation else ("", "")
    return TEMPLATES[template].replace("@<", opening).replace("@>", closing)


@cache
def byte_level() -> str:
    """A byte-level BPE like GPT-2's and Llama 3's, trained on the pocket's rows."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    rows = json.loads((POCKET.parent / "train.json").read_text("utf-8"))[:300]
    texts = [turn["value"] for row in rows for turn in row["conversations"]]
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer.to_str()


def make_folder(folder: Path, kind: str, template: str, **changes: Any) -> Path:
    """A tokenizer's folder: the pocket's or the byte-level one, with the control tokens, and a chat template.

    `changes` go over tokenizer_config.json; a value of ... takes a key out.
    """
    import tokenizers

    source = (POCKET / "tokenizer.json").read_text("utf-8") if kind == "pocket" else byte_level()
    tokenizer = tokenizers.Tokenizer.from_str(source)
    # In Llama 2's form [INST] is text; Mistral's tokenizer has it as a control token.
    tokenizer.add_special_tokens([each for each in CONTROLS if "INST" not in each or template == "mistral"])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": ENDS[template],
        "unk_token": "<unk>", "pad_token": "<unk>", "clean_up_tokenization_spaces": False,
        "chat_template": given(template),
    }  # fmt: skip
    content = {key: value for key, value in (config | changes).items() if value is not ...}
    (folder / "tokenizer_config.json").write_text(json.dumps(content), encoding="utf-8")
    return folder
