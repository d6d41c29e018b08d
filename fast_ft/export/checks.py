"""Does an exported model answer as the adapter on its base does? Measured on the files, loaded afresh.

The reference is PEFT on the base that was merged into. Compared are the log-probabilities of the training rows that
stand beside the adapter (selfcheck.json), and greedy answers to those rows' prompts, both in float32 where that finds
room. A merge with a wrong scale, a layer left out or A and B exchanged shows in both.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fast_ft.common import host_memory, out_of_memory
from fast_ft.common.errors import InputError
from fast_ft.export.merged import BaseWeights
from fast_ft.models import adapter_check, nf4
from fast_ft.models.adapter_check import StoredCheck

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

ALLOWED = 0.01  #: nats per token, mean over the stored rows: what rounding to 16 bits may change
NEW_TOKENS = 32  #: of each greedy answer
#: Greedy answers may part where the two likeliest tokens are nearer to each other than this, in nats.
TIE = 0.02


@dataclass(frozen=True)
class Answers:
    """What a model says of the stored rows: log p of each trained token, and greedy answers with their margins."""

    log_probabilities: list[list[float]]
    tokens: list[list[int]]
    margins: list[list[float]]  #: nats between the likeliest token and the next, at each place


@dataclass(frozen=True)
class Finding:
    """How far one model is from another on the stored rows."""

    name: str
    nats: float  #: mean absolute difference of the trained tokens' log-probabilities
    same: int  #: greedy answers that are equal, token for token
    ties: int  #: those that part where two tokens are as likely, within TIE
    count: int

    @property
    def sentence(self) -> str:
        """What a user reads."""
        ties = f", {self.ties} part where two tokens are equally likely" if self.ties else ""
        return (
            f"{self.name}: the trained tokens' log-probabilities differ by {self.nats:.4f} nat on average; "
            f"{self.same} of {self.count} greedy answers are the same{ties}"
        )


def answers(load: Callable[[], PreTrainedModel], stored: StoredCheck, eos_ids: list[int]) -> Answers:
    """Return what the model that `load` gives says of the stored rows; its memory is free afterwards."""
    model = load().eval()
    ids, starts = [row.input_ids for row in stored.rows], [row.start for row in stored.rows]
    values = [adapter_check.log_probabilities(model, [i], [s], 0)[0] for i, s in zip(ids, starts, strict=True)]
    spoken = [_greedy(model, row[:start], eos_ids) for row, start in zip(ids, starts, strict=True)]
    del model
    out_of_memory.release()
    return Answers(values, [tokens for tokens, _ in spoken], [margins for _, margins in spoken])


def compare(name: str, reference: Answers, found: Answers) -> Finding:
    """Return how far `found` is from `reference`."""
    pairs = [
        abs(a - b)
        for one, other in zip(reference.log_probabilities, found.log_probabilities, strict=True)
        for a, b in zip(one, other, strict=True)
    ]
    same = ties = 0
    for tokens, margins, others in zip(reference.tokens, reference.margins, found.tokens, strict=True):
        parts = next((at for at, pair in enumerate(zip(tokens, others, strict=False)) if pair[0] != pair[1]), None)
        if parts is None and len(tokens) == len(others):
            same += 1
        elif parts is not None and margins[parts] < TIE:
            ties += 1
    return Finding(name, sum(pairs) / len(pairs), same, ties, len(reference.tokens))


def refuse_wrong(finding: Finding, allowed: float = ALLOWED) -> None:
    """Raise InputError where a model that must answer as its reference does not."""
    if finding.nats <= allowed and finding.same + finding.ties == finding.count:  # a NaN fails
        return
    raise InputError(
        f"{finding.sentence}. At most {allowed} nat, and the same answers, are allowed: the exported model is not the "
        "one that was trained, and was not kept. Is the base the one that the adapter was trained on?"
    )


def distance(stored: StoredCheck, found: Answers) -> float:
    """Return the mean absolute difference, in nats per token, to what training stored: the run's own model."""
    pairs = [
        abs(a - b)
        for row, values in zip(stored.rows, found.log_probabilities, strict=True)
        for a, b in zip(row.log_probabilities, values, strict=True)
    ]
    return sum(pairs) / len(pairs)


def loader(folder: Path, *, adapter: Path | None = None, gguf_file: Path | None = None) -> Callable[[], Any]:
    """Return a function that loads a model in float32, or in 16 bits where float32 finds no room.

    adapter: put over the folder's model by PEFT. gguf_file: the weights come from it, the rest from the folder.
    """

    def load() -> Any:
        """Load afresh."""
        import torch
        import transformers

        transformers.utils.logging.disable_progress_bar()
        config = transformers.AutoConfig.from_pretrained(str(folder), trust_remote_code=False)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        dtype = torch.float32 if _float32_fits(folder, device) else torch.float16
        from_gguf = gguf_file is not None
        model = transformers.AutoModelForCausalLM.from_pretrained(
            str(gguf_file.parent if gguf_file is not None else folder),
            gguf_file=gguf_file.name if gguf_file is not None else None,
            config=config,
            dtype=dtype,
            device_map=None if from_gguf else {"": device},
            use_safetensors=None if from_gguf else True,
            local_files_only=True,
            trust_remote_code=False,
        ).to(device)
        if getattr(config, "quantization_config", None) is not None:
            # Products on 4-bit weights round in their own ways, on a CPU most of all; what was merged into is W itself.
            nf4.compute_in(model, dtype)
            model = model.dequantize().to(dtype)
        if adapter is not None:
            import peft

            model = peft.PeftModel.from_pretrained(model, str(adapter))
        return model

    return load


def _float32_fits(folder: Path, device: str) -> bool:
    """Return whether the folder's weights find room in float32, with a tenth left over."""
    import torch

    needed = 4.4 * sum(math.prod(weights.shape(name)) for weights in [BaseWeights(folder)] for name in weights.names())
    if device == "cuda":
        return needed < torch.cuda.mem_get_info()[0]
    return needed < host_memory.free_bytes()


def _greedy(model: PreTrainedModel, prompt: list[int], eos_ids: list[int]) -> tuple[list[int], list[float]]:
    """Return the greedy answer's tokens, EOS included, and the margins at their places, by plain forward passes."""
    import torch

    tokens: list[int] = []
    margins: list[float] = []
    cache, step_BL = None, torch.tensor([prompt], device=next(model.parameters()).device)
    with torch.no_grad():
        for _ in range(NEW_TOKENS):
            out = model(input_ids=step_BL, past_key_values=cache, use_cache=True)
            logits_V: Tensor = out.logits[0, -1].float()
            best = logits_V.topk(2)
            tokens.append(int(best.indices[0]))
            margins.append(float(best.values[0] - best.values[1]))
            if tokens[-1] in eos_ids:
                break
            cache, step_BL = out.past_key_values, best.indices[:1][None]
    return tokens, margins
