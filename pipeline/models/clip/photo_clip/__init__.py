"""`photo_clip`: an ImageNet classifier and a text tower that was fitted to the rows of its classes.

It stands where CLIP stands, for photos, without a model hub. Not a CLIP: it knows the names of its
table and no others.
"""

from pipeline.models.clip.photo_clip.assemble import (
    CONFIG_PATH,
    NAME,
    find_weights,
    image_trunk,
    package_file,
    with_text_tower,
)

__all__ = [
    "CONFIG_PATH",
    "NAME",
    "find_weights",
    "image_trunk",
    "package_file",
    "with_text_tower",
]
