"""Checkpoints of students: weights, and what they are of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from torch import nn

from pipeline.errors import PipelineError
from pipeline.files import atomic_path, read_json, write_json
from pipeline.models.weights.weights import save_tensors
from pipeline.params.base import EncoderParams
from pipeline.vocabulary.prompts import TEMPLATE_SETS

WEIGHTS_NAME = "model.safetensors"
CONFIG_NAME = "config.json"
DEFAULT_STUDENT = "zutis"  # what a checkpoint is that does not say


def save_checkpoint(folder: Path, model: nn.Module, config: Mapping[str, Any]) -> None:
    """Write `model.safetensors` and `config.json`; neither changes unless both could be written.

    Args:
        folder: made if absent; other files in it stay.
        model: its state dict is stored, under its own keys.
        config: JSON-serialisable: architecture, categories, step, settings.
    """
    tensors = {name: value.detach().cpu() for name, value in model.state_dict().items()}
    folder = Path(folder)
    with (
        atomic_path(folder / CONFIG_NAME) as config_path,
        atomic_path(folder / WEIGHTS_NAME) as weights_path,
    ):
        save_tensors(tensors, weights_path)
        write_json(config_path, dict(config))


@dataclass(frozen=True)
class CheckpointConfig:
    """What `config.json` of a checkpoint says.

    Attributes:
        student: the kind of network, a name of `STUDENTS`; ZUTIS where nothing says so.
        architecture: what its network is built with.
        encoder: the CLIP that it came from, and whose text encoder it needs.
        categories: names it was trained with, in the order of the label ids from 1.
        background: names whose mean embedding is label id 0.
        templates: name of the prompt templates of its text embeddings.
        step: training steps made.
        logit_scale: factor of the logits in the cross-entropy that it was trained with.
        texts: what stands for a category in prompts, see `pipeline.vocabulary.categories.Names`.
    """

    student: str
    architecture: Mapping[str, Any]
    encoder: EncoderParams
    categories: list[str]
    background: list[str]
    templates: str
    step: int
    logit_scale: float = 1.0
    texts: Mapping[str, list[str]] = field(default_factory=dict)


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
        config = CheckpointConfig(
            student=str(content.get("student", DEFAULT_STUDENT)),
            architecture=dict(content["architecture"]),
            encoder=EncoderParams(
                model=content["encoder"]["model"], pretrained=content["encoder"]["pretrained"]
            ),
            categories=_names(content["categories"]),
            background=_names(content["background"]),
            templates=str(content["templates"]),
            step=int(content["step"]),
            logit_scale=float(content.get("logit_scale", 1.0)),
            texts={name: _names(words) for name, words in content.get("texts", {}).items()},
        )
    except KeyError as error:
        raise PipelineError(f"{path}: entry {error.args[0]!r} is missing; train again") from None
    except ValidationError:
        raise PipelineError(
            f"{path}: encoder: {content['encoder']}: expected as model a name, as pretrained a "
            "name or {tag: TAG, file: PATH}"
        ) from None
    except (AttributeError, TypeError, ValueError) as error:
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
