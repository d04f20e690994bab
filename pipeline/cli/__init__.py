"""The console script `pipeline`: commands, and how errors end them."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path
from typing import Annotated

import typer

from pipeline import __version__
from pipeline.cli.ablate import ablate_app
from pipeline.cli.app import view_app
from pipeline.cli.cache import cache_app
from pipeline.cli.common import PARAMS, ExecutorName, Session
from pipeline.cli.demo import demo_app
from pipeline.cli.docs import docs_app
from pipeline.cli.doctor import doctor_app
from pipeline.cli.export import export_app
from pipeline.cli.imports import import_app
from pipeline.cli.licences import licences_app
from pipeline.cli.new import new_app
from pipeline.cli.plus import plus_app
from pipeline.cli.predict import predict_app
from pipeline.cli.reproduce import reproduce_app
from pipeline.cli.rounds import rounds_app
from pipeline.cli.selfmask import selfmask_app
from pipeline.cli.serve import serve_app
from pipeline.cli.stages import stages_app
from pipeline.cli.weights import weights_app
from pipeline.errors import PipelineError, first_line
from pipeline.files import OUT_OF_SPACE, disk_fault
from pipeline.workspace.making import refuse_other_version

app = typer.Typer(
    name="pipeline",
    help="Name some categories, point at unlabelled images, get a segmenter.\n\n"
    "Each stage below is also a stage of dvc.yaml: `dvc repro` runs those that are out of date. "
    "By hand, `pipeline STAGE` does the same work on the same paths; options name others.\n\n"
    "The options here go before the command: `pipeline --params other.yaml --executor ray mask`."
    "\n\n`docs/NAME.md`, wherever it is named: `pipeline docs NAME` prints it.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
app.add_typer(new_app)
app.add_typer(docs_app)
app.add_typer(licences_app)
app.add_typer(stages_app)
app.add_typer(predict_app)
app.add_typer(export_app)
app.add_typer(rounds_app)
app.add_typer(plus_app)
app.add_typer(doctor_app)
app.add_typer(reproduce_app)
app.add_typer(serve_app)
app.add_typer(ablate_app)
app.add_typer(view_app)
app.add_typer(weights_app, name="weights", no_args_is_help=True)
app.add_typer(cache_app, name="cache", no_args_is_help=True)
app.add_typer(import_app, name="import", no_args_is_help=True)
app.add_typer(selfmask_app, name="selfmask", no_args_is_help=True)
app.add_typer(demo_app, name="demo", no_args_is_help=True)

# Packages whose errors are those of an object store or of the way there.
STORES = ("botocore", "aiobotocore", "aiohttp", "gcsfs", "google")
DVC_EXPERIMENTS = "/.dvc/tmp/exps/"  # in there DVC runs what it does not run in the workspace
# Lets torch run on the CPU what it has not for the GPU of a Mac; its error names it.
MPS_FALLBACK = "PYTORCH_ENABLE_MPS_FALLBACK"
WRONG_USAGE, INTERRUPTED = 2, 130  # exit statuses that Typer chooses
BEFORE_THE_COMMAND = ("--params", "--executor", "--ray-workers")


def main() -> None:
    """Run the command line; a user's mistake is one line on stderr and exit status 1."""
    warnings.filterwarnings("ignore", module=r"PIL\.")  # stages count and list unreadable images
    try:
        app()
    except PipelineError as error:
        sys.exit(f"error: {error}")
    except SystemExit as stop:
        if stop.code == WRONG_USAGE and not {*BEFORE_THE_COMMAND}.isdisjoint(sys.argv):
            print(f"{', '.join(BEFORE_THE_COMMAND)}: before the command's name", file=sys.stderr)
        if stop.code == INTERRUPTED:
            print("interrupted; the same command continues", file=sys.stderr)
        raise
    except OSError as error:
        sys.exit(_explain(error))
    except NotImplementedError as error:
        if MPS_FALLBACK not in str(error):
            raise
        sys.exit(
            f"error: device: mps: {first_line(error)} Set {MPS_FALLBACK}=1 to run it on the CPU"
        )
    except Exception as error:
        if type(error).__module__.partition(".")[0] not in STORES:
            raise
        sys.exit(f"error: {error}: look at the URL, the network and the credentials")


def _explain(error: OSError) -> str:
    """One line for a failed file operation; re-raises what is not about the user's disk."""
    fault = disk_fault(error)
    if fault is None:
        raise error
    message = f"error: {': '.join(fault)}"
    if error.errno in OUT_OF_SPACE:
        message += (
            " and run the same command again; "
            "nothing half-written was kept and finished work is reused"
        )
    return message


def _refuse_experiment_that_dvc_loses(folder: Path) -> None:
    """Stop a stage of `dvc exp run --temp` or of DVC's queue if the project is a shallow clone.

    DVC cannot bring such an experiment back, and reports success all the same.

    Raises:
        PipelineError: with what makes the clone whole.
    """
    project, is_experiment, _ = folder.as_posix().partition(DVC_EXPERIMENTS)
    above = [Path(project), *Path(project).parents]
    if is_experiment and any((root / ".git/shallow").is_file() for root in above):
        raise PipelineError(
            f"{project}: a shallow clone, in which DVC loses the experiments of `dvc exp run "
            "--temp` and of its queue: run `git fetch --unshallow` there first"
        )


def _version(wanted: bool) -> None:
    if wanted:
        print(f"pipeline {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    ctx: typer.Context,
    params: Annotated[
        Path, typer.Option(envvar="PIPELINE_PARAMS", help="The settings that a command reads.")
    ] = PARAMS,
    executor: Annotated[
        ExecutorName,
        typer.Option(
            envvar="PIPELINE_EXECUTOR",
            help="Where shards are made: here, or on the Ray cluster of $RAY_ADDRESS.",
        ),
    ] = "local",
    ray_workers: Annotated[
        int | None,
        typer.Option(
            envvar="PIPELINE_RAY_WORKERS",
            min=1,
            help="Actors of `--executor ray`; default: one a GPU, without GPUs one a core.",
        ),
    ] = None,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    del version
    if params != PARAMS and {"PIPELINE_PARAMS", "DVC_STAGE"} <= os.environ.keys():
        raise PipelineError(f"PIPELINE_PARAMS: {params}: DVC tracks {PARAMS}; unset the variable")
    _refuse_experiment_that_dvc_loses(Path.cwd())
    if "DVC_STAGE" in os.environ:
        refuse_other_version(Path.cwd())
    ctx.obj = Session(params_path=params, executor_name=executor, ray_workers=ray_workers)
