"""What declared licences say of commercial use."""

from __future__ import annotations

from email.message import Message

import pytest

from pipeline.workspace.terms import commercial_use, is_copyleft, package_licence

APPLE = "LicenseRef-apple-amlr"


@pytest.mark.parametrize(
    ("licence", "verdict"),
    [
        ("MIT", "yes"),
        ("BSD-3-Clause AND 0BSD AND MIT AND Zlib AND CC0-1.0", "yes"),
        ("GPL-2.0-only WITH GCC-exception-2.0", "yes"),
        ("MPL-2.0 AND (Apache-2.0 OR MIT)", "yes"),
        (APPLE, "no"),
        ("CC-BY-NC-SA-4.0", "no"),
        (f"MIT AND {APPLE}", "no"),
        (f"MIT OR {APPLE}", "yes"),
        (f"{APPLE} AND (MIT OR Apache-2.0)", "no"),
        (f"({APPLE} OR MIT) AND (MIT OR (CC-BY-NC-4.0 AND ISC))", "yes"),
        ("unknown", "unknown"),
        ("Custom", "unknown"),
        ("Custom AND MIT", "unknown"),
        ("Custom AND CC-BY-NC-4.0", "no"),
        ("Custom OR MIT", "yes"),
        ("", "unknown"),
    ],
)
def test_the_best_alternative_counts_and_its_worst_part(licence: str, verdict: str) -> None:
    assert commercial_use(licence) == verdict


@pytest.mark.parametrize(
    ("licence", "binds"),
    [
        ("MIT", False),
        ("GPL-3.0-or-later", True),
        ("Apache-2.0 OR GPL-2.0-or-later", False),
        ("GPL-2.0-only OR EPL-1.0", True),
        ("MPL-2.0 AND (Apache-2.0 OR MIT)", True),
    ],
)
def test_copyleft_binds_unless_there_is_another_choice(licence: str, binds: bool) -> None:
    assert is_copyleft(licence) == binds


@pytest.mark.parametrize(
    ("fields", "licence"),
    [
        ([("License-Expression", "Apache-2.0 OR BSD-3-Clause")], "Apache-2.0 OR BSD-3-Clause"),
        ([("License", "Apache 2.0")], "Apache-2.0"),
        ([("Classifier", "License :: OSI Approved :: MIT License")], "MIT"),
        # The more exact of two, and a name that says something rather than one that does not.
        (
            [("License", "BSD-3-Clause"), ("Classifier", "License :: OSI Approved :: BSD License")],
            "BSD-3-Clause",
        ),
        (
            [("License", "Dual License"), ("Classifier", "License :: OSI Approved :: BSD License")],
            "BSD",
        ),
        ([("License", "Copyright (c) 2001\nAll rights reserved")], "unknown"),
        ([("License", "My own terms")], "My own terms"),
        ([("Classifier", "Topic :: Multimedia")], "unknown"),
        ([("License", "UNKNOWN")], "unknown"),
        ([], "unknown"),
    ],
)
def test_a_package_says_it_in_one_of_three_places(
    fields: list[tuple[str, str]], licence: str
) -> None:
    metadata = Message()
    for name, value in fields:
        metadata[name] = value
    assert package_licence("some-package", metadata) == licence
