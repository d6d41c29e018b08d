"""The constants of the plan that were fitted on a card, from constants.json, which says where they come from.

`python -m bench.plan_fit SAMPLES --write` fits them again on samples (bench/plan_samples.py) and writes the file.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

PATH = Path(__file__).with_name("constants.json")
_CONTENT: dict[str, Any] = json.loads(PATH.read_text(encoding="utf-8"))
SOURCE: str = _CONTENT["source"]
MEMORY: dict[str, Any] = _CONTENT["memory"]
SECONDS: dict[str, float] = _CONTENT["seconds"]
