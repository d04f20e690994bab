"""COCO's own integers for the categories of the shipped set `coco`.

Source: `categories` of COCO's instances_val2017.json. Of the numbers 1 to 90 ten belong to
categories that were named but never annotated.
"""

from __future__ import annotations

NEVER_ANNOTATED = (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)

# Label id 1..80 -> COCO id 1..90.
COCO_IDS = dict(enumerate((i for i in range(1, 91) if i not in NEVER_ANNOTATED), start=1))
