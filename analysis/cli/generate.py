"""``spafit generate``: let a model write, from prompts on the command line or in a table, with figures of the texts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from analysis.cli.train import AllowPickle, Debug, Device, Json, NoHeader, Offline, Quiet, Revision

if TYPE_CHECKING:
    from spafit.heads import HeadedModel

EXAMPLES = """
Examples:

- `spafit generate SmolLM2-135M.gguf "What is the capital of France?" "Write a sentence about the sea."`
- `spafit generate gpt2 "Once upon a time" --template continue --sample --temperature 0.8`
- `spafit generate runs/train/mine/seed-0/model --table test.jsonl --prompt question --answer answer --out written`
"""


def generate(
    model: Annotated[
        str, typer.Argument(help="A trained model's folder (…/seed-0/model), or a hub id, folder or GGUF file.")
    ],
    texts: Annotated[list[str] | None, typer.Argument(metavar="[TEXT]...", help="Prompts.")] = None,
    table: Annotated[
        Path | None, typer.Option("--table", help="Prompts from a table: TSV, CSV, JSONL, parquet.")
    ] = None,
    prompt: Annotated[str, typer.Option("--prompt", help="With --table: column of what is read.")] = "prompt",
    answer: Annotated[
        str | None, typer.Option("--answer", help="With --table: column of right answers to score against.")
    ] = None,
    no_header: NoHeader = False,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="With --table: the first so many rows.")] = None,
    template: Annotated[
        str,
        typer.Option(
            "--template",
            help="chat (the model's own chat template), plain (a line break after the prompt), continue (the text goes "
            "on from the prompt), auto: as the model was trained here, or chat where it has a template, else plain.",
        ),
    ] = "auto",
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, help="Tokens written, at most.")] = 64,
    num_beams: Annotated[int, typer.Option("--num-beams", min=1, help="Beams; 1 is greedy.")] = 1,
    sample: Annotated[bool, typer.Option("--sample", help="Draw tokens instead of taking the most probable.")] = False,
    temperature: Annotated[float, typer.Option("--temperature", help="With --sample.")] = 1.0,
    top_p: Annotated[float, typer.Option("--top-p", help="With --sample: nucleus of this probability.")] = 1.0,
    seed: Annotated[int, typer.Option("--seed", help="With --sample: of the draws.")] = 0,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Prompts at a time.")] = 16,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Where texts go (.parquet, .csv), and their figures (-figures.*)."),
    ] = None,
    revision: Revision = None,
    offline: Offline = False,
    allow_pickle: AllowPickle = False,
    device: Device = "auto",
    quiet: Quiet = False,
    json_output: Json = False,
    debug: Debug = False,
) -> None:
    """Let a model write an answer to each prompt, or go on from it.

    Prints the texts, and figures of them all with intervals: length, share that ended by themselves, repetition and
    variety; with `--answer` exact match, ROUGE (extra `generation`), and bits per token and perplexity of the right
    answers. None of these says whether a text makes sense.
    """
    from spafit import io
    from spafit.answer_bits import answer_bits
    from spafit.errors import UsageError
    from spafit.generating import generate as write
    from spafit.generation_metrics import generation_table
    from spafit.runtime import pick_device

    if bool(texts) == (table is not None):
        raise UsageError("Give prompts as arguments or a table with --table, one of the two.")
    if table is None and (answer is not None or limit is not None or no_header):
        raise UsageError("--answer, --limit and --no-header are of a table. Give one with --table, or leave them out.")
    device = pick_device(device)
    prompts, answers = (
        (list(texts or ()), None) if table is None else _read(table, prompt, answer, not no_header, limit)
    )
    headed, trained_as = _load(model, revision=revision, offline=offline, allow_pickle=allow_pickle)
    headed.model.to(device)
    chosen: Any = "continue" if template == "auto" and trained_as == "text" else template
    written = write(
        headed.model, headed.tokenizer, prompts, max_new_tokens=max_new_tokens, num_beams=num_beams, sample=sample,
        temperature=temperature, top_p=top_p, seed=seed, batch_size=batch_size, template=chosen, quiet=quiet,
    )  # fmt: skip
    bits = None
    if answers is not None:
        written.insert(1, "answer", answers)
        bits = answer_bits(headed, prompts, answers, template=chosen, batch_size=batch_size)
        written["bits"], written["answer_tokens"] = bits[:, 0], bits[:, 1].astype(int)
    figures = generation_table(written, references=answers, bits=bits)
    if out is not None:
        out = out.with_suffix("") if out.suffix in (".csv", ".parquet") else out
        io.write_table(out, written)
        io.write_table(out.with_name(f"{out.name}-figures"), figures)
    if json_output:
        import json

        content = {"texts": written.to_dict("records"), "figures": figures.to_dict("records")}
        typer.echo(json.dumps(io.plain(content), indent=1, ensure_ascii=False))
        return
    for row in written.head(10).itertuples():
        typer.echo(f"> {row.prompt}\n{row.text}{'' if row.ended else ' …'}\n")
    if len(written) > 10:
        typer.echo(f"({len(written) - 10} more{'' if out is None else f' in {out}.csv'})\n")
    typer.echo(figures.to_string(index=False, float_format=lambda v: f"{v:.3f}", na_rep="—"))
    if out is not None and not quiet:
        typer.echo(f"{len(written)} texts written to {out}.parquet and {out}.csv, figures to {out}-figures.csv")


def _read(
    table: Path, prompt: str, answer: str | None, header: bool, limit: int | None
) -> tuple[list[str], list[str] | None]:
    from spafit.data.writing import read_pairs

    pairs = read_pairs(table, prompt=prompt, answer=answer, header=header).iloc[:limit]
    return pairs["prompt"].tolist(), None if answer is None else pairs["answer"].tolist()


def _load(model: str, *, revision: str | None, offline: bool, allow_pickle: bool) -> tuple[HeadedModel, str | None]:
    """The model with the head that writes, and the kind of task it was trained on here, if it was."""
    from spafit.checkpoint import CONFIG_FILE, load, read_config
    from spafit.errors import ModelError
    from spafit.heads import HeadedModel, language_head, load_with_head
    from spafit.hub import locate
    from spafit.kinds.language import ready_to_pad
    from spafit.loading import load_tokenizer

    folder = Path(model).expanduser()
    if not (folder / CONFIG_FILE).is_file():
        head = language_head(model, revision=revision, offline=offline)
        headed = load_with_head(model, head=head, revision=revision, offline=offline, allow_pickle=allow_pickle)
        if headed.missing:
            raise ModelError(
                f"{model} lacks weights of a model that writes ({headed.missing[0]}). Give a model with a "
                "language-model head."
            )
        return ready_to_pad(headed), None
    base = read_config(folder)["base"]
    head = base.get("head", "sequence-classification")
    if head not in ("causal-lm", "seq2seq-lm"):
        raise ModelError(
            f"{folder} was trained for {head} and writes no text. Give a model trained with --prompt or --running-text."
        )
    stratified = load(folder, offline=offline, allow_pickle=allow_pickle)
    tokenizer = load_tokenizer([locate(str(folder))], required=True)
    headed = HeadedModel(
        stratified.model, tokenizer, folder.name, str(folder), None, folder, head, missing=(), notes=()
    )  # fmt: skip
    return ready_to_pad(headed), base.get("kind")
