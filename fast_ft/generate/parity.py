"""Does the pool answer as the model alone does? Asked before each generation, of some of its own prompts."""

from __future__ import annotations

from collections.abc import Sequence

from fast_ft.data.encoding import Encoder
from fast_ft.generate.engine.prefill import Row
from fast_ft.generate.engine.scheduler import Pool
from fast_ft.models.adapter_check import log_probabilities
from fast_ft.models.loaders.base import LoadedModel

_PROBE_TOKENS = 8
_PROBE_ROWS = 4
#: Mean difference allowed between the pool and a row alone, in nats a token. Wider than selfcheck's in fp32, where both
#: sides run the same kernels: a 4-bit product on a CPU differs by some 1e-4 with the rows in it. A wrong mask or a
#: wrong position shows as a tenth of a nat or more.
PARITY = {"float32": 2e-3, "float16": 0.02, "bfloat16": 0.1}


def parity(pool: Pool, loaded: LoadedModel, encoder: Encoder, ids: Sequence[Sequence[int]], limit: int) -> float:
    """Return the mean absolute difference, in nats a token, between the pool's decoding and its rows taken alone.

    Rows of all lengths are decoded for a few steps, in the pool's full shape; the log-probability of each chosen
    token is compared with the model's own pass over that row, teacher-forced. Prefill, pages, positions, LoRA and the
    captured step are all in it.
    """
    import torch

    by_length = sorted(ids, key=len)
    spread = sorted({k * (len(ids) - 1) // max(1, _PROBE_ROWS - 1) for k in range(min(_PROBE_ROWS, pool.slots))})
    rows = [Row(by_length[index], min(_PROBE_TOKENS, limit)) for index in spread]
    batched: dict[Row, list[float]] = {row: [] for row in rows}

    def record(live: list[Row]) -> None:
        logits_SV = torch.log_softmax(pool.logits[: len(live)], dim=-1)
        for value_V, row in zip(logits_SV, live, strict=True):
            batched[row].append(value_V[row.tokens[-1]].item())

    differences: list[float] = []
    for row in pool.run(rows, burst=1, shape=pool.slots, on_look=record):
        alone = log_probabilities(loaded.model, [[*row.prompt, *row.tokens]], [len(row.prompt)], encoder.pad_id)[0]
        differences += [abs(a - b) for a, b in zip(batched[row], alone, strict=True)]
    return sum(differences) / len(differences)
