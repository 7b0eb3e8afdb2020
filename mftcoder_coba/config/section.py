"""What the sections of a config are made of."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

# Names become folder names and metric keys: they may not leave their folder nor hide in it.
SafeName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9._-]*$", max_length=128)]
Positive = Annotated[int, Field(ge=1)]


class Section(BaseModel):
    """Unknown keys are errors, values are not silently converted, and a loaded config does not change."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)
