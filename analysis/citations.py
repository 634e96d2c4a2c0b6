"""BibTeX of the methods, data and models that a run used."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Reference:
    """One work: its BibTeX key, the first author's name and the year (to recognise it in free text), its fields."""

    key: str
    author: str
    year: int
    kind: str
    fields: tuple[tuple[str, str], ...]

    def bibtex(self) -> str:
        """The entry as BibTeX."""
        body = ",\n".join(f"  {name} = {{{value}}}" for name, value in (*self.fields, ("year", str(self.year))))
        return f"@{self.kind}{{{self.key},\n{body}\n}}"


def _reference(key: str, name: str, year: int, kind: str, **fields: str) -> Reference:
    return Reference(key, name, year, kind, tuple(fields.items()))


_ALL = (
    _reference(
        "arora2024spafit", "Arora", 2024, "misc",
        author="Arora, Samir and Wang, Liangliang",
        title="{SPAFIT}: Stratified Progressive Adaptation Fine-tuning for Pre-trained Large Language Models",
        eprint="2405.00201", archivePrefix="arXiv",
    ),
    _reference(
        "hewitt2019control", "Hewitt", 2019, "inproceedings",
        author="Hewitt, John and Liang, Percy",
        title="Designing and Interpreting Probes with Control Tasks",
        booktitle="Proceedings of EMNLP-IJCNLP", pages="2733--2743",
    ),
    _reference(
        "xu2020usable", "Xu", 2020, "inproceedings",
        author="Xu, Yilun and Zhao, Shengjia and Song, Jiaming and Stewart, Russell and Ermon, Stefano",
        title="A Theory of Usable Information under Computational Constraints",
        booktitle="International Conference on Learning Representations",
    ),
    _reference(
        "tenney2019bert", "Tenney", 2019, "inproceedings",
        author="Tenney, Ian and Das, Dipanjan and Pavlick, Ellie",
        title="{BERT} Rediscovers the Classical {NLP} Pipeline",
        booktitle="Proceedings of ACL", pages="4593--4601",
    ),
    _reference(
        "voita2020information", "Voita", 2020, "inproceedings",
        author="Voita, Elena and Titov, Ivan",
        title="Information-Theoretic Probing with Minimum Description Length",
        booktitle="Proceedings of EMNLP", pages="183--196",
    ),
    _reference(
        "hewitt2021conditional", "Hewitt", 2021, "inproceedings",
        author="Hewitt, John and Ethayarajh, Kawin and Liang, Percy and Manning, Christopher D.",
        title="Conditional Probing: Measuring Usable Information Beyond a Baseline",
        booktitle="Proceedings of EMNLP", pages="1626--1639",
    ),
    _reference(
        "niu2022does", "Niu", 2022, "inproceedings",
        author="Niu, Jingcheng and Lu, Wenjie and Penn, Gerald",
        title="Does {BERT} Rediscover a Classical {NLP} Pipeline?",
        booktitle="Proceedings of COLING", pages="3143--3153",
    ),
    _reference(
        "elazar2021amnesic", "Elazar", 2021, "article",
        author="Elazar, Yanai and Ravfogel, Shauli and Jacovi, Alon and Goldberg, Yoav",
        title="Amnesic Probing: Behavioral Explanation with Amnesic Counterfactuals",
        journal="Transactions of the Association for Computational Linguistics", volume="9", pages="160--175",
    ),
    _reference(
        "hase2023does", "Hase", 2023, "inproceedings",
        author="Hase, Peter and Bansal, Mohit and Kim, Been and Ghandeharioun, Asma",
        title="Does Localization Inform Editing? Surprising Differences in Causality-Based Localization vs. Knowledge "
        "Editing in Language Models",
        booktitle="Advances in Neural Information Processing Systems",
    ),
    _reference(
        "jonckheere1954distribution", "Jonckheere", 1954, "article",
        author="Jonckheere, A. R.",
        title="A Distribution-Free k-Sample Test Against Ordered Alternatives",
        journal="Biometrika", volume="41", pages="133--145",
    ),
    _reference(
        "conneau2018cram", "Conneau", 2018, "inproceedings",
        author="Conneau, Alexis and Kruszewski, German and Lample, Guillaume and Barrault, Lo{\\\"i}c and "
        "Baroni, Marco",
        title="What You Can Cram into a Single {\\$\\&!\\#*} Vector: Probing Sentence Embeddings for Linguistic "
        "Properties",
        booktitle="Proceedings of ACL", pages="2126--2136",
    ),
    _reference(
        "nivre2020universal", "Nivre", 2020, "inproceedings",
        author="Nivre, Joakim and de Marneffe, Marie-Catherine and Ginter, Filip and Haji{\\v{c}}, Jan and Manning, "
        "Christopher D. and Pyysalo, Sampo and Schuster, Sebastian and Tyers, Francis and Zeman, Daniel",
        title="Universal Dependencies v2: An Evergrowing Multilingual Treebank Collection",
        booktitle="Proceedings of LREC", pages="4034--4043",
    ),
    _reference(
        "silveira2014gold", "Silveira", 2014, "inproceedings",
        author="Silveira, Natalia and Dozat, Timothy and de Marneffe, Marie-Catherine and Bowman, Samuel and Connor, "
        "Miriam and Bauer, John and Manning, Christopher D.",
        title="A Gold Standard Dependency Corpus for {E}nglish",
        booktitle="Proceedings of LREC",
    ),
    _reference(
        "warstadt2019neural", "Warstadt", 2019, "article",
        author="Warstadt, Alex and Singh, Amanpreet and Bowman, Samuel R.",
        title="Neural Network Acceptability Judgments",
        journal="Transactions of the Association for Computational Linguistics", volume="7", pages="625--641",
    ),
    _reference(
        "wang2019glue", "Wang", 2019, "inproceedings",
        author="Wang, Alex and Singh, Amanpreet and Michael, Julian and Hill, Felix and Levy, Omer and Bowman, Samuel",
        title="{GLUE}: A Multi-Task Benchmark and Analysis Platform for Natural Language Understanding",
        booktitle="International Conference on Learning Representations",
    ),
    _reference(
        "devlin2019bert", "Devlin", 2019, "inproceedings",
        author="Devlin, Jacob and Chang, Ming-Wei and Lee, Kenton and Toutanova, Kristina",
        title="{BERT}: Pre-training of Deep Bidirectional Transformers for Language Understanding",
        booktitle="Proceedings of NAACL-HLT", pages="4171--4186",
    ),
    _reference(
        "wang2020minilm", "Wang", 2020, "inproceedings",
        author="Wang, Wenhui and Wei, Furu and Dong, Li and Bao, Hangbo and Yang, Nan and Zhou, Ming",
        title="{MiniLM}: Deep Self-Attention Distillation for Task-Agnostic Compression of Pre-Trained Transformers",
        booktitle="Advances in Neural Information Processing Systems",
    ),
    _reference(
        "song2020mpnet", "Song", 2020, "inproceedings",
        author="Song, Kaitao and Tan, Xu and Qin, Tao and Lu, Jianfeng and Liu, Tie-Yan",
        title="{MPNet}: Masked and Permuted Pre-training for Language Understanding",
        booktitle="Advances in Neural Information Processing Systems",
    ),
    _reference(
        "wolf2020transformers", "Wolf", 2020, "inproceedings",
        author="Wolf, Thomas and Debut, Lysandre and Sanh, Victor and Chaumond, Julien and others",
        title="Transformers: State-of-the-Art Natural Language Processing",
        booktitle="Proceedings of EMNLP: System Demonstrations", pages="38--45",
    ),
    _reference(
        "pedregosa2011scikit", "Pedregosa", 2011, "article",
        author="Pedregosa, Fabian and Varoquaux, Ga{\\\"e}l and Gramfort, Alexandre and Michel, Vincent and others",
        title="Scikit-learn: Machine Learning in {P}ython",
        journal="Journal of Machine Learning Research", volume="12", pages="2825--2830",
    ),
)  # fmt: skip

#: Every work that a run can cite, by BibTeX key.
REFERENCES = {r.key: r for r in _ALL}

#: Words in a model's name or a task's name and source, and the work behind them.
_MODELS = {"minilm": "wang2020minilm", "mpnet": "song2020mpnet", r"\bbert\b": "devlin2019bert"}
_DATA = {
    r"\bewt\b": "silveira2014gold",
    r"universal dependencies|treebank|conllu|\bud_": "nivre2020universal",
    r"senteval": "conneau2018cram",
    r"\bcola\b": "warstadt2019neural",
    r"\bglue\b|\b(cola|sst-?2|mrpc|qqp|stsb|sts-b|mnli|qnli|rte|wnli)\b": "wang2019glue",
}


def used(run: Mapping[str, Any]) -> list[str]:
    """Keys of :data:`REFERENCES` that a run calls for, in the order methods, criticism, data, model, software.

    Methods are read from the run's configuration, data and model from their names, sources and citation fields. A data
    set that cites a work unknown here is not in the list; :func:`bibtex` adds its entry if it is BibTeX.
    """
    controls = (run.get("config") or {}).get("controls", ["word-type"])
    keys = ["arora2024spafit", "tenney2019bert", "xu2020usable", "jonckheere1954distribution"]
    if "word-type" in controls:
        keys.insert(2, "hewitt2019control")
    measures = (run.get("config") or {}).get("measures", [])
    sources = {"online-code": "voita2020information", "variational-code": "voita2020information",
               "conditional": "hewitt2021conditional"}  # fmt: skip
    keys += [sources[m] for m in measures if m in sources]
    keys += ["niu2022does", "elazar2021amnesic", "hase2023does"]
    for name, facts in (run.get("tasks") or {}).items():
        text = " ".join([str(name), *(str(facts.get(k) or "") for k in ("source", "citation", "description"))])
        keys += [key for pattern, key in _DATA.items() if re.search(pattern, text.replace(".", " "), re.IGNORECASE)]
        cited = str(facts.get("citation") or "")
        keys += [r.key for r in _ALL if r.author.lower() in cited.lower() and str(r.year) in cited]
    model = run.get("model") or {}
    about = f"{model.get('name', '')} {model.get('reference', '')}"
    keys += [key for pattern, key in _MODELS.items() if re.search(pattern, about, re.IGNORECASE)]
    versions = run.get("versions") or {}
    software = {"transformers": "wolf2020transformers", "scikit-learn": "pedregosa2011scikit"}
    keys += [key for package, key in software.items() if package in versions]
    return list(dict.fromkeys(keys))


def bibtex(run: Mapping[str, Any]) -> str:
    """BibTeX of what a run used: methods, the criticism it answers to, data, model, software.

    Args:
        run: content of ``run.json``. Task citations that are BibTeX themselves are passed on as they are.

    Returns:
        Entries separated by blank lines, each key once.
    """
    entries = {key: REFERENCES[key].bibtex() for key in used(run)}
    for facts in (run.get("tasks") or {}).values():
        cited = str(facts.get("citation") or "").strip()
        if (found := re.match(r"@\w+\s*\{\s*([^,\s]+)", cited)) and not _known(cited):
            entries.setdefault(found[1], cited)
    return "\n\n".join(entries.values()) + "\n"


def _known(cited: str) -> bool:
    return any(r.author.lower() in cited.lower() and str(r.year) in cited for r in _ALL)
