"""All stages with a tiny network of every kind of image tower: from images to scores."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.benchmarks.voc import VocWriter
from pipeline.engine.runtime import Runtime
from pipeline.errors import PipelineError
from pipeline.files import read_json
from pipeline.inference.segmenter import Segmenter
from pipeline.methods.dense import DenseClipParams, load_dense_labeller
from pipeline.methods.masks import SpectralParams
from pipeline.models.weights.weights import load_state
from pipeline.params.benches import VocBench
from pipeline.params.sections import EmbedParams, EvaluateParams, RetrieveParams
from pipeline.params.sources import SourceParams
from pipeline.stages import embed, mask, pseudo_label, retrieve, train
from pipeline.vocabulary.categories import Names
from tests.conftest import encoded_image
from tests.formats.shard_folders import read_shards
from tests.stages.evaluating import evaluate
from tests.stages.tiny_training import small_params
from tests.tiny_encoders import KINDS, VISION, WITHOUT_KEYS, write_encoder

CATEGORIES = ["cat", "dog"]
BACKGROUND = ["background", "grass"]
NAMES = Names(CATEGORIES, BACKGROUND)


def square(number: int) -> tuple[Image.Image, np.ndarray[Any, np.dtype[np.uint8]]]:
    """An image 72 wide and 100 high of a square on noise, and where it is."""
    pixels = np.random.default_rng(number).integers(90, 130, (100, 72, 3), dtype=np.uint8)
    truth = np.zeros((100, 72), np.uint8)
    truth[30:70, 10 + number : 50 + number] = 1 + number % 2
    pixels[truth > 0] = [(250, 30, 30), (30, 30, 250)][number % 2]
    return Image.fromarray(pixels), truth


class World:
    """Folders of one run through all stages."""

    def __init__(self, root: Path, kind: str) -> None:
        self.root = root
        self.encoder = write_encoder(root, kind)
        self.runtime = Runtime(torch.device("cpu"), None, seed=0, cache_dir=root / "cache")
        (root / "images").mkdir()
        for number in range(6):
            data = encoded_image(square(number)[0])
            (root / "images" / f"{number}.png").write_bytes(data)

    def find(self) -> None:
        """Embed and retrieve."""
        embed.run(
            name="pool",
            source=SourceParams(root=self.root / "images"),
            out_dir=self.root / "embeddings/pool",
            params=EmbedParams(encoder=self.encoder, batch_size=4, workers=0),
            runtime=self.runtime,
            stats_path=self.root / "stats.json",
        )
        retrieve.run(
            embeddings_dir=self.root / "embeddings",
            sources=["pool"],
            out_path=self.root / "archives.parquet",
            categories=CATEGORIES,
            background=BACKGROUND,
            k=4,
            params=RetrieveParams(templates="name", overlap="all"),
            encoder=self.encoder,
            runtime=self.runtime,
            stats_path=self.root / "stats.json",
        )

    def label(self) -> None:
        """Spectral masks and dense labels, with the defaults of what they depend on."""
        mask.run(
            archives_path=self.root / "archives.parquet",
            out_dir=self.root / "masks",
            params=SpectralParams(encoder=self.encoder, short_side=72, refine=False, workers=0),
            runtime=self.runtime,
            stats_path=self.root / "stats.json",
        )
        pseudo_label.run(
            mask_dir=self.root / "masks",
            out_dir=self.root / "labels",
            categories=CATEGORIES,
            background=BACKGROUND,
            params=DenseClipParams(encoder=self.encoder, templates="name", workers=0),
            runtime=self.runtime,
            stats_path=self.root / "stats.json",
        )

    def train(self, **changes: Any) -> Path:
        """Train on both for two iterations; returns the checkpoint."""
        params = small_params(
            self.encoder,
            iterations=2,
            crop_size=70,
            scale_range=[0.9, 1.0],
            negative_canvas=0.0,
            **changes,
        )
        train.run(
            masks_dir=self.root / "masks",
            labels_dir=self.root / "labels",
            out_dir=self.root / "zutis",
            live_dir=self.root / "live",
            stats_path=self.root / "stats.json",
            categories=CATEGORIES,
            background=BACKGROUND,
            params=params,
            runtime=self.runtime,
        )
        return self.root / "zutis"

    def score(self) -> dict[str, Any]:
        """Predict a benchmark beside the baseline, and score."""
        writer = VocWriter(self.root / "voc")
        for number in range(2):
            image, truth = square(number)
            writer.add(f"{number}", encoded_image(image, "JPEG"), truth, (truth > 0).astype("u1"))
        writer.write_split("val", ["0", "1"])
        evaluate(
            bench_name="tiny",
            bench=VocBench(format="voc", root=self.root / "voc", categories=CATEGORIES),
            checkpoint_dir=self.root / "zutis",
            out_dir=self.root / "reports",
            predictions_dir=self.root / "predictions",
            params=EvaluateParams(batch_size=2),
            baseline=DenseClipParams(encoder=self.encoder, templates="name"),
            background=BACKGROUND,
            runtime=self.runtime,
            stats_path=self.root / "stats.json",
        )
        scores: dict[str, Any] = read_json(self.root / "reports/metrics/tiny.json")
        return scores


@pytest.mark.parametrize("kind", KINDS)
def test_every_tower_goes_through_all_stages(tmp_path: Path, kind: str) -> None:
    world = World(tmp_path, kind)
    world.find()
    world.label()
    masks = [sample["mask.png"] for sample in read_shards(tmp_path / "masks")]
    labels = [sample["label.png"] for sample in read_shards(tmp_path / "labels")]
    assert len(masks) == len(labels) > 0
    world.train()
    scores = world.score()
    assert {"miou", "baseline_miou", "ap50"} <= set(scores)
    prediction = Segmenter.load(tmp_path / "zutis", runtime=world.runtime)(square(3)[0])
    assert prediction.semantic.shape == (100, 72)


@pytest.mark.parametrize("kind", ["efficientnet", "siglip", "clip_resnet", "eva", "coca"])
def test_training_changes_weights_and_no_statistics(tmp_path: Path, kind: str) -> None:
    world = World(tmp_path, kind)
    world.find()
    world.label()
    after = load_state(world.train() / "model.safetensors")
    before = load_state(Path(world.encoder.pretrained))
    shared = {
        name: value
        for name, value in before.items()
        if name.startswith("visual.") and value.is_floating_point()
    }
    changed = {
        name
        for name, value in shared.items()
        if not torch.equal(value, after["encoder" + name.removeprefix("visual")])
    }
    assert changed
    assert not [name for name in changed if "running" in name]


def test_training_is_reproducible_with_batch_norms(tmp_path: Path) -> None:
    world = World(tmp_path, "efficientnet")
    world.find()
    world.label()
    first = (world.train() / "model.safetensors").read_bytes()
    assert (world.train(workers=1) / "model.safetensors").read_bytes() == first


@pytest.mark.parametrize("kind", KINDS)
def test_options_that_a_tower_lacks_are_refused_by_name(tmp_path: Path, kind: str) -> None:
    encoder = write_encoder(tmp_path, kind)
    runtime = Runtime(torch.device("cpu"), None, seed=0, cache_dir=tmp_path / "cache")
    images = torch.rand(1, 3, 72, 100)

    def scores(**options: Any) -> torch.Tensor:
        params = DenseClipParams(encoder=encoder, templates="name", **options)
        return load_dense_labeller(params, NAMES, runtime).scores(images)

    plain = scores()
    if kind in WITHOUT_KEYS:
        with pytest.raises(
            PipelineError, match=r"pseudo_label\.key_smoothing: 1\.0.*no attention keys"
        ):
            scores(key_smoothing=1.0)
    else:
        assert not torch.equal(scores(key_smoothing=1.0, key_affinity="cosine"), plain)
    if kind in ("clip_vit", "clip_resnet"):
        assert not torch.equal(scores(normalisation="clip"), plain)
        scores(dense_attention="value_only")
    else:
        with pytest.raises(PipelineError, match=r"pseudo_label\.dense_attention: .* CLIP's own"):
            scores(dense_attention="value_only")
        others = {"published_activation": False, "position_resize": "grid"}
        assert torch.equal(scores(normalisation="clip", **others), plain)


def test_a_decoder_that_does_not_fit_the_width_is_refused(tmp_path: Path) -> None:
    world = World(tmp_path, "efficientnet")
    world.find()
    world.label()
    with pytest.raises(PipelineError, match=r"num_heads: 7 .* width 256"):
        world.train(num_heads=7)


def test_a_tower_without_a_map_can_embed_and_retrieve_but_not_label(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(VISION, "maximum", VISION["efficientnet"] | {"timm_pool": "max"})
    world = World(tmp_path, "maximum")
    world.find()
    with pytest.raises(PipelineError, match=r"dense features need a map.*EfficientNet"):
        world.label()
    with pytest.raises(PipelineError, match=r"dense features need a map.*EfficientNet"):
        load_dense_labeller(
            DenseClipParams(encoder=world.encoder, templates="name"), NAMES, world.runtime
        )
