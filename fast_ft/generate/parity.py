"""Does the pool answer as the model alone does? Asked before each generation, of some of its own prompts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fast_ft.common import out_of_memory
from fast_ft.generate.engine.sequence import Sequence
from fast_ft.models.adapter_check import log_probabilities_of
from fast_ft.models.loaders.base import LoadedModel

if TYPE_CHECKING:
    from fast_ft.generate.engine_setup import Engine

_PROBE_TOKENS = 8
_PROBE_ROWS = 4
#: Tokens of a pass of the model's own over several rows, and where memory does not do for that: the cache is there by
#: now, and what is left holds a pass over one prompt.
_PASS_TOKENS, _FEW_TOKENS = 2048, 512
#: Mean difference allowed between the pool and a row alone, in nats per token. Wider than selfcheck's in fp32, where
#: both sides run the same kernels: a 4-bit product on a CPU differs by some 1e-4 with the rows in it. A wrong mask or a
#: wrong position shows as a tenth of a nat or more.
PARITY = {"float32": 2e-3, "float16": 0.02, "bfloat16": 0.1}
#: What an 8-bit cache adds: half a hundredth of a nat on SmolLM2.
_EIGHT_BITS = 0.03


def allowed(dtype: str, kv_cache: str) -> float:
    """Return the mean difference allowed in this dtype and with this kind of cache, in nats per token."""
    return PARITY[dtype] + (_EIGHT_BITS if kv_cache == "8bit" else 0.0)


def parity(engine: Engine, loaded: LoadedModel, ids: list[list[int]], limit: int) -> float:
    """Return the mean absolute difference, in nats per token, between the engine's decoding and its rows taken alone.

    Rows of all lengths are decoded for a few steps, in the pool's full shape; the log-probability of each chosen
    token is compared with the model's own pass over that row, teacher-forced. Prefill, pages, positions, LoRA and the
    captured step are all in it.
    """
    import torch

    slots, pad_id = engine.config.slots, engine.config.pad_id
    by_length = sorted(ids, key=len)
    spread = sorted({k * (len(ids) - 1) // max(1, _PROBE_ROWS - 1) for k in range(min(_PROBE_ROWS, slots))})
    rows = [Sequence(by_length[index], min(_PROBE_TOKENS, limit)) for index in spread]
    batched: dict[Sequence, list[float]] = {row: [] for row in rows}

    def record(live: list[Sequence]) -> None:
        logits_SV = torch.log_softmax(engine.logits[: len(live)], dim=-1)
        token_S1 = torch.tensor([[row.tokens[-1]] for row in live], device=logits_SV.device)
        for row, value in zip(live, logits_SV.gather(1, token_S1)[:, 0].tolist(), strict=True):
            batched[row].append(value)

    ended = list(engine.run(rows, burst=1, slots=slots, on_look=record))
    whole = [[*row.prompt, *row.tokens] for row in ended]
    starts = [len(row.prompt) for row in ended]
    alone = _alone(loaded, whole, starts, pad_id)
    differences = [
        abs(a - b) for row, values in zip(ended, alone, strict=True) for a, b in zip(batched[row], values, strict=True)
    ]
    return sum(differences) / len(differences)


def _alone(loaded: LoadedModel, whole: list[list[int]], starts: list[int], pad_id: int) -> list[list[float]]:
    """Return the log-probabilities by the model's own passes: one for all rows where memory does."""
    try:
        return log_probabilities_of(loaded, whole, starts, pad_id, most_tokens=_PASS_TOKENS)
    except Exception as error:
        if not out_of_memory.is_short(error):
            raise
    out_of_memory.release()
    return log_probabilities_of(loaded, whole, starts, pad_id, most_tokens=_FEW_TOKENS)
