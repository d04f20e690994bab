"""What params.yaml may hold, and what is said of everything else."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from pydantic import ValidationError

from pipeline.errors import PipelineError
from pipeline.inference.protocol import labeller_protocol
from pipeline.methods.dense import DenseClipParams
from pipeline.params.base import EncoderParams, Section, TaggedFile
from pipeline.params.benches import FORMATS, TrainingDataParams
from pipeline.params.reading import parse_params, parse_section, read_params
from pipeline.params.sections import Params
from pipeline.vocabulary.categories import Names

MINIMAL = "categories: [cat, dog]\nindex: {demo: {root: data/images}}\n"


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "params.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def read(tmp_path: Path, text: str) -> Params:
    return read_params(write(tmp_path, MINIMAL + text))


def message_of(tmp_path: Path, text: str) -> str:
    """The error message about the file, which it must name, without that name."""
    path = write(tmp_path, text)
    with pytest.raises(PipelineError) as caught:
        read_params(path)
    lines = str(caught.value).splitlines()
    assert all(line.startswith(f"{path}: ") for line in lines)
    return "\n".join(line.removeprefix(f"{path}: ") for line in lines)


def test_a_minimal_file_has_the_papers_settings(tmp_path: Path) -> None:
    params = read(tmp_path, "")
    assert params.categories == ["cat", "dog"]
    assert params.index["demo"].root == Path("data/images")
    assert params.k == 500
    assert params.embed.encoder.model == "ViT-L-14-336-quickgelu"
    assert params.train.encoder.model == "ViT-B-16-quickgelu"
    assert (params.train.learning_rate, params.train.encoder_learning_rate) == (5e-5, 5e-6)
    assert (params.train.iterations, params.train.crop_size, params.train.max_paste) == (
        20_000,
        384,
        10,
    )
    assert params.pseudo_label.prompt_denoising is None
    assert params.benches == {}


def test_params_do_not_change(tmp_path: Path) -> None:
    params = read(tmp_path, "")
    with pytest.raises(ValidationError, match="frozen"):
        params.train.iterations = 3


def test_scalars_are_read_as_yaml_1_2_has_them(tmp_path: Path) -> None:
    params = read(tmp_path, "train: {learning_rate: 1e-4, weight_decay: 0}\nbackground: [no, on]\n")
    assert params.train.learning_rate == 0.0001
    assert params.train.weight_decay == 0.0
    assert params.background == ["no", "on"]


@pytest.mark.parametrize("number", ["1e-4", "1.0e-4", "0.0001", "1E-4"])
def test_every_spelling_of_a_float_is_a_float(tmp_path: Path, number: str) -> None:
    assert read(tmp_path, f"train: {{learning_rate: {number}}}\n").train.learning_rate == 1e-4


@pytest.mark.parametrize(
    ("text", "key", "hint"),
    [
        ("kk: 3", "kk", "'k'"),
        ("trian: {}", "trian", "'train'"),
        ("train: {iteratoins: 3}", "train.iteratoins", "'iterations'"),
        ("train: {encoder: {modle: x}}", "train.encoder.modle", "'model'"),
        ("benches: {voc: {format: voc, root: x, splt: val}}", "benches.voc.splt", "'split'"),
        ("worlds: {demo: {sise: 48}}", "worlds.demo.sise", "'size'"),
        (
            "audits: {a: {root: x, categories: c, catgories: c}}",
            "audits.a.catgories",
            "'categories'",
        ),
    ],
)
def test_an_unknown_key_is_named_with_the_likely_one(
    tmp_path: Path, text: str, key: str, hint: str
) -> None:
    message = message_of(tmp_path, f"{MINIMAL}{text}\n")
    assert message == f"unknown key {key!r}; did you mean {hint}?"


def test_an_unknown_key_of_a_source_is_named_with_the_likely_one(tmp_path: Path) -> None:
    message = message_of(tmp_path, "categories: [cat]\nindex: {demo: {root: x, fromat: folder}}\n")
    assert message == "unknown key 'index.demo.fromat'; did you mean 'format'?"


def test_an_unknown_key_like_no_other_lists_its_section(tmp_path: Path) -> None:
    message = message_of(tmp_path, f"{MINIMAL}worlds: {{demo: {{xyz: 3}}}}\n")
    assert message == (
        "unknown key 'worlds.demo.xyz'; known keys: bench_images, index_images, size"
    )


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("index: {demo: {root: x}}", "categories"),
        ("categories: [cat]", "index"),
        ("categories: [cat]\nindex: {demo: {format: folder}}", "index.demo.root"),
        (f"{MINIMAL}audits: {{demo: {{root: x}}}}", "audits.demo.categories"),
    ],
)
def test_a_missing_key_is_named(tmp_path: Path, text: str, key: str) -> None:
    assert message_of(tmp_path, text) == f"key {key!r} is missing"


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("train: {learning_rate: '1e-4'}", "train.learning_rate", "'1e-4'"),
        ("train: {learning_rate: .nan}", "train.learning_rate", "nan"),
        ("train: {learning_rate: 0}", "train.learning_rate", "0"),
        ("train: {iterations: 2e4}", "train.iterations", "20000.0"),
        ("train: {stop_gradient: no}", "train.stop_gradient", "'no'"),
        ("train: {flip: 1.5}", "train.flip", "1.5"),
        ("train: {scale_range: [0.1]}", "train.scale_range", "[0.1]"),
        ("train: {target: all}", "train.target", "'all'"),
        ("train: {encoder: ViT-B-16}", "train.encoder", "'ViT-B-16'"),
        ("train:", "train", "None"),
        ("mask: {source: spectral, clusters: [2, 0]}", "mask.clusters.1", "0"),
        ("mask: {weights: 3}", "mask.weights", "3"),
        ("mask: {source: [selfmask]}", "mask.source", "['selfmask']"),
        ("train: {student: {zutis: 1}}", "train.student", "{'zutis': 1}"),
        ("pseudo_label: {method: }", "pseudo_label.method", "None"),
        ("pseudo_label: {key_smoothing: -0.1}", "pseudo_label.key_smoothing", "-0.1"),
        ("worlds: {demo: {size: 16}}", "worlds.demo.size", "16"),
        ("benches: {voc: {root: x, format: vox}}", "benches.voc.format", "'vox'"),
        ("background: []", "background", "[]"),
        ("k: 0", "k", "0"),
        ("k: '40'", "k", "'40'"),
        ("k: true", "k", "True"),
        ("seed: -1", "seed", "-1"),
        ("device: gpu", "device", "'gpu'"),
        ("precision: half", "precision", "'half'"),
        ("evaluate: {upsampling: twice}", "evaluate.upsampling", "'twice'"),
        ("benches: {a: {format: voc, root: a, rounding: up}}", "benches.a.rounding", "'up'"),
    ],
)
def test_a_wrong_value_is_named_with_its_key(
    tmp_path: Path, text: str, key: str, value: str
) -> None:
    message = message_of(tmp_path, f"{MINIMAL}{text}\n")
    assert message.startswith(f"{key}: ")
    assert message.endswith(f", got {value}")
    assert "\n" not in message


def test_a_list_of_categories_names_the_entry_that_is_no_name(tmp_path: Path) -> None:
    message = message_of(tmp_path, "categories: [cat, 3]\nindex: {demo: {root: x}}\n")
    assert message == "categories.1: Input should be a valid string, got 3"


def test_categories_are_a_name_or_a_list(tmp_path: Path) -> None:
    message = message_of(tmp_path, "categories: 3\nindex: {demo: {root: x}}\n")
    assert [line.split(":")[0] for line in message.splitlines()] == ["categories", "categories"]
    assert "string" in message
    assert "list" in message


def test_an_index_needs_a_source(tmp_path: Path) -> None:
    assert message_of(tmp_path, "categories: [cat]\nindex: {}\n").startswith("index: ")


def test_every_mistake_is_named_at_once(tmp_path: Path) -> None:
    message = message_of(tmp_path, f"{MINIMAL}k: 0\nseed: x\ntrain: {{flip: 2, flop: 1}}\n")
    assert {line.split(":")[0].split(";")[0] for line in message.splitlines()} == {
        "k",
        "seed",
        "train.flip",
        "unknown key 'train.flop'",
    }


@pytest.mark.parametrize(
    ("text", "found"), [("", "nothing"), ("# nothing\n", "nothing"), ("- k\n- 3\n", "a list")]
)
def test_a_file_without_keys_is_refused(tmp_path: Path, text: str, found: str) -> None:
    assert message_of(tmp_path, text) == f"expected `key: value` lines, found {found}"


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("k: 3\nseed: [1, 2", 2),
        ("k: 1\nk: 2\n", 2),
        ("k: 1\n---\nk: 2\n", 2),
        ("k: 1: 2\n", 1),
        ("k: 1\nseed: 2020-13-45\n", 2),
        (f"k: {'9' * 5000}\n", 1),
        ("k: !!int ''\n", 1),
    ],
)
def test_a_file_that_is_no_yaml_is_refused_with_the_line(
    tmp_path: Path, text: str, line: int
) -> None:
    message = message_of(tmp_path, text)
    assert message.startswith(f"not valid YAML: line {line}, column ")
    assert "\n" not in message


def test_a_file_nested_without_end_is_refused(tmp_path: Path) -> None:
    assert message_of(tmp_path, f"k: {'[' * 5000}") == (
        "not valid YAML: nested too deeply; close the brackets that are open"
    )


def test_a_file_of_bytes_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    path.write_bytes(b"\xff\xd8\xff\xe0")
    with pytest.raises(PipelineError, match=f"{path}: not valid YAML"):
        read_params(path)


def test_a_missing_file_is_named_with_the_way_to_get_one(tmp_path: Path) -> None:
    with pytest.raises(PipelineError, match=r"params\.yaml: no such file; `pipeline init"):
        read_params(tmp_path / "params.yaml")


def test_a_folder_is_no_params_file(tmp_path: Path) -> None:
    with pytest.raises(PipelineError, match=f"{tmp_path}: "):
        read_params(tmp_path)


def test_parsed_content_is_checked_under_the_name_given() -> None:
    content: dict[str, Any] = {"categories": ["cat"], "index": {"a": {"root": "x"}}, "k": 0}
    with pytest.raises(PipelineError, match=r"^mine: k: "):
        parse_params(content, name="mine")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("train: {learning_rate: .inf}", "train.learning_rate: Input should be a finite number"),
        ("train: {scale_range: [1.2, 0.6]}", "train.scale_range: Input should be in ascending"),
        (f"seed: {2**63}", "seed: Input should be less than"),
        ("background: [nothing, ' ']", "background.1: the name is empty"),
        ("worlds: {a/b: {}}", "worlds: 'a/b' is no name for an entry"),
        ("benches: {..: {format: voc, root: x}}", "benches: '..' is no name for an entry"),
        ("train: [1]", "train: expected `key: value` lines, got [1]"),
    ],
)
def test_values_that_would_fail_later_are_refused_here(
    tmp_path: Path, text: str, said: str
) -> None:
    assert message_of(tmp_path, MINIMAL + text).startswith(said)


def test_the_defaults_are_those_of_the_published_code(tmp_path: Path) -> None:
    params = read(tmp_path, "")
    assert (params.mask.refine, params.mask.solver_iterations) == (True, 25)
    dense = params.pseudo_label
    assert (dense.normalisation, dense.dense_attention) == ("imagenet", "maskclip")
    assert (dense.key_affinity, dense.position_resize) == ("published", "size")
    assert (dense.published_activation, dense.logit_scale) == (True, 100.0)
    train = params.train
    assert (train.normalisation, train.position_resize, train.token_norm) == (
        "imagenet",
        "scale",
        "map",
    )
    assert (train.templates, train.logit_scale, train.mask_loss_reduction) == ("name", 1.0, "sum")
    assert (train.keep_last_row_column, train.stop_gradient) == (False, True)
    assert (params.evaluate.score_resolution, params.evaluate.whole_patches) == ("token", False)


@pytest.mark.parametrize(
    ("section", "key"),
    [
        ("mask", "solver_iterations"),
        ("pseudo_label", "key_affinity"),
        ("pseudo_label", "position_resize"),
        ("train", "normalisation"),
        ("train", "position_resize"),
        ("train", "token_norm"),
        ("train", "mask_loss_reduction"),
        ("evaluate", "score_resolution"),
        ("evaluate", "whole_patches"),
    ],
)
def test_an_unknown_variant_is_refused(tmp_path: Path, section: str, key: str) -> None:
    message = message_of(tmp_path, f"{MINIMAL}{section}: {{{key}: better}}\n")
    assert message.startswith(f"{section}.{key}: ")


def test_a_weights_file_may_name_its_tag(tmp_path: Path) -> None:
    encoder = read(
        tmp_path, "train: {encoder: {model: ViT-B-32, pretrained: {tag: openai, file: a/b.pt}}}\n"
    ).train.encoder
    assert encoder.pretrained == TaggedFile(tag="openai", file="a/b.pt")
    assert EncoderParams.model_validate_json(encoder.model_dump_json()) == encoder
    assert EncoderParams.model_validate(encoder.model_dump()) == encoder


@pytest.mark.parametrize(
    ("model", "pretrained"),
    [
        ("ViT-B-32", "openai"),
        ("ViT-B-32", {"tag": "openai", "file": "a/b.pt"}),
        ("open_clip:ViT-B-32/openai", ""),
        ("open_clip:ViT-B-32/openai", "a/b.pt"),
        ("open_clip:ViT-B-32/openai", {"tag": "openai", "file": "a/b.pt"}),
    ],
)
def test_an_encoder_has_one_name_in_every_form(model: str, pretrained: Any) -> None:
    encoder = EncoderParams.model_validate({"model": model, "pretrained": pretrained})
    assert encoder.published_as() == ("ViT-B-32", "openai")
    labeller = SimpleNamespace(
        params=DenseClipParams(encoder=encoder), names=Names([], ["background"])
    )
    assert labeller_protocol(labeller)["encoder"] == "ViT-B-32/openai"


@pytest.mark.parametrize(
    ("pretrained", "message"),
    [
        ("{tga: x, file: y}", "key 'S.tag' is missing\nunknown key 'S.tga'; did you mean 'tag'?"),
        ("{tag: x}", "key 'S.file' is missing"),
        ("{tag: x, file: 3}", "S.file: Input should be a valid string, got 3"),
        ("{tag: '', file: y}", "S.tag: the name is empty; write one or remove it"),
        ("3", "S: Input should be a valid string, got 3"),
        ("[x]", "S: expected `key: value` lines, got ['x']"),
        ("null", "S: Input should be a valid string, got None"),
    ],
)
@pytest.mark.parametrize("section", ["train", "embed"])
def test_mistakes_in_the_weights_are_named_once(
    tmp_path: Path, section: str, pretrained: str, message: str
) -> None:
    text = f"{MINIMAL}{section}: {{encoder: {{pretrained: {pretrained}}}}}\n"
    found = message_of(tmp_path, text).replace(f"{section}.encoder.pretrained", "S")
    assert sorted(found.splitlines()) == message.splitlines()


def test_threads_are_auto_or_a_number(tmp_path: Path) -> None:
    assert read(tmp_path, "").threads == "auto"
    assert read(tmp_path, "threads: 3").threads == 3
    for wrong in ("0", "many", "2.5", "true"):
        assert "threads" in message_of(tmp_path, f"{MINIMAL}threads: {wrong}")


class Student(Section):
    data: TrainingDataParams = "archives"


class StudentFile(Section):
    train: Student = Student()


DATA_FORMATS = ", ".join(("folder", "webdataset", "parquet", *FORMATS))


def test_data_to_train_on_are_archives_a_pool_or_a_labelled_set() -> None:
    assert Student().data == "archives"
    assert parse_data("archives") == "archives"
    for name in ("folder", "webdataset", "parquet"):
        pool = parse_data({"format": name, "root": "photos"})
        assert (pool.format, pool.root) == (name, Path("photos"))
    bench = parse_data({"format": "voc", "root": "VOC2012", "split": "trainaug"})
    assert (type(bench), bench.split) == (FORMATS["voc"], "trainaug")
    for name in set(FORMATS) - {"index_png"}:
        assert parse_data({"format": name, "root": "x"}) == FORMATS[name](format=name, root="x")
    again = Student.model_validate(Student(data=bench).model_dump(mode="json"))
    assert again == Student(data=bench)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        *(
            (
                value,
                f"train.data: expected archives, or a section with a format of {DATA_FORMATS}, "
                f"got {value!r}",
            )
            for value in ("archivs", "voc", "", 3, None, [])
        ),
        ({"root": "x"}, f"key 'train.data.format' is missing; expected one of {DATA_FORMATS}"),
        (
            {"format": "vox", "root": "x"},
            f"train.data.format: expected one of {DATA_FORMATS}, got 'vox'",
        ),
        (
            {"format": ["voc"], "root": "x"},
            f"train.data.format: expected one of {DATA_FORMATS}, got ['voc']",
        ),
        ({"format": "folder"}, "key 'train.data.root' is missing"),
        (
            {"format": "folder", "root": "x", "patern": ""},
            "unknown key 'train.data.patern'; did you mean 'pattern'?",
        ),
        (
            {"format": "voc", "root": "x", "splt": "val"},
            "unknown key 'train.data.splt'; did you mean 'split'?",
        ),
        (
            {"format": "voc", "root": "x", "background": "no"},
            "train.data.background: Input should be a valid boolean, got 'no'",
        ),
    ],
)
def test_wrong_data_to_train_on_are_named_with_what_they_may_be(data: Any, message: str) -> None:
    with pytest.raises(PipelineError) as caught:
        parse_data(data)
    assert str(caught.value) == f"file: {message}"


def parse_data(data: Any) -> Any:
    return parse_section({"train": {"data": data}}, StudentFile, name="file").train.data


def test_filters_of_archives_are_no_part_of_a_recipe_unless_set() -> None:
    plain = {"categories": ["cat"], "index": {"a": {"root": "photos"}}}
    filters = {
        "retrieve": {"min_margin": 0.0, "min_distance": 0.05},
        "mask": {"source": "selfmask", "max_components": 2},
        "train": {"student": "zutis", "min_agreement": 0.25},
    }
    unset, filtered = parse_params(plain), parse_params(plain | filters)
    for section, fields in filters.items():
        before = getattr(unset, section).model_dump(mode="json")
        assert before.keys().isdisjoint(fields.keys() - {"source", "student"})
        after = getattr(filtered, section).model_dump(mode="json")
        assert {name: after[name] for name in fields} == fields
    assert not unset.train.needs_labels
    assert filtered.train.needs_labels


@pytest.mark.parametrize(
    ("section", "field", "value"),
    [
        ("retrieve", "min_margin", 2.5),
        ("retrieve", "min_distance", -0.1),
        ("mask", "max_components", 0),
        ("train", "min_agreement", 1.1),
    ],
)
def test_a_filter_out_of_its_range_is_named(section: str, field: str, value: float) -> None:
    entry = {"mask": {"source": "selfmask"}, "train": {"student": "zutis"}}.get(section, {})
    content = {"categories": ["cat"], "index": {"a": {"root": "photos"}}}
    with pytest.raises(PipelineError, match=rf"{section}\S*\.{field}"):
        parse_params(content | {section: entry | {field: value}})


def test_a_source_that_learns_first_makes_no_masks_of_a_banks_sample(tmp_path: Path) -> None:
    text = "categories: [cat]\nindex: {a: {root: a}}\nmask: {source: found}\nbank: {sample: %d}\n"
    message = message_of(tmp_path, text % 7)
    assert message.startswith("bank.sample: 7: mask.source: found learns from the archives")
    (tmp_path / "params.yaml").write_text(text % 0)
    assert read_params(tmp_path / "params.yaml").mask.source == "found"
