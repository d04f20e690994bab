"""Ablations: their definitions, and their experiments in small DVC projects of their own."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.ablations.definitions import Ablation, list_ablations, read_ablation
from pipeline.ablations.plan import override_literal, parse_settings, plan
from pipeline.ablations.results import AblationResult, read_result, write_result
from pipeline.ablations.run import describe, overview, run
from pipeline.errors import PipelineError
from pipeline.files import read_json
from pipeline.params.reading import parse_params
from pipeline.params.sections import Params
from pipeline.presets import preset_text
from tests.ablations.dvc_project import call, finished_project
from tests.paths import ROOT

PATIENCE_S = 60

DVC_YAML = """\
stages:
  train:
    cmd: python train.py
    deps: [train.py]
    params: [train]
    outs: [model.txt]
  score:
    foreach: ${benches}
    do:
      cmd: python evaluate.py
      deps: [evaluate.py, model.txt]
      params: [evaluate]
      outs: [overlays.txt]
      metrics:
        - reports/metrics/${key}.json:
            cache: false
"""
PARAMS_YAML = """\
# A comment that stays.
categories: [cat]
index: {photos: {root: photos}}
train: {iterations: 5, labels: data/masks}
evaluate: {suppression: hard}
benches: {voc: {format: voc, root: voc, categories: [cat]}}
"""
# Its target `fused` fails, and without the stop-gradient it takes forever.
TRAIN_PY = """\
import sys, time
from pathlib import Path
from ruamel.yaml import YAML
train = YAML(typ="safe", pure=True).load(Path("params.yaml"))["train"]
with open("runs.log", "a") as log:
    print("train", train, file=log)
if not train.get("stop_gradient", True):
    time.sleep(1000)
if train.get("target") == "fused":
    sys.exit("out of luck")
Path("model.txt").write_text(str(len(train) - 1))
"""
EVALUATE_PY = """\
import json
from pathlib import Path
with open("runs.log", "a") as log:
    print("evaluate", file=log)
miou = 10.0 * int(Path("model.txt").read_text())
Path("overlays.txt").write_text(str(miou))
Path("reports/metrics").mkdir(parents=True, exist_ok=True)
protocol = ["encoder: tiny/tiny", "split: val"]
Path("reports/metrics/voc.json").write_text(
    json.dumps({"miou": miou, "ap": None, "protocol": protocol})
)
"""
FILES = {
    "dvc.yaml": DVC_YAML,
    "params.yaml": PARAMS_YAML,
    "train.py": TRAIN_PY,
    "evaluate.py": EVALUATE_PY,
    ".gitignore": "/model.txt\n/overlays.txt\n/runs.log\n",
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A DVC project with two stages, run and committed."""
    return finished_project(tmp_path_factory.mktemp("finished"), FILES)


@pytest.fixture
def project(finished: Path, tmp_path: Path) -> Path:
    """A copy of the project, to be changed."""
    return Path(shutil.copytree(finished, tmp_path / "project"))


def state(project: Path) -> dict[str, str]:
    """What an ablation must leave as it was."""
    names = ("params.yaml", "dvc.lock", "model.txt", "overlays.txt", "reports/metrics/voc.json")
    changes = call(project, "git", "status", "--porcelain", "--untracked-files=no")
    return {name: (project / name).read_text() for name in names} | {"git": changes}


def runs(project: Path) -> list[str]:
    return [line.split()[0] for line in (project / "runs.log").read_text().splitlines()]


# -- running ---------------------------------------------------------------------------------------


def test_variants_run_as_experiments_and_leave_the_workspace_as_it_was(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # A stage that was never run does not stand in the way.
    with (project / "dvc.yaml").open("a") as file:
        file.write(
            "  later:\n    cmd: python later.py\n    deps: [model.txt]\n    outs: [later.txt]\n"
        )
    call(project, "git", "commit", "-qam", "a stage for later")
    before = state(project)
    with pytest.raises(PipelineError, match=r"1 of 3 .* failed.*'fused': out of luck.*train\.py"):
        run("target", root=project)
    assert state(project) == before
    assert not (project / "later.txt").exists()
    assert runs(project) == ["train", "evaluate"] * 2 + ["train"]

    path = project / "reports/ablations/target.json"
    result = read_result(path)
    assert (result.ablation, result.bench, result.params) == ("target", "voc", {})
    saliency, denseclip, fused = result.variants
    assert saliency.metrics == {"miou": 10.0, "ap": None, "ap50": None, "pixel_acc": None}
    assert denseclip.metrics["miou"] == 20.0
    assert denseclip.params == {"train.target": "denseclip", "train.labels": "data/labels"}
    assert denseclip.encoder == "tiny/tiny"
    assert fused.experiment is None
    assert fused.metrics == {}
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].startswith("2/3 denseclip: mIoU 20.00, AP -")
    assert lines[2] == "3/3 fused: failed"
    assert lines[-3].split() == ["denseclip", "20.00", "-", "-", "-"]

    # The same command again: what has run is found, what failed is tried again.
    content = path.read_bytes()
    with pytest.raises(PipelineError, match="fused"):
        run("target", root=project)
    assert runs(project)[5:] == ["train"]
    assert path.read_bytes() == content
    assert state(project) == before
    listed = call(project, sys.executable, "-m", "dvc", "exp", "list", "--name-only").split()
    assert sorted(listed) == sorted(str(variant.experiment) for variant in (saliency, denseclip))


def test_outputs_that_are_lost_meanwhile_are_named(project: Path) -> None:
    forgets = "import shutil\nshutil.rmtree('.dvc/cache/files', ignore_errors=True)\n"
    (project / "train.py").write_text((project / "train.py").read_text() + forgets)
    call(project, sys.executable, "-m", "dvc", "repro", "-q")
    call(project, "git", "commit", "-qam", "forgets")
    with pytest.raises(PipelineError, match=r"dvc checkout: .*(model|overlays)\.txt.*not those of"):
        run("target", root=project)


def test_data_that_changed_since_are_not_answered_from_old_experiments(project: Path) -> None:
    run("templates", root=project)
    path = project / "reports/ablations/templates.json"
    before = {variant.experiment for variant in read_result(path).variants}
    with (project / "dvc.lock").open("a") as lock:  # as `dvc repro` with other photos leaves it
        lock.write("# other photos\n")
    run("templates", root=project)
    assert not before & {variant.experiment for variant in read_result(path).variants}


@pytest.mark.parametrize(
    ("ctrl_c", "sent"),
    [
        # A background job of a shell, as these tests may be one, has its children ignore Ctrl-C.
        (signal.SIG_DFL, signal.SIGINT),
        (signal.SIG_IGN, signal.SIGTERM),
    ],
)
def test_a_signal_stops_the_stage_and_brings_the_workspace_back(
    project: Path, ctrl_c: signal.Handlers, sent: signal.Signals
) -> None:
    before = state(project)
    process = subprocess.Popen(
        [sys.executable, "-m", "pipeline", "ablate", "stop_gradient"],
        cwd=project,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        preexec_fn=lambda: signal.signal(signal.SIGINT, ctrl_c),
    )
    until = time.monotonic() + PATIENCE_S
    while len(runs(project)) < 3:  # the first variant is being trained
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until
        time.sleep(0.1)
    assert "stop_gradient: false" in (project / "params.yaml").read_text()
    process.send_signal(sent)
    output, _ = process.communicate(timeout=PATIENCE_S)
    assert process.returncode not in (0, None), output
    assert state(project) == before
    assert not (project / "reports/ablations").exists()


@pytest.mark.parametrize(
    ("damaged", "match"),
    [
        ("params.yaml", r"params\.yaml: differ from the last commit"),
        ("train.py", r"train\.py: differ from the last commit"),
        ("model.txt", r"model\.txt: differ from dvc\.lock"),
    ],
)
def test_what_could_not_be_brought_back_is_refused(project: Path, damaged: str, match: str) -> None:
    with (project / damaged).open("a") as file:
        file.write("\n# mine\n")
    content = (project / damaged).read_bytes()
    with pytest.raises(PipelineError, match=match):
        run("target", root=project)
    assert (project / damaged).read_bytes() == content


def test_a_folder_without_a_commit_is_refused(tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_text(PARAMS_YAML)
    with pytest.raises(PipelineError, match="git init"):
        run("target", root=tmp_path)


# -- planning --------------------------------------------------------------------------------------


def params_of(**sections: object) -> Params:
    bench = {"format": "voc", "root": "voc", "categories": ["cat"]}
    content = {
        "categories": ["cat"],
        "index": {"photos": {"root": "photos"}},
        "benches": {"voc": bench},
    }
    return parse_params(content | sections)


SWITCH = Ablation.model_validate(
    {
        "description": "A switch",
        "metrics": {"miou": "mIoU"},
        "variants": [
            {"label": "off", "params": {"train.stop_gradient": False}},
            {"label": "on", "params": {"train.stop_gradient": True}},
        ],
        "demo_variants": [],
        "carries_over": "Nothing at all.",
    }
)


def test_a_variant_overrides_only_what_differs_from_the_params() -> None:
    off, on = plan("switch", SWITCH, params_of(), bench="voc")
    assert off.overrides == {"train.stop_gradient": False}
    assert on.overrides == {}
    assert (off.needs_training, on.needs_training) == (True, False)
    assert off.command("score@voc") == [
        *("exp", "run", "--name", off.experiment),
        *("--set-param", "++train.stop_gradient=false", "score@voc"),
    ]
    assert on.command("score@voc")[-3:] == ["--name", on.experiment, "score@voc"]


def test_params_for_all_variants_go_into_each_and_into_its_name() -> None:
    plain = plan("switch", SWITCH, params_of(), bench="voc")
    shorter = plan(
        "switch", SWITCH, params_of(), bench="voc", for_all={"train.iterations": 3, "k": 500}
    )
    assert shorter[0].overrides == {"train.iterations": 3, "train.stop_gradient": False}
    assert shorter[1].overrides == {"train.iterations": 3}
    names = {step.experiment for step in (*plain, *shorter)}
    assert len(names) == 4
    again = plan("switch", SWITCH, params_of(), bench="voc", for_all={"train.iterations": 3})
    assert [step.experiment for step in again] == [step.experiment for step in shorter]


def test_factors_multiply_what_the_params_or_the_command_say() -> None:
    longer = Ablation.model_validate(
        SWITCH.model_dump()
        | {
            "variants": [
                {"label": "plain"},
                {"label": "longer", "factors": {"train.iterations": 2, "train.learning_rate": 0.5}},
                {"label": "no number", "factors": {"train.target": 2}},
            ]
        }
    )
    *both, wrong = longer.variants
    longer = longer.model_copy(update={"variants": both})
    params = params_of()
    _, step = plan("switch", longer, params, bench="voc")
    assert step.overrides == step.params
    assert step.params == {
        "train.iterations": 2 * params.train.iterations,
        "train.learning_rate": params.train.learning_rate / 2,  # type: ignore[attr-defined]
    }
    _, step = plan("switch", longer, params, bench="voc", for_all={"train.iterations": 7})
    assert step.overrides["train.iterations"] == 14
    longer = longer.model_copy(update={"variants": [*both, wrong]})
    with pytest.raises(PipelineError, match=r"'no number': factors: train\.target: 'saliency' is"):
        plan("switch", longer, params, bench="voc")


def test_mistakes_in_settings_are_named() -> None:
    for settings, match in [
        ({"train.iteration": 3}, r"variant 'off'.*'train\.iteration'.*did you mean 'iterations'"),
        ({"train.iterations": "many"}, r"train\.iterations.*'many'"),
        ({"nowhere.at.all": 1}, "nowhere"),
    ]:
        with pytest.raises(PipelineError, match=match):
            plan("switch", SWITCH, params_of(), bench="voc", for_all=settings)
    with pytest.raises(PipelineError, match=r"--bench: 'coco'.*voc"):
        plan("switch", SWITCH, params_of(), bench="coco")
    with pytest.raises(PipelineError, match=r"switch: Nothing at all\."):
        plan("switch", SWITCH, params_of(worlds={"demo": {}}), bench="voc")


def test_a_run_a_seed_and_all_variants_with_one_before_the_next() -> None:
    steps = plan("switch", SWITCH, params_of(seed=4), bench="voc", seeds=2)
    assert [(step.label, step.seed) for step in steps] == [
        *(("off", 4), ("on", 4), ("off", 5), ("on", 5)),
    ]
    assert [step.overrides.get("seed") for step in steps] == [None, None, 5, 5]
    assert all(step.needs_training for step in steps if step.overrides)
    assert len({step.experiment for step in steps}) == 4
    once = plan("switch", SWITCH, params_of(seed=4), bench="voc")
    assert steps[:2] == once
    given = plan("switch", SWITCH, params_of(), bench="voc", seeds=2, for_all={"seed": 8})
    assert [step.overrides["seed"] for step in given] == [8, 8, 9, 9]


def test_a_second_benchmark_is_scored_and_named() -> None:
    benches = {
        name: {"format": "voc", "root": name, "categories": ["cat"]} for name in ("a", "b", "c")
    }
    params = params_of(benches=benches)
    one, two, other = (
        plan("switch", SWITCH, params, bench="a", report_bench=bench)[0]
        for bench in (None, "b", "c")
    )
    assert len({one.experiment, two.experiment, other.experiment}) == 3
    assert two.command("score@a", "score@b")[-2:] == ["score@a", "score@b"]
    for bench, match in [("d", r"--report-bench: 'd'.*a, b, c"), ("a", "--report-bench: 'a' is")]:
        with pytest.raises(PipelineError, match=match):
            plan("switch", SWITCH, params, bench="a", report_bench=bench)


def test_lifts_are_chosen_on_the_benchmark_for_development(tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_text(preset_text("demo"))
    first = describe("purity", root=tmp_path).splitlines()[0]
    assert first.endswith("on dev, reported on voc")
    assert describe("purity", root=tmp_path, bench="voc").splitlines()[0].endswith("on voc")
    assert describe("k", root=tmp_path).splitlines()[0].endswith("on voc")
    (tmp_path / "params.yaml").write_text(preset_text("zutis-voc"))
    assert describe("purity", root=tmp_path).splitlines()[0].endswith("on voc")
    halves = describe("purity", root=tmp_path, bench="voc", seeds=1).splitlines()
    assert len(halves) == 1 + 2 * len(read_ablation("purity").variants)


def one_variant(**settings: object) -> Ablation:
    """An ablation of what params.yaml says and of one more variant."""
    content = {"description": "d", "metrics": {"miou": "mIoU"}, "carries_over": "c"}
    variants = [{"label": "plain"}, {"label": "other", "params": settings}]
    return Ablation.model_validate(content | {"variants": variants})


def test_another_method_takes_over_what_it_knows_of_the_section() -> None:
    encoder = {"model": "ViT-B-32-quickgelu", "pretrained": "openai"}
    params = params_of(mask={"source": "selfmask", "threshold": 0.4, "batch_size": 3})
    settings = {"mask.source": "spectral", "mask.encoder": encoder, "k": 7}
    plain, other = plan("mine", one_variant(**settings), params, bench="voc")
    assert plain.overrides == {}
    whole = {"source": "spectral", "batch_size": 3, "encoder": encoder}
    assert other.overrides == {"k": 7, "mask": whole}
    words = other.command("score@voc")
    assert words.index("++mask=null") < words.index(f"++mask={override_literal(whole)}")
    _, same = plan("mine", one_variant(**{"mask.source": "selfmask"}), params, bench="voc")
    assert same.overrides == {}
    for settings, match in [
        ({"mask.source": "spectrum"}, r"mask\.source.*'spectrum'"),
        ({"mask.source": "spectral", "mask.threshold": 0.1}, "unknown key 'mask.threshold'"),
    ]:
        with pytest.raises(PipelineError, match=match):
            plan("mine", one_variant(**settings), params, bench="voc")


def test_words_become_settings() -> None:
    words = ["k=7", "train.target=fused", "train.scale_range=[0.5, 1e-1]", "evaluate.max_side="]
    assert parse_settings(words) == {
        "k": 7,
        "train.target": "fused",
        "train.scale_range": [0.5, 0.1],
        "evaluate.max_side": None,
    }
    for wrong in (["k"], ["=3"], ["k=1", "k=2"], ["k=[1"], ["seed=2020-13-45"]):
        with pytest.raises(PipelineError, match="--set"):
            parse_settings(wrong)


@pytest.mark.parametrize(
    ("value", "literal"),
    [
        (True, "true"),
        (None, "null"),
        (0.1, "0.1"),
        (3, "3"),
        ("ViT-B-32-quickgelu", "ViT-B-32-quickgelu"),
        ("null", "'null'"),
        ("it's, here", "'it\\'s, here'"),
        ([1, "a b"], "[1,'a b']"),
        ({"name": "spatter", "level": 1}, "{name:spatter,level:1}"),
    ],
)
def test_override_literals(value: object, literal: str) -> None:
    assert override_literal(value) == literal


# -- definitions and results -----------------------------------------------------------------------


def test_the_papers_ablations_and_ours_are_defined() -> None:
    assert list_ablations() == [
        *("bank", "copy_paste", "dense", "encoder", "k", "masks", "names", "plus_clip"),
        *("plus_steps", "plus_target", "purity", "refinement", "rounds", "shortcuts"),
        *("stop_gradient", "suppression", "target", "temperature", "templates"),
    ]


def test_ours_that_measure_lifts_have_three_seeds_and_the_papers_one() -> None:
    lifts = {name for name in list_ablations() if read_ablation(name).lift_over is not None}
    assert lifts == {"bank", "dense", "masks", "names", "purity", "refinement", "rounds"}
    seeds = {name: read_ablation(name).seeds for name in list_ablations()}
    assert seeds == {name: 3 if name in lifts else 1 for name in list_ablations()}


@pytest.mark.parametrize("name", list_ablations())
@pytest.mark.parametrize("preset", ["demo", "zutis-voc", "denseclip-plus-voc"])
def test_every_ablation_fits_the_presets(name: str, preset: str, tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_text(preset_text(preset))
    ablation = read_ablation(name)
    student = "denseclip_plus" if preset.startswith("denseclip-plus") else "zutis"
    if student == "denseclip_plus" and ablation.student is None:
        return  # most are about the other one
    if ablation.student not in (None, student) or (
        preset == "demo" and ablation.demo_variants == []
    ):
        with pytest.raises(PipelineError, match=name):
            describe(name, root=tmp_path)
        return
    lines = describe(name, root=tmp_path).splitlines()
    commands = [line for line in lines if "dvc exp run" in line]
    assert len(commands) == len(set(commands)) >= 2
    assert sum("as in params.yaml" in line for line in lines) == 1


def test_overview_counts_training_runs(tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_text(preset_text("demo"))
    lines = overview(tmp_path).splitlines()
    assert len(lines) == len(list_ablations())
    assert lines[list_ablations().index("suppression")].endswith("(4 variants, 0 training runs)")
    assert lines[list_ablations().index("stop_gradient")].endswith("(3 variants, 1 training run)")
    num_rounds = len(read_ablation("rounds").variants_for(demo=True))
    assert lines[list_ablations().index("rounds")].endswith(
        f"({num_rounds} variants, 3 seeds, {3 * num_rounds - 1} training runs)"
    )
    assert lines[list_ablations().index("plus_clip")].endswith(
        "(for train.student: denseclip_plus)"
    )
    assert "not for the embedded default" in lines[list_ablations().index("encoder")]


def test_unknown_ablation_is_named_with_the_closest() -> None:
    with pytest.raises(PipelineError, match="did you mean 'suppression'"):
        read_ablation("supression")


def test_a_wrong_definition_is_named_by_its_place(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(
        "description: d\nmetrics: {miou: 3}\ncarries_over: c\nvariant: []\n"
        "variants: [{label: a}, {label: ' '}]\n"
    )
    with pytest.raises(PipelineError) as caught:
        read_ablation("mine", tmp_path)
    message = str(caught.value)
    for place in ("mine.yaml: metrics.miou: ", "variants.1.label: ", "unknown key 'variant'"):
        assert place in message


def test_labels_of_a_definition_are_checked(tmp_path: Path) -> None:
    text = "description: d\nmetrics: {miou: mIoU}\ncarries_over: c\n"
    for lines, match in [
        ("variants: [{label: a}, {label: a}]", r"mine\.yaml: .*labels.*differ.*'a', 'a'"),
        ("variants: [{label: a}, {label: b}]\nlift_over: c", "lift_over: 'c' is no variant"),
        (
            "variants: [{label: a}, {label: b}]\nlift_over: a\ndemo_variants: [{label: b}]",
            "lift_over: 'a' is no variant",
        ),
    ]:
        (tmp_path / "mine.yaml").write_text(text + lines)
        with pytest.raises(PipelineError, match=match):
            read_ablation("mine", tmp_path)


def test_results_are_read_as_written_and_damage_is_named(tmp_path: Path) -> None:
    path = tmp_path / "switch.json"
    variants = [
        {"label": "off", "params": {"train.stop_gradient": False}, "metrics": {"miou": None}},
        {"label": "on", "params": {}, "experiment": "x", "encoder": "e", "metrics": {"miou": 1}},
    ]
    content = {"ablation": "switch", "bench": "voc", "params": {"k": 3}, "variants": variants}
    result = AblationResult.model_validate(content)
    write_result(path, result)
    assert read_result(path) == result
    first = path.read_bytes()
    write_result(path, read_result(path))
    assert path.read_bytes() == first
    damaged = read_json(path)
    damaged["variants"][1]["metrics"]["miou"] = "high"
    path.write_text(str(damaged).replace("'", '"').replace("None", "null").replace("False", "0"))
    with pytest.raises(PipelineError, match=r"switch\.json: variants\.1\.metrics\.miou"):
        read_result(path)
