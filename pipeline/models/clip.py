"""CLIP by open_clip, the only module that imports it.

Letters: B images, N texts, T context length, C joint embedding, D tower width, S input side,
h x w patch grid, K categories, P prompts a category.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import open_clip
import torch
import torch.nn.functional as F
from open_clip.convert import convert_state_dict
from open_clip.model import convert_to_custom_text_state_dict
from open_clip.modified_resnet import ModifiedResNet as ModifiedResNet
from open_clip.transform import PreprocessCfg, image_transform_v2, merge_preprocess_dict
from open_clip.transformer import ResidualAttentionBlock
from open_clip.transformer import VisionTransformer as VisionTransformer
from PIL import Image
from torch import Tensor, nn

from pipeline.errors import PipelineError
from pipeline.models.tokens import embed_patches
from pipeline.models.weights import hash_tensors, load_strict, read_weights
from pipeline.models.zoo import cached_clip, published_clip, resolve_weights

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
VOCABULARY_SPECIALS = (0, 49406, 49407)
OWN_CONFIG_KEYS = ("vocabulary", "preprocess")
COUNTER = ".num_batches_tracked"
POSITION_IDS = "text.transformer.embeddings.position_ids"
LIST_MODELS_HINT = 'python -c "import open_clip; print(open_clip.list_models())"'
LIST_TAGS_HINT = 'python -c "import open_clip; print(open_clip.list_pretrained(True))"'


class ClipEncoder(nn.Module):
    """A frozen CLIP in float32: images and texts to one embedding space.

    Attributes:
        clip: the open_clip model, in evaluation mode.
        preprocess: PIL image -> (3, S, S) float in [0, 1]: open_clip's evaluation transform
            (bicubic resize of the short side, centre crop) short of the normalisation.
        embed_dim: C.
        image_size: S.
        patch_size: pixels a token of the image tower stands for (32 for ResNets).
        mean, std: (1, 3, 1, 1) buffers, applied by every method that takes images in [0, 1].
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        clip: nn.Module,
        *,
        config: dict[str, Any],
        preprocess: PreprocessCfg,
        tokenizer: Callable[[list[str]], Tensor],
    ) -> None:
        super().__init__()
        self.clip: Any = clip.eval().requires_grad_(False)
        self.config = config
        self.embed_dim: int = config["embed_dim"]
        self.image_size = _side(preprocess.size)
        self.patch_size = _patch_size(self.visual)
        self.preprocess: Callable[[Image.Image], Tensor] = _transform(preprocess)
        self._tokenizer = tokenizer
        self.register_buffer("mean", torch.tensor(preprocess.mean).view(1, 3, 1, 1), False)
        self.register_buffer("std", torch.tensor(preprocess.std).view(1, 3, 1, 1), False)

    @property
    def visual(self) -> nn.Module:
        """The image tower."""
        return cast(nn.Module, self.clip.visual)

    @property
    def logit_scale(self) -> Tensor:
        """Factor of cosines in CLIP's softmax, already exponentiated; a scalar."""
        return cast(Tensor, self.clip.logit_scale.detach().exp().reshape(()))

    def normalise(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] -> the network's input."""
        return (images - self.mean) / self.std

    @torch.no_grad()
    def encode_images(self, images: Tensor) -> Tensor:
        """Images (B, 3, S, S) in [0, 1] -> unit embeddings (B, C), float32."""
        return F.normalize(self.clip.encode_image(self.normalise(images)).float(), dim=-1)

    def tokenize(self, texts: Sequence[str]) -> Tensor:
        """Texts -> token ids (N, T), int64, as the text tower expects them.

        Raises:
            PipelineError: a word lies outside the vocabulary that the weights were cut to.
        """
        return self._tokenizer(list(texts))

    @torch.no_grad()
    def encode_texts(self, texts: Sequence[str], batch: int = 256) -> Tensor:
        """Texts -> raw text features (N, C), float32, not normalised."""
        features = [
            self.clip.encode_text(tokens.to(self.mean.device)).float()
            for tokens in self.tokenize(texts).split(batch)
        ]
        return torch.cat(features)

    @torch.no_grad()
    def patch_features(
        self, images: Tensor, *, layer: int = -1, facet: Literal["key", "token"] = "key"
    ) -> Tensor:
        """Features of the patches of images of any size, for clustering.

        The input is zero-padded right and bottom (after normalisation) to a multiple of the patch
        size; position embeddings are resized to the grid.

        Args:
            images: (B, 3, H, W) in [0, 1].
            layer: block of a ViT; for a ResNet, one of its four stages.
            facet: "token": output of that block; "key": its attention keys, all heads side by side
                (for a ResNet, keys of the attention pooling, last stage only).

        Returns:
            (B, D, h, w), with h = ceil(H / patch), w = ceil(W / patch) for a ViT.
        """
        images = self.normalise(images)
        if isinstance(self.visual, ModifiedResNet):
            return _resnet_features(self.visual, images, layer=layer, facet=facet)
        return _vit_features(require_plain_vit(self.visual), images, layer=layer, facet=facet)

    def fingerprint(self) -> str:
        """SHA-256 of configuration and weights: changes whenever results may change."""
        hasher = hashlib.sha256(json.dumps(self.config, sort_keys=True).encode())
        hash_tensors(hasher, self.state_dict())
        hasher.update(json.dumps([self.mean.tolist(), self.std.tolist()]).encode())
        return hasher.hexdigest()


def load_clip(
    model: str, pretrained: str, device: torch.device, *, cache_dir: Path | None = None
) -> ClipEncoder:
    """Build a CLIP and load its weights.

    Args:
        model: an open_clip architecture (`ViT-B-16-quickgelu`), clip-retrieval's
            `open_clip:ARCHITECTURE/TAG` (then `pretrained` is empty), or the path of a model-config
            JSON file of open_clip's form (embed_dim, vision_cfg, text_cfg, quick_gelu). Such a file
            may also hold `vocabulary` (sorted BPE token ids that the text tower was cut to) and
            `preprocess` (mean, std, size).
        pretrained: an open_clip tag (`openai`), the path of a weights file in open_clip's or
            OpenAI's layout (.safetensors, .pt, .pth, .bin), or a name of `pipeline weights list`.
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
    model, pretrained = _split_model_string(model, pretrained)
    local = model.endswith(".json")
    config = _read_config(Path(model)) if local else _named_config(model)
    weights = _find_weights(model, pretrained, local=local, cache_dir=cache_dir)
    state = read_weights(weights.path)
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
    encoder = ClipEncoder(
        clip,
        config=config,
        preprocess=_preprocess_config(clip, config, weights.preprocess, source=model),
        tokenizer=_tokenizer(config, name="" if local else model, source=model),
    )
    return encoder.to(device)


@torch.no_grad()
def text_embeddings(encoder: ClipEncoder, names: Sequence[str], templates: Sequence[str]) -> Tensor:
    """Unit text embeddings (K, C), float32, one a name.

    Each of the P prompts of a name is encoded and normalised; their mean is normalised again
    (ZUTIS section 3.1, DenseCLIP section 4.1).

    Args:
        names: K category names.
        templates: P format strings with one `{}`.

    Raises:
        PipelineError: a name has a word outside the encoder's vocabulary.
    """
    encoder.tokenize(names)  # an unknown word is reported as the name that has it, not as a prompt
    prompts = [template.format(name) for name in names for template in templates]
    features = F.normalize(encoder.encode_texts(prompts), dim=-1)
    return F.normalize(features.unflatten(0, (len(names), len(templates))).mean(dim=1), dim=-1)


def background_embedding(
    encoder: ClipEncoder, names: Sequence[str], templates: Sequence[str]
) -> Tensor:
    """One unit embedding (C,) for several names of the background: mean over all, normalised."""
    return F.normalize(text_embeddings(encoder, names, templates).mean(dim=0), dim=-1)


def label_embeddings(
    encoder: ClipEncoder,
    *,
    background: Sequence[str],
    categories: Sequence[str],
    templates: Sequence[str],
) -> Tensor:
    """Unit embeddings (1 + K, C) by label id: the background's first, then the categories'."""
    return torch.cat(
        [
            background_embedding(encoder, background, templates).unsqueeze(0),
            text_embeddings(encoder, categories, templates),
        ]
    )


def pad_to_multiple(images: Tensor, multiple: int) -> Tensor:
    """Zero-pad (B, C, H, W) at the right and bottom until both sides are multiples."""
    height, width = images.shape[-2:]
    return F.pad(images, (0, -width % multiple, 0, -height % multiple))


def require_plain_vit(visual: nn.Module) -> VisionTransformer:
    """Return `visual` if it is a CLIP ViT with a class token.

    Raises:
        PipelineError: it is another kind of image tower.
    """
    if (
        isinstance(visual, VisionTransformer)
        and visual.attn_pool is None
        and isinstance(visual.transformer.resblocks[0], ResidualAttentionBlock)
    ):
        return visual
    raise PipelineError(
        f"encoder: patch features need CLIP's own ViT or ResNet, but this model's image tower is a "
        f"{type(visual).__name__}; use for example ViT-B-16-quickgelu or RN50-quickgelu"
    )


@dataclass(frozen=True)
class _Weights:
    """A weights file and what open_clip knows of its tag."""

    path: Path
    quick_gelu: bool = False
    preprocess: dict[str, Any] | None = None


class _VocabularyTokenizer:
    """CLIP's BPE tokenizer with ids renumbered by their index in a cut vocabulary."""

    def __init__(self, tokenizer: open_clip.SimpleTokenizer, vocabulary: list[int]) -> None:
        self._tokenizer = tokenizer
        self._index = {token: index for index, token in enumerate(vocabulary)}

    def __call__(self, texts: list[str]) -> Tensor:
        rows = self._tokenizer(texts).tolist()
        for text, row in zip(texts, rows, strict=True):
            if any(token not in self._index for token in row):
                raise self._unknown_word(text)
        return torch.tensor([[self._index[token] for token in row] for row in rows]).long()

    def _unknown_word(self, text: str) -> PipelineError:
        for word in text.split():
            if any(token not in self._index for token in self._tokenizer.encode(word)):
                break
        return PipelineError(
            f"categories or background: the word {word!r} of {text!r} is unknown to these weights: "
            "their vocabulary was cut to the words of the world they were trained in. Use names of "
            "that world, or the weights of a full CLIP (encoder.model, encoder.pretrained)"
        )


def _split_model_string(model: str, pretrained: str) -> tuple[str, str]:
    """Resolve clip-retrieval's `open_clip:ARCHITECTURE/TAG`."""
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
    path = Path(pretrained) if cache_dir is None else resolve_weights(pretrained, cache_dir)
    if path.is_file():
        return _Weights(path=path)
    if local or path.suffix in (".safetensors", ".pt", ".pth", ".bin") or len(path.parts) > 1:
        raise PipelineError(f"encoder.pretrained: {pretrained}: no such weights file")
    raise _unknown_tag(model, pretrained)


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
            f"({type(error).__name__}: {_first_line(error)}). Without a network, fetch the file "
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
            f"encoder.model: {source}: open_clip cannot build it: {_first_line(error)}"
        ) from None


def build_clip(model: str) -> nn.Module:
    """A named open_clip model with random weights.

    Raises:
        PipelineError: there is no such architecture; the message suggests others.
    """
    return _build(_named_config(model), source=model)


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
    side = _side(clip.visual.image_size)  # type: ignore[union-attr, arg-type]
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


def _transform(preprocess: PreprocessCfg) -> Callable[[Image.Image], Tensor]:
    settings = {**vars(preprocess), "mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
    return image_transform_v2(PreprocessCfg(**settings), is_train=False)  # type: ignore[no-any-return]


def _tokenizer(config: dict[str, Any], *, name: str, source: str) -> Callable[[list[str]], Tensor]:
    """The tokenizer of a named architecture, or of a config file (`name` is empty)."""
    if name:
        return _named_tokenizer(name)
    text_config = config["text_cfg"]
    foreign = text_config.get("hf_tokenizer_name") or text_config.get("hf_model_name")
    if foreign:
        raise PipelineError(
            f"encoder.model: {source}: the tokenizer {foreign} is not supported in a config file; "
            "use CLIP's own (leave the key out) or a named architecture of open_clip"
        )
    tokenizer = open_clip.SimpleTokenizer(context_length=text_config.get("context_length", 77))
    if "vocabulary" not in config:
        return tokenizer  # type: ignore[no-any-return]
    _check_vocabulary(config["vocabulary"], text_config.get("vocab_size"), source=source)
    return _VocabularyTokenizer(tokenizer, config["vocabulary"])


def _named_tokenizer(name: str) -> Callable[[list[str]], Tensor]:
    try:
        with _quiet_logging():
            return open_clip.get_tokenizer(name)  # type: ignore[no-any-return]
    except Exception as error:  # as in _download: some architectures fetch theirs from the hub
        raise PipelineError(
            f"encoder.model: could not get the tokenizer of {name} ({type(error).__name__}: "
            f"{_first_line(error)}); without a network, use an architecture with CLIP's own "
            "tokenizer, for example ViT-B-16-quickgelu"
        ) from None


def _check_vocabulary(vocabulary: list[int], vocab_size: int | None, *, source: str) -> None:
    if vocabulary != sorted(set(vocabulary)) or not set(VOCABULARY_SPECIALS) <= set(vocabulary):
        raise PipelineError(
            f"encoder.model: {source}: vocabulary must be sorted, without repeats, and contain "
            f"{VOCABULARY_SPECIALS} (padding, start and end of a text)"
        )
    if len(vocabulary) != vocab_size:
        raise PipelineError(
            f"encoder.model: {source}: {len(vocabulary)} tokens in vocabulary, but "
            f"text_cfg.vocab_size is {vocab_size}"
        )


def _vit_features(visual: VisionTransformer, images: Tensor, *, layer: int, facet: str) -> Tensor:
    images = pad_to_multiple(images, _patch_size(visual))
    tokens, grid = embed_patches(visual, images, position_resize="size")
    blocks = visual.transformer.resblocks
    if not -len(blocks) <= layer < len(blocks):
        raise PipelineError(f"layer: {layer} does not exist; this ViT has {len(blocks)} blocks")
    chosen = layer % len(blocks)
    for block in blocks[:chosen]:
        tokens = block(tokens)
    block = blocks[chosen]
    if facet == "key":
        _, weight, _ = block.attn.in_proj_weight.chunk(3)
        _, bias, _ = block.attn.in_proj_bias.chunk(3)
        tokens = F.linear(block.ln_1(tokens), weight, bias)
    else:
        tokens = block(tokens)
    return tokens[:, 1:].transpose(1, 2).unflatten(2, grid)


def _resnet_features(visual: ModifiedResNet, images: Tensor, *, layer: int, facet: str) -> Tensor:
    stages = [visual.layer1, visual.layer2, visual.layer3, visual.layer4]
    if not -len(stages) <= layer < len(stages):
        raise PipelineError(f"layer: {layer} does not exist; this ResNet has {len(stages)} stages")
    chosen = layer % len(stages)
    if facet == "key" and chosen != len(stages) - 1:
        raise PipelineError(f"layer: {layer}: a ResNet has keys in its last stage only; use -1")
    features = visual.stem(pad_to_multiple(images, 2 ** (2 + chosen)))
    for stage in stages[: chosen + 1]:
        features = stage(features)
    if facet == "key":
        keys = visual.attnpool.k_proj(features.flatten(2).transpose(1, 2))
        features = keys.transpose(1, 2).unflatten(2, features.shape[-2:])
    return features


def _patch_size(visual: nn.Module) -> int:
    if isinstance(visual, ModifiedResNet):
        return 32
    return _side(getattr(visual, "patch_size", 0))


def _side(size: int | Sequence[int]) -> int:
    """The side of a square given as int or (height, width)."""
    if isinstance(size, int):
        return size
    if len(set(size)) != 1:
        raise PipelineError(f"encoder.model: input of {tuple(size)} is not square")
    return size[0]


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]


@contextmanager
def _quiet_logging() -> Iterator[None]:
    """Keep open_clip's informational root-logger lines off the progress bars."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(level)
