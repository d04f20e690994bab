"""Every case of the repository agrees; what is changed, missing or unknown does not pass."""

from __future__ import annotations

import json
import re
import runpy
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from .__main__ import DEFAULT_FOLDER, main
from .checks import MAX_BOUND, Result, close, equal, first_is_clear
from .runner import FAMILIES, find_cases, run_case, run_folder
from .training import train_steps
from .vectors import IO, RECORD, WEIGHTS, read_vectors

DATA = DEFAULT_FOLDER
NAMES, UNKNOWN = find_cases(DATA)

# Tensors that are given, not compared, by family; all others are outputs.
INPUTS = {
    "zutis_forward": r"image|text_embeddings",
    "zutis_predict": r"mask_proposals|patch_tokens|text_embeddings",
    "zutis_criterion": r"(?<!grad\.)(mask_proposals|patch_tokens)|text_embeddings|\w+_masks",
    "zutis_train_steps": r"image|text_embeddings|\w+_masks",
    "selfmask_forward": r"image",
    "bilateral_solver": r"image|coarse_mask",
    "spectral_voting": r"candidates|features",
    "denseclip_": r"image|text_embeddings",
    "text_embeddings": r"clip_image",
    "copy_paste": r"(?<!out\.)(image|semantic|instance)",
    "running_score": r"labels|preds",
}

# Published numbers of the records by family, and the line that compares them; a star is any key.
NUMBERS: dict[str, dict[tuple[str | int, ...], str]] = {
    "zutis_predict": {
        ("instance", "None.full", 0, "category_id"): "instance.None.full.labels",
        ("instance", "hard.full", 3, "image_id"): "instance.hard.full.labels",
        ("instance", "linear.full", 1, "score"): "instance.linear.full.scores",
        ("instance", "gaussian.full", 5, "bbox", 2): "instance.gaussian.full.boxes",
        ("instance", "hard_t2_thr06.full", 0, "area"): "instance.hard_t2_thr06.full.boxes",
    },
    "zutis_criterion": {
        ("cases", "a", "ce_loss"): "a/ce_loss",
        ("cases", "b", "mask_loss"): "b/mask_loss",
        ("cases", "b", "loss"): "b/loss",
        ("cases", "a", "instances_per_image", 1): "a/instances_per_image",
        ("cases", "a", "matches", 2, "query_indices", 0): "a/matches",
        ("cases", "a", "matches", 3, "matched_cost_sum"): "a/matched_cost_sum",
        ("cases", "a", "returned_query_indices", 1): "a/returned_indices",
    },
    "zutis_train_steps": {
        ("steps", 0, "ce_loss"): "steps/ce_loss",
        ("steps", 1, "mask_loss"): "steps/mask_loss",
        ("steps", 2, "loss"): "steps/loss",
        ("steps", 2, "lr", 3): "steps/lr",
        ("step0_gradients", "query_embed", "l2"): "step0_gradients.l2",
        ("step0_gradients", "encoder.ln_post.bias", "sum"): "step0_gradients.sum",
        ("step0_gradients", "ffn1.layers.0.bias", "absmax"): "step0_gradients.absmax",
        ("parameters_after_3_steps", "encoder.proj", "l2"): "parameters_after_3_steps.l2",
        ("parameters_after_3_steps", "query_embed", "sum"): "parameters_after_3_steps.sum",
    },
    "bilateral_solver": {
        ("params", "cg_maxiter"): "params/cg_maxiter",
        ("cases", "b", "n_vertices"): "b/n_vertices",
    },
    "spectral_voting": {
        ("voting", "default", "kept_original_indices", 3): "default/kept_original_indices",
        ("voting", "small_large", "best_original_index"): "small_large/best_original_index",
        ("voting", "no_filter", "best_index_among_kept"): "no_filter/best_index_among_kept",
        (
            "spectral",
            "k4",
            "smallest_generalised_eigenvalues",
            2,
        ): "spectral.k4.smallest_generalised_eigenvalues",
    },
    "denseclip_": {("A.max_confidence_per_class", 0, 1): "A/max_confidence_per_class"},
    "text_embeddings": {("n_templates",): "n_templates"},
    "copy_paste": {
        ("cases", "a", "randint_calls_low_high_value", 2, 1): "a/randint_calls_low_high_value",
        ("cases", "b", "instance_areas", 1): "b/instance_areas",
    },
    "poly_lr": {
        ("single_group_schedules", "5e-05", 7): "single_group_schedules.5e-05",
        ("lr_per_step_per_group", 9, 0): "lr_per_step_per_group",
        ("param_groups", 1, "n_tensors"): "param_groups.decoder.n_tensors",
        ("param_groups", 4, "n_parameters"): "param_groups.ffn2.n_parameters",
        ("param_groups", 3, "weight_decay"): "param_groups.ffn1.weight_decay",
        ("param_groups", 0, "betas", 1): "param_groups.encoder.betas",
        ("param_groups", 2, "eps"): "param_groups.query_embed.eps",
        ("param_groups", 2, "lr"): "param_groups.query_embed.lr",
    },
    "running_score": {
        ("cumulative_scores_after_each_update", 0, "scores", "Mean IoU"): "0/Mean IoU",
        ("cumulative_scores_after_each_update", 1, "scores", "FreqW Acc"): "1/FreqW Acc",
        ("cumulative_scores_after_each_update", 1, "scores", "Mean Acc"): "1/Mean Acc",
        ("cumulative_scores_after_each_update", 2, "scores", "Pixel Acc"): "2/Pixel Acc",
        ("cumulative_scores_after_each_update", 2, "class_iou", "3"): "2/class_iou",
    },
    "checkpoint_layout_zutis_vit_": {
        ("tensors", "encoder.proj", 1): "shapes",
        ("n_parameters",): "n_parameters",
        ("n_tensors",): "n_tensors",
    },
    "checkpoint_layout_selfmask_nq": {
        ("tensors", "encoder.pos_embed", 1): "shapes",
        ("n_parameters",): "n_parameters",
        ("n_tensors",): "n_tensors",
    },
}


def prefix_of(name: str) -> str:
    return next(prefix for prefix in FAMILIES if name.startswith(prefix))


def files_of(name: str) -> list[Path]:
    """The files of a case, with the weights that its record names."""
    record = json.loads((DATA / (name + RECORD)).read_text())
    files = {DATA / (name + suffix) for suffix in (RECORD, IO, WEIGHTS)}
    if "weights_file" in record:
        files.add(DATA / record["weights_file"].split(" ")[0])
    return sorted(path for path in files if path.exists())


@pytest.fixture
def copied(tmp_path: Path) -> Callable[..., Path]:
    """Function that copies cases into a folder of their own."""

    def copy(*names: str) -> Path:
        for path in {path for name in names for path in files_of(name)}:
            shutil.copy(path, tmp_path)
        return tmp_path

    return copy


def change_record(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    record = json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps(record))


def change_tensors(path: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def failures(results: list[Result]) -> str:
    return "\n".join(f"{r.name}: {r.reason}" for r in results if not r.ok)


@pytest.mark.parametrize("name", NAMES)
def test_agrees_with_the_published_code(name: str) -> None:
    results = list(run_case(DATA, name))
    assert results
    assert not failures(results)


def test_every_family_has_vectors_here() -> None:
    assert UNKNOWN == []
    assert {prefix_of(name) for name in NAMES} == set(FAMILIES)


def disturb(tensor: Tensor) -> Tensor:
    """One float off by a thousandth of the largest; of integers, some, as not all are compared."""
    disturbed = tensor.clone().flatten()
    if tensor.is_floating_point():
        largest = disturbed.abs().argmax()
        disturbed[largest] += 1e-3 * disturbed[largest].abs()
    else:
        disturbed[::5] = (disturbed[::5] == 0).to(tensor.dtype)
    return disturbed.reshape(tensor.shape)


def disturb_number(record: Any, path: tuple[str | int, ...]) -> None:
    *parents, last = path
    for key in parents:
        record = record[key]
    value = record[last]
    record[last] = value + 1 if isinstance(value, int) else value * 1.001


@pytest.mark.parametrize("name", NAMES)
def test_each_disturbed_output_is_not_ok(name: str, copied: Callable[..., Path]) -> None:
    folder = copied(name)
    prefix = prefix_of(name)
    numbers = NUMBERS.get(prefix, {})
    lines = {f"{name}/{line}" for line in numbers.values()}

    def disturb_numbers(record: dict[str, Any]) -> None:
        for path in numbers:
            disturb_number(record, path)

    change_record(folder / (name + RECORD), disturb_numbers)
    if (folder / (name + IO)).exists():
        inputs = re.compile(rf"(.*\.)?({INPUTS[prefix]})(\.\d+)?")
        tensors = load_file(folder / (name + IO))
        outputs = [key for key in tensors if not inputs.fullmatch(key)]
        lines |= {f"{name}/{key}" for key in outputs}
        save_file(tensors | {key: disturb(tensors[key]) for key in outputs}, folder / (name + IO))
    assert lines
    failed = {result.name.replace("/", ".") for result in run_case(folder, name) if not result.ok}
    assert {line for line in lines if line.replace("/", ".") not in failed} == set()


@pytest.mark.parametrize(
    "key", ["query_embed", "encoder.conv1.weight", "decoder.layers.0.norm3.bias"]
)
def test_other_weights_are_not_ok(key: str, copied: Callable[..., Path]) -> None:
    name = "zutis_forward_p32"
    folder = copied(name)
    change_tensors(folder / (name + WEIGHTS), lambda w: w[key].mul_(1.01))
    assert failures(list(run_case(folder, name)))


def test_a_checkpoint_layout_with_another_name_is_not_ok(copied: Callable[..., Path]) -> None:
    name = "checkpoint_layout_selfmask_nq20"
    folder = copied(name)

    def rename(record: dict[str, Any]) -> None:
        record["tensors"]["stranger"] = record["tensors"].pop("encoder.norm.bias")

    change_record(folder / (name + RECORD), rename)
    [failed] = [result for result in run_case(folder, name) if not result.ok]
    assert failed.name == f"{name}/names"
    assert failed.reason == "2 differ: encoder.norm.bias, stranger"


def test_sub_cases_and_names_may_differ(copied: Callable[..., Path]) -> None:
    """Sub-case B gone, C called Z, the file called otherwise: nothing of it is fixed."""
    folder = copied("zutis_forward_p32")

    def rearrange(tensors: dict[str, Any]) -> None:
        for key in list(tensors):
            if key.startswith(("B.", "C.")):
                value = tensors.pop(key)
                if key.startswith("C."):
                    tensors[f"Z.{key[2:]}"] = value

    for suffix in (RECORD, IO, WEIGHTS):
        (folder / f"zutis_forward_p32{suffix}").rename(folder / f"zutis_forward_p8{suffix}")
    change_tensors(folder / f"zutis_forward_p8{IO}", rearrange)
    change_record(folder / f"zutis_forward_p8{RECORD}", lambda record: rearrange(record["io"]))
    results = list(run_folder(folder))
    assert not failures(results)
    assert {result.name.split("/")[1] for result in results} == {"A", "Z"}


def test_train_steps_need_no_record_beside_the_weights(copied: Callable[..., Path]) -> None:
    """Then the decoder has the published number of heads."""
    folder = copied("zutis_train_steps")
    assert not (folder / "zutis_forward_p16.json").exists()
    assert find_cases(folder) == (["zutis_train_steps"], [])
    assert not failures(list(run_folder(folder)))


@pytest.mark.parametrize(
    ("name", "suffix"),
    [
        ("zutis_predict", IO),
        ("zutis_predict", RECORD),
        ("zutis_forward_p32", WEIGHTS),
        ("selfmask_forward", RECORD),
    ],
)
def test_a_missing_companion_is_named(
    name: str, suffix: str, copied: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copied(name)
    (folder / (name + suffix)).unlink()
    assert main([str(folder)]) == 1
    [line] = capsys.readouterr().out.splitlines()
    assert line.startswith(f"{name} ")
    assert line.endswith(f"not ok: FileNotFoundError: {name}{suffix} is missing")


def test_missing_shared_weights_are_named(copied: Callable[..., Path]) -> None:
    folder = copied("denseclip_vit")
    (folder / f"clip_tiny_vit16{WEIGHTS}").unlink()
    [result] = run_folder(folder)
    assert "clip_tiny_vit16.weights.safetensors is missing" in result.reason


def test_without_its_record_a_case_says_nothing_about_shared_weights(
    copied: Callable[..., Path],
) -> None:
    folder = copied("text_embeddings")
    (folder / f"text_embeddings{RECORD}").unlink()
    [result] = run_folder(folder)
    assert result.reason == "FileNotFoundError: text_embeddings.json is missing"


def test_a_setting_without_instances_may_have_stored_masks(copied: Callable[..., Path]) -> None:
    """No proposal reaches a probability of 1: then an empty stack is all there is to store."""
    folder = copied("zutis_predict")
    setting = "hard_thr1.0.full"
    io_path, record_path = (folder / f"zutis_predict{suffix}" for suffix in (IO, RECORD))
    change_record(record_path, lambda record: record["instance"].update({setting: []}))
    assert not failures(list(run_folder(folder)))
    empty = torch.zeros(0, 45, 63, dtype=torch.uint8)
    change_tensors(io_path, lambda tensors: tensors.update({f"masks.{setting}": empty}))
    assert not failures(list(run_folder(folder)))
    change_tensors(io_path, lambda t: t.update({f"masks.{setting}": torch.zeros(1, 45, 63).byte()}))
    [failed] = [result for result in run_folder(folder) if not result.ok]
    assert failed.reason == "0 instances, published 0 with 1 masks"


@pytest.mark.parametrize("seed", [0, 1])
def test_a_relu_on_the_edge_fails_no_gradient(seed: int, copied: Callable[..., Path]) -> None:
    """Weights off by their last bit switch a ReLU of these vectors; another computer may too."""
    name = "zutis_train_steps"
    vectors = read_vectors(copied(name), name, io=True, weights=True)
    generator = torch.Generator().manual_seed(seed)
    for key, value in vectors.stored_weights.items():
        noise = torch.randn(value.shape, generator=generator, dtype=torch.float64)
        vectors.stored_weights[key] = (value.double() * (1 + 6e-8 * noise)).float()
    assert not failures([r for _, check in train_steps(vectors) for r in check()])


@pytest.mark.parametrize("suffix", [RECORD, IO])
def test_a_damaged_file_fails_and_the_others_run(
    suffix: str, copied: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copied("copy_paste", "running_score")
    path = folder / f"copy_paste{suffix}"
    path.write_bytes(path.read_bytes()[:40])
    assert main([str(folder)]) == 1
    first, *others = capsys.readouterr().out.splitlines()
    assert first.startswith("copy_paste ")
    assert "not ok: " in first
    assert others
    assert all(line.startswith("running_score/") and line.endswith(" ok") for line in others)


def test_a_broken_sub_case_fails_and_the_others_run(copied: Callable[..., Path]) -> None:
    folder = copied("bilateral_solver")
    path = folder / f"bilateral_solver{IO}"
    change_tensors(path, lambda t: t.update({"a.image": t["a.image"][:5].contiguous()}))
    change_record(
        folder / f"bilateral_solver{RECORD}", lambda r: r["io"]["a.image"].update(shape=[5, 96, 3])
    )
    results = list(run_folder(folder))
    [failed] = [result for result in results if not result.ok]
    assert failed.name == "bilateral_solver/a"
    assert "differ in size" in failed.reason
    assert any(result.name == "bilateral_solver/c/refined" for result in results)


def test_unknown_files_fail(
    copied: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copied("poly_lr")
    for name in ("zutis_dreams.json", "foo.weights.safetensors", "x.tensors.safetensors"):
        (folder / name).write_text("{}")
    (folder / "LICENSE").write_text("no vectors")
    (folder / "make.py").write_text("no vectors")
    (folder / "README.md").write_text("about")
    (folder / "manifest.json").write_text("{}")
    assert main([str(folder)]) == 1
    wrong = [line for line in capsys.readouterr().out.splitlines() if not line.endswith(" ok")]
    assert [line.split()[0] for line in wrong] == [
        "foo.weights.safetensors",
        "x.tensors.safetensors",
        "zutis_dreams.json",
    ]
    assert all("not ok: unknown" in line for line in wrong)


def test_shared_weights_without_a_case_are_no_failure(copied: Callable[..., Path]) -> None:
    folder = copied("poly_lr")
    shutil.copy(DATA / f"clip_tiny_vit16{WEIGHTS}", folder)
    assert find_cases(folder) == (["poly_lr"], [])


def test_tensors_that_nobody_reads_or_wrote_fail(copied: Callable[..., Path]) -> None:
    folder = copied("running_score")

    def change(tensors: dict[str, Tensor]) -> None:
        tensors["confusion.9"] = tensors["confusion.0"].clone()

    change_tensors(folder / f"running_score{IO}", change)
    listed = {"shape": [2, 2], "dtype": "uint8"}
    change_record(folder / f"running_score{RECORD}", lambda r: r["io"].update({"preds.9": listed}))
    failed = {result.name: result.reason for result in run_folder(folder) if not result.ok}
    assert failed.keys() == {"running_score/preds.9", "running_score/confusion.9"}
    assert "absent" in failed["running_score/preds.9"]
    assert "no check reads" in failed["running_score/confusion.9"]


def test_the_module_runs_a_folder(
    copied: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = copied("poly_lr", "copy_paste")
    path = folder / f"poly_lr{RECORD}"
    change_record(path, lambda r: disturb_number(r, ("lr_per_step_per_group", 4, 2)))
    monkeypatch.setattr(sys, "argv", ["tests.reference", str(folder)])
    with pytest.raises(SystemExit) as stop:
        runpy.run_module("tests.reference", run_name="__main__")
    assert stop.value.code == 1
    good = re.compile(r"(copy_paste|poly_lr)/\S+ +abs \d\.\d\de[+-]\d\d  rel \d\.\d\de[+-]\d\d  ok")
    [wrong] = [line for line in capsys.readouterr().out.splitlines() if not good.fullmatch(line)]
    assert re.fullmatch(r"poly_lr/lr_per_step_per_group .* not ok: error .*, allowed .*", wrong)


def test_a_folder_in_which_all_agree_is_0(
    copied: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(copied("poly_lr", "running_score"))]) == 0
    assert all(line.endswith("  ok") for line in capsys.readouterr().out.splitlines())


@pytest.mark.parametrize("arguments", [["no/such/folder"], ["a", "b"], ["--strict"]])
def test_wrong_usage_is_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    try:
        code: Any = main(arguments)
    except SystemExit as stop:
        code = stop.code
    assert code == 2
    assert "error: " in capsys.readouterr().err


def test_a_folder_without_a_case_is_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "README.md").write_text("nothing")
    assert main([str(tmp_path)]) == 2
    assert f"{tmp_path}: holds no case" in capsys.readouterr().err


def test_bounds_of_floats() -> None:
    published = np.array([1.0, -2.0])
    assert close("x", published + 1.9e-4, published).ok
    assert not close("x", published + 2.1e-4, published).ok
    assert not close("x", published + 1e-5, published, bound=5e-6).ok
    assert not close("x", 10 * published + 1.1 * MAX_BOUND, 10 * published).ok
    assert close("x", 1e6 * published + 1, 1e6 * published).ok
    assert close("x", [0.0], [0.0]).ok
    assert not close("x", [1e-6], [0.0]).ok


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_no_number_is_not_ok(value: float) -> None:
    assert not close("x", [1.0, value], [1.0, 2.0]).ok


def test_other_shapes_are_not_ok() -> None:
    assert "shape (2,), published (1,)" in close("x", [1.0, 1.0], [1.0]).reason
    assert not equal("x", [1, 1], [[1, 1]]).ok


def test_undecided_places_are_left_out() -> None:
    scores = torch.tensor([[0.5, 0.5], [0.4, 0.500001]]).unsqueeze(0)  # (1, K=2, 2)
    decided = first_is_clear(scores)
    assert decided.tolist() == [[True, False]]
    assert equal("x", [[0, 0]], [[0, 1]], decided=decided).ok
    assert not equal("x", [[1, 0]], [[0, 1]], decided=decided).ok
