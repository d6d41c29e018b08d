"""python -m bench.peer_command JOB.json: a peer's whole command, as a user would write it: train, save, answer.

Writes adapter/ and pred.json into the job's `work`. Rows and prompts come tokenised, which a user would have to do
first. Answers are decoded in batches of `answers_at_once`, prompts of like length together, with the trained model that
is in memory.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from bench import emulation, peers
from bench.decode_peers import plain_generate
from bench.peer_table import PEERS
from bench.watch import Watch
from fast_ft.common.atomic_files import write_json


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
        ids = [ids for _, ids in batch]
        output = plain_generate(model, ids, job["limit"])
        new = output[:, max(map(len, ids)) :].tolist()
        answers |= {
            name: tokenizer.decode(row, skip_special_tokens=True) for (name, _), row in zip(batch, new, strict=True)
        }
    write_json(Path(job["work"]) / "pred.json", answers)
    return 0


if __name__ == "__main__":
    sys.exit(main())
