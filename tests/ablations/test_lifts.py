"""Lifts over a variant, on two benchmarks, with several seeds and what they cost."""

from __future__ import annotations

import contextlib
import io
import shutil
import sys
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from pipeline.ablations.costs import Notebook, read_lock, stages_of
from pipeline.ablations.definitions import read_ablation
from pipeline.ablations.results import Spread, read_result
from pipeline.ablations.run import run
from pipeline.cli import main
from pipeline.files import read_json, write_json
from tests.ablations.dvc_project import call, finished_project

DVC_YAML = """\
stages:
  embed:
    cmd: python stage.py embed
    deps: [stage.py]
    outs: [data/embeddings/photos, reports/stats/embed-photos.json]
  train:
    cmd: python stage.py train
    deps: [stage.py, data/embeddings]
    params: [seed, train]
    outs: [model.txt, reports/stats/train.json]
  label:
    cmd: python stage.py label
    deps: [stage.py, data/embeddings]
    outs: [labels.txt, reports/stats/label.json]
  score:
    foreach: ${benches}
    do:
      cmd: python stage.py score ${key}
      deps: [stage.py, model.txt]
      params: ["benches.${key}"]
      outs: ["reports/stats/score-${key}.json"]
      metrics:
        - reports/metrics/${key}.json:
            cache: false
"""
PARAMS_YAML = """\
seed: 3
categories: [cat]
index: {photos: {root: photos}}
train: {iterations: 50}
benches:
  second: {format: voc, root: voc, categories: [cat]}
  first: {format: voc, root: voc, categories: [cat], development: true}
"""
DEFINITION = """\
description: Longer training
metrics: {miou: mIoU, ap50: AP50}
seeds: 3
lift_over: plain
variants:
  - {label: plain}
  - {label: "4,000 iterations", params: {train.iterations: 4000}}
carries_over: All.
"""
# Seconds: 7 of `embed`, the iterations of `train`, 1 of `score`; what ran is in a log.
STAGE_PY = """\
import json, os, sys
from pathlib import Path
from ruamel.yaml import YAML
name, key = sys.argv[1], (sys.argv + ["photos"])[2]
params = YAML(typ="safe", pure=True).load(Path("params.yaml"))
iterations, seed = params["train"]["iterations"], params["seed"]
cache = os.environ.get("PIPELINE_CACHE", "")
with open("runs.log", "a") as log:
    print(name, iterations, seed, cache, (Path(cache) / "weights").exists(), file=log)
if (iterations, seed) == (4000, 5) and Path("broken").exists():
    sys.exit("out of luck")
for folder in ("reports/stats", "reports/times", "reports/metrics", "data/embeddings"):
    Path(folder).mkdir(parents=True, exist_ok=True)
stats = {"embed": "embed-photos", "score": f"score-{key}"}.get(name, name)
seconds = {"embed": 7, "label": 99, "train": iterations, "score": 1}[name]
times = {"stage": name, "seconds": seconds, "counts": {"cached": 0}}
Path(f"reports/times/{stats}.json").write_text(json.dumps(times))
Path(f"reports/stats/{stats}.json").write_text("{}")
if name == "embed":
    Path("data/embeddings/photos").write_text("embedded")
elif name == "label":
    Path("labels.txt").write_text("labels")
elif name == "train":
    Path("model.txt").write_text(f"{iterations} {seed}")
else:
    miou = 20 + (iterations > 50) * seed + 10 * (key == "second")
    metrics = {"miou": miou, "ap50": None, "protocol": ["encoder: tiny/tiny"]}
    Path(f"reports/metrics/{key}.json").write_text(json.dumps(metrics))
"""
IGNORED = "/model.txt\n/labels.txt\n/runs.log\n/data\n/reports/*\n!/reports/metrics\n/broken\n"
FILES = {
    "dvc.yaml": DVC_YAML,
    "params.yaml": PARAMS_YAML,
    "stage.py": STAGE_PY,
    ".gitignore": IGNORED,
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A DVC project, run and committed, beside its definition and a common cache with weights."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "common/weights").mkdir(parents=True)
    (folder / "longer.yaml").write_text(DEFINITION)
    (folder / "project").mkdir()
    return finished_project(folder / "project", FILES)


@pytest.fixture(scope="module")
def ablated(finished: Path) -> tuple[Path, str]:
    """The same after an ablation with two seeds, and what that printed."""
    write_json(finished / "reports/times/train.json", {"stage": "train", "seconds": 12345})
    (finished / "runs.log").unlink()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as output:
        patch.setenv("PIPELINE_CACHE", str(finished.parent / "common"))
        run("longer", root=finished, seeds=2, folder=finished.parent)
    return finished, output.getvalue()


@pytest.fixture
def project(ablated: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it."""
    monkeypatch.setenv("PIPELINE_CACHE", str(tmp_path / "all/common"))
    return Path(shutil.copytree(ablated[0].parent, tmp_path / "all") / "project")


def runs(project: Path) -> list[list[str]]:
    return [line.split() for line in (project / "runs.log").read_text().splitlines()]


def spread(mean: float, lowest: float, highest: float) -> Spread:
    return Spread(mean=mean, min=lowest, max=highest)


def test_seeds_benchmarks_lifts_and_seconds(ablated: tuple[Path, str]) -> None:
    project, output = ablated
    result = read_result(project / "reports/ablations/longer.json")
    assert (result.bench, result.report_bench) == ("first", "second")
    plain, longer = result.variants
    assert [entry.seed for entry in plain.runs] == [entry.seed for entry in longer.runs] == [3, 4]
    assert len({entry.experiment for entry in (*plain.runs, *longer.runs)}) == 4
    assert plain.scores == {
        "first": {"miou": spread(20, 20, 20)},
        "second": {"miou": spread(30, 30, 30)},
    }
    assert longer.scores["first"] == {"miou": spread(23.5, 23, 24)}
    assert longer.metrics == {"miou": 23.5, "ap50": None}
    assert longer.encoder == "tiny/tiny"
    assert (plain.lift, longer.lift) == ({"miou": spread(0, 0, 0)}, {"miou": spread(3.5, 3, 4)})
    # What ran before the ablation has no time: `embed` of all, the rest of `plain` with seed 3.
    assert {name: cost.seconds for name, cost in longer.runs[0].stages.items()} == {
        "embed": None,
        "train": 4000,
        "score@second": 1,
    }
    assert {name: cost.seconds for name, cost in plain.runs[0].stages.items()} == {
        "embed": None,
        "train": None,
        "score@second": None,
    }
    assert (longer.seconds, longer.more_seconds) == (4001, 3950)
    assert (plain.seconds, plain.more_seconds) == (None, None)

    lines = output.splitlines()
    assert lines[0].startswith("1/4 plain, seed 3: first mIoU 20.00, AP50 -; second mIoU 30.00,")
    assert [line.split(":")[0] for line in lines[1:4]] == [
        *("2/4 4,000 iterations, seed 3", "3/4 plain, seed 4"),
        "4/4 4,000 iterations, seed 4",
    ]
    assert lines[-4].split("  ")[0] == "longer"
    assert lines[-2].endswith("4001  +3950")
    assert "23.50 (23.00 to 24.00)" in lines[-2]
    assert "+3.50 (+3.00 to +4.00)" in lines[-2]

    # Every run had an empty cache of its own, with the common weights; the times are as before.
    caches = [words[3] for words in runs(project)]
    assert len(set(caches)) == 3
    assert all(words[4] == "True" for words in runs(project))
    assert not any(Path(cache).exists() for cache in caches)
    assert (project.parent / "common/weights").is_dir()
    assert read_json(project / "reports/times/train.json")["seconds"] == 12345


def test_what_the_run_cache_answers_keeps_its_time(project: Path) -> None:
    path = project / "reports/ablations/longer.json"
    content, ran = path.read_bytes(), len(runs(project))
    path.unlink()
    run("longer", root=project, seeds=2, folder=project.parent)  # from the experiments
    assert path.read_bytes() == content
    call(project, sys.executable, "-m", "dvc", "exp", "remove", "-A", "-q")
    path.unlink()
    run("longer", root=project, seeds=2, folder=project.parent)  # from the run cache
    assert path.read_bytes() == content
    assert len(runs(project)) == ran


def test_a_variant_that_fails_is_not_tried_with_other_seeds_and_continues(project: Path) -> None:
    (project / "broken").touch()
    with pytest.raises(Exception, match=r"1 of 2 variants failed.*out of luck"):
        run("longer", root=project, seeds=4, folder=project.parent)
    plain, longer = read_result(project / "reports/ablations/longer.json").variants
    assert ([entry.seed for entry in plain.runs], len(longer.runs)) == ([3, 4, 5, 6], 2)
    assert longer.lift == {"miou": spread(3.5, 3, 4)}
    (project / "broken").unlink()
    run("longer", root=project, folder=project.parent)
    plain, longer = read_result(project / "reports/ablations/longer.json").variants
    assert [entry.seed for entry in longer.runs] == [3, 4, 5]
    assert longer.lift == {"miou": spread(4, 3, 5)}
    assert (longer.seconds, longer.more_seconds) == (4001, 3950)


def test_a_commands_options_reach_the_ablation(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def text(*options: str) -> str:
        words = ("pipeline", "ablate", "rounds", "--dry-run", "--seeds", "1", "--bench", "second")
        monkeypatch.setattr(sys, "argv", [*words, *options])
        with pytest.raises(SystemExit, match=r"^0$"):
            main()
        return capsys.readouterr().out

    monkeypatch.chdir(project)
    one = text()
    assert one.splitlines()[0].endswith(", on second")
    assert one.count("dvc exp run") == len(read_ablation("rounds").variants)
    both = text("--report-bench", "first")
    assert both.splitlines()[0].endswith(", on second, reported on first")
    assert both.count("score@second score@first") == len(read_ablation("rounds").variants)


# -- seconds ---------------------------------------------------------------------------------------

LOCK = """\
schema: '2.0'
stages:
  embed@photos:
    cmd: embed
    outs: [{path: data/embeddings/photos, md5: a}, {path: reports/stats/embed-photos.json, md5: b}]
  mask:
    cmd: mask
    deps: [{path: data/embeddings, md5: c}, {path: pipeline/masks, md5: d}]
    params: {params.yaml: {mask: {source: spectral}}}
    outs: [{path: data/masks, md5: e}, {path: reports/stats/mask.json, md5: f}]
  other:
    cmd: other
    deps: [{path: data/embeddings/photos, md5: c}]
    outs: [{path: data/other, md5: g}]
  score:
    cmd: score
    deps: [{path: data/masks/00000.tar, md5: h}]
    outs: [{path: reports/metrics/voc.json, md5: i}]
"""


def test_the_stages_of_a_target_are_those_it_waits_for() -> None:
    stages = read_lock(LOCK.encode())
    assert stages_of(stages, "score") == ["embed@photos", "mask", "score"]
    assert stages_of(stages, "other") == ["embed@photos", "other"]
    assert stages_of(stages, "nothing") == []
    assert stages_of(read_lock(None), "score") == stages_of(read_lock(b"{}"), "score") == []


@pytest.mark.parametrize(
    ("counts", "is_whole", "seconds"),
    [
        ({}, False, 5.0),
        ({"cached": 0, "masked": 9}, False, 5.0),
        ({"cached": 1}, False, None),
        ({"cached": 1}, True, 5.0),
        ({"resumed_at_iteration": 7}, False, None),
        ({"finished_before": 500, "cached": 0}, False, None),
    ],
)
def test_a_time_counts_if_nothing_was_spared(
    tmp_path: Path, counts: dict[str, int], is_whole: bool, seconds: float | None
) -> None:
    stages = read_lock(LOCK.encode())
    times = {"reports/times/mask.json": f'{{"seconds": 5.0, "counts": {counts}}}'.replace("'", '"')}
    content = {path: text.encode() for path, text in times.items()}
    notebook = Notebook(tmp_path / "times.json")
    assert notebook.costs(stages, "mask")["mask"].seconds is None
    notebook.note(stages, content, before={}, is_whole=is_whole)
    found = Notebook(tmp_path / "times.json").costs(stages, "score")
    assert {name: cost.seconds for name, cost in found.items()} == {
        "embed@photos": None,
        "mask": seconds,
        "score": None,
    }


def test_a_time_is_of_what_ran_and_of_nothing_else(tmp_path: Path) -> None:
    stages = read_lock(LOCK.encode())
    content = {"reports/times/mask.json": b'{"seconds": 5.0}'}
    notebook = Notebook(tmp_path / "times.json")
    notebook.note(stages, content, before=stages, is_whole=True)  # dvc.lock has no new run
    assert notebook.costs(stages, "mask")["mask"].seconds is None
    notebook.note(stages, content, before={}, is_whole=True)
    for old, new in [("spectral", "selfmask"), ("md5: d", "md5: z"), ("cmd: mask", "cmd: masks")]:
        changed = read_lock(LOCK.replace(old, new).encode())
        assert notebook.costs(changed, "mask")["mask"].seconds is None
    same = YAML(typ="safe", pure=True).load(LOCK.replace("md5: e", "md5: z"))["stages"]
    assert notebook.costs(same, "mask")["mask"].seconds == 5.0
