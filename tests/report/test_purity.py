"""The table of what is known of each archive without truth."""

from __future__ import annotations

from pipeline.files import read_json, write_json
from pipeline.report.inputs import NO_VALUE
from tests.report.helpers import CATEGORIES, Tree, section, text_of


def test_measures_of_the_stages_are_one_row_a_category(tree: Tree) -> None:
    assert "How pure" not in section(tree.report(), "archives")
    measured = {
        "retrieve": {"similarity": 0.2512, "margin": -0.0321},
        "mask": {"components": 1.75},
        "pseudo_label": {"agreement": 0.4567},
    }
    for number, (stage, values) in enumerate(measured.items()):
        path = tree.reports_dir / "stats" / f"{stage}.json"
        before = read_json(path) if path.is_file() else {"stage": stage}
        of = {CATEGORIES[1]: {"images": 40 - number, **values}}
        write_json(path, {**before, "categories": of})
    text = text_of(section(tree.report(), "archives"))
    assert "dog &amp; &lt;b&gt;&#34;pup&#34;&lt;/b&gt; 40 0.251 -0.032 1.8 45.7" in text
    assert f"bird 0 {NO_VALUE} {NO_VALUE}" in text
