"""`pipeline docs`: the documentation that comes with the package."""

from __future__ import annotations

from typing import Annotated

import typer

docs_app = typer.Typer()


@docs_app.command()
def docs(
    name: Annotated[
        str | None, typer.Argument(help="A page to print, such as `photos` or `docs/photos.md`.")
    ] = None,
) -> None:
    """Print a page of the documentation (Markdown); without a name, where the pages are.

    `docs/NAME.md` in comments, messages and other helps is the page NAME.
    """
    from pipeline.workspace.pages import page, pages

    if name is not None:
        print(page(name).read_text(encoding="utf-8"), end="")
        return
    for path in pages().values():
        print(path)
