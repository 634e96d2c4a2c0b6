"""Pairs of a sentence and the words of its main clause, by a rule over dependency trees: something to learn to write.

The rule is of the syntax, not of what matters: nobody wrote or judged these answers. A model learns from them to find
the main clause, and is scored by how far it does. Their licence is that of the treebank.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from spafit.data.conllu import Sentence, read_sentences
from spafit.errors import DataError, UsageError

#: Relations whose words are not of the main clause, with everything below them; subtypes are meant, too.
DROPPED = ("acl", "advcl", "appos", "discourse", "dislocated", "list", "parataxis", "reparandum", "vocative")
#: Dependents that make a word the predicate of a clause of its own.
_OF_CLAUSES = ("nsubj", "csubj", "cop", "aux", "expl", "mark")
#: What a word of this class is incomplete without.
_COMPLETING = {"PRON": ("acl",), "DET": ("acl",), "ADV": ("acl", "advcl")}
_PAIRED = {")": "(", "]": "[", "}": "{", "”": "“", "’": "‘", "''": "``"}


def main_clause(sentence: Sentence) -> list[int]:
    """Positions (from 0) of the words of the main clause.

    The rule: the root and everything below it, except what hangs, at any depth, on one of :data:`DROPPED` (relative and
    adverbial clauses, appositions, parentheses, interjections, forms of address), and except coordinated *clauses*
    (``conj`` that is a verb, or a word with a subject, copula, auxiliary or conjunction of its own) with their
    conjunctions. What hangs on a pronoun (``what I paid for``, ``those who came``) or adverb (``as long as you like``)
    stays, for these say little alone. Clauses that are subject or object of a kept verb (``csubj``, ``ccomp``,
    ``xcomp``) stay: without them it is not complete. Of the punctuation, what stands next to something dropped goes,
    too, unless it ends the sentence, and so do marks that stand first, or twice in a row, and brackets and quotation
    marks without their partner.

    Raises:
        DataError: a word without a head.
    """
    heads, n = sentence.heads, len(sentence.words)
    if min(heads) < 0:
        raise DataError(f"Sentence {sentence.id!r} has a word without a head, so it has no main clause.")
    below: list[list[int]] = [[] for _ in range(n + 1)]
    for i, head in enumerate(heads):
        below[head].append(i)
    relations = [r.partition(":")[0] for r in sentence.deprels]
    kept: set[int] = set()
    waiting = [i for i in below[0] if relations[i] == "root"][:1] or below[0][:1]
    while waiting:
        i = waiting.pop()
        kept.add(i)
        waiting += [j for j in below[i + 1] if not _is_dropped(j, i, relations, sentence.upos, below)]
    return _without_loose_marks(sentence, kept)


def _is_dropped(
    word: int, head: int, relations: Sequence[str], upos: Sequence[str], below: Sequence[Sequence[int]]
) -> bool:
    if relations[word] in _COMPLETING.get(upos[head], ()):
        return False
    if relations[word] == "conj":
        return upos[word] == "VERB" or any(relations[j] in _OF_CLAUSES for j in below[word + 1])
    return relations[word] in DROPPED


def _without_loose_marks(sentence: Sentence, kept: set[int]) -> list[int]:
    words, n = sentence.words, len(sentence.words)
    mark = [tag == "PUNCT" for tag in sentence.upos]
    end = n - 1
    while end > 0 and mark[end] and _is_paired(words[end]):
        end -= 1  # a quotation mark or bracket after the full stop
    stops = mark[end] and set(words[end]) <= set(".!?…")
    left = {
        i for i in kept if not mark[i] or i == end or all(j in kept for j in (i - 1, i + 1) if 0 <= j < n)
    }  # fmt: skip
    if stops:
        left.add(end)  # though it may hang on something dropped
    ordered: list[int] = []
    for i in sorted(left):
        if mark[i] and not _is_paired(words[i]) and (not ordered or mark[ordered[-1]]):
            if ordered and stops and i == end and set(words[ordered[-1]]) <= set(",;:-–—"):
                ordered[-1] = i  # the end of the sentence rather than a comma
            elif not ordered or not _is_paired(words[ordered[-1]]):
                continue
            else:
                ordered.append(i)
            continue
        ordered.append(i)
    loose = _unpaired(words, ordered)
    return [i for i in ordered if i not in loose]


def _is_paired(word: str) -> bool:
    return word in _PAIRED or word in _PAIRED.values() or word == '"'


def _unpaired(words: Sequence[str], chosen: Sequence[int]) -> set[int]:
    """Brackets and quotation marks that lost their partner."""
    opened: list[int] = []
    loose: set[int] = set()
    for i in chosen:
        word = words[i]
        if word == '"':
            partner = next((o for o in reversed(opened) if words[o] == '"'), None)
        else:
            partner = next((o for o in reversed(opened) if words[o] == _PAIRED.get(word)), None)
        if partner is not None:
            opened.remove(partner)
        elif word in _PAIRED.values() or word == '"':
            opened.append(i)
        elif word in _PAIRED:
            loose.add(i)
    return loose | set(opened)


def compression_pairs(path: str | Path) -> pd.DataFrame:
    """Sentences of a treebank with the words of their main clause; those with nothing to leave out are none.

    Args:
        path: a CoNLL-U file with heads.

    Returns:
        Columns ``prompt`` (the sentence as it is written), ``answer`` (:func:`main_clause`) and ``idx`` (position of
        the sentence in the file, from 0). Repeated sentences are given once.

    Raises:
        DataError: the file is malformed, lacks heads, or has no sentence with something to leave out.
    """
    rows, seen = [], set()
    for position, sentence in enumerate(read_sentences(Path(path))):
        kept = main_clause(sentence)
        chosen = {i for i in kept if sentence.upos[i] != "PUNCT"}
        whole = {i for i, tag in enumerate(sentence.upos) if tag != "PUNCT"}
        prompt = sentence.text()
        if chosen and chosen != whole and prompt not in seen:
            seen.add(prompt)
            rows.append((prompt, sentence.text(kept), position))
    if not rows:
        raise DataError(f"{path}: no sentence has anything to leave out. Give a treebank with dependency trees.")
    return pd.DataFrame(rows, columns=["prompt", "answer", "idx"])


def compression_rate(pairs: pd.DataFrame) -> float:
    """Mean over pairs of the answer's words over the prompt's, by white space."""
    return float(
        np.mean([len(a.split()) / len(p.split()) for p, a in zip(pairs["prompt"], pairs["answer"], strict=True)])
    )


def first_words(prompts: Sequence[str], rate: float) -> list[str]:
    """The baseline that looks at no structure: of each prompt the first ``rate`` of its words, at least one.

    Args:
        prompts: the sentences.
        rate: :func:`compression_rate` of the training pairs.

    Raises:
        UsageError: a rate that is not above 0 and at most 1.
    """
    if not 0 < rate <= 1:
        raise UsageError(f"The share of words to keep is {rate}; it has to be above 0 and at most 1.")
    words = [p.split() for p in prompts]
    return [" ".join(w[: max(1, round(rate * len(w)))]) for w in words]
