"""The page's section on DenseCLIP+: table, words, curves, pictures, and what may be missing."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from pipeline.errors import PipelineError
from pipeline.files import write_json
from pipeline.report.plus import MAX_SHARES
from tests.report.helpers import EVIL, Tree, checked, section, text_of

SCORES = {"miou": 10.04, "pixel_acc": 30.0, "mean_acc": 20.0, "n_images": 60}
SPLIT = {"miou_seen": 12.0, "miou_unseen": 6.0, "hiou": 8.0}
TRAIN = (
    "{encoder: {model: RN50-quickgelu, pretrained: openai}, iterations: 60, guided_iterations: 20, "
    "backbone: 'timm:resnet18', backbone_weights: null, head: lraspp"
)
BENCH = "bench: {format: voc, root: voc}"


def write_entry(tree: Tree, name: str, titles: tuple[str, ...], *, num_shares: int = 2) -> Path:
    """Scores, curves and overlays of an entry, whose mIoU rises by ten from title to title."""
    folder = tree.reports_dir / "plus" / name
    scores = {
        title: SCORES | (SPLIT if "self_trained" in titles else {}) | {"miou": 10.04 + 10 * place}
        for place, title in enumerate(titles)
    }
    write_json(folder / "scores.json", {"teacher_miou": 10.04, **scores})
    for curve in ("loss", "agreement", "entropy", "learning_rate"):
        write_curve(folder, curve, 0.5)
    for number in range(num_shares):
        write_curve(folder, f"share_thing_{number}", number / 100)
    for title in titles:
        write_overlays(folder / "overlays" / title, range(5))
    return folder


def write_curve(folder: Path, name: str, value: float) -> None:
    path = folder / f"live/plots/metrics/train/{name}.tsv"
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = "".join(f"{step}\t{value}\n" for step in range(10, 61, 10))
    path.write_text(f"step\t{name}\n{rows}")


def write_overlays(folder: Path, numbers: range) -> None:
    folder.mkdir(parents=True)
    index: list[dict[str, Any]] = []
    for number in numbers:
        Image.new("RGB", (60, 40), (number, 9, 9)).save(folder / f"{number}.png")
        entry = {"file": f"{number}.png", "image_id": f"im-{number}", "miou": 10.0 * number}
        index.append(entry | {"kind": "spread"})
    index[0]["miou"] = None
    write_json(folder / "index.json", index)


def name_entries(tree: Tree, **entries: str) -> None:
    lines = "".join(f"  {name}: {{train: {train}}}, {BENCH}}}\n" for name, train in entries.items())
    tree.params_path.write_text(f"{tree.params_path.read_text()}plus:\n{lines}")


@pytest.fixture
def plus(tree: Tree) -> Tree:
    write_entry(tree, "zero", ("teacher", "guided", "self_trained"))
    write_entry(tree, "free", ("teacher", "guided"), num_shares=MAX_SHARES + 3)
    write_entry(tree, "old", ("teacher", "guided"))
    data = "data: {format: voc, root: far/away/VOC2012, split: train}, labels: far/away/VOC2012"
    zero = f"{TRAIN}, {data}, setting: zero_shot, unseen: [sofa, '{EVIL.replace(chr(39), '')}']"
    name_entries(tree, zero=f"{zero}, self_training: 'on'", free=TRAIN)
    return tree


def articles(page: str) -> list[str]:
    return section(page, "plus").split('<article class="plus">')[1:]


def test_an_entry_has_its_scores_beside_the_teachers(plus: Tree) -> None:
    page = plus.report()
    checked(page)
    zero, free = articles(page)  # in the order of the params, without those that they do not name
    assert text_of(zero.split("</table>")[0].split("<table>")[1]).strip() == (
        "Network mIoU Seen mIoU Unseen mIoU hIoU Pixel acc. Mean acc. Images "
        "Teacher, DenseCLIP alone 10.0 12.0 6.0 8.0 30.0 20.0 60 "
        "Guided 20.0 12.0 6.0 8.0 30.0 20.0 60 "
        "Self-trained 30.0 12.0 6.0 8.0 30.0 20.0 60"
    )
    assert "Self-trained" not in free
    assert "hIoU" not in free
    assert "hIoU is the harmonic mean" in page
    assert '<a href="#plus">' in page


def test_words_say_what_it_is_trained_on(plus: Tree) -> None:
    zero, free = (text_of(article) for article in articles(plus.report()))
    assert (
        "zero shot on VOC2012, train; network timm:resnet18, lraspp; teacher DenseCLIP, "
        "RN50-quickgelu / openai, online; 60 iterations, from 20 on self-trained; unseen: sofa, "
        "&lt;script&gt;"
    ) in zero
    assert "annotation free on the archives;" in free
    assert "60 iterations." in free


def test_curves_of_drift_have_the_switch_and_the_largest_shares(plus: Tree) -> None:
    zero, free = articles(plus.report())
    assert re.findall(r"<h3>(.*?)</h3>", zero)[1:] == [
        *("loss", "agreement", "entropy", "share thing 1", "share thing 0")
    ]
    assert zero.count('class="switch" x1="122.8"') == 5  # step 20 of 10 to 60
    assert "switch" not in free
    assert len(re.findall(r"<h3>share ", free)) == MAX_SHARES
    assert "Shares of 3 more categories stay at or below 2.0 %." in free


def test_the_same_images_stand_abreast(plus: Tree) -> None:
    zero, _ = articles(plus.report())
    rows = [text_of(row) for row in zero.split('<div class="abreast">')[1:]]
    assert len(rows) == 3
    for row, number in zip(rows, (3, 2, 1), strict=True):
        titles = ("Teacher, DenseCLIP alone", "Guided", "Self-trained")
        shown = [f"{title}, im-{number} {number}0.0 mIoU" for title in titles]
        assert row.strip().startswith(" ".join(shown))


@pytest.mark.parametrize("missing", ["live", "overlays", "overlays/guided"])
def test_curves_and_pictures_may_be_missing(plus: Tree, missing: str) -> None:
    shutil.rmtree(plus.reports_dir / "plus/zero" / missing)
    page = plus.report()
    checked(page)
    zero, _ = articles(page)
    assert ("abreast" in zero) == (missing == "live")
    assert ("share" in zero) == (missing != "live")


def test_images_that_were_not_drawn_for_all_are_left_out(plus: Tree) -> None:
    folder = plus.reports_dir / "plus/zero/overlays/guided"
    shutil.rmtree(folder)
    write_overlays(folder, range(3, 9))
    zero, _ = articles(plus.report())
    assert set(re.findall(r"im-\d", text_of(zero))) == {"im-3", "im-4"}


def test_curves_without_a_value_are_left_out(plus: Tree) -> None:
    for name in ("agreement", "share_thing_0"):
        write_curve(plus.reports_dir / "plus/zero", name, float("nan"))
    zero, _ = articles(plus.report())
    assert re.findall(r"<h3>(.*?)</h3>", zero)[1:] == ["loss", "entropy", "share thing 1"]


def test_what_has_not_run_is_said(plus: Tree) -> None:
    (plus.reports_dir / "plus/free/scores.json").unlink()
    page = plus.report()
    assert len(articles(page)) == 1
    assert "free: not run." in section(page, "plus")


def test_without_params_all_entries_are_shown(plus: Tree) -> None:
    plus.params_path.unlink()
    page = plus.report()
    checked(page)
    assert [re.findall("<h3>(.*?)</h3>", it)[0] for it in articles(page)] == ["free", "old", "zero"]
    assert "teacher DenseCLIP," not in page


def test_no_entry_no_section(tree: Tree) -> None:
    page = tree.report()
    assert "DenseCLIP+" not in page.split('<section id="ablations">')[0]
    write_entry(tree, "old", ("teacher", "guided"))
    assert tree.report() == page


def test_entries_alone_make_a_page(tmp_path: Path) -> None:
    tree = Tree(tmp_path)
    write_entry(tree, "free", ("teacher", "guided"))
    assert len(articles(tree.report())) == 1


@pytest.mark.parametrize("content", [{}, {"teacher": 5}, []])
def test_damaged_scores_name_the_file(plus: Tree, content: Any) -> None:
    write_json(plus.reports_dir / "plus/zero/scores.json", content)
    with pytest.raises(PipelineError, match=r"plus/zero/scores\.json: expected"):
        plus.report()
