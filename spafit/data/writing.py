"""Data of models that write: running text from text files, answers to prompts from tables and conversations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd

from spafit.data.sampling import hold_out
from spafit.data.tables import read_table_file
from spafit.data.text import read_text
from spafit.data.training import TrainData
from spafit.data.wikitext import articles, heading_pairs
from spafit.errors import DataError, did_you_mean


def text_data(files: Mapping[str, str | Path], *, name: str | None = None, seed: int = 0) -> TrainData:
    """Running text, one file per split; a line with something in it is a text, and of WikiText's files an article.

    Args:
        files: split -> UTF-8 file; ``train`` alone is split 80/20 into train and validation.
        name: short name; by default the first file's.
        seed: of the split.

    Raises:
        DataError: a file cannot be read or is empty.
    """
    frames = {}
    for split, path in files.items():
        text = read_text(path)
        texts = articles(text) or [line.strip() for line in text.splitlines() if line.strip()]
        frames[split] = pd.DataFrame({"text": texts, "idx": np.arange(len(texts))})
    return _task(files, frames, name, seed, kind="text")


def answers_data(
    files: Mapping[str, str | Path],
    *,
    prompt: str = "prompt",
    answer: str = "answer",
    header: bool = True,
    name: str | None = None,
    seed: int = 0,
) -> TrainData:
    """Prompts and answers, one file per split, which :func:`read_pairs` reads.

    Args:
        files: split -> file; ``train`` alone is split 80/20 into train and validation.
        prompt: column of what is read, or of conversations; see :func:`read_pairs`.
        answer: column of what is to be written.
        header: whether text files name their columns in the first line.
        name: short name; by default the first file's.
        seed: of the split.

    Raises:
        DataError: a column that a file does not have, or an empty prompt or answer (names the file and the row).
    """
    frames = {s: read_pairs(path, prompt=prompt, answer=answer, header=header) for s, path in files.items()}
    data = _task(files, frames, name, seed, kind="answers")
    notes = [f"{Path(path).name}: {frames[s].attrs['note']}" for s, path in files.items() if frames[s].attrs["note"]]
    return replace(data, source="; ".join([data.source, *notes]))


def read_pairs(
    path: str | Path, *, prompt: str = "prompt", answer: str | None = "answer", header: bool = True
) -> pd.DataFrame:
    """Prompts and answers of one table.

    Args:
        path: TSV, CSV, JSON lines or parquet; or a CoNLL-U file (``.conllu``), which has the columns ``sentence`` and
            ``main_clause`` (:func:`spafit.data.compression.compression_pairs`), or one of WikiText's (``.txt``), which
            has ``opening`` and ``heading`` (:func:`spafit.data.wikitext.heading_pairs`).
        prompt: column of what is read (a number for files without a header). Several with ``+`` between them, such as
            ``instruction+input``, are joined by an empty line, without those that are empty. Where its cells are
            conversations (``messages``: a list of objects with ``role`` and ``content``), the first thing that the user
            says, after the system's text if there is one, is the prompt, and what the assistant says to it the answer;
            later turns refer back and are left out.
        answer: column of what is to be written; not read beside conversations. None where there is none.
        header: whether text files name their columns in the first line.

    Returns:
        Columns ``prompt``, ``answer`` (missing where there is none) and ``idx`` (row of the file, from 0).
        ``attrs["note"]`` says how many conversations went on, or is empty.

    Raises:
        DataError: a column that the file does not have, an empty prompt or answer, or a conversation that is none
            (names the file and the row).
    """
    path = Path(path)
    table = _derived(path)
    table = read_table_file(path, header=header) if table is None else table
    columns = [prompt] if prompt in table else prompt.split("+")
    talks = columns == [prompt] and prompt in table and isinstance(table[prompt].iloc[0], list)
    for column in (*columns, *([] if answer is None or talks else [answer])):
        if column not in table:
            raise DataError(
                f"{path}: no column {column!r}. Columns: {', '.join(map(str, table.columns))}."
                f"{did_you_mean(column, map(str, table.columns))}"
            )
    note = ""
    if talks:
        exchanges = [_exchange(path, i, talk) for i, talk in enumerate(table[prompt], 1)]
        frame = pd.DataFrame([e[:2] for e in exchanges], columns=["prompt", "answer"])
        if longer := sum(e[2] for e in exchanges):
            note = f"{longer} of {len(frame)} conversations go on; their first exchange is taken"
        if answer is None:
            frame["answer"] = None
    else:
        cells = table[columns].astype(object).where(table[columns].notna(), "").astype(str)
        frame = pd.DataFrame({"prompt": ["\n\n".join(c for c in row if c.strip()) for row in cells.to_numpy()]})
        answers = None if answer is None else table[answer].astype(object)
        frame["answer"] = None if answers is None else answers.where(answers.notna(), "").astype(str).to_numpy()
    frame["idx"] = np.arange(len(frame))
    for column in ("prompt", *([] if answer is None else ["answer"])):
        empty = np.flatnonzero(frame[column].str.strip() == "")
        if len(empty):
            raise DataError(
                f"{path}, row {empty[0] + 1}: the {column} is empty ({len(empty)} in all). Remove such rows."
            )
    frame.attrs["note"] = note
    return frame


def _derived(path: Path) -> pd.DataFrame | None:
    """The pairs that a file gives by a rule, under their own names; None for a table."""
    if path.name.endswith((".conllu", ".conllu.gz")):
        from spafit.data.compression import compression_pairs

        return compression_pairs(path).rename(columns={"prompt": "sentence", "answer": "main_clause"})
    if path.suffix == ".txt":
        return heading_pairs(path).rename(columns={"prompt": "opening", "answer": "heading"})
    return None


def _exchange(path: Path, row: int, talk: object) -> tuple[str, str, bool]:
    """The first exchange of a conversation, and whether it goes on."""
    turns: list[tuple[str, str]] = []
    for turn in talk if isinstance(talk, Sequence) and not isinstance(talk, str) else [None]:
        role, content = (turn.get(k) if isinstance(turn, Mapping) else None for k in ("role", "content"))
        if not isinstance(role, str) or not isinstance(content, str):
            raise DataError(
                f"{path}, row {row}: not a conversation: every turn is an object with the texts role and content."
            )
        turns.append((role, content))
    system = [content for role, content in turns[:1] if role == "system"]
    said = turns[len(system) :]
    if [role for role, _ in said[:2]] != ["user", "assistant"]:
        raise DataError(
            f"{path}, row {row}: the conversation has the turns {', '.join(role for role, _ in turns) or 'none'}; "
            "a user's turn and an assistant's have to come first, after the system's at most."
        )
    return "\n\n".join([*system, said[0][1]]), said[1][1], len(said) > 2


def _task(
    files: Mapping[str, str | Path], frames: dict[str, pd.DataFrame], name: str | None, seed: int, *, kind: str
) -> TrainData:
    if set(frames) == {"train"}:
        kept, held = hold_out(frames["train"], 0.2, seed=seed)
        frames = {"train": kept.reset_index(drop=True), "validation": held.reset_index(drop=True)}
    paths = [Path(f) for f in files.values()]
    return TrainData(
        name or paths[0].stem, frames, None, (), source=", ".join(p.name for p in paths), kind=kind
    )  # fmt: skip
