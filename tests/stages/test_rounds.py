"""Further rounds: a student labels the archives anew, and what is trained on that is judged."""

from __future__ import annotations

import json
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from pipeline.cli import app
from pipeline.engine.runtime import Runtime
from pipeline.errors import PipelineError
from pipeline.formats.corrections import CorrectedObject, Correction, write_corrections
from pipeline.formats.dense_labels import LabelStore
from pipeline.formats.images import encode_jpeg, encode_png
from pipeline.formats.objects import decode_objects
from pipeline.formats.review import Decision, Reviewed, write_review
from pipeline.formats.rle import encode_mask
from pipeline.formats.shards import open_samples
from pipeline.inference.held_out import RoundInputs
from pipeline.inference.segmenter import Segmenter
from pipeline.methods.students import TrainParams, ZutisParams
from pipeline.models.weights.checkpoint import CONFIG_NAME, WEIGHTS_NAME
from pipeline.params.base import EncoderParams, PredictionSettings
from pipeline.params.sections import EvaluateParams, RoundParams
from pipeline.stages import relabel, retrain
from tests.formats.shard_folders import write_shards
from tests.stages import tiny_training
from tests.stages.tiny_training import CATEGORIES, SEED, small_params

COLOURS = {0: (120, 120, 120), 1: (250, 30, 30), 2: (30, 30, 250)}
EVALUATE = EvaluateParams(temperature=20.0, threshold=0.3)


def samples(count: int = 24) -> Iterator[dict[str, Any]]:
    """Squares of their category's colour, every fourth image a negative; not square, two sizes."""
    for number in range(count):
        label_id = (1, 2, 1, 0)[number % 4]
        mask = np.zeros((40, 36 + 4 * (number % 2)), dtype=bool)
        mask[2 + number % 7 : 26, 4 : 20 + number % 9] = label_id > 0
        pixels = np.full((*mask.shape, 3), 100 + number, dtype=np.uint8)
        pixels[mask] = COLOURS[label_id]
        yield {
            "__key__": f"{number:04d}_{label_id}",
            "jpg": encode_jpeg(Image.fromarray(pixels)),
            "mask.png": encode_png(mask),
            "json": {
                "category": ["background", *CATEGORIES][label_id],
                "label_id": label_id,
                "sha256": f"{number:064d}",
            },
        }


@pytest.fixture
def masks(tmp_path: Path) -> Path:
    write_shards(samples(), tmp_path / "masks", shard_size=10)
    return tmp_path / "masks"


@pytest.fixture
def runtime(tmp_path: Path) -> Runtime:
    return Runtime(torch.device("cpu"), None, seed=SEED, cache_dir=tmp_path / "cache")


def trained(masks: Path, root: Path, params: TrainParams) -> Path:
    root.mkdir(exist_ok=True)
    return tiny_training.run(masks, root, params) / "zutis"


def inputs(
    masks: Path, targets: TrainParams, params: RoundParams, said: Path | None = None
) -> RoundInputs:
    """Those of a round; what a person has said lies below `said`."""
    return RoundInputs(
        masks_dir=masks,
        labels_dir=targets.labels,
        categories=CATEGORIES,
        params=params,
        targets=targets,
        evaluate=EVALUATE,
        corrections_dir=said and said / "corrections",
        review_path=said and said / "labels.csv",
    )


def relabelled(
    masks: Path,
    root: Path,
    targets: TrainParams,
    runtime: Runtime,
    said: Path | None = None,
    **round_params: Any,
) -> Path:
    out = root / "rounds/first"
    settings = {"held_out": 0.3, "shard_size": 5, **round_params}
    relabel.run(
        inputs(masks, targets, RoundParams(**settings), said),
        out_dir=out,
        runtime=runtime,
        stats_path=root / "relabel.json",
    )
    return out


def test_a_student_labels_the_archives_and_another_is_trained_on_that(
    tmp_path: Path, masks: Path, encoder: EncoderParams, runtime: Runtime
) -> None:
    targets = small_params(encoder)
    former = trained(masks, tmp_path / "before", targets)
    out = relabelled(masks, tmp_path, targets, runtime, after=former, score_threshold=0.0)
    old = {sample["__key__"]: sample for sample in samples()}
    new = open_samples(out, members=["jpg", "mask.png", "label.png", "confidence.png", "json"])
    assert 0 < len(new) < len(old)
    assert new.keys == [key for key in old if key in new.keys]
    labels = LabelStore(out)
    labels.check(CATEGORIES, new.keys)

    settings = PredictionSettings.of(EVALUATE)
    segmenter = Segmenter.load(former, settings=settings, runtime=runtime)
    num_objects = 0
    for index, key in enumerate(new.keys):
        assert new.member(index, "jpg") == old[key]["jpg"]
        assert new.json(index) == old[key]["json"]
        semantic, confidence = labels.get(key)
        objects = decode_objects(new.member(index, "mask.png"))
        assert semantic.shape == objects.shape
        assert (confidence == 1).all()
        if key.endswith("_0"):
            assert not semantic.any()
            assert not objects.any()
            continue
        image = Image.open(BytesIO(old[key]["jpg"]))
        prediction = segmenter.predict([image])[0]
        taken = np.zeros(semantic.shape, bool)
        for it in prediction.instances:
            own = it.mask & ~taken
            taken |= it.mask
            assert {*np.unique(semantic[own]).tolist()} <= {-1, it.label_id}
            num_objects += bool(own.any())
            assert len({*objects[own].tolist()} - {0}) == bool(own.any())
    assert num_objects
    counts = json.loads((tmp_path / "relabel.json").read_text())["counts"]
    assert counts["student_objects"] == num_objects

    final = targets.model_copy(update={"target": "denseclip", "labels": out})
    tiny_training.run(out, tmp_path / "after", final)
    assert (tmp_path / "after/zutis" / WEIGHTS_NAME).is_file()


def test_what_a_round_labels_is_trained_on_as_it_is(masks: Path, tmp_path: Path) -> None:
    """No filter by agreement with the archive's name, for a student may have another opinion."""
    targets = ZutisParams(split_components=True, min_agreement=0.3)
    params = inputs(masks, targets, RoundParams(after=tmp_path)).training(tmp_path / "labels")
    assert (params.target, params.labels) == ("denseclip", tmp_path / "labels")
    assert (params.split_components, params.min_agreement) == (False, None)


def test_no_object_above_the_threshold_leaves_the_pseudo_masks(
    tmp_path: Path, masks: Path, encoder: EncoderParams, runtime: Runtime
) -> None:
    targets = small_params(encoder)
    former = trained(masks, tmp_path / "before", targets)
    out = relabelled(masks, tmp_path, targets, runtime, after=former, score_threshold=1.0)
    old = {sample["__key__"]: sample for sample in samples()}
    new = open_samples(out)
    for index, key in enumerate(new.keys):
        assert new.member(index, "mask.png") == old[key]["mask.png"]


def test_the_same_bytes_again_and_one_image_is_held_out_of_all_archives(
    tmp_path: Path, encoder: EncoderParams, runtime: Runtime
) -> None:
    twice = [
        {**sample, "__key__": f"{sample['__key__'][:4]}_{label_id}", "json": info}
        for sample in samples()
        for label_id, name in enumerate(CATEGORIES, 1)
        for info in [{"category": name, "label_id": label_id}]
    ]
    masks = tmp_path / "masks"
    write_shards(twice, masks, shard_size=7)
    targets = small_params(encoder, negative_canvas=0.0)
    former = trained(masks, tmp_path / "before", targets)
    out = relabelled(masks, tmp_path, targets, runtime, after=former)
    first = {path.name: path.read_bytes() for path in out.iterdir()}
    assert first == {
        path.name: path.read_bytes()
        for path in relabelled(masks, tmp_path, targets, runtime, after=former).iterdir()
    }
    stems = [key[:4] for key in open_samples(out).keys]
    assert 0 < len(stems) < len(twice)
    assert all(stems.count(stem) == 2 for stem in stems)


@pytest.mark.parametrize("share", [1e-9, 1 - 1e-9])
def test_a_share_that_leaves_nothing_is_refused(
    tmp_path: Path, masks: Path, encoder: EncoderParams, runtime: Runtime, share: float
) -> None:
    with pytest.raises(PipelineError, match=r"rounds: held_out: .* of 24 archive images"):
        relabelled(masks, tmp_path, small_params(encoder), runtime, after="x", held_out=share)


def judge(
    masks: Path,
    root: Path,
    former: Path,
    candidate: Path,
    runtime: Runtime,
    said: Path | None = None,
    **settings: Any,
) -> dict[str, Any]:
    encoder = EncoderParams(**json.loads((former / CONFIG_NAME).read_text())["encoder"])
    settings = {"after": former, "held_out": 0.3, "drift_tolerance": 1.0, **settings}
    retrain.run(
        inputs(masks, small_params(encoder), RoundParams(**settings), said),
        candidate_dir=candidate,
        out_dir=root / "round",
        runtime=runtime,
        stats_path=root / "retrain.json",
    )
    outcome: dict[str, Any] = json.loads((root / "round" / retrain.OUTCOME).read_text())
    return outcome


def weights(folder: Path) -> bytes:
    return (folder / WEIGHTS_NAME).read_bytes()


def test_the_checkpoint_that_agrees_more_is_in_force(
    tmp_path: Path, masks: Path, encoder: EncoderParams, runtime: Runtime
) -> None:
    short = trained(masks, tmp_path / "short", small_params(encoder, iterations=1))
    long = trained(masks, tmp_path / "long", small_params(encoder, iterations=12))
    outcome = judge(masks, tmp_path, short, long, runtime)
    assert outcome["agreement"] != outcome["agreement_before"]
    better, worse = (long, short) if outcome["kept"] else (short, long)
    assert outcome["kept"] == (outcome["agreement"] > outcome["agreement_before"])

    kept = judge(masks, tmp_path, worse, better, runtime)
    assert kept["kept"]
    assert weights(tmp_path / "round") == weights(better)
    assert not (tmp_path / "round" / retrain.REJECTED).exists()
    assert "warnings" not in json.loads((tmp_path / "retrain.json").read_text())

    rejected = judge(masks, tmp_path, better, worse, runtime)
    assert not rejected["kept"]
    assert rejected["agreement"] == kept["agreement_before"]
    assert rejected["agreement_before"] == kept["agreement"]
    assert weights(tmp_path / "round") == weights(better)
    assert (tmp_path / "round" / CONFIG_NAME).read_bytes() == (better / CONFIG_NAME).read_bytes()
    assert weights(tmp_path / "round" / retrain.REJECTED) == weights(worse)
    (warning,) = json.loads((tmp_path / "retrain.json").read_text())["warnings"]
    for key in ("agreement", "agreement_before"):
        assert f"{rejected[key]:.2f}%" in warning
    assert f"{better} stays in force" in warning


def test_one_that_agrees_as_well_is_kept_and_one_that_drifts_is_not(
    tmp_path: Path, masks: Path, encoder: EncoderParams, runtime: Runtime
) -> None:
    short = trained(masks, tmp_path / "short", small_params(encoder, iterations=1))
    long = trained(masks, tmp_path / "long", small_params(encoder, iterations=12))
    same = judge(masks, tmp_path, short, short, runtime, drift_tolerance=0.0)
    assert same["kept"]
    assert same["drift"] == 0
    for former, candidate in ((short, long), (long, short)):
        outcome = judge(masks, tmp_path, former, candidate, runtime, drift_tolerance=0.0)
        assert outcome["drift"] > 0
        assert not outcome["kept"]


def test_agreement_is_one_confusion_matrix_of_the_images_held_out(
    tmp_path: Path, masks: Path, encoder: EncoderParams, runtime: Runtime
) -> None:
    former = trained(masks, tmp_path / "before", small_params(encoder))
    out = relabelled(masks, tmp_path, small_params(encoder), runtime, after=former)
    trained_on = set(open_samples(out).keys)
    settings = PredictionSettings.of(EVALUATE, instances=False)
    segmenter = Segmenter.load(former, settings=settings, runtime=runtime)
    pairs: list[tuple[int, int]] = []
    for sample in samples():
        if sample["__key__"] in trained_on:
            continue
        image = Image.open(BytesIO(sample["jpg"]))
        mask = np.asarray(Image.open(BytesIO(sample["mask.png"]))) > 0
        target = mask * sample["json"]["label_id"]
        prediction = segmenter.predict([image])[0].semantic
        pairs += zip(target.ravel().tolist(), prediction.ravel().tolist(), strict=True)
    ious = []
    for label_id in sorted({old for old, _ in pairs}):
        both = sum(old == new == label_id for old, new in pairs)
        either = sum(label_id in pair for pair in pairs)
        ious.append(both / either)
    outcome = judge(masks, tmp_path, former, former, runtime)
    assert outcome["agreement"] == pytest.approx(100 * sum(ious) / len(ious), abs=1e-4)


def test_corrected_images_are_compared_with_what_a_person_says(
    tmp_path: Path, masks: Path, encoder: EncoderParams, runtime: Runtime
) -> None:
    former = trained(masks, tmp_path / "before", small_params(encoder))
    settings = PredictionSettings.of(EVALUATE, instances=False)
    segmenter = Segmenter.load(former, settings=settings, runtime=runtime)
    truths = []
    for sample in samples():
        semantic = segmenter.predict([Image.open(BytesIO(sample["jpg"]))])[0].semantic
        found = [
            CorrectedObject(name, encode_mask(semantic == label_id))
            for label_id, name in enumerate(CATEGORIES, 1)
            if (semantic == label_id).any()
        ]
        truths.append(Correction(sample["json"]["sha256"], "x", semantic.shape, found))
    write_corrections(tmp_path / "corrections", truths)
    assert judge(masks, tmp_path, former, former, runtime)["agreement"] < 100
    outcome = judge(masks, tmp_path, former, former, runtime, tmp_path)
    assert outcome["agreement"] == 100


def test_what_a_person_has_said_is_not_labelled_anew(
    tmp_path: Path, masks: Path, encoder: EncoderParams, runtime: Runtime
) -> None:
    targets = small_params(encoder)
    former = trained(masks, tmp_path / "before", targets)
    words = {"after": former, "score_threshold": 0.0}
    before = open_samples(relabelled(masks, tmp_path / "a", targets, runtime, **words))
    negative = next(key for key in before.keys if key.endswith("_0"))
    first, second, third, *_ = (key for key in before.keys if not key.endswith("_0"))
    old = {sample["__key__"]: sample for sample in samples()}
    truths = {}
    for key in (second, third, negative):
        shape = np.asarray(Image.open(BytesIO(old[key]["mask.png"]))).shape
        mask = np.zeros(shape, dtype=bool)
        mask[3:9, 5:20] = True
        found = [] if key == third else [CorrectedObject("dog", encode_mask(mask))]
        truths[key] = Correction(old[key]["json"]["sha256"], "x", shape, found)
    write_corrections(tmp_path / "said/corrections", truths.values())
    names = dict(enumerate(["background", *CATEGORIES]))
    rejected = [first, second, "nobody_1"]  # of which the second is corrected as well
    write_review(
        tmp_path / "said/labels.csv",
        {
            Reviewed(names[int(key[-1])], key.rpartition("_")[0]): Decision("reject")
            for key in rejected
        },
    )

    out = relabelled(masks, tmp_path / "b", targets, runtime, tmp_path / "said", **words)
    after = open_samples(out)
    assert after.keys == [key for key in before.keys if key != first]
    labels = LabelStore(out)
    for key, truth in truths.items():
        semantic, objects = truth.maps({name: i for i, name in enumerate(CATEGORIES, 1)})
        assert (labels.get(key)[0] == semantic).all()
        assert (decode_objects(after.member(after.keys.index(key), "mask.png")) == objects).all()
    untouched = [key for key in after.keys if key not in truths]
    for key in untouched:
        new, same = (it[it.keys.index(key)] for it in (after, before))
        assert new == same
    stats = json.loads((tmp_path / "b/relabel.json").read_text())
    assert stats["counts"]["corrected"] == 3
    assert stats["left_out"]["rejected image"] == 1
    assert "cat nobody" in stats["warnings"][0]


def test_a_round_is_not_judged_by_labels_that_are_rejected(
    tmp_path: Path, masks: Path, encoder: EncoderParams, runtime: Runtime
) -> None:
    former = trained(masks, tmp_path / "before", small_params(encoder))
    whole = judge(masks, tmp_path, former, former, runtime)
    trained_on = open_samples(
        relabelled(masks, tmp_path, small_params(encoder), runtime, after=former)
    ).keys
    held_out = [it["__key__"] for it in samples() if it["__key__"] not in trained_on]
    names = dict(enumerate(["background", *CATEGORIES]))
    shown = [key for key in held_out if not key.endswith("_0")]
    review = {
        Reviewed(names[int(key[-1])], key[:4]): Decision("reject")
        for key in [*shown[1:], trained_on[0]]
    }
    write_review(tmp_path / "said/labels.csv", review)
    outcome = judge(masks, tmp_path, former, former, runtime, tmp_path / "said")
    assert outcome["held_out_images"] == whole["held_out_images"] - len(shown[1:])
    assert outcome["agreement"] != whole["agreement"]


def test_a_checkpoint_of_other_categories_is_refused(
    tmp_path: Path, masks: Path, encoder: EncoderParams, runtime: Runtime
) -> None:
    former = trained(masks, tmp_path / "before", small_params(encoder))
    config = json.loads((former / CONFIG_NAME).read_text())
    (former / CONFIG_NAME).write_text(json.dumps({**config, "categories": ["dog", "cat"]}))
    with pytest.raises(PipelineError, match="before/zutis: trained with other categories"):
        relabelled(masks, tmp_path, small_params(encoder), runtime, after=former)


# -- the commands ----------------------------------------------------------------------------------


@pytest.fixture
def params(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PIPELINE_CACHE", str(tmp_path / "cache"))
    return {
        "device": "cpu",
        "categories": CATEGORIES,
        "index": {"a": {"root": "a"}},
        "rounds": {"one": {"after": "models/zutis"}, "two": {"after": "models/rounds/one"}},
    }


def error_of(params: dict[str, Any], *words: str) -> str:
    Path("params.yaml").write_text(json.dumps(params))
    with pytest.raises(PipelineError) as caught:
        CliRunner().invoke(app, words, catch_exceptions=False)
    return str(caught.value)


def test_the_last_round_is_in_force(params: dict[str, Any]) -> None:
    encode_to = Path("photo.jpg")
    encode_to.write_bytes(encode_jpeg(Image.new("RGB", (40, 30))))
    words = ("predict", "photo.jpg", "--out", "out")
    assert error_of(params, *words).startswith("models/rounds/two/config.json: no such file")
    asked = error_of(params, *words, "--checkpoint", "models/zutis")
    assert asked.startswith("models/zutis/config.json: no such file")
    params["rounds"] = {}
    assert error_of(params, *words).startswith("models/zutis/config.json: no such file")


@pytest.mark.parametrize("command", ["relabel", "retrain"])
def test_a_round_names_what_is_wrong(params: dict[str, Any], command: str) -> None:
    assert "'three' is not under `rounds:`" in error_of(params, command, "--name", "three")
    plus = {"student": "denseclip_plus", "backbone": "timm:resnet10t", "backbone_weights": None}
    message = error_of({**params, "train": plus}, command, "--name", "one")
    assert message.startswith("params.yaml: train.student: denseclip_plus: rounds")
    shares = {"one": {"after": "a", "held_out": 0.1}, "two": {"after": "b", "held_out": 0.3}}
    message = error_of({**params, "rounds": shares}, command, "--name", "one")
    assert "rounds: held_out: the same images must be held out of all rounds" in message
    params["rounds"] = {"one": {}}
    assert "rounds.one.after" in error_of(params, command, "--name", "one")
