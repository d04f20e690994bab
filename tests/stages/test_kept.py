"""What of a prediction is output: names that only compete, least scores, texts of a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from pipeline.engine.runtime import Runtime
from pipeline.errors import PipelineError
from pipeline.formats.predictions import Instance, Segmentation
from pipeline.inference.kept import kept, kept_protocol
from pipeline.inference.labeller import Labeller
from pipeline.inference.segmenter import Segmenter
from pipeline.methods.dense import DenseClipParams
from pipeline.params.base import EncoderParams, PredictionSettings
from pipeline.params.benches import VocBench
from pipeline.params.sections import EvaluateParams
from pipeline.stages import predict, predict_bench, score
from tests.conftest import encoded_image, noise_image
from tests.stages.tiny_checkpoint import write_checkpoint
from tests.stages.tiny_workspace import Workspace, write_workspace

IMAGE = noise_image(5, 64, 48)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory, tiny_clip: tuple[Path, Path]) -> Workspace:
    return write_workspace(tmp_path_factory.mktemp("kept"), tiny_clip, index=6, bench=4)


def one(label_id: int, score: float) -> Instance:
    return Instance(label_id, score, np.ones((1, 1), bool), (0, 0, 0, 0), (2, 2))


def test_objects_of_low_scores_and_of_others_go() -> None:
    found = Segmentation(
        np.array([[0, 1], [2, 3]], np.int16), [one(3, 0.9), one(1, 0.6), one(2, 0.6), one(1, 0.2)]
    )
    assert kept(found, ["cat", "dog"], PredictionSettings()) is found
    settings = PredictionSettings(others=["sky"], min_score=0.3, min_scores={"Dog": 0.7})
    labels, objects = kept(found, ["cat", "dog"], settings)
    assert labels.tolist() == [[0, 1], [2, 0]]
    assert labels.dtype == np.int16
    assert [(item.label_id, item.score) for item in objects] == [(1, 0.6)]


def test_the_protocol_names_them_only_where_they_are_set() -> None:
    assert kept_protocol(PredictionSettings()) == {}
    settings = PredictionSettings(others=["sky", "wall"], min_scores={"dog": 0.7})
    assert kept_protocol(settings) == {"others": "sky, wall", "min_scores": "dog 0.7"}
    closed = settings.model_copy(update={"background": False, "instances": False})
    assert kept_protocol(closed) == {}
    assert "others" not in PredictionSettings().model_dump()


def test_others_compete_as_categories_would_and_are_background(
    workspace: Workspace, runtime: Runtime
) -> None:
    checkpoint = workspace.root / "zutis"
    everything = Segmenter.load(checkpoint, categories=["cat", "dog", "bird"], runtime=runtime)
    settings = PredictionSettings(others=["dog", "cat"])
    fewer = Segmenter.load(
        checkpoint, categories=["bird", "cat"], settings=settings, runtime=runtime
    )
    expected, found = everything(IMAGE), fewer(IMAGE)
    assert np.unique(expected.semantic).tolist() != np.unique(found.semantic).tolist()
    # A name that is asked for is none of the others.
    as_asked = np.array([0, 2, 0, 1], np.int16)[expected.semantic]
    assert found.semantic.tolist() == as_asked.tolist()
    assert [item.score for item in found.instances] == [
        item.score for item in expected.instances if item.label_id != 2
    ]
    alone = fewer.select(["cat"])(IMAGE)
    assert alone.categories == ["cat"]
    assert np.unique(alone.semantic).max() <= 1


def test_others_of_a_dense_labeller(workspace: Workspace, runtime: Runtime) -> None:
    params = DenseClipParams(encoder=workspace.encoder, templates="name")

    def labels(categories: list[str], **settings: object) -> np.ndarray:
        labeller = Labeller.load(
            params,
            categories=categories,
            background=["background"],
            settings=PredictionSettings(**settings),
            runtime=runtime,
        )
        return labeller.select(categories).predict(IMAGE).semantic

    both = labels(["cat", "dog"])
    assert labels(["cat"], others=["dog"]).tolist() == np.where(both == 2, 0, both).tolist()
    # Where no pixel may be background, there are no others.
    assert labels(["cat"], others=["dog"], background=False).tolist() == np.ones_like(both).tolist()


def test_predict_writes_no_others_and_no_low_scores(
    workspace: Workspace, tmp_path: Path, runtime: Runtime
) -> None:
    (tmp_path / "a.png").write_bytes(encoded_image(IMAGE))

    def run(out: str, **settings: object) -> dict:
        predict.run(
            inputs=[tmp_path / "a.png"],
            categories=["cat", "bird"],
            checkpoint_dir=workspace.root / "zutis",
            out_dir=tmp_path / out,
            params=EvaluateParams(**settings),
            runtime=runtime,
        )
        return json.loads((tmp_path / out / "predictions.json").read_text())

    content = run("all", others=["dog"])
    assert [item["name"] for item in content["categories"]] == ["cat", "bird"]
    scores = sorted(item["score"] for item in content["annotations"])
    middle = scores[len(scores) // 2]
    fewer = run("some", others=["dog"], min_score=middle - 1e-5)
    assert sorted(item["score"] for item in fewer["annotations"]) == [
        score for score in scores if score >= middle
    ]


def test_a_benchmark_is_scored_with_them_and_says_so(
    workspace: Workspace, tmp_path: Path, runtime: Runtime
) -> None:
    bench = VocBench(format="voc", root=workspace.root / "voc", categories=["cat", "dog", "bird"])
    common = {"bench_name": "tiny", "bench": bench, "background": ["background"]}

    def protocol(name: str, **settings: object) -> list[str]:
        predict_bench.run(
            **common,
            checkpoint_dir=workspace.root / "zutis",
            out_dir=tmp_path / name,
            params=EvaluateParams(**settings),
            baseline=DenseClipParams(encoder=workspace.encoder, templates="name"),
            runtime=runtime,
            stats_path=tmp_path / f"{name}.json",
        )
        score.run(
            **common,
            predictions_dir=tmp_path / name,
            out_dir=tmp_path / f"reports-{name}",
            overlays=0,
            seed=0,
            stats_path=tmp_path / f"score-{name}.json",
        )
        return json.loads((tmp_path / f"reports-{name}/metrics/tiny.json").read_text())["protocol"]

    plain = protocol("plain")
    named = protocol("named", others=["house"], min_scores={"dog": 0.5})
    assert {"others: house", "min_scores: dog 0.5"} <= set(named)
    assert [line for line in named if line in plain] == plain


def test_a_checkpoint_keeps_the_texts_that_it_was_trained_by(
    tmp_path: Path, tiny_clip: tuple[Path, Path], runtime: Runtime
) -> None:
    folder = write_checkpoint(tmp_path / "zutis", tiny_clip)
    config = json.loads((folder / "config.json").read_text())
    settings = PredictionSettings()
    plain = Segmenter.load(folder, categories=["house", "cat"], runtime=runtime)
    config |= {"categories": ["x1", "cat"], "texts": {"x1": ["house"]}}
    (folder / "config.json").write_text(json.dumps(config))
    renamed = Segmenter.load(folder, runtime=runtime, settings=settings)
    assert renamed.categories == ["x1", "cat"]
    assert renamed(IMAGE).semantic.tolist() == plain(IMAGE).semantic.tolist()
    config["texts"] = {"x1": "house"}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(PipelineError, match="expected a list of names"):
        Segmenter.load(folder, runtime=runtime)


def test_a_dense_labeller_is_asked_by_texts(workspace: Workspace, runtime: Runtime) -> None:
    encoder: EncoderParams = workspace.encoder
    labeller = Labeller.load(
        DenseClipParams(encoder=encoder, templates="name"),
        categories=["pet", "bird"],
        background=["background"],
        settings=PredictionSettings(),
        runtime=runtime,
        texts={"Pet": ["dog"]},
    )
    flat = Labeller.load(
        DenseClipParams(encoder=encoder, templates="name"),
        categories=["dog", "bird"],
        background=["background"],
        settings=PredictionSettings(),
        runtime=runtime,
    )
    assert labeller.predict(IMAGE).semantic.tolist() == flat.predict(IMAGE).semantic.tolist()
    assert labeller.fingerprint != flat.fingerprint
