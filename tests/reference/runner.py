"""Find the cases of a folder and run them: one family of checks for each kind of file."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from . import (
    bilateral,
    copy_paste,
    criterion,
    denseclip,
    layouts,
    predict,
    schedule,
    scores,
    selfmask,
    spectral,
    text,
    training,
    zutis,
)
from .checks import Parts, Result, failure
from .vectors import (
    DESCRIPTIONS,
    RECORD,
    SUFFIXES,
    WEIGHTS,
    Vectors,
    read_record,
    read_vectors,
    weights_path,
)


@dataclass(frozen=True)
class Family:
    """Cases of one kind.

    Attributes:
        parts: gives the sub-cases of a file.
        io: whether it has a file of inputs and outputs.
        weights: whether it has weights.
    """

    parts: Callable[[Vectors], Parts]
    io: bool = True
    weights: bool = False


FAMILIES = {
    "zutis_forward": Family(zutis.forward, weights=True),
    "zutis_predict": Family(predict.predict),
    "zutis_criterion": Family(criterion.criterion),
    "zutis_train_steps": Family(training.train_steps, weights=True),
    "selfmask_forward": Family(selfmask.forward, weights=True),
    "bilateral_solver": Family(bilateral.solver),
    "spectral_voting": Family(spectral.spectral_voting),
    "denseclip_": Family(denseclip.dense_clip, weights=True),
    "text_embeddings": Family(text.clip_text, weights=True),
    "copy_paste": Family(copy_paste.pasted),
    "poly_lr": Family(schedule.poly, io=False),
    "running_score": Family(scores.running_score),
    layouts.ZUTIS_PREFIX: Family(layouts.zutis_layout, io=False),
    layouts.SELFMASK_PREFIX: Family(layouts.selfmask_layout, io=False),
}
VECTOR_SUFFIXES = (".json", ".safetensors")
SHARED_WEIGHTS = "clip_"  # weights of several cases, with no case of their own


def find_cases(folder: Path) -> tuple[list[str], list[str]]:
    """Names of the cases in a folder, and of vectors that belong to none; both sorted.

    Files that are no vectors (a licence, a script) are left alone.
    """
    names: set[str] = set()
    unknown: list[str] = []
    used = _weights_in_use(folder)
    for path in sorted(folder.iterdir()):
        if path.is_dir() or path.name.startswith(".") or path.name in DESCRIPTIONS:
            continue
        suffix = next((suffix for suffix in SUFFIXES if path.name.endswith(suffix)), "")
        name = path.name.removesuffix(suffix)
        only_weights = suffix == WEIGHTS and not (folder / (name + RECORD)).exists()
        if only_weights and (path.name in used or name.startswith(SHARED_WEIGHTS)):
            continue
        if suffix and family_of(name) is not None:
            names.add(name)
        elif path.suffix in VECTOR_SUFFIXES:
            unknown.append(path.name)
    return sorted(names), unknown


def family_of(name: str) -> Family | None:
    """The family whose prefix the name has."""
    return next((f for prefix, f in FAMILIES.items() if name.startswith(prefix)), None)


def run_folder(folder: Path) -> Iterator[Result]:
    """Every result of a folder, and a failure for every file that no checker knows."""
    names, unknown = find_cases(folder)
    for name in names:
        yield from run_case(folder, name)
    for file_name in unknown:
        yield failure(file_name, "unknown: no checker knows this file")


def run_case(folder: Path, name: str) -> Iterator[Result]:
    """Every result of the files of one name. Whatever goes wrong is a failed result."""
    family = family_of(name)
    if family is None:
        yield failure(name, "unknown: no checker knows this name")
        return
    try:
        vectors = read_vectors(folder, name, io=family.io, weights=family.weights)
        parts = list(family.parts(vectors))
    except Exception as error:  # of any file that somebody made
        yield failure(name, _reason(error))
        return
    yield from _listed(vectors)
    count, broken = 0, False
    for part, check in parts:
        try:
            for result in check():
                count += 1
                yield result
        except Exception as error:  # the other sub-cases still run
            broken = True
            yield failure(f"{name}/{part}", _reason(error))
    if broken:
        return
    if not count:
        yield failure(name, "nothing in it to compare")
    for tensor in vectors.io.unread():
        yield failure(f"{name}/{tensor}", "unknown: no check reads this tensor")


def _listed(vectors: Vectors) -> Iterator[Result]:
    """A failure for every tensor that the record lists and the files lack, or hold otherwise."""
    weights = {name: list(value.shape) for name, value in vectors.stored_weights.items()}
    for kind, stored in (("io", vectors.io.shapes()), ("weights", weights)):
        for name, entry in vectors.record.get(kind, {}).items():
            shape = stored.get(name)
            if shape != entry["shape"]:
                reason = f"{kind} {name} of shape {entry['shape']} is listed, but "
                reason += "absent" if shape is None else f"of shape {shape}"
                yield failure(f"{vectors.name}/{name}", reason)


def _weights_in_use(folder: Path) -> set[str]:
    """Names of the weights files that the records of the folder point at."""
    used = set()
    for path in folder.glob(f"*{RECORD}"):
        if path.name in DESCRIPTIONS or family_of(path.stem) is None:
            continue
        with suppress(OSError, ValueError):  # a damaged record fails as a case of its own
            used.add(weights_path(folder, path.stem, read_record(path)).name)
    return used


def _reason(error: Exception) -> str:
    text = str(error.args[0] if isinstance(error, KeyError) and error.args else error)
    return f"{type(error).__name__}: {' '.join(text.split())}"
