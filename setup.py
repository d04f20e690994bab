"""Puts into the package what `pipeline new` writes and what lies at the top of the repository."""

from __future__ import annotations

from pathlib import Path

from setuptools import Command, setup
from setuptools.command.build import build

LIST = Path("pipeline/workspace/files.txt")
TARGET = Path("pipeline/workspace/files")


def sources() -> list[str]:
    """The files that the list names, in its order."""
    lines = LIST.read_text(encoding="utf-8").splitlines()
    patterns = [line for line in lines if line and not line.startswith("#")]
    found = [path for pattern in patterns for path in sorted(Path().glob(pattern))]
    return [path.as_posix() for path in found if path.is_file()]


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
        return sources()

    def get_outputs(self) -> list[str]:
        """What is written."""
        return list(self.get_output_mapping())

    def get_output_mapping(self) -> dict[str, str]:
        """Source by what is written."""
        if self.editable_mode:
            return {}
        root = Path(self.build_lib or "", TARGET)
        return {(root / source).as_posix(): source for source in sources()}


class Build(build):
    """The usual steps and this one."""

    sub_commands = [*build.sub_commands, ("build_workspace", None)]  # noqa: RUF012


setup(cmdclass={"build": Build, "build_workspace": BuildWorkspace})
