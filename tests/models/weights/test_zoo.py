"""Published weights: the manifest, real names and shapes, the cache, and their use by name."""

from __future__ import annotations

import hashlib
import json
import math
import pickle
import re
import shutil
import threading
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import open_clip
import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import Tensor

from pipeline.engine.runtime import Runtime
from pipeline.errors import PipelineError
from pipeline.inference.segmenter import Segmenter
from pipeline.methods.masks import SelfMaskParams, load_mask_source
from pipeline.models.clip import OPENAI_SCALARS, build_clip, load_clip
from pipeline.models.masks.selfmask import SelfMask, SelfMaskConfig, load_selfmask
from pipeline.models.plus.backbones import build_backbone, load_backbone
from pipeline.models.weights import zoo
from pipeline.models.weights.acquire import CONVERTERS, add, fetch, is_published_file
from pipeline.models.weights.zoo import (
    PublishedWeights,
    damage,
    is_cached,
    manifest,
    published,
    resolve_weights,
)
from pipeline.models.zutis.build import build_zutis
from pipeline.params.base import EncoderParams
from pipeline.vocabulary.categories import load_category_set
from tests.models.clip.test_clip import scripted
from tests.openmmlab import blank, openmmlab_shapes
from tests.paths import REFERENCE as DATA
from tests.tiny_encoders import TINY_CLIP, add_tiny_architectures

CPU = torch.device("cpu")
NAMES = list(manifest())
# Copies that do not have the names of the file.
RENAMED = ("photo_clip", "resnet50_v1c", "resnet101_v1c")
LAYOUTS = {
    "selfmask_nq20": "selfmask_nq20",
    "selfmask_nq10": "selfmask_nq20",
    "zutis_coca_vit_b_16": "zutis_vit_b_16",
    "zutis_coco_vit_b_16": "zutis_vit_b_16",
    "zutis_imagenet_s919_vit_b_16": "zutis_vit_b_16",
    "zutis_imagenet_s919_vit_b_32": "zutis_vit_b_32",
    "dino_vits8": "selfmask_nq20",
}
TINY_SELFMASK = {
    "dim": 16,
    "depth": 1,
    "num_heads": 2,
    "num_queries": 3,
    "decoder_layers": 1,
    "mlp_ratio": 2,
    "grid": 4,
}
TINY_ZUTIS = {"num_queries": 4, "decoder_layers": 1, "num_heads": 2, "feedforward_dim": 16}
IMAGES = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def layout(name: str) -> dict[str, list[int]]:
    """Names and shapes of a published file."""
    tensors: dict[str, list[int]] = json.loads(
        (DATA / f"checkpoint_layout_{LAYOUTS[name]}.json").read_text()
    )["tensors"]
    if name == "selfmask_nq10":
        return tensors | {"query_embed": [10, 384]}
    if name == "dino_vits8":  # the backbone that SelfMask's encoder started from
        encoder = {key: shape for key, shape in tensors.items() if key.startswith("encoder.")}
        return {key.removeprefix("encoder."): shape for key, shape in encoder.items()}
    return tensors


def megabytes(model: str) -> float:
    """Of an architecture of open_clip, at four bytes a parameter."""
    return 4 * sum(map(math.prod, open_clip_shapes(model).values())) / 1e6


def open_clip_shapes(model: str) -> dict[str, list[int]]:
    """Names and shapes of open_clip's file of a model."""
    with torch.device("meta"):
        state = build_clip(model).state_dict()
    return {name: list(value.shape) for name, value in state.items()}


def openai_shapes(model: str) -> dict[str, list[int]]:
    """Names and shapes of OpenAI's archive of a CLIP: open_clip's, and three scalars."""
    return open_clip_shapes(model) | {name: [] for name in OPENAI_SCALARS}


def published_shapes(name: str) -> dict[str, list[int]]:
    entry = published(name)
    if entry.kind == "clip":
        return openai_shapes(entry.architecture["model"])
    if entry.kind == "open_clip":
        return open_clip_shapes(entry.architecture["model"])
    if entry.kind == "backbone":
        return openmmlab_shapes(name)
    if name == "dino_vits16":
        shapes = layout("dino_vits8")
        return shapes | {"pos_embed": [1, 197, 384], "patch_embed.proj.weight": [384, 3, 16, 16]}
    return layout(name)


class TestManifest:
    @pytest.mark.parametrize("name", NAMES)
    def test_an_entry_is_complete(self, name: str) -> None:
        entry = published(name)
        url = urlparse(entry.url)
        assert url.scheme == "https"
        suffixes = (".pt", ".pth", ".bin", ".safetensors")
        assert entry.kind == "photo_clip" or Path(url.path).suffix in suffixes
        assert entry.sha256 is None or re.fullmatch("[0-9a-f]{64}", entry.sha256)
        assert entry.size is None or entry.size > 10_000_000
        assert entry.licence in ("MIT", "Apache-2.0", "LicenseRef-apple-amlr")
        assert entry.page.startswith("https://")
        assert (entry.kind == "zutis") == (entry.categories is not None)
        assert entry.describe_architecture()
        if entry.categories:
            load_category_set(entry.categories)

    @pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("clip_")])
    def test_clip_is_where_open_clip_has_it(self, name: str) -> None:
        entry = published(name)
        tag = open_clip.get_pretrained_cfg(entry.architecture["model"], entry.architecture["tag"])
        assert tag["url"] == entry.url
        assert tag["quick_gelu"]
        assert open_clip.get_model_config(entry.architecture["model"])["quick_gelu"]
        assert entry.sha256 in entry.url  # OpenAI puts the hash into the address
        assert tag["hf_hub"]
        assert entry.hub_mb == pytest.approx(megabytes(entry.architecture["model"]), abs=1)

    @pytest.mark.parametrize(
        "name", [name for name in NAMES if manifest()[name].kind == "open_clip"]
    )
    def test_open_clips_own_are_where_it_has_them(self, name: str) -> None:
        entry = published(name)
        tag = open_clip.get_pretrained_cfg(entry.architecture["model"], entry.architecture["tag"])
        assert entry.url.startswith(f"https://huggingface.co/{tag['hf_hub'].rstrip('/')}/resolve/")
        assert entry.approximate_mb == pytest.approx(megabytes(entry.architecture["model"]), abs=1)

    def test_an_unknown_name_is_answered_with_the_known_ones(self) -> None:
        with pytest.raises(PipelineError, match=r"'clip' is not among .*clip_rn50x16.*dino_vits8"):
            published("clip")


class TestRealSize:
    """Every published network at its real size, with the names and shapes of its file."""

    @pytest.mark.parametrize("name", [name for name in NAMES if name not in RENAMED])
    def test_the_published_names_and_shapes_are_ours(self, name: str) -> None:
        entry = published(name)
        state = blank(published_shapes(name))
        converted = CONVERTERS[entry.kind](state, entry.architecture, "file.pt")
        assert set(converted) == set(state)

    @pytest.mark.parametrize(
        ("name", "other", "message"),
        [
            ("clip_vit_b_16", "clip_vit_b_32", r"visual\.conv1\.weight is \[768, 3, 32, 32\]"),
            ("clip_vit_l_14", "clip_vit_l_14_336", r"visual\.positional_embedding is \[577, 1024"),
            (
                "clip_rn101",
                "clip_rn50",
                r"(?s)RN101-quickgelu.*missing \(255\): visual\.layer3\.6\.conv1",
            ),
            ("clip_vit_b_32", "dino_vits8", r"(?s)missing \(302\).*unexpected \(150\): cls_token"),
            ("selfmask_nq10", "selfmask_nq20", r"query_embed is \[20, 384\], expected \[10, 384\]"),
            ("zutis_coco_vit_b_16", "zutis_imagenet_s919_vit_b_32", r"encoder\.conv1\.weight is"),
            ("dino_vits16", "dino_vits8", r"pos_embed is \[1, 785, 384\], expected \[1, 197, 384"),
            ("resnet50_v1c", "resnet101_v1c", r"(?s)\(as resnet50_v1c: resnet50_v1c\).*layer3\.6"),
            ("resnet101_v1c", "dino_vits8", r"(?s)missing \(636\): conv1\.0\.weight"),
        ],
    )
    def test_another_network_is_refused_with_a_list(
        self, name: str, other: str, message: str, tmp_path: Path
    ) -> None:
        file = tmp_path / "file.pt"
        torch.save(blank(published_shapes(other)), file)
        with pytest.raises(PipelineError, match=message) as caught:
            add(published(name), file, tmp_path / "cache")
        assert str(file) in str(caught.value)
        assert not (tmp_path / "cache").exists()

    @pytest.mark.parametrize("name", ["resnet50_v1c", "resnet101_v1c"])
    def test_a_backbone_loses_its_classifier_and_gets_timms_names(self, name: str) -> None:
        entry = published(name)
        converted = CONVERTERS["backbone"](
            blank(published_shapes(name)), entry.architecture, "file.pth"
        )
        network = timm.create_model(f"{name.removesuffix('_v1c')}c", num_classes=0)
        assert converted.keys() == network.state_dict().keys()

    def test_a_backbone_is_used_by_its_copy(self, tmp_path: Path) -> None:
        entry = published("resnet50_v1c")
        state = {key: torch.full((), 3, dtype=torch.uint8).expand(shape)
                 for key, shape in published_shapes(entry.name).items()}  # fmt: skip
        torch.save({"state_dict": state}, tmp_path / "file.pth")
        add(entry, tmp_path / "file.pth", tmp_path)
        backbone = build_backbone("resnet50_v1c")
        load_backbone(backbone, resolve_weights("resnet50_v1c", tmp_path))
        assert all(bool((value == 3).all()) for value in backbone.state_dict().values())

    def test_counters_of_batch_norms_may_be_absent(self) -> None:
        shapes = published_shapes("clip_rn50")
        state = blank({k: v for k, v in shapes.items() if "num_batches_tracked" not in k})
        converted = CONVERTERS["clip"](state, {"model": "RN50-quickgelu"}, "file.pt")
        assert len(state) < len(shapes)
        assert set(converted) == set(shapes)

    def test_missing_and_extra_names_are_listed(self, tmp_path: Path) -> None:
        state = blank(layout("dino_vits8"))
        state["head.weight"] = state.pop("norm.bias")
        torch.save(state, tmp_path / "file.pth")
        with pytest.raises(PipelineError, match=r"(?s)\(1\): norm\.bias.*\(1\): head\.weight"):
            add(published("dino_vits8"), tmp_path / "file.pth", tmp_path)

    def test_a_file_of_the_real_size_is_converted(self, tmp_path: Path) -> None:
        state = {key: torch.full((), 3, dtype=torch.uint8).expand(shape)  # a small file
                 for key, shape in layout("selfmask_nq10").items()}  # fmt: skip
        torch.save(state, tmp_path / "selfmask_nq10.pt")
        entry = published("selfmask_nq10")
        path = add(entry, tmp_path / "selfmask_nq10.pt", tmp_path)
        network = load_selfmask(path)
        assert network.config == SelfMaskConfig(num_queries=10)
        assert bool((network.query_embed == 3).all())
        assert damage(entry, tmp_path) is None


def write_archives(folder: Path) -> None:
    """The authors' files of the tiny zoo, in their formats."""
    torch.manual_seed(0)
    clip = open_clip.CLIP(**TINY_CLIP, quick_gelu=True)
    values = zip(OPENAI_SCALARS, (32, 77, 49408), strict=True)
    scalars = {name: torch.tensor(value) for name, value in values}
    scripted(clip.state_dict() | scalars).save(str(folder / "clip.pt"))
    torch.save(SelfMask(SelfMaskConfig(**TINY_SELFMASK)).state_dict(), folder / "selfmask.pt")
    network = build_zutis(open_clip.CLIP(**TINY_CLIP, quick_gelu=True).visual, **TINY_ZUTIS)
    torch.save(network.state_dict(), folder / "zutis.pt")


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("archives")
    write_archives(folder)
    return folder


@pytest.fixture
def files(archives: Path, tmp_path: Path) -> Path:
    """The authors' files, for this test alone."""
    return Path(shutil.copytree(archives, tmp_path / "files"))


def file_sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def server(files: Path) -> Iterator[str]:
    """URL of a server (without ranges) that has the authors' files."""
    handler = partial(SimpleHTTPRequestHandler, directory=str(files))
    handler.keywords["directory"] = str(files)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


@pytest.fixture
def tiny_zoo(files: Path, server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Published tiny networks that lie on the server; returns the (empty) cache folder."""
    add_tiny_architectures(tmp_path / "configs", monkeypatch)
    tag = {"url": "https://localhost.invalid/clip.pt", "quick_gelu": True}
    for name in ("Tiny-8", "Tiny-8-quickgelu"):
        monkeypatch.setitem(open_clip.pretrained._PRETRAINED, name, {"openai": tag})
    common = {"licence": "MIT", "page": "https://example.org", "sha256": None, "size": None}
    entries: dict[str, Any] = {
        "clip_tiny": {
            "kind": "clip",
            "architecture": {"model": "Tiny-8-quickgelu", "tag": "openai"},
            "url": f"{server}/clip.pt",
            "sha256": file_sha256(files / "clip.pt"),
            "size": (files / "clip.pt").stat().st_size,
        },
        "selfmask_tiny": {
            "kind": "selfmask",
            "architecture": TINY_SELFMASK,
            "url": f"{server}/selfmask.pt",
        },
        "zutis_tiny": {
            "kind": "zutis",
            "architecture": {
                "encoder": {"model": "Tiny-8-quickgelu", "pretrained": "openai"},
                "network": TINY_ZUTIS,
            },
            "url": f"{server}/zutis.pt",
            "categories": "voc",
            "training": {"iterations": 123},
        },
    }
    (tmp_path / "zoo.yaml").write_text(
        json.dumps({name: common | fields for name, fields in entries.items()})
    )
    for name, entry in manifest(tmp_path / "zoo.yaml").items():
        monkeypatch.setitem(manifest(), name, entry)
    return tmp_path / "cache"


def tiny_clip_reference(files: Path) -> Any:
    """The published CLIP as open_clip would run it."""
    clip = open_clip.CLIP(**TINY_CLIP, quick_gelu=True)
    state = torch.jit.load(files / "clip.pt").state_dict()
    clip.load_state_dict({k: v for k, v in state.items() if k not in OPENAI_SCALARS})
    return clip.eval()


class TestCache:
    @pytest.mark.parametrize("name", ["clip_tiny", "selfmask_tiny", "zutis_tiny"])
    def test_a_fetched_file_is_converted_and_nothing_pickled_stays(
        self, tiny_zoo: Path, name: str
    ) -> None:
        entry = published(name)
        assert not is_cached(entry, tiny_zoo)
        path = fetch(entry, tiny_zoo, categories=["cat"])
        assert is_cached(entry, tiny_zoo)
        assert damage(entry, tiny_zoo) is None
        assert resolve_weights(name, tiny_zoo) == path
        kept = sorted(item for item in tiny_zoo.rglob("*") if item.is_file())
        assert {item.suffix for item in kept} == {".safetensors", ".json"}

    def test_a_mirror_a_file_url_and_a_path_give_the_same(
        self, tiny_zoo: Path, files: Path, server: str, tmp_path: Path
    ) -> None:
        file = files / "selfmask.pt"
        copies = [
            fetch(published("selfmask_tiny"), tmp_path / str(number), url=url).read_bytes()
            for number, url in enumerate([f"{server}/selfmask.pt", file.as_uri(), str(file)])
        ]
        copies.append(add(published("selfmask_tiny"), file, tiny_zoo).read_bytes())
        assert len(set(copies)) == 1
        assert file.exists()

    def test_an_intact_copy_is_not_fetched_again(self, tiny_zoo: Path) -> None:
        entry = published("selfmask_tiny")
        path = fetch(entry, tiny_zoo)
        before = path.stat().st_mtime_ns
        assert fetch(entry, tiny_zoo, url="http://localhost.invalid/x.pt") == path
        assert path.stat().st_mtime_ns == before

    def test_a_wrong_checksum_is_refused_and_the_download_removed(
        self, tiny_zoo: Path, files: Path, server: str
    ) -> None:
        entry = published("clip_tiny")
        good = bytearray((files / "clip.pt").read_bytes())
        good[-30] ^= 1
        (files / "bad.pt").write_bytes(good)
        wrong, right = file_sha256(files / "bad.pt"), entry.sha256
        with pytest.raises(PipelineError, match=rf"{wrong}, published is {right}\n.* was removed"):
            fetch(entry, tiny_zoo, url=f"{server}/bad.pt")
        assert not is_cached(entry, tiny_zoo)
        assert list(tiny_zoo.rglob("*.*")) == []
        with pytest.raises(PipelineError, match="wrong checksum"):
            fetch(entry, tiny_zoo, url=str(files / "bad.pt"))
        assert (files / "bad.pt").exists()  # the user's own file is not ours to remove
        fetch(entry, tiny_zoo)

    def test_the_first_hash_is_recorded_and_compared_from_then_on(
        self, tiny_zoo: Path, files: Path
    ) -> None:
        entry = published("selfmask_tiny")
        path = fetch(entry, tiny_zoo)
        assert is_published_file(entry, tiny_zoo) is None
        first = file_sha256(files / "selfmask.pt")
        original = path.read_bytes()
        path.write_bytes(original[:-1] + b"x")
        torch.manual_seed(5)
        torch.save(SelfMask(SelfMaskConfig(**TINY_SELFMASK)).state_dict(), files / "other.pt")
        other = file_sha256(files / "other.pt")
        with pytest.raises(PipelineError, match=rf"(?s){other}, recorded in .*json.* is {first}"):
            fetch(entry, tiny_zoo, url=str(files / "other.pt"))
        fetch(entry, tiny_zoo)
        assert path.read_bytes() == original

    def test_add_tells_another_file_from_the_published_one(
        self, tiny_zoo: Path, files: Path, tmp_path: Path
    ) -> None:
        entry = published("clip_tiny")
        add(entry, files / "clip.pt", tiny_zoo)
        assert is_published_file(entry, tiny_zoo) is True
        again = {"state_dict": tiny_clip_reference(files).state_dict()}
        torch.save(again, tmp_path / "again.bin")
        path = add(entry, tmp_path / "again.bin", tiny_zoo)
        assert is_published_file(entry, tiny_zoo) is False
        assert int(load_file(path)["input_resolution"]) == 32  # tells that it needs QuickGELU

    def test_a_page_instead_of_weights_is_removed(self, tiny_zoo: Path, files: Path) -> None:
        (files / "selfmask.pt").write_text("<html>please log in</html>")
        entry = published("selfmask_tiny")
        with pytest.raises(PipelineError, match=r"(?s)cannot be read as weights.*was removed"):
            fetch(entry, tiny_zoo)
        assert list(tiny_zoo.rglob("*.*")) == []

    @pytest.mark.parametrize(
        ("tensor", "problem"),
        [
            (torch.zeros(3, 16, device="meta"), "has no values"),
            (torch.zeros(3, 16).to_sparse(), "is stored as torch.sparse_coo"),
        ],
    )
    def test_tensors_without_plain_values_are_refused(
        self, tiny_zoo: Path, tmp_path: Path, tensor: Tensor, problem: str
    ) -> None:
        state = SelfMask(SelfMaskConfig(**TINY_SELFMASK)).state_dict() | {"query_embed": tensor}
        torch.save(state, tmp_path / "odd.pt")
        with pytest.raises(PipelineError, match=f"query_embed {problem}; save the model's plain"):
            add(published("selfmask_tiny"), tmp_path / "odd.pt", tiny_zoo)
        assert not is_cached(published("selfmask_tiny"), tiny_zoo)

    def test_pickled_code_is_refused(self, tiny_zoo: Path, tmp_path: Path) -> None:
        class Evil:
            def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
                return Path.touch, (Path(tmp_path / "owned"),)  # type: ignore[return-value]

        (tmp_path / "evil.pt").write_bytes(pickle.dumps(Evil()))
        torch.save({"query_embed": Evil()}, tmp_path / "evil2.pt")
        for name in ("evil.pt", "evil2.pt"):
            with pytest.raises(PipelineError, match=rf"{name}: cannot be read as weights"):
                add(published("selfmask_tiny"), tmp_path / name, tiny_zoo)
        assert not (tmp_path / "owned").exists()

    @pytest.mark.parametrize("victim", ["model.safetensors", "config.json"])
    def test_damage_is_found(self, tiny_zoo: Path, victim: str) -> None:
        entry = published("zutis_tiny")
        path = fetch(entry, tiny_zoo, categories=["cat"]) / victim
        content = path.read_bytes()
        path.write_bytes(content.replace(content[-9:], b"123456789"))
        assert re.search(f"{victim} has SHA-256 .*, recorded was", damage(entry, tiny_zoo) or "")
        path.unlink()
        assert "is missing" in (damage(entry, tiny_zoo) or "")
        fetch(entry, tiny_zoo, categories=["cat"])
        assert damage(entry, tiny_zoo) is None

    @pytest.mark.parametrize("content", ["{", "[]", "{}"])
    def test_a_damaged_card_is_found_and_replaced(self, tiny_zoo: Path, content: str) -> None:
        entry = published("selfmask_tiny")
        fetch(entry, tiny_zoo)
        zoo.card_path(entry, tiny_zoo).write_text(content)
        assert "selfmask_tiny.json cannot be read" in (damage(entry, tiny_zoo) or "")
        fetch(entry, tiny_zoo)
        assert damage(entry, tiny_zoo) is None


class TestResolve:
    def test_a_path_stays_what_it_is(self, tiny_zoo: Path, tmp_path: Path) -> None:
        assert resolve_weights("models/none.pt", tiny_zoo) == Path("models/none.pt")
        assert resolve_weights(tmp_path, tiny_zoo) == tmp_path

    def test_an_existing_path_goes_before_a_name(
        self, tiny_zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        fetch(published("selfmask_tiny"), tiny_zoo)
        monkeypatch.chdir(tmp_path)
        Path("selfmask_tiny").touch()
        assert resolve_weights("selfmask_tiny", tiny_zoo) == Path("selfmask_tiny")

    def test_a_name_that_was_not_fetched_says_how(self, tiny_zoo: Path) -> None:
        with pytest.raises(
            PipelineError, match=r"pipeline weights fetch selfmask_tiny`.*add selfmask_tiny FILE"
        ):
            resolve_weights(Path("selfmask_tiny"), tiny_zoo)


class TestUse:
    @pytest.mark.parametrize("pretrained", ["openai", "clip_tiny"])
    def test_a_cached_clip_is_used_without_a_network(
        self, tiny_zoo: Path, files: Path, pretrained: str
    ) -> None:
        message = "could not download|no tag of|are not in the cache"
        with pytest.raises(PipelineError, match=message):
            load_clip(
                EncoderParams(model="Tiny-8-quickgelu", pretrained=pretrained),
                CPU,
                cache_dir=tiny_zoo,
            )
        fetch(published("clip_tiny"), tiny_zoo)
        expected = tiny_clip_reference(files)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            loaded = load_clip(
                EncoderParams(model="Tiny-8-quickgelu", pretrained=pretrained),
                CPU,
                cache_dir=tiny_zoo,
            )
        with pytest.warns(UserWarning, match="lacks QuickGELU"):
            corrected = load_clip(
                EncoderParams(model="Tiny-8", pretrained=pretrained), CPU, cache_dir=tiny_zoo
            )
        with torch.no_grad():
            features = expected.encode_image(loaded.normalise(IMAGES))
        unit = features / features.norm(dim=-1, keepdim=True)
        assert torch.allclose(loaded.encode_images(IMAGES), unit, atol=1e-6)
        assert torch.allclose(corrected.encode_images(IMAGES), unit, atol=1e-6)
        assert loaded.mean.flatten().tolist() == pytest.approx([0.48145466, 0.4578275, 0.40821073])

    def test_the_copies_file_gets_quick_gelu_by_its_path_too(self, tiny_zoo: Path) -> None:
        path = fetch(published("clip_tiny"), tiny_zoo)
        by_name = load_clip(
            EncoderParams(model="Tiny-8-quickgelu", pretrained="clip_tiny"), CPU, cache_dir=tiny_zoo
        )
        with pytest.warns(UserWarning, match="lacks QuickGELU"):
            by_path = load_clip(EncoderParams(model="Tiny-8", pretrained=str(path)), CPU)
        assert by_path.fingerprint() == by_name.fingerprint()

    def test_a_failed_download_names_the_way_without_a_network(self, tiny_zoo: Path) -> None:
        with pytest.raises(PipelineError, match=r"or run `pipeline weights add clip_tiny FILE`"):
            load_clip(EncoderParams(model="Tiny-8", pretrained="openai"), CPU, cache_dir=tiny_zoo)

    def test_masks_by_name(self, tiny_zoo: Path, files: Path, runtime: Runtime) -> None:
        params = SelfMaskParams(weights=Path("selfmask_tiny"))
        with pytest.raises(PipelineError, match="pipeline weights fetch selfmask_tiny"):
            load_mask_source(params, runtime)
        fetch(published("selfmask_tiny"), tiny_zoo)
        assert runtime.cache_dir == tiny_zoo
        network = SelfMask(SelfMaskConfig(**TINY_SELFMASK)).eval()
        network.load_state_dict(torch.load(files / "selfmask.pt", weights_only=True))
        assert torch.equal(
            load_mask_source(params, runtime).predict(IMAGES), network.saliency(IMAGES)
        )

    def test_a_published_checkpoint_segments(
        self, tiny_zoo: Path, files: Path, runtime: Runtime
    ) -> None:
        fetch(published("clip_tiny"), tiny_zoo)
        names = load_category_set("voc")
        folder = fetch(published("zutis_tiny"), tiny_zoo, categories=names)
        segmenter = Segmenter.load("zutis_tiny", runtime=runtime)
        assert segmenter.categories == names
        config = json.loads((folder / "config.json").read_text())
        assert config["step"] == 123
        assert config["background"] == ["background"]
        network = build_zutis(tiny_clip_reference(files).visual, **TINY_ZUTIS).eval()
        network.load_state_dict(torch.load(files / "zutis.pt", weights_only=True))
        with torch.no_grad():
            expected = network(IMAGES).patch_tokens
            actual = segmenter.student._network(IMAGES).patch_tokens
        assert torch.equal(actual, expected)
        picture = (IMAGES[0].permute(1, 2, 0) * 255).byte().numpy()
        assert segmenter(picture).semantic.shape == (32, 32)


def test_entries_are_described() -> None:
    texts = {name: entry.describe_architecture() for name, entry in manifest().items()}
    assert texts["clip_rn50"] == "RN50-quickgelu"
    assert texts["selfmask_nq10"] == "SelfMask, 10 queries"
    assert texts["resnet101_v1c"] == "resnet101_v1c"
    assert texts["zutis_imagenet_s919_vit_b_32"] == "ZUTIS on ViT-B-32-quickgelu"
    sizes = {name: entry.describe_size() for name, entry in manifest().items()}
    assert sizes["clip_vit_b_32"] == "354.0 MB"
    assert sizes["zutis_coca_vit_b_16"] == "~537.9 MB"
    assert sizes["dino_vits16"] == "unknown"
    assert isinstance(published("clip_rn50"), PublishedWeights)
