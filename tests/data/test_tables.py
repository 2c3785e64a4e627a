import contextlib
import csv
import errno
import gzip
import io
import json
import os
import re
import time
from itertools import chain
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_sentiment.data.tables import (
    FORMATS,
    TableWriter,
    describe_delimiter,
    read_table,
    table_columns,
    table_types,
)
from lora_sentiment.errors import DataError

MESSY = Path(__file__).resolve().parents[3] / "shared" / "data" / "messy"

LFS_POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 9\n"

few = settings(max_examples=60, deadline=None)


def read(path, **options):
    """Reads a whole table and joins its batches."""
    batches = list(read_table(path, **options))
    return {
        name: list(chain.from_iterable(batch[name] for batch in batches)) for name in batches[0]
    }


def write(path, table):
    with TableWriter(path, columns=list(table)) as writer:
        writer.write(table)


def save(folder, name, content):
    path = folder / name
    data = content if isinstance(content, bytes) else content.encode()
    path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    return path


# What is read


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.csv", "text,label\nfine,1\nbad,0\n", {"text": ["fine", "bad"], "label": ["1", "0"]}),
        ("a.csv", "text,label\r\nfine,1\r\nbad,0", {"text": ["fine", "bad"], "label": ["1", "0"]}),
        ("a.CSV", "\ufefftext,label\nfine,1\n", {"text": ["fine"], "label": ["1"]}),
        ("a.csv", "a,b,c,d,e\nNA,null,007,1.0,\n", {"a": ["NA"], "b": ["null"], "c": ["007"], "d": ["1.0"], "e": [""]}),
        ("a.csv", 'a,b\n"x, ""y""\r\nz",1\n', {"a": ['x, "y"\r\nz'], "b": ["1"]}),
        ("a.csv", "a\nx\u0085y\u2028z\n", {"a": ["x\u0085y\u2028z"]}),
        ("a.csv", "a,b\n\nx,1\n\n", {"a": ["x"], "b": ["1"]}),
        ("a.csv", 'a\nx\n\n""\n', {"a": ["x", "", ""]}),
        ("a.csv", "text,label\n", {"text": [], "label": []}),
        ("a.csv.gz", "text\nfine\n", {"text": ["fine"]}),
        ("a.tsv", 'label\ttext\r\n0\ta "l" 1"\r\n1\t"so\r\n', {"label": ["0", "1"], "text": ['a "l" 1"', '"so']}),
        ("a.tsv", "a\tb\n\n\t\nx\t1\n", {"a": ["", "x"], "b": ["", "1"]}),
        ("a.tsv.gz", "a\nx\n\ny\n", {"a": ["x", "", "y"]}),
        ("a.tsv", "a\nx\u0085y\rz\n", {"a": ["x\u0085y\rz"]}),
        ("a.jsonl", '{"a": "x", "b": 1}\n\n{"b": 2.5, "a": null}\r\n', {"a": ["x", None], "b": [1, 2.5]}),
        ("a.jsonl", '{"a": true, "b": [{"c": 2}]}\n{"a": "\\u00e9"}', {"a": [True, "é"], "b": [[{"c": 2}], None]}),
        ("a.json", '\ufeff{"a": "x"}\n', {"a": ["x"]}),
        ("a.json.gz", '{"a": "1"}\n', {"a": ["1"]}),
    ],
)  # fmt: skip
def test_text_formats_are_read_as_they_state(tmp_path, name, content, expected):
    path = save(tmp_path, name, content)
    table = read(path)
    assert table == expected
    assert [list(map(type, values)) for values in table.values()] == [
        list(map(type, v)) for v in expected.values()
    ]
    assert table_columns(path) == list(expected)


@pytest.mark.parametrize("encoding", ["cp1252", "latin-1", "utf-16", "utf-8", "UTF8", "utf-16-le"])
def test_every_encoding_gives_the_same_table(tmp_path, encoding):
    path = save(tmp_path, "a.csv", "text,label\r\ncafé,1\r\n".encode(encoding))
    assert read(path, encoding=encoding) == {"text": ["café"], "label": ["1"]}


def test_parquet_keeps_its_types(tmp_path):
    table = {
        "text": ["a", None],
        "label": [1, 0],
        "score": [0.5, 1.0],
        "good": [True, False],
        "tags": [["x"], []],
    }
    pq.write_table(pa.table(table), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet") == table
    assert table_columns(tmp_path / "a.parquet") == list(table)


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.jsonl", "a.parquet", "a.csv.gz"])
def test_batches_hold_at_most_the_rows_asked_for(tmp_path, name):
    write(tmp_path / name, {"a": [str(number) for number in range(25)]})
    batches = list(read_table(tmp_path / name, rows_per_batch=10))
    assert [len(batch["a"]) for batch in batches] == [10, 10, 5]
    assert batches[2]["a"][-1] == "24"


def test_columns_are_known_without_reading_the_rest(tmp_path):
    path = save(tmp_path, "a.csv", "text,label\nfine,1\n" + "ragged\n" * 100_000)
    assert table_columns(path) == ["text", "label"]


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.jsonl"])
def test_a_row_of_a_megabyte_is_read(tmp_path, name):
    write(tmp_path / name, {"text": ["x" * 1_000_000]})
    assert len(read(tmp_path / name)["text"][0]) == 1_000_000


def test_formats_name_every_suffix():
    suffixes = {
        ".csv",
        ".csv.gz",
        ".tsv",
        ".tsv.gz",
        ".jsonl",
        ".jsonl.gz",
        ".json",
        ".json.gz",
        ".parquet",
    }
    assert set(FORMATS) == suffixes


# What is refused


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "", "is empty; a table needs a header"),
        ("a.csv", b"\xef\xbb\xbf", "is empty; a table needs a header"),
        ("a.jsonl", "\n \n", "is empty; a table needs a header (csv, tsv) or a row (jsonl)"),
        ("a.csv.gz", "", "is empty"),
        ("a.parquet", "", "cannot be read as parquet"),
        ("a.txt", "x", "must end in one of .csv, .tsv, .jsonl, .json, .csv.gz,"),
        ("a.csv", "a,b\nx,1\n\ny\n", "row 2 (line 4): found 1 field(s), expected 2, as in the header: ['a', 'b']; "),
        ("a.csv", 'a,b\n"x\ny",1\nx,y,1\n', "row 2 (line 4): found 3 field(s), expected 2"),
        ("a.csv", 'a,b\n""\n', "row 1 (line 2): found 1 field(s), expected 2"),
        ("a.tsv", "a\tb\nx\ty\t1\n", "row 1 (line 2): found 3 field(s), expected 2, as in the header: ['a', 'b']"),
        ("a.csv", "text,label,text\n", "column 3 of 3 has the name of column 1, 'text'; rename or remove one"),
        ("a.csv", ",text\n0,x\n", "column 1 of 2 has no name; name it or remove it (pandas writes an index so"),
        ("a.csv", "a\ncaf\xe9\n".encode("cp1252"), "not utf-8: byte 0xe9 at offset 5 (line 2); line 2 reads 'café' as"),
        ("a.csv", b"a\n\x81\n", "byte 0x81 at offset 2 (line 2); line 2 reads "),
        ("a.tsv.gz", b"a\n\xe9\n", "byte 0xe9 at offset 2 (line 2); line 2 reads 'é' as"),
        ("a.jsonl", b'{"a": "\xe9"}\n', "byte 0xe9 at offset 7 (line 1)"),
        ("a.csv", "a\nx\n".encode("utf-16"), "byte 0xff at offset 0 (line 1); all of it is utf-16; save it"),
        ("a.csv", "a\nx\n".encode("utf-16-le"), "line 1 holds a NUL character; all of it is utf-16-le; "
         "save it as UTF-8, or set data.encoding=utf-16-le"),
        ("a.csv", "a\nx\ny\0z\n", "line 3 holds a NUL character"),
        # Without the clock, which would name the test otherwise in every process that collects it.
        ("a.csv", gzip.compress(b"a\nx\n", mtime=0), "is gzip, which its name must tell; end it in .gz"),
        ("a.csv", 'a,b\nx,1\n"y,2\nz,3\n', "row 2 (line 3): a quote opened in this row is never closed; close it"),
        ("a.csv", '"a,b\nx,1\n', "the header (line 1): a quote opened in this row is never closed"),
        ("a.csv", 'a,b\n"x" y,1\n', "row 1 (line 2): text follows a closing quote; write a quote inside"),
        ("a.csv", "a,b\rx,1\r", "the header (line 1): a carriage return stands alone outside quotes"),
        ("a.csv", 'a\n"' + "x\n" * 5_000_001, "row 1 (line 2): a field is longer than 10,000,000 characters; close"),
        ("a.csv", "a\n" + "x" * 10_000_001, "line 2 is longer than 10,000,000 characters"),
        ("a.jsonl", '{"a": 1}\n\n{"a": 1,}\n', "row 2 (line 3): no JSON object: Expecting property name enclosed"
         " in double quotes at column 9"),
        ("a.jsonl", '{"a": 1}\n[1]\n', "row 2 (line 2): no JSON object: found a list; each line must hold one"),
        ("a.jsonl", "{}\n", "the table has no columns"),
        ("a.jsonl", '{"": 1}\n', "column 1 of 1 has no name"),
        ("a.jsonl", '{"a": 1, "a": 2}\n', "row 1 (line 1): no JSON object: a key stands twice among ['a', 'a']"),
        ("a.jsonl", '{"a": "\\uD800"}\n', "row 1 (line 1): no JSON object: 'utf-8' codec can't encode"),
        ("a.jsonl", '{"a": ' + "[" * 100_000 + "\n", "row 1 (line 1): no JSON object: maximum recursion depth"),
        ("a.jsonl", '{"a": ' + "1" * 5000 + "}\n", "row 1 (line 1): no JSON object: Exceeds the limit"),
        ("a.parquet", "text,label\n", "cannot be read as parquet (Parquet magic bytes not found"),
    ],
)  # fmt: skip
def test_a_bad_file_is_refused_in_one_line(tmp_path, name, content, message):
    path = save(tmp_path, name, content)
    with pytest.raises(DataError) as caught:
        read(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_refused_with_the_nearest_name(tmp_path):
    save(tmp_path, "train.csv", "a\n")
    with pytest.raises(DataError, match=r"tarin.csv: no such file; did you mean 'train.csv'\?$"):
        read(tmp_path / "tarin.csv")
    with pytest.raises(DataError, match=r"no such file; check the path$"):
        read(tmp_path / "zzz.parquet")
    with pytest.raises(DataError, match=r"nowhere/train.csv: no such file; check the path$"):
        read(tmp_path / "nowhere" / "train.csv")


@pytest.mark.parametrize(
    "name", ["reviews.xlsx", "data/Reviews.XLS", "../reviews.ods", "/no/x.numbers"]
)
@pytest.mark.parametrize("exists", [False, True])
def test_a_spreadsheet_is_named_as_one(tmp_path, monkeypatch, name, exists):
    path = tmp_path / "here" / name
    monkeypatch.chdir(tmp_path)
    if exists:
        path = tmp_path / "here" / Path(name).name
        path.parent.mkdir()
        path.write_bytes(b"PK\x03\x04")
    fault = "its name tells no known format" if exists else "no such file"
    with pytest.raises(DataError, match=f"{fault}.*: save the sheet as CSV UTF-8, and name that"):
        read(path)


def test_an_old_workbook_by_another_name_is_named_as_one(tmp_path):
    path = save(tmp_path, "a.csv", b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1")
    with pytest.raises(DataError, match="an Excel workbook; unpack it, or save the sheet as CSV"):
        read(path)


@pytest.mark.parametrize("name", ["a.csv", "a.tsv.gz", "a.jsonl", "a.json", "a.parquet"])
def test_a_pointer_of_git_lfs_is_named_as_one(tmp_path, name):
    (tmp_path / name).write_text(LFS_POINTER)
    with pytest.raises(DataError, match=r"is a Git LFS pointer, .*; fetch the file, as by git lfs"):
        read(tmp_path / name)


def test_a_relative_path_is_told_with_the_folder_it_starts_from(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("reviews.csv", "data/reviews.csv", "../data/reviews.parquet"):
        with pytest.raises(DataError, match=f"no such file in {tmp_path}, the current folder$"):
            read(Path(name))


@pytest.mark.parametrize("encoding", ["utf9", "base64", "no\0name"])
def test_an_unknown_encoding_is_refused(tmp_path, encoding):
    path = save(tmp_path, "a.csv", "a\nx\n")
    with pytest.raises(DataError, match=r"is no text encoding of Python's; set one such as utf-8"):
        read(path, encoding=encoding)


def test_an_encoding_that_fails_in_its_own_way_is_refused(tmp_path):
    path = save(tmp_path, "a.csv", "a\nx\n")
    with pytest.raises(
        DataError, match="is not undefined: undefined encoding; all of it is utf-8; save"
    ):
        read(path, encoding="undefined")


@pytest.mark.parametrize("offset", [8191, 2**20 - 1, 2**20])
def test_the_offset_of_a_bad_byte_counts_from_the_start_of_the_file(tmp_path, offset):
    data = bytearray(b"a\n" + "é\n".encode() * (2**19))
    offset -= (offset - 2) % 3  # the first byte of an é
    data[offset] = 0xFF
    path = save(tmp_path, "a.csv", bytes(data))
    with pytest.raises(
        DataError, match=rf"byte 0xff at offset {offset} \(line {2 + (offset - 2) // 3}\)"
    ):
        read(path)


@pytest.mark.parametrize("damage", [lambda data: data[:-9], lambda data: data[:5], lambda data: b"plain" + data,
                                    lambda data: data[:40] + bytes([data[40] ^ 255]) + data[41:]])  # fmt: skip
def test_damaged_gzip_is_refused(tmp_path, damage):
    data = gzip.compress(b"a\n" + os.urandom(3000).hex().encode())
    (tmp_path / "a.csv.gz").write_bytes(damage(data))
    with pytest.raises(DataError, match="is no gzip file, or a damaged one"):
        read(tmp_path / "a.csv.gz")


def test_a_part_of_a_parquet_file_is_refused(tmp_path):
    path = tmp_path / "a.parquet"
    write(path, {"a": ["x"] * 100})
    data = path.read_bytes()
    for end in (4, 8, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:end])
        with pytest.raises(DataError, match="cannot be read as parquet"):
            read(path)


def test_no_more_of_a_parquet_file_than_a_batch_is_held(tmp_path):
    """Of one row group, as most writers leave a file."""
    path = tmp_path / "a.parquet"
    write(path, {"a": [os.urandom(500).hex() for _ in range(16_000)]})
    before = pa.total_allocated_bytes()
    batches = read_table(path, rows_per_batch=100)
    next(batches)
    assert pa.total_allocated_bytes() - before < path.stat().st_size / 3


def test_twin_columns_of_a_parquet_file_are_refused(tmp_path):
    pq.write_table(pa.table([["x"], ["y"]], names=["a", "a"]), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="column 2 of 2 has the name of column 1"):
        read(tmp_path / "a.parquet")


# Round trips

text = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=20)
names = st.lists(
    text.filter(lambda name: name and name[0] != "\ufeff"), min_size=1, max_size=4, unique=True
)


@st.composite
def tables(draw, min_rows=0):
    num_rows = draw(st.integers(min_rows, 5))
    column = st.lists(text | st.sampled_from(['"', ",", "\r", "\n", "\r\n", "", "\ufeff", "NA"]),
                      min_size=num_rows, max_size=num_rows)  # fmt: skip
    return {name: draw(column) for name in draw(names)}


@few
@given(
    table=tables(min_rows=1),
    name=st.sampled_from(["a.csv", "a.csv.gz", "a.parquet", "a.jsonl", "a.jsonl.gz"]),
)
def test_strings_come_back_as_they_were(tmp_path_factory, table, name):
    path = tmp_path_factory.getbasetemp() / name
    write(path, table)
    assert read(path) == table
    assert table_columns(path) == list(table)


@few
@given(table=tables())
def test_tsv_gives_back_what_it_can_hold_and_refuses_the_rest(tmp_path_factory, table):
    path = tmp_path_factory.getbasetemp() / "a.tsv"
    if any(character in value for value in chain(table, *table.values()) for character in "\t\n\r"):
        with pytest.raises(DataError, match="which this format cannot; change it"):
            write(path, table)
    else:
        write(path, table)
        assert read(path) == table


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_types_come_back_as_they_were(tmp_path, name):
    table = {
        "a": [1, 2**60],
        "b": [0.1, 1e300],
        "c": [True, None],
        "d": ["", None],
        "e": [None, None],
        "f": [[1], []],
    }
    write(tmp_path / name, table)
    assert read(tmp_path / name) == table


# Writing


def test_csv_is_written_by_rfc_4180(tmp_path):
    write(tmp_path / "a.csv", {"a": ['x, "y"', "l1\nl2", "r\r", ""], "b": [1, None, 0.5, True]})
    assert (tmp_path / "a.csv").read_bytes() == b'a,b\n"x, ""y""",1\n"l1\nl2",\n"r\r",0.5\n,True\n'


def test_jsonl_is_written_in_readable_utf_8(tmp_path):
    write(tmp_path / "a.jsonl", {"a": ["café\u2028"], "b": [None]})
    assert (tmp_path / "a.jsonl").read_bytes() == '{"a": "café\u2028", "b": null}\n'.encode()


def test_gzip_bytes_repeat(tmp_path, monkeypatch):
    write(tmp_path / "a.csv.gz", {"a": ["x"] * 100})
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 1000)
    write(tmp_path / "b.csv.gz", {"a": ["x"] * 100})
    assert (tmp_path / "a.csv.gz").read_bytes() == (tmp_path / "b.csv.gz").read_bytes()


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl.gz", "a.parquet"])
def test_a_failure_leaves_the_folder_as_it_was(tmp_path, name):
    write(tmp_path / name, {"a": ["old"]})
    with pytest.raises(KeyboardInterrupt), TableWriter(tmp_path / name, columns=["a"]) as writer:  # noqa: PT012
        writer.write({"a": ["new"]})
        raise KeyboardInterrupt
    assert read(tmp_path / name) == {"a": ["old"]}
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_full_disk_leaves_the_folder_as_it_was(tmp_path, monkeypatch):
    def fail(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(
        DataError, match=r"a.csv.gz: cannot be written: No space left on device; check its"
    ):
        write(tmp_path / "a.csv.gz", {"a": ["x"]})
    assert list(tmp_path.iterdir()) == []


def test_an_error_of_the_caller_stays_what_it_is(tmp_path):
    with pytest.raises(FileNotFoundError), TableWriter(tmp_path / "a.csv", columns=["a"]):
        (tmp_path / "other").read_bytes()


@pytest.mark.parametrize(
    ("name", "table", "message"),
    [
        ("a.tsv", {"a": ["x", "y"], "b": ["z", "p\tq"]}, r"row 2 cannot be written: column 'b' holds '\t', which this"),
        ("a.tsv", {"a": ["x\n"]}, r"row 1 cannot be written: column 'a' holds '\n'"),
        ("a.tsv", {"a\tb": ["x"]}, r"the header cannot be written: column 'a\tb' holds '\t'"),
        ("a.csv", {"a": ["x\0"]}, r"row 1 cannot be written: column 'a' holds '\x00'"),
        ("a.csv", {"a": [[1]]}, "row 1 cannot be written: column 'a' holds a list, which this format cannot; change"),
        ("a.csv", {"a": [b"x"]}, "row 1 cannot be written: column 'a' holds a bytes, which this format cannot"),
        ("a.csv", {"a": ["\ud800"]}, "row 1 cannot be written: 'utf-8' codec can't encode"),
        ("a.csv", {"a": ["x" * 10_000_001]}, "row 1 cannot be written: it is longer than 10,000,000 characters"),
        ("a.jsonl", {"a": [1, b"x"]}, "row 2 cannot be written: column 'a' holds a bytes, which this format cannot"),
        ("a.jsonl", {"a": [[b"x"]]}, "column 'a' holds a bytes, which this format cannot; change it, or write .pa"),
        ("a.jsonl", {"a": ["\ud800"]}, "row 1 cannot be written: 'utf-8' codec can't encode"),
        ("a.parquet", {"a": ["x", 1]}, "column 'a' cannot be written: "),
        ("a.parquet", {"a": [2**70]}, "column 'a' cannot be written: Python int too large"),
        ("a.parquet", {"a": [{}]}, "a column cannot be written: Cannot write struct type 'a' with no child field"),
        ("a.parquet", {"a": ["\ud800"]}, "column 'a' cannot be written: 'utf-8' codec can't encode"),
        ("a.txt", {"a": ["x"]}, "must end in one of .csv, .tsv,"),
        ("a.csv", {"": ["x"]}, "column 1 of 1 has no name"),
        ("a.csv", {}, "the table has no columns"),
        ("none/a.csv", {"a": ["x"]}, "cannot be written: No such file or directory; check its folder and disk"),
        ("a.csv", {"a": ["x"], "b": []}, "a batch has {'a': 1, 'b': 0} rows; all of ['a', 'b'] must have as many"),
    ],
)  # fmt: skip
def test_what_cannot_be_written_is_refused(tmp_path, name, table, message):
    with pytest.raises(DataError) as caught:
        write(tmp_path / name, table)
    assert str(caught.value).startswith(f"{tmp_path / name}: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_column_keeps_the_type_of_its_first_parquet_batch(tmp_path):
    with TableWriter(tmp_path / "a.parquet", columns=["a"]) as writer:
        writer.write({"a": [1]})
        with pytest.raises(DataError, match="column 'a' cannot be written: Could not convert 'x'"):
            writer.write({"a": ["x"]})
        writer.write({"a": [None]})
    assert read(tmp_path / "a.parquet") == {"a": [1, None]}


def test_parquet_is_written_in_the_types_that_are_given(tmp_path):
    types = {
        "a": pa.int8(),
        "b": pa.null(),
        "c": pa.timestamp("ns"),
        "d": pa.dictionary(pa.int32(), pa.string()),
    }
    with TableWriter(
        tmp_path / "a.parquet", columns=["a", "b", "c", "d", "e"], types=types
    ) as writer:
        writer.write({"a": [None], "b": [None], "c": [None], "d": [None], "e": [None]})
        writer.write({"a": [1], "b": [None], "c": [5], "d": ["x"], "e": ["y"]})
    found = pq.read_table(tmp_path / "a.parquet")
    assert dict(zip(found.column_names, found.schema.types, strict=True)) == {
        **types,
        "e": pa.string(),
    }
    with (
        pytest.raises(DataError, match="column 'a' cannot be written: Value 300 too large"),
        TableWriter(tmp_path / "b.parquet", columns=["a"], types=types) as writer,
    ):
        writer.write({"a": [300]})


def test_a_parquet_file_tells_its_own_types(tmp_path):
    table = pa.table(
        {"a": pa.array([1], pa.int8()), "b": pa.nulls(1), "c": pa.array(["x"]).dictionary_encode()}
    )
    pq.write_table(table, tmp_path / "a.parquet")
    assert table_types(tmp_path / "a.parquet") == {field.name: field.type for field in table.schema}


@pytest.mark.parametrize(
    ("first", "last", "expected"),
    [
        (1, 2, pa.int64()),
        (1, 2.5, pa.float64()),
        (None, True, pa.bool_()),
        (None, None, pa.string()),
        ("x", None, pa.string()),
        ([], ["x"], pa.list_(pa.string())),
        ({"a": 1}, {"b": "x"}, pa.struct([("a", pa.int64()), ("b", pa.string())])),
    ],
)
@pytest.mark.parametrize("between", [0, 10_000])  # rows: both values in one batch, or in two
def test_a_type_fits_all_values_of_a_column(tmp_path, first, last, expected, between):
    write(tmp_path / "a.jsonl", {"a": [first, *[None] * between, last], "b": ["x"] * (between + 2)})
    assert table_types(tmp_path / "a.jsonl") == {"a": expected, "b": pa.string()}


@pytest.mark.parametrize(("first", "last"), [(1, "x"), (True, 1), ([1], 1), (1, 2**70)])
@pytest.mark.parametrize("between", [0, 10_000])
def test_values_that_fit_no_one_type_are_refused(tmp_path, first, last, between):
    write(tmp_path / "a.jsonl", {"a": [first, *[None] * between, last]})
    with pytest.raises(
        DataError, match=r"a.jsonl: column 'a' fits no type of parquet .*; write .jsonl, or give"
    ):
        table_types(tmp_path / "a.jsonl")


def test_fields_of_csv_are_strings_of_parquet(tmp_path):
    assert table_types(save(tmp_path, "a.csv", "a,b\n1,\n")) == {"a": pa.string(), "b": pa.string()}
    assert table_types(save(tmp_path, "b.csv", "a,b\n")) == {"a": pa.string(), "b": pa.string()}


# No other library's error escapes, whatever the bytes


def read_or_refuse(path):
    """Tells whether a file is read, or refused in one line."""
    try:
        list(read_table(path))  # which may hold no rows
    except DataError as error:
        return "\n" not in str(error)
    return True


@few
@given(data=st.binary(max_size=200), name=st.sampled_from(sorted(FORMATS)), zipped=st.booleans())
def test_random_bytes_raise_nothing_but_data_errors(tmp_path_factory, data, name, zipped):
    path = tmp_path_factory.getbasetemp() / f"random{name}"
    path.write_bytes(gzip.compress(data) if zipped else data)
    assert read_or_refuse(path)


@few
@given(
    data=st.text(alphabet='a1,"\t\r\n{}[]:\\ué\0\ufeff ', max_size=60),
    name=st.sampled_from(sorted(FORMATS)[:-1]),
)
def test_near_misses_raise_nothing_but_data_errors(tmp_path_factory, data, name):
    path = tmp_path_factory.getbasetemp() / f"near{name}"
    path.write_bytes(gzip.compress(data.encode()) if name.endswith(".gz") else data.encode())
    assert read_or_refuse(path)


@few
@given(
    position=st.floats(0, 1, exclude_max=True),
    value=st.integers(0, 255),
    name=st.sampled_from(["a.parquet", "a.csv.gz"]),
)
def test_a_changed_byte_raises_nothing_but_data_errors(tmp_path_factory, position, value, name):
    path = tmp_path_factory.getbasetemp() / f"changed-{name}"
    write(path, {"text": ["fine", "bad", None], "label": ["1", "0", "1"]})
    data = bytearray(path.read_bytes())
    data[int(position * len(data))] = value
    path.write_bytes(data)
    assert read_or_refuse(path)


# Real files


@pytest.mark.shared
@pytest.mark.skipif(not MESSY.is_dir(), reason="../shared/data/messy is not beside this repository")
def test_real_ugly_files(tmp_path):
    assert {name: len(values) for name, values in read(MESSY / "ag_news_noisy_labels.csv").items()} == {
        "text": 2000, "label": 2000, "noisy_label": 2000}  # fmt: skip
    assert {name: len(values) for name, values in read(MESSY / "sst2_dev_crlf.tsv").items()} == {
        "label": 872, "content": 872}  # fmt: skip
    path = save(tmp_path, "a.tsv", b"text\n" + (MESSY / "mr_negative_cp1252.txt").read_bytes())
    with pytest.raises(
        DataError, match=r"is not utf-8: byte 0xe9 at .* as cp1252.*set data.encoding to the"
    ):
        read(path)
    assert len(read(path, encoding="cp1252")["text"]) == 5331


# Tables as other programs write them

ROWS = {
    "text": ['a "good" one; I\tthink, yes', "bad\nbook", "so; so"],
    "label": ["pos", "neg", "neg"],
}


def delimited(delimiter, *, before="", columns=("text", "label"), quoting=csv.QUOTE_MINIMAL):
    file = io.StringIO()
    file.write(before)
    writer = csv.writer(file, delimiter=delimiter, quoting=quoting, lineterminator="\r\n")
    writer.writerow(columns)
    writer.writerows(zip(*ROWS.values(), strict=True))
    return file.getvalue()


NEEDED = {"needed": ["text", "label"]}


@pytest.mark.parametrize("quoting", [csv.QUOTE_MINIMAL, csv.QUOTE_ALL])
@pytest.mark.parametrize("name", ["a.csv", "a.csv.gz", "a.tsv"])
@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
@pytest.mark.parametrize("declared", [False, True])
def test_a_delimiter_is_found_by_the_needed_columns(tmp_path, quoting, name, delimiter, declared):
    before = f"sep={delimiter}\r\n" if declared else ""
    path = save(tmp_path, name, delimited(delimiter, before=before, quoting=quoting))
    if (name, delimiter, declared, quoting) == ("a.tsv", "\t", False, csv.QUOTE_MINIMAL):
        # The header is not quoted, so quotes are characters, as in the files of GLUE.
        with pytest.raises(DataError, match=r"if quotes enclose fields here, end the file's name"):
            read(path, **NEEDED)
        return
    assert read(path, **NEEDED) == ROWS
    assert table_columns(path, **NEEDED) == ["text", "label"]


@pytest.mark.parametrize(
    ("first", "delimiter"),
    [("sep=;\n", ";"), ("SEP=;\n", ";"), ('"sep=;"\r\n', ";"), ("\ufeffsep=;\n", ";"),
     ("sep=^\n", "^"), ("sep=;,\n", ";"), ("sep=; \n", ";"), ("sep=;;\n", ";"), ('"sep=,;"\n', ","),
     ("sep=\\t\n", "\t"), ("sep=;\n", "|"), ("sep=,\n", ";")],
)  # fmt: skip
def test_a_first_line_of_excel_names_the_delimiter(tmp_path, first, delimiter):
    path = save(tmp_path, "a.csv", f'{first}text{delimiter}label\n"so, so"{delimiter}neg\nbad\n')
    with pytest.raises(DataError, match=r"row 2 \(line 4\): found 1 field\(s\), expected 2"):
        read(path, **NEEDED)
    path.write_text(path.read_text().removesuffix("bad\n"))
    assert read(path, **NEEDED) == {"text": ["so, so"], "label": ["neg"]}


@pytest.mark.parametrize("delimiter", ["^", "~", ":", "§", "\x01", "\x02", "#", "¬"])
@pytest.mark.parametrize("quoting", [csv.QUOTE_MINIMAL, csv.QUOTE_ALL])
@pytest.mark.parametrize("columns", [("text", "label"), ("label", "text")])
def test_any_other_character_is_a_delimiter_if_it_alone_gives_the_needed_columns(
    tmp_path, delimiter, quoting, columns
):
    path = save(tmp_path, "a.csv", delimited(delimiter, columns=columns, quoting=quoting))
    assert read(path, **NEEDED) == dict(zip(columns, ROWS.values(), strict=True))
    note = describe_delimiter(path, encoding="utf-8", **NEEDED)
    assert f"separated by {delimiter!r} characters" in note


@pytest.mark.parametrize(
    ("name", "content", "columns"),
    [
        ("a.csv", "a;b\nx;y\n", ["a;b"]),  # one column with this name, if nobody needs another
        ("a.csv", 'text,"label;\nx",b\n1,2,3\n', ["text", "label;\nx", "b"]),
        ("a.csv", "text;x,label\n1,2\n", ["text;x", "label"]),
        ("a.tsv", 'text\t"label"\n"x\t1\n', ["text", '"label"']),
    ],
)
def test_the_format_of_the_name_comes_first(tmp_path, name, content, columns):
    path = save(tmp_path, name, content)
    assert table_columns(path, needed=columns) == columns
    assert describe_delimiter(path, encoding="utf-8", needed=columns) is None


@pytest.mark.parametrize(
    "lines",
    [
        ["text, label", '"good, or bad", "neg"', '"so\nso", "pos"'],
        ['"text", "label"', '"good, or bad", "neg"', '"so\nso", "pos"'],
        ['"text",  "label"', 'good,  "neg"', 'bad,  "pos"'],
        ["label, text", 'neg, "good, or bad"', 'pos, "so"'],
    ],
)
@pytest.mark.parametrize("name", ["a.csv", "a.tsv.gz"])
@pytest.mark.parametrize("delimiter", [",", ";"])
def test_quotes_after_a_blank_enclose_fields(tmp_path, lines, name, delimiter):
    content = "\n".join(line.replace(", ", f"{delimiter} ") for line in lines)
    path = save(tmp_path, name, content)
    table = read(path, **NEEDED)
    assert table["label"] == ["neg", "pos"]
    assert [text[:4] for text in table["text"]] in (
        ["good", "so\nso"[:4]],
        ["good", "bad"],
        ["good", "so"],
    )
    assert '"' not in "".join(table["text"])
    assert "after a blank" in describe_delimiter(path, encoding="utf-8", **NEEDED)


@pytest.mark.parametrize(
    "line", ['"He said, ""no""",neg', 'x,"a ""b"" c"', ' "no" she said,neg', 'a, "so" he said']
)
def test_quotes_within_a_text_are_characters(tmp_path, line):
    path = save(tmp_path, "a.csv", f"text,label\n{line}\n")
    assert describe_delimiter(path, encoding="utf-8", **NEEDED) is None
    assert len(read(path, **NEEDED)["text"]) == 1


@pytest.mark.parametrize("delimiter", ["\t", ",", ";"])
@pytest.mark.parametrize("name", ["a.tsv", "a.csv"])
@pytest.mark.parametrize("names", [("1", "17", "3"), ("rev1", "rev 2", "x"), ("a", "1", "b")])
def test_the_row_names_of_r_are_no_column(tmp_path, delimiter, name, names):
    rows = ['"good; really";"pos"', '"bad";"neg"', '"so\nso";"neg"']
    lines = ['"text";"label"', *(f'"{name}";{row}' for name, row in zip(names, rows, strict=True))]
    path = save(tmp_path, name, "\n".join(lines).replace('";"', f'"{delimiter}"') + "\n")
    assert read(path, **NEEDED) == {
        "text": ["good; really", "bad", "so\nso"],
        "label": ["pos", "neg", "neg"],
    }
    assert "row name before each row" in describe_delimiter(path, encoding="utf-8", **NEEDED)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", '"text","label"\n5,stars,"neg"\n', "row 1 (line 2): found 3 field(s), expected 2"),
        ("a.csv", '"text","label"\n"a \\"b\\" c","neg"\n', 'inside a quoted field as two quotes (in R: qme'),
        ("a.tsv", "text\tlabel\n1\tgood\tpos\n", "if the first field is a row name of R, write with row.names=FALSE"),
        ("a.tsv", "text\tlabel\nrev1\tgood\tpos\n", "a row name of R, write with row.names=FALSE"),
        ("a.csv", '"text" "label"\n"1" "so" "neg"\n', "fields may be separated by commas, semicolons, tabs, bars"),
        ("a.csv", '"","text"\n"1","so"\n', "column 1 of 2 has no name; name it or remove it (pandas"),
        ("a.csv", "text;label\nso; so;neg\n", "quote a field that holds a semicolon or a newline"),
    ],
)  # fmt: skip
def test_a_faulty_table_of_another_program_is_told_with_the_remedy(
    tmp_path, name, content, message
):
    with pytest.raises(DataError) as caught:
        read(save(tmp_path, name, content), **NEEDED)
    assert message in str(caught.value)


TEXTS = {
    "cp1251": ("Очень плохая вещь, сломалась", "минус"),
    "koi8_r": ("Отличный чайник, радует уже неделю", "плюс"),
    "cp866": ("Отличный чайник, радует уже неделю", "плюс"),
    "gb18030": ("质量太差，用了五天就坏了", "差评"),
    "big5": ("品質太差，用了五天就壞了", "負評"),
    "cp932": ("すぐに壊れました。残念", "悪い"),
    "euc_jp": ("すぐに壊れました。残念", "悪い"),
    "cp949": ("품질이 너무 나빠요, 고장났어요", "부정"),
    "cp1256": ("المنتج سيئ جدا وتعطل بعد أيام", "سلبي"),
    "cp1255": ("המוצר גרוע מאוד והתקלקל אחרי ימים", "שלילי"),
    "cp1253": ("Πολύ κακό προϊόν, χάλασε σε μέρες", "αρνητικό"),
    "cp1250": ("Świetny czajnik, używam już tydzień, dziękuję", "świetny"),
    "cp1254": ("Çok kötü bir ürün, günler sonra bozuldu, değmez", "kötü"),
    "cp1252": ("Très mauvais produit, cassé après des jours, déçu", "négatif"),
    "mac_roman": ("Très mauvais produit, cassé après des jours, déçu", "négatif"),
    "cp850": ("Sehr schlechtes Gerät, für nichts, größer", "schlecht"),
    "cp874": ("สินค้าแย่มาก พังใน วัน", "ลบ"),
}


@pytest.mark.parametrize("encoding", TEXTS)
@pytest.mark.parametrize("name", ["a.csv", "a.jsonl.gz"])
def test_the_likely_encodings_are_named_with_what_a_line_reads(tmp_path, encoding, name):
    text, label = TEXTS[encoding]
    line = f"{text};{label}"
    if name != "a.csv":
        line = json.dumps({"text": text, "label": label}, ensure_ascii=False)
    path = save(tmp_path, name, f"text;label\n{line}\n{line}\n".encode(encoding))
    with pytest.raises(DataError) as caught:
        read(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: is not utf-8: byte 0x")
    shown = label if not label.isascii() else text[-10:]
    assert re.search(rf"{shown}[^']*' as {encoding}[,;]", message)
    assert message.endswith(
        "; save it as UTF-8, or set data.encoding to the encoding that reads right"
    )


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("language", ["cp1251", "gb18030", "cp1252"])
def test_unicode_in_another_form_is_named_for_certain(tmp_path, encoding, language):
    line = ",".join(TEXTS[language])
    path = save(tmp_path, "a.csv", f"text,label\n{line}\n{line}\n".encode(encoding))
    with pytest.raises(
        DataError,
        match=f"all of it is {encoding}; save it as UTF-8, or set data.encoding={encoding}$",
    ):
        read(path)


@pytest.mark.parametrize("encoding", ["gb18030", "big5", "cp850", "cp1251", "cp949"])
@pytest.mark.parametrize("num_words", [1, 2, 5])
def test_a_few_characters_among_much_ascii_name_the_encoding(tmp_path, encoding, num_words):
    words = TEXTS[encoding][0].replace(",", "").split()
    plain = "a plain and not so short sentence about the thing that somebody bought " * 4
    lines = ["text;label"]
    for i in range(60):
        some = " ".join(words[(i // 6 + j) % len(words)] for j in range(num_words))
        lines.append(f"{plain}{some if i % 6 == 0 else ''} {plain};neg")
    path = save(tmp_path, "a.csv", "\n".join(lines).encode(encoding))
    with pytest.raises(DataError, match=rf" as {encoding}[,;]"):
        read(path)


@pytest.mark.parametrize(
    ("encoding", "text"),
    [
        ("iso2022_jp", "すぐに壊れました。残念"),
        ("iso2022_jp", "東京"),
        ("iso2022_jp_3", "①テスト"),
        ("iso2022_kr", "품질이 너무 나빠요"),
    ],
)
@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.jsonl.gz"])
@pytest.mark.parametrize("taken_for", ["utf-8", "cp1252"])
def test_an_encoding_whose_bytes_are_all_ascii_is_named(tmp_path, encoding, text, name, taken_for):
    table = {"a.csv": f"text,label\n{text},neg\n", "a.tsv": f"text\tlabel\n{text}\tneg\n"}
    content = table.get(name, json.dumps({"text": text, "label": "neg"}, ensure_ascii=False) + "\n")
    path = save(tmp_path, name, content.encode(encoding))
    with pytest.raises(DataError) as caught:
        read(path, encoding=taken_for)
    assert "holds an escape sequence of ISO-2022; all of it is" in str(caught.value)
    named = str(caught.value).rpartition("=")[2]
    assert read(path, encoding=named) == {"text": [text], "label": ["neg"]}


def test_text_in_utf_8_with_a_few_other_bytes_is_told_as_that(tmp_path):
    path = save(tmp_path, "a.csv", b"text\n" + "déjà vu ça\n".encode() * 50 + b"d\xe9j\xe0\n")
    with pytest.raises(
        DataError, match=r"\(line 52\); nearly all of it is utf-8; correct the other"
    ):
        read(path)


def test_bytes_that_are_no_text_get_no_encoding(tmp_path):
    path = save(tmp_path, "a.csv", bytes(range(128, 256)) * 40)
    with pytest.raises(DataError, match=r"is not utf-8: byte 0x80 at offset 0 \(line 1\); "):
        read(path)


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (['{"text": "a"}', '{"text": "b", "note": 1}'], {"text": ["a", "b"], "note": [None, 1]}),
        (['{"id": 1}', '{"text": "b"}'], {"id": [1, None], "text": [None, "b"]}),
        (['{}', '{"text": "b", "x": []}'], {"text": [None, "b"], "x": [None, []]}),
    ],
)  # fmt: skip
def test_the_columns_of_jsonl_are_all_keys(tmp_path, lines, expected):
    path = save(tmp_path, "a.jsonl", "\n".join(lines))
    assert read(path) == expected
    assert table_columns(path) == list(expected)
    assert [list(batch) for batch in read_table(path, rows_per_batch=1)] == [list(expected)] * 2


def test_only_the_needed_keys_are_looked_for_if_no_others_are(tmp_path):
    path = save(tmp_path, "a.jsonl", '{"label": 1}\n{"text": "a"}\n{"text": "b", "note": 2}\n')
    table = read(path, **NEEDED, others=False)
    assert table == {"label": [1, None, None], "text": [None, "a", "b"]}


@pytest.mark.parametrize("encoding", ["cp1251", "cp866", "cp932", "cp949", "cp1253", "cp1254"])
@pytest.mark.parametrize("place", ["first", "last", "middle", "ascii label"])
def test_a_long_line_is_shown_where_it_is_not_ascii(tmp_path, encoding, place):
    text, label = TEXTS[encoding]
    plain = "plain words and more of them " * 9
    line = {
        "first": f"{text}{plain},neg",
        "last": f"{text}{plain},{label}",
        "middle": f"{plain}{text * 3}{plain},neg",
        "ascii label": f"{plain}{text * 5},neg",
    }[place]
    path = save(tmp_path, "a.csv", f"text,label\n{line}\n{line}{plain}\n".encode(encoding))
    with pytest.raises(DataError) as caught:
        read(path)
    shown = label if place == "last" else text[-15:]
    assert re.search(rf"line 2 reads .*{shown}[^']*' as {encoding}[,;]", str(caught.value))


def test_encodings_that_read_one_line_alike_are_told_apart_by_another(tmp_path):
    lines = ["Très cassé après des jours,neg", "değmez,neg", "Çok kötü bir ürün ğ,pos"]
    path = save(tmp_path, "a.csv", "\n".join(["text,label", *lines * 9]).encode("cp1254"))
    message = "line 3 reads .*'deðmez,neg' as cp1252, 'değmez,neg' as cp1254"
    with pytest.raises(DataError, match=message):
        read(path)


ROWS_OF_JSON = [{"text": 'so "so" é } {\n', "label": 1}, {"text": "[a], {b}", "label": 0}]


@pytest.mark.parametrize("indent", [None, 1, 4])
@pytest.mark.parametrize(
    ("start", "between", "end", "fault"),
    [
        ("[", ", ", "]", "is a JSON array"),
        (" [\n", ",\n", "\n]\n", "is a JSON array"),
        ("[", "]\n[", "]\n", "is a JSON array"),
        ("", ",\n", ",\n", "',' follows the object"),
        ("  ", " , \n", "\n", "',' follows the object"),
        ("", ",", "", "',.*' follows the object"),
        ("", "", "\n", "'{.*' follows the object"),
    ],
)
def test_json_in_another_form_is_told_as_that(tmp_path, start, between, end, fault, indent):
    objects = [json.dumps(row, indent=indent, ensure_ascii=False) for row in ROWS_OF_JSON]
    path = save(tmp_path, "a.json", start + between.join(objects) + end)
    if indent and not start.strip():
        fault = "begins an object that goes on in the next line"
    message = (
        rf"row 1 \(line 1\): {fault}; each line must hold one object, as .* writes such lines$"
    )
    with pytest.raises(DataError, match=message) as caught:
        read(path)
    assert "`for row in rows: print(json.dumps(row))`" in str(caught.value)
    with contextlib.redirect_stdout(io.StringIO()) as lines:
        exec("for row in rows: print(json.dumps(row))", {"rows": ROWS_OF_JSON, "json": json})
    assert read(save(tmp_path, "b.jsonl", lines.getvalue()))["text"] == [
        row["text"] for row in ROWS_OF_JSON
    ]


@pytest.mark.parametrize("cell", [{"0": "a", "1": "b"}, ["a", "b"]])
def test_json_by_columns_is_told_as_that(tmp_path, cell):
    path = save(tmp_path, "a.json", json.dumps({"text": cell, "label": cell}))
    with pytest.raises(DataError, match=r"its keys hold whole columns; .*orient='records', lines"):
        read(path, **NEEDED)
