"""An encoder-decoder warm-started from MiniLM learns to write the main clause of a sentence: runs, rows and page.

    python docs/results/compression_minilm/run.py run TREEBANK WORK

``TREEBANK`` is the folder of UD English-EWT; ``WORK`` keeps models: the same command goes on where it stopped. Without
arguments only the page is made again, from the rows beside this file.
"""

# ruff: noqa: E501 - sentences of a page

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pandas as pd

HERE = Path(__file__).parent
EPOCHS, BATCH, TOKENS = 3, 16, 48
PLANS = ("full",)
#: Sentences of the test set that are shown.
SHOWN = 8


def run(treebank: Path, work: Path) -> None:
    """Train each plan, write the test sentences' main clauses, score them beside the lead baseline."""
    import spafit
    from spafit import checkpoint
    from spafit.data.compression import compression_pairs, compression_rate, first_words
    from spafit.data.training import TrainData
    from spafit.generating import generate
    from spafit.kinds import kind_of
    from spafit.settings import TrainSettings
    from spafit.strata import Outside, StrataConfig, Stratum

    warm = warm_started(work / "warm")
    frames = {
        name: compression_pairs(treebank / f"en_ewt-ud-{part}.conllu")
        for name, part in (("train", "train"), ("validation", "dev"), ("test", "test"))
    }
    data = TrainData("main clauses", frames, None, (), source="UD English-EWT", kind="answers")
    test = frames["test"]
    rows = [scored("lead", first_words(list(test["prompt"]), compression_rate(frames["train"])), test)]
    rows.append(scored("whole sentence", list(test["prompt"]), test))
    plans = {
        "full": "full",
        "encoder frozen": StrataConfig(
            "MiniLM twice", {"encoder": 6, "decoder": 6},
            (Stratum("encoder", (0, 6), "freeze"), Stratum("decoder", (0, 6), "full")),
            Outside(pooler="freeze", head="full"), {"source": "encoder frozen"},
        ),
    }  # fmt: skip
    runs = []
    for name in PLANS:
        settings = TrainSettings(
            epochs=EPOCHS, batch_size=BATCH, max_length=TOKENS, learning_rate=3e-4, select_share=0, save_steps=100
        )
        result = spafit.fit(
            str(warm), plans[name], data=data, settings=settings, out=work / name.replace(" ", "-"), method=name,
            device="cpu", command="docs/results/compression_minilm/run.py",
        )  # fmt: skip
        runs.append(result.runs.assign(plan=name))
        written_to = work / f"{name.replace(' ', '-')}.parquet"
        if not written_to.is_file():
            kind = kind_of(data)
            headed = kind.load(str(warm), seed=0, revision=None, offline=True, allow_pickle=False)
            model = checkpoint.load(result.model_folder(0), base=headed.model).model.eval()
            written = generate(model, headed.tokenizer, list(test["prompt"]), max_new_tokens=TOKENS, batch_size=32)
            written.to_parquet(written_to)
        rows.append(scored(name, list(pd.read_parquet(written_to)["text"]), test))
    pd.concat(rows).round(5).to_csv(HERE / "scores.csv", index=False)
    pd.concat(runs).drop(columns=["seconds", "peak_memory_bytes"]).round(5).to_csv(HERE / "runs.csv", index=False)
    write_page()


def warm_started(folder: Path) -> Path:
    """MiniLM on both sides, cross-attention new; written once."""
    from transformers import AutoTokenizer, EncoderDecoderModel

    from spafit.models import default_model_path
    from spafit.runtime import torch_seed

    if (folder / "config.json").is_file():
        return folder
    source = str(default_model_path())
    with torch_seed(0, "warm start"):
        model = EncoderDecoderModel.from_encoder_decoder_pretrained(source, source)
    tokenizer = AutoTokenizer.from_pretrained(source)
    model.config.decoder_start_token_id, model.config.eos_token_id = tokenizer.cls_token_id, tokenizer.sep_token_id
    model.config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def scored(name: str, written: list[str], test: pd.DataFrame) -> pd.DataFrame:
    """ROUGE and exact match of every test sentence, as rows."""
    from spafit.generation_metrics import rouge_scores

    scores = rouge_scores(written, list(test["answer"]))
    same = np.array([w.strip().lower() == a.strip().lower() for w, a in zip(written, test["answer"], strict=True)])
    words = np.array([len(w.split()) for w in written])
    return pd.DataFrame(
        {"system": name, "item": test["idx"].to_numpy(), **scores, "exact": same.astype(int), "words": words}
    )


def write_page() -> None:
    """The page from the rows."""
    from spafit.stats import paired_difference

    raise NotImplementedError(paired_difference)


if __name__ == "__main__":
    if sys.argv[1:2] == ["run"]:
        run(Path(sys.argv[2]), Path(sys.argv[3]))
    else:
        write_page()
