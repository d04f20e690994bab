"""Sources and tables that are damaged, malicious, or change under our hands."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.errors import PipelineError
from pipeline.formats import sources
from pipeline.formats.images import MAX_FILE_BYTES, ImageError, load_image
from pipeline.formats.sources import ImageRef, list_images, read_image
from pipeline.formats.tables import (
    ARCHIVE_SCHEMA,
    ArchiveRow,
    embedding_bytes,
    embedding_schema,
    iter_embedding_rows,
    list_embedding_shards,
    read_archives,
    write_archives,
    write_table,
)
from tests.conftest import encoded_image, noise_image
from tests.faults.hostile import (
    PEAK_BYTES,
    TAR_END,
    check_names,
    check_reason,
    cuts,
    flips,
    on_linux,
    pax_header,
    tar_header,
    tar_member,
    tar_number,
    within,
)

PATIENCE_S = 20
NUM_FLIPS = 300
JPEG = encoded_image(noise_image(0), "JPEG")


MANY_KEYS = ",".join(f'"{number}": 1' for number in range(10_000))
# Opens a benchmark and prints by how many bytes the memory of the process has grown at most.
OPEN_COCO = f"""{PEAK_BYTES}
import sys
from pathlib import Path
from pipeline.benchmarks.coco import CocoBenchmark
before = peak_bytes()
try:
    CocoBenchmark(Path(sys.argv[1]), split="val", categories=["cat"], groups={{}})
finally:
    print(peak_bytes() - before)
"""


def open_coco(root: Path) -> subprocess.CompletedProcess[str]:
    """Open a benchmark in a process of its own, which prints the memory that it took."""
    return subprocess.run(
        [sys.executable, "-c", OPEN_COCO, str(root)],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )


@dataclass(frozen=True)
class Source:
    root: Path
    format: str = "folder"
    pattern: str = ""


def ref_of(path: Path) -> ImageRef:
    return ImageRef(key="k", source="s", path=str(path))


def names(root: Path) -> list[str]:
    return [os.path.relpath(ref.path, root) for ref in list_images("s", Source(root))]


def make_fifo(path: Path) -> None:
    os.mkfifo(path)


def make_socket(path: Path) -> None:
    here = Path.cwd()
    os.chdir(path.parent)  # the name of a socket has to be short
    try:
        socket.socket(socket.AF_UNIX).bind(path.name)
    finally:
        os.chdir(here)


def link_to_device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def link_to_itself(path: Path) -> None:
    path.symlink_to(path)


def dangling_link(path: Path) -> None:
    path.symlink_to(path.with_name("gone"))


ODD_FILES = [make_fifo, make_socket, link_to_device, link_to_itself, dangling_link, Path.mkdir]


class TestFiles:
    @pytest.mark.parametrize("make", ODD_FILES)
    def test_what_is_no_file_is_never_waited_for(
        self, tmp_path: Path, make: Callable[[Path], None]
    ) -> None:
        """Neither when listed, nor when it takes the place of an image after that."""
        make(tmp_path / "x.jpg")
        (tmp_path / "y.jpg").write_bytes(JPEG)
        listed = within(PATIENCE_S, lambda: names(tmp_path))
        assert listed == (["y.jpg"] if make is Path.mkdir else ["x.jpg", "y.jpg"])
        for read in (lambda: read_image(ref_of(tmp_path / "x.jpg")),
                     lambda: load_image(tmp_path / "x.jpg")):  # fmt: skip
            with pytest.raises(ImageError, match=r"^(file is missing|cannot be read: .*)$"):
                within(PATIENCE_S, read)

    @pytest.mark.parametrize("kind", ["webdataset", "parquet"])
    @pytest.mark.parametrize("make", ODD_FILES)
    def test_what_is_no_shard_is_named(
        self, tmp_path: Path, make: Callable[[Path], None], kind: str
    ) -> None:
        suffix = {"webdataset": "tar", "parquet": "parquet"}[kind]
        make(tmp_path / f"x.{suffix}")
        with pytest.raises(PipelineError, match=rf"x\.{suffix}: broken: .*leave it out"):
            within(PATIENCE_S, lambda: list(list_images("s", Source(tmp_path, kind))))
        member = ImageRef(key="k", source="s", path=str(tmp_path / f"x.{suffix}"), member="0")
        with pytest.raises(ImageError, match=r"^(file is missing|cannot be read: .*)$"):
            within(PATIENCE_S, lambda: read_image(member))

    def test_a_wrong_extension_does_not_matter(self, tmp_path: Path) -> None:
        (tmp_path / "jpeg.png").write_bytes(JPEG)
        (tmp_path / "text.jpg").write_bytes(b"no image at all\n")
        assert load_image(read_image(ref_of(tmp_path / "jpeg.png"))).size == (24, 16)
        with pytest.raises(ImageError, match=r"^not an image$"):
            load_image(read_image(ref_of(tmp_path / "text.jpg")))

    def test_a_file_too_large_to_be_held_is_refused_by_its_size(self, tmp_path: Path) -> None:
        with (tmp_path / "x.jpg").open("wb") as file:
            file.truncate(MAX_FILE_BYTES + 1)  # a hole: it takes no space
        with pytest.raises(ImageError, match=rf"^too large: {MAX_FILE_BYTES + 1} bytes$"):
            read_image(ref_of(tmp_path / "x.jpg"))

    def test_a_file_that_grows_and_shrinks_is_read_as_it_was_or_cut(self, tmp_path: Path) -> None:
        path = tmp_path / "x.jpg"
        path.write_bytes(JPEG)
        stop = threading.Event()

        def disturb() -> None:
            while not stop.is_set():
                os.truncate(path, len(JPEG) // 2)
                path.write_bytes(JPEG * 3)

        thread = threading.Thread(target=disturb)
        thread.start()
        try:
            found = [within(PATIENCE_S, lambda: read_image(ref_of(path))) for _ in range(300)]
        finally:
            stop.set()
            thread.join()
        assert all(len(data) <= 3 * len(JPEG) for data in found)
        for data in found:
            try:
                assert load_image(data).size == (24, 16)
            except ImageError as error:
                check_reason(error)

    def test_odd_names_are_listed_and_read(self, tmp_path: Path) -> None:
        odd = ["new\nline.jpg", "tab\t.jpg", "\x07.jpg", "A.jpg", "a.jpg", "a.JPG", " .jpg",
               "n" * 251 + ".jpg", "-rf.jpg", "$(x).jpg", "e\u0301.jpg", "\u00e9.jpg"]  # fmt: skip
        for name in odd:
            (tmp_path / name).write_bytes(name.encode())
        refs = list(list_images("s", Source(tmp_path)))
        assert [read_image(ref).decode() for ref in refs] == sorted(odd)
        assert len({ref.key for ref in refs}) == len(odd)

    def test_a_folder_deeper_than_the_stack_is_listed(self, tmp_path: Path) -> None:
        depth = sys.getrecursionlimit() + 50
        folders = [tmp_path]
        for _ in range(depth):
            folders.append(folders[-1] / "d")
            folders[-1].mkdir()
        image = folders[-1] / "x.jpg"
        image.write_bytes(JPEG)
        found = names(tmp_path)
        image.unlink()  # pytest could not clean up: it recurses
        for folder in reversed(folders):
            folder.rmdir()
        assert found == ["d/" * depth + "x.jpg"]

    def test_folders_that_link_to_each_other_are_listed_once_a_way(self, tmp_path: Path) -> None:
        for here, there in ("ab", "ba"):
            (tmp_path / here).mkdir()
            (tmp_path / here / f"{here}.jpg").write_bytes(JPEG)
            (tmp_path / here / "link").symlink_to(tmp_path / there)
        assert names(tmp_path) == ["a/a.jpg", "a/link/b.jpg", "b/b.jpg", "b/link/a.jpg"]

    def test_more_ways_than_anyone_can_list_are_an_error(self, tmp_path: Path) -> None:
        """Thirty folders, each with two links to the next one: a thousand million ways."""
        for number in range(30):
            (tmp_path / f"{number:02d}").mkdir()
            for link in "ab":
                (tmp_path / f"{number:02d}" / link).symlink_to(tmp_path / f"{number + 1:02d}")
        (tmp_path / "30").mkdir()
        (tmp_path / "30/x.jpg").write_bytes(JPEG)
        with pytest.raises(PipelineError, match=rf"links lead here in over {sources.MAX_WAYS}"):
            within(PATIENCE_S, lambda: names(tmp_path))


GOOD = tar_member(b"good.jpg", JPEG)
FORGED_TARS = {
    "huge size": GOOD + tar_header(b"x.jpg", tar_number(1 << 62)),
    "size beyond numbers": GOOD + tar_header(b"x.jpg", tar_number(1 << 80)),
    "negative size": GOOD + tar_header(b"x.jpg", tar_number(-512)),
    "negative size of no image": GOOD + tar_header(b"x.txt", tar_number(-512)),
    "far back": GOOD + tar_header(b"x.jpg", tar_number(-(1 << 60))),
    "huge extended header": GOOD + tar_header(b"p", tar_number(1 << 62), kind=b"x"),
    "huge long name": GOOD + tar_header(b"p", tar_number(1 << 62), kind=b"L"),
    "chain of long names": GOOD + tar_member(b"p", b"n\0", kind=b"L") * 3000 + GOOD,
    "chain of extended headers": GOOD + pax_header(b"path", b"x.jpg") * 3000 + GOOD,
    "size by extended header": GOOD + pax_header(b"size", b"100000") + tar_member(b"x.jpg", b"x"),
    "negative by extended header": GOOD + pax_header(b"size", b"-512") + tar_member(b"x.jpg", b""),
    "record beyond numbers": GOOD + tar_member(b"p", b"9" * 20 + b" path=x\n", kind=b"x") + GOOD,
    "sparse map": GOOD + pax_header(b"GNU.sparse.map", b"0,z") + tar_member(b"x.jpg", b"x"),
    "wrong checksum": GOOD + b"!" + tar_member(b"x.jpg", b"x")[1:],
    "twice": GOOD + GOOD,
    "name of no text": GOOD + pax_header(b"path", b"\xff.jpg") + tar_member(b"x.jpg", b"x"),
}


class TestTars:
    @pytest.mark.parametrize("name", FORGED_TARS)
    def test_a_forged_header_is_named_at_once(self, tmp_path: Path, name: str) -> None:
        (tmp_path / "0.tar").write_bytes(FORGED_TARS[name] + TAR_END)
        with pytest.raises(PipelineError, match=r"0\.tar'?: (broken: .*leave it out|file name)"):
            within(PATIENCE_S, lambda: list(list_images("s", Source(tmp_path, "webdataset"))))

    def test_a_negative_size_of_another_kind_of_member_is_named(self, tmp_path: Path) -> None:
        forged = tar_header(b"x", tar_number(-512), kind=b"Z")
        (tmp_path / "0.tar").write_bytes(GOOD + forged + TAR_END)
        code = (
            "import sys; from pathlib import Path\n"
            "from pipeline.formats.shards import tar_members\n"
            "list(tar_members(Path(sys.argv[1])))"
        )
        done = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path / "0.tar")],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            stderr=subprocess.PIPE,
            timeout=60,
            check=False,
        )
        assert b"ReadError" in done.stderr

    def test_links_out_of_the_tar_and_devices_are_listed_and_never_read(
        self, tmp_path: Path
    ) -> None:
        kinds = {b"1": b"/etc/passwd", b"2": b"/etc/passwd", b"3": b"", b"4": b"", b"6": b""}
        members = [
            tar_member(b"%b.jpg" % kind, b"", kind=kind, link=link) for kind, link in kinds.items()
        ]
        (tmp_path / "0.tar").write_bytes(b"".join(members) + GOOD + TAR_END)
        *odd, ref = list_images("s", Source(tmp_path, "webdataset"))
        assert (ref.member, read_image(ref)) == ("good.jpg", JPEG)
        assert [ref.member for ref in odd] == [f"{kind.decode()}.jpg" for kind in kinds]
        for ref in odd:
            with pytest.raises(ImageError, match=r"not in the tar|not a regular file") as error:
                read_image(ref)
            check_reason(error.value)

    def test_evil_names_are_only_names(self, tmp_path: Path) -> None:
        long_name = b"n" * 1_000_000 + b".jpg"
        evil = [b"../../x.jpg", b"/etc/x.jpg", b"a\nb.jpg", b"C:\\x.jpg"]
        tar = b"".join(tar_member(name, JPEG) for name in evil)
        for name in (b"nul\0.jpg", long_name):
            tar += pax_header(b"path", name) + tar_member(b"x.jpg", JPEG)
        (tmp_path / "0.tar").write_bytes(tar + TAR_END)
        refs = list(list_images("s", Source(tmp_path, "webdataset")))
        assert [ref.member.encode() for ref in refs] == [*evil, b"nul\0.jpg", long_name]
        assert all(read_image(ref) == JPEG for ref in refs)
        assert len({ref.key for ref in refs}) == len(refs)

    def test_a_cut_or_flipped_tar_gives_images_or_a_message(self, tmp_path: Path) -> None:
        """Read by the places that the whole tar has, too: it may change once it is listed."""
        path = tmp_path / "0.tar"
        whole = b"".join(tar_member(b"%d.jpg" % number, JPEG) for number in range(3)) + TAR_END
        path.write_bytes(whole)
        refs = list(list_images("s", Source(tmp_path, "webdataset")))
        for data in [*cuts(whole), *flips(whole, NUM_FLIPS, seed="tar")]:
            path.write_bytes(data)
            listed: list[ImageRef] = []
            try:
                listed += list_images("s", Source(tmp_path, "webdataset"))
            except PipelineError as error:
                check_names(error, path)
            for ref in [*refs, *listed]:
                try:
                    assert len(read_image(ref)) <= len(whole)
                except ImageError as error:
                    check_reason(error)

    def test_a_size_forged_after_the_listing_does_not_take_memory(self, tmp_path: Path) -> None:
        path = tmp_path / "0.tar"
        path.write_bytes(GOOD + TAR_END)
        (ref,) = list_images("s", Source(tmp_path, "webdataset"))
        for size in (1 << 62, -1, MAX_FILE_BYTES + 1):
            path.write_bytes(tar_header(b"good.jpg", tar_number(size)) + JPEG)
            with pytest.raises(ImageError, match=rf"^too large: {size} bytes$"):
                read_image(ref)


@on_linux
class TestAnnotations:
    @pytest.mark.parametrize(
        ("text", "problem"),
        [
            ("[" * 100_000 + "]" * 100_000, "brackets are nested more than 64 deep"),
            ('{"a": ' * 100_000 + "1" + "}" * 100_000, "brackets are nested more than 64 deep"),
            ("[" * 100_000, "brackets are nested more than 64 deep"),
            (f'{{"{"k" * 10**6}": {{{MANY_KEYS}}}}}', "a key has 1000000 characters"),
        ],
        ids=["arrays", "objects", "cut", "long key"],
    )
    def test_deep_or_long_paths_of_a_json_are_refused_in_little_memory(
        self, tmp_path: Path, text: str, problem: str
    ) -> None:
        path = tmp_path / "annotations/instances_val.json"
        path.parent.mkdir()
        path.write_text(f'{{"info": {text}, "images": [], "annotations": [], "categories": []}}')
        done = open_coco(tmp_path)
        assert done.returncode == 1
        assert f"{path}: {problem}" in done.stderr.splitlines()[-1]
        assert "download it again" in done.stderr
        assert int(done.stdout) < 20 << 20

    def test_paths_at_the_bounds_are_read_in_little_memory(self, tmp_path: Path) -> None:
        """Sixty keys within each other, as long as is allowed, and many keys below them."""
        path = tmp_path / "annotations/instances_val.json"
        path.parent.mkdir()
        key = f'"{"k" * 1000}"'
        text = f"{{{key}: " * 60 + f"{{{MANY_KEYS}}}" + "}" * 60
        path.write_text(f'{{"info": {text}, "images": []}}')
        done = open_coco(tmp_path)
        assert "'categories' is missing" in done.stderr
        assert int(done.stdout) < 100 << 20


class TestParquet:
    @pytest.mark.parametrize("kind", ["bytes", "struct"])
    @pytest.mark.parametrize("compression", ["zstd", "none"])
    def test_a_cut_or_flipped_file_gives_images_or_a_message(
        self, tmp_path: Path, kind: str, compression: str
    ) -> None:
        path = tmp_path / "0.parquet"
        images = [bytes([number]) * 300 for number in range(20)]
        structs = [{"bytes": data, "path": "x"} for data in images]
        table = pa.table({"image": pa.array(images if kind == "bytes" else structs)})
        pq.write_table(table, path, row_group_size=7, compression=compression)
        whole = path.read_bytes()
        reasons = set()
        copies = [*cuts(whole), *flips(whole, NUM_FLIPS // 3, seed=kind)]
        copies += [whole[:-600] + end for end in flips(whole[-600:], NUM_FLIPS, seed=compression)]
        for number, data in enumerate(copies):
            path.write_bytes(data)
            os.utime(path, ns=(number, number))
            try:
                refs = list(list_images("s", Source(tmp_path, "parquet")))
            except PipelineError as error:
                check_names(error, path)
                continue
            for ref in refs[:30]:
                try:
                    read_image(ref)
                except ImageError as error:
                    check_reason(error)
                    reasons.add(str(error))
        assert reasons

    def test_more_rows_than_bytes_are_no_images(self, tmp_path: Path) -> None:
        path = tmp_path / "0.parquet"
        pq.write_table(pa.table({"image": pa.nulls(1_000_001, pa.binary())}), path)
        with pytest.raises(PipelineError, match=r"0\.parquet: broken: 1000001 rows in \d+ bytes"):
            list(list_images("s", Source(tmp_path, "parquet")))

    def test_a_file_of_other_columns_after_the_listing_is_an_image_error(
        self, tmp_path: Path
    ) -> None:
        path = tmp_path / "0.parquet"
        ref = ImageRef(key="k", source="s", path=str(path), member="0")
        tables = [
            pa.table({"image": [1]}),
            pa.table({"a": [b"x"], "b": [b"x"]}),
            pa.table({"image": pa.array([None], pa.binary())}),
            pa.table({"image": pa.array([], pa.binary())}),
        ]
        for number, table in enumerate(tables):
            pq.write_table(table, path)
            os.utime(path, ns=(number, number))
            with pytest.raises(ImageError):
                read_image(ref)

    def test_a_member_that_is_no_row_is_an_image_error(self, tmp_path: Path) -> None:
        """Archives may come from elsewhere, and say anything."""
        pq.write_table(pa.table({"image": [JPEG]}), tmp_path / "0.parquet")
        for member in ("-1", "x", "9" * 5000):
            with pytest.raises(ImageError):
                read_image(ImageRef("k", "s", str(tmp_path / "0.parquet"), member))


def archive_row(rank: int) -> ArchiveRow:
    return ArchiveRow("c", 1, rank, f"k{rank}", 0.5, "s", "p", None, None, 3, 3, "0" * 64)


def write_shard(path: Path, embeddings: list[bytes | None], dim: int = 8) -> None:
    rows = [
        {
            "key": f"{number:020x}",
            "source": "s",
            "path": f"{number}.jpg",
            "status": "ok",
            "embedding": embedding,
        }
        for number, embedding in enumerate(embeddings)
    ]
    write_table(path, pa.Table.from_pylist(rows, schema=embedding_schema(dim, "m/w")))


def read_shards(folder: Path) -> int:
    shards = list_embedding_shards([folder])
    columns = ["key", "status", "embedding"]
    return sum(len(rows) for rows in iter_embedding_rows(shards, columns=columns, block_rows=7))


class TestTables:
    def test_cut_or_flipped_tables_are_read_whole_or_named(self, tmp_path: Path) -> None:
        shard, archives = tmp_path / "s/0.parquet", tmp_path / "archives.parquet"
        write_shard(shard, [embedding_bytes(np.full(8, number)) for number in range(30)])
        write_archives(archives, [archive_row(rank) for rank in range(9)])
        readers: list[tuple[Path, Callable[[], int], int]] = [
            (shard, lambda: read_shards(tmp_path / "s"), 30),
            (archives, lambda: len(read_archives(archives)), 9),
        ]
        for path, read, num_rows in readers:
            whole = path.read_bytes()
            refused = 0
            for data in [*cuts(whole), *flips(whole, 2 * NUM_FLIPS, seed=path.name)]:
                path.write_bytes(data)
                try:
                    assert read() == num_rows
                except PipelineError as error:
                    check_names(error, path)
                    refused += 1
            assert refused > NUM_FLIPS

    def test_an_image_that_has_lost_its_embedding_is_not_read_as_garbage(
        self, tmp_path: Path
    ) -> None:
        write_shard(tmp_path / "s/0.parquet", [embedding_bytes(np.ones(8)), None])
        with pytest.raises(PipelineError, match=r"0\.parquet: .* status ok has no embedding"):
            read_shards(tmp_path / "s")

    @pytest.mark.parametrize("dim", [b"0", b"9" * 5000, b"99999999"])
    def test_a_forged_length_of_embeddings_is_named(self, tmp_path: Path, dim: bytes) -> None:
        path = tmp_path / "s/0.parquet"
        write_shard(path, [embedding_bytes(np.ones(8))])
        table = pq.read_table(path)
        pq.write_table(table.replace_schema_metadata({b"encoder": b"\xff", b"dim": dim}), path)
        with pytest.raises(PipelineError, match=r"0\.parquet: not a shard of embeddings"):
            list_embedding_shards([tmp_path / "s"])

    def test_a_shard_cut_while_it_is_read_is_named_or_was_read_before(self, tmp_path: Path) -> None:
        path = tmp_path / "s/0.parquet"
        rng = np.random.default_rng(0)
        cells = [embedding_bytes(rng.random(512)) for _ in range(5000)]
        write_shard(path, cells, dim=512)
        blocks = iter_embedding_rows([path], columns=["embedding"], block_rows=100)
        found = next(blocks)["embedding"].to_pylist()
        os.truncate(path, path.stat().st_size // 2)
        try:
            for rows in blocks:
                found += rows["embedding"].to_pylist()
            assert len(found) == len(cells)
        except PipelineError as error:
            check_names(error, path)
        assert found == cells[: len(found)]

    def test_a_shard_replaced_while_it_is_read_is_read_as_it_was(self, tmp_path: Path) -> None:
        path = tmp_path / "s/0.parquet"
        write_shard(path, [embedding_bytes(np.ones(8))] * 50)
        blocks = iter_embedding_rows([path], columns=["embedding"], block_rows=10)
        next(blocks)
        write_shard(path, [embedding_bytes(np.zeros(8))] * 3)
        rest = [cell for rows in blocks for cell in rows["embedding"].to_pylist()]
        assert rest == [embedding_bytes(np.ones(8))] * 40

    @pytest.mark.parametrize("name", [field.name for field in ARCHIVE_SCHEMA if not field.nullable])
    def test_archives_with_an_empty_cell_are_named(self, tmp_path: Path, name: str) -> None:
        path = tmp_path / "archives.parquet"
        write_archives(path, [archive_row(1)])
        table = pq.read_table(path)
        place = table.schema.get_field_index(name)
        empty = pa.nulls(1, table.schema.field(name).type)
        pq.write_table(table.set_column(place, name, empty), path)
        with pytest.raises(PipelineError, match=rf"archives\.parquet: column '{name}' has empty"):
            read_archives(path)
