"""``spafit tasks``: list the registered tasks, describe any reference, show its rows, check its files."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from probing.tasks.base import Task

tasks_app = typer.Typer(
    help="List, describe and check probing tasks, and show their rows.",
    rich_markup_mode="markdown",
    epilog="Examples: `spafit tasks`, `spafit tasks show core.tense`, `spafit tasks rows 'conllu:UD_English-EWT#upos'`",
    context_settings={"help_option_names": ["-h", "--help"]},
)

_JSON = typer.Option("--json", help="Print JSON for programs.")
_Reference = Annotated[
    str,
    typer.Argument(
        metavar="REF",
        help="A registered name or group, conllu:PATH#NAMES, senteval:PATH#NAMES, table:PATH,text=COLUMN,label=COLUMN, "
        "hub:NAME,text=COLUMN,label=COLUMN, edges:PATH, iob:PATH#spans,tags, propbank:PATH#constituents,roles, "
        "images:PATH#class,intensity, or a .yaml file that groups references by level. Several: with commas.",
    ),
]


@tasks_app.callback(invoke_without_command=True)
def list_registered(context: typer.Context, json: Annotated[bool, _JSON] = False) -> None:
    """List the registered tasks and groups.

    Files need no registration: name them as `spafit tasks show --help` says.
    """
    if context.invoked_subcommand is not None:
        if json:
            from spafit.errors import UsageError

            raise UsageError(
                f"--json before {context.invoked_subcommand!r} belongs to the list; write it after the command, "
                "such as `spafit tasks show core.tense --json`."
            )
        return
    from probing.registry import list_tasks

    table = list_tasks()
    if json:
        _print_json(table.to_dict("records"))
        return
    shown = table[["name", "level", "unit", "classes", "train", "dev", "test", "description"]].astype(str)
    shown.loc[table["kind"] == "group", "classes"] = ""
    shown["description"] = [d.partition(". ")[0].rstrip(".") for d in shown["description"]]  # `show` gives the rest
    _print_table(list(shown.columns), shown.to_numpy().tolist())


@tasks_app.command()
def show(reference: _Reference, json: Annotated[bool, _JSON] = False) -> None:
    """Describe the task or tasks that a reference names.

    Example: `spafit tasks show core.tense`
    """
    described = [_describe(task) for task in _load(reference)]
    if json:
        _print_json(described)
        return
    for i, fields in enumerate(described):
        if i:
            typer.echo()
        typer.echo(fields["name"])
        notes = fields.pop("notes")
        for key, value in list(fields.items())[1:]:
            typer.echo(f"  {key:<12} {_plain(value)}")
        for note in notes:
            typer.echo(f"  {'note':<12} {note}")


@tasks_app.command()
def rows(
    reference: _Reference,
    n: Annotated[int, typer.Option("--n", "-n", min=1, help="Rows to show of each task.")] = 5,
    split: Annotated[str, typer.Option(help="Split to show rows of.")] = "train",
    json: Annotated[bool, _JSON] = False,
) -> None:
    """Show the first rows of a split: item, label, and the text with the item's word in brackets.

    Example: `spafit tasks rows 'conllu:UD_English-EWT#upos' --n 3 --split test`
    """
    from spafit.errors import UsageError

    found: list[dict[str, Any]] = []
    for task in _load(reference):
        items = task.items[task.items["split"] == split].head(n)
        if items.empty:
            splits = ", ".join(("train", "dev", *task.test_splits))
            raise UsageError(f"Task {task.name!r} has no split {split!r}; it has {splits}.")
        found += [
            {
                "task": task.name,
                "item": item["item"],
                "label": _label(task, item["label"]),
                "text": _marked(task, item),
            }
            for item in items.to_dict("records")
        ]
    if json:
        _print_json(found)
    else:
        _print_table(list(found[0]), [[str(v) for v in row.values()] for row in found])


@tasks_app.command()
def validate(reference: _Reference) -> None:
    """Read the files of a reference and check every line and task; the exit status is 1 if something is wrong.

    Example: `spafit tasks validate 'table:reviews.csv,text=review,label=stars'`
    """
    for task in _load(reference):
        typer.echo(f"ok  {task.name}: {_sizes(task)}, {len(task.labels)} classes, {len(task.corpus.texts)} texts")
        for note in task.notes:
            typer.echo(f"    note: {note}")


def _load(reference: str) -> tuple[Task, ...]:
    from probing.registry import load_tasks, split_references

    return load_tasks(split_references(reference))


def _sizes(task: Task) -> str:
    counts = task.items["split"].value_counts()
    return ", ".join(f"{counts[s]:,} {s}" for s in ("train", "dev", *task.test_splits))


def _describe(task: Task) -> dict[str, Any]:
    items = task.items
    test = items[items["split"] == task.test_splits[0]]["label"]
    commonest = items.loc[items["split"] == "train", "label"].mode().iloc[0]
    chance = {"chance": round(float((test == commonest).mean()), 4)} if task.kind == "classes" else {}
    return {
        "name": task.name,
        "description": task.description,
        "level": task.level,
        "unit": task.unit,
        "kind": task.kind,
        "items": _sizes(task),
        "texts": len(task.corpus.texts),
        "classes": list(task.labels),
        **chance,
        "source": task.source,
        "licence": task.licence,
        "citation": task.citation,
        "notes": list(task.notes),
    }


def _plain(value: Any) -> str:
    if isinstance(value, list):
        more = f", … ({len(value)} in all)" if len(value) > 20 else ""
        return ", ".join(map(str, value[:20])) + more
    return str(value)


def _label(task: Task, label: Any) -> str:
    """What an item's label stands for: a class, several between semicolons, a number, or the number of a head."""
    if task.kind == "number":
        return f"{label:g}"
    if task.kind == "tree":
        return f"head {label}" if label else "root"
    positions = [int(i) for i in label.split(",") if i] if task.kind == "multilabel" else [label]
    return "; ".join(task.labels[i] for i in positions)


def _marked(task: Task, item: dict[Any, Any]) -> str:
    """The text with the item's span in brackets (a second one in braces), or both texts of a pair."""
    found = task.corpus.texts[item["text"]]
    if task.corpus.of_images:
        return " ".join([found.string, *(f"[{found.words[item[c]]}]" for c in task.span_columns)])
    if task.span_columns:
        shown = found.string
        marks = []
        for column, (left, right) in zip(task.span_columns, (("[", "]"), ("{", "}")), strict=False):
            start, end = found.spans[item[column]]
            marks += [(end, 0, -start, right), (start, 1, -end, left)]
        for at, _, _, mark in sorted(marks, reverse=True):  # from the right, so that positions stay what they are
            shown = shown[:at] + mark + shown[at:]
        return shown
    second = task.corpus.texts[item["text2"]].string if "text2" in item else found.second
    return found.string if second is None else f"{found.string}  ||  {second}"


def _print_table(header: Sequence[str], cells: Sequence[Sequence[str]]) -> None:
    widths = [max(len(row[i]) for row in [header, *cells]) for i in range(len(header))]
    for row in (header, *cells):
        typer.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _print_json(content: Any) -> None:
    import json

    typer.echo(json.dumps(content, indent=1, ensure_ascii=False, default=int))
