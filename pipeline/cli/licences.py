"""`pipeline licences`: of code, weights, fonts and data of this run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.cli.common import PARAMS, PATHS, Session

if TYPE_CHECKING:
    from pipeline.workspace.licences import Component

licences_app = typer.Typer()

TITLES = {
    "code": "Code, as the installed packages declare it",
    "weights": "Weights",
    "font": "Fonts",
    "data": "Data of this run",
}
PAGE_HEAD = """\
# Licences

Made by `pipeline licences --all --markdown`, in a folder without `params.yaml`. It shows what
packages and authors declare, which is no legal advice. Packages are those that this one needs, and
what of its extras is installed.

In a workspace `pipeline licences` shows the weights and data of its run. With `--commercial` it
ends with status 1 and the reasons if a part forbids commercial use, or does not say; `--accept
NAME` is for parts whose terms you know, such as your own photos."""


@licences_app.command()
def licences(
    ctx: typer.Context,
    commercial: Annotated[
        bool,
        typer.Option(
            "--commercial", help="Status 1, with the reasons, if a part forbids it or does not say."
        ),
    ] = False,
    accept: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="A part whose terms you know to allow it; repeatable."),
    ] = None,
    everything: Annotated[
        bool, typer.Option("--all", help="Also weights and fonts that this run does without.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print a page.")] = False,
) -> None:
    """Show the licences of code, weights, fonts and data that this run is made of.

    Without a params file all published weights are listed, and count. What is declared is shown;
    this is no legal advice.
    """
    from pipeline.workspace.licences import components, refuse_commercial

    session: Session = ctx.obj
    is_given = session.params_path != PARAMS or session.params_path.exists()
    params = session.params if is_given else None
    found = components(params, worlds=PATHS["worlds"])
    shown = [component for component in found if everything or component.used]
    if as_json:
        print(json.dumps([component.as_json() for component in shown], indent=2))
    elif markdown:
        print(_page(shown))
    else:
        print(_table(shown))
    if commercial:
        refuse_commercial(found, accept or [])


def _table(shown: Sequence[Component]) -> str:
    row = "{:29} {:34} {:10} {}"
    lines = []
    for kind, title in TITLES.items():
        parts = [component for component in shown if component.kind == kind]
        if parts:
            lines += [
                "",
                f"{title} ({len(parts)})",
                row.format("name", "licence", "commercial", ""),
            ]
        for part in parts:
            licence = part.licence if len(part.licence) <= 34 else f"{part.licence[:31]}..."
            lines.append(row.format(part.name, licence, part.commercial, part.note))
    return "\n".join(line.rstrip() for line in lines[1:])


def _page(shown: Sequence[Component]) -> str:
    lines = [PAGE_HEAD]
    for kind, title in TITLES.items():
        parts = [component for component in shown if component.kind == kind]
        if parts:
            lines += ["", f"## {title}", "", "| name | licence | commercial use | note |"]
            lines += ["|---|---|---|---|"]
        lines += [
            f"| {part.name} | {part.licence} | {part.commercial} | {part.note} |" for part in parts
        ]
    return "\n".join(lines)
