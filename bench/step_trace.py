"""Which functions one training pass runs through: ours, Unsloth's or PEFT's, each with its number of calls.

    python -m bench.step_trace RECIPE [key=value ...]      on a card; prints one JSON object

The pass is run kernel by kernel, since a replayed CUDA graph calls no Python. A graph is captured from the same pass.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from bench.ours import prepared_rows
from fast_ft.common import gpu
from fast_ft.data.encoding import EncodedRow
from fast_ft.models.loaders import choose
from fast_ft.models.loaders.base import LoadedModel
from fast_ft.plan.run_plan import TrainPlan
from fast_ft.plan.ways import ways
from fast_ft.recipe.loader import load_recipe
from fast_ft.train.forward_backward import Passes
from fast_ft.train.micro_batch import MicroBatchShape
from fast_ft.train.optimizer import FlatWeights

if TYPE_CHECKING:
    from torch import Tensor

_WATCHED = ("fast_ft.models.", "unsloth.", "unsloth_zoo.", "peft.tuners.")


def trace(loaded: LoadedModel, rows: Sequence[EncodedRow]) -> dict[str, dict[str, int]]:
    """Return {"forward": {function: calls}, "backward": {autograd node: count}} of one pass over these rows."""
    shape = MicroBatchShape(places=len(rows), longest=max(len(row.input_ids) for row in rows), pad_id=0)
    passes = Passes(loaded, FlatWeights(loaded.model), TrainPlan(len(rows), capture=False), shape)
    loaded.model.train()
    passes.begin(1.0, None)
    micro = passes.lay_out(rows)
    passes(micro, seed=0)  # compiles what is compiled once
    calls: Counter[str] = Counter()

    def count(frame: FrameType, event: str, _: object) -> None:
        """Count a call of a watched module's function."""
        module = frame.f_globals.get("__name__", "")
        if event == "call" and module.startswith(_WATCHED):
            calls[f"{module}.{frame.f_code.co_qualname}"] += 1

    nodes: Counter[str] = Counter()

    def look(module: Any, args: Any, output: Tensor) -> None:
        """Count the nodes behind the last norm's output."""
        nodes.update(node.name() for node in _graph(output.grad_fn))

    handle = loaded.model.get_base_model().model.register_forward_hook(
        lambda module, args, output: look(module, args, output[0])
    )
    sys.setprofile(count)
    try:
        passes(micro, seed=0)
    finally:
        sys.setprofile(None)
        handle.remove()
        passes.close()
    return {"forward": dict(calls.most_common()), "backward": dict(nodes.most_common())}


def _graph(start: Any) -> Iterator[Any]:
    seen, stack = set(), [start]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield node
        stack += [each for each, _ in node.next_functions]


def main(arguments: Sequence[str]) -> int:
    """Trace a recipe's first rows through the way that trains it here, and print what was called."""
    parser = argparse.ArgumentParser("python -m bench.step_trace", description=__doc__)
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    options = parser.parse_args(arguments)
    recipe = load_recipe(options.recipe, options.overrides)
    names = ways(recipe, gpu.capability()).names
    loader = choose.make_loader(recipe.model, recipe.lora, seed=recipe.seed, ways=names)
    loaded = loader.for_training()
    rows = list(prepared_rows(recipe).rows.values())[:4]
    found = trace(loaded, rows)
    layers = len(loaded.model.get_base_model().model.layers)
    print(json.dumps({"recipe": Path(options.recipe).name, "way": loader.name, "layers": layers, **found}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
