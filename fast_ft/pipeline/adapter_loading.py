"""A fresh base model with a run's adapter, checked and ready to answer; what else must be done is done meanwhile."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from fast_ft.common import environment, garbage, out_of_memory
from fast_ft.common.stopwatch import Stopwatch
from fast_ft.data.prepare import PreparedData
from fast_ft.generate.engine.scheduler import shapes
from fast_ft.hub.families import TARGET_MODULES
from fast_ft.models import adapter_check
from fast_ft.models.loaders import choose
from fast_ft.models.loaders.base import LoadedModel, Loader, LoaderBase
from fast_ft.pipeline import base_check
from fast_ft.pipeline.decoding import decode_plan
from fast_ft.pipeline.set_up import base_family, card_to_plan_for, settle_plan
from fast_ft.plan.decode_pool import DecodePlan
from fast_ft.plan.run_plan import RunPlan
from fast_ft.recipe.schema import Recipe
from fast_ft.run.folder import RunDir


@dataclass(frozen=True)
class Ready:
    """A model that is ready to answer: the base with the run's adapter, checked, and how answers are decoded.

    `settled` is the run's plan, `plan` how the prompts at hand are decoded. `difference` is the check's, in nats per
    token. `prompt_ids` are the prompts' token ids.
    """

    loaded: LoadedModel
    settled: RunPlan
    plan: DecodePlan
    difference: float
    prompt_ids: list[list[int]]


def load(
    folder: RunDir,
    recipe: Recipe,
    prepared: PreparedData,
    adapter: Path,
    maker: Loader | None = None,
    watch: Stopwatch | None = None,
) -> Ready:
    """Load a fresh base model with the run's adapter, and check that it is what was trained.

    The loader is the one that the adapter was trained with, where training is done. Raises InputError where base,
    tokenizer or adapter are not what they were.
    """
    watch = watch or Stopwatch()
    with watch.during("loading"):  # libraries, too
        maker = maker or maker_of(folder, recipe)
    card = card_to_plan_for(folder, recipe)
    settled = settle_plan(folder, recipe, prepared, maker.name, card)
    plan = decode_plan(recipe, prepared, settled)
    with watch.during("loading"):
        compiled = _compile_ahead(recipe, prepared, plan, maker)
        with out_of_memory.explained("loading the base model", out_of_memory.LOADING):
            loaded, prompt_ids = _load_and_encode(folder, recipe, prepared, partial(maker.for_generation, adapter))
    if compiled is not None:
        with watch.during("set_up"):
            compiled.exception()  # waits; what went wrong is said where the engine is made
            out_of_memory.clear_workspaces()  # the threads' own
    with watch.during("checks"), out_of_memory.explained("checking the adapter", out_of_memory.ANSWERING):
        difference = adapter_check.verify(adapter, loaded, prepared.encoder.pad_id)
    return Ready(loaded, settled, plan, difference, prompt_ids)


def maker_of(folder: RunDir, recipe: Recipe) -> Loader:
    """Return the loader that the run's adapter was trained with; before that, the recipe's."""
    trained = folder.done("train") or {}
    return choose.make_loader(recipe.model, recipe.lora, seed=recipe.seed, name=trained.get("backend"))


def _load_and_encode(
    folder: RunDir, recipe: Recipe, prepared: PreparedData, load_model: Callable[[], LoadedModel]
) -> tuple[LoadedModel, list[list[int]]]:
    """Load the model; meanwhile a thread compares base and tokenizer with the run's, and encodes the prompts."""

    def host_work() -> list[list[int]]:
        base_check.refuse_another(folder, recipe, prepared)
        return prepared.prompt_ids

    with ThreadPoolExecutor(1, thread_name_prefix="host") as thread:
        encoded = thread.submit(host_work)
        try:
            loaded = load_model()
        except Exception:
            encoded.result()  # another base, which that tells of, is the better explanation
            raise
        return loaded, encoded.result()


def _compile_ahead(recipe: Recipe, prepared: PreparedData, plan: DecodePlan, maker: Loader) -> Future[None] | None:
    """On a card, let decoding's kernels be compiled and checked while the base is being loaded."""
    if not isinstance(maker, LoaderBase) or maker.device != "cuda":
        return None
    from fast_ft.generate.engine import kernel_checks
    from fast_ft.generate.engine.sampler import Sampler

    family = base_family(recipe)
    if family.general is not None:
        return None
    shape = family.shape
    rows = min(plan.slots, len(prepared.prompts) * recipe.generate.num_return_sequences)
    ranks = _ranks(recipe)
    scaled = [rank for rank in ranks if rank and recipe.lora.use_dora]  # such products are not decoded in registers
    planes = family.is_4bit(asked=recipe.model.load_in_4bit) and not plan.dequantise and len(scaled) < len(ranks)
    kind = kernel_checks.Kind(
        heads=shape.num_attention_heads,
        kv_heads=shape.num_key_value_heads,
        head_dim=shape.head_dim,
        hidden=shape.hidden_size,
        inner=shape.intermediate_size,
        dtype=maker.dtype,
        device="cuda:0",
        steps=tuple(shapes(max(1, rows), planes=True)),
        planes=planes,
        kv_bits=plan.kv_bits,
        ranks=ranks,
        mixed=planes and bool(scaled or shape.unquantised_weights),
    )
    return kernel_checks.ahead(kind, Sampler.of(recipe.generate), shape.vocab_size)


def _ranks(recipe: Recipe) -> tuple[int, int, int, int]:
    """Return the padded ranks of each product's LoRA: q, k and v side by side, o, gate and up side by side, down."""
    from fast_ft.generate.engine.projections import padded_ranks

    targets = set(TARGET_MODULES if recipe.lora.target_modules == "all-linear" else recipe.lora.target_modules)
    groups = ({"q_proj", "k_proj", "v_proj"}, {"o_proj"}, {"gate_proj", "up_proj"}, {"down_proj"})
    qkv, out, gate_up, down = (padded_ranks(recipe.lora.r * len(group & targets)) for group in groups)
    return qkv, out, gate_up, down


@contextlib.contextmanager
def collects_new_objects_only() -> Iterator[None]:
    """Let collections within walk only what is made within: with all libraries loaded, each walk takes half a second.

    What earlier phases left in reference cycles is collected first.
    """
    with environment.without_compiler(), contextlib.suppress(ImportError):  # said where a base is loaded
        import bitsandbytes  # noqa: F401
    import peft  # noqa: F401
    import transformers  # noqa: F401

    out_of_memory.release()
    with garbage.new_objects_only():
        yield
