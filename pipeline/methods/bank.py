"""The region bank with any dense labeller whose features are beside its text."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from pipeline.errors import PipelineError
from pipeline.methods.dense import (
    DENSE_LABELLERS,
    DenseLabeller,
    ObjectLabeller,
    PseudoLabelParams,
    load_dense_labeller,
)
from pipeline.vocabulary.categories import Names

if TYPE_CHECKING:
    from pipeline.engine.runtime import Runtime
    from pipeline.models.bank.regions import RegionEncoder
    from pipeline.params.sections import BankParams


def load_region_encoder(
    params: BankParams,
    labeller_params: PseudoLabelParams,
    names: Names,
    runtime: Runtime,
    *,
    labeller: DenseLabeller | None = None,
) -> RegionEncoder:
    """What cuts images into regions and averages features inside.

    Args:
        params: section `bank`.
        labeller_params: section `pseudo_label`.
        names: what the labeller is loaded with.
        runtime: device, precision and cache.
        labeller: that of these params, where it is loaded already.

    Raises:
        PipelineError: a dense labeller without features, or an encoder that cannot be loaded.
    """
    from pipeline.models.bank.regions import RegionEncoder
    from pipeline.models.clip.patches import load_patch_encoder

    if not DENSE_LABELLERS[labeller_params.method].gives_objects:
        able = ", ".join(name for name, method in DENSE_LABELLERS.items() if method.gives_objects)
        raise PipelineError(
            f"bank: pseudo_label.method {labeller_params.method} gives no features of regions; "
            f"take one of {able}, or set `bank: null`"
        )
    return RegionEncoder(
        cast(ObjectLabeller, labeller or load_dense_labeller(labeller_params, names, runtime)),
        load_patch_encoder(
            params.encoder or labeller_params.encoder, runtime, field="bank.encoder"
        ),
        facet=params.facet,
        clusters=params.clusters,
        min_share=params.min_share,
        runtime=runtime,
    )
