"""python -m bench.real --base FILE.gguf: do our blocks, Unsloth and PEFT agree on a real model? On one NVIDIA card.

Each way is a process, since importing Unsloth patches transformers; the three run side by side. In each: fp16 and bf16,
over a 4-bit and a 16-bit base, STEPS steps over our own rows, from one initial adapter whose B matrices are not zero.

What a way is compared with is PEFT in the same dtype over the same base: both round alike, so a difference is the way's
own. PEFT in fp32 over the same base is measured too, and how far each way, PEFT in 16 bits included, is from it.
Decoding: the engine's greedy answers, taken through transformers' own forward pass of the same model.

Which kernels ran is printed and kept: hidden 576 is no size for each of them.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

WAYS = ("peft", "fused", "unsloth")
Dtype = Literal["float16", "bfloat16", "float32"]
SETUPS: tuple[tuple[Dtype, int], ...] = (("float16", 4), ("float16", 16), ("bfloat16", 4), ("bfloat16", 16))
EXACT: tuple[tuple[Dtype, int], ...] = (("float32", 4), ("float32", 16))
STEPS, ROWS_A_STEP, PROMPTS, NEW_TOKENS = 10, 8, 24, 64
COSINE, LOSS, ARGMAX = 0.999, 0.005, 0.99  #: least cosine, most difference of a step's loss, least share of tokens
ROWS = "recipes/smollm"
_BORDER = ": "  #: between set-up and weight, in the name of a gradient


def main() -> int:
    """Measure, write bench/results/real-CARD.json, and print the figures."""
    parser = argparse.ArgumentParser(prog="python -m bench.real", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--base", required=True, help="the model: a folder or a .gguf file")
    parser.add_argument("--results", type=Path, help="the raw result; default: bench/results/real-CARD.json")
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.way:
        _child(options.way, options.base, options.results)
        return 0
    result = measure(options.base, options.results)
    print(json.dumps({name: value for name, (value, _) in headline(result).items()}))
    return 0


def measure(base: str, target: Path | None = None) -> dict[str, Any]:
    """Return the raw result of all ways, written to `target` too. RuntimeError with a way's own words if it fails."""
    from bench import figures, machine
    from fast_ft.common.atomic_files import write_json
    from fast_ft.hub import download

    folder, started = str(download.model_folder(base).absolute()), time.monotonic()
    with tempfile.TemporaryDirectory() as place:
        outs = {way: Path(place) / f"{way}.json" for way in WAYS}
        running = {
            way: subprocess.Popen(
                [sys.executable, "-m", "bench.real", "--base", folder, "--way", way, "--results", str(out)],
                cwd=machine.ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
            )
            for way, out in outs.items()
        }  # fmt: skip
        said = {way: process.communicate()[1] for way, process in running.items()}
        if failed := [way for way, process in running.items() if process.returncode]:
            raise RuntimeError(f"{failed[0]}: {said[failed[0]][-3000:]}")
        ways = {way: json.loads(out.read_text(encoding="utf-8")) for way, out in outs.items()}
        gradients = {way: out.with_suffix(".safetensors") for way, out in outs.items()}
        compared = _compared(ways, {way: _load(path) for way, path in gradients.items()})
    result = {
        "kind": "real", **machine.stamp("python -m bench.real --base models/smollm2-135m-instruct.gguf"),
        "seconds": round(time.monotonic() - started, 1), "ways": ways, "compared": compared,
    }  # fmt: skip
    write_json(target or figures.RESULTS / f"real-{machine.slug_of(result)}.json", result)
    return result


def headline(result: dict[str, Any]) -> dict[str, tuple[float, str]]:
    """Return {figure: (value, unit)}, computed from the raw samples."""
    worst = min(each["cosine"] for each in result["compared"])
    matrix = min(each["cosine_worst_matrix"] for each in result["compared"])
    found = {
        "real.grad_cosine_worst": (
            worst,
            "cosine of all first gradients to PEFT's in the same dtype, worst of all ways",
        ),
        "real.grad_cosine_worst_matrix": (matrix, "the same of one LoRA matrix, the worst of all"),
        "real.loss_apart_worst": (
            max(map(_apart, result["compared"])),
            "largest difference of a step's loss, as a share",
        ),
    }
    for name, answers in result["ways"]["peft"]["decoding"].items():
        found[f"real.argmax_agreement_{name}"] = (answers["argmax_agrees"], "share of greedy tokens, teacher-forced")
    return found


def problems(result: dict[str, Any]) -> list[str]:
    """Say what misses its bar, in words."""
    found = [
        f"{each['way']}, {each['setup']}: {text}"
        for each in result["compared"]
        for text in (
            f"cosine {each['cosine']}" if each["cosine"] < COSINE else "",
            f"losses {_apart(each):.4f} apart" if not _apart(each) <= LOSS else "",
            "a step was skipped" if each["skipped"] else "",
        )
        if text
    ]
    decoding = result["ways"]["peft"]["decoding"]
    return found + [
        f"{name}: argmax {got}" for name, each in decoding.items() if (got := each["argmax_agrees"]) < ARGMAX
    ]


def _apart(each: dict[str, Any]) -> float:
    return round(max(abs(a - b) / b for a, b in zip(each["losses"], each["losses_of_peft"], strict=True)), 6)


def _compared(ways: dict[str, Any], gradients: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    found = []
    for way in WAYS:
        for dtype, bits in SETUPS:
            setup = f"{dtype}/{bits}"
            mine, ours = gradients[way][setup], ways[way]["training"][setup]
            theirs, exact = gradients["peft"][setup], gradients["peft"][f"float32/{bits}"]
            both = _cosines(mine, exact)
            to_fp32 = {"cosine_to_fp32": both[0], "cosine_to_fp32_worst_matrix": both[1]}
            if way == "peft":
                ways[way]["training"][setup] |= to_fp32
                continue
            whole, matrix = _cosines(mine, theirs)
            found.append(
                {
                    "way": way, "setup": setup, "cosine": whole, "cosine_worst_matrix": matrix, **to_fp32,
                    "losses": ours["losses"], "losses_of_peft": ways["peft"]["training"][setup]["losses"],
                    "skipped": sum(ours["skipped"]),
                }
            )  # fmt: skip
    return found


def _cosines(a: dict[str, Any], b: dict[str, Any]) -> tuple[float, float]:
    """Return the cosine of all gradients together, and the smallest one of a matrix."""
    import torch

    from bench.agreement import cosine_of

    assert a.keys() == b.keys(), f"weights with a gradient on one side only: {sorted(a.keys() ^ b.keys())[:2]}"
    whole = cosine_of(*(torch.cat([side[name].flatten() for name in a]) for side in (a, b)))
    return round(whole, 6), round(min(cosine_of(a[name], b[name]) for name in a), 6)


def _load(path: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    found: dict[str, Any] = {}
    for name, gradient in load_file(str(path)).items():
        setup, _, weight = name.partition(_BORDER)
        found.setdefault(setup, {})[weight] = gradient
    return found


def _child(way: str, base: str, out: Path) -> None:
    """Measure one way; write its JSON to `out` and its gradients beside it."""
    from fast_ft.data import dataset
    from fast_ft.data.encoding import Encoder
    from fast_ft.models.loaders import choose
    from fast_ft.recipe import schema

    encoder = Encoder(Path(base), "tokenizer")
    pool = dataset.load_pool(schema.Data(train=f"{ROWS}/train.json"))
    rows = [encoder.row(example) for example in pool.examples(range(STEPS * ROWS_A_STEP))]
    prompts = dataset.load_prompts(f"{ROWS}/test.json")[0][:PROMPTS]
    ids = [encoder.prompt_ids(prompt.messages) for prompt in prompts]
    found: dict[str, Any] = {"training": {}, "decoding": {}}
    gradients: dict[str, Any] = {}
    for dtype, bits in [*SETUPS, *(EXACT if way == "peft" else ())]:
        section = schema.Model(name_or_path=base, dtype=dtype, load_in_4bit=bits == 4, template="tokenizer")
        maker = choose.make_loader(section, schema.Lora(r=16), seed=1, name=way)
        assert maker.name == way, maker.notes
        loaded = maker.for_training()
        _set_adapter(loaded.model)
        name = f"{dtype}/{bits}"
        found["training"][name], gradients[name] = _trained(
            loaded, rows, encoder.pad_id, out.parent / f"{way}-{dtype}-{bits}"
        )
        if way == "peft" and dtype == "float16":
            loaded.free()
            loaded = maker.for_training()
            _set_adapter(loaded.model)
            found["decoding"]["nf4" if bits == 4 else "fp16"] = _decoded(loaded, ids, encoder)
        loaded.free()
    from safetensors.torch import save_file

    flat = {f"{setup}{_BORDER}{name}": g.contiguous() for setup, each in gradients.items() for name, g in each.items()}
    save_file(flat, str(out.with_suffix(".safetensors")))
    out.write_text(json.dumps(found), encoding="utf-8")


def _set_adapter(model: Any) -> None:
    """Give every LoRA matrix the same numbers whichever way loaded the model: drawn by its name, B not zero."""
    import torch

    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_" in name:
                draw = torch.Generator().manual_seed(zlib.crc32(name.encode()))
                spread = 0.002 if "lora_B" in name else weight.shape[1] ** -0.5
                weight.copy_(torch.randn(weight.shape, generator=draw) * spread)


def _trained(loaded: Any, rows: list[Any], pad_id: int, work: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return (losses, skipped steps and what ran; the first step's gradients)."""
    from bench.agreement import RowsInSteps, run_steps
    from fast_ft.plan.plans import TrainPlan

    steps = [list(range(start, start + ROWS_A_STEP)) for start in range(0, len(rows), ROWS_A_STEP)]
    plan = TrainPlan(ROWS_A_STEP, backend=loaded.backend)
    work.mkdir()
    gradients, log = run_steps(loaded, RowsInSteps(rows, steps), pad_id=pad_id, plan=plan, work_folder=work)
    core = loaded.model.get_base_model()
    ran = {
        "forward_of_a_layer": _name(core.model.layers[0].forward), "forward_of_a_projection":
        _name(core.model.layers[0].self_attn.q_proj.forward), "attention": core.config._attn_implementation,
        "weights": type(core.model.layers[0].self_attn.q_proj.base_layer).__name__, "notes": loaded.notes,
    }  # fmt: skip
    return {
        "losses": [each["loss"] for each in log],
        "skipped": [bool(each["skipped"]) for each in log],
        "ran": ran,
    }, gradients


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
    ran = {"between_products": model.ops.__name__, "planes": model.planes, "few_rows": model.few_rows,
           "captured": graphs.works, "graphs": graphs.count,
           "product": _name(getattr(product, "base", product))}  # fmt: skip
    found = teacher_forced(loaded.model, ids, [row.tokens for row in rows])
    return found | {"ran": ran, "answers": [encoder.decode(row.tokens) for row in rows[:6]]}


def _name(work: Callable[..., Any]) -> str:
    """Return where a function or an object that is called comes from."""
    kind = work if hasattr(work, "__qualname__") else type(work)
    return f"{kind.__module__}.{kind.__qualname__}"


if __name__ == "__main__":
    sys.exit(main())
