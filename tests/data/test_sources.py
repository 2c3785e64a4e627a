"""Which files a source names."""

import json
import logging
import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lora_sentiment.data.rows import load_data
from lora_sentiment.data.sources import find_source, is_on_hub, read_columns
from lora_sentiment.data.tables import read_table
from lora_sentiment.errors import DataError
from lora_sentiment.recipe.data import DataConfig

RIGHT = "text,label\n" + "".join(f"right {i},{'ab'[i % 2]}\n" for i in range(40))
WRONG = "text,label\n" + "".join(f"wrong {i},{'xy'[i % 2]}\n" for i in range(40))


def put(folder, name, content):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("name", "pattern_matches"),
    [
        ("reviews[1].csv", "reviews1.csv"),
        ("reviews*.csv", "reviews-old.csv"),
        ("rev?ews.csv", "reviews.csv"),
        ("[2024] survey/a.csv", "2 survey/a.csv"),
        ("all*/of [it]/r[0-9].csv", "allthat/of i/r7.csv"),
        ("**.csv", "other.csv"),
    ],
)
@pytest.mark.parametrize("absolute", [False, True])
@pytest.mark.parametrize("by_role", [False, True])
def test_a_path_that_exists_is_no_pattern(here, name, pattern_matches, absolute, by_role, caplog):
    caplog.set_level(logging.INFO)
    put(here, name, RIGHT)
    put(here, pattern_matches, WRONG)
    source = str(here / name) if absolute else name
    data = load_data(DataConfig(source={"train": source} if by_role else source))
    assert data.labels == ("a", "b")
    assert "matches" not in caplog.text


def test_the_folders_of_a_pattern_that_exist_are_no_patterns(here):
    for name in ("[2024] survey/a.csv", "[2024] survey/b.csv", "2 survey/c.csv"):
        put(here, name, RIGHT)
    for pattern in ("[2024] survey/*.csv", str(here / "[2024] survey" / "?.csv")):
        found = find_source(DataConfig(source=pattern)).files["train"]
        assert [path.name for path in found] == ["a.csv", "b.csv"]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        (
            "r?.csv",
            "train: 'r?.csv' matches 7 file(s): r0.csv, r1.csv, r2.csv, r3.csv, r4.csv, and 2 more",
        ),
        ("r[12].csv", "train: 'r[12].csv' matches 2 file(s): r1.csv, r2.csv"),
        ("**/r1.csv", "train: '**/r1.csv' matches 1 file(s): r1.csv"),
        ("r1.csv", None),
    ],
)
def test_the_log_names_the_files_of_a_pattern(here, pattern, message, caplog):
    caplog.set_level(logging.INFO)
    for number in range(7):
        put(here, f"r{number}.csv", RIGHT)
    load_data(DataConfig(source={"train": pattern}))
    assert [record.getMessage() for record in caplog.records] == ([message] if message else [])


@pytest.mark.parametrize("folder", ["data", "[2024] survey", "*"])
def test_a_folder_is_no_pattern(here, folder):
    put(here, f"{folder}/a.csv", RIGHT)
    with pytest.raises(DataError) as caught:
        find_source(DataConfig(source=folder))
    assert f"is a folder; name a file in it, or a pattern such as {folder}/*.csv" in str(
        caught.value
    )
    assert find_source(DataConfig(source=f"{folder}/*.csv")).files["train"]


@pytest.mark.parametrize(
    "name",
    ["reviews.xlsx", "Reviews.CSV", "data/reviews.xls", "my.data/rows.txt", "x.y", "rows.JSONL.GZ"],
)
def test_the_name_of_a_file_is_not_looked_up_on_the_hub(name):
    assert not is_on_hub(name)
    (path,) = find_source(DataConfig(source=name)).files["train"]
    with pytest.raises(DataError, match="no such file in "):
        next(read_table(path))


@pytest.mark.parametrize("name", ["imdb", "stanfordnlp/imdb", "a/b-2.5", "a.b/c.v1", "ag_news"])
def test_the_name_of_a_data_set_is_one_of_the_hub(name):
    assert is_on_hub(name)


def test_a_name_that_no_file_can_have_is_one_message():
    with pytest.raises(DataError, match="File name too long"):
        load_data(DataConfig(source="a" * 300 + ".csv"))


LABELLED = [("good", True), ("bad", False)] * 30


def write_labels(path, kind):
    texts = [f"{text} {number}" for number, (text, _) in enumerate(LABELLED)]
    labels = [kind(label) for _, label in LABELLED]
    if path.suffix == ".csv":
        rows = [f"{text},{label}\n" for text, label in zip(texts, labels, strict=True)]
        path.write_text("text,label\n" + "".join(rows))
    elif path.suffix == ".jsonl":
        rows = zip(texts, labels, strict=True)
        path.write_text("\n".join(json.dumps({"text": t, "label": label}) for t, label in rows))
    else:
        pq.write_table(pa.table({"text": texts, "label": labels}), path)


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl", "a.parquet"])
def test_truth_values_are_two_classes_in_every_format(here, name):
    write_labels(here / name, bool)
    for labels in (None, ("False", "True"), ("True", "False")):
        data = load_data(DataConfig(source=name, labels=labels))
        assert data.labels == (labels or ("False", "True"))
        assert sorted(data.train.labels.tolist()) == [0] * 27 + [1] * 27


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl", "a.parquet"])
def test_decimal_labels_get_one_remedy_in_every_format(here, name):
    write_labels(here / name, float)
    with pytest.raises(
        DataError, match=r"decimal numbers, such as 0\.0; .*write integers, or state"
    ):
        load_data(DataConfig(source=name))
    assert load_data(DataConfig(source=name, labels=("0.0", "1.0"))).labels == ("0.0", "1.0")


@pytest.mark.parametrize(
    ("quoted", "rows", "warned"),
    [
        ('"a ""good"" one"', 1, True),
        ('"good, and more"', 31, True),
        ('"good, and more"', 29, False),
        ('"good" and "bad"', 60, False),
        ('""', 60, True),
    ],
)
@pytest.mark.parametrize("column", ["text", "label"])
def test_quotes_of_an_unquoted_tsv_are_counted(here, quoted, rows, warned, column, caplog):
    other = "label" if column == "text" else "text"
    lines = [f"{quoted if i < rows else 'plain'}\t{'ab'[i % 2]}\n" for i in range(60)]
    put(here, "a.tsv", f"{column}\t{other}\n" + "".join(lines))
    source = find_source(DataConfig(source="a.tsv"))
    columns, _ = read_columns(DataConfig(source="a.tsv"), source, "train")
    texts, labels = list(columns).pop()
    assert quoted in (texts[0], labels[0])
    message = f"a.tsv: {rows} texts and labels of 60 rows stand in quotes, .* name in .csv"
    assert bool(re.search(message, caplog.text)) == warned
    assert bool(caplog.records) == warned


def test_a_csv_with_tabs_reads_the_quotes_of_a_tsv(here):
    put(here, "a.csv", 'text\tlabel\n"a ""good"" one"\t1\n')
    config = DataConfig(source="a.csv")
    columns, _ = read_columns(config, find_source(config), "train")
    assert list(columns) == [(['a "good" one'], ["1"])]


def test_the_log_names_a_delimiter_once(here, caplog):
    caplog.set_level(logging.INFO)
    put(here, "a.csv", RIGHT.replace(",", ";"))
    load_data(DataConfig(source="a.csv"))
    assert [record.getMessage() for record in caplog.records] == [
        "a.csv: its fields are separated by semicolons and may be quoted"
    ]


@pytest.mark.parametrize(
    ("name", "content", "advice"),
    [
        ("a.csv", "A stale meal and a dull one,neg\nA superb lamp,pos\n", "give the file a first row"),
        ("a.tsv", "A stale meal and a dull one\tneg\nA lamp\tpos\n", "give the file a first row"),
        ("a.csv", "Review,Sentiment\nso,pos\n", "give one of them this name"),
        ("a.csv", "Text,Label\nso,pos\n", "give it this name"),
        ("a.json", '{"data": [{"text": "so", "label": 1}]}\n', "give one of them this name"),
    ],
)  # fmt: skip
def test_a_row_of_names_is_asked_for_where_the_header_may_be_data(here, name, content, advice):
    put(here, name, content)
    with pytest.raises(DataError) as caught:
        load_data(DataConfig(source=name))
    assert f"; {advice}" in str(caught.value)
    assert str(caught.value).endswith(", or set data.text_column")


@pytest.mark.parametrize("delimiter", ["||", "::", "@@@", "_", " ", "   "])
@pytest.mark.parametrize("name", ["a.csv", "a.tsv"])
def test_several_characters_are_no_delimiter(here, delimiter, name):
    put(here, name, f"text{delimiter}label\nso{delimiter}neg\n")
    message = f"its header {f'text{delimiter}label'!r} is one field; separate the fields by one"
    with pytest.raises(DataError, match=re.escape(message)):
        load_data(DataConfig(source=name))
