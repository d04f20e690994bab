"""python .ci/lock.py REPORT: the versions of a report of `pip install --report`, one a line.

Left out are the package itself, the installers, and what torch pins for the GPUs of one
platform, so that the list holds on every platform.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

LEFT_OUT = {"zutis-pipeline", "pip", "setuptools", "wheel"}
OF_ONE_PLATFORM = re.compile(r"(nvidia|cuda|triton)\b")
HEAD = "# Versions for `pip install --constraint`; `make lock` renews them."


def main() -> None:
    """Print the constraints, in the order of their names."""
    report = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    versions = {
        re.sub(r"[-_.]+", "-", package["metadata"]["name"]).lower(): package["metadata"]["version"]
        for package in report["install"]
    }
    print(HEAD)
    for name, version in sorted(versions.items()):
        if name not in LEFT_OUT and not OF_ONE_PLATFORM.match(name):
            print(f"{name}=={version}")


if __name__ == "__main__":
    main()
