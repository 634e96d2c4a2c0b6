"""Structural probes of all hidden states of MiniLM on the whole of UD EWT: wall time of fits and of the evaluation.

Distances and depths, rank 64, one seed, 12,544 training sentences; states are extracted before, or come from the cache.
The evaluation predicts all distances and depths of the 2,077 test sentences and scores them: spanning trees, rank
correlations, and the linear chain.
"""

from __future__ import annotations

import sys
import time

import numpy as np

from tests.bench.table import Row, print_table
from tests.paths import SHARED


def main() -> int:
    """Print the table; non-zero when a target is missed."""
    from probing.extraction import extract
    from probing.probes.structural import fit_structural_probes
    from probing.registry import load_tasks
    from probing.tree_scores import linear_chain, score_trees
    from probing.trees import item_trees
    from spafit.models import load_model

    if not SHARED.is_dir():
        print("skipped: the shared real data (../shared/data) is not here")
        return 0
    (task,) = load_tasks([f"conllu:{SHARED}/ud/UD_English-EWT#tree"])
    loaded = load_model()
    store = extract(loaded, task.corpus.texts, sentence_pooling=())
    rows = store.word_offsets[task.items["text"].to_numpy()] + task.items["span"].to_numpy()
    whole = task.items["item"].map(dict(zip(task.items["item"], store.word_valid[rows], strict=True)))
    whole = whole.groupby(task.items["group"], sort=False).transform("all").to_numpy()
    part = {s: np.flatnonzero((task.items["split"] == s).to_numpy() & whole) for s in ("train", "dev", "test")}
    trees = {s: item_trees(task.items.iloc[at]) for s, at in part.items()}
    lengths = [len(tree) for tree in trees["test"]]
    fitting = evaluating = 0.0
    found = []
    for hidden in range(loaded.stacks[0].num_blocks + 1):
        x = {s: store.words("mean", hidden=hidden, rows=rows[at])[None] for s, at in part.items()}
        start = time.perf_counter()
        fit = fit_structural_probes(x["train"], trees["train"], x["dev"], trees["dev"])
        middle = time.perf_counter()
        scores = score_trees(fit.distances(x["test"], lengths), fit.depths(x["test"], lengths), trees["test"])
        fitting, evaluating = fitting + middle - start, evaluating + time.perf_counter() - middle
        once = np.ones((1, len(lengths)))
        found.append({m: float(scores.means(m, once)[0, 0]) for m in ("uuas", "dspr", "nspr", "root_accuracy")})
    chain = {m: float(linear_chain(trees["test"]).means(m, once)[0, 0]) for m in found[0]}
    minutes = (fitting + evaluating) / 60
    table = [
        Row("structural probes of 7 hidden states on UD EWT train, minutes", minutes, 15.0, "<=",
            f"{len(trees['train']):,} sentences"),
        Row("evaluation / fits", evaluating / fitting, 0.1, "<=", f"{evaluating:.1f} against {fitting:.0f} s"),
    ]  # fmt: skip
    named = {"linear chain": chain, **{f"hidden {h}": values for h, values in enumerate(found)}}
    notes = [f"{n}: " + ", ".join(f"{m} {v:.3f}" for m, v in values.items()) for n, values in named.items()]
    return print_table("structural probes", table, notes=notes)


if __name__ == "__main__":
    sys.exit(main())
