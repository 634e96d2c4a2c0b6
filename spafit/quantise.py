"""Weights of 4 bits by bitsandbytes: linear maps of the blocks are quantised, everything else is not."""

from __future__ import annotations

import re
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from spafit.errors import ModelError
from spafit.hub import Located, quiet

if TYPE_CHECKING:
    from torch import nn


def four_bit_settings(auto: Any, found: Located, **settings: Any) -> dict[str, Any]:
    """Arguments for ``from_pretrained`` that quantise the linear maps of the blocks to 4 bits (NF4, double constants).

    Heads, poolers, embeddings and norms keep their precision: they may train in full, and a new head is drawn from
    random weights. Products run in bfloat16 on CUDA, elsewhere in float32 (bitsandbytes runs on the CPU too, slowly).

    Args:
        auto: the Auto class of transformers that will load the model.
        found: where its files lie.
        settings: what changes its configuration, such as ``num_labels``.

    Raises:
        ModelError: bitsandbytes is missing, or the weights are in a GGUF file.
    """
    import torch

    if found.kind == "gguf":
        raise ModelError(
            f"{found.label} is a GGUF file, which is de-quantised on reading. Leave 4bit off, or give a folder."
        )
    if find_spec("bitsandbytes") is None:
        raise ModelError(
            "Weights of 4 bits need bitsandbytes, which is not installed: pip install bitsandbytes. It is made for "
            "CUDA devices; without one, dtype='bfloat16' halves the memory of the weights."
        )
    from transformers import AutoConfig, BitsAndBytesConfig

    with quiet(), torch.device("meta"):
        config = AutoConfig.from_pretrained(
            str(found.folder), local_files_only=True, trust_remote_code=False, **settings
        )
        model = auto.from_config(config)
    compute = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    return {
        "quantization_config": BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=compute,
            # In brackets, so that transformers does not also match the end of another module's name.
            llm_int8_skip_modules=[f"(?:{re.escape(path)})" for path in outside_blocks(model)],
        )
    }


def outside_blocks(model: nn.Module) -> list[str]:
    """The outermost modules that hold parameters and no block."""
    from spafit.layout import is_inside
    from spafit.resolve import whole_modules
    from spafit.stacks import find_stacks

    stacks = find_stacks(model)
    names = [n for n, _ in model.named_parameters(remove_duplicate=False)]
    return whole_modules(model, [n for n in names if not any(is_inside(n, s.path) for s in stacks)])
