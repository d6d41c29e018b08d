"""Answers: the adapter, loaded fresh by path, and the test prompts, to pred.json.

Prompts are decoded in batches of similar length. Which prompts share a batch follows from the test file and the
settled batch size alone, and each batch seeds itself, so a run that was stopped goes on to the same answers.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fast_ft import recipe, seeds
from fast_ft.backend import Loaded
from fast_ft.data import Prompt
from fast_ft.errors import InputError
from fast_ft.progress import Bar, note
from fast_ft.selfcheck import TOLERANCE, log_probabilities
from fast_ft.template import Encoder

_PROBE_TOKENS = 8
_PROBE_ROWS = 4


@dataclass(frozen=True)
class Answer:
    """One answer. `tokens` counts new tokens, EOS included; `ended` says whether EOS came before the limit."""

    id: str
    text: str
    tokens: int
    ended: bool


@dataclass(frozen=True)
class Generation:
    """All answers, by prompt id; what was settled; and sentences for the manifest."""

    answers: dict[str, Answer]
    seconds: float
    batch_size: int
    parity: float  #: nats, batched against single
    notes: list[str]


def generate(
    loaded: Loaded,
    encoder: Encoder,
    prompts: Sequence[Prompt],
    section: recipe.Generate,
    *,
    seed: int,
    batch_size: int,
    partial: Path,
    title: str = "answers",
) -> Generation:
    """Answer every prompt, in batches of at most `batch_size`.

    `partial` keeps finished answers, one JSON line each, and is read back on a second start. Out of memory halves the
    batch; InputError where a single prompt does not fit.
    """
    import torch

    ids = [encoder.prompt_ids(prompt.messages) for prompt in prompts]
    check_room(loaded.model.config, prompts, ids, section.max_new_tokens)
    answers = _read_partial(partial, {prompt.id for prompt in prompts})
    started = time.monotonic()
    notes: list[str] = []
    batch_size, parity = settle_batch_size(loaded, encoder, ids, min(batch_size, len(ids)), notes)
    waiting = sorted(range(len(ids)), key=lambda i: -len(ids[i]))  # what does not fit fails at once, not at the end
    new_tokens = 0
    with Bar(title, len(prompts), done=len(answers)) as bar, partial.open("a", encoding="utf-8") as file:
        while waiting:
            batch = waiting[:batch_size]
            if any(prompts[i].id not in answers for i in batch):
                torch.manual_seed(seeds.derive(seed, "generate", prompts[batch[0]].id))
                try:
                    outputs = decode(loaded, encoder, [ids[i] for i in batch], section)
                except torch.OutOfMemoryError:
                    outputs = None
                if outputs is None:  # outside the handler: the error's traceback holds the cache
                    batch_size = _halve(batch_size, "out of memory", notes)
                    torch.cuda.empty_cache()
                    continue
                fresh = [
                    Answer(prompts[i].id, encoder.decode(output), len(output), output[-1:] == [encoder.eos_id])
                    for i, output in zip(batch, outputs, strict=True)
                    if prompts[i].id not in answers
                ]
                file.writelines(json.dumps(asdict(answer), ensure_ascii=False) + "\n" for answer in fresh)
                file.flush()
                answers |= {answer.id: answer for answer in fresh}
                new_tokens += sum(answer.tokens for answer in fresh)
                bar.advance(len(fresh), f"{new_tokens / (time.monotonic() - started):,.0f} tokens/s")
            del waiting[: len(batch)]
    return Generation(answers, time.monotonic() - started, batch_size, parity, notes)


def predictions(prompts: Sequence[Prompt], answers: dict[str, Answer]) -> dict[str, Any]:
    """Return pred.json's content, in the test file's order: {id: {"input": messages, "output": [text]}}."""
    return {prompt.id: {"input": list(prompt.messages), "output": [answers[prompt.id].text]} for prompt in prompts}


def decode(loaded: Loaded, encoder: Encoder, ids: Sequence[Sequence[int]], section: recipe.Generate) -> list[list[int]]:
    """Return the new ids of each row, up to and with EOS, by transformers' generate on a left-padded batch."""
    output = _generate(loaded, encoder, ids, _config(encoder, section))
    width = max(len(row) for row in ids)
    return [_until_eos(row[width:], encoder.eos_id) for row in output.sequences.tolist()]


def settle_batch_size(
    loaded: Loaded, encoder: Encoder, ids: Sequence[Sequence[int]], batch_size: int, notes: list[str]
) -> tuple[int, float]:
    """Return a batch size at which batched and single decoding agree, and by how many nats they differ.

    A batch of prompts of all lengths is decoded for a few steps; the log-probability of each chosen token is compared
    with a pass over that row alone, teacher-forced. Padding, positions and cache of the real path are all in it.
    """
    import torch

    by_length = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    while True:
        spread = [by_length[k * (len(ids) - 1) // max(1, batch_size - 1)] for k in range(batch_size)]
        try:
            difference = parity(loaded, encoder, [ids[i] for i in spread])
            reason = f"batched and single decoding differ by {difference:.4f} nat"
        except torch.OutOfMemoryError:
            difference, reason = float("inf"), "out of memory"
        if difference <= TOLERANCE[loaded.dtype] or (batch_size == 1 and difference != float("inf")):
            return batch_size, difference
        batch_size = _halve(batch_size, reason, notes)
        if loaded.device == "cuda":
            torch.cuda.empty_cache()


def parity(loaded: Loaded, encoder: Encoder, ids: Sequence[Sequence[int]]) -> float:
    """Return the mean absolute difference, in nats a token, between a batch's decoding and its rows taken alone."""
    import torch
    import transformers

    config = transformers.GenerationConfig(
        do_sample=False, max_new_tokens=_PROBE_TOKENS, eos_token_id=encoder.eos_id, pad_token_id=encoder.pad_id,
        return_dict_in_generate=True, output_logits=True,
    )  # fmt: skip
    output = _generate(loaded, encoder, ids, config)
    logits_TBV = torch.stack(list(output.logits)).float()
    width = max(len(row) for row in ids)
    differences: list[float] = []
    for index in sorted({k * (len(ids) - 1) // max(1, _PROBE_ROWS - 1) for k in range(_PROBE_ROWS)}):
        chosen = _until_eos(output.sequences[index, width:].tolist(), encoder.eos_id)
        batched_TV = torch.log_softmax(logits_TBV[: len(chosen), index], dim=-1)
        alone = log_probabilities(loaded.model, [[*ids[index], *chosen]], [len(ids[index])], encoder.pad_id)[0]
        differences += [abs(batched_TV[t, token].item() - alone[t]) for t, token in enumerate(chosen)]
    return sum(differences) / len(differences)


def check_room(config: Any, prompts: Sequence[Prompt], ids: Sequence[Sequence[int]], max_new_tokens: int) -> None:
    """Raise InputError where a prompt and its longest answer do not fit into the model's context."""
    context = getattr(config, "max_position_embeddings", None)
    longest = max(range(len(ids)), key=lambda i: len(ids[i]))
    if context is not None and len(ids[longest]) + max_new_tokens > context:
        raise InputError(
            f"prompt {prompts[longest].id!r} has {len(ids[longest])} tokens; with generate.max_new_tokens "
            f"{max_new_tokens} that is over the model's context of {context}. "
            f"Use at most generate.max_new_tokens={max(0, context - len(ids[longest]))}, or shorten the prompt."
        )


def _generate(loaded: Loaded, encoder: Encoder, ids: Sequence[Sequence[int]], config: Any) -> Any:
    import torch
    import transformers

    # what a given config leaves unset would come from the model's own generation_config.json
    loaded.model.generation_config = transformers.GenerationConfig()
    width = max(len(row) for row in ids)
    padded = torch.tensor([[encoder.pad_id] * (width - len(row)) + list(row) for row in ids], device=loaded.device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in ids], device=loaded.device)
    with torch.inference_mode():
        return loaded.model.generate(input_ids=padded, attention_mask=mask, generation_config=config)


def _config(encoder: Encoder, section: recipe.Generate) -> Any:
    """Every value is the recipe's: a model's own generation_config.json must not decide the answers."""
    import transformers

    sampling = {"temperature": section.temperature, "top_p": section.top_p, "top_k": section.top_k}
    return transformers.GenerationConfig(
        do_sample=section.do_sample,
        **(sampling if section.do_sample else {}),
        repetition_penalty=section.repetition_penalty,
        max_new_tokens=section.max_new_tokens,
        eos_token_id=encoder.eos_id,
        bos_token_id=encoder.bos_id,
        pad_token_id=encoder.pad_id,
        use_cache=True,
        return_dict_in_generate=True,
    )


def _until_eos(ids: list[int], eos_id: int) -> list[int]:
    return ids[: ids.index(eos_id) + 1] if eos_id in ids else ids


def _halve(batch_size: int, reason: str, notes: list[str]) -> int:
    if batch_size == 1:
        raise InputError("out of memory with one prompt at a time. Lower generate.max_new_tokens, or free the card.")
    smaller = batch_size // 2
    notes.append(f"{reason} in batches of {batch_size}: went on with {smaller}")
    note(notes[-1])
    return smaller


def _read_partial(path: Path, wanted: set[str]) -> dict[str, Answer]:
    """Return the finished answers of a stopped run. A last line that was cut off is left out, and cut from the file."""
    if not path.is_file():
        return {}
    answers, whole = {}, 0
    for line in path.read_bytes().splitlines(keepends=True):
        try:
            answer = Answer(**json.loads(line))
        except (ValueError, TypeError):
            break
        if not line.endswith(b"\n"):
            break
        whole += len(line)
        if answer.id in wanted:
            answers[answer.id] = answer
    with path.open("r+b") as file:
        file.truncate(whole)
    return answers
