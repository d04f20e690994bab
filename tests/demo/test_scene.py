"""Drawn scenes: the truth is what the picture shows, and the generator decides alone."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.demo.glyphs import KNOWN_FAMILIES, UNSEEN_FAMILY, glyph_names, load_glyphs
from pipeline.demo.scene import (
    BACKGROUNDS,
    BENCH_BACKGROUNDS,
    Style,
    choose_names,
    draw_scene,
    typical_looks,
)
from pipeline.errors import PipelineError, install_command

CATEGORIES, OTHERS = glyph_names()


@pytest.fixture(scope="module")
def style() -> Style:
    return Style(load_glyphs(KNOWN_FAMILIES), size=48)


def test_fonts_that_are_not_installed_are_named_with_the_fix(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", {}.get)
    with pytest.raises(PipelineError) as caught:
        load_glyphs(("phosphor",))
    assert str(caught.value).endswith(
        f"qtawesome, which is not installed; run: {install_command('demo')}"
    )


def generator(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.mark.parametrize("size", [32, 48, 97])
@pytest.mark.parametrize("count", [0, 1, 2, 3])
def test_objects_stay_inside_an_image_of_the_size_asked_for(
    style: Style, size: int, count: int
) -> None:
    names = CATEGORIES[:count]
    sized = Style(style.glyphs, size)
    for seed in range(10):
        scene = draw_scene(generator(seed), names, sized)
        assert (scene.image.shape, scene.image.dtype) == ((size, size, 3), np.uint8)
        assert (scene.instances.shape, scene.instances.dtype) == ((size, size), np.uint8)
        assert scene.names == names
        assert scene.background in BACKGROUNDS
        assert set(np.unique(scene.instances)) - {0} == set(range(1, count + 1))
        shares = np.bincount(scene.instances.ravel(), minlength=count + 1)[1:] / size**2
        assert (shares > 0.01).all()
        assert shares.sum() < 0.9


def test_an_empty_scene_has_an_empty_truth(style: Style) -> None:
    scene = draw_scene(generator(0), [], style)
    assert scene.names == []
    assert not scene.instances.any()


def test_the_generator_decides_alone(style: Style) -> None:
    names = ["cat", "dog"]
    first = draw_scene(generator(1), names, style)
    draw_scene(generator(5), ["bus"], style)
    again = draw_scene(generator(1), names, style)
    other = draw_scene(generator(2), names, style)
    assert first.image.tobytes() == again.image.tobytes()
    assert first.instances.tobytes() == again.instances.tobytes()
    assert first.image.tobytes() != other.image.tobytes()
    assert first.instances.tobytes() != other.instances.tobytes()


def test_the_picture_changes_where_the_truth_has_an_object(style: Style) -> None:
    """With one generator state, a scene and the empty scene share their background."""
    inside, outside = [], []
    for seed in range(20):
        scene = draw_scene(generator(seed), ["horse"], style)
        empty = draw_scene(generator(seed), [], style)
        change = np.abs(scene.image.astype(float) - empty.image).mean(axis=2)
        mask = scene.instances > 0
        inside.append(change[mask].mean())
        outside.append(change[~mask].mean())
    assert np.mean(inside) > 3 * np.mean(outside)


def test_names_that_repeat_are_objects_of_their_own(style: Style) -> None:
    scene = draw_scene(generator(0), ["car", "car", "car"], style)
    assert scene.names == ["car", "car", "car"]
    assert set(np.unique(scene.instances)) == {0, 1, 2, 3}


def test_backgrounds_are_those_of_the_style(style: Style) -> None:
    bench = Style(style.glyphs, size=32, backgrounds=BENCH_BACKGROUNDS)
    drawn = {draw_scene(generator(seed), [], bench).background for seed in range(80)}
    assert drawn == set(BENCH_BACKGROUNDS)
    assert set(BENCH_BACKGROUNDS) > set(BACKGROUNDS)


def test_the_unseen_family_is_drawn_nowhere_else() -> None:
    def shapes(families: tuple[str, ...]) -> set[bytes]:
        return {
            glyph.silhouette.tobytes()
            for glyphs in load_glyphs(families).values()
            for glyph in glyphs
        }

    assert UNSEEN_FAMILY not in KNOWN_FAMILIES
    assert shapes((UNSEEN_FAMILY,)).isdisjoint(shapes(KNOWN_FAMILIES))
    assert set(CATEGORIES) <= set(load_glyphs((UNSEEN_FAMILY,)))
    assert set(CATEGORIES) | set(OTHERS) <= set(load_glyphs(KNOWN_FAMILIES))


def test_every_category_has_a_look_of_its_own() -> None:
    looks = typical_looks()
    assert set(looks) == set(CATEGORIES) | set(OTHERS)
    assert len({looks[name] for name in CATEGORIES}) == len(CATEGORIES)


@pytest.mark.parametrize("count", [0, 1, 3])
def test_names_are_drawn_as_often_as_asked(count: int) -> None:
    rng = generator(0)
    drawn = [choose_names(rng, count, CATEGORIES, OTHERS, 0.75) for _ in range(400)]
    assert {len(names) for names in drawn} == {count}
    assert {name for names in drawn for name in names} <= set(CATEGORIES) | set(OTHERS)
    if count == 1:
        share = np.mean([names[0] in CATEGORIES for names in drawn])
        assert abs(share - 0.75) < 0.07


def test_companions_come_together() -> None:
    rng = generator(0)
    drawn = [choose_names(rng, 2, CATEGORIES, OTHERS, 0.75) for _ in range(4000)]
    after_dog = [second for first, second in drawn if first == "dog"]
    assert 0.4 < after_dog.count("sofa") / len(after_dog) < 0.65
    after_plane = [second for first, second in drawn if first == "airplane"]
    assert max(after_plane.count(name) for name in CATEGORIES) < 0.25 * len(after_plane)


def test_an_outlined_object_has_the_same_mask_and_another_surface() -> None:
    plain, outlined = (
        draw_scene(
            np.random.default_rng(4),
            ["bus"],
            Style(load_glyphs(KNOWN_FAMILIES), size=48, outlined=share),
        )
        for share in (1e-9, 1.0)
    )
    np.testing.assert_array_equal(plain.instances, outlined.instances)
    changed = (plain.image != outlined.image).any(axis=2)
    assert changed[plain.instances > 0].mean() > 0.05
