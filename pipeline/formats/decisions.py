"""What a person has said of archive images, and what stages make of it: one rule for all of them.

What was corrected stands, whatever was thought of its labels and whatever its archive. Of the rest,
a sample whose labels were rejected is left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from pipeline.files import digest
from pipeline.formats.corrections import Corrections, fingerprint
from pipeline.formats.review import LABEL_VERDICTS, LabelReview, Review, read_review
from pipeline.formats.shards import SampleStore


@dataclass(frozen=True)
class Decisions:
    """All that was said; nothing by default.

    Attributes:
        corrections: masks that were corrected, by the SHA-256 of the image's file.
        review: verdicts on labels.
    """

    corrections: Corrections = field(default_factory=Corrections)
    review: Review = field(default_factory=dict)

    @classmethod
    def read(cls, corrections_dir: Path | None, review_path: Path | None) -> Self:
        """Those of a folder and of a file (`pipeline.formats.review`); None, or neither: none.

        Raises:
            PipelineError: a correction is damaged, or a line of the file is malformed.
        """
        review = read_review(review_path, LABEL_VERDICTS) if review_path else {}
        return cls(Corrections(corrections_dir), review)

    def of_samples(self, store: SampleStore, categories: Sequence[str]) -> SampleDecisions:
        """What they say of some samples.

        Args:
            store: the samples, with the member `json`.
            categories: names by label id, from 1.
        """
        return SampleDecisions(self, store, categories)


NOTHING_DECIDED = Decisions()


class SampleDecisions:
    """What was said of the samples of mask shards.

    The arguments are those of `Decisions.of_samples`, after the decisions.

    Attributes:
        corrected: index of a sample -> correction of its image; an image may have several samples.
        rejected: indices of the samples whose labels were rejected.
        num_corrected: corrected images among the samples.
        warnings: verdicts on what is no sample.
        fingerprint: of all that changes what the samples are; empty where nothing does.
    """

    def __init__(self, decisions: Decisions, store: SampleStore, categories: Sequence[str]) -> None:
        review = LabelReview(decisions.review, store.keys, categories)
        self.corrected = decisions.corrections.of_samples(store)
        self.rejected = review.rejected
        self.num_corrected = len({it.sha256 for it in self.corrected.values()})
        self.warnings = review.warnings
        self.fingerprint: list[str] = []
        if self.corrected:
            self.fingerprint.append(fingerprint(self.corrected.values()))
        if self.rejected:
            self.fingerprint.append(digest(sorted(self.rejected)))
        self._review_counts = review.counts
        self._num_corrections = len(decisions.corrections)

    @property
    def left_out(self) -> set[int]:
        """Indices of the samples that are neither trained on nor compared with."""
        return self.rejected - self.corrected.keys()

    @property
    def counts(self) -> dict[str, int]:
        """What stages count of them; nothing where nothing was said."""
        if not self._num_corrections:
            return self._review_counts
        return {
            **self._review_counts,
            "corrected": self.num_corrected,
            "unused_corrections": self._num_corrections - self.num_corrected,
        }
