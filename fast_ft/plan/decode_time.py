"""How long answers take: one step of a decoding pool, and all answers of a run. Pure arithmetic.

A step reads the weights once, multiplies them with the rows of all slots, and reads each row's part of the KV cache.
How it reads 4-bit weights decides most: a fused product reads them as they are; else they are turned to 16 bits in each
step, written and read back. Which one a card runs faster is known of few cards, so answers are projected as a range.
"""

from __future__ import annotations

from fast_ft.hub.families import ModelShape
from fast_ft.plan.decode_pool import Answers, kv_bytes
from fast_ft.plan.training_work import UNPACK_BYTES, Rates

#: Bytes that a step moves for a 4-bit weight: codes and 32-bit scales; or codes turned to 16 bits, and these read.
FUSED_BYTES, UNPACKED_BYTES = 0.5 + 4 / 64, UNPACK_BYTES + 2.0
_MEAN_ANSWER = 250  #: tokens; answers end when they are done, long before max_new_tokens


def step_seconds(
    shape: ModelShape, rates: Rates, slots: int, context: float, bytes_a_weight: float, kv_cache: str = "16bit"
) -> float:
    """Return the seconds of one step over `slots` rows that have `context` tokens in the cache, in the mean."""
    head = shape.vocab_size * shape.hidden_size
    moved = shape.quantised_weights * bytes_a_weight + shape.number_bytes * (shape.unquantised_weights + head)
    moved += slots * context * kv_bytes(shape, kv_cache)
    return moved / (rates.gb_per_s * 1e9) + 2 * slots * (shape.linear_weights + head) / (rates.tflops * 1e12)


def answer_minutes(
    shape: ModelShape, ends: tuple[Rates, Rates], answers: Answers, slots: int, *, load_in_4bit: bool
) -> list[float]:
    """Return projected minutes of all answers, from the quick end to the slow one; `ends` are (slow, quick) rates.

    The quick end is of answers of mean length from a fused product, the slow one of full-length answers from weights
    that are turned to 16 bits in each step. Prompts are passed over once, and what all of them share once in all.
    """
    slow, quick = ends
    rows = len(answers.prompt_tokens) * answers.candidates
    slots = max(1, min(slots, rows))
    prompt = sum(answers.prompt_tokens) / max(1, len(answers.prompt_tokens))
    again = answers.shared_tokens * max(0, len(answers.prompt_tokens) - 1)
    passed = 2.0 * (sum(answers.prompt_tokens) - again) * shape.linear_weights

    def minutes(tokens: int, rates: Rates, bytes_a_weight: float) -> float:
        moved = bytes_a_weight if load_in_4bit else float(shape.number_bytes)
        step = step_seconds(shape, rates, slots, prompt + tokens / 2, moved, answers.kv_cache)
        return round((rows * tokens / slots * step + passed / (rates.tflops * 1e12)) / 60, 1)

    longest = answers.max_new_tokens
    return [minutes(min(_MEAN_ANSWER, longest), quick, FUSED_BYTES), minutes(longest, slow, UNPACKED_BYTES)]
