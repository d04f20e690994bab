"""`pipeline demo pretrain`: both tiny networks and their model card, from nothing but a seed."""

from __future__ import annotations

from pathlib import Path

from pipeline.demo.pretrain_clip import PHASES, Phase, pretrain_clip
from pipeline.demo.pretrain_selfmask import Schedule, pretrain_selfmask
from pipeline.engine.runtime import Runtime
from pipeline.files import read_json, write_bytes
from pipeline.models.clip import load_clip
from pipeline.params.base import EncoderParams

CARD = """# The demo's two tiny networks

Made by `pipeline demo pretrain --seed {seed}` on {device}, from images drawn by
`pipeline/demo/scene.py`; no photo, no label and no image of the demo's benchmark was seen.

| network | file | time | measured on fresh images |
|---|---|---|---|
| tiny CLIP (ViT, patch 8, width 128, 3 layers, convolutional stem) | `tiny_clip.safetensors` | \
{clip[seconds]} s | zero-shot accuracy over 16 categories (chance 6.25 %): known glyph families \
{clip[known]:.1f} %, half of them outlined as in the world {clip[world]:.1f} %, unseen family \
{clip[unseen]:.1f} %; every look at random, so by shape alone, {clip[random_look]:.1f} % and \
{clip[random_look_unseen]:.1f} % of the unseen family; DenseCLIP alone \
{clip[denseclip_miou]:.1f} mIoU |
| tiny SelfMask (ViT, patch 4, width 64, 3 layers) | `tiny_selfmask.safetensors` | \
{mask[seconds]} s | IoU with the union of the objects: network {mask[network]:.1f} %, the votes \
it learned from {mask[votes]:.1f} %, votes of an untrained ViT (contrast alone) \
{mask[untrained_votes]:.1f} % |

They know this drawn world and nothing else. A category is known by its shape and by its typical
colours and pattern; saliency is mostly contrast. They stand where CLIP and SelfMask stand, so that
the whole pipeline runs anywhere in minutes; for photos use the real ones. `accuracy.json` has the
tiny CLIP's figures.

Licence: as the project. The glyphs were rasterised from fonts under the OFL 1.1 (Font Awesome 6
Free, Noto Emoji), Apache 2.0 (Material Design Icons, Remix Icon 2) and MIT (Phosphor).
"""


def pretrain(
    out_dir: Path,
    work_dir: Path,
    *,
    runtime: Runtime,
    phases: tuple[Phase, ...] = PHASES,
    probe_images: int = 960,
    schedule: Schedule | None = None,
) -> None:
    """Pre-train tiny CLIP, then tiny SelfMask on its features, and write README.md beside them.

    Args:
        out_dir: folder of weights, configurations and model card.
        work_dir: folder of the states from which a killed run continues.
        runtime: device and seed.
        phases: legs of the CLIP's training.
        probe_images: fresh images that its accuracy is measured on.
        schedule: of the SelfMask's training.
    """
    work_dir.mkdir(parents=True, exist_ok=True)
    weights, config = out_dir / "tiny_clip.safetensors", out_dir / "tiny_clip.json"
    if not (work_dir / "clip_card.json").is_file():
        pretrain_clip(
            out_dir,
            work_dir,
            seed=runtime.seed,
            device=runtime.device,
            phases=phases,
            probe_images=probe_images,
        )
    encoder = load_clip(EncoderParams(model=str(config), pretrained=str(weights)), runtime.device)
    if not (work_dir / "selfmask_card.json").is_file():
        pretrain_selfmask(
            out_dir,
            work_dir,
            encoder,
            seed=runtime.seed,
            device=runtime.device,
            schedule=schedule,
        )
    card = CARD.format(
        seed=runtime.seed,
        device=runtime.device.type.upper(),
        clip=read_json(work_dir / "clip_card.json"),
        mask=read_json(work_dir / "selfmask_card.json"),
    )
    write_bytes(out_dir / "README.md", card.encode())
