"""What an installed distribution must hold: typing markers, templates, entry points, the command."""

from __future__ import annotations

import subprocess
import sys
import time
from importlib.metadata import entry_points
from importlib.resources import files

import pytest


@pytest.mark.parametrize("package", ["spafit", "probing", "analysis"])
def test_packages_are_typed(package):
    assert (files(package) / "py.typed").is_file()


def test_the_report_template_is_packaged():
    assert (files("analysis") / "templates" / "report.html.j2").is_file()


def test_commands_and_task_sources_are_entry_points():
    assert {"spafit", "spafit-probe"} <= {e.name for e in entry_points(group="console_scripts")}
    assert "core" in {e.name for e in entry_points(group="spafit.tasks")}


def test_help_answers_without_loading_anything_heavy():
    code = (
        "import sys; sys.argv = ['spafit-probe', '--help']\n"
        "from analysis.cli.main import probe_entry\n"
        "try: probe_entry()\n"
        "except SystemExit as e: assert not e.code\n"
        "heavy = {'torch', 'transformers', 'pandas', 'sklearn', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    begun = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "--model" in done.stdout
    assert time.perf_counter() - begun < 30  # a hang, not a speed claim: tests/bench measures that
