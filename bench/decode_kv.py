"""python -m bench.decode_kv --base FILE.gguf: is an 8-bit KV cache as good as one of 16 bits? A real model on a CPU.

The engine answers our own prompts greedily from each kind of cache, in fp32. Its tokens are then taken through
transformers' own forward pass of the same model, which has no cache: the share of them that is the likeliest there, and
how far the chosen tokens' log-probabilities are from the engine's. Which modules ran is kept.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

PROMPTS, NEW_TOKENS = 24, 64


def main() -> int:
    """Measure, write bench/results/decode-kv.json, and print the figures."""
    parser = argparse.ArgumentParser(prog="python -m bench.decode_kv", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--base", required=True, help="the model: a folder or a .gguf file")
    parser.add_argument("--prompts", default="recipes/smollm/test.json", help="a file of prompts")
    parser.add_argument("--results", type=Path, help="the raw result; default: bench/results/decode-kv.json")
    options = parser.parse_args()
    from bench import figures, machine
    from fast_ft.common.atomic_files import write_json

    started = time.monotonic()
    kinds = {kind: measured(options.base, options.prompts, kind) for kind in ("16bit", "8bit")}
    command = f"python -m bench.decode_kv --base models/{Path(options.base).name}"
    result = {"kind": "decode-kv", **machine.stamp(command), "new_tokens": NEW_TOKENS,
              "seconds": round(time.monotonic() - started, 1), "caches": kinds}  # fmt: skip
    write_json(options.results or figures.RESULTS / "decode-kv.json", result)
    print({name: value for name, (value, _) in headline(result).items()})
    return 0


def headline(result: dict[str, Any]) -> dict[str, tuple[float, str]]:
    """Return {figure: (value, unit)}, computed from the counts."""
    found = {}
    for kind, name in (("16bit", "16bit_kv"), ("8bit", "int8kv")):
        each = result["caches"][kind]
        share = 1 - each["disagreements"] / each["tokens"]
        unit = f"share of {each['tokens']:,} greedy tokens, teacher-forced, {kind} cache"
        found[f"decode.real_argmax_{name}"] = (round(share, 4), unit)
    return found


def measured(base: str, prompts: str, kv_cache: str) -> dict[str, Any]:
    """Return how the engine's tokens from this kind of cache agree with the model's own forward pass."""
    from fast_ft.common import environment

    environment.at_start()  # as a command does, before torch is there
    import torch

    from bench.agreement_decode import teacher_forced
    from fast_ft.data import dataset
    from fast_ft.data.encoding import Encoder
    from fast_ft.generate.engine.llm_engine import LLMEngine
    from fast_ft.generate.engine.sequence import Sequence
    from fast_ft.generate.engine_setup import make_engine
    from fast_ft.generate.parity import parity
    from fast_ft.hub import download
    from fast_ft.models.loaders import choose
    from fast_ft.plan.decode_pool import DecodePlan
    from fast_ft.recipe import schema

    folder = str(download.model_folder(base).absolute())
    encoder = Encoder(Path(folder), "tokenizer")
    ids = [encoder.prompt_ids(prompt.messages) for prompt in dataset.load_prompts(prompts)[0][:PROMPTS]]
    section = schema.Model(name_or_path=folder, dtype="float32", load_in_4bit=False, template="tokenizer")
    loaded = choose.make_loader(section, schema.Lora(r=16), seed=1, name="peft").for_training()
    loaded.model.eval().requires_grad_(False)
    greedy = schema.Generate(do_sample=False, max_new_tokens=NEW_TOKENS)
    plan = DecodePlan(len(ids), kv_cache=kv_cache)
    engine = make_engine(loaded, encoder, greedy, plan, max(map(len, ids)) + NEW_TOKENS)
    assert isinstance(engine, LLMEngine), "the model is of a family with our own decoding"
    rows = [Sequence(prompt, NEW_TOKENS) for prompt in ids]
    with torch.inference_mode():
        list(engine.run(rows))
    cache = engine.runner.cache
    ran = {"between_products": engine.runner.model.ops.__name__, "keys": str(cache.keys.dtype),
           "scales": str(None if cache.scales is None else cache.scales.dtype)}  # fmt: skip
    found = teacher_forced(loaded.model, ids, [row.tokens for row in rows])
    return found | {"parity_nats": round(parity(engine, loaded, ids, NEW_TOKENS), 6), "ran": ran}


if __name__ == "__main__":
    raise SystemExit(main())
