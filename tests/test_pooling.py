"""Pooling against a naive loop, whatever stands in the rows that no segment names."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from probing.pooling import POOLINGS, Segments, pool


def _naive(states: torch.Tensor, groups: list[list[int]], how: str) -> torch.Tensor:
    rows = []
    for group in groups:
        picked = states[group].double()
        if how == "first":
            rows.append(picked[0])
        elif how == "last":
            rows.append(picked[-1])
        elif how == "mean":
            rows.append(sum(picked) / len(group))
        else:
            rows.append(torch.stack([max(column) for column in picked.T]))
    return torch.stack(rows)


def _pool(states: torch.Tensor, groups: list[list[int]], how: str) -> torch.Tensor:
    out = torch.full((len(groups), states.shape[1]), torch.nan)
    pool(states, _segments(groups), how, out=out)
    return out


def _segments(groups: list[list[int]]) -> Segments:
    return Segments.of(np.array([i for g in groups for i in g]), np.array([len(g) for g in groups]))


@pytest.mark.parametrize("how", POOLINGS)
@pytest.mark.parametrize("longest", [1, 3, 12, 13, 40], ids=lambda n: f"up to {n} tokens")
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_pooling_equals_a_naive_loop_and_never_reads_other_rows(how, longest, data):
    lengths = data.draw(st.lists(st.integers(1, longest), min_size=1, max_size=6))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    total = sum(lengths)
    states = torch.full((total + 5, 3), torch.nan)  # padding may hold anything
    order = torch.randperm(total + 5, generator=generator)[:total]
    states[order] = 100 * torch.randn((total, 3), generator=generator)
    picked, groups = order.tolist(), []
    for n in lengths:
        groups.append(picked[:n])
        picked = picked[n:]
    pooled = _pool(states, groups, how)
    torch.testing.assert_close(pooled.double(), _naive(states, groups, how), rtol=1e-6, atol=1e-4)


@pytest.mark.parametrize("lengths", [[3, 5], [30, 2]], ids=["short segments", "long segments"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_means_of_half_precision_states_accumulate_in_float32(dtype, lengths):
    # float16 sums would overflow at 65,504 and bfloat16 sums lose all but 8 bits.
    states = torch.full((sum(lengths), 2), 40000.0).to(dtype)
    groups = [list(range(lengths[0])), list(range(lengths[0], sum(lengths)))]
    pooled = _pool(states, groups, "mean")
    torch.testing.assert_close(pooled, states[:2].float(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("how", POOLINGS)
def test_pooling_leaves_the_states_as_they_were(how):
    states = torch.arange(12.0).reshape(6, 2)
    before = states.clone()
    _pool(states, [[0, 1], [2], [3, 4, 5]], how)
    assert torch.equal(states, before)


@pytest.mark.parametrize("how", POOLINGS)
def test_the_result_lands_in_any_precision_and_in_rows_of_a_larger_table(how):
    states = torch.randn(6, 2, generator=torch.Generator().manual_seed(0))
    groups = [[0, 1], [2], [3, 4, 5]]
    table = torch.zeros(5, 2)
    pool(states, _segments(groups), how, out=table[1:4])
    torch.testing.assert_close(table[1:4].double(), _naive(states, groups, how), rtol=1e-6, atol=1e-6)
    assert not table[[0, 4]].any()
    halves = torch.zeros(3, 2, dtype=torch.bfloat16)
    pool(states, _segments(groups), how, out=halves)
    assert torch.equal(halves, table[1:4].bfloat16())


def test_no_segments_are_no_work():
    empty = np.zeros(0, dtype=np.int64)
    pool(torch.ones(4, 2), Segments.of(empty, empty), "mean", out=torch.zeros(0, 2))


def test_a_segment_without_tokens_is_refused():
    with pytest.raises(ValueError, match="without tokens"):
        Segments.of(np.array([1]), np.array([1, 0]))


def test_an_unknown_pooling_is_refused():
    with pytest.raises(ValueError, match="'median'"):
        _pool(torch.ones(4, 2), [[0, 1]], "median")
