"""GLUE: every task's official files, the hub's layout, submission files, and what malformed input says."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pandas as pd
import pytest

from spafit.data.glue import read_glue
from spafit.data.glue_predictions import write_predictions
from spafit.data.glue_tasks import GLUE_TASKS, glue_task
from spafit.data.sampling import class_weights, hold_out, stratified_subset
from spafit.data.training import TrainData, glue_data
from spafit.errors import DataError, HubError, NumericalError, UsageError
from spafit.metrics import METRICS
from spafit.runtime import generator
from tests.paths import SHARED, needs_shared

MNLI = "index promptID pairID genre sentence1_binary_parse sentence2_binary_parse sentence1_parse sentence2_parse"
MNLI_TEST = [*MNLI.split(), "sentence1", "sentence2"]
MNLI_DEV = [*MNLI_TEST, "label1", "label2", "label3", "label4", "label5", "gold_label"]
STSB = ["index", "genre", "filename", "year", "old_index", "source1", "source2", "sentence1", "sentence2"]
ORIGIN = ["main-captions", "MSRvid", "2012test"]
TREES, N5 = ["( p )"] * 4, ["neutral"] * 5
MRPC = ["Quality", "#1 ID", "#2 ID", "#1 String", "#2 String"]

#: Folder, then file to (header or None, rows), as the benchmark's download has them.
OFFICIAL = {
    "cola": ("CoLA", {
        "train.tsv": (None, [["gj04", "1", "", "Our friends won't."], ["gj04", "0", "*", 'They "drank the pub.']]),
        "dev.tsv": (None, [["gj04", "1", "", "The sailors rode."]]),
        "test.tsv": (["index", "sentence"], [["0", "Bill whistled."], ["1", "The car honked."]]),
    }),
    "sst2": ("SST-2", {
        "train.tsv": (["sentence", "label"], [['hide " new secretions ', "0"], ["charming ", "1"]]),
        "dev.tsv": (["sentence", "label"], [["it 's a charming journey .", "1"]]),
        "test.tsv": (["index", "sentence"], [["0", "uneasy mishmash"], ["1", "a joy"]]),
    }),
    "mrpc": ("MRPC", {
        "train.tsv": (MRPC, [["1", "702876", "702977", 'Amrozi called "the witness', "Referring to him"],
                             ["0", "2108705", "2108831", "Yucaipa owned", "Yucaipa bought"]]),
        "dev.tsv": (MRPC, [["1", "1355540", "1355592", "He said the", "The man said"]]),
        "test.tsv": (["index", *MRPC[1:]], [["0", "1089874", "1089925", "PCCW's chief", "Current chief"],
                                            ["1", "3019446", "3019327", "The world's", "Domestic"]]),
    }),
    "qqp": ("QQP", {
        "train.tsv": (["id", "qid1", "qid2", "question1", "question2", "is_duplicate"],
                      [["133273", "213221", "213222", "How is the life?", 'Which "level of?', "0"],
                       ["402555", "536040", "536041", "How do I?", "How can I?", "1"]]),
        "dev.tsv": (["id", "qid1", "qid2", "question1", "question2", "is_duplicate"],
                    [["201359", "303345", "303346", "Why are?", "Why do?", "0"]]),
        "test.tsv": (["id", "question1", "question2"], [["0", "Would the?", "What?"], ["1", "Is?", "Are?"]]),
    }),
    "stsb": ("STS-B", {
        "train.tsv": ([*STSB, "score"],
                      [["0", *ORIGIN, "0001", *["none"] * 2, 'A "plane', "An air", "5.000"],
                       ["1", *ORIGIN, "0004", *["none"] * 2, "A man", "A girl", "0.750"]]),
        "dev.tsv": ([*STSB, "score"],
                    [["0", *ORIGIN, "0000", *["none"] * 2, "Hat", "Hard hat", "3.800"]]),
        "test.tsv": (STSB, [["0", *ORIGIN, "0024", *["none"] * 2, "A girl", "Hair"],
                            ["1", *ORIGIN, "0033", *["none"] * 2, "Men", "Boys"]]),
    }),
    "mnli": ("MNLI", {
        "train.tsv": ([*MNLI_TEST, "label1", "gold_label"],
                      [["0", "31193", "x", "g", *TREES, 'Conceptually "cream', "Product", "neutral", "neutral"],
                       ["1", "101457", "x", "g", *TREES, "you know", "You lose", "entailment", "entailment"]]),
        "dev_matched.tsv": (MNLI_DEV, [["0", "63735", "x", "g", *TREES, "The new", "Everyone", *N5, "contradiction"]]),
        "dev_mismatched.tsv": (MNLI_DEV, [["0", "75290", "x", "g", *TREES, "Your", "None", *N5, "entailment"]]),
        "test_matched.tsv": (MNLI_TEST, [["0", "31493", "31493", "travel", *TREES, "Hierbas", "is a name"]]),
        "test_mismatched.tsv": (MNLI_TEST, [["0", "16130", "16130", "verbatim", *TREES, "What", "Nobody"]]),
    }),
    "qnli": ("QNLI", {
        "train.tsv": (["index", "question", "sentence", "label"],
                      [["0", "When did it?", 'Since "July', "entailment"], ["1", "Who?", "The", "not_entailment"]]),
        "dev.tsv": (["index", "question", "sentence", "label"], [["0", "What came?", "As of", "not_entailment"]]),
        "test.tsv": (["index", "question", "sentence"], [["0", "What seldom?", "A"], ["1", "Why?", "B"]]),
    }),
    "rte": ("RTE", {
        "train.tsv": (["index", "sentence1", "sentence2", "label"],
                      [["0", 'No "Weapons', "Weapons", "not_entailment"], ["1", "A place", "Pope", "entailment"]]),
        "dev.tsv": (["index", "sentence1", "sentence2", "label"], [["0", "Dana", "Reeve", "not_entailment"]]),
        "test.tsv": (["index", "sentence1", "sentence2"], [["0", "Mangla", "Shukla"], ["1", "A", "B"]]),
    }),
    "wnli": ("WNLI", {
        "train.tsv": (["index", "sentence1", "sentence2", "label"],
                      [["0", 'I stuck "a pin', "The carrot", "1"], ["1", "John", "He", "0"]]),
        "dev.tsv": (["index", "sentence1", "sentence2", "label"], [["0", "The drain", "The hair", "0"]]),
        "test.tsv": (["index", "sentence1", "sentence2"], [["0", "Maude", "Horses"], ["1", "A", "B"]]),
    }),
    "ax": ("diagnostic", {
        "diagnostic.tsv": (["index", "sentence1", "sentence2"], [["0", 'The "cat sat', "The cat"], ["1", "X", "Y"]]),
    }),
}  # fmt: skip

#: Labels of the training rows above in the benchmark's order of classes.
TRAIN_LABELS = {
    "cola": [1, 0], "sst2": [0, 1], "mrpc": [1, 0], "qqp": [0, 1], "stsb": [5.0, 0.75], "mnli": [1, 0], "qnli": [0, 1],
    "rte": [1, 0], "wnli": [1, 0],
}  # fmt: skip


def write_tsv(path, header, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join("\t".join(r) + "\n" for r in ([header] if header else []) + rows), encoding="utf-8")


@pytest.fixture
def glue(tmp_path):
    for folder, files in OFFICIAL.values():
        for name, (header, rows) in files.items():
            write_tsv(tmp_path / "glue" / folder / name, header, rows)
    return tmp_path / "glue"


@pytest.mark.parametrize("name", GLUE_TASKS)
def test_each_task_reads_its_official_files(name, glue):
    task, frames = GLUE_TASKS[name], read_glue(name, glue)
    assert list(frames) == list(task.splits)
    assert METRICS.keys() >= set(task.metrics)
    for split, frame in frames.items():
        assert list(frame.columns) == [*("text", "text2")[: len(task.text)], "label", "idx"], split
        assert frame["label"].isna().all() == (split in task.predictions), split
        assert frame["label"].dtype == ("float64" if task.regression else "Int64")
        assert frame.attrs == {"bad_rows": 0, "bad_lines": []}
    first = next(iter(frames.values()))
    assert '"' in "".join(first["text"]) + "".join(first.get("text2", [])), "quotes stay as written"
    if name != "ax":
        assert frames["train"]["label"].tolist() == TRAIN_LABELS[name]
    assert first["idx"].tolist() == ([133273, 402555] if name == "qqp" else [0, 1])
    pd.testing.assert_frame_equal(read_glue(name, glue / OFFICIAL[name][0])[next(iter(frames))], first)


def test_mnli_labels_are_the_gold_ones(glue):
    frames = read_glue("mnli", glue)
    assert frames["validation_matched"]["label"].tolist() == [2]
    assert frames["validation_mismatched"]["label"].tolist() == [0]
    assert frames["validation_matched"].iloc[0][["text", "text2"]].tolist() == ["The new", "Everyone"]


@needs_shared
@pytest.mark.parametrize(
    ("name", "files", "sizes"),
    [
        ("cola", {}, {"train": 8551, "validation": 1043, "test": 1063}),
        ("sst2", {"test": "test-labeled.tsv"}, {"train": 67349, "validation": 872, "test": 1821}),
        ("stsb", {"test": "original/sts-test.tsv"}, {"train": 5749, "validation": 1500, "test": 1379}),
        ("rte", {}, {"train": 2490, "validation": 277, "test": 3000}),
        ("wnli", {"train": "train.rebuilt.tsv"}, {"train": 635, "validation": 71, "test": 146}),
    ],
)
def test_the_real_files_have_their_sizes(name, files, sizes):
    frames = read_glue(name, SHARED / "glue", files=files)
    assert {split: len(frame) for split, frame in frames.items()} == sizes
    for split, frame in frames.items():
        assert frame["label"].notna().all() == (split != "test" or "test" in files), split
        assert frame["idx"].tolist() == list(range(sizes[split]))
        assert not frame["text"].str.contains("[\t\r\n]").any()


@needs_shared
def test_the_real_sts_benchmark_and_glue_agree():
    theirs = {"train": "original/sts-train.tsv", "validation": "original/sts-dev.tsv"}
    ours, original = read_glue("stsb", SHARED / "glue"), read_glue("stsb", SHARED / "glue", files=theirs)
    for split in theirs:
        np.testing.assert_array_equal(ours[split]["label"], original[split]["label"])
        assert (ours[split]["text"].str.strip() == original[split]["text"].str.strip()).mean() > 0.99


@needs_shared
def test_the_real_training_file_of_another_name_is_asked_for():
    with pytest.raises(DataError, match=r"train split of wnli \(train.tsv\).*train.rebuilt.tsv.*files="):
        read_glue("wnli", SHARED / "glue")
    assert list(read_glue("wnli", SHARED / "glue", splits=["validation"])) == ["validation"]


def test_folder_names_are_compared_without_case(glue):
    (glue / "STS-B").rename(glue / "stsb")
    (glue / "SST-2").rename(glue / "sst-2")
    assert len(read_glue("STS-B", glue)["train"]) == len(read_glue("SST2", glue)["train"]) == 2
    with pytest.raises(UsageError, match=r"Unknown GLUE task 'RTF'\. Did you mean 'rte'"):
        glue_task("RTF")


def test_other_columns_and_formats_by_name(tmp_path):
    table = pd.DataFrame({"premise": ["a", "b"], "hypothesis": ["c", "d"], "label": [2, 0], "idx": [7, 8]})
    table.to_parquet(tmp_path / "mine.parquet")
    frames = read_glue("mnli", tmp_path, files={"train": "mine.parquet"}, splits=["train"])
    assert frames["train"].to_numpy().tolist() == [["a", "c", 2, 7], ["b", "d", 0, 8]]
    full = ["Lexical Semantics", "Logic", "Knowledge", "Domain", "Premise", "Hypothesis", "Label"]
    write_tsv(tmp_path / "diagnostic-full.tsv", full, [["", "", "", "News", "p", "h", "contradiction"]])
    assert read_glue("ax", tmp_path)["test"].to_numpy().tolist() == [["p", "h", 2, 0]]


def test_the_original_mrpc_is_divided_by_the_list_of_development_pairs(tmp_path):
    rows = [["1", "10", "11", "a", "b"], ["0", "20", "21", "c", "d"], ["1", "30", "31", "e", "f"]]
    write_tsv(tmp_path / "msr_paraphrase_train.txt", MRPC, rows)
    write_tsv(tmp_path / "msr_paraphrase_test.txt", ["\ufeff" + MRPC[0], *MRPC[1:]], rows[:1])
    with pytest.raises(DataError, match=r"needs mrpc_dev_ids.tsv, as it holds the development pairs too"):
        read_glue("mrpc", tmp_path)
    write_tsv(tmp_path / "mrpc_dev_ids.tsv", None, [["20", "21"]])
    frames = read_glue("mrpc", tmp_path)
    assert frames["train"]["text"].tolist() == ["a", "e"]
    assert frames["train"]["idx"].tolist() == [0, 2]
    assert frames["validation"].to_numpy().tolist() == [["c", "d", 0, 1]]
    assert frames["test"]["label"].tolist() == [1]
    write_tsv(tmp_path / "mrpc_dev_ids.tsv", None, [["20", "21"], ["98", "99"]])
    with pytest.raises(DataError, match="holds 1 of the 2 development pairs"):
        read_glue("mrpc", tmp_path)


def test_malformed_rows_are_an_error_or_counted(glue):
    path = glue / "QQP" / "train.tsv"
    path.write_text(path.read_text().replace("\tHow can I?\t1", "") + "9\t1\t2\tx\ty\t1\n")
    with pytest.raises(DataError, match=r"train.tsv:3: 4 cell\(s\) where there must be 6 \(1 such line"):
        read_glue("qqp", glue)
    train = read_glue("qqp", glue, on_bad_rows="skip")["train"]
    assert train.attrs == {"bad_rows": 1, "bad_lines": [3]}
    assert train["idx"].tolist() == [133273, 9]
    # Without an index of its own a row keeps its number in the file: the malformed ones count.
    write_tsv(glue / "SST-2" / "train.tsv", ["sentence", "label"], [["a", "0"], ["b"], ["c", "1"]])
    assert read_glue("sst2", glue, on_bad_rows="skip")["train"]["idx"].tolist() == [0, 2]
    assert glue_data("qqp", glue, on_bad_rows="skip").source == "GLUE qqp (malformed lines left out: 1 of train)"


@pytest.mark.parametrize(
    ("name", "file", "old", "new", "message"),
    [
        ("rte", "RTE/train.tsv", "\tentailment", "\tentails", r"train.tsv:3: label 'entails' is not one of entailment"),
        ("rte", "RTE/train.tsv", "\tentailment", "\t0", r"train.tsv:3: label '0' is not one of entailment"),
        ("cola", "CoLA/train.tsv", "gj04\t0", "gj04\t2", r"train.tsv:2: label '2' is not one of 0, 1"),
        ("sst2", "SST-2/dev.tsv", "\t1", "\t-1", r"dev.tsv:2: label '-1' is not one of 0, 1"),
        ("stsb", "STS-B/train.tsv", "5.000", "5.001", r"train.tsv:2: score '5.001' is not a number from 0 to 5"),
        ("stsb", "STS-B/train.tsv", "5.000", "nan", r"train.tsv:2: score 'nan' is not a number"),
        ("qnli", "QNLI/train.tsv", "sentence", "answer", r"no column 'sentence'. It has 'index', 'question', 'answer'"),
        ("qnli", "QNLI/train.tsv", "\tlabel", "\tclass", r"no label column 'label'"),
        ("qnli", "QNLI/dev.tsv", "\tsentence\t", "\tlabel\t", r"column name 'label' occurs twice"),
        ("wnli", "WNLI/train.tsv", "\tJohn\tHe", "\tJohn", r"train.tsv:3: 3 cell\(s\) where there must be 4"),
        ("cola", "CoLA/train.tsv", "gj04\t0\t*\t", "gj04\t0\t", r"train.tsv:2: 3 cell\(s\) where there must be 4"),
        ("wnli", "WNLI/dev.tsv", "0\tThe drain", "x\tThe drain", r"column 'index' must hold whole numbers"),
    ],
)  # fmt: skip
def test_bad_files_are_named_with_their_line(name, file, old, new, message, glue):
    path = glue / file
    assert old in path.read_text()
    read_glue(name, glue)
    path.write_text(path.read_text().replace(old, new, 1))
    with pytest.raises(DataError, match=message):
        read_glue(name, glue)


def test_reading_needs_no_torch():
    code = (
        "import sys, spafit.data.glue, spafit.metrics; print({'torch', 'transformers', 'datasets'} & set(sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout == "set()\n"


def test_what_is_not_there_is_named(glue, tmp_path):
    with pytest.raises(UsageError, match=r"mnli has no split 'validation_match'. Did you mean 'validation_matched'"):
        read_glue("mnli", glue, files={"validation_match": "x.tsv"})
    with pytest.raises(DataError, match=r"nope.tsv: no such file \(the train split of rte\)"):
        read_glue("rte", glue, files={"train": "nope.tsv"})
    with pytest.raises(DataError, match="no such folder"):
        read_glue("rte", tmp_path / "nowhere")
    (glue / "RTE" / "test.tsv").unlink()
    assert list(read_glue("rte", glue)) == ["train", "validation"]
    with pytest.raises(DataError, match="no file for the test split of rte"):
        read_glue("rte", glue, splits=["test"])
    (glue / "RTE" / "dev.tsv").write_text("")
    with pytest.raises(DataError, match="holds no rows"):
        read_glue("rte", glue, splits=["validation"])


# ---------------------------------------------------------------- the hub


@pytest.fixture
def hub(tmp_path, monkeypatch, glue):
    """A local copy of the hub's layout (a card with one configuration per task, parquet splits) from the same rows."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    card = ["---", "configs:"]
    for name, task in GLUE_TASKS.items():
        card += [f"- config_name: {name}", "  data_files:"]
        for split, frame in read_glue(name, glue).items():
            texts = [names[-1] for names in task.text]
            label = datasets.Value("float32") if task.regression else datasets.ClassLabel(names=list(task.labels))
            content = {t: frame[c].tolist() for t, c in zip(texts, ("text", "text2"), strict=False)}
            content |= {"label": frame["label"].fillna(-1).tolist(), "idx": frame["idx"].tolist()}
            features = {t: datasets.Value("string") for t in texts} | {"label": label, "idx": datasets.Value("int32")}
            data = datasets.Dataset.from_dict(content, features=datasets.Features(features))
            file = tmp_path / "hub" / name / f"{split}-00000-of-00001.parquet"
            file.parent.mkdir(parents=True, exist_ok=True)
            data.to_parquet(str(file))
            card += [f"  - split: {split}", f"    path: {name}/{split}-*"]
    (tmp_path / "hub" / "README.md").write_text("\n".join([*card, "---", ""]))
    return tmp_path / "hub"


def test_the_hubs_layout_gives_the_same_rows_as_the_files(hub, glue, capfd):
    for name in GLUE_TASKS:
        theirs, ours = read_glue(name, f"hub:{hub}"), read_glue(name, glue)
        assert list(theirs) == list(ours)
        for split in ours:
            pd.testing.assert_frame_equal(theirs[split], ours[split])
    assert list(read_glue("mnli", f"hub:{hub}", splits=["validation_matched"])) == ["validation_matched"]
    with pytest.raises(UsageError, match="Leave it out to read from the hub"):
        read_glue("rte", f"hub:{hub}", files={"train": "x"})


def test_a_hub_data_set_with_another_order_of_classes_is_refused(hub):
    datasets = pytest.importorskip("datasets")
    other = datasets.ClassLabel(names=["not_entailment", "entailment"])
    for path in sorted((hub / "rte").iterdir()):
        datasets.Dataset.from_parquet(str(path)).cast_column("label", other).to_parquet(str(path))
    with pytest.raises(DataError, match="classes are not_entailment, entailment and entailment, not_entailment"):
        read_glue("rte", f"hub:{hub}")


def test_a_hub_that_is_not_there_is_one_sentence(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    from huggingface_hub import constants

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    switch = datasets.config.HF_HUB_OFFLINE
    with pytest.raises(HubError, match=r"cannot be reached for data set 'nyu-mll/glue'. Give a folder of GLUE files"):
        read_glue("rte", "hub")
    with pytest.raises(HubError, match=r"'nyu-mll/glue' \(rte\) cannot be had: .*Give a folder of GLUE files"):
        read_glue("rte", "hub", offline=True)
    assert switch == datasets.config.HF_HUB_OFFLINE


# ---------------------------------------------------------------- submissions


@pytest.mark.parametrize(
    ("name", "split", "file", "predictions", "golden"),
    [
        ("cola", "test", "CoLA.tsv", [1, 0], "0\t1\n1\t0\n"),
        ("sst2", "test", "SST-2.tsv", [0, 1], "0\t0\n1\t1\n"),
        ("mrpc", "test", "MRPC.tsv", [1, 1], "0\t1\n1\t1\n"),
        ("qqp", "test", "QQP.tsv", [0, 0], "0\t0\n1\t0\n"),
        ("stsb", "test", "STS-B.tsv", [5.2, 3.14159], "0\t5.000\n1\t3.142\n"),
        ("mnli", "test_matched", "MNLI-m.tsv", [2, 1], "0\tcontradiction\n1\tneutral\n"),
        ("mnli", "test_mismatched", "MNLI-mm.tsv", [0, 1], "0\tentailment\n1\tneutral\n"),
        ("qnli", "test", "QNLI.tsv", [0, 1], "0\tentailment\n1\tnot_entailment\n"),
        ("rte", "test", "RTE.tsv", [1, 0], "0\tnot_entailment\n1\tentailment\n"),
        ("wnli", "test", "WNLI.tsv", [1, 0], "0\t1\n1\t0\n"),
        ("ax", "test", "AX.tsv", [2, 0], "0\tcontradiction\n1\tentailment\n"),
    ],
)
def test_prediction_files_are_in_the_official_format(name, split, file, predictions, golden, tmp_path):
    path = write_predictions(name, split, [0, 1], predictions, tmp_path / "out")
    assert path == tmp_path / "out" / file
    assert path.read_bytes().decode() == "index\tprediction\n" + golden
    # The order is the index's, whatever the rows' order was.
    write_predictions(name, split, [1, 0], predictions[::-1], tmp_path / "out")
    assert path.read_bytes().decode() == "index\tprediction\n" + golden


def test_scores_below_zero_are_clipped(tmp_path):
    path = write_predictions("stsb", "test", [0, 1], np.float32([-0.3, 0.0004]), tmp_path)
    assert path.read_text().splitlines()[1:] == ["0\t0.000", "1\t0.000"]


def test_predictions_that_cannot_be_submitted_write_nothing(tmp_path):
    with pytest.raises(UsageError, match="Predictions of mnli are for test_matched, test_mismatched; got 'test'"):
        write_predictions("mnli", "test", [0], [0], tmp_path)
    with pytest.raises(UsageError, match="Prediction 2 is no class of rte: codes go from 0 to 1"):
        write_predictions("rte", "test", [0, 1], [0, 2], tmp_path)
    with pytest.raises(UsageError, match="occurs twice"):
        write_predictions("rte", "test", [0, 0], [0, 1], tmp_path)
    with pytest.raises(UsageError, match="one prediction per row"):
        write_predictions("rte", "test", [0, 1], [[0.1, 0.9], [0.2, 0.8]], tmp_path)
    with pytest.raises(NumericalError, match="not finite"):
        write_predictions("stsb", "test", [0], [np.nan], tmp_path)
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------- subsets and weights


def labelled(codes):
    return pd.DataFrame({"text": [f"t{i}" for i in range(len(codes))], "label": codes, "idx": range(len(codes))})


def test_a_subset_has_exactly_n_rows_and_each_class_its_share():
    codes = pd.array(generator(0, "subset").permutation([0] * 700 + [1] * 250 + [2] * 50), dtype="Int64")
    frame = labelled(codes)
    for n in (1, 10, 101, 333, 1000):
        part = stratified_subset(frame, n, 3)
        off = np.bincount(part["label"], minlength=3) - n * np.array([0.7, 0.25, 0.05])
        assert len(part) == n
        assert np.abs(off).max() < 1
        assert part.index.is_monotonic_increasing
        assert part.index.is_unique
    pd.testing.assert_frame_equal(stratified_subset(frame, 101, 3), stratified_subset(frame, 101, 3))
    assert stratified_subset(frame, 101, 3).index.tolist() != stratified_subset(frame, 101, 4).index.tolist()
    pd.testing.assert_frame_equal(stratified_subset(frame, 1000, 3), frame)


@pytest.mark.parametrize("most", [None, 20])
def test_every_item_is_kept_or_held_out_even_if_the_index_repeats(most):
    plain = labelled([0] * 20 + [1] * 20)
    doubled = plain.set_axis([*range(20), *range(20)])  # as after joining two tables
    kept, held = hold_out(doubled, 0.1, seed=0, most=most)
    size = most or 40
    assert (len(kept), len(held)) == (size - size // 10, size // 10)
    assert len({*kept["idx"], *held["idx"]}) == size
    for ours, theirs in zip((kept, held), hold_out(plain, 0.1, seed=0, most=most), strict=True):
        pd.testing.assert_frame_equal(ours.reset_index(drop=True), theirs.reset_index(drop=True))
    assert held["label"].mean() == 0.5


def test_a_regression_subset_keeps_the_distribution_closer_than_chance():
    scores = generator(1, "subset").uniform(0, 5, 5000)
    frame = labelled(scores)
    errors = [stratified_subset(frame, 100, seed)["label"].mean() - scores.mean() for seed in range(20)]
    # A simple random sample's mean has sd σ/√n; ten equal strata leave a tenth of it for a uniform label.
    assert np.std(errors) < 0.25 * scores.std() / 10
    assert len(stratified_subset(labelled(np.array([0.0] * 30 + [5.0] * 3)), 7, 0)) == 7


def test_a_subset_that_cannot_be_drawn_says_so():
    frame = labelled(pd.array([0, 1, None], dtype="Int64"))
    with pytest.raises(UsageError, match="1 of 3 labels are missing"):
        stratified_subset(frame, 2, 0)
    for n in (0, 4):
        with pytest.raises(UsageError, match=f"subset of {n} rows cannot be drawn from 3"):
            stratified_subset(frame, n, 0)


def with_classes(*labels, name="task"):
    frame = labelled([0, 1]).assign(label=[0.5, 1.5] if not labels else [0, 1])
    return TrainData(name, {"validation": frame}, labels or None, ("accuracy",))


def test_outputs_are_matched_with_a_task_s_classes_by_name():
    mnli = with_classes("entailment", "neutral", "contradiction")
    assert mnli.output_order(("contradiction", "entailment", "neutral")) == [1, 2, 0]
    assert mnli.output_order(mnli.labels) == [0, 1, 2]
    assert mnli.output_order(("CONTRADICTION", "NEUTRAL", "ENTAILMENT")) == [2, 1, 0]
    assert mnli.output_order(("LABEL_0", "LABEL_1", "LABEL_2")) == [0, 1, 2]
    assert with_classes("not_duplicate", "duplicate").output_order(("duplicate", "not duplicate")) == [1, 0]
    # Names that differ by their case alone are different classes.
    assert with_classes("us", "US").output_order(("US", "us")) == [1, 0]
    assert with_classes().output_order(None) == [0]


@pytest.mark.parametrize(
    ("task", "model"),
    [
        (("entailment", "not_entailment"), ("cat", "dog")),
        (("entailment", "not_entailment"), ("entailment", "neutral", "not_entailment")),
        (("entailment", "not_entailment"), ("LABEL_0", "LABEL_1", "LABEL_2")),
        (("us", "US"), ("us", "uk")),
        (("entailment", "not_entailment"), None),
        ((), ("cat", "dog")),
    ],
)
def test_a_model_of_other_classes_is_refused(task, model):
    with pytest.raises(DataError, match=r"rte needs a model that predicts .* and this one predicts .* Use data"):
        with_classes(*task, name="rte").output_order(model)


def test_class_weights_make_every_class_weigh_the_same():
    from sklearn.utils.class_weight import compute_class_weight

    codes = np.array([0] * 70 + [1] * 25 + [2] * 5)
    weights = class_weights(pd.array(codes, dtype="Int64"))
    np.testing.assert_allclose(weights, compute_class_weight("balanced", classes=np.arange(3), y=codes), rtol=1e-14)
    np.testing.assert_allclose(weights * np.bincount(codes), 100 / 3)
    with pytest.raises(UsageError, match="Class 3 does not occur"):
        class_weights(codes, n_classes=4)
    for bad in ([], [0.5, 1], [-1, 0], [0, None]):
        with pytest.raises(UsageError, match="codes from 0 to"):
            class_weights(bad)
    with pytest.raises(UsageError, match="codes from 0 to 1 only"):
        class_weights(codes, n_classes=2)
