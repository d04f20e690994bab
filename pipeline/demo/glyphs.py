"""Glyphs of icon and emoji fonts as object shapes: a silhouette and the lines drawn on it.

The fonts come with the packages of the extra `demo`: qtawesome (Font Awesome 6, Material Design
Icons 6, Phosphor, Remix) and manimgx-fonts (Noto Emoji). `glyphs.json` lists the glyphs used.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageFont
from scipy import ndimage

from pipeline.errors import PipelineError, install_command

SIDE = 128
UNSEEN_FAMILY = "noto_emoji"
KNOWN_FAMILIES = ("font_awesome", "material_design_icons", "phosphor", "remix")

_FONT_FILES = {
    "font_awesome": ("qtawesome", "fonts/fontawesome6-solid-webfont-*.ttf"),
    "material_design_icons": ("qtawesome", "fonts/materialdesignicons6-webfont-*.ttf"),
    "phosphor": ("qtawesome", "fonts/phosphor-*.ttf"),
    "remix": ("qtawesome", "fonts/remixicon-*.ttf"),
    "noto_emoji": ("manimgx_fonts", "NotoEmoji*.ttf"),
}
_CHARMAP_FILES = {
    "font_awesome": "fonts/fontawesome6-solid-webfont-charmap-*.json",
    "material_design_icons": "fonts/materialdesignicons6-webfont-charmap-*.json",
    "phosphor": "fonts/phosphor-charmap-*.json",
    "remix": "fonts/remixicon-charmap-*.json",
}
_CLOSING_RADIUS = 5
_MINIMUM_PART = 0.02
_OUTLINE_WIDTH = 13
_VARIED_WIDTH = 7
_BLOB_STREAM = 104
_BLOB_SMOOTHNESS = 0.08


@dataclass(frozen=True)
class Glyph:
    """One drawn object.

    Attributes:
        silhouette: (128, 128) uint8 in {0, 255}, the object's true mask.
        tone: (128, 128) uint8 in [0, 255], strength of the lines drawn on the silhouette.
        outlined_tone: the same with a line along the inside of the silhouette's edge.
    """

    silhouette: Image.Image
    tone: Image.Image
    outlined_tone: Image.Image


def glyph_names() -> tuple[list[str], list[str]]:
    """Names of the category objects and of the objects that no category names, in file order."""
    listed = _listed_glyphs()
    return list(listed["categories"]), list(listed["others"])


@cache
def load_glyphs(families: tuple[str, ...]) -> dict[str, list[Glyph]]:
    """Every glyph of `families`, by object name; names without one in these fonts are absent.

    Raises:
        PipelineError: the packages that carry the fonts are not installed.
    """
    listed = _listed_glyphs()
    glyphs: dict[str, list[Glyph]] = {}
    for name, by_family in {**listed["categories"], **listed["others"]}.items():
        found = [
            _rasterise(family, character)
            for family in families
            for character in _characters(family, by_family.get(family, []))
        ]
        if found:
            glyphs[name] = found
    return glyphs


@cache
def load_varied_glyphs(families: tuple[str, ...]) -> dict[str, list[Glyph]]:
    """As `load_glyphs`, each glyph also without its lines, thicker, thinner and outlined."""
    return {
        name: [varied for glyph in glyphs for varied in (glyph, *_variants(glyph))]
        for name, glyphs in load_glyphs(families).items()
    }


@cache
def blobs(count: int = 64) -> list[Glyph]:
    """Shapes of no object: the largest part of smooth noise, always the same ones."""
    nothing = Image.new("L", (SIDE, SIDE))
    found = []
    for number in range(count):
        rng = np.random.default_rng([_BLOB_STREAM, number])
        noise = ndimage.gaussian_filter(rng.standard_normal((SIDE, SIDE)), SIDE * _BLOB_SMOOTHNESS)
        y, x = np.mgrid[-1 : 1 : SIDE * 1j, -1 : 1 : SIDE * 1j]
        shape = noise / noise.std() > 2.5 * (x**2 + y**2) - 1
        labels, _ = ndimage.label(shape)
        largest = labels == np.bincount(labels[shape]).argmax()
        rows, columns = np.nonzero(largest)
        image = Image.fromarray(largest.astype(np.uint8) * 255)
        box = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
        silhouette = _fit_square(image.crop(box)).point(lambda value: 255 * (value > 127))
        found.append(Glyph(silhouette, nothing, nothing))
    return found


def _variants(glyph: Glyph) -> Iterator[Glyph]:
    shape = glyph.silhouette
    nothing = Image.new("L", shape.size)
    yield Glyph(shape, glyph.outlined_tone, glyph.outlined_tone)
    yield Glyph(shape, nothing, glyph.outlined_tone)
    for resized in (ImageFilter.MaxFilter(_VARIED_WIDTH), ImageFilter.MinFilter(_VARIED_WIDTH)):
        changed = shape.filter(resized)
        lines = ImageChops.darker(glyph.tone, changed)
        yield Glyph(changed, lines, lines)


@cache
def _listed_glyphs() -> dict[str, dict[str, dict[str, list[str]]]]:
    return json.loads(Path(__file__).with_name("glyphs.json").read_text(encoding="utf-8"))


def _characters(family: str, names: list[str]) -> list[str]:
    if family == UNSEEN_FAMILY:
        return [chr(int(codepoint, 16)) for codepoint in names]
    charmap = json.loads(_package_file("qtawesome", _CHARMAP_FILES[family]).read_text())
    return [chr(int(charmap[name], 16)) for name in names]


def _package_file(package: str, pattern: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise PipelineError(
            f"the demo's fonts are in the package {package}, which is not installed; "
            f"run: {install_command('demo')}"
        )
    matches = sorted(Path(spec.submodule_search_locations[0]).glob(pattern))
    if not matches:
        raise PipelineError(f"package {package} has no file {pattern}; install the demo extra anew")
    return matches[-1]


@cache
def _font(family: str) -> ImageFont.FreeTypeFont:
    package, pattern = _FONT_FILES[family]
    return ImageFont.truetype(str(_package_file(package, pattern)), size=SIDE)


def _rasterise(family: str, character: str) -> Glyph:
    """Draw a character, centred and scaled to the square; close and fill its ink."""
    font = _font(family)
    left, top, right, bottom = (int(side) for side in font.getbbox(character))
    canvas = Image.new("L", (right - left + 4, bottom - top + 4))
    ImageDraw.Draw(canvas).text((2 - left, 2 - top), character, fill=255, font=font)
    box = canvas.getbbox()
    if box is None:
        raise PipelineError(f"font {family} has no glyph U+{ord(character):X}")
    ink = np.asarray(_fit_square(canvas.crop(box)))
    silhouette = _silhouette(ink > 127)
    tone = ink if (ink > 127).sum() <= silhouette.sum() / 2 else 255 - ink
    tone = np.where(silhouette, tone, 0).astype(np.uint8)
    shape = Image.fromarray(silhouette.astype(np.uint8) * 255)
    outline = ImageChops.subtract(shape, shape.filter(ImageFilter.MinFilter(_OUTLINE_WIDTH)))
    drawn = Image.fromarray(tone)
    return Glyph(shape, drawn, ImageChops.lighter(drawn, outline))


def _fit_square(ink: Image.Image) -> Image.Image:
    inner = SIDE - 8
    scale = inner / max(ink.size)
    width, height = (max(1, round(side * scale)) for side in ink.size)
    square = Image.new("L", (SIDE, SIDE))
    square.paste(
        ink.resize((width, height), Image.Resampling.BILINEAR),
        ((SIDE - width) // 2, (SIDE - height) // 2),
    )
    return square


def _silhouette(ink: np.ndarray) -> np.ndarray:
    offsets = np.arange(-_CLOSING_RADIUS, _CLOSING_RADIUS + 1)
    disk = offsets[:, None] ** 2 + offsets[None] ** 2 <= _CLOSING_RADIUS**2
    padded = np.pad(ink, _CLOSING_RADIUS)
    closed = ndimage.binary_closing(padded, disk)[_CLOSING_RADIUS:-_CLOSING_RADIUS]
    filled = ndimage.binary_fill_holes(closed[:, _CLOSING_RADIUS:-_CLOSING_RADIUS])
    labels, count = ndimage.label(filled)
    sizes = ndimage.sum_labels(filled, labels, range(1, count + 1))
    large = 1 + np.flatnonzero(sizes >= _MINIMUM_PART * filled.sum())
    return np.isin(labels, large)
