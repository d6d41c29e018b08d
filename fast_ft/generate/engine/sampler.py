"""The draw of the next token, in tensor operations alone, so that it runs inside a captured step.

Processors and their order are transformers': repetition penalty, temperature, top_k, top_p, min_p. The random number
is a hash of (row's key, tokens made so far), in integers: the same on CPU and GPU, whoever the neighbours are, and a
run that is replayed draws the same again.

Shapes: S rows, V vocabulary, K candidates that top_k leaves.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fast_ft.recipe import schema

_MASK = 0xFFFFFFFF
KEPT = 64  #: candidates that draw_triton keeps, ties of the last one included
_LARGEST = 1 << 16  #: vocabulary that fits a program's registers
TIES = 16  #: values equal to the k-th stay, as in transformers; at most this number of them


@dataclass(frozen=True)
class Sampler:
    """How a token is chosen from logits; `do_sample` false takes the likeliest."""

    do_sample: bool
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    @classmethod
    def of(cls, section: schema.Generate) -> Sampler:
        """Return the recipe's sampler."""
        return cls(
            section.do_sample, section.temperature, section.top_k, section.top_p, section.min_p,
            section.repetition_penalty,
        )  # fmt: skip

    @property
    def penalises(self) -> bool:
        """Whether `choose` wants to know which tokens a row holds already."""
        return self.repetition_penalty != 1.0

    def choose(self, logits_SV: Tensor, key_S: Tensor, count_S: Tensor, seen_SV: Tensor | None = None) -> Tensor:
        """Return the next token of each row, int64. `seen_SV` is true for tokens of the prompt and the answer."""
        if self.penalises:
            assert seen_SV is not None
            punished_SV = torch.where(
                logits_SV < 0, logits_SV * self.repetition_penalty, logits_SV / self.repetition_penalty
            )
            logits_SV = torch.where(seen_SV, punished_SV, logits_SV)
        if not self.do_sample:
            return logits_SV.argmax(dim=-1)
        weight_SK, token_SK = self.weights(logits_SV)
        sum_SK = weight_SK.cumsum(dim=-1)
        point_S1 = uniform(key_S, count_S)[:, None] * sum_SK[:, -1:]
        index_S1 = (sum_SK <= point_S1).sum(dim=-1, keepdim=True)
        last_S1 = (weight_SK > 0).sum(dim=-1, keepdim=True) - 1  # u * sum may round up to the sum itself
        return token_SK.gather(1, torch.minimum(index_S1, last_S1))[:, 0]

    def weights(self, logits_SV: Tensor) -> tuple[Tensor, Tensor]:
        """Return (weights, tokens), the likeliest first; a token that is filtered out weighs 0."""
        vocabulary = logits_SV.shape[-1]
        limited = 0 < self.top_k < vocabulary
        width = min(vocabulary, self.top_k + TIES) if limited else vocabulary
        score_SK, token_SK = (logits_SV / self.temperature).topk(width, dim=-1)
        if limited:
            score_SK = score_SK.masked_fill(score_SK < score_SK[:, self.top_k - 1 : self.top_k], -torch.inf)
        weight_SK = score_SK.softmax(dim=-1)
        if self.top_p < 1.0:  # a token stays if those before it hold less than top_p
            before_SK = weight_SK.cumsum(dim=-1) - weight_SK
            weight_SK = weight_SK.masked_fill(before_SK >= self.top_p, 0.0)
        if self.min_p > 0.0:
            weight_SK = weight_SK.masked_fill(weight_SK < self.min_p * weight_SK[:, :1], 0.0)
        return weight_SK, token_SK


def fits(sampler: Sampler, vocabulary: int) -> bool:
    """Return whether draw_triton can draw so: from few tokens, without a penalty, of logits that fit its registers."""
    limited = not sampler.do_sample or 0 < sampler.top_k <= KEPT - TIES
    return limited and not sampler.penalises and KEPT < vocabulary <= _LARGEST


def uniform(key_S: Tensor, count_S: Tensor) -> Tensor:
    """Return u in [0, 1), a multiple of 2**-24 in fp32, from 63-bit keys and counters (int64).

    Two rounds of a 32-bit mixer whose factors lie under 2**31, so that no product overflows int64.
    """
    mixed_S = _mix((key_S >> 32) + count_S * 0x1E3779B1 & _MASK)
    return (_mix(mixed_S ^ (key_S & _MASK)) >> 8).float() * 2.0**-24


def _mix(x: Tensor) -> Tensor:
    """A bijection of 32-bit integers in which each input bit moves every output bit (C. Wellons' hash-prospector)."""
    x = (x ^ (x >> 16)) * 0x21F0AAAD & _MASK
    x = (x ^ (x >> 15)) * 0x735A2D97 & _MASK
    return x ^ (x >> 15)
