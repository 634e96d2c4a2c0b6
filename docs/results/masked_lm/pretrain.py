"""A small masked language model, trained from nothing on WikiText-2's validation text in minutes on a CPU.

    python docs/results/masked_lm/pretrain.py WIKITEXT_FOLDER FOLDER

Writes a folder of tensors, configuration and tokenizer that ``spafit.language_models.load_language_model`` takes.
A finished model is kept, and an interrupted training goes on where it stopped; recipe, text and versions of torch
decide the weights.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
#: Standard deviation of the first weights.
INITIAL = 0.08


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the model, beside the text."""

    vocabulary: int = 3000
    width: int = 128
    blocks: int = 4
    heads: int = 4
    window: int = 48
    batch: int = 16
    steps: int = 3000
    learning_rate: float = 2e-3
    masked: float = 0.4
    seed: int = 0


def read_text(path: Path) -> str:
    """Running text; WikiText's mark of a rare word becomes the tokenizer's."""
    return path.read_text(encoding="utf-8").replace("<unk>", "[UNK]")


def make_tokenizer(text: str, recipe: Recipe) -> Any:
    """A WordPiece tokenizer whose vocabulary is learnt from ``text``; the same text gives the same vocabulary.

    Characters seen fewer than 10 times get no piece. Pieces of one character are numbered before the learning starts:
    the library numbers them in an order of chance, by which it then settles ties.
    """
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    normalizer = normalizers.BertNormalizer(lowercase=True)
    plain = normalizer.normalize_str(text.replace("[UNK]", " "))
    kept = sorted(c for c, n in Counter(plain).items() if n >= 10 and not c.isspace())
    first = [*SPECIAL, *kept, *(f"##{c}" for c in kept)]
    learning = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    learning.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(vocab_size=recipe.vocabulary, special_tokens=first, show_progress=False)
    known = plain.translate({ord(c): None for c in set(plain) - set(kept) if not c.isspace()})
    learning.train_from_iterator(known.splitlines(), trainer)
    backend = Tokenizer(models.WordPiece(learning.get_vocab(), unk_token="[UNK]"))
    backend.normalizer = normalizer
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, model_max_length=recipe.window, pad_token="[PAD]", unk_token="[UNK]",
        cls_token="[CLS]", sep_token="[SEP]", mask_token="[MASK]",
    )  # fmt: skip


def untrained(tokenizer: Any, recipe: Recipe) -> Any:
    """The model before its first step.

    So small a model and text need a start that finds context soon: positions begin as sinusoids, keys as copies of the
    queries, so that a token first attends to its neighbours, and weights are drawn wider than BERT's.
    """
    from transformers import BertConfig, BertForMaskedLM

    from spafit.runtime import torch_seed

    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=recipe.width, num_hidden_layers=recipe.blocks,
        num_attention_heads=recipe.heads, intermediate_size=4 * recipe.width, max_position_embeddings=recipe.window,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, pad_token_id=0, initializer_range=INITIAL,
    )  # fmt: skip
    with torch_seed(recipe.seed, "masked language model"):
        model = BertForMaskedLM(config).eval()
    angles = torch.arange(recipe.window)[:, None] * 100.0 ** (-torch.arange(0, recipe.width, 2) / recipe.width)
    waves = torch.stack([angles.sin(), angles.cos()], -1).flatten(1)
    with torch.no_grad():
        model.bert.embeddings.position_embeddings.weight.copy_(waves * INITIAL * 2**0.5)
        model.bert.embeddings.token_type_embeddings.weight.zero_()
        for block in model.bert.encoder.layer:
            block.attention.self.key.weight.copy_(block.attention.self.query.weight)
    return model


def pretrain(
    text: str, folder: Path, recipe: Recipe | None = None, *, every: int = 200, quiet: bool = False
) -> Path:  # fmt: skip
    """Train, or find what an earlier call trained, and return the folder; a checkpoint is kept ``every`` so many steps.

    Each step masks a share of the tokens of random windows, as BERT does (of ten, eight become the mask, one another
    token, one stays), from a generator of its own, so that a resumed training draws what an uninterrupted one would.
    """
    from spafit import io
    from spafit.runtime import Progress

    recipe = recipe or Recipe()
    key = io.content_digest([json.dumps(asdict(recipe)), text])
    done, kept = folder / "recipe.json", folder / "checkpoint.pt"
    if done.exists() and json.loads(done.read_text(encoding="utf-8"))["digest"] == key:
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tokenizer(text, recipe)
    model = untrained(tokenizer, recipe)
    ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    decayed = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}],
        betas=(0.9, 0.98),
        fused=True,
    )
    first, losses = 0, []
    if kept.exists():
        state = torch.load(kept, weights_only=True)
        if state["digest"] == key:
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            first, losses = state["step"], state["losses"]
    with Progress("Masked language model", recipe.steps, quiet=quiet) as progress:
        progress.advance(first)
        for step in range(first, recipe.steps):
            warm = max(1, recipe.steps // 10)
            rate = min((step + 1) / warm, (recipe.steps - step) / (recipe.steps - warm))
            for group in optimizer.param_groups:
                group["lr"] = recipe.learning_rate * rate
            inputs, places, targets = _masked_windows(ids, recipe, step)
            states = model.bert(input_ids=inputs)[0][places]
            loss = torch.nn.functional.cross_entropy(model.cls(states[None])[0], targets)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            losses.append(float(loss.detach()))
            progress.advance(1)
            if (step + 1) % every == 0:
                state = {"digest": key, "model": model.state_dict(), "optimizer": optimizer.state_dict()}
                whole = {**state, "step": step + 1, "losses": losses}
                io.atomic_write(kept, lambda p, whole=whole: torch.save(whole, p))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    tail = losses[-200:]
    io.write_json(done, {"digest": key, "recipe": asdict(recipe), "training_loss_nats": sum(tail) / len(tail)})
    kept.unlink(missing_ok=True)
    return folder


def _masked_windows(ids: torch.Tensor, recipe: Recipe, step: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Inputs of one step, the places that are asked for, and the tokens that stood there."""
    draw = torch.Generator().manual_seed(recipe.seed * 1_000_003 + step)
    room = recipe.window - 2
    starts = torch.randint(len(ids) - room, (recipe.batch, 1), generator=draw)
    edge = torch.ones((recipe.batch, 1), dtype=torch.long)
    whole = torch.cat([2 * edge, ids[starts + torch.arange(room)], 3 * edge], 1)
    places = (torch.rand(whole.shape, generator=draw) < recipe.masked) & (whole >= len(SPECIAL))
    kind = torch.rand(whole.shape, generator=draw)
    other = torch.randint(len(SPECIAL), int(ids.max()) + 1, whole.shape, generator=draw)
    inputs = torch.where(places & (kind < 0.8), 4, torch.where(places & (kind > 0.9), other, whole))
    return inputs, places, whole[places]


if __name__ == "__main__":
    print(pretrain(read_text(Path(sys.argv[1]) / "valid.txt"), Path(sys.argv[2])))
