"""The command line: what it lists, how it fails, and with which exit status."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import pytest
import torch

from pipeline import __version__
from pipeline.cli import main
from pipeline.cli.common import Session
from pipeline.engine.ray_executor import RayExecutor
from pipeline.engine.shard_run import LocalExecutor
from pipeline.params.reading import read_params
from pipeline.presets import list_presets
from tests.paths import ROOT

STAGES = ["embed", "retrieve", "mask", "bank", "pseudo_label", "train", "evaluate", "report"]
PATIENCE_S = 120
FULL_DEVICE = Path("/dev/full")

Cli = Callable[..., subprocess.CompletedProcess[str]]

TINY_WORLD = """\
categories: [cat]
index: {demo: {root: data/demo/index}}
worlds: {demo: {index_images: 6, bench_images: 4, size: 48}, endless: {index_images: 100000}}
"""


def command(*args: str) -> list[str]:
    return [sys.executable, "-c", "from pipeline.cli import main; main()", *args]


def environment() -> dict[str, str]:
    """The environment with this checkout on the path and plain, wide output."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {
        "PYTHONPATH": os.pathsep.join(paths),
        "COLUMNS": "200",
        "NO_COLOR": "1",
        "TERM": "dumb",
    }


def default_interrupt() -> None:
    """A background job of a shell, as these tests may be one, has its children ignore Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def cli(tmp_path: Path) -> Cli:
    """Function that runs `pipeline ARGS` in `tmp_path`, as a process of its own."""

    def run(*args: str, stdout: int | IO[Any] = subprocess.PIPE) -> Any:
        return subprocess.run(
            command(*args),
            cwd=tmp_path,
            env=environment(),
            stdout=stdout,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
            timeout=PATIENCE_S,
        )

    return run


@pytest.fixture
def mistake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Function that runs `pipeline ARGS` here and returns the one line it ends with."""

    def run(*args: str) -> str:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["pipeline", *args])
        with pytest.raises(SystemExit) as stop:
            main()
        # A SystemExit that carries a text prints it on stderr and exits with status 1.
        assert isinstance(stop.value.code, str)
        return stop.value.code

    return run


def test_help_lists_every_stage_in_order(cli: Cli) -> None:
    done = cli("--help")
    assert done.returncode == 0
    listed = re.findall(r"^\W*([a-z_]+)\b", done.stdout, flags=re.MULTILINE)
    assert [name for name in listed if name in STAGES] == STAGES
    assert {"init", "predict", "audit", "demo"} <= set(listed)


def test_without_arguments_the_help_is_shown(cli: Cli) -> None:
    done = cli()
    assert "Usage" in done.stdout + done.stderr
    assert "pseudo_label" in done.stdout + done.stderr


def test_the_version_is_the_packages(cli: Cli) -> None:
    done = cli("--version")
    assert (done.returncode, done.stdout) == (0, f"pipeline {__version__}\n")


@pytest.mark.parametrize(
    ("args", "named"),
    [
        (["embd"], "embd"),
        (["retrieve", "--embedings", "x"], "--embedings"),
        (["evaluate"], "--bench"),
    ],
)
def test_wrong_usage_exits_with_2(cli: Cli, args: list[str], named: str) -> None:
    done = cli(*args)
    assert done.returncode == 2
    assert named in done.stderr
    assert "Traceback" not in done.stderr


def test_help_waits_for_no_large_package() -> None:
    code = "import sys; from pipeline.cli import app; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=True
    )
    assert {"torch", "numpy", "pyarrow", "pydantic"}.isdisjoint(done.stdout.split())


def test_an_option_of_all_commands_stands_before_the_command(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(TINY_WORLD)
    done = cli("demo", "world", "--params", "mine.yaml")
    assert done.returncode == 2
    assert done.stderr.endswith("--params, --executor, --ray-workers: before the command's name\n")
    assert cli("--params", "mine.yaml", "demo", "world").returncode == 0
    assert (tmp_path / "data/demo/voc").is_dir()


def test_the_environment_can_choose_the_params(
    tmp_path: Path, mistake: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIPELINE_PARAMS", "mine.yaml")
    assert mistake("demo", "world").startswith("error: mine.yaml: no such file")
    assert mistake("--params", "other.yaml", "demo", "world").startswith("error: other.yaml: no")
    # DVC would store what comes out under the settings of params.yaml.
    monkeypatch.setenv("DVC_STAGE", "world@demo")
    message = "error: PIPELINE_PARAMS: mine.yaml: DVC tracks params.yaml; unset the variable"
    assert mistake("demo", "world") == message
    assert names(tmp_path) == []


def test_the_environment_can_choose_the_executor(
    mistake: Callable[..., str], cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIPELINE_EXECUTOR", "cloud")
    done = cli("mask")
    assert done.returncode == 2
    assert "'cloud'" in done.stderr
    assert mistake("--executor", "local", "mask").startswith("error: params.yaml: no such file")
    monkeypatch.setenv("PIPELINE_EXECUTOR", "ray")
    monkeypatch.setenv("PIPELINE_RAY_WORKERS", "0")
    assert "--ray-workers" in cli("mask").stderr


def test_a_session_makes_the_executor_that_was_asked_for(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    path = tmp_path / "params.yaml"
    path.write_text(TINY_WORLD)
    local = Session(params_path=path, executor_name="local", ray_workers=None)
    assert isinstance(local.executor(), LocalExecutor)
    ray = Session(params_path=path, executor_name="ray", ray_workers=2)
    assert isinstance(ray.executor(), RayExecutor)


def test_a_session_computes_on_the_threads_of_the_params(tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    path.write_text(f"{TINY_WORLD}threads: 3\n")
    before = torch.get_num_threads()
    try:
        assert Session(params_path=path, executor_name="local", ray_workers=None).runtime
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_ablations_vary_the_params_of_the_dag(mistake: Callable[..., str]) -> None:
    assert mistake("--params", "mine.yaml", "ablate", "k") == (
        "error: --params: mine.yaml: DVC's experiments vary params.yaml; leave it out"
    )


def test_a_mistake_in_the_params_is_one_line_on_stderr(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_text(f"{TINY_WORLD}train: {{iteratoins: 3}}\n")
    done = cli("demo", "world")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        "error: params.yaml: unknown key 'train.iteratoins'; did you mean 'iterations'?\n"
    )
    assert names(tmp_path) == ["params.yaml"]


def test_missing_params_tell_how_to_get_some(mistake: Callable[..., str]) -> None:
    assert mistake("demo", "world").startswith("error: params.yaml: no such file; `pipeline init")


@pytest.mark.parametrize(
    ("args", "section", "known"),
    [
        (["embed", "--source", "nope"], "index", "demo"),
        (
            ["evaluate", "--bench", "nope"],
            "benches",
            "voc; `pipeline benches` lists the shipped ones",
        ),
        (["audit", "--name", "nope"], "audits", "none"),
        (["demo", "world", "--name", "nope"], "worlds", "demo, endless"),
    ],
)
def test_an_unknown_name_lists_the_known_ones(
    tmp_path: Path, mistake: Callable[..., str], args: list[str], section: str, known: str
) -> None:
    (tmp_path / "mine.yaml").write_text(
        f"{TINY_WORLD}benches: {{voc: {{format: voc, root: data/voc}}}}\n"
    )
    assert mistake("--params", "mine.yaml", *args) == (
        f"error: mine.yaml: 'nope' is not under `{section}:`; there are: {known}"
    )
    assert names(tmp_path) == ["mine.yaml"]


def test_a_path_that_cannot_be_written_is_a_mistake(
    tmp_path: Path, mistake: Callable[..., str]
) -> None:
    (tmp_path / "file").write_text("mine")
    message = mistake("init", "--preset", "demo", "--out", "file/params.yaml")
    assert message.startswith("error: ")
    assert "file" in message
    assert message.endswith(": make it writable or choose another path")
    assert (tmp_path / "file").read_text() == "mine"


COMMANDS_WITH_OUTPUTS = [
    ["embed", "--source", "demo", "--out"],
    ["embed", "--source", "demo", "--stats"],
    ["retrieve", "--out"],
    ["mask", "--out"],
    ["bank", "--out"],
    ["pseudo_label", "--out"],
    ["pseudo_label", "--stats"],
    ["train", "--out"],
    ["train", "--live"],
    ["predict_bench", "--bench", "voc", "--out"],
    ["score", "--bench", "voc", "--out"],
    ["evaluate", "--bench", "voc", "--out"],
    ["evaluate", "--bench", "voc", "--predictions"],
    ["audit", "--name", "demo", "--out"],
    ["report", "--out"],
    ["predict", "photo.jpg", "--out"],
    ["import", "archives", "--from", "archives.json", "--out"],
    ["import", "embeddings", "--from", "x.pkl", "--source", "a", "--encoder", "b", "--out"],
    ["demo", "world", "--out"],
    ["demo", "picture", "--out"],
    ["demo", "pretrain", "--work"],
]


@pytest.mark.parametrize("place", ["file/below", "nowhere/below", "circle/below", "/dev/null/x"])
@pytest.mark.parametrize("args", COMMANDS_WITH_OUTPUTS, ids=" ".join)
def test_an_output_that_cannot_be_made_is_a_mistake_before_anything_is_read(
    tmp_path: Path, mistake: Callable[..., str], args: list[str], place: str
) -> None:
    """No params, shards or checkpoint are here: the output is what is looked at first."""
    (tmp_path / "file").write_text("mine")
    (tmp_path / "nowhere").symlink_to("gone")
    (tmp_path / "circle").symlink_to("circle")
    message = mistake(*args, place)
    assert message.startswith("error: ")
    assert place.removesuffix("/below").removesuffix("/x") in message
    assert message.endswith("choose another path")
    assert names(tmp_path) == ["circle", "file", "nowhere"]


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs /proc, which Linux has")
def test_a_place_that_takes_no_files_is_a_mistake(mistake: Callable[..., str]) -> None:
    assert mistake("predict", "photo.jpg", "--out", "/proc/predictions") == (
        "error: /proc/predictions: /proc takes no files; choose another path"
    )


def test_a_file_is_no_folder_and_a_folder_no_file(
    tmp_path: Path, mistake: Callable[..., str]
) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    assert "Not a directory" in mistake("mask", "--out", "file")
    assert "Is a directory" in mistake("retrieve", "--out", "folder")
    assert mistake("init", "--preset", "demo", "--out", "folder") == (
        "error: folder: is a folder; name the file, such as folder/params.yaml"
    )


def test_a_repeated_category_is_a_mistake(tmp_path: Path, mistake: Callable[..., str]) -> None:
    message = mistake("init", "--preset", "folder", "--categories", "cat,dog,Cat")
    assert message.startswith("error: --categories: 'Cat' is listed twice")
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    ("text", "listed"),
    [
        ('"hammer, claw",saw', ["hammer, claw", "saw"]),
        ('saw, "hammer, claw"', ["saw", "hammer, claw"]),
        ('"12"" ruler", 5\' pole', ['12" ruler', "5' pole"]),
    ],
)
def test_a_name_with_a_comma_is_quoted(cli: Cli, tmp_path: Path, text: str, listed: list) -> None:
    assert cli("init", "--preset", "folder", "--categories", text).returncode == 0
    assert read_params(tmp_path / "params.yaml").categories == listed


@pytest.mark.parametrize("command", ["init", "predict"])
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('cat,"hammer, claw', 'cat,"hammer, claw: not names between commas .* as in CSV'),
        ('"cat"dog', "not names between commas"),
        ("cat,dog,", "name 3 of 3 is empty"),
        ("", "the list is empty"),
        ("dog & cat,dog &amp; cat", "are the same to the encoder"),
    ],
)
def test_mistakes_in_the_names_name_the_option(
    tmp_path: Path, mistake: Callable[..., str], command: str, text: str, message: str
) -> None:
    args = {"init": ["--preset", "folder"], "predict": ["photo.jpg", "--out", "out"]}[command]
    (tmp_path / "mine.yaml").write_text(TINY_WORLD)
    found = mistake("--params", "mine.yaml", command, *args, "--categories", text)
    assert re.search(f"^error: --categories: .*{message}", found)


def test_names_outside_a_closed_list_are_refused_before_the_work(
    tmp_path: Path, mistake: Callable[..., str]
) -> None:
    message = "'person' is none of the 2036 names that photo_clip knows"
    args = ("--preset", "folder-offline", "--categories", "cat,person")
    assert mistake("init", *args).startswith(f"error: --categories: {message}")
    assert names(tmp_path) == []
    config = {"student": "zutis", "categories": ["cat"], "background": ["background"], "step": 1}
    encoder = {"model": "photo_clip", "pretrained": "photo_clip"}
    config |= {"encoder": encoder, "architecture": {}, "templates": "name", "logit_scale": 1.0}
    (tmp_path / "zutis").mkdir()
    (tmp_path / "zutis/config.json").write_text(json.dumps(config))
    (tmp_path / "mine.yaml").write_text(
        f"{TINY_WORLD}embed: {{encoder: {json.dumps(encoder)}}}\n".replace("[cat]", "[cat, person]")
    )
    for command in (["embed", "--source", "demo"], ["retrieve"]):
        found = mistake("--params", "mine.yaml", *command)
        assert found.startswith(f"error: mine.yaml: categories: {message}")
    text = (tmp_path / "mine.yaml").read_text().replace("[cat, person]", "[cat]")
    (tmp_path / "mine.yaml").write_text(f"{text}background: [person]\n")
    found = mistake("--params", "mine.yaml", "embed", "--source", "demo")
    assert found.startswith(f"error: mine.yaml: background: {message}")
    args = ("predict", "photo.jpg", "--out", "out", "--checkpoint", "zutis")
    found = mistake("--params", "mine.yaml", *args, "--categories", "cat,person")
    assert found.startswith(f"error: --categories: {message}")


def test_a_category_may_not_be_a_name_of_the_background(
    tmp_path: Path, mistake: Callable[..., str]
) -> None:
    (tmp_path / "params.yaml").write_text(f"{TINY_WORLD}background: [nothing, Cat]\n")
    message = mistake("retrieve")
    assert message == "error: categories: 'cat' is the background (label id 0) already; remove it"


def test_init_writes_every_preset_that_it_lists(cli: Cli, tmp_path: Path) -> None:
    listing = cli("init", "--preset", "list")
    assert listing.returncode == 0
    listed = [line.split()[0] for line in listing.stdout.splitlines()]
    assert listed == [name for name, _ in list_presets()]

    done = cli("init", "--preset", "demo")
    assert done.returncode == 0
    assert "dvc repro" in done.stdout
    assert (tmp_path / "params.yaml").read_bytes() == (ROOT / "params.yaml").read_bytes()


def test_init_keeps_an_existing_file_unless_forced(cli: Cli, tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    path.write_text("mine\n")
    done = cli("init", "--preset", "demo")
    assert (done.returncode, done.stderr) == (
        1,
        "error: params.yaml: exists already; add --force to overwrite it\n",
    )
    assert path.read_text() == "mine\n"
    assert cli("init", "--preset", "demo", "--force").returncode == 0
    assert path.read_bytes() == (ROOT / "params.yaml").read_bytes()


def test_init_fills_in_my_photos_and_my_names(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    done = cli(
        *("init", "--preset", "folder", "--images", "photos"),
        *("--categories", "cat, potted plant", "--out", "sub/mine.yaml"),
    )
    assert done.returncode == 0
    params = read_params(tmp_path / "sub" / "mine.yaml")
    assert params.categories == ["cat", "potted plant"]
    assert [source.root for source in params.index.values()] == [Path("photos")]


@pytest.mark.skipif(not FULL_DEVICE.exists(), reason="needs /dev/full, a Linux device")
def test_a_full_disk_is_one_line_and_keeps_nothing_half_written(
    tmp_path: Path, mistake: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every write to the full device fails as on a full disk, here that of the summary line."""
    (tmp_path / "params.yaml").write_text(TINY_WORLD)
    with FULL_DEVICE.open("w", buffering=1) as full:
        monkeypatch.setattr(sys, "stdout", full)
        message = mistake("demo", "world")
        monkeypatch.undo()
        with pytest.raises(OSError, match="No space left"):
            full.close()
    assert message.startswith("error: no space left on the disk (data/demo): free some")
    assert not (tmp_path / "data").exists()


@pytest.mark.skipif(os.name == "nt", reason="needs POSIX signals")
def test_an_interrupted_stage_says_so_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_text(TINY_WORLD)
    with subprocess.Popen(
        command("demo", "world", "--name", "endless"),
        cwd=tmp_path,
        env=environment(),
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=default_interrupt,
    ) as process:
        give_up = time.monotonic() + PATIENCE_S
        while not list(tmp_path.glob("data/.endless.*/index/*.jpg")):
            assert process.poll() is None
            assert time.monotonic() < give_up
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 130
    assert stderr.splitlines()[-1] == "interrupted; the same command continues"
    assert "Traceback" not in stderr
    assert names(tmp_path) == ["params.yaml"]


def test_an_experiment_that_dvc_would_lose_is_refused(tmp_path: Path) -> None:
    """A real one: DVC runs it in a folder of its own and exits with 0 where nothing stops it."""
    whole, shallow = tmp_path / "whole", tmp_path / "shallow"
    whole.mkdir()

    def run(folder: Path, *words: str) -> tuple[int, str]:
        done = subprocess.run(
            words, cwd=folder, env=environment(), capture_output=True, text=True, check=False
        )
        return done.returncode, done.stdout + done.stderr

    dvc = (sys.executable, "-m", "dvc")
    commit = ("git", "-c", "user.name=test", "-c", "user.email=test@example.org", "commit")
    (whole / "params.yaml").write_text(f"{TINY_WORLD}seed: 0\n")
    (whole / "dvc.yaml").write_text(
        f"stages: {{world: {{cmd: {sys.executable} -m pipeline demo world, params: [seed]}}}}\n"
    )
    for words in (("git", "init"), (*dvc, "init"), ("git", "add", "."), (*commit, "-m", "one")):
        assert run(whole, *words)[0] == 0
    (whole / "more").touch()
    for words in (("git", "add", "."), (*commit, "-m", "two")):
        assert run(whole, *words)[0] == 0
    assert run(tmp_path, "git", "clone", "--depth", "1", whole.as_uri(), "shallow")[0] == 0

    experiment = (*dvc, "exp", "run", "--temp", "--name", "five", "--set-param", "seed=5")
    status, output = run(shallow, *experiment)
    assert status != 0
    assert f"error: {shallow}: a shallow clone, in which DVC loses" in output
    assert run(shallow, "git", "fetch", "--unshallow")[0] == 0
    assert run(shallow, *experiment)[0] == 0
    assert "[five]" in run(shallow, *dvc, "exp", "list")[1]
