"""docs/models.md says of each family what FamilySpec decides, and names no family that no test goes through."""

from __future__ import annotations

import re

import pytest

from fast_ft.hub import families
from fast_ft.hub.families import OWN, FamilySpec
from tests.helpers import bases
from tests.helpers.parts import ROOT

TEXT = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
HEADING = "| family | `model_type` | trained by | answered by | template | checked how | measured where |"
ROWS = {
    cells[1].strip("`"): cells
    for line in TEXT.split(HEADING)[1].split("\n\n")[0].splitlines()[2:]
    for cells in [[cell.strip() for cell in line.strip("|").split("|")]]
}


def test_the_families_are_those_that_tests_go_through() -> None:
    """tests/train/test_ways.py and tests/generate/test_ways.py go through every one of bases.ALL."""
    assert set(ROWS) == {kind for kind, _ in bases.ALL.values()}
    assert {kind for kind in ROWS if "own blocks" in ROWS[kind][2]} == set(OWN)
    assert all(len(cells) == 7 and all(cells) for cells in ROWS.values())


@pytest.mark.parametrize("kind", ROWS)
def test_a_familys_way_is_what_the_configuration_says(kind: str) -> None:
    spec = FamilySpec.from_config(bases.SIZES | {"model_type": kind})
    _, _, trained, answered, *_ = ROWS[kind]
    if spec.general is None:
        assert (trained, answered) == ("own blocks, Unsloth, PEFT", "own engine")
    else:
        assert (trained, answered) == ("PEFT's layers, row by row", "transformers' `generate`")


def test_the_ropes_are_those_that_decoding_knows() -> None:
    (said,) = re.findall(r"^\| rope \| (.*) \|$", TEXT, re.MULTILINE)
    assert said == ", ".join(f"`{kind}`" for kind in families.STEADY_ROPE)
    config = bases.SIZES | {"model_type": "llama"}
    for kind in re.findall(r"`(\w+)`", said):
        assert FamilySpec.from_config(config | {"rope_parameters": {"rope_type": kind}}).general is None
    for kind in ("dynamic", "longrope"):
        assert f"`{kind}`" in TEXT
        assert FamilySpec.from_config(config | {"rope_parameters": {"rope_type": kind}}).general is not None
