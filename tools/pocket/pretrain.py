"""Pretrain the pocket base model: `python -m tools.pocket.pretrain [--steps N] [--out FOLDER]`, on a CPU or a GPU.

A tokenizer that works as Llama's does (BPE, a dummy space in front, digits and marks apart, bytes for unknown
characters) and a small Llama, trained from nothing on running text, in a folder that AutoModelForCausalLM loads.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

from tools.pocket.text import paragraphs

HERE = Path(__file__).parents[2] / "fast_ft" / "pocket"
VOCABULARY = 2048
SPECIAL = ["<unk>", "<s>", "</s>"]
LENGTH = 128  # tokens in a training row
ROWS = 32  # training rows in a step


def train_tokenizer(texts: list[str]) -> Any:
    """Return a `tokenizers.Tokenizer` of 2,048 pieces: 3 special, 256 bytes, the rest learned from `texts`.

    Bytes and special tokens come first, as in Llama's vocabulary. The trainer would list bytes among the special
    tokens, and a text that holds "<0x41>" would then lose its spelling; so the vocabulary is put together afterwards.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    first = SPECIAL + [f"<0x{byte:02X}>" for byte in range(256)]
    learned = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    # Metaspace would leave out the dummy space before a text that starts with one; Llama never does.
    learned.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    learned.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split("▁", "merged_with_next"),
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.Punctuation(),
        ]
    )
    alphabet = [chr(code) for code in range(33, 127)]
    learned.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=VOCABULARY, special_tokens=first, initial_alphabet=alphabet, show_progress=False
        ),
    )
    spec = json.loads(learned.to_str())
    spec["added_tokens"] = [token for token in spec["added_tokens"] if token["content"] in SPECIAL]
    tokenizer = Tokenizer.from_str(json.dumps(spec))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Write tokenizer.json and a tokenizer_config.json that makes transformers load it as it is."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>",
        "pad_token": "<unk>", "clean_up_tokenization_spaces": False, "model_max_length": 512,
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def token_stream(tokenizer: Any, seed: int) -> Any:
    """Yield token ids without end: each paragraph between <s> and </s>."""
    source = paragraphs(seed)
    while True:
        for encoding in tokenizer.encode_batch(list(itertools.islice(source, 512)), add_special_tokens=False):
            yield 1
            yield from encoding.ids
            yield 2


def new_model(seed: int) -> Any:
    """Return a Llama of 2.6 million weights at random. Hidden sizes are multiples of 64, NF4's block."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=192, intermediate_size=512, num_hidden_layers=4, num_attention_heads=3,
        num_key_value_heads=3, head_dim=64, max_position_embeddings=512, bos_token_id=1, eos_token_id=2,
        pad_token_id=0, tie_word_embeddings=False,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def _optimizers(model: Any, learning_rate: float) -> list[Any]:
    """Return Muon for the layers' matrices and AdamW for the rest.

    Muon (orthogonalised momentum, Keller Jordan 2024) came to a loss of 1.11 in 200 steps where AdamW took 350.
    """
    import torch

    layers = [weight for weight in model.model.layers.parameters() if weight.ndim == 2]
    inside = {id(weight) for weight in layers}
    rest = [weight for weight in model.parameters() if id(weight) not in inside]
    muon = torch.optim.Muon(layers, lr=learning_rate, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(rest, lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.0)
    for optimizer in (muon, adamw):
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    return [muon, adamw]


def pretrain(steps: int, learning_rate: float, seed: int, tokenizer: Any) -> Any:
    """Train for `steps` steps of 32 x 128 tokens, in bf16 arithmetic over fp32 weights, and return the model."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = new_model(seed).to(device).train()
    optimizers = _optimizers(model, learning_rate)
    stream = token_stream(tokenizer, seed)
    start = time.perf_counter()
    for step in range(steps):
        # A short warm-up, then a cosine down to nothing.
        share = min(1.0, (step + 1) / 50) * 0.5 * (1 + math.cos(math.pi * step / steps))
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * share
        rows = torch.tensor(list(itertools.islice(stream, ROWS * LENGTH))).view(ROWS, LENGTH).to(device)
        with torch.autocast(device, dtype=torch.bfloat16):
            loss = model(input_ids=rows, labels=rows).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        model.zero_grad()
        if step % 50 == 49 or step == steps - 1:
            print(f"step {step + 1}/{steps} loss {loss.item():.3f} {time.perf_counter() - start:.0f} s",
                  file=sys.stderr, flush=True)  # fmt: skip
    return model


def save_model(model: Any, folder: Path) -> None:
    """Write config.json, generation_config.json (greedy) and model.safetensors in fp16."""
    import torch
    from transformers import GenerationConfig

    model = model.to("cpu", torch.float16)
    model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=0, do_sample=False)
    model.save_pretrained(folder)


def main(argv: list[str] | None = None) -> int:
    """Make the tokenizer and the base model."""
    parser = argparse.ArgumentParser(prog="python -m tools.pocket.pretrain", description=__doc__)
    parser.add_argument("--steps", type=int, default=1100)
    parser.add_argument("--learning-rate", type=float, default=5e-3)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--out", type=Path, default=HERE / "base")
    options = parser.parse_args(argv)

    # Threads that spin while they wait nearly double a step's time when another program shares the cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    import torch

    torch.set_num_threads(options.threads)
    tokenizer = train_tokenizer(list(itertools.islice(paragraphs(0), 20_000)))
    save_tokenizer(tokenizer, options.out)
    save_model(pretrain(options.steps, options.learning_rate, options.seed, tokenizer), options.out)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
