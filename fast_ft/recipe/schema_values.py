"""What a recipe's sections are made of: the section itself, and types of values that several sections have."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Count = Annotated[int, Field(ge=1)]
#: Whole numbers stay whole: a recipe of whole epochs keeps the digest that it has.
Epochs = Count | Annotated[float, Field(gt=0.0)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[float, Field(gt=0.0)]
NotNegative = Annotated[float, Field(ge=0.0)]
#: A condition on a metric: ">= 4.5", "150..450" (both ends included), a number or truth value to equal.
Condition = bool | float | str

METRICS = (
    "conversation_words", "prompt_words", "response_words",
    "conversation_tokens", "prompt_tokens", "response_tokens",
    "score", "ends_cleanly", "type_token_ratio", "length_missed",
)  # fmt: skip


class Section(BaseModel):
    """A part of a recipe: frozen, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), allow_inf_nan=False)
