"""Is it the same base model, tokenizer and chat template as when the run began? They lie outside of the run's folder.

A recipe names them by a path or a hub id, and what lies there can be replaced between two starts. So the manifest holds
the base's fingerprint (hub/fingerprint.py) and digests of the token ids that training and generation see.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence
from typing import Any

from fast_ft.common.errors import InputError
from fast_ft.common.wording import counted, listed
from fast_ft.data.prepare import PreparedData
from fast_ft.hub import fingerprint
from fast_ft.recipe.schema import Recipe
from fast_ft.run.folder import RunDir, differences
from fast_ft.run.manifest import Manifest

Diff = dict[str, tuple[Any, Any]]  #: {what: (was, is)}


def tokens(prepared: PreparedData) -> dict[str, Any]:
    """Return what the manifest says of token ids: {"rows": {id: digest}, "prompts": one digest for all}."""
    encoder = prepared.encoder
    rows = {name: _digest([row.input_ids, row.labels]) for name, row in prepared.rows.items()}
    return {"rows": rows, "prompts": _digest([encoder.end_ids, *prepared.prompt_ids])}


def token_changes(manifest: Manifest, prepared: PreparedData) -> Diff:
    """Return which of the rows that are the same as before have other token ids now: {} where none has."""
    was, is_ = manifest.tokens.rows, tokens(prepared)["rows"]
    former = {row.id: row.digest for row in manifest.rows}
    same = [e.id for e in prepared.examples if former.get(e.id) == e.digest]
    odd = [name for name in same if name in was and was[name] != is_[name]]
    if not odd:
        return {}
    told = f"another tokenizer or chat template: those of {counted(len(odd), 'row')} ({listed(list(map(repr, odd)))})"
    return {"the rows' token ids": ("as trained", told)}


def prompt_changes(manifest: Manifest, prepared: PreparedData) -> Diff:
    """Return whether the prompts, which are the same as before, have other token ids now: {} where they have not."""
    was, is_ = manifest.tokens.prompts, tokens(prepared)["prompts"]
    return {"the prompts' token ids": (was, is_)} if was not in (None, is_) else {}


def model_changes(manifest: Manifest, recipe: Recipe) -> Diff:
    """Return how the base model differs from the one in the manifest: {} where it is the same, or none is recorded."""
    was = manifest.model
    if was is None:
        return {}
    is_ = fingerprint.model(recipe.model.name_or_path, recipe.model.revision)
    pairs = differences(was.config.given(), is_["config"])
    found: Diff = {f"the base model's config.json: {key}": pair for key, pair in pairs.items()}
    old, new = was.weights, is_["weights"]
    for name in sorted({*old, *new}):
        a, b = old.get(name), new.get(name)
        if a != b and (a is None or b is None or a.split(":")[0] == b.split(":")[0]):  # else not comparable
            found[f"the base model's {name}"] = (a and a[:24], b and b[:24])
    return found


def has_moved(folder: RunDir, recipe: Recipe) -> bool:
    """Return whether a recipe names the base of a run by another path, hub id or revision than the run's own does."""
    was = folder.record().model
    return was is not None and (was.name_or_path, was.revision) != (recipe.model.name_or_path, recipe.model.revision)


def refuse_another(folder: RunDir, recipe: Recipe, prepared: PreparedData) -> None:
    """Raise InputError where a trained adapter would answer with another base, tokenizer or chat template.

    A base that moved may be written down in another way; whether it is the same one, the adapter's check finds out.
    """
    manifest = folder.record()
    changes = {} if has_moved(folder, recipe) else model_changes(manifest, recipe)
    if found := {**changes, **token_changes(manifest, prepared)}:
        listed = "".join(f"\n  {key}: {was} -> {is_}" for key, (was, is_) in found.items())
        commit = manifest.model.commit if manifest.model is not None else None
        again = f" (on the hub it was commit {commit}: set model.revision)" if commit else ""
        raise InputError(
            f"{folder.root}: {recipe.model.name_or_path} is not what this run's adapter was trained with:{listed}\n"
            f"Put back what was there{again}, or train again into another output_dir"
        )


def _digest(lists: Sequence[Sequence[int]]) -> str:
    """Return 16 hex digits over lists of token ids and where each ends."""
    total = hashlib.sha256()
    for each in lists:
        total.update(len(each).to_bytes(8, "little") + array("q", each).tobytes())
    return total.hexdigest()[:16]
