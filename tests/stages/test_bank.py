"""The stage `bank`: whose regions it keeps, and what they do to the labels."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from pipeline.cli import app
from pipeline.engine.runtime import Runtime
from pipeline.errors import PipelineError
from pipeline.formats.bank import RegionRows, pack_rows, read_bank, unpack_rows
from pipeline.formats.dense_labels import LabelStore
from pipeline.formats.images import decode_png, load_image
from pipeline.formats.shards import MANIFEST, open_samples, read_manifest
from pipeline.methods.bank import load_region_encoder
from pipeline.methods.dense import DenseClipParams
from pipeline.models.bank.labelling import BankLabeller, RegionBank
from pipeline.params.benches import VocBench
from pipeline.params.reading import parse_params
from pipeline.params.sections import BankParams
from pipeline.stages import bank, pseudo_label
from pipeline.vocabulary.categories import Names
from tests.stages.tiny_checkpoint import CATEGORIES
from tests.stages.tiny_workspace import Workspace, content, write_workspace

IMAGES = 14  # number 6 is a copy of 0, number 13 of 7


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory, tiny_clip: tuple[Path, Path]) -> Workspace:
    return write_workspace(
        tmp_path_factory.mktemp("bank") / "world", tiny_clip, index=IMAGES, bench=3
    )


def sources(workspace: Workspace, numbers: range) -> set[str]:
    """SHA-256 of image files of the index."""
    paths = sorted(workspace.images.iterdir())
    return {hashlib.sha256(paths[number].read_bytes()).hexdigest() for number in numbers}


def source_column(made: Path) -> list[str]:
    import pyarrow.parquet as pq

    return [
        name
        for path in sorted(made.glob("*.parquet"))
        for name in pq.read_table(path)["source_sha256"].to_pylist()
    ]


def counts(out: Path) -> dict[str, int]:
    found: dict[str, int] = json.loads((out / "stats.json").read_text())["counts"]
    return found


def test_the_bank_holds_archives_and_sample_each_image_once(
    workspace: Workspace, tmp_path: Path
) -> None:
    made = workspace.run("bank", tmp_path / "all", sample=100)
    everything = sources(workspace, range(IMAGES))
    assert set(source_column(made)) == everything
    stored = read_bank(made)
    stats = json.loads((tmp_path / "all/stats.json").read_text())
    assert len(stored.images) == counts(tmp_path / "all")["regions"]
    assert len(stored.images) == read_manifest(made)["samples"]
    assert stats["items"] == len(everything) == IMAGES - 2
    assert len(set(stored.images)) == len(everything)
    np.testing.assert_allclose(np.linalg.norm(stored.keys, axis=1), 1, atol=1e-2)
    np.testing.assert_allclose(np.linalg.norm(stored.values, axis=1), 1, atol=1e-2)

    archived = sources(workspace, range(0, IMAGES, 2))
    few = workspace.run("bank", tmp_path / "few", sample=2)
    others = sorted(everything - archived)[:2]
    assert set(source_column(few)) == archived | set(others)
    assert counts(tmp_path / "few")["sampled"] == 2
    none = workspace.run("bank", tmp_path / "none", sample=0)
    assert set(source_column(none)) == archived


def test_the_rows_are_the_means_of_the_masks_regions(workspace: Workspace, tmp_path: Path) -> None:
    made = workspace.run("bank", tmp_path, sample=0)
    stored = read_bank(made)
    encoder = region_encoder(workspace, tmp_path)
    store = open_samples(workspace.root / "some_masks/made")
    seen = set()
    place = 0
    for number in range(len(store)):
        jpeg = store.member(number, "jpg")
        if (name := store.json(number)["sha256"]) in seen:
            continue
        seen.add(name)
        pixels = torch.from_numpy(np.array(load_image(jpeg))).permute(2, 0, 1)[None] / 255
        _, [found] = encoder.encode(pixels, [decode_png(store.member(number, "mask.png")) > 0])
        rows = slice(place, place + len(found.keys))
        assert set(stored.images[rows]) <= {hashlib.sha256(jpeg).hexdigest()}
        np.testing.assert_allclose(stored.keys[rows], found.keys.numpy(), atol=2e-3)
        np.testing.assert_allclose(stored.values[rows], found.values.numpy(), atol=2e-3)
        place = rows.stop
    assert place == len(stored.images)


def region_encoder(workspace: Workspace, folder: Path) -> Any:
    return load_region_encoder(
        BankParams(),
        DenseClipParams(encoder=workspace.encoder, templates="name"),
        Names(CATEGORIES, ["background"]),
        runtime_of(folder),
    )


def runtime_of(folder: Path) -> Runtime:
    return Runtime(torch.device("cpu"), None, 0, folder / "cache")


def test_the_same_bytes_whatever_the_workers_cold_and_cached(
    workspace: Workspace, tmp_path: Path
) -> None:
    made = workspace.run("bank", tmp_path / "a", workers=0)
    expected = content(made)
    assert content(workspace.run("bank", tmp_path / "b", workers=3)) == expected
    assert content(workspace.run("bank", tmp_path / "a", workers=2)) == expected
    images = json.loads((tmp_path / "a/stats.json").read_text())["items"]
    assert counts(tmp_path / "a")["cached"] == images


def test_an_image_of_a_benchmark_is_refused_by_name(workspace: Workspace, tmp_path: Path) -> None:
    voc = tmp_path / "voc"
    shutil.copytree(workspace.root / "voc", voc)
    benches = {"benches.tiny": VocBench(format="voc", root=voc, categories=CATEGORIES)}
    workspace.run("bank", tmp_path / "apart", benches=benches)
    for number in (0, 1):  # of the archives, and of the sample
        stolen = sorted(workspace.images.iterdir())[number]
        shutil.copy(stolen, voc / "JPEGImages/im001.jpg")
        with pytest.raises(PipelineError, match=r"^bank: 1 of its images") as caught:
            workspace.run("bank", tmp_path / f"stolen{number}", benches=benches)
        assert "benches.tiny: " in str(caught.value)
        assert "im001.jpg" in str(caught.value)
        assert not (tmp_path / f"stolen{number}/made").exists()


def test_a_broken_image_of_the_sample_is_skipped_with_its_reason(
    tmp_path: Path, tiny_clip: tuple[Path, Path]
) -> None:
    own = write_workspace(tmp_path / "world", tiny_clip, index=6, bench=1)
    (own.images / "003.png").write_bytes(b"no image any more")
    own.run("bank", tmp_path / "out")
    stats = json.loads((tmp_path / "out/stats.json").read_text())
    assert [entry["reason"] for entry in stats["skipped_items"]] == [
        "changed since it was embedded"
    ]
    assert stats["items"] == 5


def label(
    workspace: Workspace,
    out: Path,
    made: Path | None,
    bank_params: BankParams | None,
    **options: Any,
) -> Path:
    pseudo_label.run(
        mask_dir=workspace.root / "masks/made",
        out_dir=out / "labels",
        categories=CATEGORIES,
        params=DenseClipParams(encoder=workspace.encoder, templates="name", workers=1, **options),
        bank_dir=made,
        bank=bank_params,
        runtime=runtime_of(out),
        stats_path=out / "labels.json",
    )
    return out / "labels"


def test_labels_are_mixed_from_other_images_regions(workspace: Workspace, tmp_path: Path) -> None:
    made = workspace.run("bank", tmp_path)
    off = label(workspace, tmp_path / "off", None, None)
    params = BankParams(weight=0.6, nearest=3)
    on = label(workspace, tmp_path / "on", made, params)
    noted = read_manifest(on)["pseudo_label"].pop("bank")
    assert (noted["weight"], noted["nearest"]) == (0.6, 3)
    assert "bank" not in read_manifest(off)["pseudo_label"]
    labels, own = LabelStore(on), LabelStore(off)
    stored = read_bank(made)
    mixed = BankLabeller(
        region_encoder(workspace, tmp_path),
        RegionBank(stored.images, stored.keys, stored.values),
        weight=0.6,
        nearest=3,
    )
    store = open_samples(workspace.root / "masks/made")
    differs = 0
    for number, key in enumerate(store.keys):
        jpeg = store.member(number, "jpg")
        pixels = torch.from_numpy(np.array(load_image(jpeg))).permute(2, 0, 1)[None] / 255
        mask = decode_png(store.member(number, "mask.png")) > 0
        expected, sure = mixed.label(pixels, [mask], [hashlib.sha256(jpeg).hexdigest()])
        found, confidence = labels.get(key)
        assert (found == expected[0].numpy()).mean() > 0.99
        assert np.abs(confidence - sure[0].numpy()).mean() < 0.01
        differs += int((found != own.get(key)[0]).sum())
    assert differs
    assert content(label(workspace, tmp_path / "on", made, params)) == content(on)  # cached


def test_weight_zero_is_the_labellers_own(workspace: Workspace, tmp_path: Path) -> None:
    made = workspace.run("bank", tmp_path)
    off = LabelStore(label(workspace, tmp_path / "off", None, None))
    on = LabelStore(label(workspace, tmp_path / "on", made, BankParams(weight=0.0)))
    for key in open_samples(workspace.root / "masks/made").keys:
        for own, mixed in zip(off.get(key), on.get(key), strict=True):
            np.testing.assert_array_equal(own, mixed)


def test_a_bank_of_other_settings_is_refused(workspace: Workspace, tmp_path: Path) -> None:
    made = workspace.run("bank", tmp_path)
    with pytest.raises(PipelineError, match=r"other settings .* run `pipeline bank` again"):
        label(workspace, tmp_path / "a", made, BankParams(facet="token"))
    with pytest.raises(PipelineError, match=r"other settings .* run `pipeline bank` again"):
        label(workspace, tmp_path / "b", made, BankParams(), dense_attention="value_only")


def test_an_empty_damaged_or_missing_bank_is_refused(workspace: Workspace, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    bank.write_empty(out_dir=empty, stats_path=tmp_path / "stats.json")
    assert read_manifest(empty) == {"shards": [], "samples": 0}
    assert json.loads((tmp_path / "stats.json").read_text())["items"] == 0
    with pytest.raises(PipelineError, match=r"`bank: null`; run `pipeline bank` again"):
        label(workspace, tmp_path / "a", empty, BankParams())
    made = workspace.run("bank", tmp_path / "damaged")
    shard = min(made.glob("*.parquet"))
    shard.write_bytes(shard.read_bytes()[:-50])
    with pytest.raises(PipelineError, match=str(shard)):
        label(workspace, tmp_path / "b", made, BankParams())
    (made / MANIFEST).unlink()
    with pytest.raises(PipelineError, match="no such file"):
        label(workspace, tmp_path / "c", made, BankParams())
    nothing = workspace.run("bank", tmp_path / "nothing", min_share=1.0)
    assert read_manifest(nothing)["samples"] == 0
    with pytest.raises(PipelineError, match=r"lower bank\.min_share"):
        label(workspace, tmp_path / "d", nothing, BankParams(min_share=1.0))


def test_the_command_without_a_bank_looks_at_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    params = {"categories": ["cat"], "index": {"a": {"root": "gone"}}, "device": "cpu"}
    (tmp_path / "params.yaml").write_text(json.dumps(params))
    done = CliRunner().invoke(app, ["bank"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert read_manifest(tmp_path / "data/bank") == {"shards": [], "samples": 0}
    assert json.loads((tmp_path / "reports/stats/bank.json").read_text())["items"] == 0


def test_another_folder_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("mine")
    with pytest.raises(PipelineError, match=r"thesis\.txt"):
        bank.write_empty(out_dir=tmp_path / "mine", stats_path=tmp_path / "stats.json")


@pytest.mark.parametrize("count", [0, 1, 5])
def test_packed_rows_come_back(count: int) -> None:
    rng = np.random.default_rng(count)
    rows = RegionRows(
        rng.random(count).astype(np.float32),
        rng.random((count, 3)).astype(np.float16),
        rng.random((count, 2)).astype(np.float16),
    )
    for before, after in zip(rows, unpack_rows(pack_rows(rows)), strict=True):
        np.testing.assert_array_equal(before, after)


def test_the_section_is_off_by_default_and_checked() -> None:
    needed: dict[str, Any] = {"categories": ["cat"], "index": {"a": {"root": "a"}}}
    assert parse_params(needed).bank is None
    assert parse_params({**needed, "bank": None}).bank is None
    assert parse_params({**needed, "bank": {}}).bank == BankParams()
    with pytest.raises(PipelineError, match=r"'bank.wieght'; did you mean 'weight'"):
        parse_params({**needed, "bank": {"wieght": 0.5}})
    with pytest.raises(PipelineError, match=r"bank\.weight: .* got 1\.5"):
        parse_params({**needed, "bank": {"weight": 1.5}})
