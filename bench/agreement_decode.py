"""Does the pool say what the model says? Its greedy answers, taken through the model's own forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel


def teacher_forced(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]
) -> dict[str, Any]:
    """Return on what share of tokens argmax agrees, and whether the others are ties within the noise.

    The noise is what two batch sizes differ by in the same logits: mean absolute difference between a row alone and in
    a left-padded batch of two. A disagreement counts as explained where the model's two highest logits lie closer
    than 4 times that.
    """
    import torch

    agree = total = explained = 0
    noises: list[float] = []
    open_gaps: list[float] = []
    with torch.inference_mode():
        for index, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
            alone_TV = _logits(model, [[*prompt, *answer]])[0][len(prompt) - 1 : -1]
            if index % 6 == 0:
                other = [*prompts[index - 1], *answers[index - 1]]
                pair_TV = _logits(model, [[*prompt, *answer], other])[0][-len(answer) - 1 : -1]
                noises.append((pair_TV - alone_TV).abs().mean().item())
            chosen_T = torch.tensor(list(answer), device=alone_TV.device)
            same_T = alone_TV.argmax(dim=-1) == chosen_T
            agree, total = agree + int(same_T.sum()), total + len(answer)
            top_T2 = alone_TV.topk(2, dim=-1).values
            open_gaps += (top_T2[:, 0] - top_T2[:, 1])[~same_T].tolist()
    noise = sum(noises) / len(noises)
    explained = sum(gap < 4 * noise for gap in open_gaps)
    return {"tokens": total, "argmax_agrees": round(agree / total, 4), "noise": round(noise, 5),
            "disagreements": len(open_gaps), "within_4_noise": explained,
            "widest_gap": round(max(open_gaps, default=0.0), 5)}  # fmt: skip


def _logits(model: PreTrainedModel, rows: Sequence[Sequence[int]]) -> Tensor:
    """Return fp32 logits [rows, tokens, vocabulary] of token rows, padded on the left."""
    import torch

    width = max(map(len, rows))
    device = next(model.parameters()).device
    ids = torch.tensor([[0] * (width - len(row)) + list(row) for row in rows], device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
    position = (mask.cumsum(dim=1) - 1).clamp(min=0)
    given = mask if bool((mask == 0).any()) else None
    return model(input_ids=ids, attention_mask=given, position_ids=position).logits.float()
