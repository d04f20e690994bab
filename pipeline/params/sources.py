"""What params say about a pool of unlabelled images."""

from __future__ import annotations

from typing import Literal

from pipeline.params.base import RelaxedLocation, Section


class SourceParams(Section):
    """One pool of unlabelled images.

    `folder`: a tree of image files below `root`. `webdataset`: tars below `root` that match
    `pattern` (braces allowed). `parquet`: files below `root` that match `pattern`, with a column of
    image bytes. `root` may be a URL that fsspec knows: s3://bucket/folder, gs://bucket/folder.
    """

    format: Literal["folder", "webdataset", "parquet"] = "folder"
    root: RelaxedLocation
    pattern: str = ""
