"""Category lists: the shipped sets and the check that every list passes."""

from __future__ import annotations

import csv
import difflib
import html
import io
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ftfy import fix_text

from pipeline.errors import PipelineError, did_you_mean, listing
from pipeline.formats.labels import MAX_CATEGORIES

CATEGORY_SETS_DIR = Path(__file__).parent / "category_sets"


def category_set_names() -> list[str]:
    """Names of the shipped category sets, sorted."""
    return sorted(path.stem for path in CATEGORY_SETS_DIR.glob("*.txt"))


def load_category_set(
    categories: str | Sequence[str],
    *,
    background: Sequence[str] = ("background",),
    field: str = "categories",
) -> list[str]:
    """Category names in the order of their label ids (the first has label id 1).

    Args:
        categories: the name of a shipped set, or the names themselves.
        background: names that stand for label id 0 and so cannot be categories.
        field: where the names come from, for the messages.

    Returns:
        The names without surrounding blanks.

    Raises:
        PipelineError: unknown set; a list that is empty, or too long for a label map; an empty
            name; two that are one, see `plain_name`; a category that is also a background name.
    """
    if isinstance(categories, str):
        return _read_shipped(categories, field)
    names = [name.strip() for name in categories]
    if not names:
        raise PipelineError(
            f"{field}: the list is empty; name at least one category, or one of the sets "
            f"{', '.join(category_set_names())}"
        )
    if len(names) > MAX_CATEGORIES:
        raise PipelineError(
            f"{field}: {len(names)} names; a label map holds at most {MAX_CATEGORIES}, so leave "
            "some out"
        )
    first_use: dict[str, int] = {}
    taken = {plain_name(name) for name in ("background", *background)}
    for label_id, name in enumerate(names, start=1):
        plain = plain_name(name)
        if not plain:
            raise PipelineError(f"{field}: name {label_id} of {len(names)} is empty; remove it")
        if plain in taken:
            raise PipelineError(
                f"{field}: {name!r} is the background (label id 0) already; remove it"
            )
        first = first_use.setdefault(plain, label_id)
        if first != label_id:
            other, twice = names[first - 1], f"is listed twice (names {first} and {label_id})"
            same = f"and {other!r} are the same to the encoder"
            fault = twice if other.lower() == name.lower() else same
            raise PipelineError(f"{field}: {name!r} {fault}; remove one")
    return names


def check_texts(
    categories: Sequence[str],
    texts: Mapping[str, Sequence[str]],
    *,
    background: Sequence[str] = ("background",),
    field: str = "categories",
) -> None:
    """Refuse texts of which an encoder could not tell two categories apart.

    Args:
        categories: names as `load_category_set` gives them.
        texts: see `Names`.
        background: names of label id 0.
        field: where they come from, for the messages.

    Raises:
        PipelineError: as of names; see `load_category_set`.
    """
    if texts:
        load_category_set(
            all_texts(categories, texts), background=background, field=f"{field}: texts"
        )


def all_texts(categories: Sequence[str], texts: Mapping[str, Sequence[str]]) -> list[str]:
    """The texts of all categories in their order, of one without any its name; see `Names`."""
    return [text for name in categories for text in texts.get(name, [name])]


def texts_for(
    categories: Sequence[str], texts: Mapping[str, Sequence[str]]
) -> dict[str, Sequence[str]]:
    """Those of the texts that some names have, however these are written."""
    known = {plain_name(name): words for name, words in texts.items()}
    return {name: known[plain] for name in categories if (plain := plain_name(name)) in known}


def split_names(text: str, field: str) -> list[str]:
    """Names between commas, quoted as in CSV.

    Raises:
        PipelineError: a quote that is not closed.
    """
    try:
        rows = list(csv.reader([text], skipinitialspace=True, strict=True))
    except csv.Error as error:
        raise PipelineError(
            f"{field}: {text}: not names between commas ({error}); a name with a comma or a "
            'quote is written as in CSV: "hammer, claw",saw'
        ) from None
    return rows[0] if rows else []


def join_names(names: Sequence[str]) -> str:
    """Names between commas as `split_names` reads them: `cat, red car, "hammer, claw"`."""
    rows = io.StringIO()
    csv.writer(rows, lineterminator="\n").writerows([name] for name in names)
    return ", ".join(rows.getvalue().splitlines())


def plain_name(name: str) -> str:
    """A name as the tokenizers of CLIPs clean it, in lower case.

    Names of one plain form are the same to an encoder; `check_distinct` of `pipeline.models.clip`
    finds those of several forms that are.
    """
    return " ".join(html.unescape(html.unescape(fix_text(name))).split()).lower()


def unseen_label_ids(unseen: Collection[str], categories: Sequence[str]) -> list[int]:
    """Label ids of the categories that training is not to see the truth of, ascending.

    Raises:
        PipelineError: a name that is no category; the ones there are are listed.
    """
    label_ids = {plain_name(name): label_id for label_id, name in enumerate(categories, start=1)}
    for name in unseen:
        if plain_name(name) not in label_ids:
            raise PipelineError(
                f"train.unseen: {name!r} is not among the categories; "
                f"{did_you_mean(name, categories)}they are: {listing(list(categories))}"
            )
    return sorted({label_ids[plain_name(name)] for name in unseen})


def _read_shipped(name: str, field: str) -> list[str]:
    known = category_set_names()
    if name not in known:
        close = difflib.get_close_matches(name.lower(), known, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"known sets: {', '.join(known)}"
        raise PipelineError(
            f"{field}: unknown category set {name!r}; {hint} "
            f"(a single category is written as a list: [{name}])"
        )
    return (CATEGORY_SETS_DIR / f"{name}.txt").read_text(encoding="utf-8").splitlines()


def unasked_names(background: Sequence[str], categories: Sequence[str]) -> list[str]:
    """The background's names without those that are asked for; "background", if none were left."""
    asked = {plain_name(name) for name in categories}
    return [name for name in background if plain_name(name) not in asked] or ["background"]


@dataclass(frozen=True)
class Names:
    """What a labeller tells apart.

    Attributes:
        categories: K names by label id from 1.
        background: names that label id 0 stands for.
        texts: what stands for a category in prompts, of those that have other words than their
            name.
    """

    categories: Sequence[str]
    background: Sequence[str] = ("background",)
    texts: Mapping[str, Sequence[str]] = field(default_factory=dict)
