"""Write the README's picture and shortened output from a real run: `python docs/first_screen.py RUN`."""

from __future__ import annotations

import sys
import textwrap
from pathlib import Path

from analysis.interpretation import interpret
from probing.results import ProbeResults

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- output:begin (written by docs/first_screen.py) -->", "<!-- output:end -->"


def first_screen(results: ProbeResults) -> str:
    """The table, verdict and strata of a run, shortened, as a fenced block."""
    interpretation = interpret(results)
    lines = results.to_markdown().splitlines()
    table = [line for line in lines if line.startswith("|")]
    verdict = interpretation.verdict
    words = [
        f"Verdict: {verdict['verdict']}. {verdict['sentence']}",
        "Strata:  " + interpretation.suggestion.explain().splitlines()[0],
    ]
    wrapped = [line for text in words for line in textwrap.wrap(text, 118, subsequent_indent="         ")]
    strata = [line for line in interpretation.suggestion.config.describe().splitlines() if "[" in line]
    return "\n".join(["```", *table, "", *wrapped, "", *strata, "```"])


def main(run: str) -> None:
    """Replace the block between the markers, and the picture."""
    results = ProbeResults.load(run)
    readme = ROOT / "README.md"
    before, rest = readme.read_text(encoding="utf-8").split(BEGIN)
    after = rest.split(END)[1]
    readme.write_text(f"{before}{BEGIN}\n{first_screen(results)}\n{END}{after}", encoding="utf-8")
    picture = ROOT / "docs" / "images" / "layers.png"
    picture.parent.mkdir(exist_ok=True)
    picture.write_bytes((Path(run) / "figures" / "layers.png").read_bytes())


if __name__ == "__main__":
    main(sys.argv[1])
