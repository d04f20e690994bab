"""`photo_clip`: its names, the mapping of the package's tensors, the shipped text tower."""

from __future__ import annotations

import json
import re
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from pipeline.errors import PipelineError, install_command
from pipeline.models.clip import ClipEncoder, load_clip, text_embeddings
from pipeline.models.clip.loading import build_from_config
from pipeline.models.clip.names import normalise_name, resolve_name
from pipeline.models.clip.photo_clip import CONFIG_PATH, image_trunk, package_file, with_text_tower
from pipeline.models.clip.photo_clip.assemble import (
    PACKAGE,
    TEXT_TOWER_PATH,
    TIMM_MODEL,
    image_tower,
)
from pipeline.models.clip.photo_clip.table import (
    imagenet_names,
    name_table,
    parse_classes,
    read_groups,
)
from pipeline.models.clip.photo_clip.train import (
    BACKGROUND,
    BACKGROUND_LEVEL,
    LEVELLING,
    Fit,
    encode_tokens,
    fit_text_tower,
    is_text,
    joint_space,
    name_draws,
    name_targets,
    prompt_tokens,
    text_cosines,
)
from pipeline.models.weights.acquire import fetch
from pipeline.models.weights.zoo import published
from pipeline.params.base import EncoderParams
from pipeline.vocabulary.prompts import PROMPTS_85

CPU = torch.device("cpu")
PHOTO_CLIP = EncoderParams(model="photo_clip", pretrained="photo_clip")
CONFIG: dict[str, Any] = json.loads(CONFIG_PATH.read_text(encoding="utf-8"))
needs_package = pytest.mark.skipif(
    find_spec(PACKAGE) is None, reason=f"{PACKAGE} (extra `photos`) is not installed"
)


@pytest.fixture(scope="module")
def classifier() -> dict[str, Tensor]:
    """A classifier of the real names and shapes, with random weights."""
    torch.manual_seed(0)
    return dict(timm.create_model(TIMM_MODEL, pretrained=False).state_dict())


@pytest.fixture(scope="module")
def encoder(classifier: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> ClipEncoder:
    """The shipped text tower beside an image tower of random weights: texts need no other."""
    path = tmp_path_factory.mktemp("photo_clip") / "weights.pt"
    torch.save(with_text_tower(image_trunk(classifier, "timm")), path)
    return load_clip(EncoderParams(model="photo_clip", pretrained=str(path)), CPU)


@pytest.fixture(scope="module")
def real() -> ClipEncoder:
    return load_clip(PHOTO_CLIP, CPU)


class TestTable:
    def test_every_class_has_a_name(self) -> None:
        named = {index for classes in name_table().values() for index in classes}
        assert named == set(range(1000))

    def test_the_classes_of_everyday_names(self) -> None:
        table = name_table()
        assert table["cat"] == table["kitten"] == list(range(281, 286))
        assert table["dog"] == list(range(151, 269))
        assert table["sheep"] == [348, 349]
        assert table["mouse"] == table["computer mouse"] == [673]
        assert "person" not in table
        assert "drop" not in table

    def test_imagenets_own_names_are_there_without_remarks_and_latin(self) -> None:
        names = imagenet_names()
        assert len(names) == 1000
        assert {"tench"} == names[0]
        assert {"kite"} == names[21]
        assert {"siamese cat", "siamese"} == names[284]
        assert {"baluster", "handrail"} <= names[421]

    def test_words_that_are_left_out_are_words_of_imagenet_and_no_groups(self) -> None:
        groups, left_out = read_groups()
        assert left_out <= set().union(*imagenet_names())
        assert not left_out & set(groups)

    @pytest.mark.parametrize("text", ["", "3-1", "1000", "-1", "1;2", "cat", "1-1000"])
    def test_classes_that_do_not_exist_are_refused(self, text: str) -> None:
        with pytest.raises(PipelineError, match=r"here: .* is no class or range"):
            parse_classes(text, "here")

    def test_a_name_that_is_there_twice_is_refused(self, tmp_path: Path) -> None:
        path = tmp_path / "groups.yaml"
        path.write_text("names:\n  cat / tom-cat: 281-285\n  Tom cat: 282\nleft_out: []\n")
        with pytest.raises(PipelineError, match="'tom cat' is there twice"):
            read_groups(path)

    def test_the_shipped_names_are_those_of_the_table(self) -> None:
        assert CONFIG["names"] == [BACKGROUND, *name_table()]


class TestNames:
    @pytest.mark.parametrize(
        ("written", "meant"),
        [
            ("Dog", "dog"),
            (" golden-retriever ", "golden retriever"),
            ("DOGS", "dog"),
            ("wolves", "wolf"),
            ("buses", "bus"),
            ("canaries", "canary"),
            ("knives", "knife"),
            ("computer mice", "computer mouse"),
            ("tv/monitor", "tv monitor"),
            ("glasses", "glasses"),
        ],
    )
    def test_case_hyphens_and_plurals_do_not_count(self, written: str, meant: str) -> None:
        assert resolve_name(written, [*CONFIG["names"], "canary"], source="x") == meant

    @pytest.mark.parametrize(
        ("name", "near"), [("persian dog", "persian cat"), ("zebre", "zebra"), ("person", "")]
    )
    def test_another_name_is_refused_with_the_nearest(
        self, encoder: ClipEncoder, name: str, near: str
    ) -> None:
        message = (
            rf"categories or background: '{name}' is none of .*photo_clip.*nearest are .*{near}"
        )
        with pytest.raises(PipelineError, match=message):
            text_embeddings(encoder, ["dog", name], PROMPTS_85)

    @pytest.mark.parametrize(
        ("name", "expected"),
        [
            ("persian dog", r"; the nearest are persian cat"),
            ("zebre", r"; the nearest are by spelling alone: zebra"),
            ("xylophonist of Ur", r"; none is near\."),
        ],
    )
    def test_words_count_before_letters_and_what_is_far_is_not_near(
        self, name: str, expected: str
    ) -> None:
        known = ["zebra", "persian cat", "perusal dish"]
        with pytest.raises(
            PipelineError, match=rf"^f: '{name}' is none of the 3 names.*{expected}"
        ):
            resolve_name(name, known, source="x", field="f")

    def test_words_of_prompts_alone_are_no_names(self, encoder: ClipEncoder) -> None:
        with pytest.raises(PipelineError, match="'cool photo' is none of"):
            text_embeddings(encoder, ["cool photo"], PROMPTS_85)

    def test_a_plural_has_the_embedding_of_its_name(self, encoder: ClipEncoder) -> None:
        one, many = text_embeddings(encoder, ["dog", "Dogs"], PROMPTS_85)
        assert torch.equal(one, many)

    def test_normal_names(self) -> None:
        assert normalise_name("  Jack-o'-Lantern ") == "jack o' lantern"
        assert normalise_name("tv/monitor") == "tv monitor"


class TestMapping:
    def test_tensors_of_the_real_shapes_are_mapped_by_order(
        self, classifier: dict[str, Tensor]
    ) -> None:
        renamed = {f"_layer.{number}": value for number, value in enumerate(classifier.values())
                   if value.ndim}  # fmt: skip
        mapped = image_tower(renamed, "file.pth")
        assert list(mapped) == [name for name in classifier if "num_batches" not in name]
        assert len(mapped) == 247
        assert all(torch.equal(value, classifier[name]) for name, value in mapped.items())

    def test_another_shape_or_number_is_refused(self, classifier: dict[str, Tensor]) -> None:
        odd = {**classifier, "conv_head.weight": torch.zeros(1280, 320, 3, 3)}
        with pytest.raises(PipelineError, match=r"conv_head\.weight is \[1280, 320, 3, 3\]"):
            image_tower(odd, "file.pth")
        with pytest.raises(PipelineError, match=r"file\.pth: .*246 tensors, expected 247"):
            image_tower(
                {k: v for k, v in classifier.items() if k != "conv_stem.weight"}, "file.pth"
            )

    def test_the_assembled_weights_are_those_of_the_config(
        self, classifier: dict[str, Tensor]
    ) -> None:
        clip = build_from_config(CONFIG, source="config.json")
        assembled = with_text_tower(image_trunk(classifier, "timm"))
        own = {name for name in clip.state_dict() if "num_batches" not in name}
        assert set(assembled) == own

    @needs_package
    def test_the_packages_tensors_are_mapped(self) -> None:
        state = torch.load(package_file(), weights_only=True)
        mapped = image_tower(state, package_file())
        assert torch.equal(mapped["conv_stem.weight"], state["_conv_stem.weight"])
        assert torch.equal(mapped["conv_head.weight"], state["_conv_head.weight"])
        assert torch.equal(mapped["bn2.running_var"], state["_bn1.running_var"])
        assert torch.equal(mapped["classifier.weight"], state["_fc.weight"])


class TestShippedTextTower:
    def test_the_file_is_small(self) -> None:
        assert TEXT_TOWER_PATH.stat().st_size <= 4_000_000
        assert {value.dtype for value in load_file(TEXT_TOWER_PATH).values()} == {torch.float16}

    def test_synonyms_and_members_of_groups_are_near(self, encoder: ClipEncoder) -> None:
        names = ["sofa", "couch", "dog", "golden retriever", "fire engine", "banana"]
        cosines = text_embeddings(encoder, names, PROMPTS_85)
        cosines = cosines @ cosines.T
        assert cosines[0, 1] > 0.96
        assert cosines[2, 3] > 0.1 > cosines[3, 4]
        assert abs(cosines[4, 5]) < 0.1

    def test_names_of_many_classes_alone_have_a_part_of_the_background(
        self, encoder: ClipEncoder
    ) -> None:
        names = ["background", "tench", "horse", "dog", "animal"]
        background, *others = text_embeddings(encoder, names, PROMPTS_85)
        assert background[-1] > 0.99
        tench, horse, dog, animal = (float(name @ background) for name in others)
        assert max(abs(tench), abs(horse)) < 0.1 < dog < animal < LEVELLING

    def test_training_reads_the_network_as_open_clip_does(self, encoder: ClipEncoder) -> None:
        tokens = encoder.tokenize(["dog", "a photo of a golden retriever.", "background"])
        expected = encoder.clip.encode_text(tokens)
        torch.testing.assert_close(encode_tokens(encoder.clip, tokens), expected)

    @needs_package
    def test_every_name_is_on_its_target(self, encoder: ClipEncoder) -> None:
        path = package_file()
        table = {BACKGROUND: [], **name_table()}
        classifier = image_tower(torch.load(path, weights_only=True), path)["classifier.weight"]
        space = joint_space(classifier, table.values())
        targets = name_targets(space, table)
        cosines = text_cosines(encoder.clip, prompt_tokens(CONFIG), targets)
        assert cosines.min() > 0.98
        assert cosines.mean() > 0.99
        shipped = load_file(TEXT_TOWER_PATH)["visual.head.proj.weight"].float()
        torch.testing.assert_close(shipped.abs(), space.weight.abs(), atol=2e-3, rtol=0)


class TestSpace:
    GROUPS = ([0, 1, 2, 3], [7], [], [10, 11, 12])

    def test_every_class_is_nearest_to_its_own_row(self) -> None:
        rows = torch.randn(30, 40, generator=torch.Generator().manual_seed(0)) + 5
        space = joint_space(rows, self.GROUPS, embed_dim=30)
        images = (rows - rows.mean(dim=0)) @ space.weight.T + space.bias
        for texts in (space.rows, space.regressed):
            assert (images @ texts.T).argmax(dim=1).tolist() == list(range(30))

    def test_what_all_features_share_falls_out_and_no_evidence_is_background(self) -> None:
        rows = torch.randn(60, 40, generator=torch.Generator().manual_seed(0))
        space = joint_space(rows, self.GROUPS, embed_dim=32)
        shifted = joint_space(rows + 3, self.GROUPS, embed_dim=32)
        torch.testing.assert_close(
            shifted.rows @ shifted.regressed.T, space.rows @ space.regressed.T, atol=1e-4, rtol=0
        )
        nothing = torch.zeros(40) @ space.weight.T + space.bias
        torch.testing.assert_close(nothing, BACKGROUND_LEVEL * space.background)

    def test_classes_of_one_name_lie_nearer_to_each_other_than_the_classifier_has_them(
        self,
    ) -> None:
        rows = torch.randn(60, 40, generator=torch.Generator().manual_seed(0))
        group = list(range(20))
        space = joint_space(rows, [group], embed_dim=41)
        plain = F.normalize(rows - rows.mean(dim=0), dim=-1)
        others = list(range(20, 40))

        def likeness(units: Tensor, classes: list[int]) -> float:
            return float((units[classes] @ units[classes].T).mean())

        assert likeness(space.rows, group) > 1.2 * likeness(plain, group)
        assert likeness(space.rows, others) < 1.2 * likeness(plain, others)

    def test_a_name_of_several_classes_is_between_them_and_above_the_background(self) -> None:
        rows = torch.randn(60, 40, generator=torch.Generator().manual_seed(0))
        space = joint_space(rows, self.GROUPS, embed_dim=32)
        single, pair, nothing = name_targets(
            space, {"single": [5], "pair": [1, 2], "background": []}
        )
        assert pair @ space.regressed[1] == pytest.approx(
            float(pair @ space.regressed[2]), abs=1e-5
        )
        assert pair.norm() == pytest.approx(1.0, abs=1e-5)
        assert pair[-1] > single[-1] > 0
        assert torch.equal(nothing, space.background)


def test_a_few_steps_of_training_are_deterministic() -> None:
    names = {BACKGROUND: [], "dog": [1, 2], "toy dog": [3]}
    config = {**CONFIG, "names": list(names)}
    targets = name_targets(joint_space(torch.eye(300), names.values()), names)
    states = []
    for _ in range(2):
        torch.manual_seed(0)
        clip = build_from_config(config, source="config.json")
        tokens = prompt_tokens(config)
        before = float(text_cosines(clip, tokens, targets).mean())
        fit = Fit(batch_size=16, steps=30)
        fit_text_tower(clip, tokens, targets, draws=name_draws(names), fit=fit, seed=0)
        assert float(text_cosines(clip, tokens, targets).mean()) > before + 0.1
        states.append({k: v for k, v in clip.state_dict().items() if is_text(k)})
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


class TestFetch:
    def test_without_the_package_the_command_is_named(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(sys.modules, PACKAGE, None)  # as if it were not installed
        for call in (lambda: fetch(published("photo_clip"), tmp_path),
                     lambda: load_clip(PHOTO_CLIP, CPU, cache_dir=tmp_path)):  # fmt: skip
            with pytest.raises(PipelineError, match=re.escape(install_command("photos"))):
                call()
        assert not list(tmp_path.iterdir())

    def test_another_file_is_refused_by_its_checksum(
        self, classifier: dict[str, Tensor], tmp_path: Path
    ) -> None:
        torch.save(classifier, tmp_path / "other.pth")
        with pytest.raises(PipelineError, match="wrong checksum"):
            fetch(published("photo_clip"), tmp_path, url=str(tmp_path / "other.pth"))

    @needs_package
    def test_fetched_and_unfetched_are_the_same_encoder(
        self, real: ClipEncoder, tmp_path: Path
    ) -> None:
        path = fetch(published("photo_clip"), tmp_path)
        assert path.suffix == ".safetensors"
        fetched = load_clip(PHOTO_CLIP, CPU, cache_dir=tmp_path)
        assert fetched.fingerprint() == real.fingerprint()

    @needs_package
    def test_dense_features_are_the_head_at_every_position(self, real: ClipEncoder) -> None:
        image = torch.rand(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
        visual: Any = real.visual
        features = visual.trunk.forward_features(real.normalise(image)).flatten(2).mT
        pooled = torch.nn.functional.normalize(visual.head(features).mean(dim=1), dim=-1)
        torch.testing.assert_close(pooled, real.encode_images(image))
