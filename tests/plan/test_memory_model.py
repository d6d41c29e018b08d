"""Memory of a pass: held to passes that were measured on a card, and to what each moment should hold."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest

from fast_ft.hub.families import GIB, ModelShape
from fast_ft.plan.memory_model import fixed_gib, kept_bytes, pass_gib, pass_moments
from fast_ft.plan.training_work import Training, takes_flash

LLAMA = ModelShape(4096, 11008, 32, 32, 32, 128, 32000, False)
TRAINING = Training(16, "adamw_8bit", load_in_4bit=True, backend="fused", rows=8, longest=700)
FLASH = replace(TRAINING, flash=True)
OTHERS = replace(TRAINING, backend="unsloth")


def test_a_layer_keeps_what_its_backward_pass_reads() -> None:
    """x, q, k, v, attention's result, mid, gate and up in 16 bits; the inner sides of seven pairs; three sums."""
    widths = [4096] * 6 + [11008] * 2 + [16] * 7
    assert kept_bytes(LLAMA, FLASH, 1) == 2 * sum(widths) + 4 * (1 + 1 + 32)
    assert kept_bytes(LLAMA, replace(FLASH, r=64), 1) - kept_bytes(LLAMA, FLASH, 1) == 2 * 7 * 48


def test_the_memory_efficient_kernel_keeps_sums_for_each_place_of_the_longest_row() -> None:
    more = kept_bytes(LLAMA, replace(TRAINING, longest=2048), 4096) - kept_bytes(LLAMA, TRAINING, 4096)
    assert more == 9 * 32 * 4 * (2048 - 704)
    assert kept_bytes(LLAMA, replace(FLASH, longest=2048), 4096) == kept_bytes(LLAMA, FLASH, 4096)
    assert kept_bytes(LLAMA, replace(TRAINING, longest=40), 4096) == kept_bytes(
        LLAMA, replace(TRAINING, longest=128), 4096
    )


def test_attentions_backward_pass_takes_memory_where_nothing_is_computed_again_too() -> None:
    """The memory-efficient kernel holds q's gradient in fp32 for each place of the longest row."""
    for recompute, moment in ((0, "last layer"), (32, "computed again")):
        long, short = (pass_moments(LLAMA, replace(TRAINING, longest=n), 2048, recompute) for n in (2048, 1024))
        sums = 9 * 32 * 4 * (2048 - 1024) * max(1, 32 - recompute)
        assert long[moment] - short[moment] == 9 * (2048 - 1024) * 4 * 4096 + sums


def test_grouped_heads_keep_narrower_keys_and_values() -> None:
    grouped = replace(LLAMA, num_key_value_heads=8)
    fewer = kept_bytes(LLAMA, TRAINING, 1) - kept_bytes(grouped, TRAINING, 1)
    assert fewer == 2 * 2 * 24 * 128, "keys and values of 24 heads in 16 bits"
    loss = [pass_moments(shape, TRAINING, 2048, 0)["loss"] for shape in (LLAMA, grouped)]
    assert loss[0] - loss[1] == 2048 * 32 * fewer


def test_norms_of_q_and_k_keep_both_before_them() -> None:
    more = kept_bytes(LLAMA, replace(FLASH, qk_norms=True), 1) - kept_bytes(LLAMA, FLASH, 1)
    assert more == 2 * 2 * 4096 + 4 * 2 * 32


def test_the_peak_is_the_moment_that_holds_most() -> None:
    moments = pass_moments(LLAMA, FLASH, 4096, 8)
    assert set(moments) == {"loss", "last norm", "last layer", "computed again"}
    assert set(pass_moments(LLAMA, FLASH, 4096, 0)) == {"loss", "last norm", "last layer"}
    assert set(pass_moments(LLAMA, FLASH, 4096, 32)) == {"loss", "last norm", "computed again"}
    wide = replace(LLAMA, vocab_size=256_000)
    moments = pass_moments(wide, FLASH, 1024, 0)
    assert max(moments.values()) == moments["loss"]
    assert pass_gib(wide, FLASH, 1024, 0) > moments["loss"] / GIB


def test_a_layer_that_is_computed_again_keeps_its_input() -> None:
    loss = [pass_moments(LLAMA, FLASH, 4096, count)["loss"] for count in (8, 9)]
    assert loss[0] - loss[1] == kept_bytes(LLAMA, FLASH, 4096) - 4096 * 2 * 4096


def test_the_input_of_a_layer_that_is_computed_again_is_counted_once() -> None:
    """It is among what the layer itself keeps. Beside that: gradients of the output, the middle and attention's result,
    of q, k and v twice, and of LoRA in fp32."""
    backward = 4096 * (2 + 2 + 2 + 2 * 6) * 4096 + 4 * LLAMA.lora_weights(16) / 32
    for count in (1, 8):
        again = pass_moments(LLAMA, FLASH, 4096, count)["computed again"]
        assert again == (count - 1) * 4096 * 2 * 4096 + kept_bytes(LLAMA, FLASH, 4096) + backward


def test_the_last_norm_goes_backward_through_six_tensors_of_fp32() -> None:
    """As torch itself allocates them for transformers' norm: beside its input in fp32, five more at a time."""
    import torch
    from torch.profiler import ProfilerActivity, profile
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    tokens, width = 512, 1024
    norm = LlamaRMSNorm(width).to(torch.bfloat16).requires_grad_(False)
    below = torch.randn(1, tokens, width, dtype=torch.bfloat16, requires_grad=True)
    result, gradient = norm(below * 1), torch.randn(1, tokens, width, dtype=torch.bfloat16)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        result.backward(gradient)
    events = seen.profiler.kineto_results.events()
    held = list(itertools.accumulate(each.nbytes() for each in events if each.name() == "[memory]"))
    in_fp32 = 4 * tokens * width
    assert max(held) == pytest.approx(5 * in_fp32, rel=0.02)
    moments = pass_moments(replace(LLAMA, hidden_size=width), FLASH, tokens, 32)
    assert moments["last norm"] - 32 * tokens * 2 * width == 6 * in_fp32


def test_no_more_than_1024_positions_have_logits() -> None:
    wide = replace(LLAMA, vocab_size=256_000)
    loss = [pass_moments(wide, FLASH, tokens, 32)["loss"] for tokens in (1024, 2048)]
    assert loss[1] - loss[0] == 1024 * (32 * 2 * 4096 + 8 * 4096)
    every = pass_gib(LLAMA, replace(OTHERS, loss_positions=4096), 4096, 32)
    assert every - pass_gib(LLAMA, OTHERS, 4096, 32) > 0.1


def test_inputs_may_lie_in_the_hosts_memory() -> None:
    offloaded = pass_gib(LLAMA, replace(OTHERS, offloaded=True), 4096, 32)
    assert pass_gib(LLAMA, OTHERS, 4096, 32) - offloaded == pytest.approx(4096 * 32 * 8192 / GIB, rel=0.01)


def test_modules_that_are_trained_whole_are_counted() -> None:
    """In fp32 with gradients and states; in a pass once more as gradients, and in 16 bits."""
    head = 32000 * 4096
    whole = replace(TRAINING, whole_weights=head)
    assert (fixed_gib(LLAMA, whole) - fixed_gib(LLAMA, TRAINING)) * GIB == pytest.approx(head * (8 + 2 * (1 + 4 / 256)))
    loss = [pass_moments(LLAMA, each, 1024, 0)["loss"] for each in (TRAINING, whole)]
    assert loss[1] - loss[0] == head * 6
    assert fixed_gib(LLAMA, replace(whole, optim="adamw_torch")) - fixed_gib(LLAMA, whole) > head * 5 / GIB


@pytest.mark.parametrize(
    ("capability", "head", "takes"),
    [((7, 5), 128, False), ((8, 0), 128, True), ((9, 0), 64, True), ((9, 0), 256, False), ((9, 0), 100, False)],
)
def test_the_plan_knows_which_heads_flash_attention_takes(capability: tuple[int, int], head: int, takes: bool) -> None:
    assert takes_flash(capability, head) is takes
    assert not takes_flash(None, head)
