"""Training in several ways, each in a fresh process; one JSON that parts are merged into as they are measured."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import machine, ours
from bench.clock import say
from bench.peers import PEERS
from bench.process import run_process
from fast_ft.common import gpu as environment
from fast_ft.common.atomic_files import write_json
from fast_ft.common.errors import InputError
from fast_ft.hub import download, families
from fast_ft.plan import cards
from fast_ft.recipe import loader
from fast_ft.recipe.schema import Recipe
from fast_ft.run import provenance
from fast_ft.run.folder import now

WAYS = (*ours.WAYS, *PEERS)
JUDGED = ("fast_ft", "unsloth-notebook", "unsloth-budget", "trl-peft")


@dataclass(frozen=True)
class Setup:
    """Limits under which ways are compared: `whole` is all of the card, t4class what `--emulate t4` makes of it."""

    name: str
    cap_gib: float
    sms: int | None = None
    t4_attention: bool = False


def setup(emulate: str | None, sms: int, cap_gib: float) -> Setup:
    """Return the set-up by its name in results: whole, t4class, or t4class-4sms where not 8 SMs are left."""
    if emulate is None:
        return Setup("whole", cap_gib)
    name = "t4class" if sms == 8 else f"t4class-{sms}sms"
    return Setup(name, cap_gib, sms, t4_attention=True)


@dataclass(frozen=True)
class Order:
    """What a command asked for. `path` is the result's file, `timeout` the seconds that one part's process may take."""

    path: Path
    recipe: str
    overrides: Sequence[str]
    where: Setup
    timeout: float
    again: bool  #: measure parts again that the result holds already
    command: str


def measure(order: Order, ways: Mapping[str, int | None]) -> dict[str, Any]:
    """Run each way that the result does not hold yet, and merge it in at once; return the whole result.

    `ways` gives each its number of steps, of the schedule's; None: all. A part is kept if rows, arguments,
    limits and (for fast_ft) the program are the same. A way that fails says so and leaves the others to run.

    Raises InputError where the ways cannot be compared over this recipe, or the result is of other settings.
    """
    recipe = loader.load_recipe(order.recipe, order.overrides)
    settings, rows = describe(recipe)
    run = now()
    path, where = order.path, order.where
    result = merged(path, settings, order.command, kind="train")
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        work = Path(name)
        shared = job_of(order, recipe, settings) | {"rows": rows, "adapter": str(initial_adapter(work, recipe))}
        for way, wanted in ways.items():
            steps = min(wanted or settings["schedule_steps"], settings["schedule_steps"])
            parts = result["setups"].setdefault(where.name, {})
            key = part_key(settings, way, where)
            if not order.again and parts.get(way, {}).get("key") == key and len(parts[way]["steps"]) >= steps:
                say(f"{where.name} {way}: there already")
                continue
            own = {"way": way, "work": str(work / way), "out": str(work / f"{way}.json"), "stop_after": steps}
            say(f"{where.name} {way}: {steps} steps ...")
            log = path.parent / "logs" / f"{path.stem}-{where.name}-{way}.log"
            part = run_way(shared | own, log, order.timeout)
            if part is None:
                continue
            result["date"] = now()
            parts[way] = part | {"key": key, "run": run}
            write_json(path, result)
    return result


def job_of(order: Order, recipe: Recipe, settings: dict[str, Any]) -> dict[str, Any]:
    """Return what the jobs of all ways have in common; bench.way says what a job holds."""
    model, where = recipe.model, order.where
    return {
        "cap_gib": where.cap_gib,
        "sms": where.sms,
        "t4_attention": where.t4_attention,
        "steps": settings["schedule_steps"],
        "recipe": order.recipe,
        # a graph would be captured on a stream of its own, outside of the limited SMs
        "overrides": [*order.overrides, "train.capture=false"] if where.sms else list(order.overrides),
        "base": str(download.model_folder(model.name_or_path, model.revision)),
        "tokenizer": str(download.tokenizer_folder(model.tokenizer or model.name_or_path, model.revision)),
        "lora": {"r": recipe.lora.r, "lora_alpha": recipe.lora.lora_alpha},
        "train": recipe.train.model_dump(),
        "seed": recipe.seed,
        "dtype": settings["dtype"],
        "max_length": model.max_length,
    }


def run_way(job: dict[str, Any], log: Path, timeout: float, module: str = "bench.way") -> dict[str, Any] | None:
    """Run one job in its process; None, with the log's end on stderr, where it fails or takes too long."""
    log.parent.mkdir(parents=True, exist_ok=True)
    file = Path(job["out"]).with_suffix(".job.json")
    Path(job["work"]).mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(job | {"started": time.monotonic()}), encoding="utf-8")
    status = run_process([sys.executable, "-m", module, str(file)], log, timeout)
    if status != 0:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-12:]
        say(f"{job['way']} failed ({status}); {log} ends with:\n  " + "\n  ".join(lines))
        return None
    return json.loads(Path(job["out"]).read_text(encoding="utf-8"))


def describe(recipe: Recipe) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return what all ways share, ready for JSON, and the rows in their order."""
    jobs = ours.prepared_rows(recipe).jobs
    if len(jobs) != 1:
        raise InputError(f"curriculum.stages: {len(jobs)} stages; the ways are compared over one. Leave stages out.")
    (job,) = jobs
    rows = [{"input_ids": row.input_ids, "labels": row.labels} for row in job.rows]
    config = families.read_config(download.model_folder(recipe.model.name_or_path, recipe.model.revision))
    size = recipe.train.effective_batch_size
    if size != 8:
        raise InputError(f"train.effective_batch_size: {size}; the ways are compared at 8, as the notebook has it.")
    if recipe.train.neftune_noise_alpha is not None:
        raise InputError("train.neftune_noise_alpha: noise differs by library. Set it to null for the bench.")
    shape = families.ModelShape.from_config(config)
    digest = hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16]
    gpu = environment.gpu()
    settings = {
        "base": Path(recipe.model.name_or_path).name,
        "prequantised": config.get("quantization_config") is not None,
        "shape": {"hidden_size": shape.hidden_size, "num_hidden_layers": shape.num_hidden_layers},
        "config": {
            name: value for name, value in config.items() if isinstance(value, int | str) and not name.startswith("_")
        },
        "dtype": recipe.model.dtype if recipe.model.dtype != "auto" else "float16" if gpu else "float32",
        "rows": len(rows),
        "rows_digest": digest,
        "effective_batch_size": size,
        "schedule_steps": len(job.batches),
        "steps_per_epoch": math.ceil(len(rows) / size),
        "tokens_per_step": [sum(len(rows[i]["input_ids"]) for i in batch) for batch in job.batches],
        "lora": {"r": recipe.lora.r, "lora_alpha": recipe.lora.lora_alpha, "lora_dropout": recipe.lora.lora_dropout},
        "train": {
            name: getattr(recipe.train, name)
            for name in ("learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay", "max_grad_norm", "optim")
        },
        "seed": recipe.seed,
        "order": "file order, the same in every epoch",
        "card": gpu["name"] if gpu else "CPU",
    }
    return settings, rows


def merged(path: Path, settings: dict[str, Any], command: str, *, kind: str) -> dict[str, Any]:
    """Return the result at `path`, or a new one; InputError where it was measured on something else."""
    fresh = {
        "kind": kind, **machine.stamp(command), "t4": dataclasses.asdict(cards.card("t4")), "settings": settings,
        "setups": {},
    }  # fmt: skip
    if not path.is_file():
        return fresh
    found = json.loads(path.read_text(encoding="utf-8"))
    different = sorted(key for key in settings if found["settings"].get(key) != settings[key])
    if different:
        raise InputError(
            f"{path}: measured with other settings ({', '.join(different)}). Give another --name, or move it away."
        )
    for key in ("command", "commit"):  # of all parts
        found[key] = "; ".join(dict.fromkeys([*str(found.get(key)).split("; "), str(fresh[key])]))
    return found


def part_key(settings: dict[str, Any], way: str, where: Setup) -> str:
    """The digest of what a part depends on: kept while it is the same."""
    program = provenance.describe()["program"] if way in ours.WAYS else repr(PEERS[way])
    text = json.dumps([settings, way, vars(where), program], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def initial_adapter(folder: Path, recipe: Recipe) -> Path:
    """Write the LoRA that every way starts from: A uniform within 1 / sqrt(in) as PEFT draws it, B zero."""
    import numpy as np
    from safetensors.numpy import save_file

    shape = ours.family(recipe).shape
    blocks = [f"self_attn.{name}_proj" for name in "qkvo"] + [f"mlp.{name}_proj" for name in ("gate", "up", "down")]
    draw = np.random.default_rng(recipe.seed)
    tensors = {}
    for layer in range(shape.num_hidden_layers):
        for name, (inside, outside) in zip(blocks, shape.linear_shapes, strict=True):
            prefix = f"base_model.model.model.layers.{layer}.{name}.lora_"
            a = draw.random((recipe.lora.r, inside), dtype=np.float32) * 2 - 1
            tensors[f"{prefix}A.weight"] = a / np.float32(math.sqrt(inside))
            tensors[f"{prefix}B.weight"] = np.zeros((outside, recipe.lora.r), dtype=np.float32)
    path = folder / "initial.safetensors"
    save_file(tensors, str(path))
    return path
