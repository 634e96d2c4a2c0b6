"""Files are whole or absent, and equal tables give equal bytes."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest

from spafit import io
from spafit.errors import OutputError


def test_a_failed_write_leaves_the_old_file_and_no_temporary(tmp_path):
    path = tmp_path / "a.json"
    io.write_json(path, {"x": 1})

    def broken(p):
        p.write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OutputError, match=r"a\.json.*No space left"):
        io.atomic_write(path, broken)
    assert io.read_json(path) == {"x": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_json_holds_no_nan_and_plain_numbers(tmp_path):
    io.write_json(tmp_path / "a.json", {"nan": np.nan, "i": np.int64(3), "v": np.arange(2), 1: pd.NA, "p": tmp_path})
    assert json.loads((tmp_path / "a.json").read_text()) == {
        "nan": None, "i": 3, "v": [0, 1], "1": None, "p": str(tmp_path),
    }  # fmt: skip


def test_tables_round_trip_under_names_with_dots_and_equal_tables_give_equal_bytes(tmp_path):
    table = pd.DataFrame({"task": ["core.tense"], "seed": pd.array([pd.NA], dtype="Int64"), "value": [0.1 + 0.2]})
    io.write_table(tmp_path / "core.tense", table)
    io.write_table(tmp_path / "core.tense2", table.copy())
    pd.testing.assert_frame_equal(io.read_table(tmp_path / "core.tense"), table)
    assert (tmp_path / "core.tense.parquet").read_bytes() == (tmp_path / "core.tense2.parquet").read_bytes()
    table.loc[0, "value"] = 0.3
    io.write_table(tmp_path / "core.tense2", table)
    assert (tmp_path / "core.tense.parquet").read_bytes() != (tmp_path / "core.tense2.parquet").read_bytes()


def test_content_digest_counts_boundaries():
    assert io.content_digest(["ab", "c"]) != io.content_digest(["a", "bc"])
    assert io.content_digest(["ab", "c"]) == io.content_digest(iter(["ab", "c"]))
