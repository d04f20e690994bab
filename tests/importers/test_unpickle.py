"""Pickles of tensors: what is read, and what is refused without being run."""

from __future__ import annotations

import io
import pickle
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.errors import PipelineError
from tests.importers.helpers import C, Shell, random_tensors, vector_of, write_pickle


class _Storage:
    """A tensor whose storage, a pickle within the pickle, runs a command."""

    def __init__(self, storage: bytes) -> None:
        self._storage = storage

    def __reduce__(self) -> Any:
        return torch.storage._load_from_bytes, (self._storage,)


class _Tensor:
    def __init__(self, storage: Any, size: Any = (C,), stride: Any = (1,)) -> None:
        self._arguments = (storage, 0, size, stride, False, OrderedDict())

    def __reduce__(self) -> Any:
        return torch._utils._rebuild_tensor_v2, self._arguments


class _Tampered(_Tensor):
    """Sets attributes of what the pickle's names stand for."""

    def __reduce__(self) -> Any:
        return *super().__reduce__(), {"data": b""}


def saved_storage(content: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, _use_new_zipfile_serialization=False)
    return buffer.getvalue()


@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_every_protocol_of_bytes_is_read(
    tmp_path: Path, import_embeddings: Callable, protocol: int
) -> None:
    tensors = random_tensors(["1.jpg", "2.jpg"])
    rows, _ = import_embeddings(write_pickle(tmp_path / "emb.pkl", tensors, protocol))
    for row, vector in zip(rows, tensors.values(), strict=True):
        unit = (vector / vector.norm()).numpy()
        np.testing.assert_array_equal(vector_of(row), unit.astype(np.float16))


def test_pickles_that_run_code_are_refused_and_do_not_run_it(
    tmp_path: Path, import_embeddings: Callable
) -> None:
    trap = tmp_path / "sprung"
    shell = Shell(f"touch {trap}")
    hostile = {
        "plain": shell,
        "value": {"0.jpg": shell},
        "key": {"0.jpg": torch.ones(C), shell: 1},
        "hooks": {"0.jpg": _Tensor(shell)},
        "storage": {"0.jpg": _Tensor(_Storage(saved_storage([shell])))},
    }
    for content in hostile.values():
        path = write_pickle(tmp_path / "evil.pkl", content)
        with pytest.raises(PipelineError, match=r"evil\.pkl: .*refused: .* asks for posix\.system"):
            import_embeddings(path)
    assert not trap.exists()
    pickle.loads(pickle.dumps(shell))
    assert trap.exists()  # the trap works


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (np.ones(C), r"asks for numpy\._?core\.multiarray\._reconstruct"),
        ({"0.jpg": np.ones(C)}, r"asks for numpy\._?core\.multiarray\._reconstruct"),
        ({"0.jpg": torch.nn.Parameter(torch.ones(C))}, r"torch\._utils\._rebuild_parameter"),
        ([torch.ones(C)], "found a list"),
        ({"0.jpg": [torch.ones(C)]}, "entry '0.jpg' is a list"),
        ({0: torch.ones(C)}, "entry 0 is a StoredTensor"),
        ({"0.jpg": None}, "entry '0.jpg' is a NoneType"),
        ({}, "the dict is empty"),
        ({"0.jpg": torch.ones(C), "1.jpg": torch.ones(4)}, r"'1.jpg': shape \(4,\).* length 16"),
        ({"0.jpg": torch.ones(1, C)}, r"'0.jpg': shape \(1, 16\), expected one vector"),
        ({"0.jpg": torch.ones(())}, r"shape \(\), expected one vector"),
        ({"0.jpg": torch.ones(0)}, r"shape \(0,\), expected one vector"),
        ({"0.jpg": torch.ones(C, dtype=torch.int64)}, "of type torch.int64, not floating-point"),
        ({"0.jpg": _Tensor(_Storage(b"not a storage"))}, "embedding of '0.jpg': "),
        ({"0.jpg": _Tensor(None)}, "embedding of '0.jpg': "),
        ({"0.jpg": _Tensor(_Storage(saved_storage([1])))}, "a list in place of a storage"),
        ({"0.jpg": _Tampered(None)}, "not a readable pickle"),
    ],
)
def test_pickles_of_anything_else_are_refused(
    tmp_path: Path, import_embeddings: Callable, content: Any, reason: str
) -> None:
    path = write_pickle(tmp_path / "other.pkl", content)
    with pytest.raises(PipelineError, match=rf"other\.pkl: .*{reason}"):
        import_embeddings(path)
    assert not (tmp_path / "embeddings").exists()


def test_a_tensor_larger_than_its_storage_is_refused(
    tmp_path: Path, import_embeddings: Callable
) -> None:
    storage = _Storage(saved_storage(torch.ones(4)._typed_storage()))
    for size, stride in [((C,), (1,)), ((10**12,), (0,)), ((4,), (2,)), ((-1,), (1,))]:
        path = write_pickle(tmp_path / "emb.pkl", {"0.jpg": _Tensor(storage, size, stride)})
        with pytest.raises(PipelineError, match=r"embedding of '0\.jpg'"):
            import_embeddings(path)


def test_a_cut_off_pickle_and_no_pickle_are_refused(
    tmp_path: Path, import_embeddings: Callable
) -> None:
    path = write_pickle(tmp_path / "emb.pkl", random_tensors(["0.jpg", "1.jpg"]))
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(PipelineError, match="not a readable pickle"):
        import_embeddings(path)
    torch.save(random_tensors(["0.jpg"]), path)
    with pytest.raises(PipelineError, match="not a readable pickle"):
        import_embeddings(path)
    with pytest.raises(PipelineError, match=r"gone\.pkl: no such file"):
        import_embeddings(tmp_path / "gone.pkl")
