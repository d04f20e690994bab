"""Processes in which only those packages can be imported that an ONNX file needs."""

from __future__ import annotations

import os
from pathlib import Path

# What the package depends on and an ONNX file does not need, see docs/deploy.md.
ABSENT = [
    *("torch", "torchvision", "timm", "open_clip", "safetensors", "huggingface_hub", "sklearn"),
    *("scipy", "faiss", "pyarrow", "webdataset", "dvc", "dvclive", "jinja2", "threadpoolctl"),
    *("onnx", "yaml"),
]
ROOT = Path(__file__).parents[1]


def environment_without_torch(folder: Path) -> dict[str, str]:
    """Variables with which Python, and each process that it starts, has none of `ABSENT`."""
    folder.mkdir(exist_ok=True)
    lines = ["import sys", f"sys.modules.update(dict.fromkeys({ABSENT!r}))"]
    (folder / "sitecustomize.py").write_text("\n".join(lines), encoding="utf-8")
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)])}
