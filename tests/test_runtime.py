"""Seeds are local, devices and precisions are checked, progress speaks without a terminal."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from spafit.errors import UsageError
from spafit.runtime import Progress, generator, pick_device, torch_dtype, torch_seed


def test_generators_depend_on_seed_and_keys_and_not_on_global_state():
    np.random.seed(1)  # noqa: NPY002
    a = generator(0, "x").random(3)
    np.random.seed(2)  # noqa: NPY002
    assert (generator(0, "x").random(3) == a).all()
    assert (generator(1, "x").random(3) != a).any()
    assert (generator(0, "y").random(3) != a).any()
    assert generator(0, "a", "b").random() != generator(0, "ab").random()


def test_torch_seed_restores_the_global_state():
    before = torch.random.get_rng_state()
    with torch_seed(3, "init"):
        first = torch.rand(2)
    with torch_seed(3, "init"):
        assert torch.equal(torch.rand(2), first)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_unknown_device_and_dtype_are_refused_with_the_remedy():
    assert pick_device("cpu") == "cpu"
    assert pick_device(None) in ("cuda", "mps", "cpu")
    with pytest.raises(UsageError, match="'auto'"):
        pick_device("gpu7")
    with pytest.raises(UsageError, match="float32, bfloat16, float16"):
        torch_dtype("float8")


def test_progress_says_what_is_left_without_a_terminal(capsys):
    with Progress("Encoding", 4, interval_s=0.0) as progress:
        progress.advance()
    assert "Encoding: 25 %" in capsys.readouterr().err
    with Progress("Encoding", 4, interval_s=0.0, quiet=True) as progress:
        progress.advance()
    assert capsys.readouterr().err == ""
