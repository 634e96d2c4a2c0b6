"""The nine tasks of the GLUE benchmark (Wang et al. 2019) and its AX diagnostic: columns, labels, metrics, files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from spafit.errors import UsageError, did_you_mean

_PAIR = (("sentence1",), ("sentence2",))
_PREMISE = (("sentence1", "premise"), ("sentence2", "hypothesis"))
_SPLITS = {"train": ("train.tsv",), "validation": ("dev.tsv",), "test": ("test.tsv",)}


@dataclass(frozen=True)
class GlueTask:
    """One task of the benchmark.

    Attributes:
        name: short name, also the hub's configuration.
        text: one or two texts, each with the column names it goes by (compared without case).
        label: column names of the label.
        labels: class names in the order of their codes; empty for a regression.
        metrics: names in :data:`spafit.metrics.METRICS`; the benchmark's number is their mean.
        predictions: test split to the file name that the benchmark wants.
        licence: of the data, in words.
        citation: key and source of the paper.
        folders: names of its folder, in lower case.
        splits: split to the file names under which it circulates, in order of preference.
        words: whether files and predictions carry class names rather than codes.
        limits: lowest and highest value of a regression; None for classes.
        bare: column names by position of files without a header; the columns after the last text may be absent.
    """

    name: str
    text: tuple[tuple[str, ...], ...]
    label: tuple[str, ...]
    labels: tuple[str, ...]
    metrics: tuple[str, ...]
    predictions: Mapping[str, str]
    licence: str
    citation: str
    folders: tuple[str, ...]
    splits: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: dict(_SPLITS))
    words: bool = False
    limits: tuple[float, float] | None = None
    bare: tuple[str, ...] = ()

    @property
    def regression(self) -> bool:
        """Whether the label is a number rather than a class."""
        return self.limits is not None


# fmt: off
_TASKS = (
    GlueTask(
        "cola", (("sentence",),), ("label",), ("unacceptable", "acceptable"), ("matthews",), {"test": "CoLA.tsv"},
        "research use", "warstadt2019neural: TACL 7, 625-641", ("cola", "cola_public"),
        splits={
            "train": ("train.tsv", "cola_public/raw/in_domain_train.tsv", "raw/in_domain_train.tsv"),
            "validation": ("dev.tsv",), "test": ("test.tsv",),
        },
        bare=("source", "label", "mark", "sentence"),
    ),
    GlueTask(
        "sst2", (("sentence",),), ("label",), ("negative", "positive"), ("accuracy",), {"test": "SST-2.tsv"},
        "research use", "socher2013recursive: EMNLP 2013", ("sst-2", "sst2", "sst"),
    ),
    GlueTask(
        "mrpc", (("#1 string", "sentence1"), ("#2 string", "sentence2")), ("quality", "label"),
        ("not_equivalent", "equivalent"), ("accuracy", "f1"), {"test": "MRPC.tsv"},
        "Microsoft Research data licence", "dolan2005automatically: IWP 2005", ("mrpc",),
        splits={**_SPLITS, "test": ("test.tsv", "msr_paraphrase_test.txt")},
    ),
    GlueTask(
        "qqp", (("question1",), ("question2",)), ("is_duplicate", "label"), ("not_duplicate", "duplicate"),
        ("accuracy", "f1"), {"test": "QQP.tsv"},
        "Quora's terms of service, non-commercial", "iyer2017quora: Quora Question Pairs", ("qqp",),
    ),
    GlueTask(
        "stsb", _PAIR, ("score", "label"), (), ("pearson", "spearman"), {"test": "STS-B.tsv"},
        "mixed, see the LICENSE.txt of the data", "cer2017semeval: SemEval-2017, 1-14", ("sts-b", "stsb"),
        limits=(0.0, 5.0),
        bare=("genre", "file", "year", "old_index", "score", "sentence1", "sentence2", "source1", "source2"),
    ),
    GlueTask(
        "mnli", _PREMISE, ("gold_label", "label"), ("entailment", "neutral", "contradiction"), ("accuracy",),
        {"test_matched": "MNLI-m.tsv", "test_mismatched": "MNLI-mm.tsv"},
        "OANC, CC BY 3.0 and CC BY-SA 3.0, by genre", "williams2018broad: NAACL 2018, 1112-1122", ("mnli",),
        splits={
            "train": ("train.tsv",),
            **{f"validation_{m}": (f"dev_{m}.tsv",) for m in ("matched", "mismatched")},
            **{f"test_{m}": (f"test_{m}.tsv",) for m in ("matched", "mismatched")},
        },
        words=True,
    ),
    GlueTask(
        "qnli", (("question",), ("sentence",)), ("label",), ("entailment", "not_entailment"), ("accuracy",),
        {"test": "QNLI.tsv"},
        "CC BY-SA 4.0", "rajpurkar2016squad: EMNLP 2016, 2383-2392", ("qnli", "qnliv2"), words=True,
    ),
    GlueTask(
        "rte", _PAIR, ("label",), ("entailment", "not_entailment"), ("accuracy",), {"test": "RTE.tsv"},
        "research use", "dagan2006pascal, barhaim2006second, giampiccolo2007third, bentivogli2009fifth", ("rte",),
        words=True,
    ),
    GlueTask(
        "wnli", _PAIR, ("label",), ("not_entailment", "entailment"), ("accuracy",), {"test": "WNLI.tsv"},
        "CC BY 4.0", "levesque2012winograd: KR 2012", ("wnli",),
    ),
    GlueTask(
        "ax", _PREMISE, ("label",), ("entailment", "neutral", "contradiction"), ("matthews",), {"test": "AX.tsv"},
        "as published with the benchmark", "wang2019glue: ICLR 2019", ("ax", "diagnostic", "diagnostics"),
        splits={"test": ("diagnostic.tsv", "diagnostic-full.tsv", "AX.tsv", "ax.tsv")}, words=True,
    ),
)
# fmt: on

#: Name to task. ``ax`` has a test split only, and is answered by a model of ``mnli``.
GLUE_TASKS: dict[str, GlueTask] = {task.name: task for task in _TASKS}


def glue_task(name: str | GlueTask) -> GlueTask:
    """Return the task of that name (``SST-2`` and ``sst2`` are the same).

    Raises:
        UsageError: there is none.
    """
    if isinstance(name, GlueTask):
        return name
    short = name.lower().replace("-", "").replace("_", "")
    if short not in GLUE_TASKS:
        raise UsageError(f"Unknown GLUE task {name!r}.{did_you_mean(short, GLUE_TASKS)} Use {', '.join(GLUE_TASKS)}.")
    return GLUE_TASKS[short]
