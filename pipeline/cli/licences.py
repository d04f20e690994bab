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
    "weights": "Weights",
    "font": "Fonts",
    "data": "Data of this run",
    "code": "Code, as the installed packages declare it",
}
OWN_TERMS = "own terms"  # not forbidden, and no licence that one knows by its name
LONGEST_LICENCE = 34
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
    packages: Annotated[
        bool, typer.Option("--packages", help="Each package in a line, not counts of them.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print a page.")] = False,
) -> None:
    """Show the licences of code, weights, fonts and data that this run is made of.

    Without a params file all published weights are listed, and count. What is declared is shown;
    this is no legal advice. Packages are counted, but for those that limit what one may do.
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
        print(_tables(shown, packages=packages))
    if commercial:
        refuse_commercial(found, accept or [])


def _tables(shown: Sequence[Component], *, packages: bool) -> str:
    blocks = []
    for kind, title in TITLES.items():
        parts = [component for component in shown if component.kind == kind]
        left_out = [part for part in parts if kind == "code" and not packages and _is_plain(part)]
        listed = [part for part in parts if part not in left_out]
        lines = [f"{title} ({len(parts)})", *_table(listed)]
        if left_out:
            lines.append(f"{len(left_out)} more allow commercial use: --packages lists them")
        if parts:
            blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def _table(parts: Sequence[Component]) -> list[str]:
    """Lines of columns as wide as their longest entry; nothing for no part."""
    if not parts:
        return []
    rows = [("name", "licence", "commercial", "")]
    rows += [(part.name, _shortened(part.licence), _verdict(part), part.note) for part in parts]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


def _shortened(licence: str) -> str:
    return licence if len(licence) <= LONGEST_LICENCE else f"{licence[: LONGEST_LICENCE - 3]}..."


def _verdict(part: Component) -> str:
    """Whether commercial use is allowed, in a word or two."""
    is_own = part.licence.startswith("LicenseRef-") and part.commercial == "yes"
    return OWN_TERMS if is_own else part.commercial


def _is_plain(part: Component) -> bool:
    """Whether a package asks for no second look."""
    return _verdict(part) == "yes" and not part.note


def _page(shown: Sequence[Component]) -> str:
    lines = [PAGE_HEAD]
    for kind, title in TITLES.items():
        parts = [component for component in shown if component.kind == kind]
        if parts:
            lines += ["", f"## {title}", "", "| name | licence | commercial use | note |"]
            lines += ["|---|---|---|---|"]
        lines += [
            f"| {part.name} | {part.licence} | {_verdict(part)} | {part.note} |" for part in parts
        ]
    return "\n".join(lines)
