"""Both stacks of an encoder-decoder in one extraction, against one bare forward pass, on UD EWT with MiniLM twice."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.bench.extraction import _bare, _seconds, ewt_texts
from tests.bench.table import Row, print_table
from tests.paths import SHARED

ROUNDS, SENTENCES = 3, 1500


def _warm_started() -> Any:
    """MiniLM on both sides, cross-attention new, in memory."""
    import transformers

    from spafit.hub import quiet
    from spafit.models import default_model_path, load_model
    from spafit.runtime import torch_seed

    source = str(default_model_path())
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    with torch_seed(0, "cross-attention"), quiet():
        model = transformers.EncoderDecoderModel.from_encoder_decoder_pretrained(source, source)
    model.config.decoder_start_token_id = tokenizer.cls_token_id
    return load_model((model, tokenizer))


def _without_head(loaded: Any, batches: list[dict[str, Any]]) -> None:
    import torch

    model = loaded.model
    with torch.inference_mode():
        for batch in batches:
            own = {k: v for k, v in batch.items() if not k.startswith("decoder_")}
            states = model.encoder(**own)[0]
            model.decoder.bert(
                input_ids=batch["decoder_input_ids"], attention_mask=batch["decoder_attention_mask"],
                encoder_hidden_states=states, encoder_attention_mask=own["attention_mask"], use_cache=False,
            )  # fmt: skip


def _extract(loaded: Any, texts: list[Any]) -> None:
    """The whole job from strings to finished shards of both stacks on disk, nothing cached."""
    import probing.batching
    from probing.extraction import extract_stacks

    probing.batching._RECENT.clear()
    with tempfile.TemporaryDirectory() as folder:
        extract_stacks(
            loaded, texts, stacks="encoder,decoder", sentence_pooling=(), device="cpu", cache_dir=Path(folder)
        )


def main() -> int:
    """Print the table; non-zero when a target is missed."""
    import torch

    from probing.extraction import plan_extraction

    if not SHARED.is_dir():
        print("skipped: the shared real data (../shared/data) is not here")
        return 0
    loaded, texts = _warm_started(), ewt_texts()[:SENTENCES]
    with tempfile.TemporaryDirectory() as folder:
        plan = plan_extraction(loaded, texts, stack="decoder", sentence_pooling=(), cache_dir=Path(folder))
    batches = plan.encoded_batches()
    _bare(loaded, batches[-2:])
    # Interleaved, and the fastest of each: other work on the machine only ever adds time.
    acts = {"whole": (_bare, batches), "without head": (_without_head, batches), "ours": (_extract, texts)}
    rounds = [{n: _seconds(act, loaded, given) for n, (act, given) in acts.items()} for _ in range(ROUNDS)]
    wall, cpu = ({n: min(r[n][i] for r in rounds) for n in acts} for i in (0, 1))
    said = f"fastest of {ROUNDS}"
    return print_table(
        f"both stacks, MiniLM-L6 twice, {len(texts)} sentences of UD EWT, {torch.get_num_threads()} threads",
        [
            Row(
                "time / one bare pass of the whole model", wall["ours"] / wall["whole"], 1.1, "<=",
                f"bare {wall['whole']:.1f} s, extraction {wall['ours']:.1f} s ({said})",
            ),
            Row(
                "time / one bare pass without the language-model head", wall["ours"] / wall["without head"], 1.2, "<=",
                f"bare {wall['without head']:.1f} s; nothing that is probed needs the head",
            ),
        ],
        notes=[f"in CPU time: {cpu['ours'] / cpu['whole']:.3f} and {cpu['ours'] / cpu['without head']:.3f}"],
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
