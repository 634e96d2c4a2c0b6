"""The report holds everything in itself, escapes everything, says every number, and gives the same bytes twice."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest

from analysis.citations import REFERENCES, bibtex, used
from analysis.report import MAX_BYTES, write_report
from analysis.report_content import caveats, report_content
from analysis.report_items import MAX_TEXT, browsable_items, json_for_script
from probing.tables import bracket, reported
from spafit.errors import UsageError
from tests import report_fixtures as made

FEW = tuple(s for s in made.CORE if s[0].split(".")[1] in ("word_content", "dependency", "odd_man_out", "first_letter"))
HOSTILE = "</script><script>document.title='owned'</script><img src=x onerror=alert(1)> \"'&amp; \u2028 {{ 7 * 7 }}"
CHROMIUM = next((p for p in map(shutil.which, ("chromium", "chromium-browser", "google-chrome")) if p), None)


class Page(HTMLParser):
    """Elements, links and scripts of a page, as a browser would find them."""

    def __init__(self, text: str):
        super().__init__(convert_charrefs=True)
        self.tags: list[str] = []
        self.outside: list[str] = []
        self.targets: list[str] = []
        self.ids: list[str] = []
        self.handlers: list[str] = []
        self.scripts: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag == "script":
            self.scripts.append("")
        for name, value in ((k, v or "") for k, v in attrs):
            if value.startswith("data:image/png;base64,"):
                continue  # inside the page
            if name in ("src", "href", "xlink:href", "srcset", "action", "data", "poster"):
                (self.targets if value.startswith("#") else self.outside).append(value)
            if name == "id":
                self.ids.append(value)
            if name.startswith("on"):
                self.handlers.append(value)

    def handle_data(self, data):
        if self.lasttag == "script" and self.scripts and not data.isspace():
            self.scripts[-1] += data
        else:
            self.text += data


@pytest.fixture(scope="module")
def results():
    return made.results(tasks=FEW)


@pytest.fixture(scope="module")
def written(results, tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    items = dict(results.item_tables)
    odd = items["core.odd_man_out"]
    right = odd["prediction"] == odd["label"]
    items["core.odd_man_out"] = odd.assign(
        text=HOSTILE, label=HOSTILE, prediction=odd["prediction"].where(~right, HOSTILE)
    )
    run = json.loads(json.dumps(results.run))
    run["model"]["name"] = HOSTILE
    run["command"] = run["warnings"][0] = HOSTILE
    run["tasks"]["core.dependency"] |= {"description": HOSTILE, "source": HOSTILE, "notes": [HOSTILE]}
    run["tasks"]["ewt.upos"] = {"status": "failed", "error": HOSTILE}
    verdict = made.verdict() | {"sentence": HOSTILE}
    hostile = replace(results, run=run, item_tables=items)
    paths = write_report(hostile, verdict=verdict, suggestion=made.suggestion(), folder=folder)
    return folder, paths, hostile, verdict


@pytest.fixture(scope="module")
def html(written):
    return (written[0] / "report.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(html):
    return Page(html)


def test_the_page_markdown_and_figures_are_written_and_small(written):
    folder, paths, _, _ = written
    names = [p.relative_to(folder).as_posix() for p in paths]
    assert names == [
        "report.html", "report.md", "figures/layers.png", "figures/tasks.png", "figures/heatmap.png"
    ]  # fmt: skip
    assert all(p.stat().st_size > 1000 for p in paths)
    assert paths[0].stat().st_size < MAX_BYTES


def test_nothing_is_loaded_from_anywhere(html, page):
    assert page.outside == []
    assert set(t[1:] for t in page.targets) <= set(page.ids)
    assert "link" not in page.tags
    assert "iframe" not in page.tags
    styles = " ".join(re.findall(r"<style>(.*?)</style>", html, re.DOTALL))
    assert "@import" not in styles
    assert "url(" not in styles
    assert set(re.findall(r"url\(([^)]*)\)", html)) == {u for u in re.findall(r"url\(([^)]*)\)", html) if u[0] == "#"}
    assert not re.search(r"fetch\(|XMLHttpRequest|import\(|WebSocket|sendBeacon|eval\(|innerHTML", page.scripts[-1])


def test_ids_are_unique_with_several_figures_in_one_page(page):
    assert len(page.ids) == len(set(page.ids))
    assert page.tags.count("svg") >= 3


def test_hostile_names_and_items_stay_text(html, page):
    assert page.tags.count("script") == 2, "the data and the page's own script"
    assert "img" not in page.tags
    assert page.handlers == []
    assert "{{ 7 * 7 }}" in html, "not evaluated as a template"
    assert page.text.count("document.title='owned'") >= 7, "shown where it was given"
    items = json.loads(page.scripts[0])
    entry = next(e for e in items if e["task"] == "odd_man_out")
    assert entry["items"][0][0] == HOSTILE[:MAX_TEXT]
    assert entry["labels"][entry["items"][0][2]] == HOSTILE


def test_json_for_a_script_element_reads_back_and_holds_no_markup():
    content = {"a": [HOSTILE, "<!--", "]]>", "\u2029", 1.5, None]}
    text = json_for_script(content)
    assert json.loads(text) == content
    assert not set(text) & set("<>&\u2028\u2029")


def test_every_reported_score_and_summary_is_in_the_page_and_in_the_markdown(written, page):
    folder, _, results, _ = written
    markdown = (folder / "report.md").read_text(encoding="utf-8")
    rows = reported(results.scores)
    assert len(rows) > 400
    for text in (page.text, markdown):
        missing = [r for r in rows[["value", "ci_low", "ci_high"]].itertuples(index=False) if bracket(*r) not in text]
        assert missing == []
        for row in results.summaries.dropna(subset="value").itertuples():
            digits = 0 if row.statistic in ("best", "first_within_1se") else 2
            assert bracket(row.value, row.ci_low, row.ci_high, digits=digits) in text
        assert "suppressed: the total gain is below 4 standard errors" in text
        assert "2.9e-05" in text
        assert "lora+bitfit" in text
        assert "44.8" in text
        assert "@misc{arora2024spafit" in text
    assert bracket(0.123456, 0.1, 0.2) not in page.text, "the check can fail"


def test_each_markdown_table_has_as_many_cells_in_every_row(written):
    text = re.sub(r"\\\|", "", (written[0] / "report.md").read_text(encoding="utf-8"))
    tables = re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)
    assert len(tables) > 10
    for table in tables:
        lines = table.strip().split("\n")
        assert re.fullmatch(r"\|(\s*:?-*:?\s*\|)+", lines[1]), lines[:2]
        assert len({line.count("|") for line in lines}) == 1, lines[:2]


def test_the_same_results_give_the_same_bytes(written, tmp_path):
    _, paths, hostile, verdict = written
    again = write_report(hostile, verdict=verdict, suggestion=made.suggestion(), folder=tmp_path)
    assert [p.read_bytes() for p in again] == [p.read_bytes() for p in paths]


def test_the_page_says_the_verdict_in_words_before_anything_else(page):
    start = page.text[page.text.index("Cite") :][:1500]
    assert "inconclusive" in start
    assert "order of emergence (L1) only" in start
    assert start.index("inconclusive") < start.index("Suggested strata") < start.index("Where each task can be read")


def test_tables_and_figures_need_no_script(html):
    without = re.sub(r"<script.*?</script>", "", html, flags=re.DOTALL)
    bare = Page(without)
    assert bare.tags.count("table") > 10
    assert bare.tags.count("svg") >= 3
    assert "noscript" in bare.tags


def test_without_verdict_strata_controls_or_intervals_the_report_says_so(results, tmp_path):
    scores = results.scores[results.scores["control"] == "none"].assign(ci_low=np.nan, ci_high=np.nan, converged=False)
    bare = replace(results, scores=scores, summaries=pd.DataFrame(), run={"tasks": {}})
    write_report(bare, folder=tmp_path)
    for name in ("report.html", "report.md"):
        text = (tmp_path / name).read_text(encoding="utf-8")
        assert "No hypothesis was tested" in text
        assert "No random-weight encoder was run" in text
        assert "did not converge" in text
        assert not re.search(r"\bnan\b", Page(text).text if name.endswith("html") else text, re.IGNORECASE)
    with pytest.raises(UsageError, match="no folder"):
        write_report(bare)


def test_every_stack_has_its_own_figures_and_only_its_own_strata(tmp_path):
    results = made.results(tasks=FEW[:2], stacks=("encoder", "decoder"), poolings=("mean", "first"), blocks=3)
    paths = write_report(results, suggestion=made.suggestion(3), folder=tmp_path)
    figures = [p.stem for p in paths if p.suffix == ".png"]
    assert figures == ["layers", "tasks", "heatmap"] + [f"{k}-decoder-block" for k in ("layers", "tasks", "heatmap")]
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert len(page.ids) == len(set(page.ids))
    entries = json.loads(page.scripts[0])
    assert len(entries) == 2 * 2 * 2
    assert len({(e["task"], e["variant"]) for e in entries}) == len(entries)
    assert entries[0]["variant"] == "encoder · mean"


def test_browsed_items_are_the_first_seeds_predictions_on_the_primary_split(results):
    entries = browsable_items(results, budget=10**7)
    entry = next(e for e in entries if e["task"] == "dependency")
    assert (entry["split"], entry["seed"], entry["total"], len(entry["items"])) == ("seen", 0, 60, 60)
    table = results.items("core.dependency")
    table = table[(table["seed"] == 0) & (table["control"] == "none")]
    for i, (text, word, label, predicted) in enumerate(entry["items"]):
        rows = table[table["item"] == f"s{i}:0"].sort_values("hidden")
        assert (text, word) == (rows["text"].iloc[0], rows["target"].iloc[0])
        assert entry["labels"][label] == rows["label"].iloc[0]
        assert [entry["labels"][p] for p in predicted] == rows["prediction"].tolist()


def test_the_item_sample_is_fixed_and_gives_way_to_the_budget(results):
    full, small = browsable_items(results, budget=10**7), browsable_items(results, budget=20_000)
    assert full == browsable_items(results, budget=10**7)
    for a, b in zip(full, small, strict=True):
        assert 10 <= len(b["items"]) < len(a["items"])
        assert all(item in a["items"] for item in b["items"])
    long = results.items("core.dependency").assign(text="x " * 500 + "word", target="word")
    text = browsable_items(replace(results, item_tables={**results.item_tables, "core.dependency": long}), budget=10**7)
    shown = next(e for e in text if e["task"] == "dependency")["items"][0][0]
    assert len(shown) <= MAX_TEXT + 2
    assert shown.endswith("word")


def test_caveats_follow_the_run(results):
    run, scores, summaries = results.run, results.scores, results.summaries
    plain = " ".join(caveats(run, scores, summaries))
    assert "suppressed for 1 task:" in plain
    assert "One pooling was used (mean)" in plain
    assert "--limit" not in plain
    assert "One fit per point" not in plain
    assert "untested" not in plain
    assert "--limit" in " ".join(caveats({"config": {"limit": 100}}, scores, summaries))
    assert "untested" in " ".join(caveats(run, scores, summaries, tested=False))
    once = scores.assign(n_seeds=1)
    assert "One fit per point" in " ".join(caveats(run, once, summaries))


def test_a_limit_stands_in_the_banner_and_a_model_note_once(results, tmp_path):
    run = {**results.run, "config": {"limit": 100}, "warnings": ["tuned elsewhere"]}
    run["model"] = {**run["model"], "notes": ["tuned elsewhere"]}
    write_report(replace(results, run=run), folder=tmp_path)
    for name in ("report.html", "report.md"):
        text = (tmp_path / name).read_text(encoding="utf-8")
        said = [m.start() for m in re.finditer(re.escape("Only the first 100 items of each split"), text)]
        assert len(said) == 3  # banner, what was run, when not to trust
        assert said[0] < text.index("What was run", text.index("<section") if name.endswith("html") else 0)
        assert text.count("tuned elsewhere") == 1
    assert report_content(results, verdict=None, suggestion=None)["limit"] == ""


def test_suppressed_dates_are_counted_on_the_curves_that_the_verdict_uses(results):
    own = results.summaries[results.summaries["statistic"] == "emergence_cog"]
    accuracy = own.assign(metric="accuracy", control="none", value=float("nan"))
    both = pd.concat([accuracy, results.summaries], ignore_index=True)
    assert "suppressed for 1 task:" in " ".join(caveats(results.run, results.scores, both))
    dated = both.assign(value=both["value"].where(both["metric"] == "accuracy", 1.0))
    assert "suppressed" not in " ".join(caveats(results.run, results.scores, dated))


def test_the_facts_are_those_of_the_run(results):
    facts = dict(report_content(results, verdict=None, suggestion=None)["facts"])
    assert facts["Texts"] == "8,412"
    assert facts["Blocks"] == "encoder 6 (probed: encoder)"
    assert facts["Tasks"] == "4 of 4 finished"
    assert facts["Seeds"] == "0, 1, 2"
    assert "Revision" not in facts


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
@pytest.mark.slow
def test_a_browser_runs_the_item_browser_and_nothing_hostile(written, tmp_path):
    page = (written[0] / "report.html").read_text(encoding="utf-8")
    choose = '$("task").value = 3; $("order").value = "first"; labels(); draw();'
    (tmp_path / "p.html").write_text(page.replace("labels(); draw();", choose), encoding="utf-8")
    done = subprocess.run(
        [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync", f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom",
         (tmp_path / "p.html").as_uri()],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    shown = Page(done.stdout)
    assert "60 of 60 sampled items" in shown.text
    assert shown.text.count("<img src=x onerror=alert(1)>") > 20, "items are shown as text"
    assert "img" not in shown.tags
    assert "what its layers hold" in re.search(r"<title>(.*?)</title>", done.stdout, re.DOTALL)[1]
    counts = [len(m.split(",")) for m in re.findall(r'aria-label="right at hidden ([\d, ]+)"', done.stdout)]
    assert len(counts) > 5
    assert counts == sorted(counts, reverse=True), "in this run items that are right early stay right"


def test_citations_are_the_works_that_the_run_used():
    run = {
        "config": {"controls": ["word-type", "random-encoder"]},
        "model": {"name": "all-MiniLM-L6-v2"},
        "versions": {"transformers": "5", "scikit-learn": "1.9"},
        "tasks": {
            "ewt.upos": {"source": "UD_English-EWT", "citation": "@misc{mine2020x, title={T, {U}}, year={2020}}"},
            "cola": {"source": "GLUE, CoLA"},
            "sent.length": {"citation": "conneau2018cram (the definitions)"},
        },
    }
    keys = used(run)
    assert len(keys) == len(set(keys))
    assert {
        "arora2024spafit", "hewitt2019control", "xu2020usable", "wang2020minilm", "silveira2014gold",
        "nivre2020universal", "warstadt2019neural", "wang2019glue", "conneau2018cram", "wolf2020transformers",
    } <= set(keys)  # fmt: skip
    assert not {"song2020mpnet", "devlin2019bert"} & set(keys)
    assert "@misc{mine2020x" in bibtex(run)
    bare = used({"config": {"controls": []}, "model": {"name": "mpnet-base"}, "tasks": {}})
    assert "hewitt2019control" not in bare
    assert "wang2019glue" not in bare
    assert "song2020mpnet" in bare


@pytest.mark.parametrize("reference", REFERENCES.values(), ids=lambda r: r.key)
def test_each_reference_is_well_formed_bibtex(reference):
    entry = reference.bibtex()
    assert entry.startswith(f"@{reference.kind}{{{reference.key},\n")
    depth = [entry[: i + 1].count("{") - entry[: i + 1].count("}") for i in range(len(entry))]
    assert min(depth) >= 0
    assert depth[-1] == 0
    fields = dict(reference.fields)
    assert fields["author"].startswith(reference.author)
    assert {"title", "author"} <= set(fields)
    assert bool({"booktitle", "journal", "eprint"} & set(fields))


def test_a_treebank_citation_in_bibtex_is_not_repeated():
    cited = "@inproceedings{silveira14gold, author = {Natalia Silveira and Timothy Dozat}, year = {2014}}"
    text = bibtex({"tasks": {"ewt.upos": {"source": "UD_English-EWT", "citation": cited}}})
    assert text.count("Silveira") == 1
