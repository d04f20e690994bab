from __future__ import annotations

import json
import pickle
import warnings
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pipeline.errors import PipelineError
from pipeline.models.clip import ClipEncoder, background_embedding, load_clip, text_embeddings
from pipeline.models.clip.labels import label_embeddings
from pipeline.params.base import EncoderParams
from pipeline.vocabulary.categories import Names
from pipeline.vocabulary.prompts import NAME_ONLY, PROMPTS_85
from tests.paths import REFERENCE

CPU = torch.device("cpu")
CONFIG: dict[str, Any] = {
    "embed_dim": 48,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 64, "layers": 2, "width": 128, "patch_size": 16},
    "text_cfg": {"width": 128, "heads": 2, "layers": 1},
}
WORLD_NAMES = ["cat", "fire truck"]


def reference_state() -> dict[str, Tensor]:
    state = {
        name: tensor.float()
        for name, tensor in load_file(REFERENCE / "clip_tiny_vit16.weights.safetensors").items()
    }
    rows = torch.arange(49408)
    columns, blocks = state.pop("token_embedding.A"), state.pop("token_embedding.B")
    state["token_embedding.weight"] = columns[rows % 256] + blocks[rows // 256]
    return state


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("clip") / "tiny.safetensors"
    save_file(reference_state(), path)
    return path


@pytest.fixture(scope="module")
def encoder(weights: Path) -> ClipEncoder:
    return load_clip(
        EncoderParams(model=str(write_config(weights.parent)), pretrained=str(weights)), CPU
    )


def write_config(folder: Path, name: str = "config.json", **changes: Any) -> Path:
    path = folder / name
    path.write_text(json.dumps({**CONFIG, **changes}))
    return path


def cut_vocabulary(names: list[str]) -> list[int]:
    tokens = open_clip.SimpleTokenizer(context_length=77)(
        [template.format(name) for template in PROMPTS_85 for name in names]
    )
    return sorted(set(tokens.flatten().tolist()))


def write_cut_clip(folder: Path, **changes: Any) -> tuple[Path, Path]:
    """The reference network with its vocabulary cut to the prompts of WORLD_NAMES."""
    vocabulary = cut_vocabulary(WORLD_NAMES)
    text = {**CONFIG["text_cfg"], "vocab_size": len(vocabulary)}
    config = write_config(
        folder, "cut.json", **{"text_cfg": text, "vocabulary": vocabulary} | changes
    )
    state = reference_state()
    state["token_embedding.weight"] = state["token_embedding.weight"][vocabulary].contiguous()
    save_file(state, folder / "cut.safetensors")
    return config, folder / "cut.safetensors"


def assert_close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    assert actual.shape == expected.shape
    assert actual.dtype == torch.float32
    assert (actual - expected).abs().max() < tolerance


class TestText:
    def test_label_embeddings_put_the_averaged_background_first(self, encoder: ClipEncoder) -> None:
        background, names = ["sky", "grass"], ["cat", "dog"]
        labels = label_embeddings(encoder, Names(names, background), NAME_ONLY)
        mean = text_embeddings(encoder, background, NAME_ONLY).mean(dim=0)
        assert torch.allclose(labels[0], mean / mean.norm(), atol=1e-6)
        assert torch.equal(labels[0], background_embedding(encoder, background, NAME_ONLY))
        assert torch.equal(labels[1:], text_embeddings(encoder, names, NAME_ONLY))

    def test_cut_vocabulary_gives_the_embeddings_of_the_full_one(
        self, encoder: ClipEncoder, tmp_path: Path
    ) -> None:
        config, weights = write_cut_clip(tmp_path)
        cut = load_clip(EncoderParams(model=str(config), pretrained=str(weights)), CPU)
        actual = text_embeddings(cut, WORLD_NAMES, PROMPTS_85)
        assert_close(actual, text_embeddings(encoder, WORLD_NAMES, PROMPTS_85), 1e-6)

    def test_a_word_outside_the_cut_vocabulary_is_named(self, tmp_path: Path) -> None:
        config, weights = write_cut_clip(tmp_path)
        cut = load_clip(EncoderParams(model=str(config), pretrained=str(weights)), CPU)
        with pytest.raises(PipelineError, match=r"'zebra' of 'a fire zebra'.*vocabulary was cut"):
            cut.encode_texts(["fire truck", "a fire zebra"])

    @pytest.mark.parametrize(
        "vocabulary", [[49406, 49407], [0, 49407, 49406], [0, 5, 5, 49406, 49407]]
    )
    def test_a_bad_vocabulary_is_refused(self, tmp_path: Path, vocabulary: list[int]) -> None:
        config, weights = write_cut_clip(tmp_path, vocabulary=vocabulary)
        with pytest.raises(PipelineError, match=r"cut\.json: vocabulary must be sorted"):
            load_clip(EncoderParams(model=str(config), pretrained=str(weights)), CPU)

    def test_a_vocabulary_of_another_size_than_the_tower_is_refused(self, tmp_path: Path) -> None:
        config, weights = write_cut_clip(tmp_path, vocabulary=[0, 49406, 49407])
        with pytest.raises(PipelineError, match=r"3 tokens in vocabulary.*vocab_size"):
            load_clip(EncoderParams(model=str(config), pretrained=str(weights)), CPU)


class TestImages:
    @pytest.mark.parametrize("size", [(90, 70), (64, 64), (40, 200), (1, 1)])
    def test_preprocess_is_open_clips_without_normalisation(
        self, encoder: ClipEncoder, size: tuple[int, int]
    ) -> None:
        pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        image = Image.fromarray(pixels)
        prepared = encoder.preprocess(image)
        assert prepared.shape == (3, 64, 64)
        assert prepared.min() >= 0
        assert prepared.max() <= 1
        expected = open_clip.image_transform(64, is_train=False)(image)
        assert torch.allclose(encoder.normalise(prepared[None])[0], expected, atol=1e-6)

    def test_own_mean_and_std_are_used(self, weights: Path, tmp_path: Path) -> None:
        own = {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.5, 1.0], "size": 64}
        encoder = load_clip(
            EncoderParams(
                model=str(write_config(tmp_path, preprocess=own)), pretrained=str(weights)
            ),
            CPU,
        )
        assert encoder.normalise(torch.ones(1, 3, 1, 1)).flatten().tolist() == [2.0, 1.0, 0.5]

    def test_a_preprocess_size_of_another_network_is_refused(
        self, weights: Path, tmp_path: Path
    ) -> None:
        config = write_config(tmp_path, preprocess={"size": 96})
        with pytest.raises(PipelineError, match=r"preprocess\.size 96 is not the network's 64"):
            load_clip(EncoderParams(model=str(config), pretrained=str(weights)), CPU)

    def test_attributes(self, encoder: ClipEncoder) -> None:
        assert (encoder.embed_dim, encoder.image_size, encoder.patch_size) == (48, 64, 16)
        assert encoder.logit_scale == pytest.approx(float(reference_state()["logit_scale"].exp()))
        assert not encoder.clip.training

    @pytest.mark.parametrize(
        ("size", "grid"), [((64, 64), (4, 4)), ((70, 33), (5, 3)), ((1, 1), (1, 1))]
    )
    def test_patch_features_cover_images_of_any_size(
        self, encoder: ClipEncoder, size: tuple[int, int], grid: tuple[int, int]
    ) -> None:
        images = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(0))
        for facet in ("key", "value", "token"):
            assert encoder.patch_features(images, facet=facet).shape == (2, 128, *grid)

    def test_patch_features_are_those_of_open_clip(self, encoder: ClipEncoder) -> None:
        images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
        blocks = encoder.clip.visual.transformer.resblocks
        tokens = encoder.clip.visual.forward_intermediates(
            encoder.normalise(images), intermediates_only=True
        )["image_intermediates"]
        for layer in (0, 1, -1):
            actual = encoder.patch_features(images, layer=layer, facet="token")
            assert torch.allclose(actual, tokens[layer], atol=1e-5)
        normed = blocks[1].ln_1(tokens[0].permute(0, 2, 3, 1))
        for facet, rows in (("key", slice(128, 256)), ("value", slice(256, 384))):
            expected = normed @ blocks[1].attn.in_proj_weight[rows].T
            expected = expected + blocks[1].attn.in_proj_bias[rows]
            actual = encoder.patch_features(images, facet=facet).permute(0, 2, 3, 1)
            assert torch.allclose(actual, expected, atol=1e-5)

    def test_a_strip_of_as_many_patches_as_the_native_grid_has_its_own_positions(
        self, encoder: ClipEncoder
    ) -> None:
        """Positions that tell rows alone do so at every grid: columns of a grey image are alike."""
        encoder = deepcopy(encoder)
        positions = encoder.clip.visual.positional_embedding
        rows = torch.linspace(-1, 1, 4).repeat_interleave(4)
        with torch.no_grad():
            positions[1:] = rows[:, None] * torch.linspace(-1, 1, positions.shape[1])
        [tokens] = encoder.patch_features(torch.full((1, 3, 32, 128), 0.5), facet="token")
        assert tokens.shape[1:] == (2, 8)
        torch.testing.assert_close(tokens, tokens[..., :1].expand_as(tokens), rtol=0, atol=1e-5)
        assert not torch.allclose(tokens[:, :1], tokens[:, -1:], atol=1e-2)

    def test_a_layer_beyond_the_last_is_refused(self, encoder: ClipEncoder) -> None:
        with pytest.raises(PipelineError, match="layer: 2 does not exist; this ViT has 2 blocks"):
            encoder.patch_features(torch.zeros(1, 3, 64, 64), layer=2)


class TestQuickGelu:
    IMAGES = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))

    def test_it_changes_the_features(
        self, encoder: ClipEncoder, weights: Path, tmp_path: Path
    ) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            plain = load_clip(
                EncoderParams(
                    model=str(write_config(tmp_path, quick_gelu=False)), pretrained=str(weights)
                ),
                CPU,
            )
        difference = plain.encode_images(self.IMAGES) - encoder.encode_images(self.IMAGES)
        assert difference.abs().max() > 1e-3

    def test_openais_scalars_switch_it_on_with_a_warning(
        self, encoder: ClipEncoder, tmp_path: Path
    ) -> None:
        scalars = {"input_resolution": 64, "context_length": 77, "vocab_size": 49408}
        path = tmp_path / "any-name.pt"
        torch.save(reference_state() | {k: torch.tensor(v) for k, v in scalars.items()}, path)
        with pytest.warns(UserWarning, match='QuickGELU.*"quick_gelu": true'):
            loaded = load_clip(
                EncoderParams(
                    model=str(write_config(tmp_path, quick_gelu=False)), pretrained=str(path)
                ),
                CPU,
            )
        assert torch.equal(loaded.encode_images(self.IMAGES), encoder.encode_images(self.IMAGES))

    def test_openais_file_names_switch_it_on(self, encoder: ClipEncoder, tmp_path: Path) -> None:
        path = tmp_path / "ViT-B-16.safetensors"
        save_file(reference_state(), path)
        with pytest.warns(UserWarning, match="QuickGELU"):
            loaded = load_clip(
                EncoderParams(
                    model=str(write_config(tmp_path, quick_gelu=False)), pretrained=str(path)
                ),
                CPU,
            )
        assert torch.equal(loaded.encode_images(self.IMAGES), encoder.encode_images(self.IMAGES))

    def test_a_tag_trained_with_it_switches_it_on(
        self,
        encoder: ClipEncoder,
        weights: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        write_config(tmp_path, "Tiny-16.json", quick_gelu=False)
        write_config(tmp_path, "Tiny-16-quickgelu.json")
        monkeypatch.setattr(open_clip.factory, "_MODEL_CONFIG_PATHS", [tmp_path])
        monkeypatch.setattr(open_clip.factory, "_MODEL_CONFIGS", {})
        open_clip.add_model_config(tmp_path)
        tag = {"file": str(weights), "quick_gelu": True}
        for name in ("Tiny-16", "Tiny-16-quickgelu"):
            monkeypatch.setitem(open_clip.pretrained._PRETRAINED, name, {"openai": tag})
        with pytest.warns(UserWarning, match=r"QuickGELU.*write Tiny-16-quickgelu"):
            plain = load_clip(EncoderParams(model="Tiny-16", pretrained="openai"), CPU)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            named = load_clip(
                EncoderParams(model="open_clip:Tiny-16-quickgelu/openai", pretrained=""), CPU
            )
        expected = encoder.encode_images(self.IMAGES)
        assert torch.equal(plain.encode_images(self.IMAGES), expected)
        assert torch.equal(named.encode_images(self.IMAGES), expected)


def scripted(state: dict[str, Tensor]) -> torch.jit.ScriptModule:
    """A TorchScript module with this state dict, as OpenAI distributes CLIP."""
    root = nn.Module()
    for name, tensor in state.items():
        *parents, leaf = name.split(".")
        module = root
        for parent in parents:
            if parent not in module._modules:
                module.add_module(parent, nn.Module())
            module = module.get_submodule(parent)
        module.register_buffer(leaf, tensor)
    return torch.jit.script(root)


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
class TestWeightFiles:
    @pytest.mark.parametrize("kind", ["pt", "half", "wrapped", "torchscript"])
    def test_every_layout_gives_the_same_network(
        self, encoder: ClipEncoder, tmp_path: Path, kind: str
    ) -> None:
        path = tmp_path / "weights.pt"
        state = reference_state()
        if kind == "pt":
            torch.save(state, path)
        elif kind == "half":  # lossless: the reference weights lie on the float16 grid
            halves = {name: t.half() for name, t in state.items() if "token_emb" not in name}
            torch.save(state | halves, path)
        elif kind == "wrapped":
            wrapped = {f"module.{name}": tensor for name, tensor in state.items()}
            torch.save({"epoch": 3, "state_dict": wrapped}, path)
        else:
            torch.jit.save(scripted(state), path)
        loaded = load_clip(
            EncoderParams(model=str(write_config(tmp_path)), pretrained=str(path)), CPU
        )
        assert loaded.fingerprint() == encoder.fingerprint()

    def test_the_fingerprint_sees_weights_and_configuration(
        self, encoder: ClipEncoder, weights: Path, tmp_path: Path
    ) -> None:
        state = reference_state()
        state["visual.proj"][0, 0] += 1
        save_file(state, tmp_path / "other.safetensors")
        config = str(write_config(tmp_path))
        other = load_clip(
            EncoderParams(model=config, pretrained=str(tmp_path / "other.safetensors")), CPU
        )
        own = {"mean": [0.5, 0.5, 0.5]}
        mean = load_clip(
            EncoderParams(
                model=str(write_config(tmp_path, preprocess=own)), pretrained=str(weights)
            ),
            CPU,
        )
        assert len({encoder.fingerprint(), other.fingerprint(), mean.fingerprint()}) == 3

    def test_another_architecture_is_refused_with_its_keys(
        self, weights: Path, tmp_path: Path
    ) -> None:
        vision = {**CONFIG["vision_cfg"], "layers": 3, "patch_size": 8}
        with pytest.raises(PipelineError) as error:
            load_clip(
                EncoderParams(
                    model=str(write_config(tmp_path, vision_cfg=vision)), pretrained=str(weights)
                ),
                CPU,
            )
        message = str(error.value)
        assert str(weights) in message
        assert "visual.transformer.resblocks.2.ln_1.weight" in message
        assert "visual.conv1.weight" in message
        vision = {**CONFIG["vision_cfg"], "layers": 1}
        with pytest.raises(PipelineError, match=r"unexpected .*resblocks\.1\."):
            load_clip(
                EncoderParams(
                    model=str(write_config(tmp_path, vision_cfg=vision)), pretrained=str(weights)
                ),
                CPU,
            )

    @pytest.mark.parametrize("name", ["x.safetensors", "x.pt"])
    def test_a_damaged_file_is_refused(self, tmp_path: Path, name: str) -> None:
        (tmp_path / name).write_bytes(b"PK\x03\x04 not weights")
        with pytest.raises(PipelineError, match=name):
            load_clip(
                EncoderParams(model=str(write_config(tmp_path)), pretrained=str(tmp_path / name)),
                CPU,
            )

    def test_code_in_a_pickle_is_not_run(self, tmp_path: Path) -> None:
        class Evil:
            def __reduce__(self) -> tuple[Any, ...]:
                return (Path.touch, (tmp_path / "ran",))

        (tmp_path / "evil.pt").write_bytes(pickle.dumps({"weight": Evil()}, protocol=2))
        with pytest.raises(PipelineError, match=r"evil\.pt: cannot be read as weights"):
            load_clip(
                EncoderParams(
                    model=str(write_config(tmp_path)), pretrained=str(tmp_path / "evil.pt")
                ),
                CPU,
            )
        assert not (tmp_path / "ran").exists()

    def test_a_list_is_no_state_dict(self, tmp_path: Path) -> None:
        torch.save([torch.zeros(1)], tmp_path / "list.pt")
        with pytest.raises(PipelineError, match=r"list\.pt.*state_dict"):
            load_clip(
                EncoderParams(
                    model=str(write_config(tmp_path)), pretrained=str(tmp_path / "list.pt")
                ),
                CPU,
            )


class TestNames:
    @pytest.mark.parametrize(
        ("model", "pretrained", "words"),
        [
            ("ViT-B-61", "openai", ["ViT-B-61", "did you mean", "list_models"]),
            ("ViT-B-16", "openia", ["openia", "did you mean openai", "list_pretrained"]),
            ("ViT-B-16-quickgelu", "laion2b_s34b_b88k", ["that tag belongs to ViT-B-16, "]),
            ("ViT-B-16", "weights/none.pt", ["weights/none.pt", "no such weights file"]),
            ("ViT-B-16", "", ["encoder.pretrained: empty"]),
            ("none.json", "openai", ["none.json", "no such model-config file"]),
            ("open_clip:ViT-B-32/nope", "", ["'nope'", "ViT-B-32"]),
            ("open_clip:ViT-B-32/openai", "other", ["contradicts", "open_clip:ViT-B-32/openai"]),
        ],
    )
    def test_an_unknown_one_is_refused_with_close_matches(
        self, model: str, pretrained: str, words: list[str]
    ) -> None:
        with pytest.raises(PipelineError) as error:
            load_clip(EncoderParams(model=model, pretrained=pretrained), CPU)
        assert [word for word in words if word not in str(error.value)] == []

    @pytest.mark.parametrize(
        ("model", "pretrained"),
        [("ViT-B-32", "laion2b_s34b_b79k"), ("open_clip:ViT-B-32/laion2b_s34b_b79k", "")],
    )
    def test_without_a_network_the_error_says_how_to_use_a_file(
        self, monkeypatch: pytest.MonkeyPatch, model: str, pretrained: str
    ) -> None:
        def no_network(*_: Any, **__: Any) -> str:
            raise OSError("no route to host")

        monkeypatch.setattr(open_clip, "download_pretrained", no_network)
        with pytest.raises(PipelineError) as error:
            load_clip(EncoderParams(model=model, pretrained=pretrained), CPU)
        message = str(error.value)
        assert "'laion2b_s34b_b79k' of ViT-B-32" in message
        assert "no route to host" in message
        assert "set encoder.pretrained to its path" in message

    @pytest.mark.parametrize(
        ("content", "words"),
        [("{", "not valid JSON"), ('{"embed_dim": 4}', "vision_cfg, text_cfg missing")],
    )
    def test_a_bad_config_file_is_refused(
        self, weights: Path, tmp_path: Path, content: str, words: str
    ) -> None:
        (tmp_path / "bad.json").write_text(content)
        with pytest.raises(PipelineError, match=f"bad.json.*{words}"):
            load_clip(EncoderParams(model=str(tmp_path / "bad.json"), pretrained=str(weights)), CPU)

    def test_a_config_file_with_a_foreign_tokenizer_is_refused(
        self, weights: Path, tmp_path: Path
    ) -> None:
        text = {**CONFIG["text_cfg"], "hf_tokenizer_name": "bert-base-uncased"}
        with pytest.raises(PipelineError, match=r"config\.json.*bert-base-uncased"):
            load_clip(
                EncoderParams(
                    model=str(write_config(tmp_path, text_cfg=text)), pretrained=str(weights)
                ),
                CPU,
            )

    def test_an_unknown_config_field_is_refused(self, weights: Path, tmp_path: Path) -> None:
        vision = {**CONFIG["vision_cfg"], "depth": 3}
        with pytest.raises(PipelineError, match=r"config\.json.*depth"):
            load_clip(
                EncoderParams(
                    model=str(write_config(tmp_path, vision_cfg=vision)), pretrained=str(weights)
                ),
                CPU,
            )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (None, "embed_dim, vision_cfg, text_cfg missing"),
        ({"vision_cfg": [1]}, "vision_cfg missing or of another type"),
        ({"preprocess": {"mean": "x"}}, "mean and std are three numbers"),
        ({"vision_cfg": {"layers": 1, "width": 8, "head_width": 0}}, "cannot build it"),
    ],
)
def test_a_model_config_with_wrong_values_is_named(
    tmp_path: Path, tiny_clip: tuple[Path, Path], change: dict[str, Any] | None, message: str
) -> None:
    model, weights = tiny_clip
    content = 3 if change is None else json.loads(model.read_text()) | change
    (tmp_path / "wrong.json").write_text(json.dumps(content))
    with pytest.raises(PipelineError, match=rf"encoder\.model: .*wrong\.json: .*{message}"):
        load_clip(
            EncoderParams(model=str(tmp_path / "wrong.json"), pretrained=str(weights)),
            torch.device("cpu"),
        )
