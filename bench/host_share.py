"""python -m bench.host_share RECIPE [key=value ...] --results FILE: how much of a training step the card works.

A few steps are profiled, after others that warm up. The result holds the time of every kernel of these steps, those of
the forward and backward pass apart from the others, and the gaps between kernels with what the host did meanwhile.
`train.CARD.host_share` is 1 less the busy time of the pass's kernels over the steps' wall time. The steps before the
profile are timed too, since a profiler slows the host down.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import itertools
import json
import shlex
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench import machine, ours
from bench.emulation import LABEL, T4_GIB, Limits
from bench.process import card_to_itself
from bench.step_profile import PASS, STEP, busy_us, digest, host_share, waits
from fast_ft.common import environment, gpu
from fast_ft.common.atomic_files import write_json
from fast_ft.common.errors import InputError
from fast_ft.models.loaders import choose
from fast_ft.plan import planner
from fast_ft.plan.ways import ways
from fast_ft.recipe import loader

if TYPE_CHECKING:
    from fast_ft.train.session import TrainSession
    from fast_ft.train.task import TrainTask

_PLACE = {True: "pass ", False: "other"}


def main(arguments: list[str] | None = None) -> int:
    """Measure, write the result and print a table of it; return the exit status."""
    given = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(
        prog="python -m bench.host_share", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--results", type=Path, required=True, help="a JSON for the raw samples")
    parser.add_argument("--warm", type=int, default=8, help="steps before the profile; default: %(default)s")
    parser.add_argument("--profiled", type=int, default=3, help="steps of the profile; default: %(default)s")
    parser.add_argument("--cap", type=float, default=T4_GIB, help="GiB, context included; default: %(default)s")
    parser.add_argument("--emulate", choices=["t4"], help=f"{LABEL}: memory, attention, 8 SMs; ratios only")
    parser.add_argument("--turn", type=Path, help="a file to wait for, once all is imported; .ready and .done say so")
    parser.add_argument("--stacks", action="store_true", help="profile again, with the Python stack of each wait")
    options = parser.parse_intermixed_args(given)
    environment.for_libraries()
    command = shlex.join(["python", "-m", "bench.host_share", *given])
    result: dict[str, Any] = {"kind": "host_share", **machine.stamp(command)}
    try:
        result |= measure(options)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    write_json(options.results, result)
    print(described(result))
    return 0


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Train a few steps of a recipe with the profiler on; return what it saw."""
    recipe = loader.load_recipe(options.recipe, options.overrides)
    prepared = ours.prepared_rows(recipe)
    names = ways(recipe, gpu.capability()).names
    maker = choose.make_loader(recipe.model, recipe.lora, seed=recipe.seed, ways=names)
    import peft  # noqa: F401  # with Unsloth all three are there by now
    import transformers  # noqa: F401
    import trl  # noqa: F401

    from fast_ft.train.session import TrainSession
    from fast_ft.train.task import TrainTask

    steps = options.warm + (options.profiled + 2) * (2 if options.stacks else 1) + 1
    limits = Limits(options.cap, 8 if options.emulate else None, t4_attention=bool(options.emulate))
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        profiler = Profiler(options.warm, options.profiled + 2, Path(folder), stacks=options.stacks)
        with turn(options.turn):
            limits.begin()
            with limits.stream():
                card = planner.card_here()
            plan = planner.settle(recipe, prepared, ours.family(recipe), backend=maker.name, card=card)
            loaded = maker.for_training()
            carry, pad_id = recipe.curriculum.carry, prepared.encoder.pad_id
            task = TrainTask(prepared.jobs, recipe.train, carry, recipe.seed, pad_id, stop_after=steps)
            session = TrainSession(loaded, task, plan.train, Path(folder))
            with limits.stream():
                train(session, profiler)
        return {"backend": loaded.backend, "plan": plan.to_json(), **limits.to_json(), **profiler.result(task)}


@contextlib.contextmanager
def turn(file: Path | None) -> Iterator[None]:
    """Hold the card within: say that this process has imported all, wait for its turn, and say when it is over."""
    if file is not None:
        file.with_suffix(".ready").touch()
        while not file.exists():
            time.sleep(0.05)
    with card_to_itself():
        yield
    if file is not None:
        file.with_suffix(".done").touch()


def train(session: TrainSession, profiler: Profiler) -> None:
    """Run the session's only stage, and the profiler beside it."""
    from fast_ft.train.sft_trainer import StageTrainer

    session.steps.passes = Marked(session.steps.passes)  # type: ignore[assignment]
    trainer = StageTrainer(session)
    trainer.add_callback(profiler.callback())
    try:
        trainer.train()
    finally:
        session.steps.passes.close()


class Marked:
    """The passes of a session, whose calls a profile shows under one name."""

    def __init__(self, passes: Any) -> None:
        self.__dict__["passes"] = passes

    def __call__(self, *given: Any, **named: Any) -> Any:
        """Run the pass."""
        import torch

        with torch.profiler.record_function(PASS):
            return self.passes(*given, **named)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["passes"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.passes, name, value)


class Profiler:
    """Times the steps by events on the card, and profiles `count` of them after the first `warm`."""

    def __init__(self, warm: int, count: int, folder: Path, *, stacks: bool) -> None:
        self.starts = {warm: False, **({warm + count: True} if stacks else {})}
        self.count, self.folder, self.step, self._since = count, folder, 0, 0
        self.losses: list[list[float]] = []  #: of each step, with the gradient's norm
        self._running: Any = None
        self._files: list[Path] = []
        self._events: list[Any] = []

    def callback(self) -> Any:
        """Return the callback for a trainer."""
        from transformers import TrainerCallback

        outer = self

        class Callback(TrainerCallback):
            """Tell the profiler that a step begins or training ends."""

            def on_step_begin(self, *_: Any, **__: Any) -> None:
                """Start or stop the profile where it is time to."""
                outer.begin_step()

            def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
                """Keep a step's loss and gradient norm."""
                if "grad_norm" in logs:
                    outer.losses.append([round(logs["loss"], 6), round(float(logs["grad_norm"]), 6)])

            def on_epoch_end(self, *_: Any, **__: Any) -> None:
                """Stop the profile."""
                outer.stop()

        return Callback()

    def begin_step(self) -> None:
        """Note the beginning of a step on the card's own clock, and start or stop the profile."""
        import torch

        if self._running is not None and self.step - self._since == self.count:
            self.stop()
        if self.step in self.starts:
            torch.cuda.synchronize()
            kinds = torch.profiler.ProfilerActivity
            self._since = self.step
            self._running = torch.profiler.profile(
                activities=[kinds.CPU, kinds.CUDA], with_stack=self.starts[self.step]
            )
            self._running.start()
        with torch.profiler.record_function(STEP):
            if self._running is None:
                event = torch.cuda.Event(enable_timing=True)
                event.record()
                self._events.append(event)
        self.step += 1

    def stop(self) -> None:
        """Stop the profile, and write what it saw."""
        if self._running is None:
            return
        import torch

        torch.cuda.synchronize()
        self._running.stop()
        self._files.append(self.folder / f"trace-{len(self._files)}.json")
        self._running.export_chrome_trace(str(self._files[-1]))
        self._running = None
        gc.collect()

    def result(self, task: TrainTask) -> dict[str, Any]:
        """Return what was seen: the digest of the profile, the seconds of the steps before it, and all losses."""
        seconds = self.seconds()
        found = digest(self.events(0), self.count - 2)
        found |= {"step_seconds": seconds, "step_tokens": task.step_tokens[: len(seconds)], "losses": self.losses}
        return found | ({"waits": waits(self.events(1))} if len(self._files) > 1 else {})

    def seconds(self) -> list[float]:
        """Return the seconds between the beginnings of the steps before the profile, by the card's clock."""
        return [round(a.elapsed_time(b) / 1e3, 5) for a, b in itertools.pairwise(self._events)][: min(self.starts) - 1]

    def events(self, index: int) -> list[dict[str, Any]]:
        """Return the events of a profile."""
        found: list[dict[str, Any]] = json.loads(self._files[index].read_text(encoding="utf-8"))["traceEvents"]
        return [each for each in found if each.get("ph") == "X"]


def described(result: Mapping[str, Any]) -> str:
    """Return the table that is printed."""
    wall = (result["first_kernels"][-1] - result["first_kernels"][0]) / 10
    steps = result["steps"]
    per = [
        f"{result['backend']}: {steps} steps profiled; wall of a step {wall / steps / 1e3:.2f} ms",
        f"busy in the pass {busy_us(result['pass']) / steps / 1e3:.2f} ms, "
        f"outside of it {busy_us(result['other']) / steps / 1e3:.2f} ms; host share {host_share(result):.4f}",
        f"steps before the profile, s: {result['step_seconds']} of tokens {result['step_tokens']}",
        f"{result['kernels']} kernels, {result['launches']} calls; plan {result['plan']}",
        "longest gaps:",
        *(f"  {gap['us']:>7} us at {gap['at_us']:>8}: {gap['host']}" for gap in result["gaps"]),
        "kernels:",
        *(
            f"  {k['ms']:>9.3f} ms {k['count']:>6} {'pass ' if k['pass'] else 'other'} {k['name']}"
            for k in result["top"]
        ),
        "calls of the runtime: " + ", ".join(f"{name} {n} x, {ms} ms" for name, (n, ms) in result["calls"].items()),
        *(f"  waits {w['us']:>8} us {w['count']:>4} x {w['call']}: {w['stack']}" for w in result.get("waits", [])),
    ]
    return "\n".join(per)


def figures(result: Mapping[str, Any]) -> dict[str, tuple[float, str]]:
    """Return {figure: (value, unit)}."""
    name = "host_share" if result["backend"] == "fused" else f"host_share_{result['backend']}"
    unit = "1 - busy time of the forward and backward pass's kernels / wall time of a step, profiled"
    return {f"train.{machine.slug_of(dict(result))}.{name}": (round(host_share(result), 4), unit)}


if __name__ == "__main__":
    started = time.monotonic()
    status = main()
    print(f"{time.monotonic() - started:.1f} s", file=sys.stderr)
    sys.exit(status)
