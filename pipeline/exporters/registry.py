"""The formats by name; a format is imported when it is asked for."""

from __future__ import annotations

from importlib import import_module
from typing import NamedTuple

from pipeline.errors import PipelineError, did_you_mean
from pipeline.exporters.items import Exporter


class Format(NamedTuple):
    """A format that results can be exported to.

    Attributes:
        exporter: its `Exporter`, as `module:class` of this room.
        summary: what it is, in a line.
        val_share: share of the images that are for validation, unless an option says otherwise.
    """

    exporter: str
    summary: str
    val_share: float = 0.0

    def load(self) -> type[Exporter]:
        """The class that writes it."""
        module, _, name = self.exporter.partition(":")
        return getattr(import_module(f"pipeline.exporters.{module}"), name)


FORMATS = {
    "coco": Format("coco:Coco", "COCO JSON: masks as RLE, and the same as polygons"),
    "yolo-seg": Format("yolo_seg:YoloSeg", "Ultralytics' segmentation data, ready to train", 0.1),
    "voc": Format("voc:Voc", "PASCAL VOC's palette PNGs of classes and objects"),
    "png16": Format("png16:Png16", "16-bit PNGs of objects and label ids, and one JSON"),
    "labelme": Format("labelme:Labelme", "labelme's JSON beside the images, objects as masks"),
    "label-studio": Format("label_studio:LabelStudio", "Label Studio's tasks with brush masks"),
    "cvat": Format("cvat:Cvat", "CVAT for images 1.1, objects as masks"),
    "datumaro": Format("datumaro:Datumaro", "Datumaro's own JSON"),
    "fiftyone": Format("fiftyone:Fiftyone", "a dataset for FiftyOne, and the script that opens it"),
    "hf": Format("hf:Hf", "Parquet with images and masks, for Hugging Face's `datasets`"),
}


def find_format(name: str) -> Format:
    """The format of a name.

    Raises:
        PipelineError: there is none; the known ones are listed.
    """
    if name not in FORMATS:
        raise PipelineError(
            f"--to: {name!r} is no format; {did_you_mean(name, list(FORMATS))}there are: "
            f"{', '.join(FORMATS)}, onnx"
        )
    return FORMATS[name]
