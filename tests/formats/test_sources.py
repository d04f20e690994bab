"""Listing and reading images of the three formats, and what is said of broken ones."""

from __future__ import annotations

import io
import os
import re
import tarfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.errors import PipelineError
from pipeline.formats.images import ImageError
from pipeline.formats.sources import ImageRef, list_images, read_image, sample_key
from tests.conftest import encoded_image, noise_image

ROW_GROUP = 3


@dataclass(frozen=True)
class Source:
    root: Path | str
    format: Literal["folder", "webdataset", "parquet"] = "folder"
    pattern: str = ""


def paths(root: Path, **settings: str) -> list[str]:
    refs = list(list_images("s", Source(root, **settings)))
    assert len({ref.key for ref in refs}) == len(refs)
    relative = [os.path.relpath(ref.path, root) for ref in refs]
    return [
        path if ref.member is None else f"{path}:{ref.member}"
        for path, ref in zip(relative, refs, strict=True)
    ]


def write_tar(path: Path, members: dict[str, bytes], format: int = tarfile.PAX_FORMAT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=format) as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def img2dataset_members(first: int, count: int) -> dict[str, bytes]:
    """jpg, json and txt of each sample, as img2dataset writes them."""
    members = {}
    for number in range(first, first + count):
        key = f"{number:09d}"
        members[f"{key}.jpg"] = f"jpeg {number}".encode() * (1 + number)
        members[f"{key}.json"] = b'{"status": "success"}'
        members[f"{key}.txt"] = b"a caption"
    return members


def touch(*files: Path) -> None:
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(file.name.encode())


class TestKey:
    def test_is_the_documented_hash(self) -> None:
        # printf 'pool\0a/b.tar\0x.jpg' | sha1sum
        assert sample_key("pool", "a/b.tar", "x.jpg") == "6f6d5845bded01dcbafc"

    def test_differs_by_each_part_and_by_their_borders(self) -> None:
        keys = [
            ("a", "b", "c"),
            ("a", "bc", ""),
            ("ab", "c", ""),
            ("a", "b", None),
            ("x", "b", "c"),
        ]
        assert len({sample_key(*key) for key in keys}) == len(keys)

    def test_does_not_depend_on_where_the_root_lies(self, tmp_path: Path) -> None:
        for name in ("here", "there"):
            touch(tmp_path / name / "x.v1.jpg", tmp_path / name / "x.v2.jpg")
        here, there = (
            [ref.key for ref in list_images("s", Source(tmp_path / name))]
            for name in ("here", "there")
        )
        assert here == there
        assert all("." not in key and len(key) == 20 for key in here)


class TestFolder:
    def test_recursive_sorted_and_by_extension(self, tmp_path: Path) -> None:
        names = ["b/2.JPG", "b/10.jpeg", "a.PNG", "c.webp", "d.tif", "e.bmp", "f.gif", "b/c/x.Tiff"]
        touch(*(tmp_path / name for name in [*names, "notes.txt", "b/a.json", "jpg"]))
        assert paths(tmp_path) == [
            "a.PNG", "b/10.jpeg", "b/2.JPG", "b/c/x.Tiff", "c.webp", "d.tif", "e.bmp", "f.gif",
        ]  # fmt: skip

    def test_hidden_files_and_folders_are_left_out(self, tmp_path: Path) -> None:
        touch(tmp_path / "a.jpg", tmp_path / "._a.jpg", tmp_path / ".trash/b.jpg")
        assert paths(tmp_path) == ["a.jpg"]

    def test_dots_spaces_and_unicode_in_names(self, tmp_path: Path) -> None:
        names = ["img.v1.jpg", "img.v2.jpg", "my photo.jpg", "größe/猫.jpg"]
        touch(*(tmp_path / name for name in names))
        refs = list(list_images("s", Source(tmp_path)))
        assert [read_image(ref).decode() for ref in refs] == [
            Path(name).name for name in ["größe/猫.jpg", *names[:3]]
        ]

    def test_links_are_followed_but_loops_are_counted(self, tmp_path: Path) -> None:
        root = tmp_path / "root"
        touch(root / "a/1.jpg", tmp_path / "elsewhere/2.jpg")
        (root / "a/up").symlink_to(root)
        (root / "a/self").symlink_to(root / "a")
        (root / "other").symlink_to(tmp_path / "elsewhere")
        (root / "dangling.jpg").symlink_to(tmp_path / "gone.jpg")
        (root / "linked.jpg").symlink_to(root / "a/1.jpg")
        left_out: Counter[str] = Counter()
        refs = list(list_images("s", Source(root), left_out))
        assert [os.path.relpath(ref.path, root) for ref in refs] == [
            "a/1.jpg", "dangling.jpg", "linked.jpg", "other/2.jpg",
        ]  # fmt: skip
        with pytest.raises(ImageError, match="file is missing"):
            read_image(refs[1])
        assert left_out == {"link to a folder above": 2}

    def test_other_files_are_read_by_their_first_bytes_or_counted_by_kind(
        self, tmp_path: Path
    ) -> None:
        picture = encoded_image(noise_image(1), "JPEG")
        for name in ("plain", "a.jpg_large", "b.heic", "c.jfif", "d.jpe"):
            (tmp_path / name).write_bytes(picture)
        touch(tmp_path / "README", tmp_path / "e.heic", tmp_path / "f.HEIC", tmp_path / "g.svg")
        touch(tmp_path / "photo.20240131", tmp_path / "h.json", tmp_path / "i.txt")
        (tmp_path / "raw.cr2").write_bytes(encoded_image(noise_image(1), "TIFF"))
        touch(tmp_path / "._a.jpg")
        left_out: Counter[str] = Counter()
        refs = list(list_images("s", Source(tmp_path), left_out))
        assert [Path(ref.path).name for ref in refs] == [
            "a.jpg_large", "b.heic", "c.jfif", "d.jpe", "plain",
        ]  # fmt: skip
        assert left_out == {".heic": 2, ".svg": 1, ".cr2": 1, "without extension": 2, "hidden": 1}

    def test_a_folder_that_cannot_be_listed_is_named(self, tmp_path: Path) -> None:
        touch(tmp_path / "a.jpg", tmp_path / "locked/b.jpg")
        (tmp_path / "locked").chmod(0)
        if os.access(tmp_path / "locked", os.R_OK):
            pytest.skip("this user may read everything")
        try:
            with pytest.raises(
                PipelineError, match=r"locked: cannot be listed: .*make it readable"
            ):
                paths(tmp_path)
        finally:
            (tmp_path / "locked").chmod(0o700)

    @pytest.mark.parametrize(
        ("file", "format", "remedy"),
        [
            ("a/0.tar", "folder", "write format: webdataset"),
            ("0.parquet", "folder", "write format: parquet"),
            ("0.tar.gz", "folder", "1 .tar.gz; packed files have to be unpacked first"),
            ("0.tar.gz", "webdataset", "1 .tar.gz; packed files have to be unpacked first"),
            ("a/0.tgz", "webdataset", "1 .tgz; packed files have to be unpacked first"),
            ("a/0.jpg", "webdataset", "write format: folder"),
            ("a/0.tar", "parquet", "write format: webdataset"),
            ("0.heic", "folder", "left out: 1 .heic"),
        ],
    )
    def test_what_there_is_instead_is_told(
        self, tmp_path: Path, file: str, format: str, remedy: str
    ) -> None:
        touch(tmp_path / file)
        with pytest.raises(PipelineError, match=rf"index\.s: no .*{re.escape(remedy)}"):
            paths(tmp_path, format=format)

    @pytest.mark.parametrize("root", ["~/photos", "file:/photos", "s3:/bucket", "C:\\photos"])
    def test_a_root_that_nobody_means_is_named(self, root: str) -> None:
        with pytest.raises(PipelineError, match=rf"index\.s\.root: {re.escape(root)}: .*write"):
            list(list_images("s", Source(root)))

    def test_same_content_twice_is_two_images(self, tmp_path: Path) -> None:
        (tmp_path / "1.jpg").write_bytes(b"x")
        (tmp_path / "2.jpg").write_bytes(b"x")
        assert len(paths(tmp_path)) == 2

    def test_name_that_is_not_utf8_is_named(self, tmp_path: Path) -> None:
        (Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.jpg"))).write_bytes(b"x")
        with pytest.raises(PipelineError, match=r"udcff\.jpg.*not UTF-8"):
            paths(tmp_path)

    def test_missing_root_empty_root_and_pattern_are_errors(self, tmp_path: Path) -> None:
        with pytest.raises(PipelineError, match=r"index\.s\.root: .*nowhere: no such folder"):
            paths(tmp_path / "nowhere")
        touch(tmp_path / "a.txt")
        with pytest.raises(PipelineError, match=rf"{tmp_path}.*\.jpg .*\.gif"):
            paths(tmp_path)
        with pytest.raises(PipelineError, match=r"index\.s\.pattern: '\*\.jpg'"):
            paths(tmp_path, pattern="*.jpg")

    def test_vanished_file_and_folder_are_image_errors(self, tmp_path: Path) -> None:
        touch(tmp_path / "a.jpg")
        (ref,) = list_images("s", Source(tmp_path))
        (tmp_path / "a.jpg").unlink()
        with pytest.raises(ImageError, match="file is missing"):
            read_image(ref)
        (tmp_path / "a.jpg").mkdir()
        with pytest.raises(ImageError, match="cannot be read: Is a directory"):
            read_image(ref)


class TestWebDataset:
    def test_img2dataset_output_as_it_is(self, tmp_path: Path) -> None:
        for shard in range(2):
            write_tar(tmp_path / f"{shard:05d}.tar", img2dataset_members(10 * shard, 2))
            touch(tmp_path / f"{shard:05d}.parquet", tmp_path / f"{shard:05d}_stats.json")
        source = Source(tmp_path, "webdataset")
        refs = list(list_images("s", source))
        assert [(Path(ref.path).name, ref.member) for ref in refs] == [
            ("00000.tar", "000000000.jpg"),
            ("00000.tar", "000000001.jpg"),
            ("00001.tar", "000000010.jpg"),
            ("00001.tar", "000000011.jpg"),
        ]
        for ref, number in reversed(list(zip(refs, (0, 1, 10, 11), strict=True))):
            data = read_image(ref)
            assert data == f"jpeg {number}".encode() * (1 + number)
            assert ref.size == len(data)

    @pytest.mark.parametrize(
        ("pattern", "expected"),
        [
            ("{00000..00002}.tar", ["00000", "00001", "00002"]),
            ("{00002,00000}.tar", ["00000", "00002"]),
            ("0000{1..1}.tar", ["00001"]),
            ("*2.tar", ["00002"]),
            ("sub/{a,b}.tar", ["sub/a", "sub/b"]),
            ("{00000,00000}.tar", ["00000"]),
            ("", ["00000", "00001", "00002", "sub/a", "sub/b"]),
        ],
    )
    def test_patterns(self, tmp_path: Path, pattern: str, expected: list[str]) -> None:
        for name in ("00000", "00001", "00002", "sub/a", "sub/b", ".hidden"):
            write_tar(tmp_path / f"{name}.tar", {"x.png": b"x"})
        found = paths(tmp_path, format="webdataset", pattern=pattern)
        assert found == [f"{name}.tar:x.png" for name in expected]

    @pytest.mark.parametrize("pattern", ["", "**/*.tar"])
    def test_tars_in_linked_folders_and_in_capitals_are_found(
        self, tmp_path: Path, pattern: str
    ) -> None:
        root = tmp_path / "root"
        write_tar(root / "A.TAR", {"x.png": b"x"})
        write_tar(tmp_path / "elsewhere/b.tar", {"x.png": b"x"})
        (root / "link").symlink_to(tmp_path / "elsewhere")
        (root / "link/up").symlink_to(root)
        found = paths(root, format="webdataset", pattern=pattern)
        assert found == ["A.TAR:x.png", "link/b.tar:x.png"]

    def test_files_beside_the_tars_are_counted(self, tmp_path: Path) -> None:
        write_tar(tmp_path / "0.tar", {"x.png": b"x"})
        touch(tmp_path / "0.parquet", tmp_path / "0_stats.json", tmp_path / "1.tar.gz")
        touch(tmp_path / "loose.jpg")
        left_out: Counter[str] = Counter()
        list(list_images("s", Source(tmp_path, "webdataset"), left_out))
        assert left_out == {".tar.gz": 1, ".jpg": 1}

    @pytest.mark.parametrize("pattern", ["{0..1.tar", "/data/*.tar", "../*.tar", "**a/*.tar"])
    def test_patterns_that_mean_nothing_are_named(self, tmp_path: Path, pattern: str) -> None:
        write_tar(tmp_path / "0.tar", {"a.jpg": b"a"})
        with pytest.raises(PipelineError, match=re.escape(f"index.s.pattern: {pattern!r}")):
            paths(tmp_path, format="webdataset", pattern=pattern)

    def test_shards_that_the_pattern_does_not_find(self, tmp_path: Path) -> None:
        write_tar(tmp_path / "0.tar", {"x.png": b"x"})
        with pytest.raises(PipelineError, match=r"1\.tar: no such file"):
            paths(tmp_path, format="webdataset", pattern="{0..1}.tar")
        with pytest.raises(PipelineError, match=r"no \.tar file below .* 'x\*\.tar'"):
            paths(tmp_path, format="webdataset", pattern="x*.tar")

    def test_member_names(self, tmp_path: Path) -> None:
        long_name = "folder/" + "n" * 150 + ".jpg"
        members = {
            "a/img.v1.JPG": b"1",
            "a/img.v2.jpg": b"2",
            "猫.webp": b"3",
            long_name: b"4",
            "._a.jpg": b"hidden",
            "x.cls": b"5",
        }
        for format in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
            write_tar(tmp_path / f"{format}.tar", members, format)
            refs = list(list_images("s", Source(tmp_path, "webdataset", f"{format}.tar")))
            assert [ref.member for ref in refs] == list(members)[:4]
            assert [read_image(ref) for ref in refs] == [b"1", b"2", b"3", b"4"]

    def test_tar_without_images_is_an_empty_index(self, tmp_path: Path) -> None:
        write_tar(tmp_path / "0.tar", {"x.txt": b"x"})
        with pytest.raises(PipelineError, match="no images below"):
            paths(tmp_path, format="webdataset")

    @pytest.mark.parametrize("where", ["in a member", "in a header", "between members", "at zero"])
    def test_cut_tar_is_named(self, tmp_path: Path, where: str) -> None:
        """Three members of 700 bytes: 512 of header and 1024 of data each."""
        path = write_tar(tmp_path / "0.tar", {f"{n}.jpg": bytes([n]) * 700 for n in range(3)})
        cut = {"in a member": 2 * 1536 + 600, "in a header": 2 * 1536 + 100,
               "between members": 2 * 1536, "at zero": 0}[where]  # fmt: skip
        path.write_bytes(path.read_bytes()[:cut])
        write_tar(tmp_path / "1.tar", {"9.jpg": b"9"})
        with pytest.raises(PipelineError, match=r"0\.tar: broken: .*leave it out"):
            paths(tmp_path, format="webdataset")

    def test_compressed_or_foreign_files_are_named(self, tmp_path: Path) -> None:
        with tarfile.open(tmp_path / "0.tar", "w:gz") as tar:
            tar.addfile(tarfile.TarInfo("x.jpg"))
        with pytest.raises(PipelineError, match=r"0\.tar: broken: compressed"):
            paths(tmp_path, format="webdataset")
        (tmp_path / "0.tar").write_bytes(b"not a tar" * 100)
        with pytest.raises(PipelineError, match=r"0\.tar: broken"):
            paths(tmp_path, format="webdataset")

    def test_member_that_is_there_twice_is_named(self, tmp_path: Path) -> None:
        with tarfile.open(tmp_path / "0.tar", "w") as tar:
            for _ in range(2):
                tar.addfile(tarfile.TarInfo("x.jpg"))
        with pytest.raises(PipelineError, match=r"0\.tar: broken: member x\.jpg is there twice"):
            paths(tmp_path, format="webdataset")

    def test_tar_that_changed_since_is_an_image_error(self, tmp_path: Path) -> None:
        path = write_tar(tmp_path / "0.tar", {"a.jpg": b"a" * 100, "b.jpg": b"b" * 1000})
        last = list(list_images("s", Source(tmp_path, "webdataset")))[1]
        whole = path.read_bytes()
        path.write_bytes(whole[: last.offset + 10])
        with pytest.raises(ImageError, match="truncated"):
            read_image(last)
        path.write_bytes(b"z" * len(whole))
        with pytest.raises(ImageError, match="has changed"):
            read_image(last)


IMAGES = [b"zero", b"one", b"two", None, b"four", b"five", b"six"]
STRUCTS = [None if data is None else {"bytes": data, "path": "x"} for data in IMAGES]
HF_IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


class TestParquet:
    @pytest.mark.parametrize(
        "column",
        [
            {"image": pa.array(STRUCTS, HF_IMAGE)},
            {"jpg": pa.array(IMAGES, pa.binary()), "mask": pa.array(IMAGES, pa.binary())},
            {"bytes": pa.array(IMAGES, pa.large_binary())},
            {"photo": pa.array(IMAGES, pa.binary())},
        ],
        ids=["hugging face", "jpg", "large", "the only bytes"],
    )
    def test_column_is_found_and_read_in_any_order(
        self, tmp_path: Path, column: dict[str, pa.Array]
    ) -> None:
        table = pa.table({"caption": pa.array(["c"] * len(IMAGES)), **column})
        pq.write_table(table, tmp_path / "train-00000.parquet", row_group_size=ROW_GROUP)
        refs = list(list_images("s", Source(tmp_path, "parquet")))
        assert [ref.member for ref in refs] == [str(row) for row in range(len(IMAGES))]
        for row in (6, 0, 5, 1, 4, 2):
            assert read_image(refs[row]) == IMAGES[row]
        with pytest.raises(ImageError, match="no image bytes"):
            read_image(refs[3])

    def test_files_by_pattern_and_rows_by_file(self, tmp_path: Path) -> None:
        for name in ("a", "b", "c"):
            table = pa.table({"image": pa.array([name.encode()], pa.binary())})
            pq.write_table(table, tmp_path / f"{name}.parquet")
        found = list(list_images("s", Source(tmp_path, "parquet", "{a,c}.parquet")))
        assert [read_image(ref) for ref in found] == [b"a", b"c"]

    def test_changed_file_is_read_anew(self, tmp_path: Path) -> None:
        path = tmp_path / "a.parquet"
        ref = ImageRef(key="k", source="s", path=str(path), member="0")
        for time, data in enumerate((b"old", b"new")):
            pq.write_table(pa.table({"image": pa.array([data], pa.binary())}), path)
            os.utime(path, (time, time))
            assert read_image(ref) == data
        beyond = ImageRef(key="k", source="s", path=str(path), member="1")
        with pytest.raises(ImageError, match="has 1 rows, row 1"):
            read_image(beyond)

    @pytest.mark.parametrize(
        "columns",
        [{"url": ["http://x"]}, {"one": [b"x"], "two": [b"y"]}],
        ids=["no bytes", "two of unknown name"],
    )
    def test_no_clear_column_is_an_error(
        self, tmp_path: Path, columns: dict[str, list[object]]
    ) -> None:
        pq.write_table(pa.table(columns), tmp_path / "a.parquet")
        with pytest.raises(PipelineError, match=rf"a\.parquet: .*{', '.join(columns)}"):
            paths(tmp_path, format="parquet")

    def test_broken_file_is_named(self, tmp_path: Path) -> None:
        pq.write_table(pa.table({"image": [b"x"] * 50}), tmp_path / "a.parquet")
        pq.write_table(pa.table({"image": [b"x"]}), tmp_path / "b.parquet")
        whole = (tmp_path / "a.parquet").read_bytes()
        (tmp_path / "a.parquet").write_bytes(whole[: len(whole) // 2])
        with pytest.raises(PipelineError, match=r"a\.parquet: broken"):
            paths(tmp_path, format="parquet")
