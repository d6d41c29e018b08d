"""How others answer the same prompts: transformers' generate, Unsloth, llama.cpp. Measures of bench.decode.

generate and Unsloth take one batch of prompts around the median length, so that hardly anything is padding, and run the
same LoRA over the same 4-bit base as fast_ft. llama.cpp runs without a LoRA, as merged, on a model of the same shape in
Q4_K_M with random blocks: its speed does not depend on their values. It answers prompts of the mean length, samples
nothing, and its cache is held to the same memory. All of that is in its favour.
"""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench import random_gguf
from bench.clock import clock, empty_cache, out_of_memory_is_a_result, peak_gib, reset_peak
from bench.decode_subject import Subject
from bench.process import card_to_itself
from fast_ft.common import gpu
from fast_ft.hub.families import GIB

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

COMPILE_SECONDS = 90  #: that compiling and answering one batch twice may take
LLAMA_OVERHEAD_GIB = 1.0  #: of llama.cpp's own context and compute buffers, beside weights and cache
PER_SEQUENCE = 256  #: llama.cpp rounds a sequence's own cache up to this number of tokens
Q8_0 = 34 / 32  #: bytes of a number in a q8_0 cache


def plain(subject: Subject) -> Iterator[dict[str, Any]]:
    """Yield transformers' generate on one batch of each size, with the cache that grows."""
    yield from _batches(subject)


def static(subject: Subject) -> Iterator[dict[str, Any]]:
    """Yield the same with a static cache. transformers compiles no forward pass of a bitsandbytes model by itself."""
    yield from _batches(subject, cache_implementation="static")


def compiled(subject: Subject) -> Iterator[dict[str, Any]]:
    """Yield the same with a static cache and a compiled forward pass, which has to be asked for, on the first size."""
    base: Any = subject.model.get_base_model()
    quantizer: Any = type(base.hf_quantizer)
    quantizer.is_compileable = True
    before = signal.signal(signal.SIGALRM, _too_long)
    signal.alarm(COMPILE_SECONDS)
    try:
        found = next(_batches(subject, cache_implementation="static"))
    except Exception as error:
        found = {"failed": f"{type(error).__name__}: {error}"[:300]}
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
        quantizer.is_compileable = False
    yield found


def _too_long(*_: Any) -> None:
    raise TimeoutError(f"not compiled and answered within {COMPILE_SECONDS} s")


def _batches(subject: Subject, **values: Any) -> Iterator[dict[str, Any]]:
    for size in map(int, subject.options.batches.split(",")):
        reset_peak()
        batch = around_median(subject.ids, size)
        yield {"batch": size} | out_of_memory_is_a_result(
            _one_batch, subject.model, batch, subject.options.limit, values
        )
        empty_cache()


def around_median(ids: list[list[int]], size: int) -> list[list[int]]:
    """Return the prompts around the median length, shortest first: as little padding as sorting can come to."""
    by_length = sorted(ids, key=len)
    first = max(0, (len(by_length) - size) // 2)
    return by_length[first : first + size]


def _one_batch(model: PreTrainedModel, batch: list[list[int]], limit: int, values: dict[str, Any]) -> dict[str, Any]:
    """Answer a batch to warm up, and again; return the second time's samples."""
    plain_generate(model, batch, limit if values else 4, **values)  # a static cache is as long as its answers
    seconds = clock(lambda: plain_generate(model, batch, limit, **values))
    tokens = len(batch) * limit
    return {
        "tokens": tokens, "seconds": round(seconds, 3), "tokens_per_s": round(tokens / seconds, 1),
        "longest_prompt": len(batch[-1]), "peak_gib": peak_gib(gpu.context_gib()),
    }  # fmt: skip


def plain_generate(model: PreTrainedModel, ids: list[list[int]], limit: int, **values: Any) -> Tensor:
    """Answer a left-padded batch with transformers' generate, sampling, without an end; return [rows, tokens]."""
    import torch
    import transformers

    model.generation_config = transformers.GenerationConfig()
    width = max(map(len, ids))
    padded = torch.tensor([[0] * (width - len(row)) + list(row) for row in ids], device=model.device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in ids], device=model.device)
    config = transformers.GenerationConfig(
        do_sample=True, temperature=0.7, top_k=30, top_p=0.9, max_new_tokens=limit, pad_token_id=0, use_cache=True,
        **values,
    )  # fmt: skip
    with torch.inference_mode():
        output = model.generate(input_ids=padded, attention_mask=mask, generation_config=config)
    assert output.shape == (len(ids), width + limit), "the yardstick must do the same work"
    return output


def unsloth(subject: Subject) -> Iterator[dict[str, Any]]:
    """Yield Unsloth's rate for each batch size, measured in a new process: importing Unsloth patches transformers.

    This process gives its memory back first.
    """
    options = subject.options
    if options.random:
        yield {"failed": "with --random there is no checkpoint that Unsloth could load"}
        return
    if options.adapter is None:
        _ = subject.model
    subject.free()
    job = {"base": options.base, "adapter": str(options.adapter), "limit": options.limit, "dtype": options.dtype,
           "batches": [around_median(subject.ids, int(size)) for size in options.unsloth_batches.split(",")],
           "cap": options.cap}  # fmt: skip
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(job, file)
        file.flush()
        words = [sys.executable, "-m", "bench.decode_peers", file.name]
        done = subprocess.run(words, capture_output=True, text=True)
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"batch"')]
    yield from found or [{"failed": done.stderr[-1500:]}]


def _unsloth_process(job: dict[str, Any]) -> None:
    """Print one JSON line for each batch; smaller ones are answered, too, where a large one does not fit."""
    from fast_ft.models.loaders import choose
    from fast_ft.recipe import schema

    model = schema.Model(name_or_path=job["base"], dtype=job["dtype"])
    maker = choose.make_loader(model, schema.Lora(), seed=1, name="unsloth")
    if job["cap"]:
        gpu.cap_gpu_gib(job["cap"])
    loaded = maker.for_generation(Path(job["adapter"]))
    for batch in job["batches"]:
        reset_peak()
        found = out_of_memory_is_a_result(_one_batch, loaded.model, batch, job["limit"], {})
        print(json.dumps({"batch": len(batch)} | found), flush=True)
        empty_cache()


def llama_cpp(subject: Subject) -> Iterator[dict[str, Any]]:
    """Yield llama-batched-bench's rates for each number of answers at once whose cache fits into the memory.

    --llama names the folder with the program and its libraries. Seconds hold prompts and answers, as fast_ft's do.
    """
    options, shape = subject.options, subject.shape
    subject.free()
    empty_cache()
    options.llama_prompt = prompt = options.llama_prompt or round(statistics.fmean(map(len, subject.ids)))
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "random-q4_k_m.gguf"
        random_gguf.write(model, json.loads((Path(options.base) / "config.json").read_text(encoding="utf-8")))
        weights = model.stat().st_size / GIB
        room = (options.cap or 100.0) - weights - LLAMA_OVERHEAD_GIB
        for kind in options.llama_caches.split(","):
            cache, unified = kind.removesuffix("-unified"), kind.endswith("-unified")
            cells = prompt + options.limit if unified else -(-(prompt + options.limit) // PER_SEQUENCE) * PER_SEQUENCE
            a_prompt = cells * shape.kv_bytes * (Q8_0 / 2 if cache == "q8_0" else 1.0) / GIB
            counts = [n for n in map(int, options.llama_batches.split(",")) if n * a_prompt <= room]
            for found in _batched_bench(
                options, model, ["-ctk", cache, "-ctv", cache, *["-kvu"] * unified], cells, counts
            ):
                yield {"cache": cache, "unified": unified, "weights_gib": round(weights, 2), **found}


def _batched_bench(options: Any, model: Path, words: list[str], cells: int, counts: list[int]) -> list[dict[str, Any]]:
    """Return what the program says of each number of answers; each runs twice, and a first pass is left out."""
    if not counts:
        return [{"failed": "not one answer fits"}]
    command = [
        str(options.llama / "llama-batched-bench"), "-m", str(model), "-ngl", "99", "-fa", "on", *words,
        "-b", "2048", "-ub", str(options.llama_ubatch), "-c", str(max(counts) * cells),
        "-npp", str(options.llama_prompt), "-ntg", str(options.limit),
        "-npl", ",".join(map(str, [counts[0], *counts, *counts])), "--output-format", "jsonl",
    ]  # fmt: skip
    places = [str(options.llama), os.environ.get("LD_LIBRARY_PATH", "")]
    env = os.environ | {"LD_LIBRARY_PATH": ":".join(each for each in places if each)}
    if (traps := options.llama / "libtraps.so").is_file():  # functions that the build left out
        env["LD_PRELOAD"] = str(traps)
    with card_to_itself():
        done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=900)
    lines = [line for line in (done.stdout + done.stderr).splitlines() if line.startswith('{"n_kv_max"')]
    samples = [json.loads(line) for line in lines][1:]
    if done.returncode or not samples:
        return [{"failed": f"status {done.returncode}: {(done.stderr or done.stdout)[-1200:]}"}]
    return [
        {
            "batch": each["pl"], "tokens": each["pl"] * each["tg"], "seconds": round(each["t"], 3),
            "tokens_per_s": round(each["pl"] * each["tg"] / each["t"], 1), "prompt": each["pp"],
            "prefill_seconds": round(each["t_pp"], 3), "steps_seconds": round(each["t_tg"], 3),
            "cache_tokens": each["n_kv_max"], "ubatch": each["n_ubatch"],
        }
        for each in samples
    ]  # fmt: skip


if __name__ == "__main__":
    _unsloth_process(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
