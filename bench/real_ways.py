"""What one way computes on a real model: losses and gradients in each set-up, and decoding. For bench/real.py."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

WAYS = ("peft", "fused", "unsloth")
SETUPS = ("float16/4", "float16/16", "bfloat16/4", "bfloat16/16")  #: what is computed in, and the base's bits
STEPS, ROWS_A_STEP, PROMPTS, NEW_TOKENS = 10, 8, 24, 64
ROWS = "recipes/smollm"
EXACT = "fp32 of "  #: before a set-up: PEFT in fp32 over the weights that this set-up computes with
AGAIN = "passes of two rows of "  #: before a set-up: PEFT once more
ALL_ROWS = ", all rows"  #: behind a set-up: the gradients of one step over all rows

Gradients = list[dict[str, Any]]  #: of each step, by the weight's name
BORDER = ": "  #: between set-up, step and weight, in the name of a gradient


def child(way: str, base: str, out: Path) -> None:
    """Measure one way; write its JSON to `out` and its gradients beside it."""
    from safetensors.torch import save_file

    from fast_ft.data import dataset
    from fast_ft.data.encoding import Encoder
    from fast_ft.recipe import schema

    encoder = Encoder(Path(base), "tokenizer")
    pool = dataset.load_pool(schema.Data(train=f"{ROWS}/train.json"))
    rows = [encoder.row(example) for example in pool.examples(range(STEPS * ROWS_A_STEP))]
    prompts = dataset.load_prompts(f"{ROWS}/test.json")[0][:PROMPTS]
    ids = [encoder.prompt_ids(prompt.messages) for prompt in prompts]
    found: dict[str, Any] = {"training": {}, "decoding": {}}
    gradients: dict[str, Gradients] = {}

    def train(loaded: Any, setup: str) -> None:
        found["training"][setup] = _trained(loaded, rows, encoder.pad_id, out.parent)
        gradients[setup] = _gradients(loaded, rows, encoder.pad_id, out.parent)
        gradients[setup + ALL_ROWS] = _gradients(loaded, rows, encoder.pad_id, out.parent, a_step=len(rows))

    for setup in SETUPS:
        loaded = _loaded(way, base, setup)
        train(loaded, setup)
        if way == "peft":
            gradients[AGAIN + setup] = _gradients(loaded, rows, encoder.pad_id, out.parent, a_pass=2)
            if setup.startswith("float16"):
                loaded.free()
                loaded = _loaded(way, base, setup)
                _set_adapter(loaded.model)
                found["decoding"]["nf4" if setup.endswith("/4") else "fp16"] = _decoded(loaded, ids, encoder)
            loaded.free()
            loaded = _in_fp32(base, setup)
            train(loaded, EXACT + setup)
        loaded.free()
    flat = {
        BORDER.join((setup, str(step), name)): gradient.contiguous()
        for setup, steps in gradients.items()
        for step, each in enumerate(steps)
        for name, gradient in each.items()
    }
    save_file(flat, str(out.with_suffix(".safetensors")))
    out.write_text(json.dumps(found), encoding="utf-8")


def _loaded(way: str, base: str, setup: str) -> Any:
    """Return the way's model for training."""
    maker = _maker(way, base, setup)
    assert maker.name == way, maker.notes
    return maker.for_training()


def _maker(way: str, base: str, setup: str) -> Any:
    from fast_ft.models.loaders import choose
    from fast_ft.recipe import schema

    dtype, _, bits = setup.partition("/")
    section = schema.Model.model_validate(
        {"name_or_path": base, "dtype": dtype, "load_in_4bit": bits == "4", "template": "tokenizer"}
    )
    return choose.make_loader(section, schema.Lora(r=16), seed=1, name=way)


def _in_fp32(base: str, setup: str) -> Any:
    """Return PEFT's model in fp32 over the weights that it computes with in this set-up: 4 bits are turned to 16."""
    import torch

    from fast_ft.models import nf4
    from fast_ft.models.patches import ModelPatches

    model, dtype = _maker("peft", base, setup)._base_model(), getattr(torch, setup.partition("/")[0])
    for name, module in list(model.named_modules()):
        if type(module).__name__ == "Linear4bit":
            weight = nf4.dequantised(module.weight.data, module.weight.quant_state, dtype)
            plain = torch.nn.Linear(module.in_features, module.out_features, bias=False, device="meta")
            plain.weight = torch.nn.Parameter(weight.float(), requires_grad=False)
            model.set_submodule(name, plain)
    for mark in ("is_quantized", "is_loaded_in_4bit", "quantization_method", "hf_quantizer"):
        vars(model).pop(mark, None)
    vars(model.config).pop("quantization_config", None)
    maker, patches = _maker("peft", base, "float32/16"), ModelPatches()
    return maker._loaded(maker.with_adapter(torch.nn.Module.float(model), patches), patches)


def _set_adapter(model: Any) -> None:
    """Give every LoRA matrix the same numbers whichever way loaded the model: drawn by its name, B not zero."""
    import torch

    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_" in name:
                draw = torch.Generator().manual_seed(zlib.crc32(name.encode()))
                spread = 0.002 if "lora_B" in name else weight.shape[1] ** -0.5
                weight.copy_(torch.randn(weight.shape, generator=draw) * spread)


def _trained(loaded: Any, rows: list[Any], pad_id: int, folder: Path) -> dict[str, Any]:
    """Return losses, skipped steps and what ran, from the initial adapter on."""
    _, log = _run(loaded, rows, pad_id, folder, ROWS_A_STEP, ROWS_A_STEP, stands_still=False)
    core = loaded.model.get_base_model()
    ran = {
        "forward_of_a_layer": _name(core.model.layers[0].forward), "forward_of_a_projection":
        _name(core.model.layers[0].self_attn.q_proj.forward), "attention": core.config._attn_implementation,
        "weights": type(core.model.layers[0].self_attn.q_proj.base_layer).__name__, "notes": loaded.notes,
    }  # fmt: skip
    return {"losses": [each["loss"] for each in log], "skipped": [bool(each["skipped"]) for each in log], "ran": ran}


def _gradients(
    loaded: Any, rows: list[Any], pad_id: int, folder: Path, *, a_step: int = ROWS_A_STEP, a_pass: int = ROWS_A_STEP
) -> Gradients:
    """Return the gradients of all steps, each at the initial adapter."""
    return _run(loaded, rows, pad_id, folder, a_step, a_pass, stands_still=True)[0]


def _run(
    loaded: Any, rows: list[Any], pad_id: int, folder: Path, a_step: int, a_pass: int, *, stands_still: bool
) -> tuple[Gradients, list[dict[str, Any]]]:
    """Train from the initial adapter; return gradients and log, as run_steps does."""
    import tempfile

    from bench.agreement import RowsInSteps, run_steps
    from fast_ft.plan.run_plan import TrainPlan

    _set_adapter(loaded.model)
    steps = RowsInSteps(rows, [list(range(start, start + a_step)) for start in range(0, len(rows), a_step)])
    plan, work = TrainPlan(a_pass, backend=loaded.backend), Path(tempfile.mkdtemp(dir=folder))
    return run_steps(loaded, steps, pad_id=pad_id, plan=plan, work_folder=work, stands_still=stands_still)


def _decoded(loaded: Any, ids: list[list[int]], encoder: Any) -> dict[str, Any]:
    """Return the share of the engine's greedy tokens that the model itself takes for the likeliest, and what ran."""
    import torch

    from bench.agreement_decode import teacher_forced
    from fast_ft.generate.engine.llm_engine import LLMEngine
    from fast_ft.generate.engine.sequence import Sequence
    from fast_ft.generate.engine_setup import make_engine
    from fast_ft.plan.decode_pool import DecodePlan
    from fast_ft.recipe import schema

    loaded.model.eval()
    greedy = schema.Generate(do_sample=False, max_new_tokens=NEW_TOKENS)
    engine = make_engine(loaded, encoder, greedy, DecodePlan(len(ids)), max(map(len, ids)) + NEW_TOKENS)
    assert isinstance(engine, LLMEngine), "SmolLM2 is of a family with our own decoding"
    rows = [Sequence(prompt, NEW_TOKENS) for prompt in ids]
    with torch.inference_mode():
        list(engine.run(rows))
    model, graphs = engine.runner.model, engine.runner.graphs
    product = model.layers[0][1]
    ran = {"between_products": model.ops.__name__, "planes": model.planes,
           "few_rows": model.few_rows, "captured": graphs.works,
           "graphs": graphs.count, "product": _name(getattr(product, "base", product))}  # fmt: skip
    found = teacher_forced(loaded.model, ids, [row.tokens for row in rows])
    return found | {"ran": ran, "answers": [encoder.decode(row.tokens) for row in rows[:6]]}


def _name(work: Callable[..., Any]) -> str:
    """Return where a function or an object that is called comes from."""
    kind = work if hasattr(work, "__qualname__") else type(work)
    return f"{kind.__module__}.{kind.__qualname__}"
