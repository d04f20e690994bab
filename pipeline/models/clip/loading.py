"""Build a CLIP by open_clip and load its weights, from a tag, a zoo name or a file."""

from __future__ import annotations

import difflib
import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.convert import convert_state_dict
from open_clip.model import convert_to_custom_text_state_dict
from open_clip.transform import PreprocessCfg, merge_preprocess_dict
from torch import Tensor, nn

from pipeline.errors import PipelineError, first_line
from pipeline.models.clip.encoder import ClipEncoder
from pipeline.models.clip.features import square_side
from pipeline.models.clip.photo_clip import CONFIG_PATH as PHOTO_CLIP_CONFIG
from pipeline.models.clip.photo_clip import NAME as PHOTO_CLIP
from pipeline.models.clip.photo_clip import package_file, read_fetched, read_package
from pipeline.models.clip.tokenizer import load_tokenizer
from pipeline.models.weights.weights import load_strict, read_weights
from pipeline.models.weights.zoo import (
    CLIP_KINDS,
    cached_clip,
    cached_path,
    is_cached,
    manifest,
    published,
    published_clip,
    resolve_weights,
)
from pipeline.params.base import EncoderParams

MODEL_PREFIX = "open_clip:"
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
OWN_CONFIG_KEYS = ("vocabulary", "names", "preprocess")
COUNTER = ".num_batches_tracked"
POSITION_IDS = "text.transformer.embeddings.position_ids"
LIST_MODELS_HINT = 'python -c "import open_clip; print(open_clip.list_models())"'
LIST_TAGS_HINT = 'python -c "import open_clip; print(open_clip.list_pretrained(True))"'


def load_clip(
    encoder: EncoderParams, device: torch.device, *, cache_dir: Path | None = None
) -> ClipEncoder:
    """Build a CLIP and load its weights.

    Its `model` is an open_clip architecture (`ViT-B-16-quickgelu`), clip-retrieval's
    `open_clip:ARCHITECTURE/TAG` (then `pretrained` is empty), or the path of a model-config JSON
    file of open_clip's form (embed_dim, vision_cfg, text_cfg, quick_gelu). Such a file may also
    hold `vocabulary` (sorted BPE token ids that the text tower was cut to) and `preprocess` (mean,
    std, size), and `names`, a closed list that other names are refused by. `photo_clip` is such a
    file of our own. `pretrained` is an open_clip tag (`openai`), the path of a weights file in
    open_clip's or OpenAI's layout (.safetensors, .pt, .pth, .bin), or a name of
    `pipeline weights list`; `photo_clip` is put together from its package where it is not fetched.

    Args:
        encoder: model and weights.
        device: where the encoder goes.
        cache_dir: the cache folder. Weights of a tag that `pipeline weights` has put there are
            read from there, without a network; those of other tags, and all if it is None, are
            downloaded by open_clip to its own folder.

    OpenAI's weights need QuickGELU: where the architecture lacks it, it is switched on with a
    warning.

    Raises:
        PipelineError: unknown architecture or tag, unreadable file, weights of another
            architecture, or no network.
    """
    model, pretrained = _split_model_string(encoder.model, encoder.pretrained)
    local = model.endswith(".json")
    config = clip_config(encoder)
    weights = _find_weights(model, pretrained, local=local, cache_dir=cache_dir)
    state = weights.read(weights.path)
    quick_gelu = weights.quick_gelu or _is_openai_checkpoint(weights.path, state)
    if quick_gelu and not config.get("quick_gelu", False):
        config["quick_gelu"] = True
        wanted = f'"quick_gelu": true in {model}' if local else f"{model}{QUICK_GELU_SUFFIX}"
        warnings.warn(
            f"encoder.model: {model} lacks QuickGELU, with which the weights {pretrained} were "
            f"trained, so it was switched on; write {wanted}",
            stacklevel=2,
        )
    clip = _build(config, source=model)
    load_strict(clip, to_open_clip_layout(clip, state), f"{pretrained} (encoder.model: {model})")
    loaded = ClipEncoder(
        clip,
        config=config,
        preprocess=_preprocess_config(clip, config, weights.preprocess, source=model),
        tokenizer=load_tokenizer(config, name="" if local else model, source=model),
        source=encoder.model,
    )
    return loaded.to(device)


def clip_config(encoder: EncoderParams) -> dict[str, Any]:
    """What is known of a CLIP without its weights: `embed_dim`, `names` of a closed list and so on.

    Raises:
        PipelineError: unknown architecture, unreadable file.
    """
    model, _ = _split_model_string(encoder.model, encoder.pretrained)
    return _read_config(Path(model)) if model.endswith(".json") else _named_config(model)


@dataclass(frozen=True)
class _Weights:
    """A weights file and what open_clip knows of its tag."""

    path: Path
    read: Callable[[Path], dict[str, Tensor]] = read_weights
    quick_gelu: bool = False
    preprocess: dict[str, Any] | None = None


def _split_model_string(model: str, pretrained: str) -> tuple[str, str]:
    """Resolve `photo_clip` and clip-retrieval's `open_clip:ARCHITECTURE/TAG`."""
    if model == PHOTO_CLIP:
        return str(PHOTO_CLIP_CONFIG), pretrained
    if not model.startswith(MODEL_PREFIX):
        return model, pretrained
    architecture, _, tag = model.removeprefix(MODEL_PREFIX).partition("/")
    if tag and pretrained and tag != pretrained:
        raise PipelineError(
            f"encoder.pretrained: {pretrained!r} contradicts encoder.model: {model!r}; leave it ''"
        )
    return architecture, tag or pretrained


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
        close = difflib.get_close_matches(name, open_clip.list_models(), n=3, cutoff=0.4)
        hint = f"did you mean {' or '.join(close)}? " if close else ""
        raise PipelineError(
            f"encoder.model: {name!r} is no architecture of open_clip {open_clip.__version__} and "
            f"no .json file; {hint}All: {LIST_MODELS_HINT}"
        )
    return dict(config)


def _find_weights(model: str, pretrained: str, *, local: bool, cache_dir: Path | None) -> _Weights:
    """The file of a tag (downloaded if need be), of a published name or of a path."""
    if not pretrained:
        raise PipelineError("encoder.pretrained: empty; name an open_clip tag or a weights file")
    tag = {} if local else open_clip.get_pretrained_cfg(model, pretrained)
    if tag:
        cached = None if cache_dir is None else cached_clip(model, pretrained, cache_dir)
        path = cached or _download(model, pretrained, tag)
        return _Weights(path=path, quick_gelu=tag.get("quick_gelu", False), preprocess=tag)
    if pretrained == PHOTO_CLIP:
        return _photo_clip_weights(cache_dir)
    path = Path(pretrained) if cache_dir is None else resolve_weights(pretrained, cache_dir)
    if path.is_file():
        tag = _tag_of_published(pretrained)
        return _Weights(path=path, quick_gelu=tag.get("quick_gelu", False), preprocess=tag)
    if local or path.suffix in (".safetensors", ".pt", ".pth", ".bin") or len(path.parts) > 1:
        raise PipelineError(f"encoder.pretrained: {pretrained}: no such weights file")
    raise _unknown_tag(model, pretrained)


def _tag_of_published(name: str) -> dict[str, Any]:
    """What open_clip knows of published weights of a name; empty for others."""
    entry = manifest().get(name)
    if entry is None or entry.kind not in CLIP_KINDS:
        return {}
    architecture = entry.architecture
    return dict(open_clip.get_pretrained_cfg(architecture["model"], architecture["tag"]))


def _photo_clip_weights(cache_dir: Path | None) -> _Weights:
    """The fetched copy, or else the package's file."""
    entry = published(PHOTO_CLIP)
    if cache_dir is not None and is_cached(entry, cache_dir):
        return _Weights(path=cached_path(entry, cache_dir), read=read_fetched)
    return _Weights(path=package_file(), read=read_package)


def _unknown_tag(model: str, tag: str) -> PipelineError:
    known = open_clip.list_pretrained_tags_by_model(model)
    elsewhere = open_clip.list_pretrained_models_by_tag(tag)
    close = difflib.get_close_matches(tag, known, n=3, cutoff=0.4)
    hint = f"did you mean {' or '.join(close)}? " if close else ""
    if elsewhere:
        near = difflib.get_close_matches(model, elsewhere, n=3, cutoff=0.0)
        hint = f"that tag belongs to {', '.join(near)}. "
    return PipelineError(
        f"encoder.pretrained: {tag!r} is no file and no tag of {model}; {hint}Tags of {model}: "
        f"{', '.join(known) or 'none'}. All: {LIST_TAGS_HINT}"
    )


def _download(model: str, tag: str, config: dict[str, Any]) -> Path:
    try:
        return Path(open_clip.download_pretrained(config))
    except Exception as error:  # the hub and urllib raise many kinds; all mean "not downloaded"
        published = published_clip(model, tag)
        by_name = f", or run `pipeline weights add {published.name} FILE`" if published else ""
        raise PipelineError(
            f"encoder.pretrained: could not download the weights {tag!r} of {model} "
            f"({type(error).__name__}: {first_line(error)}). Without a network, fetch the file "
            "elsewhere and set encoder.pretrained to its path (.safetensors or .pt)" + by_name
        ) from None


def _is_openai_checkpoint(path: Path, state: dict[str, Tensor]) -> bool:
    return path.stem in OPENAI_FILE_STEMS or any(name in state for name in OPENAI_SCALARS)


def _build(config: dict[str, Any], *, source: str) -> nn.Module:
    """An open_clip model with random weights; nothing is downloaded."""
    settings = {key: value for key, value in config.items() if key not in OWN_CONFIG_KEYS}
    custom_text = settings.pop("custom_text", False)
    if "timm_model_name" in settings["vision_cfg"]:
        settings["vision_cfg"] = {**settings["vision_cfg"], "timm_model_pretrained": False}
    if "hf_model_name" in settings["text_cfg"]:
        settings["text_cfg"] = {**settings["text_cfg"], "hf_model_pretrained": False}
        custom_text = True
    model_class = open_clip.CLIP
    if custom_text:
        model_class = open_clip.CoCa if "multimodal_cfg" in settings else open_clip.CustomTextCLIP
    try:
        return model_class(**settings)
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
    unknown = sorted(set(own) - {"mean", "std", "size"})
    if unknown:
        raise PipelineError(f"encoder.model: {source}: unknown preprocess keys {unknown}")
    if any(not _is_colour(own[name]) for name in ("mean", "std") if name in own):
        raise PipelineError(f"encoder.model: {source}: preprocess: mean and std are three numbers")
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
