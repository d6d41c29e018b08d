"""Under a homework's rules: which reference answers a judge may see.

The course keeps its reference answers to itself, and the test set shapes nothing. So the reference answers are rows of
data.train with their own answers, to prompts that were kept out of the training: a stand-in that costs no submission.
Reference answers to the test prompts themselves are refused, unless the recipe says that the course gave them out.
"""

from __future__ import annotations

from collections.abc import Sequence

import pyarrow as pa
import pyarrow.compute as pc

from fast_ft.common.errors import InputError
from fast_ft.data import dataset, mixing
from fast_ft.data.examples import Prompt
from fast_ft.data.formats import strip_lead, strip_leads
from fast_ft.recipe.schema import Recipe


def check(recipe: Recipe, prompts: Sequence[Prompt]) -> None:
    """Raise InputError where the recipe names rules, and references to these prompts that are no rows of data.train."""
    judge = recipe.judge
    if recipe.rules is None or judge.references is None or judge.kind == "none" or judge.references_from_course:
        return
    references = dataset.load_references(judge.references)
    pool = mixing.load_pool(recipe.data.model_copy(update={"test": None}))
    wanted = pa.array(sorted({strip_lead(prompt.all_text) for prompt in prompts}), pa.string())
    among = pc.is_in(strip_leads(pool.table["prompt"]), value_set=wanted).to_pylist()
    rows = pool.examples([place for place, same in enumerate(among) if same])
    own = {(strip_lead(row.prompt), row.messages[-1].content.strip()) for row in rows}
    for prompt in prompts:
        answer = references.find(prompt.id, prompt.messages)
        if answer is not None and (strip_lead(prompt.all_text), answer.strip()) not in own:
            raise InputError(
                f"judge.references: under rules: {recipe.rules} references may only be rows of data.train with their "
                f"own answers, and prompt {prompt.id!r} with its reference is no such row. Judge other prompts: `data "
                "RECIPE --stand-in 100 --output FILE` writes rows that are not trained on, and their answers. If the "
                "course gave out these references, write judge.references_from_course: true; the manifest records it."
            )
