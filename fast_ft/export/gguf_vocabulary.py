"""A tokenizer as llama.cpp reads it: its pieces with their scores or merges, the kinds of tokens, the chat template.

llama.cpp has its own code for each way of cutting text before merging; a tokenizer.json whose way it does not know is
written with the nearest, and a note says that text may be split otherwise, so that token ids should be given instead.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fast_ft.common import untrusted_files
from fast_ft.common.errors import InputError

if TYPE_CHECKING:
    import gguf

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
#: The regular expression in a tokenizer.json's pre-tokenizer -> llama.cpp's name of it (tokenizer.ggml.pre).
REGULAR = {_WORDS + r"\p{N}{1,3}" + _REST: "llama-bpe", _WORDS + r"\p{N}" + _REST: "qwen2"}
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  #: gguf.TokenType
_ELSEWHERE = (
    "llama.cpp knows no tokenizer that splits text as this one does, so it may split some text otherwise. Give it "
    "token ids, or serve the merged model with transformers or vLLM."
)


@dataclass
class Vocabulary:
    """The keys of a GGUF that hold the tokenizer. `model` is llama.cpp's: "llama" (scores) or "gpt2" (merges)."""

    model: str
    pre: str
    tokens: list[str]
    kinds: list[int]
    scores: list[float] | None
    merges: list[str] | None
    special: dict[str, int]  #: "bos", "eos", "unk", "pad" -> id
    add_bos: bool
    template: str | None
    notes: list[str] = field(default_factory=list)

    def add_to(self, library: Any, writer: gguf.GGUFWriter, vocab_size: int) -> None:
        """Write the keys; ids up to vocab_size that no token has become unused ones."""
        missing = range(len(self.tokens), vocab_size)
        writer.add_tokenizer_model(self.model)
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list([*self.tokens, *(f"[PAD{number}]" for number in missing)])
        writer.add_token_types([*self.kinds, *(UNUSED for _ in missing)])
        if self.scores is not None:
            writer.add_token_scores([*self.scores, *(-1e4 for _ in missing)])
        if self.merges is not None:
            writer.add_token_merges(self.merges)
        for name, add in (
            ("bos", writer.add_bos_token_id), ("eos", writer.add_eos_token_id), ("unk", writer.add_unk_token_id),
            ("pad", writer.add_pad_token_id),
        ):  # fmt: skip
            if name in self.special:
                add(self.special[name])
        writer.add_add_bos_token(self.add_bos)
        if self.template is not None:
            writer.add_chat_template(self.template)


def read_vocabulary(folder: Path) -> Vocabulary:
    """Return the tokenizer in a model's folder. Raises InputError where it is of a kind that is not written."""
    path = folder / "tokenizer_config.json"
    config = untrusted_files.json_object(path) if path.is_file() else {}
    template = folder / "chat_template.jinja"
    text = untrusted_files.text(template) if template.is_file() else config.get("chat_template")
    found = _sentencepiece(folder) if (folder / "tokenizer.model").is_file() else _tokenizer_json(folder)
    ids = {token: id_ for id_, token in enumerate(found.tokens)}
    for name in ("bos", "eos", "unk", "pad"):
        value = config.get(f"{name}_token")
        value = value.get("content") if isinstance(value, dict) else value
        value = value or {"bos": "<s>", "eos": "</s>", "unk": "<unk>"}.get(name)
        if value in ids:
            found.special[name] = ids[value]
    found.template = text if isinstance(text, str) else None
    found.add_bos = bool(config.get("add_bos_token", found.add_bos))
    return found


def _sentencepiece(folder: Path) -> Vocabulary:
    from sentencepiece import SentencePieceProcessor

    model = SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    ids = range(model.get_piece_size())

    def kind(id_: int) -> int:
        """Return a piece's kind, as gguf.TokenType counts."""
        for matches, value in (
            (model.is_unknown, UNKNOWN), (model.is_control, CONTROL), (model.is_unused, UNUSED), (model.is_byte, BYTE),
        ):  # fmt: skip
            if matches(id_):
                return value
        return NORMAL

    tokens = [model.id_to_piece(id_) for id_ in ids]
    found = Vocabulary("llama", "default", tokens, [kind(id_) for id_ in ids], [model.get_score(id_) for id_ in ids],
                       None, {}, True, None)  # fmt: skip
    path = folder / "added_tokens.json"
    for text, id_ in sorted((untrusted_files.json_object(path) if path.is_file() else {}).items(), key=lambda e: e[1]):
        if id_ == len(found.tokens):
            found.tokens.append(text)
            found.kinds.append(CONTROL)
            assert found.scores is not None
            found.scores.append(-1e4)
    return found


def _tokenizer_json(folder: Path) -> Vocabulary:
    content = untrusted_files.json_object(folder / "tokenizer.json", most=64 << 20)
    model = content["model"]
    if model.get("type") != "BPE":
        raise InputError(f"{folder}: a tokenizer of kind {model.get('type')!r} is not written as GGUF here; BPE is.")
    ids = dict(model["vocab"])
    control = {entry["id"]: entry for entry in content.get("added_tokens", [])}
    ids |= {entry["content"]: entry["id"] for entry in control.values()}
    tokens = [text for text, _ in sorted(ids.items(), key=lambda item: item[1])]
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    kinds = [CONTROL if id_ in control and control[id_]["special"] else USER_DEFINED if id_ in control else NORMAL
             for id_ in range(len(tokens))]  # fmt: skip
    names = _kinds(content.get("pre_tokenizer"))
    if not model.get("byte_fallback"):
        pre = _pre(content.get("pre_tokenizer"), names)
        notes = [] if pre else [_ELSEWHERE]
        bos = "TemplateProcessing" in _kinds(content.get("post_processor"))
        return Vocabulary("gpt2", pre or "default", tokens, kinds, None, merges, {}, bos, None, notes)
    # Llama 2's way, as SentencePiece has it: a piece's score is the negative of its merge's rank.
    ranks = {"".join(pair.split(" ")): -float(rank) for rank, pair in enumerate(merges)}
    scores = [ranks.get(token, -float(len(merges)) - 1) for token in tokens]
    for id_, token in enumerate(tokens):
        if len(token) == 6 and token.startswith("<0x"):
            kinds[id_], scores[id_] = BYTE, 0.0
        elif token == model.get("unk_token"):
            kinds[id_] = UNKNOWN
    notes = [_ELSEWHERE] if names - {"Metaspace", "Sequence"} else []
    return Vocabulary("llama", "default", tokens, kinds, scores, None, {}, True, None, notes)


def _kinds(part: Any) -> set[str]:
    """Return the types of a tokenizer.json's part and of all parts below it."""
    if isinstance(part, dict):
        return {part.get("type", "")} - {""} | set().union(*map(_kinds, part.values()))
    return set().union(*map(_kinds, part)) if isinstance(part, list) else set()


def _pre(part: Any, names: set[str]) -> str | None:
    """Return llama.cpp's name of a byte-level pre-tokenizer, or None."""
    parts = part.get("pretokenizers", [part]) if isinstance(part, dict) else []
    for each in parts:
        pattern = each.get("pattern")
        if isinstance(pattern, dict) and pattern.get("Regex") in REGULAR:
            return REGULAR[pattern["Regex"]]
    if names - {"Sequence"} == {"Digits", "ByteLevel"}:
        return "smollm"
    return "gpt-2" if names == {"ByteLevel"} else None
