"""Table files: every format gives the same rows; every malformed line is named."""

from __future__ import annotations

import gzip

import pandas as pd
import pytest

from spafit.data.tables import read_lines, read_table_file, table_suffix
from spafit.errors import DataError
from tests.paths import SHARED, needs_shared


def test_the_formats_give_the_same_rows(tmp_path):
    (tmp_path / "a.tsv").write_text("text\tlabel\nA dog.\t1\nTwo  cats\t0\n")
    (tmp_path / "a.csv").write_text('text,label\n"A dog.",1\nTwo  cats,0\n')
    (tmp_path / "a.jsonl").write_text('{"text": "A dog.", "label": "1"}\n\n{"text": "Two  cats", "label": "0"}\n')
    pd.DataFrame({"text": ["A dog.", "Two  cats"], "label": ["1", "0"]}).to_parquet(tmp_path / "a.parquet")
    (tmp_path / "b.tsv.gz").write_bytes(gzip.compress((tmp_path / "a.tsv").read_bytes()))
    (tmp_path / "bom.tsv").write_bytes(b"\xef\xbb\xbftext\tlabel\r\nA dog.\t1\r\nTwo  cats\t0\r\n\r\n")
    lines = {"a.tsv": [2, 3], "a.csv": [2, 3], "a.jsonl": [1, 3], "a.parquet": [1, 2], "b.tsv.gz": [2, 3]}
    for name, numbers in {**lines, "bom.tsv": [2, 3]}.items():
        frame = read_table_file(tmp_path / name)
        assert list(frame.columns) == ["text", "label"], name
        assert frame.to_numpy().tolist() == [["A dog.", "1"], ["Two  cats", "0"]], name
        assert frame.index.tolist() == numbers, name
        assert frame.index.name == "line"


def test_without_a_header_columns_are_numbered(tmp_path):
    (tmp_path / "a.tsv").write_text("x\t1\ny\t0\n")
    frame = read_table_file(tmp_path / "a.tsv", header=False)
    assert list(frame.columns) == ["0", "1"]
    assert frame.index.tolist() == [1, 2]


def test_quotes_are_text_in_tsv_and_syntax_in_csv(tmp_path):
    (tmp_path / "a.tsv").write_text('text\tlabel\n"Unclosed\t1\n')
    (tmp_path / "a.csv").write_text('text,label\n"a, ""b""\nc",1\n')
    assert read_table_file(tmp_path / "a.tsv")["text"].tolist() == ['"Unclosed']
    assert read_table_file(tmp_path / "a.csv")["text"].tolist() == ['a, "b"\nc']
    with pytest.raises(DataError, match="quoting=none"):
        read_table_file(tmp_path / "a.tsv", quoting="minimal")


def test_unicode_line_separators_stay_inside_a_cell(tmp_path):
    (tmp_path / "a.tsv").write_text("text\tlabel\na\u2028b\x85c\t1\n", encoding="utf-8")
    assert read_table_file(tmp_path / "a.tsv")["text"].tolist() == ["a\u2028b\x85c"]


def test_integers_stay_integers_beside_missing_values(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a", "label": 1}\n{"text": "b"}\n')
    frame = read_table_file(tmp_path / "a.jsonl")
    assert frame["label"].tolist() == [1, None]
    pd.DataFrame({"text": ["a", "b"], "label": pd.array([1, None], dtype="Int64")}).to_parquet(tmp_path / "a.parquet")
    assert read_table_file(tmp_path / "a.parquet")["label"].tolist() == [1, None]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.tsv", "a\tb\n1\t2\n1\n", r"a\.tsv:3: 1 cell\(s\) where the header has 2"),
        ("a.tsv", "a\tb\n1\t2\t3\n", r"a\.tsv:2: 3 cell\(s\) where the header has 2"),
        ("a.tsv", "a\tb\n\n1\t2\n", r"a\.tsv:2: 1 cell\(s\)"),
        ("a.tsv", "a\ta\n1\t2\n", r"a\.tsv:1: column name 'a' occurs twice"),
        ("a.tsv", "a\tb\n", r"a\.tsv: holds no rows"),
        ("a.tsv", "", r"a\.tsv: holds no rows"),
        ("a.csv", 'a,b\n1,"2\n3,4\n', r"a\.csv:3: unexpected end of data"),
        ("a.csv", 'a,b\n1,"2"x\n', r"a\.csv:2: .*expected"),
        ("a.jsonl", '{"a": 1}\n{"a": }\n', r"a\.jsonl:2: not JSON"),
        ("a.jsonl", '{"a": 1}\n[1]\n', r"a\.jsonl:2: holds a list"),
        ("a.jsonl", "\n", r"a\.jsonl: holds no rows"),
        ("a.parquet", "PAR1 but not really", r"a\.parquet: not a readable parquet file"),
        ("a.xlsx", "?", r"a\.xlsx: unknown table format\. Use one of \.tsv"),
        ("a.tsv.gz", "not gzip", r"a\.tsv\.gz: cannot be read"),
    ],
)
def test_a_malformed_file_is_named_with_its_line(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message):
        read_table_file(tmp_path / name)


def test_a_byte_that_is_not_utf8_is_located(tmp_path):
    (tmp_path / "a.tsv").write_bytes(b"a\tb\nx\t1\ncaf\xe9\t0\n")
    with pytest.raises(DataError, match=r"a\.tsv:3: byte 0xe9 is not UTF-8"):
        read_table_file(tmp_path / "a.tsv")


@pytest.mark.parametrize("name", ["a.tsv", "a.parquet"])
def test_a_missing_file_says_so(tmp_path, name):
    with pytest.raises(DataError, match="no such file"):
        read_table_file(tmp_path / name)


def test_suffixes(tmp_path):
    assert table_suffix(tmp_path / "x.TSV.gz") == ".tsv"
    assert table_suffix(tmp_path / "x.v2.csv") == ".csv"
    assert table_suffix(tmp_path / "x.txt") == table_suffix(tmp_path / "x") == ""
    with pytest.raises(DataError, match="cannot be read"):
        read_lines(tmp_path)


@needs_shared
def test_glue_files_keep_their_rows():
    cola = read_table_file(SHARED / "glue/CoLA/cola_public/raw/in_domain_train.tsv", header=False)
    assert (len(cola), list(cola.columns)) == (8551, ["0", "1", "2", "3"])
    assert len(read_table_file(SHARED / "glue/RTE/train.tsv")) == 2490
    assert len(read_table_file(SHARED / "glue/SST-2/train.tsv")) == 67349
