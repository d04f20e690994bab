"""Puts into the package what lies outside of it: what `pipeline new` writes, and docs/*.md."""

from __future__ import annotations

from pathlib import Path

from setuptools import Command, setup
from setuptools.command.build import build

LIST = Path("pipeline/workspace/files.txt")
TARGET = Path("pipeline/workspace/files")
PAGES, PAGES_TARGET = "docs/*.md", Path("pipeline/workspace")


def targets() -> dict[str, Path]:
    """Folder in the package by file of the repository: those that the list names, and the pages."""
    lines = LIST.read_text(encoding="utf-8").splitlines()
    patterns = [line for line in lines if line and not line.startswith("#")]
    found = [(pattern, TARGET) for pattern in patterns] + [(PAGES, PAGES_TARGET)]
    return {
        path.as_posix(): target
        for pattern, target in found
        for path in sorted(Path().glob(pattern))
        if path.is_file()
    }


class BuildWorkspace(Command):
    """Copies the files; an editable package reads them where they are."""

    user_options = []  # noqa: RUF012 - as setuptools has it
    editable_mode = False
    build_lib: str | None = None

    def initialize_options(self) -> None:
        """Nothing to do."""

    def finalize_options(self) -> None:
        """Take the folder of the command `build`."""
        self.set_undefined_options("build", ("build_lib", "build_lib"))

    def run(self) -> None:
        """Copy, unless the package is editable."""
        for target, source in self.get_output_mapping().items():
            self.mkpath(str(Path(target).parent))
            self.copy_file(source, target)

    def get_source_files(self) -> list[str]:
        """What a source distribution needs."""
        return list(targets())

    def get_outputs(self) -> list[str]:
        """What is written."""
        return list(self.get_output_mapping())

    def get_output_mapping(self) -> dict[str, str]:
        """Source by what is written."""
        if self.editable_mode:
            return {}
        root = Path(self.build_lib or "")
        return {(root / target / source).as_posix(): source for source, target in targets().items()}


class Build(build):
    """The usual steps and this one."""

    sub_commands = [*build.sub_commands, ("build_workspace", None)]  # noqa: RUF012


setup(cmdclass={"build": Build, "build_workspace": BuildWorkspace})
