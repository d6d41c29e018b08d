"""The tokenizer that a .gguf file holds, in the files that the rest of the program reads.

A vocabulary of byte pairs (`gpt2`) becomes a tokenizer.json, one of SentencePiece (`llama`) a tokenizer.model.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fast_ft.common.atomic_files import write_bytes, write_json, write_text
from fast_ft.common.console import note
from fast_ft.common.errors import InputError
from fast_ft.hub.gguf_metadata import Metadata

_CONTROL, _USER_DEFINED = 3, 4  #: of tokenizer.ggml.token_type
_ID_KEYS = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding", "eot": "eot"}
#: How Llama 3 and Qwen 2 cut text into words; they differ in how many digits make one.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}DIGITS| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
#: tokenizer.ggml.pre -> the expression that cuts text into words, or None for GPT-2's; and whether digits stand alone.
_PRE = {
    "gpt-2": (None, False),
    "smollm": (None, True),
    "llama-bpe": (_WORDS.replace("DIGITS", "{1,3}"), False),
    "qwen2": (_WORDS.replace("DIGITS", ""), False),
}


def write(source: Metadata, folder: Path) -> None:
    """Write the tokenizer's files to a folder. Raises InputError for a tokenizer of an unknown kind."""
    kind = source.text("tokenizer.ggml.model")
    if kind == "gpt2":
        write_text(folder / "tokenizer.json", _byte_pairs(source))
    elif kind == "llama":
        write_bytes(folder / "tokenizer.model", _sentencepiece(source))
    else:
        raise InputError(
            f"{source.path}: its tokenizer is of the kind {kind!r}; gpt2 and llama are read. {source.remedy}"
        )
    tokens = source.texts("tokenizer.ggml.tokens")
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast" if kind == "gpt2" else "LlamaTokenizer",
        "clean_up_tokenization_spaces": False,
        "model_max_length": int(source.needed(f"{source.architecture}.context_length")),
    }
    for name, index in special_tokens(source).items():
        if index is not None:
            config[f"{name}_token"] = tokens[index]
    if template := source.text("tokenizer.chat_template"):
        write_text(folder / "chat_template.jinja", template)
    write_json(folder / "tokenizer_config.json", config)


def special_tokens(source: Metadata) -> dict[str, int | None]:
    """Return the ids of bos, eos, unk and pad, None where the file names none.

    They are the file's own, but for an EOS that its chat template never writes: an answer would not end then, so the
    file's end of turn takes its place. Raises InputError for an id outside the vocabulary, or without an EOS.
    """
    tokens = source.texts("tokenizer.ggml.tokens")
    ids: dict[str, int | None] = {}
    for name, key in _ID_KEYS.items():
        value = source.number(f"tokenizer.ggml.{key}_token_id")
        if value is not None and not 0 <= value < len(tokens):
            raise InputError(
                f"{source.path}: its {key} token is {value:g}, and its vocabulary has {len(tokens):,} tokens: get the "
                "file from its publisher"
            )
        ids[name] = None if value is None else int(value)
    eot, template = ids.pop("eot"), source.text("tokenizer.chat_template")
    if ids["eos"] is None:
        raise InputError(f"{source.path}: it names no token that ends an answer. {source.remedy}")
    if template and tokens[ids["eos"]] not in template and "eos_token" not in template:
        if eot is not None and tokens[eot] in template:
            note(f"note: {source.path}: answers end with {tokens[eot]}, as its chat template ends them")
            ids["eos"] = eot
        else:
            note(
                f"warning: {source.path}: its chat template never writes {tokens[ids['eos']]}, with which "
                "an answer ends by what the file says"
            )
    return ids


def _byte_pairs(source: Metadata) -> str:
    """Return tokenizer.json."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
    from tokenizers.models import BPE

    pre = source.text("tokenizer.ggml.pre")
    if pre not in _PRE:
        raise InputError(
            f"{source.path}: it cuts text into words in a way named {pre!r}; {', '.join(_PRE)} are read. "
            f"{source.remedy}"
        )
    words, digits_alone = _PRE[pre]
    tokens, kinds = source.texts("tokenizer.ggml.tokens"), source.get("tokenizer.ggml.token_type") or []
    merges = [tuple(merge.split(" ")) for merge in source.texts("tokenizer.ggml.merges")]
    model = BPE({token: index for index, token in enumerate(tokens)}, merges, ignore_merges=pre == "llama-bpe")
    tokenizer = Tokenizer(model)
    cuts = [pre_tokenizers.Digits(individual_digits=True)] if digits_alone else []
    cuts += [pre_tokenizers.Split(Regex(words), "isolated")] if words else []
    cuts += [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=words is None)]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(cuts)
    tokenizer.decoder = decoders.ByteLevel()
    if pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    for kind, add in ((_CONTROL, tokenizer.add_special_tokens), (_USER_DEFINED, tokenizer.add_tokens)):
        chosen = [token for token, of in zip(tokens, kinds, strict=False) if of == kind]
        add([AddedToken(token, normalized=False, special=kind == _CONTROL) for token in chosen])
    return tokenizer.to_str()


def _sentencepiece(source: Metadata) -> bytes:
    """Return tokenizer.model. Token types are numbered as in SentencePiece's own format."""
    from sentencepiece import sentencepiece_model_pb2

    protobuf: Any = sentencepiece_model_pb2  # its classes are made when it is imported

    tokens = source.texts("tokenizer.ggml.tokens")
    scores, kinds = source.get("tokenizer.ggml.scores"), source.get("tokenizer.ggml.token_type")
    if not isinstance(scores, list) or not isinstance(kinds, list) or not len(tokens) == len(scores) == len(kinds):
        raise InputError(f"{source.path}: its tokenizer lacks scores or types of tokens. {source.remedy}")
    model = protobuf.ModelProto()
    for token, score, kind in zip(tokens, scores, kinds, strict=True):
        model.pieces.add(piece=token, score=score, type=kind)
    spec, ids = model.trainer_spec, special_tokens(source)
    spec.model_type, spec.byte_fallback, spec.vocab_size = protobuf.TrainerSpec.BPE, True, len(tokens)
    for name in ("unk", "bos", "eos", "pad"):
        index = ids[name]
        setattr(spec, f"{name}_id", -1 if index is None else index)
        if index is not None:
            setattr(spec, f"{name}_piece", tokens[index])
    prefix = source.get("tokenizer.ggml.add_space_prefix")
    model.normalizer_spec.name, model.normalizer_spec.remove_extra_whitespaces = "identity", False
    model.normalizer_spec.add_dummy_prefix = prefix is not False
    return model.SerializeToString()
