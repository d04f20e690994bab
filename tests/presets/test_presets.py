"""Every preset is a params file that works; the repository's own is the preset `demo`."""

from __future__ import annotations

from pathlib import Path

import pytest
from ruamel.yaml import YAML

from pipeline.cli.benches import shipped_bench
from pipeline.doctor.workspace import missing_params
from pipeline.errors import PipelineError
from pipeline.methods.students import DenseClipPlusParams
from pipeline.models.plus.backbones import build_backbone
from pipeline.params.base import EncoderParams
from pipeline.params.reading import read_params
from pipeline.presets import list_presets, preset_text, write_preset
from pipeline.vocabulary.categories import load_category_set
from tests.paths import ROOT

NAMES = [name for name, _ in list_presets()]
# Categories, unseen ones, head, row of background, updates, guided ones, crop, base size, first
# rate, decay (DenseCLIP's published configurations).
PLUS = {
    "denseclip-plus-voc": (
        *(20, 5, "deeplabv2", "none"),
        *(20_000, 2000, 512, [2048, 512], 0.01, 5e-4),
    ),
    "denseclip-plus-stuff": (
        *(171, 15, "deeplabv2", "none"),
        *(80_000, 8000, 512, [2048, 512], 0.01, 5e-4),
    ),
    "denseclip-plus-context": (
        *(59, 10, "deeplabv3plus", "learned"),
        *(40_000, 4000, 480, [520, 520], 0.004, 1e-4),
    ),
    "denseclip-plus-free-voc": (
        *(20, 0, "deeplabv2", "none"),
        *(2000, 2000, 512, [2048, 512], 0.01, 5e-4),
    ),
    "denseclip-plus-free-context": (
        *(59, 0, "deeplabv2", "none"),
        *(4000, 4000, 480, [520, 520], 0.01, 5e-4),
    ),
    "denseclip-plus-free-stuff": (
        *(171, 0, "deeplabv2", "none"),
        *(8000, 8000, 512, [2048, 512], 0.01, 5e-4),
    ),
}


def test_the_presets_of_the_documentation_exist() -> None:
    papers = {"zutis-coco", "zutis-voc", "zutis-coca", "zutis-imagenet-s"}
    papers |= {"zutis-coco-b32", "zutis-coco-seen65", "zutis-imagenet-s-b16"}
    papers |= {"denseclip", "denseclip-rn50x16", *PLUS}
    own = {"best", "folder", "folder-offline", "folder-plus", "folder-selfmask"}
    assert set(NAMES) == {"demo", *own} | papers


@pytest.mark.parametrize("name", NAMES)
def test_a_preset_is_a_params_file(tmp_path: Path, name: str) -> None:
    path = tmp_path / "params.yaml"
    write_preset(name, path)
    params = read_params(path)
    assert path.read_text(encoding="utf-8") == preset_text(name)
    (tmp_path / "dvc.yaml").write_bytes((ROOT / "dvc.yaml").read_bytes())
    assert missing_params(tmp_path) == []
    for part in (params, *params.benches.values(), *params.audits.values()):
        assert load_category_set(part.categories)


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("zutis-")])
def test_a_papers_preset_has_the_papers_settings(tmp_path: Path, name: str) -> None:
    path = tmp_path / "params.yaml"
    write_preset(name, path)
    params = read_params(path)
    assert params.k == 500
    assert params.embed.encoder.model == "ViT-L-14-336-quickgelu"
    pools = {"imagenet1k"} if name.startswith("zutis-imagenet-s") else {"imagenet1k", "pass"}
    assert set(params.index) == pools
    assert (params.train.target, params.train.max_paste) == ("saliency", 10)
    assert (params.train.learning_rate, params.train.encoder_learning_rate) == (5e-5, 5e-6)
    assert params.train.iterations == (80_000 if "imagenet" in name else 20_000)
    assert params.precision == "float32"
    assert params.benches == {bench: shipped_bench(bench) for bench in params.benches} != {}


@pytest.mark.parametrize("name", PLUS)
def test_a_preset_of_denseclip_plus_has_the_published_settings(tmp_path: Path, name: str) -> None:
    path = tmp_path / "params.yaml"
    write_preset(name, path)
    params = read_params(path)
    student = params.train
    assert isinstance(student, DenseClipPlusParams)
    is_free = "-free-" in name
    assert (
        len(load_category_set(params.categories)),
        len(student.unseen),
        student.head,
        student.background,
        student.iterations,
        student.guided_iterations,
        student.crop_size,
        student.base_size,
        student.learning_rate,
        student.weight_decay,
    ) == PLUS[name]
    assert student.setting == ("annotation_free" if is_free else "zero_shot")
    assert student.self_training == ("off" if is_free else "on")
    assert (student.teacher, student.loss_average, student.batch_size) == ("online", "all", 16)
    assert (student.backbone, student.scale_range, student.max_share) == (
        "resnet101_v1c",
        [0.5, 2.0],
        0.75,
    )
    assert student.encoder.model == "RN50-quickgelu"
    assert student.data.split in ("trainaug", "train", "train2017")
    ((bench, section),) = params.benches.items()
    assert section == shipped_bench(bench)
    assert student.unseen == section.unseen
    assert section.background == (student.background == "learned")
    (entry,) = params.plus.values()
    assert (entry.train, entry.bench) == (student, section)
    assert params.precision == "float32"


IMAGENET1K = {"imagenet1k": {"format": "folder", "root": "data/raw/imagenet1k/train"}}


def encoder(model: str) -> dict[str, dict[str, str]]:
    return {"encoder": {"model": f"{model}-quickgelu", "pretrained": "openai"}}


DIFFERENCES: dict[str, dict[str, object]] = {
    "denseclip": {
        "categories": "voc_denseclip",
        "pseudo_label": encoder("RN50"),
        "train": encoder("RN50"),
        "evaluate": {"upsampling": "published"},
    },
    "denseclip-rn50x16": {
        "categories": "voc_denseclip",
        "pseudo_label": encoder("RN50x16"),
        "train": encoder("RN50x16"),
        "evaluate": {"upsampling": "published"},
    },
    "zutis-coca": {"categories": "coca"},
    "zutis-coco": {"categories": "coco"},
    "zutis-coco-b32": {
        "categories": "coco",
        "pseudo_label": encoder("ViT-B-32"),
        "train": encoder("ViT-B-32"),
    },
    "zutis-coco-seen65": {"categories": "coco_seen65"},
    "zutis-imagenet-s": {
        "categories": "imagenet_s919",
        "index": IMAGENET1K,
        "pseudo_label": encoder("ViT-B-32"),
        "train": encoder("ViT-B-32") | {"iterations": 80_000},
    },
    "zutis-imagenet-s-b16": {
        "categories": "imagenet_s919",
        "index": IMAGENET1K,
        "train": {"iterations": 80_000},
    },
}
BENCHES = {
    "denseclip": ["voc20", "context59", "coco_stuff"],
    "denseclip-rn50x16": ["voc20", "context59", "coco_stuff"],
    "zutis-coca": ["coca"],
    "zutis-coco": ["coco", "coco20k"],
    "zutis-coco-b32": ["coco20k"],
    "zutis-coco-seen65": ["coco_unseen"],
    "zutis-imagenet-s": ["imagenet_s919"],
    "zutis-imagenet-s-b16": ["imagenet_s919"],
    "zutis-voc": ["voc"],
}


@pytest.mark.parametrize("name", BENCHES)
def test_the_papers_presets_differ_in_little(name: str) -> None:
    yaml = YAML(typ="safe", pure=True)
    expected, content = yaml.load(preset_text("zutis-voc")), yaml.load(preset_text(name))
    for key, value in DIFFERENCES.get(name, {}).items():
        is_section = key in ("pseudo_label", "train", "evaluate")
        expected[key] = expected[key] | value if is_section else value
    assert list(content.pop("benches")) == BENCHES[name]
    expected.pop("benches")
    assert content == expected


def test_a_preset_is_summarised_by_its_first_line() -> None:
    summaries = dict(list_presets())
    assert all(summary and not summary.startswith("#") for summary in summaries.values())
    assert len(set(summaries.values())) == len(summaries)


def test_the_repositorys_params_are_the_preset_demo() -> None:
    assert (ROOT / "params.yaml").read_bytes() == preset_text("demo").encode()


def test_best_is_folder_with_what_refines_a_prediction(tmp_path: Path) -> None:
    contents = {}
    for name in ("folder", "best"):
        write_preset(name, tmp_path / name)
        contents[name] = YAML(typ="safe", pure=True).load(tmp_path / name)
    added = contents["best"]["evaluate"]
    assert {key: added.pop(key) for key in ("flip", "pamr", "crop_names", "joint_foreground")} == {
        "flip": True,
        "pamr": {"dilations": [4, 8, 16], "steps": 20},
        "crop_names": {"weight": 0.7, "margin": 0.0},
        "joint_foreground": True,
    }
    assert contents["best"]["train"].pop("logit_scale") == 20
    assert contents["best"] == contents["folder"]


def test_an_unknown_preset_names_the_known_ones() -> None:
    with pytest.raises(PipelineError, match="did you mean 'folder'") as caught:
        preset_text("foldr")
    assert all(name in str(caught.value) for name in NAMES)


@pytest.mark.parametrize("preset", ["folder", "best", "folder-offline", "folder-plus"])
def test_images_and_categories_fill_in_a_preset_of_own_photos(tmp_path: Path, preset: str) -> None:
    photos, path = tmp_path / "my photos", tmp_path / "params.yaml"
    photos.mkdir()
    names = ["no", "potted plant", 'a "quoted" name', "it's: odd", "7"]
    write_preset(preset, path, images=photos, categories=names)

    params = read_params(path)
    assert params.categories == names
    assert [source.root for source in params.index.values()] == [photos]

    before = preset_text(preset).splitlines()
    after = path.read_text(encoding="utf-8").splitlines()
    comments = [line for line in before if "#" in line]
    assert comments
    assert [line for line in after if "#" in line] == comments
    changed = [line for line in before if line not in after]
    assert all("categories:" in line or "root:" in line for line in changed)
    assert len(changed) == 2


def test_a_small_network_of_own_photos_is_taught_by_the_labels_of_one_clip(tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    write_preset("folder-plus", path)
    params = read_params(path)
    train = params.train
    assert isinstance(train, DenseClipPlusParams)
    assert (train.teacher, str(train.labels), train.background) == (
        "stored",
        "data/labels",
        "names",
    )
    assert train.iterations == train.guided_iterations
    assert 300 <= train.iterations <= 2000
    assert (train.crop_size, train.learning_rate, train.weight_decay) == (512, 0.01, 5e-4)
    encoders = {part.encoder for part in (params.embed, params.mask, params.pseudo_label, train)}
    assert encoders == {EncoderParams(model="RN50-quickgelu", pretrained="openai")}
    backbone = build_backbone(train.backbone, output_stride=train.output_stride)
    assert sum(value.numel() for value in backbone.parameters()) < 5e6


def test_images_alone_leave_the_categories(tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    write_preset("folder", path, images=tmp_path)
    assert "categories: [cat, dog]" in path.read_text(encoding="utf-8")


def test_a_folder_of_images_that_is_missing_is_named(tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    with pytest.raises(PipelineError, match=r"--images: .*/nowhere: no such folder"):
        write_preset("folder", path, images=tmp_path / "nowhere")
    assert not path.exists()


@pytest.mark.parametrize("options", [{"images": Path()}, {"categories": ["cat"]}])
def test_other_presets_take_no_images_or_categories(
    tmp_path: Path, options: dict[str, object]
) -> None:
    path = tmp_path / "params.yaml"
    with pytest.raises(PipelineError, match=r"belong to .* folder-plus, folder-offline, not demo"):
        write_preset("demo", path, **options)
    assert not path.exists()


def test_an_existing_file_is_kept_unless_forced(tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    path.write_text("mine")
    with pytest.raises(PipelineError, match="exists already; add --force"):
        write_preset("demo", path)
    assert path.read_text() == "mine"
    write_preset("demo", path, force=True)
    assert path.read_text(encoding="utf-8") == preset_text("demo")


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("zutis-")])
def test_a_papers_preset_behaves_like_the_published_code(tmp_path: Path, name: str) -> None:
    path = tmp_path / "params.yaml"
    write_preset(name, path)
    params = read_params(path)
    published = {
        "retrieve": {"overlap": "last", "num_negatives": 0},
        "mask": {"refine": True, "solver_iterations": 25},
        "pseudo_label": {
            "normalisation": "imagenet",
            "published_activation": True,
            "dense_attention": "maskclip",
            "key_affinity": "published",
            "position_resize": "size",
        },
        "train": {
            "normalisation": "imagenet",
            "position_resize": "scale",
            "token_norm": "map",
            "templates": "name",
            "logit_scale": 1.0,
            "mask_loss_reduction": "sum",
            "keep_last_row_column": False,
            "stop_gradient": True,
        },
        "evaluate": {"score_resolution": "token", "whole_patches": False},
    }
    content = params.model_dump()
    for section, settings in published.items():
        assert {key: content[section][key] for key in settings} == settings, section


def test_a_home_that_no_shell_has_expanded_is_written_in_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "photos").mkdir()
    path = tmp_path / "params.yaml"
    write_preset("folder", path, images=Path("~/photos"))
    assert read_params(path).index["photos"].root == tmp_path / "photos"
    with pytest.raises(PipelineError, match="a URL cannot be used here"):
        write_preset("folder", tmp_path / "other.yaml", images=Path("s3://bucket"))
