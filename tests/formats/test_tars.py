"""Tars that others made: members are read, skipped with a reason, or counted; none is lost."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import tarfile
from collections import Counter
from pathlib import Path

import pytest

from pipeline.errors import PipelineError
from pipeline.formats.images import ImageError
from pipeline.formats.sources import list_images, read_image
from tests.faults.hostile import TAR_END, pax_header, tar_header, tar_member, tar_number
from tests.formats.test_sources import Source

ZEROS = bytes(512)


def found(tmp_path: Path, content: bytes, left_out: Counter[str] | None = None) -> dict[str, str]:
    """Member -> its content, or why it is skipped in brackets, of a tar of that content."""
    (tmp_path / "0.tar").write_bytes(content)
    result = {}
    for ref in list_images("s", Source(tmp_path, "webdataset"), left_out):
        assert ref.member is not None
        try:
            data = read_image(ref)
            assert len(data) == ref.size
            result[ref.member] = data.decode()
        except ImageError as error:
            result[ref.member] = f"[{error}]"
    return result


def tar_of(*names: str, format: int = tarfile.PAX_FORMAT) -> bytes:
    """A whole tar, padded as usual, of members that hold their own names."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format) as tar:
        for name in names:
            info = tarfile.TarInfo(name)
            info.size = len(name.encode())
            tar.addfile(info, io.BytesIO(name.encode()))
    return buffer.getvalue()


def link(name: bytes, target: bytes, kind: bytes = b"2") -> bytes:
    return tar_member(name, b"", kind=kind, link=target)


A, B = tar_member(b"a.jpg", b"A"), tar_member(b"b/b.jpg", b"B")


@pytest.mark.parametrize(
    "format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT], ids=str
)
def test_joined_tars_are_read_to_the_end(tmp_path: Path, format: int) -> None:
    names = ["a.jpg", "n" * 90 + "/" + "n" * 90 + "/b.jpg", "c.png", "d.jpg"]
    parts = [tar_of(*names[:2], format=format), tar_of(format=format), tar_of(*names[2:])]
    assert found(tmp_path, b"".join(parts)) == {name: name for name in names}


@pytest.mark.parametrize("zeros", [1, 2, 3, 20, 5000])
def test_zeros_between_members_are_passed_over(tmp_path: Path, zeros: int) -> None:
    assert found(tmp_path, A + zeros * ZEROS + B + TAR_END) == {"a.jpg": "A", "b/b.jpg": "B"}


@pytest.mark.parametrize("rest", [b"x", b"x" * 512, b"x" * 2000, A[:300], tar_of("b.jpg")[:1024]])
@pytest.mark.parametrize("padding", [0, 8 * 512])
def test_what_follows_the_end_is_named(tmp_path: Path, rest: bytes, padding: int) -> None:
    with pytest.raises(PipelineError, match=r"0\.tar: broken: cut off or damaged at byte \d+"):
        found(tmp_path, A + TAR_END + bytes(padding) + rest)


@pytest.mark.parametrize(
    ("links", "expected"),
    [
        (link(b"x.jpg", b"a.jpg", kind=b"1"), "A"),
        (link(b"x.jpg", b"./a.jpg", kind=b"1"), "A"),
        (link(b"x.jpg", b"late.jpg", kind=b"1"), "L"),
        (link(b"x.jpg", b"a.jpg"), "A"),
        (link(b"x.jpg", b"late.jpg"), "L"),
        (link(b"b/x.jpg", b"b.jpg"), "B"),
        (link(b"b/x.jpg", b"./../a.jpg"), "A"),
        (link(b"./b/x.jpg", b"../b/./b.jpg"), "B"),
        (link(b"y.jpg", b"a.jpg") + link(b"x.jpg", b"y.jpg"), "A"),
        (link(b"x.jpg", b"y.jpg") + link(b"y.jpg", b"a.jpg", kind=b"1"), "A"),
        (link(b"latest", b"b") + link(b"x.jpg", b"latest/b.jpg"), "B"),
        (link(b"in", b"b/c") + link(b"x.jpg", b"in/../b.jpg"), "B"),
        (link(b"x", b"a.jpg"), "A"),
    ],
)
def test_links_are_read_as_what_they_lead_to(tmp_path: Path, links: bytes, expected: str) -> None:
    late = tar_member(b"late.jpg", b"L") + tar_member(b"b/c/c.jpg", b"C")
    if links == link(b"x", b"a.jpg"):
        picture = tar_member(b"a.jpg", b"GIF89a")
        assert found(tmp_path, picture + links + TAR_END) == {"a.jpg": "GIF89a", "x": "GIF89a"}
        return
    result = found(tmp_path, A + B + links + late + TAR_END)
    (name,) = (name for name in result if name.endswith("x.jpg"))
    assert result[name] == expected
    assert result.keys() >= {"a.jpg", "b/b.jpg", "late.jpg", "b/c/c.jpg"}


@pytest.mark.parametrize(
    ("target", "kind"),
    [(b"gone.jpg", b"1"), (b"gone.jpg", b"2"), (b"../a.jpg", b"2"), (b"/a.jpg", b"2"),
     (b"x.jpg", b"1"), (b"x.jpg", b"2"), (b"y.jpg", b"2"), (b"up/up/up/a.jpg", b"2"),
     (b"a.jpg/b.jpg", b"2"), (b"", b"2"), (b"", b"1")],
)  # fmt: skip
def test_links_that_lead_nowhere_are_skipped(tmp_path: Path, target: bytes, kind: bytes) -> None:
    left_out: Counter[str] = Counter()
    circle = link(b"y.jpg", b"x.jpg") + link(b"up", b"up")
    result = found(tmp_path, A + link(b"x.jpg", target, kind) + circle + TAR_END, left_out)
    skipped = [name for name, text in result.items() if text.startswith("[link ")]
    assert len(skipped) + left_out["link to a folder"] == 3


def test_links_to_folders_are_counted(tmp_path: Path) -> None:
    left_out: Counter[str] = Counter()
    links = link(b"latest", b"b") + link(b"b/x.jpg", b"..") + tar_member(b"z", b"", kind=b"5")
    result = found(tmp_path, A + B + links + link(b"to_z", b"z") + TAR_END, left_out)
    assert list(result) == ["a.jpg", "b/b.jpg"]
    assert left_out == {"link to a folder": 3}


def test_members_of_other_kinds_are_skipped_or_counted(tmp_path: Path) -> None:
    left_out: Counter[str] = Counter()
    picture = b"\x89PNG\r\n\x1a\n"
    members = [
        tar_member(b"fifo.jpg", b"", kind=b"6"),
        tar_member(b"sparse.jpg", b"", kind=b"S"),
        tar_member(b"folder.jpg", b"", kind=b"5"),
        tar_member(b"unknown.jpg", b"data", kind=b"Z"),
        tar_member(b"continued.jpg", b"7", kind=b"7"),
        tar_member(b"v7.jpg", b"V", kind=b"\0"),
        tar_member(b"._v7.jpg", b"mac"),
        pax_header(b"size", b"3") + tar_header(b"pax.jpg", tar_number(0)) + b"abc" + bytes(509),
        tar_member(b"c.heic", b"heic"),
        tar_member(b"c.json", b"{}"),
        tar_member(b"LICENSE", b"text"),
    ]
    result = found(tmp_path, b"".join(members) + TAR_END, left_out)
    assert result.pop("pax.jpg").startswith("[its size is in an extended header")
    assert result.pop("sparse.jpg").startswith("[stored as a sparse")
    assert result == {
        "fifo.jpg": "[not a regular file]",
        "unknown.jpg": "[not a regular file]",
        "continued.jpg": "7",
        "v7.jpg": "V",
    }
    assert left_out == {"hidden": 1, ".heic": 1, "without extension": 1}
    (tmp_path / "0.tar").write_bytes(tar_member(b"picture", picture) + TAR_END)
    (ref,) = list_images("s", Source(tmp_path, "webdataset"))
    assert read_image(ref) == picture


def test_a_name_twice_is_refused_unless_it_is_the_same_file(tmp_path: Path) -> None:
    left_out: Counter[str] = Counter()
    again = link(b"a.jpg", b"a.jpg", kind=b"1")
    assert found(tmp_path, A + again + TAR_END, left_out) == {"a.jpg": "A"}
    assert left_out == {"link to itself": 1}
    with pytest.raises(PipelineError, match=r"0\.tar: broken: member a\.jpg is there twice, as in"):
        found(tmp_path, tar_of("a.jpg") + tar_of("a.jpg"))


@pytest.mark.skipif(shutil.which("tar") is None, reason="no tar")
@pytest.mark.parametrize("format", ["v7", "oldgnu", "gnu", "ustar", "posix"])
def test_a_tree_packed_by_tar_is_whole(tmp_path: Path, format: str) -> None:
    tree = tmp_path / "tree"
    (tree / "sub").mkdir(parents=True)
    (tree / "1.jpg").write_bytes(b"one")
    os.link(tree / "1.jpg", tree / "sub/2.jpg")
    (tree / "sub/3.jpg").symlink_to("../1.jpg")
    (tree / "4.jpg").symlink_to("gone.jpg")
    (tree / "folder").symlink_to("sub")
    command = ["tar", "cf", tmp_path / "t", f"--format={format}", "-C", tree, "."]
    subprocess.run(command, check=True)
    assert found(tmp_path, (tmp_path / "t").read_bytes()) == {
        "./1.jpg": "one",
        "./sub/2.jpg": "one",
        "./sub/3.jpg": "one",
        "./4.jpg": "[link to gone.jpg, which is not in the tar]",
    }


@pytest.mark.skipif(shutil.which("tar") is None, reason="no tar")
@pytest.mark.parametrize("format", ["gnu", "posix"])
def test_a_sparse_file_at_the_end_does_not_hide_the_rest(tmp_path: Path, format: str) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    (tree / "1.jpg").write_bytes(b"one")
    with (tree / "2.jpg").open("wb") as file:
        file.truncate(1 << 22)
    command = ["tar", "cf", tmp_path / "t", f"--format={format}", "--sparse", "-C", tree]
    subprocess.run([*command, "1.jpg", "2.jpg"], check=True)
    result = found(tmp_path, (tmp_path / "t").read_bytes())
    assert result["1.jpg"] == "one"
    assert result["2.jpg"].startswith("[stored as a sparse")
