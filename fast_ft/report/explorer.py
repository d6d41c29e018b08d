"""The page of `data --explore`: which rows a recipe takes, and which it would take with other settings of `select`."""

from __future__ import annotations

from collections.abc import Callable
from threading import Lock
from typing import Any

from pydantic import ValidationError

from fast_ft.common.errors import InputError
from fast_ft.data.encoding import Encoder
from fast_ft.data.prepare import PreparedData, SelectedData
from fast_ft.data.selection import rejected, select
from fast_ft.recipe import policy_ntu_hw5
from fast_ft.recipe.schema import Recipe, Select
from fast_ft.report.data_map import Group, points
from fast_ft.report.html import page
from fast_ft.report.write import ROWS_ABOUT, ROWS_WARNING, encoder_of, rows_of

#: Takes the page's `select` section; gives {"taken": positions, best rank first} or {"problem": what is wrong}.
Answer = Callable[[Any], dict[str, Any]]


def explore_page(recipe: Recipe, prepared: SelectedData, live: bool = False) -> str:
    """Return the page: the map, sliders for select.where, rank_by and take, and the rows that are taken.

    live: the page comes from `server.serve` and asks it, with `answer`, which rows other settings take. A page in a
    file works them out by itself, but for duplicates and random draws; it says so.
    """
    chosen = prepared.selection
    found = points(chosen.pool, [Group("taken", chosen.indices)], rows_of(prepared), encoder_of(prepared))
    explore = {
        "select": recipe.model_dump(mode="json")["select"],
        "taken": chosen.indices,
        "rejected": rejected(chosen.pool.table, recipe.select.reject),  # whatever the sliders say
        "limit": policy_ntu_hw5.max_train_rows(recipe),
        # How many rows each file of several may give is known to `select` alone.
        "quotas": any(source.take for source in chosen.pool.sources),
    }
    sections = [
        ("map", "The data map", '<div id="data-map"></div>'),
        ("wanted", "Rows to take", '<div id="take-view"></div>'),
        ("choose", "Limits and weights", '<div id="explorer"></div>'),
        ("chosen", "The rows taken", '<div id="chosen-view"></div>'),
    ]
    facts = {"map": found.facts, "explore": explore, **({"live": True} if live else {})}
    name = recipe.data.short_name
    title = f"{name} · fast_ft"
    return page(title, ROWS_ABOUT, sections, facts, found.blocks, ROWS_WARNING if recipe.rules else "")


def answer(recipe: Recipe, prepared: SelectedData) -> Answer:
    """Return what answers the page: the rows that `select` itself takes, duplicates left out and random draws drawn."""
    encoder: Encoder | None = prepared.encoder if isinstance(prepared, PreparedData) else None
    one_at_a_time = Lock()

    def answered(section: Any) -> dict[str, Any]:
        """Select by the page's section."""
        try:
            wanted = Select.model_validate(section)
            with one_at_a_time:
                found = select(
                    prepared.selection.pool, wanted, seed=recipe.seed, limit=policy_ntu_hw5.max_train_rows(recipe),
                    token_counter=encoder.count_pool if encoder else None,
                )  # fmt: skip
        except ValidationError as error:
            return {"problem": error.errors()[0]["msg"]}
        except InputError as error:
            return {"problem": str(error)}
        return {"taken": found.indices, "notes": found.notes}

    return answered
