"""Scenes of the drawn world: textured glyphs on procedural backgrounds.

Every object name has a typical look (two hues and a pattern), kept with a given probability each;
shape is the glyph. Everything is drawn from a generator that is passed in.
"""

from __future__ import annotations

import colorsys
import math
from dataclasses import dataclass, field

import numpy as np
from PIL import Image, ImageFilter

from pipeline.demo.glyphs import SIDE, Glyph, blobs, glyph_names

Array = np.ndarray
PATTERNS = ("stripes", "dots", "checks", "gradient")
BACKGROUNDS = ("smooth", "cloudy", "striped", "gradient", "spotted")
BENCH_BACKGROUNDS = (*BACKGROUNDS, "checkered")
COMPANIONS = {
    "person": "motorcycle",
    "motorcycle": "person",
    "dog": "sofa",
    "sofa": "dog",
    "bird": "boat",
    "boat": "bird",
    "car": "bus",
    "bus": "car",
    "horse": "house",
    "house": "horse",
    "sheep": "tree",
    "tree": "sheep",
}
# Share of the objects of the world that are outlined.
OUTLINED = 0.5
# Share of the image side that an object spans, by the number of objects.
EXTENTS = {1: (0.5, 0.92), 2: (0.42, 0.62), 3: (0.34, 0.5)}


@dataclass(frozen=True)
class Look:
    """Surface of an object: two hues in [0, 1) and the name of a pattern."""

    hue: float
    second_hue: float
    pattern: str


@dataclass(frozen=True)
class Scene:
    """A drawn image and its truth.

    Attributes:
        image: (S, S, 3) uint8 RGB.
        instances: (S, S) uint8, 0 background, i + 1 the visible part of object i.
        names: object names, in the order of the ids.
        background: name of the background's kind.
    """

    image: Array
    instances: Array
    names: list[str]
    background: str


@dataclass(frozen=True)
class Style:
    """How scenes are drawn.

    Attributes:
        glyphs: shapes by object name.
        size: image side in pixels.
        typical: probability that an object keeps each part of its typical look.
        typical_share: share of the objects that have a typical look at all; the others are drawn
            with every part at random.
        shapeless: probability that an object is a blob of no name's shape, in its typical look.
        outlined: probability that an object is outlined.
        backgrounds: kinds of background to draw from.
        extents: share of the image side that an object spans, by the number of objects.
        stretch: range of the factor that makes an object higher and as much less wide.
        shear: most that a row of an object is moved against another, over their distance.
    """

    glyphs: dict[str, list[Glyph]]
    size: int = 96
    typical: float = 0.95
    typical_share: float = 1.0
    shapeless: float = 0.0
    outlined: float = 0.0
    backgrounds: tuple[str, ...] = BACKGROUNDS
    extents: dict[int, tuple[float, float]] = field(default_factory=lambda: dict(EXTENTS))
    stretch: tuple[float, float] = (0.85, 1.15)
    shear: float = 0.0


def typical_looks() -> dict[str, Look]:
    """The typical look of every object name: hues spread around the circle, patterns in turn."""
    categories, others = glyph_names()
    looks = {}
    for index, name in enumerate(categories):
        hue = index / len(categories)
        looks[name] = Look(hue, (hue + 0.38) % 1, PATTERNS[index % len(PATTERNS)])
    for index, name in enumerate(others):
        hue = (index + 0.5) / len(others)
        looks[name] = Look(hue, (hue - 0.24) % 1, PATTERNS[(index + 2) % len(PATTERNS)])
    return looks


_LOOKS = typical_looks()


def draw_scene(rng: np.random.Generator, names: list[str], style: Style) -> Scene:
    """Draw objects of the given names on a random background.

    Args:
        rng: the only source of randomness.
        names: at most three object names of `style.glyphs`; may be empty.
        style: see `Style`.
    """
    background = str(rng.choice(style.backgrounds))
    image = _background(rng, background, style.size)
    instances = np.zeros((style.size, style.size), np.uint8)
    for index, centre in enumerate(_centres(rng, len(names), style.size)):
        extent = rng.uniform(*style.extents[len(names)]) * style.size
        is_blob = style.shapeless > 0 and rng.random() < style.shapeless
        glyphs = blobs() if is_blob else style.glyphs[names[index]]
        mask, tone = _place(rng, glyphs, centre, extent, style)
        look = _LOOKS[names[index]] if is_blob else _look(rng, names[index], style)
        surface = _surface(rng, look, style.size)
        line = np.float32(rng.uniform(0.0, 0.12) if rng.random() < 0.5 else rng.uniform(0.88, 1.0))
        surface += (line - surface) * tone[..., None]
        image += (surface - image) * mask[..., None]
        instances[mask > 0.5] = index + 1
    return Scene(_finish(rng, image), instances, names, background)


def choose_names(
    rng: np.random.Generator, count: int, categories: list[str], others: list[str], share: float
) -> list[str]:
    """Draw `count` object names, each a category with probability `share`.

    Half of the time the second object is the usual companion of the first.
    """
    names: list[str] = []
    for _ in range(count):
        companion = COMPANIONS.get(names[-1]) if len(names) == 1 else None
        if companion in (*categories, *others) and rng.random() < 0.5:
            names.append(str(companion))
        else:
            names.append(str(rng.choice(categories if rng.random() < share else others)))
    return names


def _centres(rng: np.random.Generator, count: int, size: int) -> list[tuple[float, float]]:
    """Spread `count` centres on a circle so that objects seldom overlap."""
    if count == 1:
        return [(size * rng.uniform(0.4, 0.6), size * rng.uniform(0.4, 0.6))]
    start = rng.uniform(0, 2 * math.pi)
    radius = size * (0.25 if count == 2 else 0.29)
    angles = [start + 2 * math.pi * index / count for index in range(count)]
    return [
        (
            size / 2 + radius * math.cos(angle) + size * rng.uniform(-0.04, 0.04),
            size / 2 + radius * math.sin(angle) + size * rng.uniform(-0.04, 0.04),
        )
        for angle in angles
    ]


def _place(
    rng: np.random.Generator,
    glyphs: list[Glyph],
    centre: tuple[float, float],
    extent: float,
    style: Style,
) -> tuple[Array, Array]:
    """Warp a random glyph to its place: (S, S) float32 mask and tone in [0, 1]."""
    glyph = glyphs[rng.integers(len(glyphs))]
    angle = math.radians(rng.uniform(-25, 25))
    aspect = math.sqrt(rng.uniform(*style.stretch))
    flip = -1.0 if rng.random() < 0.5 else 1.0
    scale = SIDE / extent
    cos, sin = math.cos(angle) * scale, math.sin(angle) * scale
    a, b = flip * cos * aspect, flip * sin * aspect
    d, e = -sin / aspect, cos / aspect
    if style.shear > 0:
        amount = rng.uniform(-style.shear, style.shear)
        a, b = a + amount * d, b + amount * e
    x, y = centre
    matrix = (a, b, SIDE / 2 - a * x - b * y, d, e, SIDE / 2 - d * x - e * y)
    is_outlined = style.outlined > 0 and rng.random() < style.outlined
    lines = glyph.outlined_tone if is_outlined else glyph.tone
    warped = (
        part.transform(
            (style.size, style.size),
            Image.Transform.AFFINE,
            matrix,
            resample=Image.Resampling.BILINEAR,
        )
        for part in (glyph.silhouette, lines)
    )
    mask, tone = (np.asarray(part, np.float32) / 255 for part in warped)
    return mask, tone * 0.9


def _look(rng: np.random.Generator, name: str, style: Style) -> Look:
    look = _LOOKS[name]
    is_typical = style.typical_share == 1.0 or rng.random() < style.typical_share
    keep = rng.random(3) < (style.typical if is_typical else 0.0)
    return Look(
        look.hue if keep[0] else rng.random(),
        look.second_hue if keep[1] else rng.random(),
        look.pattern if keep[2] else str(rng.choice(PATTERNS)),
    )


def _surface(rng: np.random.Generator, look: Look, size: int) -> Array:
    """(S, S, 3) float32 texture of an object, softly shaded."""
    first, second = (
        _colour(hue + rng.normal(0, 0.012), rng.uniform(0.65, 1), rng.uniform(0.65, 1))
        for hue in (look.hue, look.second_hue)
    )
    weight = _pattern(rng, look.pattern, size)[..., None]
    surface = first * (1 - weight) + second * weight
    shade = 1 - 0.2 * _ramp(rng, size)
    return (surface * shade[..., None]).astype(np.float32)


def _pattern(rng: np.random.Generator, name: str, size: int) -> Array:
    """(S, S) weight of the second colour in [0, 1]."""
    if name == "gradient":
        return _ramp(rng, size)
    u, v = _rotated_grid(rng, size)
    period = rng.uniform(7, 12)
    phases = rng.uniform(0, period, 2)
    across = np.sin((u + phases[0]) * (2 * math.pi / period))
    if name == "stripes":
        return _step(across)
    along = np.sin((v + phases[1]) * (2 * math.pi / period))
    if name == "checks":
        return _step(across * along * 2)
    return _step(across + along - 0.35)


def _background(rng: np.random.Generator, name: str, size: int) -> Array:
    """(S, S, 3) float32 background of muted colours."""
    hue = rng.random()
    saturation, value = rng.uniform(0.05, 0.5), rng.uniform(0.2, 0.95)
    first = _colour(hue, saturation, value)
    second = _colour(
        hue + rng.normal(0, 0.12),
        np.clip(saturation + rng.normal(0, 0.15), 0, 0.55),
        np.clip(value + rng.choice([-1, 1]) * rng.uniform(0.1, 0.3), 0.1, 1),
    )
    weight = _background_weight(rng, name, size)[..., None]
    return (first * (1 - weight) + second * weight).astype(np.float32)


def _background_weight(rng: np.random.Generator, name: str, size: int) -> Array:
    if name == "smooth":
        return np.zeros((size, size), np.float32)
    if name == "gradient":
        return _ramp(rng, size)
    if name in ("cloudy", "spotted"):
        cells = int(rng.integers(3, 8))
        noise = Image.fromarray(rng.random((cells, cells), np.float32))
        field_ = np.asarray(noise.resize((size, size), Image.Resampling.BICUBIC))
        return np.clip(field_, 0, 1) if name == "cloudy" else _step((field_ - 0.5) * 12)
    u, v = _rotated_grid(rng, size)
    period = rng.uniform(14, 32)
    across = np.sin((u + rng.uniform(0, period)) * (2 * math.pi / period))
    if name == "striped":
        return _step(across)
    return _step(across * np.sin((v + rng.uniform(0, period)) * (2 * math.pi / period)) * 2)


def _rotated_grid(rng: np.random.Generator, size: int) -> tuple[Array, Array]:
    angle = rng.uniform(0, math.pi)
    y, x = np.mgrid[:size, :size].astype(np.float32)
    cos, sin = np.float32(math.cos(angle)), np.float32(math.sin(angle))
    return x * cos + y * sin, y * cos - x * sin


def _ramp(rng: np.random.Generator, size: int) -> Array:
    """(S, S) linear ramp in a random direction, in [0, 1]."""
    u, _ = _rotated_grid(rng, size)
    return (u - u.min()) / max(float(u.max() - u.min()), 1e-6)


def _step(values: Array) -> Array:
    """A soft edge at zero."""
    return np.clip(values * 1.5 + 0.5, 0, 1).astype(np.float32)


def _colour(hue: float, saturation: float, value: float) -> Array:
    return np.array(colorsys.hsv_to_rgb(hue % 1, saturation, value), np.float32)


def _finish(rng: np.random.Generator, image: Array) -> Array:
    """Camera effects: gain, offset, noise and, on a third of the images, a slight blur."""
    gain, offset = rng.uniform(0.88, 1.08), rng.uniform(-0.04, 0.04)
    noise = rng.standard_normal(image.shape, np.float32) * np.float32(rng.uniform(0.005, 0.03))
    pixels = np.clip(image * np.float32(gain) + np.float32(offset) + noise, 0, 1)
    drawn = Image.fromarray((pixels * 255).round().astype(np.uint8))
    if rng.random() < 1 / 3:
        drawn = drawn.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 0.7)))
    return np.asarray(drawn)
