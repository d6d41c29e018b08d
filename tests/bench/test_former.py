"""bench.step_profile's digest of a profile, and bench.former's figures, from samples that are made up."""

from __future__ import annotations

from typing import Any

import pytest

from bench import former, step_profile


def event(kind: str, name: str, begin: float, length: float, number: int | None = None) -> dict[str, Any]:
    arguments = {} if number is None else {"correlation": number}
    return {"ph": "X", "cat": kind, "name": name, "ts": begin, "dur": length, "args": arguments, "tid": 1}


def profile(*, ahead: bool) -> list[dict[str, Any]]:
    """Four steps of 100 us: two kernels of a pass of 30 us each with a gap of 5, and an optimizer's of 15.

    They are launched at the step's beginning, or, where the host runs ahead, 100 us before.
    """
    events = []
    for step in range(4):
        begin = 1000.0 + 100 * step
        launch = begin - (100 if ahead else 0)
        events += [
            event("user_annotation", step_profile.STEP, launch - 3, 1),
            event("user_annotation", step_profile.PASS, launch, 10),
            event("cuda_runtime", "cudaGraphLaunch", launch + 1, 5, number=2 * step),
            event("cuda_runtime", "cudaLaunchKernel", launch + 20, 5, number=2 * step + 1),
            event("kernel", "product", begin + 4, 30, number=2 * step),
            event("kernel", "attention", begin + 39, 30, number=2 * step),
            event("kernel", "adamw", begin + 70, 15, number=2 * step + 1),
        ]
    return events


@pytest.mark.parametrize("ahead", [False, True])
def test_the_hosts_share_is_what_the_pass_leaves_of_whole_steps(ahead: bool) -> None:
    found = step_profile.digest(profile(ahead=ahead), 2)
    assert found["first_kernels"] == [0, 1000, 2000] and found["kernels"] == 6
    assert step_profile.busy_us(found["pass"]) == pytest.approx(120) and step_profile.busy_us(found["other"]) == 30
    assert step_profile.host_share(found) == pytest.approx(1 - 120 / 200)
    assert found["gaps"][0]["us"] == 19 and {row["name"]: row["pass"] for row in found["top"]} == {
        "product": True, "attention": True, "adamw": False,
    }  # fmt: skip


def test_kernels_beside_each_other_count_once() -> None:
    assert step_profile.union([(0, 10), (5, 12), (12, 13), (20, 21)]) == [(0, 13), (20, 21)]


def run(program: str, way: str, seconds: float) -> dict[str, Any]:
    tokens = [3000] * 12
    times = [9.0] * former.WARM_UP + [seconds] * 7
    return {"program": program, "way": way, "step_tokens": tokens, "step_seconds": times, "backend": way,
            **step_profile.digest(profile(ahead=True), 2)}  # fmt: skip


def test_factors_are_of_medians_in_one_call_and_named_by_the_card() -> None:
    steps = [run("former", "fused", 0.2), run("now", "fused", 0.15), run("former", "unsloth", 0.24),
             run("now", "unsloth", 0.2)]  # fmt: skip
    commands = [{"program": program, "place": place, "seconds": seconds}
                for place, (program, seconds) in enumerate([("former", 50.0), ("now", 40.0)])]  # fmt: skip
    result = {"steps": steps, "commands": commands, "emulate": None, "former_commit": "b64f4c6" * 2,
              "environment": {"gpu": {"name": "NVIDIA H200"}}}  # fmt: skip
    found = {name: value for name, (value, _) in former.figures(result).items()}
    assert found == {
        "train.h200.gain": 1.333, "train.h200.unsloth_gain": 1.2, "train.h200.wall_gain": 1.25,
        "train.h200.tokens_per_s": 20000.0, "train.h200.host_share": 0.4, "train.h200.unsloth_share": 0.75,
    }  # fmt: skip
    emulated = former.figures({**result, "emulate": "t4", "commands": []})
    assert set(emulated) == {f"train.t4class.{name}" for name in ("gain", "unsloth_gain", "unsloth_share")}
    assert "not a T4" in emulated["train.t4class.gain"][1]
