"""What `config.json` of a checkpoint says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import PipelineError
from pipeline.files import read_json
from pipeline.models.zutis.build import CONFIG_NAME
from pipeline.vocabulary.prompts import TEMPLATE_SETS


@dataclass(frozen=True)
class CheckpointConfig:
    """What `config.json` of a checkpoint says.

    Attributes:
        architecture: keyword arguments of `build_zutis`.
        encoder_model: see `load_clip`; so is `encoder_pretrained`.
        categories: names it was trained with, in the order of the label ids from 1.
        background: names whose mean embedding is label id 0.
        templates: name of the prompt templates of its text embeddings.
        step: training steps made.
    """

    architecture: Mapping[str, Any]
    encoder_model: str
    encoder_pretrained: str
    categories: list[str]
    background: list[str]
    templates: str
    step: int


def read_checkpoint_config(checkpoint_dir: Path) -> CheckpointConfig:
    """Read `config.json` of a checkpoint.

    Raises:
        PipelineError: missing, or an entry is missing or of the wrong type; the message names it.
    """
    path = Path(checkpoint_dir) / CONFIG_NAME
    if not path.is_file():
        raise PipelineError(
            f"{path}: no such file; `pipeline train` writes a checkpoint, and "
            "`pipeline weights list` names published ones"
        )
    content = read_json(path)
    try:
        encoder = content["encoder"]
        config = CheckpointConfig(
            architecture=dict(content["architecture"]),
            encoder_model=str(encoder["model"]),
            encoder_pretrained=str(encoder["pretrained"]),
            categories=_names(content["categories"]),
            background=_names(content["background"]),
            templates=str(content["templates"]),
            step=int(content["step"]),
        )
    except KeyError as error:
        raise PipelineError(f"{path}: entry {error.args[0]!r} is missing; train again") from None
    except (TypeError, ValueError) as error:
        raise PipelineError(f"{path}: not the settings of a checkpoint ({error})") from None
    if config.templates not in TEMPLATE_SETS:
        raise PipelineError(
            f"{path}: templates {config.templates!r}: expected one of {', '.join(TEMPLATE_SETS)}"
        )
    return config


def _names(value: Any) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise TypeError(f"expected a list of names, found {value!r}")
    return value
