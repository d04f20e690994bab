"""A step of DenseCLIP+ on hand-made labels; letters as in the module."""

from __future__ import annotations

import weakref
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.engine.runtime import Runtime
from pipeline.errors import PipelineError
from pipeline.formats.labels import IGNORE_INDEX, UNLABELLED
from pipeline.methods.dense import load_dense_labeller
from pipeline.methods.students import DenseClipPlusParams, MicroBatch, fresh_student
from pipeline.models.clip.photo_clip import package_file
from pipeline.models.clip.photo_clip.assemble import PACKAGE
from pipeline.models.plus.student import PlusStudent
from pipeline.models.weights.acquire import fetch
from pipeline.models.weights.zoo import published
from pipeline.params.base import EncoderParams
from pipeline.params.benches import VocBench
from pipeline.vocabulary.categories import Names

NAMES = Names(["cat", "dog", "bird", "car"], ["background"])
SIDE = 32
VOID = IGNORE_INDEX


@pytest.fixture
def runtime(tmp_path: Path) -> Runtime:
    return Runtime(torch.device("cpu"), None, seed=0, cache_dir=tmp_path / "cache")


def student(encoder: EncoderParams, runtime: Runtime, **changes: Any) -> PlusStudent:
    data = VocBench(format="voc", root=Path("data"))
    truth = {"data": data, "labels": Path("data"), "unseen": ["bird", "car"]}
    settings: dict[str, Any] = {
        "encoder": encoder,
        "backbone": "timm:resnet10t",
        "backbone_weights": None,
        "head": "lraspp",
        "setting": "zero_shot",
        "iterations": 4,
        "guided_iterations": 2,
        "batch_size": 2,
        "log_every": 1,
        **(truth if changes.get("setting") != "annotation_free" else {}),
    }
    torch.manual_seed(0)
    made = fresh_student(DenseClipPlusParams(**{**settings, **changes}), NAMES, runtime)
    assert isinstance(made, PlusStudent)
    return made


def batch(labels: Tensor, *, step: int = 0) -> MicroBatch:
    """Two noise images; `labels` (H, W) are those of both."""
    images = torch.randint(
        0, 256, (2, 3, SIDE, SIDE), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)
    )
    both = labels.to(torch.int16).expand(2, SIDE, SIDE)
    return MicroBatch([2 * step, 2 * step + 1], images, both, [])


def quarters(*values: int) -> Tensor:
    """A map whose quarters have these labels."""
    map_of_quarters = torch.tensor(values).view(2, 2)
    return map_of_quarters.repeat_interleave(SIDE // 2, 0).repeat_interleave(SIDE // 2, 1)


def parts(made: PlusStudent, given: MicroBatch) -> dict[str, float]:
    losses = made.loss(given, made.count(given).clamp(min=1))
    return dict(zip(("loss", *made.losses), losses.tolist(), strict=True))


def logits_of(made: PlusStudent, given: MicroBatch, text: Tensor) -> Tensor:
    """A second reading of the classifier; the network is left in the state it was in."""
    state = {name: value.clone() for name, value in made.network.state_dict().items()}
    with torch.no_grad():
        features = made.network(given.images / 255)
    made.network.load_state_dict(state)
    rows = (
        text
        if made.network.background is None
        else torch.cat((F.normalize(made.network.background.detach(), dim=1), text))
    )
    scores = torch.einsum("bchw,kc->bkhw", features, rows)
    return F.interpolate(scores, size=(SIDE, SIDE), mode="bilinear")


def teacher_labels(
    encoder: EncoderParams, runtime: Runtime, given: MicroBatch, ids: list[int]
) -> tuple[Tensor, Tensor]:
    """Label ids of DenseCLIP among some, and the text rows (4, C) of the names."""
    params = DenseClipPlusParams(encoder=encoder, backbone_weights=None).labeller
    loaded: Any = load_dense_labeller(params, NAMES, runtime)
    numbers, _ = loaded.select(ids).label(given.images / 255)
    return torch.tensor(ids)[numbers], loaded.text[1:]


def test_a_guided_step_learns_truth_and_the_unseen_names_of_the_teacher(
    encoder: EncoderParams, runtime: Runtime
) -> None:
    made = student(encoder, runtime)
    given = batch(quarters(1, 2, UNLABELLED, VOID))
    taught, text = teacher_labels(encoder, runtime, given, [3, 4])
    assert len(set(taught.unique().tolist())) > 1
    logits = logits_of(made, given, text)
    labels = torch.where(given.semantic_masks == UNLABELLED, taught, given.semantic_masks.long())
    losses = F.cross_entropy(logits, labels - 1, ignore_index=VOID - 1, reduction="none")
    found = parts(made, given)
    pixels = 2 * SIDE * SIDE  # void ones count in the divisor
    assert found["loss"] == pytest.approx(float(losses.sum()) / pixels, rel=1e-5)
    unlabelled = given.semantic_masks == UNLABELLED
    assert found["pseudo"] == pytest.approx(float(losses[unlabelled].sum()) / pixels, rel=1e-5)
    assert found["truth"] == pytest.approx(found["loss"] - found["pseudo"], abs=1e-5)
    own = logits[:, 2:].argmax(1) + 3
    agreement = float((own == taught)[unlabelled].float().mean())
    assert found["agreement"] == pytest.approx(agreement, abs=1e-6)
    shares = [float((taught[unlabelled] == label_id).float().mean()) for label_id in (3, 4)]
    assert [found["share_bird"], found["share_car"]] == pytest.approx(shares, abs=1e-6)
    assert "share_cat" not in found


def test_the_switch_to_its_own_labels_is_at_the_step(
    encoder: EncoderParams, runtime: Runtime
) -> None:
    """Guided steps are 0 and 1; from step 2 on, labels are the student's of this very forward."""
    made = student(encoder, runtime, self_training="on")
    assert made.milestones == {2: "guided"}
    for step in (1, 2):
        given = batch(quarters(1, 2, UNLABELLED, VOID), step=step)
        taught, text = teacher_labels(encoder, runtime, given, [3, 4])
        logits = logits_of(made, given, text)
        own = logits[:, 2:].argmax(1) + 3
        pseudo = taught if step == 1 else own
        assert not torch.equal(taught, own)
        unlabelled = given.semantic_masks == UNLABELLED
        losses = F.cross_entropy(logits, pseudo - 1, reduction="none")[unlabelled]
        expected = float(losses.sum()) / (2 * SIDE * SIDE)
        assert parts(made, given)["pseudo"] == pytest.approx(expected, rel=1e-4), step
    off = student(encoder, runtime, self_training="off")
    assert off.milestones == {}
    given = batch(quarters(1, 2, UNLABELLED, VOID), step=2)
    taught, text = teacher_labels(encoder, runtime, given, [3, 4])
    losses = F.cross_entropy(logits_of(off, given, text), taught - 1, reduction="none")
    expected = float(losses[given.semantic_masks == UNLABELLED].sum()) / (2 * SIDE * SIDE)
    assert parts(off, given)["pseudo"] == pytest.approx(expected, rel=1e-4)


def test_loss_average_says_what_the_loss_is_divided_by(
    encoder: EncoderParams, runtime: Runtime
) -> None:
    given = batch(quarters(1, 2, VOID, VOID))
    every = parts(student(encoder, runtime), given)["loss"]
    counted = parts(student(encoder, runtime, loss_average="counted"), given)["loss"]
    assert counted == pytest.approx(2 * every, rel=1e-5)
    nothing = batch(quarters(VOID, VOID, VOID, VOID))
    assert parts(student(encoder, runtime, loss_average="counted"), nothing)["loss"] == 0


def test_no_map_as_large_as_the_crop_is_kept_for_the_gradient(
    encoder: EncoderParams, runtime: Runtime
) -> None:
    """Of R names it would have R H W values an image: what limits a batch where names are many."""
    made = student(encoder, runtime, setting="annotation_free")
    saved: list[weakref.ref[Tensor]] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(weakref.ref(tensor))
        return tensor

    given = batch(quarters(*[UNLABELLED] * 4))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        losses = made.loss(given, made.count(given))
    assert losses.requires_grad
    kept = [tuple(tensor.shape) for ref in saved if (tensor := ref()) is not None]
    assert kept
    assert [shape for shape in kept if shape[-3:] == (len(NAMES.categories), SIDE, SIDE)] == []


def test_gradients_reach_network_and_background_alone(
    encoder: EncoderParams, runtime: Runtime
) -> None:
    made = student(encoder, runtime, background="learned")
    teacher: Any = made._teacher
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    given = batch(quarters(0, 2, UNLABELLED, VOID))
    made.loss(given, made.count(given))[0].backward()
    assert made.network.background is not None
    assert made.network.background.grad is not None
    assert made.network.background.grad.abs().sum() > 0
    assert all(p.grad is not None for p in made.network.parameters())
    assert all(p.grad is None for p in teacher.parameters())
    assert not any(module.training for module in teacher.modules())
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert not made._text.requires_grad
    optimizer = made.make_optimizer()
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert trained == {id(p) for p in made.network.parameters()}


def test_background_has_the_row_of_its_kind(encoder: EncoderParams, runtime: Runtime) -> None:
    """Learned, by name, or none: then the teacher's background is void, and no pixel has it."""
    given = batch(quarters(0, 1, 2, 2))
    learned = student(encoder, runtime, background="learned")
    _, text = teacher_labels(encoder, runtime, given, [1])
    logits = logits_of(learned, given, text)
    assert logits.shape[1] == 5
    expected = F.cross_entropy(logits, given.semantic_masks.long())
    assert parts(learned, given)["loss"] == pytest.approx(float(expected), rel=1e-5)
    named = student(encoder, runtime, setting="annotation_free", background="names")
    assert "share_background" in parts(named, batch(quarters(*[UNLABELLED] * 4)))
    without = student(encoder, runtime, setting="annotation_free")
    assert "share_background" not in without.losses


@pytest.mark.parametrize("setting", ["supervised", "adapted"])
def test_nothing_is_pseudo_labelled_where_there_is_truth(
    encoder: EncoderParams, runtime: Runtime, setting: str
) -> None:
    unseen = ["bird"] if setting == "adapted" else []
    made = student(encoder, runtime, setting=setting, unseen=unseen)
    found = parts(made, batch(quarters(1, 2, 4, VOID)))
    assert found["pseudo"] == 0
    assert found["truth"] == found["loss"] > 0
    assert [name for name in found if name.startswith("share_")] == []


def test_a_learned_classifier_has_no_text(encoder: EncoderParams, runtime: Runtime) -> None:
    made = student(encoder, runtime, setting="supervised", unseen=[], classifier="learned")
    assert made.network.classifier is not None
    assert parts(made, batch(quarters(1, 2, 3, 4)))["loss"] > 0


def test_without_a_threshold_the_labels_are_the_same(
    encoder: EncoderParams, runtime: Runtime
) -> None:
    given = batch(quarters(*[UNLABELLED] * 4))
    all_sure = student(encoder, runtime, setting="annotation_free", confidence_threshold=1e-9)
    assert parts(all_sure, given) == parts(
        student(encoder, runtime, setting="annotation_free"), given
    )


def test_doubtful_labels_of_the_teacher_are_void(encoder: EncoderParams, runtime: Runtime) -> None:
    given = batch(quarters(*[UNLABELLED] * 4))
    sure = student(encoder, runtime, setting="annotation_free", confidence_threshold=1.0)
    assert parts(sure, given)["loss"] == 0
    assert parts(student(encoder, runtime, setting="annotation_free"), given)["loss"] > 0


def test_drift_is_seen_in_the_shares_alone(encoder: EncoderParams, runtime: Runtime) -> None:
    """By hand: shares of bird and car at 0.5 each, then 0.9 and 0.1: moved by 0.4."""
    row = [0.0] * 5 + [0.5, 0.5, 1e-3]
    moved = [0.0] * 5 + [0.9, 0.1, 1e-3]
    unmeasured = [0.0] * 3 + [float("nan")] * 4 + [1e-3]
    made = student(encoder, runtime, self_training="until_drift")
    assert len(row) == 2 + len(made.losses)
    steady = [(step, row) for step in range(1, 10)]
    assert made.has_drifted(steady) is None
    drifted = [(1, row), (2, row), *((step, moved) for step in range(3, 8)), (8, unmeasured)]
    assert made.has_drifted(drifted[:-2]) is None  # five lines are looked at
    assert (
        made.has_drifted(drifted) == "self-training has drifted: shares of categories moved by 0.40"
    )
    tolerant = student(encoder, runtime, self_training="until_drift", drift_tolerance=0.5)
    assert tolerant.has_drifted(drifted) is None
    assert student(encoder, runtime, self_training="on").has_drifted(drifted) is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"unseen": ["bird", "card"]},
            r"train\.unseen: 'card' is not among the categories; did you mean car",
        ),
        ({"backbone": "timm:resnet10"}, r"backbone: 'timm:resnet10'"),
        ({"backbone_weights": "nothing.pth"}, r"nothing\.pth"),
    ],
)
def test_what_cannot_be_trained_is_named(
    encoder: EncoderParams, runtime: Runtime, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(PipelineError, match=message):
        student(encoder, runtime, **changes)


@pytest.mark.skipif(find_spec(PACKAGE) is None, reason=f"{PACKAGE} is not installed")
def test_a_backbone_starts_from_the_weights_of_photo_clip_fetched_or_not(
    encoder: EncoderParams, runtime: Runtime
) -> None:
    changes = {"backbone": "timm:tf_efficientnet_lite0", "backbone_weights": "photo_clip"}
    package = torch.load(package_file(), weights_only=True)
    for is_fetched in (False, True):
        if is_fetched:
            fetch(published("photo_clip"), runtime.cache_dir)
        state = student(encoder, runtime, **changes).network.backbone.trunk.state_dict()
        assert torch.equal(state["conv_stem.weight"], package["_conv_stem.weight"])
        assert torch.equal(state["bn1.running_mean"], package["_bn0.running_mean"])
        assert not [name for name in state if name.startswith("classifier")]
    with pytest.raises(PipelineError, match=r"as timm:resnet10t\): not the weights"):
        student(encoder, runtime, backbone_weights="photo_clip")
