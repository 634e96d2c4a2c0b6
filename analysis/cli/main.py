"""The umbrella command ``spafit`` and the front door ``spafit-probe``; commands import their work when they run."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

import typer

from analysis.cli.breakdown import EXAMPLES as BREAKDOWN_EXAMPLES
from analysis.cli.breakdown import breakdown
from analysis.cli.cache import cache_app
from analysis.cli.cite import cite
from analysis.cli.compare import EXAMPLES as COMPARE_EXAMPLES
from analysis.cli.compare import compare
from analysis.cli.generate import EXAMPLES as GENERATE_EXAMPLES
from analysis.cli.generate import generate
from analysis.cli.glue import EXAMPLES as GLUE_EXAMPLES
from analysis.cli.glue import glue
from analysis.cli.localize import EXAMPLES as LOCALIZE_EXAMPLES
from analysis.cli.localize import localize
from analysis.cli.probe import EXAMPLES, probe
from analysis.cli.report import report
from analysis.cli.search import EXAMPLES as SEARCH_EXAMPLES
from analysis.cli.search import search
from analysis.cli.sensitivity import EXAMPLES as SENSITIVITY_EXAMPLES
from analysis.cli.sensitivity import sensitivity
from analysis.cli.suggest import EXAMPLES as SUGGEST_EXAMPLES
from analysis.cli.suggest import suggest
from analysis.cli.summarize import summarize
from analysis.cli.tasks import tasks_app
from analysis.cli.tradeoff import EXAMPLES as TRADEOFF_EXAMPLES
from analysis.cli.tradeoff import tradeoff
from analysis.cli.train import EXAMPLES as TRAIN_EXAMPLES
from analysis.cli.train import train
from analysis.cli.use import evaluate, merge, predict

app = typer.Typer(
    name="spafit",
    help="Probe every layer of a transformer, test the layer-localization hypothesis, suggest strata, and train them.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("probe", epilog=EXAMPLES)(probe)
app.command("train", epilog=TRAIN_EXAMPLES)(train)
app.command("evaluate")(evaluate)
app.command("predict")(predict)
app.command("generate", epilog=GENERATE_EXAMPLES)(generate)
app.command("merge")(merge)
app.command("glue", epilog=GLUE_EXAMPLES)(glue)
app.command("compare", epilog=COMPARE_EXAMPLES)(compare)
app.command("localize", epilog=LOCALIZE_EXAMPLES)(localize)
app.command("suggest", epilog=SUGGEST_EXAMPLES)(suggest)
app.command("search", epilog=SEARCH_EXAMPLES)(search)
app.command("tradeoff", epilog=TRADEOFF_EXAMPLES)(tradeoff)
app.command("sensitivity", epilog=SENSITIVITY_EXAMPLES)(sensitivity)
app.command("breakdown", epilog=BREAKDOWN_EXAMPLES)(breakdown)
app.command("report")(report)
app.command("summarize")(summarize)
app.command("cite")(cite)
app.add_typer(tasks_app, name="tasks")
app.add_typer(cache_app, name="cache")

probe_app = typer.Typer(
    name="spafit-probe",
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
probe_app.command(epilog=EXAMPLES)(probe)


def main() -> None:
    """Entry point of ``spafit``."""
    run_guarded(app)


def probe_entry() -> None:
    """Entry point of ``spafit-probe``."""
    run_guarded(probe_app)


def run_guarded(command: Callable[[], object]) -> None:
    """Run a command line: one sentence and an exit status instead of a traceback, unless ``--debug`` is given."""
    from spafit.errors import SpafitError, UsageError

    debug = "--debug" in sys.argv
    sys.argv = [a for a in sys.argv if a != "--debug"]  # every command takes it, wherever it stands
    try:
        command()
    except SpafitError as error:
        if debug:
            raise
        sys.stderr.write(f"Error: {error}\n")
        sys.exit(2 if isinstance(error, UsageError) else 1)
    except BrokenPipeError:  # the reader of stdout went away, as with `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
