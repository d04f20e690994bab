"""dvc.yaml, the commands, the paths and the params agree; deps hold what a stage imports."""

from __future__ import annotations

import ast
import copy
import inspect
import json
import shutil
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin

import pytest
import typer
from dvc.repo import Repo
from ruamel.yaml import YAML
from typer.testing import CliRunner

from pipeline.cli import app
from pipeline.params.benches import FORMATS, BenchParams
from pipeline.params.sections import Params
from pipeline.presets import list_presets, preset_text
from tests.paths import ROOT

DVC_YAML = ROOT / "dvc.yaml"
PATHS_YAML = "pipeline/paths.yaml"

# DVC's own use of a library's older interface.
pytestmark = pytest.mark.filterwarnings("ignore:_NoneStep:DeprecationWarning")


def read_yaml(text: str) -> dict[str, Any]:
    content: dict[str, Any] = YAML(typ="safe", pure=True).load(text)
    return content


STAGES: dict[str, dict[str, Any]] = read_yaml(DVC_YAML.read_text())["stages"]
PATHS: dict[str, str] = read_yaml((ROOT / PATHS_YAML).read_text())["paths"]

KEY = "${key}"
TIMES = "reports/times"  # of the last runs, and no output
# Never a dep: its values are tracked as params, or it does not change what comes out.
CORE = ("errors.py", "files.py", "params", "cli")
# Files of the package that are data of a module, by the module that reads them.
PACKAGE_DATA = {
    "pipeline/app/site.py": ["pipeline/app/static", "pipeline/app/templates"],
    "pipeline/ablations/definitions.py": ["pipeline/presets/ablations"],
    "pipeline/vocabulary/categories.py": ["pipeline/vocabulary/category_sets"],
    "pipeline/models/clip/photo_clip/assemble.py": ["pipeline/models/clip/photo_clip"],
    "pipeline/models/weights/zoo.py": ["pipeline/models/weights/zoo.yaml"],
    "pipeline/demo/glyphs.py": ["pipeline/demo/glyphs.json"],
    "pipeline/stages/report.py": ["pipeline/report/report.css", "pipeline/report/report.html.j2"],
}
MAIN_MODULES = {
    "world": ["pipeline/demo/world.py"],
    "plus": [f"pipeline/stages/{stage}.py" for stage in ("train", "predict_bench", "score")],
    "retrain": [f"pipeline/stages/{stage}.py" for stage in ("train", "retrain")],
}
CATEGORIES = Path("pipeline/vocabulary/categories.py")


def body(stage: str) -> dict[str, Any]:
    """A stage's definition, inside its `foreach` if it has one."""
    return STAGES[stage].get("do", STAGES[stage])


def paths(entries: list[Any]) -> list[str]:
    """Paths of deps, outs or metrics, with or without flags."""
    return [entry if isinstance(entry, str) else next(iter(entry)) for entry in entries]


def data_deps(stage: str) -> list[str]:
    return [path for path in paths(body(stage)["deps"]) if not path.startswith("pipeline/")]


def code_deps(stage: str) -> list[str]:
    return [path for path in paths(body(stage)["deps"]) if path.startswith("pipeline/")]


def outs(stage: str) -> list[str]:
    return paths(body(stage).get("outs", [])) + paths(body(stage).get("metrics", []))


# -- paths and params ------------------------------------------------------------------------------


def field_at(path: str, section: Any = Params) -> Any:
    """Annotation of a dotted key of params.yaml, or of a section; fails where there is none."""
    for part in path.split("."):
        if get_origin(section) is dict:
            _, section = get_args(section)
        elif isinstance(section, UnionType):  # of benchmarks, which share a class
            assert all(part in kind.model_fields for kind in get_args(section))
            section = str
        else:
            assert part in section.model_fields, f"params.yaml has no {path}: {part} is unknown"
            section = section.model_fields[part].annotation
    return section


@pytest.mark.parametrize("stage", STAGES)
def test_every_path_is_in_the_paths_file_or_in_the_params(stage: str) -> None:
    for path in outs(stage):
        assert path.startswith("${paths."), path
    for path in data_deps(stage):
        head, _, name = path.removeprefix("${").partition("}")[0].partition(".")
        if head != "paths":
            assert head == "item" or field_at(f"{head}.{name}"), path


@pytest.mark.parametrize("stage", STAGES)
def test_a_stages_params_exist(stage: str) -> None:
    for entry in body(stage).get("params", []):
        field_at(entry)


@pytest.mark.parametrize("stage", [stage for stage in STAGES if "foreach" in STAGES[stage]])
def test_a_foreach_runs_over_a_table_of_params(stage: str) -> None:
    section = STAGES[stage]["foreach"].removeprefix("${").removesuffix("}")
    table = field_at(section)
    assert get_origin(table) is dict
    assert f"{section}.{KEY}" in body(stage)["params"]
    entries = [path for path in data_deps(stage) if path.startswith("${item.")]
    _, entry = get_args(table)
    kinds = FORMATS.values() if entry is BenchParams else [entry]
    for path in entries:
        for kind in kinds:
            field_at(path.removeprefix("${item.").removesuffix("}"), kind)


def commands(group: Any) -> Iterator[Any]:
    """All commands, however deep."""
    for command in group.commands.values():
        yield from commands(command) if hasattr(command, "commands") else [command]


def test_a_default_path_is_one_of_the_paths_file() -> None:
    known = [Path(path) for path in PATHS.values()]
    defaults = [
        option.default
        for command in commands(typer.main.get_command(app))
        for option in command.params
        if isinstance(option.default, Path)
    ]
    assert len(defaults) > len(PATHS)
    for default in {*defaults} - {Path("docs/demo.png"), Path("docs/steps"), Path("data/work")}:
        assert any(default.is_relative_to(path) for path in known), default


# -- code ------------------------------------------------------------------------------------------


def module_file(name: str) -> Path | None:
    """File of a module or package of ours, relative to the repository; None for other names."""
    stem = Path(*name.split("."))
    found = [path for path in (stem.with_suffix(".py"), stem / "__init__.py") if name and path]
    return next((path for path in found if (ROOT / path).is_file()), None)


def imported_files(tree: ast.AST) -> set[Path]:
    """Files of ours that the import statements below a node name, wherever they stand."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.module is not None
            assert node.level == 0, "imports are absolute"
            for alias in node.names:
                submodule = f"{node.module}.{alias.name}"
                names.add(submodule if module_file(submodule) else node.module)
    ours = {name for name in names if name.split(".")[0] == "pipeline"}
    return {path for name in ours if (path := module_file(name)) is not None}


@cache
def imports_of(path: Path) -> frozenset[Path]:
    return frozenset(imported_files(ast.parse((ROOT / path).read_text(encoding="utf-8"))))


def is_core(path: Path) -> bool:
    return any(path.is_relative_to(Path("pipeline", other)) for other in CORE)


def closure(roots: set[Path]) -> set[Path]:
    """Modules of ours that are reached by imports from `roots`, the core left out."""
    reached: set[Path] = set()
    waiting = set(roots)
    while waiting:
        path = waiting.pop()
        if path not in reached and not is_core(path):
            reached.add(path)
            waiting |= imports_of(path)
    return reached


def command_of(stage: str) -> Any:
    """The command of a stage."""
    command: Any = typer.main.get_command(app)
    for word in body(stage)["cmd"].split()[1:]:
        if not hasattr(command, "commands"):
            break
        command = command.commands[word]
    assert command.name == stage
    return command


def command_imports(stage: str) -> set[Path]:
    """What the command of a stage imports."""
    source = inspect.getsource(inspect.unwrap(command_of(stage).callback))
    return imported_files(ast.parse(textwrap.dedent(source)))


def code_of(stage: str) -> set[Path]:
    """Modules that a stage and its command import, and the data files that these read."""
    own = MAIN_MODULES.get(stage, [f"pipeline/stages/{stage}.py"])
    roots = {*map(Path, own)} | command_imports(stage)
    if "categories" in body(stage).get("params", []):  # may be the name of a set
        roots.add(CATEGORIES)
    modules = {path for path in closure(roots) if path.name != "__init__.py"}
    data = [PACKAGE_DATA.get(module.as_posix(), []) for module in modules]
    return modules.union(*({Path(path) for path in entries} for entries in data))


@pytest.mark.parametrize("stage", STAGES)
def test_deps_hold_all_that_a_stage_imports(stage: str) -> None:
    missing = [
        path.as_posix()
        for path in sorted(code_of(stage))
        if not any(path.is_relative_to(dep) for dep in code_deps(stage))
    ]
    assert not missing, f"the deps of {stage} in dvc.yaml lack {', '.join(missing)}"


@pytest.mark.parametrize("stage", STAGES)
def test_no_dep_is_idle(stage: str) -> None:
    for dep in code_deps(stage):
        assert (ROOT / dep).exists(), dep
        assert any(path.is_relative_to(dep) for path in code_of(stage)), f"{stage}: {dep}"


@pytest.mark.parametrize("stage", [stage for stage in STAGES if stage != "world"])
def test_what_a_person_has_decided_is_a_dep_of_the_stages_that_read_it(stage: str) -> None:
    defaults = [option.default for option in command_of(stage).params]
    for name in ("corrections", "review_archives", "review_labels"):
        is_dep = f"${{paths.{name}}}" in data_deps(stage)
        assert is_dep == (Path(PATHS[name]) in defaults), name


def test_stages_that_train_or_label_anew_read_what_a_person_has_decided() -> None:
    for stage in ("train", "relabel", "retrain", "plus"):
        assert {"${paths.corrections}", "${paths.review_labels}"} <= set(data_deps(stage)), stage


def test_every_data_file_of_the_package_belongs_to_a_module() -> None:
    known = [Path(path) for entries in PACKAGE_DATA.values() for path in entries]
    known += [Path("pipeline/presets"), Path("pipeline/py.typed"), Path(PATHS_YAML)]
    known += [Path("pipeline/workspace")]
    for path in (ROOT / "pipeline").rglob("*"):
        if path.is_file() and path.suffix not in (".py", ".pyc"):
            relative = path.relative_to(ROOT)
            assert any(relative.is_relative_to(other) for other in known), relative


def test_compiled_code_is_no_dep(tmp_path: Path) -> None:
    shutil.copy(ROOT / ".dvcignore", tmp_path)
    compiled = tmp_path / "pipeline/engine/__pycache__"
    compiled.mkdir(parents=True)
    with Repo.init(str(tmp_path), no_scm=True) as repo:
        assert repo.dvcignore.is_ignored_dir(str(compiled))
        assert not repo.dvcignore.is_ignored_dir(str(compiled.parent))


# -- the graph, as DVC reads it --------------------------------------------------------------------


@dataclass(frozen=True)
class ResolvedStage:
    """A stage as DVC reads it: `foreach` unrolled, names replaced by values.

    Attributes:
        cmd: its command.
        params: keys of params.yaml.
        outs: paths, metrics among them.
        after: names of the stages that it waits for.
    """

    cmd: str
    params: list[str]
    outs: list[str]
    after: set[str]


def resolve(folder: Path, params: str) -> dict[str, ResolvedStage]:
    """The stages by name, each after those that it waits for."""
    (folder / "dvc.yaml").write_bytes(DVC_YAML.read_bytes())
    (folder / PATHS_YAML).parent.mkdir()
    shutil.copyfile(ROOT / PATHS_YAML, folder / PATHS_YAML)
    (folder / "params.yaml").write_text(params)
    with Repo.init(str(folder), no_scm=True) as repo:
        edges = repo.index.graph
        stages = {
            stage.name: ResolvedStage(
                cmd=stage.cmd,
                params=[key for dep in stage.params for key in dep.params],
                outs=[out.def_path for out in stage.outs],
                after={other.name for other in edges.successors(stage)},
            )
            for stage in edges.nodes
        }
    ordered: dict[str, ResolvedStage] = {}
    while len(ordered) < len(stages):
        ordered |= {name: it for name, it in stages.items() if it.after <= ordered.keys()}
    return ordered


def test_dvc_joins_the_demos_stages_by_their_files(tmp_path: Path) -> None:
    graph = {name: stage.after for name, stage in resolve(tmp_path, preset_text("demo")).items()}
    assert graph == {
        "world@demo": set(),
        "embed@demo": {"world@demo"},
        "retrieve": {"embed@demo"},
        "mask": {"retrieve"},
        "bank": {"embed@demo", "mask"},
        "pseudo_label": {"mask", "bank"},
        "train": {"mask"},
        "predict_bench@voc": {"train", "world@demo"},
        "predict_bench@dev": {"train", "world@demo"},
        "score@voc": {"predict_bench@voc", "world@demo"},
        "score@dev": {"predict_bench@dev", "world@demo"},
        "plus@annotation_free": {"world@demo"},
        "plus@zero_shot": {"world@demo"},
        "compare": {"plus@annotation_free", "plus@zero_shot"},
        "audit@demo": {"retrieve", "mask", "pseudo_label", "world@demo"},
        "report": {
            *("world@demo", "embed@demo", "retrieve", "mask", "bank", "pseudo_label"),
            *("train", "predict_bench@voc", "score@voc", "audit@demo", "compare"),
            *("predict_bench@dev", "score@dev"),
            *("plus@annotation_free", "plus@zero_shot"),
        },
    }


def test_dvc_joins_rounds_to_the_checkpoint_before_them(tmp_path: Path) -> None:
    params = read_yaml(preset_text("demo"))
    put(params, "rounds", {name: dict(entry) for name, entry in SMALL["rounds"].items()})
    stages = resolve(tmp_path, json.dumps(params))
    assert stages["relabel@first"].after == {"train", "mask"}
    assert stages["retrain@first"].after == {"relabel@first", "train", "mask"}
    assert stages["relabel@second"].after == {"retrain@first", "mask"}
    assert stages["retrain@second"].after == {"relabel@second", "retrain@first", "mask"}
    assert {"retrain@first", "retrain@second"} < stages["predict_bench@voc"].after


def test_scoring_runs_no_network() -> None:
    assert not any("models" in dep or "methods" in dep for dep in code_deps("score"))
    assert not any("scoring" in dep for dep in code_deps("predict_bench"))


@pytest.mark.parametrize("preset", [name for name, _ in list_presets() if name != "demo"])
def test_dvc_reads_the_dag_with_every_preset(tmp_path: Path, preset: str) -> None:
    stages = set(resolve(tmp_path, preset_text(preset)))
    assert {"retrieve", "mask", "pseudo_label", "train", "report"} <= stages
    assert any(stage.startswith("embed@") for stage in stages)
    assert not any(stage.startswith("world@") for stage in stages)


# -- the commands, on a small world ----------------------------------------------------------------

VOC: dict[str, Any] = {
    "root": "data/demo/voc",
    "split": "val",
    "categories": "demo",
    "background": False,
    "metrics": ["semantic"],
    "unseen": ["dog"],
}
TINY_CLIP = {
    "model": "models/demo/tiny_clip.json",
    "pretrained": "models/demo/tiny_clip.safetensors",
}
PLUS: dict[str, Any] = {
    "student": "denseclip_plus",
    "labels": "data/demo/voc",
    "data": {"format": "voc", "root": "data/demo/voc", "split": "val", "categories": "demo"},
    "setting": "zero_shot",
    "unseen": ["dog"],
    "encoder": TINY_CLIP,
    "templates": "name",
    "backbone": "timm:resnet10t",
    "backbone_weights": None,
    "head": "lraspp",
    "iterations": 2,
    "guided_iterations": 1,
    "self_training": "on",
    "batch_size": 2,
    "crop_size": 48,
    "base_size": None,
    "log_every": 1,
}
SMALL: dict[str, Any] = {
    "device": "cpu",
    "precision": "bfloat16",
    "k": 3,
    "worlds.demo": {"index_images": 40, "bench_images": 6, "size": 48},
    "retrieve.num_negatives": 4,
    "retrieve.templates": "name",
    "mask.refine": False,
    "bank": {"sample": 5, "nearest": 3},
    "pseudo_label.templates": "name",
    "train.templates": "name",
    "train.confidence_threshold": 0.1,
    "train.iterations": 2,
    "train.log_every": 1,
    "train.batch_size": 2,
    "train.crop_size": 48,
    "evaluate.overlays": 1,
    "rounds": {
        "first": {"after": "models/zutis", "held_out": 0.3, "score_threshold": 0.0},
        "second": {"after": "models/rounds/first", "held_out": 0.3, "drift_tolerance": 0.0},
    },
    "plus": {"zero": {"train": PLUS, "bench": {"format": "voc", **VOC}}},
}
# What a params file must have, and one device for all runs.
UNUSED: dict[str, Any] = {
    "categories": ["unused"],
    "index": {"unused": {"root": "unused"}},
    "device": "cpu",
}


def put(tree: dict[str, Any], key: str, value: Any) -> None:
    *sections, last = key.split(".")
    for section in sections:
        tree = tree.setdefault(section, {})
    tree[last] = value


def take(tree: dict[str, Any], key: str) -> Any:
    for part in key.split("."):
        tree = tree[part]
    return tree


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Params of a small drawn world; we are in a workspace that has seen no stage."""
    params = read_yaml(preset_text("demo"))
    for key, value in SMALL.items():
        put(params, key, value)
    workspace = tmp_path / "workspace"
    shutil.copytree(ROOT / PATHS["demo_models"], workspace / PATHS["demo_models"])
    (workspace / "reports").mkdir()
    shutil.copy(ROOT / "reports/published.yaml", workspace / "reports")
    monkeypatch.chdir(workspace)
    monkeypatch.setenv("PIPELINE_CACHE", str(tmp_path / "cache"))
    return params


def run(cmd: str, params: dict[str, Any]) -> None:
    Path("params.yaml").write_text(json.dumps(params))
    done = CliRunner().invoke(app, cmd.split()[1:], catch_exceptions=False)
    assert done.exit_code == 0, f"{cmd}: {done.output}"


def files() -> dict[Path, int]:
    """Files here and when they were written."""
    found = [path for path in Path().rglob("*") if path.is_file() and path.name != "params.yaml"]
    return {path: path.stat().st_mtime_ns for path in found}


def within(path: Path, outs: list[str]) -> bool:
    return any(path.is_relative_to(out) for out in outs)


def test_a_stage_by_hand_writes_its_outs_alone_and_looks_at_its_params_alone(
    tmp_path: Path, small: dict[str, Any]
) -> None:
    """Every command of the DAG, with all params and with those that its stage declares."""
    (tmp_path / "dag").mkdir()
    for name, stage in resolve(tmp_path / "dag", json.dumps(small)).items():
        before = files()
        run(stage.cmd, small)
        after = files()
        written = [path for path in after if before.get(path) != after[path]]
        for out in stage.outs:
            assert any(within(path, [out]) for path in written), f"{name}: no {out}"
        assert [path for path in written if not within(path, [*stage.outs, TIMES])] == [], name
        content = {path: path.read_bytes() for path in written if not within(path, [TIMES])}

        declared = copy.deepcopy(UNUSED)
        for key in stage.params:
            put(declared, key, take(small, key))
        run(stage.cmd, declared)
        changed = [path for path, before in content.items() if path.read_bytes() != before]
        assert not changed, f"{name}: {changed}"
