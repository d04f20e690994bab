"""What sections of params.yaml are made of: the base class, and types of values."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, Strict

from pipeline.files import as_location

RelaxedPath = Annotated[Path, Strict(False)]
# A path or a URL, see `pipeline.files.as_location`.
RelaxedLocation = Annotated[Any, BeforeValidator(as_location), PlainSerializer(str)]
Probability = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[float, Field(gt=0.0)]
Count = Annotated[int, Field(ge=1)]
Workers = Annotated[int, Field(ge=0)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
# Names of entries become file names and words of commands (dvc.yaml).
EntryName = Annotated[str, Field(pattern=r"^\w[\w.-]*$")]
Text = Annotated[str, Field(pattern=r"\S")]


class Section(BaseModel):
    """A group of params: frozen, strict, without unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class EncoderParams(Section):
    """A CLIP model.

    `model` is an open_clip architecture or a model-config JSON file; `pretrained` an open_clip tag,
    a weights file, or a name of `pipeline weights list`. For `mask.encoder`, `model` may also be
    `dino_vits8` or `dino_vits16`, with `pretrained` empty for the published weights.
    """

    model: str = "ViT-B-16-quickgelu"
    pretrained: str = "openai"
