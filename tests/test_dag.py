"""dvc.yaml, the commands and params.py agree, and deps name the modules that a stage imports."""

from __future__ import annotations

import ast
import inspect
import shlex
import textwrap
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, get_args, get_origin

import pytest
import typer
from dvc.repo import Repo
from ruamel.yaml import YAML

from pipeline import cli
from pipeline.params.benches import FORMATS, BenchParams
from pipeline.params.sections import Params
from pipeline.presets import list_presets, preset_text
from tests.paths import ROOT

DVC_YAML = ROOT / "dvc.yaml"
STAGES: dict[str, dict[str, Any]] = YAML(typ="safe", pure=True).load(DVC_YAML.read_text())["stages"]

# DVC's own use of a library's older interface.
pytestmark = pytest.mark.filterwarnings("ignore:_NoneStep:DeprecationWarning")

KEY = "${key}"
EVERYWHERE = ("errors.py", "files.py", "params", "engine/runtime.py", "engine/progress.py")
# Files of the package that are data of the module beside them, by the module that reads them.
PACKAGE_DATA = {
    "pipeline/ablations/definitions.py": ["pipeline/presets/ablations"],
    "pipeline/vocabulary/categories.py": ["pipeline/vocabulary/category_sets"],
    "pipeline/models/weights/zoo.py": ["pipeline/models/weights/zoo.yaml"],
    "pipeline/demo/glyphs.py": ["pipeline/demo/glyphs.json"],
    "pipeline/stages/report.py": ["pipeline/report/report.css", "pipeline/report/report.html.j2"],
}
MAIN_MODULES = {"world": "pipeline/demo/world.py"}

# What the demo's encoders are; of no use with other encoders, but then of no harm.
SHIPPED_WEIGHTS = "models/demo"


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
    return paths(body(stage)["outs"]) + paths(body(stage).get("metrics", []))


def parse(words: list[str]) -> tuple[Any, dict[str, Any]]:
    """The command that the words of a command line name, and its options as it would get them."""
    group: Any = typer.main.get_command(cli.app)
    assert words.pop(0) == "pipeline"
    while hasattr(group, "commands"):
        group = group.commands[words.pop(0)]
    return group, group.make_context(group.name, words, resilient_parsing=False).params


def command_source(command: Any) -> ast.AST:
    return ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(command.callback))))


def with_defaults(command: Any, options: dict[str, Any]) -> dict[str, Any]:
    """Options where those left out have the value that the command gives them: `option or ...`."""
    filled = dict(options)
    for node in ast.walk(command_source(command)):
        if isinstance(node, ast.BoolOp) and isinstance(node.op, ast.Or):
            option, default = node.values
            assert isinstance(option, ast.Name)
            if filled[option.id] is None:
                code = compile(ast.Expression(default), command.callback.__module__, "eval")
                filled[option.id] = eval(code, vars(inspect.getmodule(command.callback)) | filled)
    return filled


def contains(folder: Path, path: str) -> bool:
    return Path(path).is_relative_to(folder)


@pytest.mark.parametrize("stage", STAGES)
def test_a_stages_command_exists_with_its_options(stage: str) -> None:
    command, _ = parse(shlex.split(body(stage)["cmd"]))
    assert command.name == stage


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_run_by_hand_uses_the_paths_of_the_dag(stage: str) -> None:
    words = shlex.split(body(stage)["cmd"])
    command, options = parse(list(words))
    required = next((words[at - 1 : at + 1] for at, word in enumerate(words) if word == KEY), [])
    head = words[: next(at for at, word in enumerate(words) if word.startswith("--"))]
    _, bare_options = parse([*head, *required])
    assert with_defaults(command, options) == with_defaults(command, bare_options)


@pytest.mark.parametrize("stage", STAGES)
def test_a_stages_paths_are_declared_and_nothing_else_is(stage: str) -> None:
    command, options = parse(shlex.split(body(stage)["cmd"]))
    used = {
        name: value
        for name, value in with_defaults(command, options).items()
        if isinstance(value, Path) and name != "params_path"
    }
    declared = [path for path in data_deps(stage) + outs(stage) if not path.startswith("${item.")]
    for name, path in used.items():
        assert any(contains(path, other) for other in declared), f"--{name} {path}"
    for path in set(declared) - {SHIPPED_WEIGHTS}:
        assert any(contains(folder, path) for folder in used.values()), path


def field_at(path: str) -> Any:
    """Annotation of a dotted key of params.yaml; fails where there is none."""
    section: Any = Params
    for part in path.split("."):
        if get_origin(section) is dict:
            _, section = get_args(section)
        else:
            assert part in section.model_fields, f"params.yaml has no {path}: {part} is unknown"
            section = section.model_fields[part].annotation
    return section


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
            assert path.removeprefix("${item.").removesuffix("}") in kind.model_fields


def params_used(tree: ast.AST) -> Iterator[str]:
    """Dotted keys `a.b` of every `params.a.b` that is not part of a longer one."""
    inner = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    for node in ast.walk(tree):
        if not isinstance(node, ast.Attribute) or id(node) in inner:
            continue
        parts: list[str] = []
        value: ast.expr = node
        while isinstance(value, ast.Attribute):
            parts.insert(0, value.attr)
            value = value.value
        if isinstance(value, ast.Name) and value.id == "params":
            yield ".".join(parts)


@pytest.mark.parametrize("stage", [stage for stage in STAGES if stage != "report"])
def test_a_stage_declares_the_params_that_its_command_hands_in(stage: str) -> None:
    """Every command hands in seed and device; a stage declares them if its result needs them."""
    command, _ = parse(shlex.split(body(stage)["cmd"]))
    table = STAGES[stage].get("foreach", "").removeprefix("${").removesuffix("}")
    keys = params_used(command_source(command))
    used = {f"{key}.{KEY}" if key == table else key for key in keys}
    declared = set(body(stage).get("params", []))
    assert used <= declared
    assert declared <= used | {"seed", "device"}


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
    return any(path.is_relative_to(Path("pipeline", other)) for other in EVERYWHERE)


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


def expected_code_deps(stage: str) -> list[str]:
    """Modules that a stage and its command import, and the data files that these read."""
    command, _ = parse(shlex.split(body(stage)["cmd"]))
    main_module = Path(MAIN_MODULES.get(stage, f"pipeline/stages/{stage}.py"))
    modules = closure({main_module} | imported_files(command_source(command)))
    files = {path.as_posix() for path in modules if path.name != "__init__.py"}
    return sorted(files.union(*(PACKAGE_DATA.get(module, []) for module in files)))


@pytest.mark.parametrize("stage", STAGES)
def test_deps_are_the_modules_that_a_stage_imports(stage: str) -> None:
    expected = expected_code_deps(stage)
    assert code_deps(stage) == expected, (
        f"the deps of {stage} in dvc.yaml, after its data, should be\n"
        + "".join(f"        - {path}\n" for path in expected)
    )
    assert paths(body(stage)["deps"]) == data_deps(stage) + code_deps(stage)


def test_every_data_file_of_the_package_belongs_to_a_module() -> None:
    known = [Path(path) for entries in PACKAGE_DATA.values() for path in entries]
    known.append(Path("pipeline/presets"))
    for path in (ROOT / "pipeline").rglob("*"):
        if path.is_file() and path.suffix not in (".py", ".pyc"):
            relative = path.relative_to(ROOT)
            assert any(relative.is_relative_to(other) for other in known), relative


def graph(folder: Path, preset: str) -> dict[str, set[str]]:
    """DVC's own reading of dvc.yaml with a preset: the stages that each stage waits for."""
    (folder / "dvc.yaml").write_bytes(DVC_YAML.read_bytes())
    (folder / "params.yaml").write_text(preset_text(preset))
    with Repo.init(str(folder), no_scm=True) as repo:
        edges = repo.index.graph
        return {
            stage.name: {other.name for other in edges.successors(stage)} for stage in edges.nodes
        }


def test_dvc_joins_the_demos_stages_by_their_files(tmp_path: Path) -> None:
    assert graph(tmp_path, "demo") == {
        "world@demo": set(),
        "embed@demo": {"world@demo"},
        "retrieve": {"embed@demo"},
        "mask": {"retrieve"},
        "pseudo_label": {"mask"},
        "train": {"pseudo_label"},
        "evaluate@voc": {"train", "world@demo"},
        "audit@demo": {"retrieve", "pseudo_label", "world@demo"},
        "report": {
            *("world@demo", "embed@demo", "retrieve", "mask", "pseudo_label"),
            *("train", "evaluate@voc", "audit@demo"),
        },
    }


@pytest.mark.parametrize("preset", [name for name, _ in list_presets() if name != "demo"])
def test_dvc_reads_the_dag_with_every_preset(tmp_path: Path, preset: str) -> None:
    stages = set(graph(tmp_path, preset))
    assert {"retrieve", "mask", "pseudo_label", "train", "report"} <= stages
    assert any(stage.startswith("embed@") for stage in stages)
    assert not any(stage.startswith("world@") for stage in stages)
