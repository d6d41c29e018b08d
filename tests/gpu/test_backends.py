"""Both backends from one initial adapter, on a small trained model: the same tokens, loss and gradients.

Run on a machine with an NVIDIA GPU: pytest -m gpu
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.gpu

ROOT = Path(__file__).parents[2]
POCKET = ROOT / "fast_ft" / "pocket"
OTHERS = (
    "unsloth", "unsloth captured", "peft captured", "fused", "fused captured", "fused recomputed",
    "fused captured recomputed",
)  # fmt: skip

# Importing unsloth patches transformers for good, so each backend's step runs in a process of its own.
STEP = """
import json, sys
from pathlib import Path
import torch
from bench.agreement import first_step
from fast_ft.models import lora_files as adapter_file
from fast_ft.models.loaders import choose as backend
from fast_ft.recipe import schema as recipe
from fast_ft.plan.run_plan import TrainPlan
from fast_ft.data.encoding import EncodedRow
job = json.loads(Path(sys.argv[1]).read_text())
model = recipe.Model(name_or_path=job["base"], dtype="float16", max_length=512)
maker = backend.make_loader(model, recipe.Lora(), seed=1, name=job["backend"])
assert maker.name == job["backend"], maker.notes
loaded = maker.for_training(Path(job["adapter"]))
records = {}
for name, rows in job["rows"].items():
    for micro_batch in job["micro_batches"]:
        plan = TrainPlan(micro_batch, recompute_layers=job["recompute"], capture=job["capture"])
        batch = [EncodedRow(**row) for row in rows]
        record = first_step(loaded, batch, pad_id=0, plan=plan, work_folder=Path(job["work"]))
        records[f"{name}/{micro_batch}"] = record
        adapter_file.load(loaded.model, Path(job["adapter"]) / "adapter_model.safetensors")
torch.save(records, job["out"])
"""

INITIAL = """
import json, sys
from pathlib import Path
import torch
from fast_ft.models import lora_files as adapter_file
from fast_ft.models.loaders import choose as backend
from fast_ft.recipe import schema as recipe
job = json.loads(Path(sys.argv[1]).read_text())
model = recipe.Model(name_or_path=job["base"], dtype="float16", max_length=512)
loaded = backend.make_loader(model, recipe.Lora(), seed=1, name="peft").for_training()
torch.manual_seed(2)
with torch.no_grad():
    for name, weight in loaded.model.named_parameters():
        if "lora_B" in name:
            weight.normal_(std=0.02)
Path(job["adapter"]).mkdir()
adapter_file.save(loaded.model, Path(job["adapter"]), job["base"], "")
"""


def run(code: str, jobs: list[dict], tmp: Path) -> None:
    """Run the code once for each job, all at the same time."""
    started = []
    for index, job in enumerate(jobs):
        path = tmp / f"job-{index}.json"
        path.write_text(json.dumps(job))
        command = [sys.executable, "-c", code, str(path)]
        pipes: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
        started.append(subprocess.Popen(command, cwd=ROOT, text=True, **pipes))
    for job, process in zip(jobs, started, strict=True):
        _, errors = process.communicate()
        assert process.returncode == 0, (job["backend"], errors[-3000:])


def mutations(rows: list) -> dict[str, list[dict]]:
    """The right rows, and three ways in which a mask goes wrong."""
    from fast_ft.data.encoding import IGNORE_INDEX

    unmasked = [replace(r, labels=list(r.input_ids)) for r in rows]
    shifted = [replace(r, labels=[*r.labels[1:], IGNORE_INDEX]) for r in rows]
    no_eos = [replace(r, input_ids=r.input_ids[:-1], labels=r.labels[:-1]) for r in rows]
    named = {"right": rows, "prompt unmasked": unmasked, "labels shifted": shifted, "EOS missing": no_eos}
    return {
        name: [{"id": r.id, "input_ids": r.input_ids, "labels": r.labels} for r in each] for name, each in named.items()
    }


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    import torch

    from fast_ft.data.dataset import load_pool
    from fast_ft.data.encoding import Encoder
    from fast_ft.recipe import schema

    tmp = tmp_path_factory.mktemp("agreement")
    encoder = Encoder(POCKET / "base")
    examples = load_pool(schema.Data(train=str(POCKET / "train.json"))).examples(range(8))
    rows = [encoder.row(example) for example in examples]
    job = {"base": str(POCKET / "base"), "adapter": str(tmp / "adapter"), "work": str(tmp), "rows": mutations(rows)}
    run(INITIAL, [job | {"backend": "initial"}], tmp)
    names = ("peft", *OTHERS)
    ways = [
        {"backend": name.split()[0], "capture": "captured" in name, "recompute": 2 * ("recomputed" in name)}
        for name in names
    ]
    outs = [str(tmp / f"{name}.pt") for name in names]
    jobs = [job | way | {"micro_batches": [8, 3], "out": out} for way, out in zip(ways, outs, strict=True)]
    run(STEP, jobs, tmp)
    return {name: torch.load(out, weights_only=False) for name, out in zip(names, outs, strict=True)}


@pytest.mark.parametrize("micro_batch", [8, 3])
@pytest.mark.parametrize("other", OTHERS)
def test_backends_agree(records: dict[str, dict], other: str, micro_batch: int) -> None:
    from bench.agreement import disagreements

    name = f"right/{micro_batch}"
    assert disagreements(records["peft"][name], records[other][name]) == []


@pytest.mark.parametrize("wrong", ["prompt unmasked", "labels shifted", "EOS missing"])
@pytest.mark.parametrize("other", ["unsloth captured", "fused captured"])
def test_a_wrong_mask_shows(records: dict[str, dict], other: str, wrong: str) -> None:
    from bench.agreement import disagreements

    assert disagreements(records["peft"]["right/8"], records[other][f"{wrong}/8"])
