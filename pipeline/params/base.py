"""What sections of params.yaml are made of: the base class, and types of values."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    Strict,
    model_validator,
)

from pipeline.files import as_location, check_written

RelaxedPath = Annotated[Path, Strict(False), BeforeValidator(check_written)]
# A path or a URL, see `pipeline.files.as_location`.
RelaxedLocation = Annotated[Any, BeforeValidator(as_location), PlainSerializer(str)]
Probability = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[float, Field(gt=0.0)]
NonNegative = Annotated[float, Field(ge=0.0)]
Count = Annotated[int, Field(ge=1)]
NumWorkers = Annotated[int, Field(ge=0)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
# Of options that are off by default: then they are no part of a recipe, nor of a checkpoint.
IF_SET: Any = Field(default=None, exclude_if=lambda value: value is None)
IF_ON: Any = Field(default=False, exclude_if=lambda value: not value)
UNLESS_EMPTY: dict[str, Any] = {"exclude_if": lambda value: not value}
# Names of entries become file names and words of commands (dvc.yaml).
ENTRY_NAME = re.compile(r"^\w[\w.-]*$")
EntryName = Annotated[str, Field(pattern=ENTRY_NAME.pattern)]
Text = Annotated[str, Field(pattern=r"\S")]
Rounding = Literal["down", "half_up"]  # of the sides of a resized image
CLIP_RETRIEVAL_PREFIX = "open_clip:"  # of clip-retrieval's open_clip:ARCHITECTURE/TAG
Templates = Literal["prompts85", "name", "pure"]


class Section(BaseModel):
    """A group of params: frozen, strict, without unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class TaggedFile(Section):
    """The weights file of an open_clip tag, which tells activation and preprocessing."""

    tag: Text
    file: Text

    def __str__(self) -> str:
        return f"{self.tag} ({self.file})"


class EncoderParams(Section):
    """A CLIP model.

    `model` is an open_clip architecture, or `open_clip:ARCHITECTURE/TAG` beside an empty
    `pretrained`, or a model-config JSON file; `pretrained` an open_clip tag,
    `{tag: TAG, file: PATH}` with the file of one, another weights file, or a name of
    `pipeline weights list`.
    """

    model: str = "ViT-B-16-quickgelu"
    pretrained: TaggedFile | str = "openai"

    def published_as(self) -> tuple[str, str]:
        """Architecture and tag, in whichever form they are given; a file without a tag as it is."""
        weights = self.pretrained
        if isinstance(weights, TaggedFile):
            weights = weights.tag
        if not self.model.startswith(CLIP_RETRIEVAL_PREFIX):
            return self.model, weights
        model, _, tag = self.model.removeprefix(CLIP_RETRIEVAL_PREFIX).partition("/")
        return model, tag or weights

    @property
    def tag(self) -> str:
        """`ViT-B-16-quickgelu/openai`; of local files the names without folders."""
        return "/".join(Path(part).name for part in self.published_as() if part)


class CategoryParams(Section):
    """A category that is asked for in other words than its name; labels and reports have the name.

    All `texts` mean it, and the name itself only if it is one of them.
    """

    name: Text
    texts: Annotated[list[Text], Field(min_length=1)]


class PamrParams(Section):
    """Refinement by colour in `steps`, among eight neighbours at each distance of `dilations`."""

    dilations: Annotated[list[Count], Field(min_length=1)] = [8, 16]
    steps: Count = 10


class CropNamesParams(Section):
    """What CLIP says of a region's crop has a share of `weight` in its name, its pixels the rest.

    A crop is a square around the region, wider on every side by `margin` of the region's longer
    side. With a `student_weight`, what the trained network itself says of the crop has that share
    of the name as well.
    """

    weight: Probability = 0.5
    student_weight: Annotated[Probability, Field(**UNLESS_EMPTY)] = 0.0
    margin: NonNegative = 0.0

    @model_validator(mode="after")
    def _shares_are_of_one(self) -> Self:
        if self.weight + self.student_weight > 1:
            raise ValueError(
                f"student_weight: {self.student_weight} and weight: {self.weight} are more than 1 "
                "together; they are shares of a name"
            )
        return self


class PredictionParams(Section):
    """How the network's output becomes a prediction.

    `threshold` is the probability above which a pixel belongs to an object, `temperature` the
    factor of the cosine in an object's category score, `suppression` the non-maximum suppression
    among the objects of a category. `score_resolution` `token` labels and scores objects on the
    token grid, as the published code does; `pixel` over their final masks. `resize_to` brings the
    short side of an image to this many pixels before the network, `max_side` bounds its long side;
    predictions return to the original size. `whole_patches` resizes an image to whole patches,
    where the published code drops the rest at the right and bottom and stretches the prediction.
    `upsampling` `direct` brings scores of patches to the size of the image at once; `published`,
    for dense labels, to that of the network's input first, as DenseCLIP's code does.
    `region_majority` gives a connected region of foreground the category that more than half of its
    pixels have, if there is one: for encoders that outline better than they name.
    `labeller_objects` says what an object of a dense labeller is: all pixels of a category
    (`classes`), or each connected part of them (`components`). `flip` averages what a network says
    of an image with what it says of its mirror image; a proposal is that of the image as it is.
    `pamr` refines a network's probabilities and proposals by colour, at the size of its input.
    `joint_foreground` calls a pixel background where a network thinks that likelier than all
    categories together, not than the best of them: names that are alike lose no object.
    `crop_names` names its regions and proposals by their pixels and by their crops, as the encoder
    sees them that training began with. None of the four is in the papers' evaluation; a dense
    labeller has a `pamr` of its own and knows nothing of the other three.

    Of what is found, a part can be left out (docs/categories.md). Objects whose score is below
    `min_score` are, and those of a category in `min_scores` below that instead. `others` are names
    that compete with the categories, but whose pixels become background and whose objects go;
    where no pixel may be background, they have no part.
    """

    threshold: Probability = 0.5
    min_score: Probability | None = IF_SET
    min_scores: Annotated[dict[Text, Probability], Field(**UNLESS_EMPTY)] = {}
    others: Annotated[list[Text], Field(**UNLESS_EMPTY)] = []
    suppression: Literal["none", "hard", "linear", "gaussian"] = "hard"
    temperature: Positive = 5.0
    score_resolution: Literal["token", "pixel"] = "token"
    resize_to: Count | None = None
    max_side: Count | None = None
    whole_patches: bool = False
    upsampling: Literal["direct", "published"] = "direct"
    region_majority: bool = False
    labeller_objects: Literal["classes", "components"] = "classes"
    flip: bool = IF_ON
    joint_foreground: bool = IF_ON
    pamr: PamrParams | None = IF_SET
    crop_names: CropNamesParams | None = IF_SET


class PredictionSettings(PredictionParams):
    """The same, and what a benchmark asks for.

    Without `background` no pixel may be background: the best category has it. Without `instances`
    no objects are looked for. `rounding` is that of the sides of a resized image.
    """

    background: bool = True
    instances: bool = True

    def through(self, size: Sequence[int]) -> list[Sequence[int]]:
        """Sizes (H, W) that scores are resized to on their way to the image's, see `upsampling`.

        `size` is that of the network's input.
        """
        return [size] if self.upsampling == "published" else []

    rounding: Rounding = "down"

    @classmethod
    def of(cls, params: PredictionParams, **others: Any) -> PredictionSettings:
        """The settings that some params hold, and others."""
        shared = params.model_dump(include=set(PredictionParams.model_fields))
        return cls(**{**shared, **others})
