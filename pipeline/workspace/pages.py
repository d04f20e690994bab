"""The documentation as it comes with the package: its pages, as Markdown."""

from __future__ import annotations

from pathlib import Path

from pipeline.errors import PipelineError, did_you_mean

_PACKAGED = Path(__file__).parent / "docs"
_REPOSITORY = Path(__file__).parents[2] / "docs"


def pages() -> dict[str, Path]:
    """Files by the name of the page, sorted: those of the package, or of the repository."""
    folder = _PACKAGED if _PACKAGED.is_dir() else _REPOSITORY
    return {path.stem: path for path in sorted(folder.glob("*.md"))}


def page(name: str) -> Path:
    """The file of a page, `photos` or `docs/photos.md`.

    Raises:
        PipelineError: there is none of that name; the nearest are named.
    """
    known = pages()
    stem = name.removeprefix("docs/").removesuffix(".md")
    if stem not in known:
        hint = did_you_mean(stem, list(known))
        raise PipelineError(f"{name!r} is no page; {hint}there are: {', '.join(known)}")
    return known[stem]
