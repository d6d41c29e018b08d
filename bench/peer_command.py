"""python -m bench.peer_command JOB.json: a peer's whole command, as a user would write it: train, save, answer.

Writes adapter/ and pred.json into the job's `work`. Rows and prompts come tokenised, which a user would have to do
first. Answers are decoded in batches of `answers_at_once`, prompts of like length together, with the trained model that
is in memory. A batch that runs out of memory is halved, since the cache of Unsloth's batches grows with their longest
prompt.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench import emulation, peers
from bench.decode_peers import plain_generate
from bench.peer_table import PEERS
from bench.watch import Watch
from fast_ft.common.atomic_files import write_json

if TYPE_CHECKING:
    from torch import Tensor


def main() -> int:
    """Do the job; return the exit status."""
    job: dict[str, Any] = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    limits = emulation.Limits(job["cap_gib"], None, t4_attention=False)
    trainer, tokenizer = peers.train(job, limits, Watch(time.monotonic()))
    model: Any = trainer.model
    if PEERS[job["way"]].unsloth:
        import unsloth

        unsloth.FastLanguageModel.for_inference(model)
    else:
        model.eval()
    prompts = sorted(job["prompts"].items(), key=lambda each: len(each[1]))
    answers: dict[str, str] = {}
    for first in range(0, len(prompts), job["answers_at_once"]):
        batch = prompts[first : first + job["answers_at_once"]]
        new = answered(lambda ids: plain_generate(model, ids, job["limit"]), [ids for _, ids in batch])
        answers |= {
            name: tokenizer.decode(row, skip_special_tokens=True) for (name, _), row in zip(batch, new, strict=True)
        }
    write_json(Path(job["work"]) / "pred.json", answers)
    return 0


def answered(generate: Callable[[list[list[int]]], Tensor], ids: list[list[int]]) -> list[list[int]]:
    """Return the new tokens of each prompt, padded; in two halves, and so on, where a batch runs out of memory.

    `generate` returns prompts, padded on the left to the longest, and new tokens, [rows, tokens]. Of one prompt it may
    raise torch.OutOfMemoryError.
    """
    import torch

    try:
        rows: list[list[int]] = generate(ids)[:, max(map(len, ids)) :].tolist()
        return rows
    except torch.OutOfMemoryError:
        if len(ids) == 1:
            raise
    torch.cuda.empty_cache()
    half = len(ids) // 2
    return [*answered(generate, ids[:half]), *answered(generate, ids[half:])]


if __name__ == "__main__":
    sys.exit(main())
