"""Linter, formatter, type checker and import contracts are part of the tests; imports and --help stay light."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.paths import ROOT

pytestmark = pytest.mark.skipif(not (ROOT / "spafit").is_dir(), reason="runs in a checkout, not beside a wheel")


def _run(*command: str) -> None:
    done = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_ruff_finds_nothing():
    _run("ruff", "check", ".")


def test_code_is_formatted():
    _run("ruff", "format", "--check", ".")


@pytest.mark.timeout(600)
def test_types_check():
    _run("mypy")


def test_import_contracts_hold():
    code = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports())"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


WATCH = """
import json, logging, os, random, sys, warnings
before = (dict(os.environ), list(warnings.filters), logging.getLogger().handlers[:], random.getstate())
import spafit, probing, analysis, {modules}
after = (dict(os.environ), list(warnings.filters), logging.getLogger().handlers[:], random.getstate())
heavy = [m for m in ("torch", "transformers", "sklearn", "matplotlib", "datasets", "pandas") if m in sys.modules]
print(json.dumps([[a == b for a, b in zip(before, after)], heavy]))
"""


def test_importing_has_no_side_effects_and_loads_nothing_heavy():
    code = WATCH.format(modules="analysis.cli.main, spafit.strata, spafit.errors")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    unchanged, heavy = json.loads(done.stdout)
    assert unchanged == [True] * 4
    assert heavy == []


def test_every_public_name_is_there():
    import analysis
    import probing
    import spafit

    for package in (spafit, probing, analysis):
        for name in package.__all__:
            assert getattr(package, name) is not None
        with pytest.raises(AttributeError):
            _ = package.no_such_name
