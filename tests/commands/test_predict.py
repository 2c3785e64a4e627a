import dataclasses
import datetime
import fcntl
import gzip
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from decimal import Decimal
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from lora_sentiment.classifier import Classifier
from lora_sentiment.commands.predict import (
    predict_file,
    predict_lines,
    show_answer,
)
from lora_sentiment.data import tables
from lora_sentiment.data.batches import PairTemplate, TextEncoder
from lora_sentiment.data.tables import TableWriter, read_table
from lora_sentiment.errors import DataError, ModelError
from lora_sentiment.models.engine import Engine
from tests.conftest import BAD, FILLERS, GOOD, toy_rows

ROOT = Path(__file__).parents[2]
LABELS = ("negative", "positive")


def make_classifier(*, labels=LABELS, clean=False, temperature=None, sha256="abc", seconds=0.0):
    """A classifier that counts words, after a while, and remembers how many texts it was asked for."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *GOOD, *BAD, *FILLERS]
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    weights = np.linspace(0.01, 0.3, len(words), dtype=np.float32)
    weights[[words.index(word) for word in BAD]] *= -1

    def engine(input_ids, attention_mask):
        time.sleep(seconds)
        engine.asked += len(input_ids)
        found = (weights[input_ids] * (1 if attention_mask is None else attention_mask)).sum(axis=1)
        return np.stack([-found, found], axis=1).astype(np.float32)

    engine.asked = 0
    encoder = TextEncoder(tokenizer, 2, 3, 0, max_length=8, truncation="head")
    return Classifier(
        labels,
        encoder,
        Engine(engine, 8192),
        clean,
        None if temperature is None else {"temperature": temperature},
        sha256,
    )


def read(path):
    batches = list(read_table(path))
    return {name: [value for batch in batches for value in batch[name]] for name in batches[0]}


def write(path, table):
    with TableWriter(path, columns=list(table)) as writer:
        writer.write(table)
    return path


def predict(folder, input="in.csv", output="out.csv", classifier=None, **options):
    options = {"progress": False, **options}
    return predict_file(
        classifier or make_classifier(), input=folder / input, output=folder / output, **options
    )


@pytest.fixture
def folder(tmp_path):
    """A folder with in.csv: 50 rows of a number and a text."""
    write(
        tmp_path / "in.csv",
        {"id": [f"0{i}" for i in range(50)], "text": [text for text, _ in toy_rows(50)]},
    )
    return tmp_path


# Pairs

PAIRS = [("a good film", "it was so"), ("awful", "bad plot"), ("great", "")]


def make_pair_classifier():
    classifier = make_classifier()
    template = PairTemplate((2,), (3,), (3,), 0)
    return replace(classifier, encoder=replace(classifier.encoder, template=template))


def test_a_table_of_pairs_is_answered_as_the_pairs_are(tmp_path):
    table = {"q": [first for first, _ in PAIRS], "a": [second for _, second in PAIRS]}
    write(tmp_path / "in.jsonl", {**table, "a": [*table["a"][:2], None]})
    classifier = make_pair_classifier()
    options = {"text_column": "q", "text_pair_column": "a", "classifier": classifier}
    summary = predict(tmp_path, "in.jsonl", **options)
    found = read(tmp_path / "out.csv")
    expected = classifier.predict(PAIRS)
    assert [prediction.error for prediction in expected] == [None, None, "text is empty"]
    assert found["label"][:2] == [prediction.label for prediction in expected[:2]]
    assert (summary.bad_rows, found["error"]) == (1, ["", "", "text_pair is missing"])


def test_the_columns_must_be_those_that_the_model_reads(tmp_path):
    write(tmp_path / "in.csv", {"text": ["a"], "b": ["c"]})
    with pytest.raises(DataError, match=r"reads pairs of texts; name .* --text-pair-column"):
        predict(tmp_path, classifier=make_pair_classifier())
    with pytest.raises(DataError, match=r"--text-pair-column: found 'b', but .* single texts"):
        predict(tmp_path, text_pair_column="b")
    with pytest.raises(DataError, match=r"no column 'd'.*give --text-pair-column"):
        predict(tmp_path, classifier=make_pair_classifier(), text_pair_column="d")
    with pytest.raises(DataError, match=r"are both 'b'"):
        predict(tmp_path, classifier=make_pair_classifier(), text_column="b", text_pair_column="b")
    assert not (tmp_path / "out.csv").exists()


def test_a_line_of_a_pair_has_a_tab_between_its_texts():
    classifier = make_pair_classifier()
    answers = list(predict_lines(classifier, ["a good film\tit was so\n", "alone\n"]))
    label = classifier.predict(PAIRS[:1])[0].label
    assert answers[0].prediction.label == label
    assert answers[1].error == "the model reads pairs: give two texts with a tab between them"
    shown = show_answer(answers[0], classifier.task, all_scores=False, as_json=False)
    assert shown.split("\t")[2:] == ["a good film", "it was so"]
    as_json = json.loads(show_answer(answers[0], classifier.task, all_scores=False, as_json=True))
    assert (as_json["text"], as_json["text_pair"]) == PAIRS[0]


@pytest.mark.parametrize(
    ("make", "texts", "message"),
    [
        (
            make_pair_classifier,
            ["alone"],
            "found a str; this model reads pairs of texts: give tuples",
        ),
        (make_pair_classifier, [("a", 3)], "found a tuple; this model reads pairs"),
        (
            make_classifier,
            [("a", "b")],
            "found a pair of texts; this model reads single texts: give strings",
        ),
    ],
)
def test_python_is_told_what_the_model_reads(make, texts, message):
    with pytest.raises(DataError, match=message):
        make().predict(texts)


def test_windows_are_of_single_texts():
    with pytest.raises(ModelError, match="stride: is for single texts"):
        make_pair_classifier().predict(PAIRS, stride=2)


# What is written


@pytest.mark.parametrize("input", ["a.csv", "a.tsv", "a.jsonl", "a.parquet", "a.csv.gz"])
@pytest.mark.parametrize("output", ["out.csv", "out.tsv.gz", "out.jsonl", "out.parquet", "OUT.CSV"])
def test_columns_and_their_order_are_kept_from_any_format_to_any_other(tmp_path, input, output):
    texts = [text for text, _ in toy_rows(25)]
    write(tmp_path / input, {"id": [f"0{i}" for i in range(25)], "text": texts, "more": ["x"] * 25})
    summary = predict(tmp_path, input, output, rows_per_part=10)
    found = read(tmp_path / output)
    expected = make_classifier().predict(texts)
    assert list(found) == ["id", "text", "more", "label", "score"]
    assert found["id"] == [f"0{i}" for i in range(25)]
    assert found["text"] == texts
    assert found["label"] == [prediction.label for prediction in expected]
    assert [float(score) for score in found["score"]] == [
        prediction.score for prediction in expected
    ]
    assert (summary.rows, summary.bad_rows, summary.parts) == (25, 0, 3)
    assert summary.labels == {name: found["label"].count(name) for name in LABELS}
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([input, output])


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl", "a.parquet"])
@pytest.mark.parametrize("column", [" text", "text\u00a0", "\u200btext\t", "\ufefftext"])
def test_blanks_around_the_name_of_the_text_column_do_not_count(tmp_path, name, column):
    texts = [text for text, _ in toy_rows(4)]
    write(tmp_path / name, {"id": list("1234"), column: texts})
    predict(tmp_path, name, name.replace("a", "out", 1))
    found = read(tmp_path / name.replace("a", "out", 1))
    assert list(found) == ["id", column, "label", "score"]
    assert found["label"] == [prediction.label for prediction in make_classifier().predict(texts)]


def test_all_scores_stand_under_their_labels_names(folder):
    predict(folder, all_scores=True, prefix="my_")
    found = read(folder / "out.csv")
    assert list(found)[2:] == ["my_label", "my_score", "my_score_negative", "my_score_positive"]
    for label, score, *every in zip(*list(found.values())[2:], strict=True):
        assert score == every[LABELS.index(label)]
        assert sum(map(float, every)) == pytest.approx(1)


def test_stride_and_calibrated_reach_the_classifier(folder):
    texts = read(folder / "in.csv")["text"]
    classifier = make_classifier(temperature=3.0)
    predict(folder, classifier=classifier, stride=2, calibrated=True)
    expected = classifier.predict(texts, stride=2, calibrated=True)
    assert [float(score) for score in read(folder / "out.csv")["score"]] == [
        found.score for found in expected
    ]
    assert expected != classifier.predict(texts, stride=2)
    assert expected != classifier.predict(texts, calibrated=True)


def test_parquet_columns_keep_their_arrow_types(tmp_path):
    table = pa.table(
        {
            "text": pa.array(["good", "bad", None], pa.large_string()),
            "small": pa.array([1, None, 3], pa.int16()),
            "when": pa.array(
                [datetime.datetime(2020, 1, 1), None, None], pa.timestamp("ms", "UTC")
            ),
            "kind": pa.array(["a", "b", "a"]).dictionary_encode(),
            "tags": pa.array([["x"], [], None], pa.list_(pa.string())),
            "void": pa.nulls(3),
        }
    )
    pq.write_table(table, tmp_path / "in.parquet")
    predict(tmp_path, "in.parquet", "out.parquet", rows_per_part=1, all_scores=True)
    found = pq.read_table(tmp_path / "out.parquet")
    assert found.schema.types == [
        *table.schema.types,
        pa.string(),
        *[pa.float64()] * 3,
        pa.string(),
    ]
    assert found.select(table.column_names).to_pydict() == table.to_pydict()


def test_a_column_that_begins_with_nothing_is_written_to_parquet_with_its_later_type(tmp_path):
    write(tmp_path / "in.jsonl", {"text": ["good"] * 4, "stars": [None, 1, 2.5, None]})
    predict(tmp_path, "in.jsonl", "out.parquet", rows_per_part=1)
    assert pq.read_table(tmp_path / "out.parquet")["stars"].type == pa.float64()
    assert read(tmp_path / "out.parquet")["stars"] == [None, 1.0, 2.5, None]


@pytest.mark.parametrize("output", ["out.csv", "out.jsonl", "out.parquet"])
def test_a_table_without_rows_gets_its_columns(tmp_path, output):
    (tmp_path / "in.csv").write_text("text\n")
    assert predict(tmp_path, output=output).rows == 0
    if output == "out.jsonl":
        assert (tmp_path / output).read_bytes() == b""
    else:
        assert read(tmp_path / output) == {"text": [], "label": [], "score": []}
    assert not (tmp_path / f"{output}.parts").exists()


# Rows that cannot be judged


@pytest.mark.parametrize("output", ["out.jsonl", "out.csv"])
def test_a_bad_row_gets_an_error_and_its_neighbours_their_labels(tmp_path, output):
    write(tmp_path / "in.jsonl", {"text": ["good", None, "", " \t", 7, ["x"], "bad"]})
    if output == "out.csv":  # which cannot hold a list
        write(tmp_path / "in.jsonl", {"text": ["good", None, "", " \t", 7, True, "bad"]})
    summary = predict(tmp_path, "in.jsonl", output, all_scores=True, rows_per_part=2)
    found = read(tmp_path / output)
    nothing = None if output == "out.jsonl" else ""
    kind = "list" if output == "out.jsonl" else "bool"
    assert found["error"] == [nothing, "text is missing", "text is empty", "text is empty", "text is int, not a string",
                              f"text is {kind}, not a string", nothing]  # fmt: skip
    assert found["label"] == ["positive", *[nothing] * 5, "negative"]
    for name in ("score", "score_negative", "score_positive"):
        assert [value == nothing for value in found[name]] == [False, *[True] * 5, False]
    assert (summary.rows, summary.bad_rows, summary.labels) == (
        7,
        5,
        {"negative": 1, "positive": 1},
    )


def test_a_file_of_nothing_but_bad_rows_is_answered(tmp_path):
    write(tmp_path / "in.csv", {"text": ["", ""]})
    assert predict(tmp_path).bad_rows == 2
    assert read(tmp_path / "out.csv")["error"] == ["text is empty"] * 2


def test_a_text_that_cleaning_empties_is_bad_where_texts_are_cleaned(tmp_path):
    write(tmp_path / "in.csv", {"text": ["<br />", "&nbsp;", "good"]})
    assert predict(tmp_path, output="a.csv").bad_rows == 0
    assert predict(tmp_path, output="b.csv", classifier=make_classifier(clean=True)).bad_rows == 2
    assert read(tmp_path / "b.csv")["text"] == ["<br />", "&nbsp;", "good"]


# What is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"text_column": "texts"},
            r"in.csv: has no column 'texts'; the columns are id, text; did you mean 'text'\?; give --t",
        ),
        (
            {"text_column": "zzz"},
            "has no column 'zzz'; the columns are id, text; give --text-column",
        ),
        ({"output": "in.csv"}, "in.csv: is the input too"),
        ({"output": "in.csv", "overwrite": True}, "in.csv: is the input too"),
        ({"output": "there.csv"}, "there.csv: exists already; give another name, or --overwrite"),
        ({"output": "."}, "is a folder; name a file in it"),
        ({"output": "out.txt"}, "out.txt: its name tells no known format"),
        (
            {"output": "none/out.csv"},
            "none: no such folder; make it",
        ),
        (
            {"output": f"{'x' * 300}.csv"},
            "xxx.csv: cannot be written: File name too long; check its name",
        ),
        (
            {"output": f"{'x' * 247}.csv"},
            "xxx.csv: cannot be written: File name too long; check its name",
        ),
        ({"input": f"{'x' * 300}.csv"}, "xxx.csv: cannot be read: File name too long"),
        ({"input": "latin.csv"}, r"is not utf-8: .*'café' as cp1252, .*encoding that reads right"),
        (
            {"encoding": "klingon"},
            "'klingon' is no text encoding of Python's; set one such as utf-8",
        ),
        ({"input": "nul.csv"}, "line 2 holds a NUL character; remove it$"),
        ({"input": "other.csv"}, "other.csv: no such file"),
        ({"rows_per_part": 0}, "rows_per_part: found 0; it must be at least 1"),
        (
            {"input": "labelled.csv"},
            "labelled.csv: already has 'label', 'error', .*give --prefix, such as predicted_",
        ),
        ({"input": "torn.csv"}, r"torn.csv: row 3 \(line 4\): found 2 field"),
    ],
)
def test_what_cannot_be_done_is_refused_before_any_work(folder, options, message):
    (folder / "there.csv").write_text("precious")
    (folder / "labelled.csv").write_text("text,label,error\ngood,1,2\n")
    (folder / "torn.csv").write_text("text\ngood\nbad\ngood,bad\n")
    (folder / "latin.csv").write_bytes("text\ncaf\xe9\n".encode("latin-1"))
    (folder / "nul.csv").write_bytes(b"text\ng\0o\0\n")
    before = sorted(folder.iterdir())
    classifier = make_classifier()
    with pytest.raises(DataError, match=message):
        predict(
            folder, classifier=classifier, rows_per_part=options.pop("rows_per_part", 1), **options
        )
    assert classifier.engine.compute.asked == 0
    assert sorted(folder.iterdir()) == before
    assert (folder / "there.csv").read_text() == "precious"


@pytest.mark.parametrize("options", [{"calibrated": True}, {"stride": 6}])
def test_an_option_that_the_model_cannot_take_leaves_nothing(folder, options):
    with pytest.raises(ModelError):
        predict(folder, **options)
    assert [path.name for path in folder.iterdir()] == ["in.csv"]


DAY = datetime.date(2020, 1, 2)
NOON = datetime.datetime(2020, 1, 2, 12, tzinfo=datetime.UTC)


@pytest.mark.parametrize(
    ("values", "input", "output", "message"),
    [
        (
            ["x", "y\nz"],
            "in.jsonl",
            "out.tsv",
            r"out.tsv: row 2 .*: column 'more' holds '\\n', .*write .jsonl or",
        ),
        (
            ["x", ["y"]],
            "in.jsonl",
            "out.csv",
            "row 2 cannot be written: column 'more' holds a list",
        ),
        (
            ["x", ["y"]],
            "in.jsonl",
            "out.csv.gz",
            "row 2 cannot be written: column 'more' holds a list",
        ),
        (
            [b"x", b"y"],
            "in.parquet",
            "out.csv",
            "row 1 cannot be written: column 'more' holds a bytes",
        ),
        (
            [None, b"y"],
            "in.parquet",
            "out.jsonl",
            "row 2 .*: column 'more' holds a bytes, .*; change it, or write .parq",
        ),
        (
            [{}, {}],
            "in.jsonl",
            "out.parquet",
            "cannot be written: Cannot write struct type 'more' with no child field",
        ),
    ],
)
def test_a_value_that_the_output_cannot_hold_is_found_before_any_work(
    tmp_path, values, input, output, message
):
    write(tmp_path / input, {"text": ["good", "bad"], "more": values})
    classifier = make_classifier()
    with pytest.raises(DataError, match=rf"{input}: does not fit the output .*{message}"):
        predict(tmp_path, input, output, classifier, rows_per_part=1)
    assert classifier.engine.compute.asked == 0
    assert [path.name for path in tmp_path.iterdir()] == [input]


@pytest.mark.parametrize(
    ("labels", "options", "message"),
    [
        (("bad\tone", "good"), {}, r"row 1 cannot be written: column 'label' holds '\\t'"),
        (("good", "bad\none"), {}, r"row 2 cannot be written: column 'label' holds '\\n'"),
        (
            ("bad\tone", "good"),
            {"all_scores": True},
            r"the header cannot be written: column 'score_bad\\tone' holds",
        ),
        (
            LABELS,
            {"prefix": "my\t"},
            r"the header cannot be written: column 'my\\tlabel' holds '\\t'",
        ),
    ],
)
def test_a_name_that_the_output_cannot_hold_is_found_before_any_work(
    folder, labels, options, message
):
    classifier = make_classifier(labels=labels)
    with pytest.raises(
        DataError,
        match=rf"a label's name, or --prefix, does not fit the output .*out.tsv: {message}",
    ):
        predict(folder, output="out.tsv", classifier=classifier, **options)
    assert classifier.engine.compute.asked == 0
    assert [path.name for path in folder.iterdir()] == ["in.csv"]


def test_a_line_that_the_new_columns_make_too_long_is_found_before_any_work(tmp_path, monkeypatch):
    write(tmp_path / "in.csv", {"text": ["good", "good" * 40]})
    monkeypatch.setattr(tables, "MAX_CHARACTERS", 170)
    classifier = make_classifier()
    with pytest.raises(
        DataError, match="row 2 cannot be written: it is longer than 170 characters"
    ):
        predict(tmp_path, classifier=classifier, rows_per_part=1)
    assert classifier.engine.compute.asked == 0


@pytest.mark.parametrize("output", ["out.csv", "out.tsv", "out.jsonl"])
def test_dates_times_and_decimals_become_text(tmp_path, output):
    values = {"day": [DAY], "time": [NOON.time()], "when": [NOON], "price": [Decimal("1.50")]}
    pq.write_table(pa.table({"text": ["good"], **values}), tmp_path / "in.parquet")
    predict(tmp_path, "in.parquet", output)
    found = read(tmp_path / output)
    assert [found[name] for name in values] == [
        ["2020-01-02"],
        ["12:00:00"],
        ["2020-01-02T12:00:00+00:00"],
        ["1.50"],
    ]


def test_a_link_is_followed_to_what_is_replaced(folder):
    (folder / "real").mkdir()
    (folder / "link.csv").symlink_to("real/out.csv")
    predict(folder, output="link.csv")
    assert (folder / "link.csv").is_symlink()
    assert len(read(folder / "real/out.csv")["label"]) == 50
    with pytest.raises(DataError, match=r"real/out.csv: exists already"):
        predict(folder, output="link.csv")
    (folder / "real/out.csv").write_text("old")
    predict(folder, output="link.csv", overwrite=True)
    assert (folder / "link.csv").is_symlink()
    assert len(read(folder / "real/out.csv")["label"]) == 50


def test_an_input_whose_name_is_no_unicode_is_answered(folder):
    (folder / "in.csv").rename(folder / "caf\udce9.csv")
    assert predict(folder, "caf\udce9.csv").rows == 50


def test_an_output_is_replaced_only_when_told(folder):
    (folder / "out.csv").write_text("old")
    predict(folder, overwrite=True)
    assert len(read(folder / "out.csv")["label"]) == 50


# Going on after a kill


class StopError(Exception):
    pass


def stopped(folder, after, output="out.csv", **options):
    """A run that fails after so many texts, whose parts stay."""
    classifier = make_classifier()

    def engine(input_ids, attention_mask):
        if classifier.engine.compute.asked >= after:
            raise StopError
        return classifier.engine.compute(input_ids, attention_mask)

    broken = Classifier(
        LABELS,
        classifier.encoder,
        Engine(engine, 8192),
        clean=False,
        calibration=None,
        sha256="abc",
    )
    with pytest.raises(StopError):
        predict(folder, output=output, classifier=broken, **options)


def test_a_stopped_run_leaves_whole_parts_and_no_output(folder):
    stopped(folder, 25, rows_per_part=10)
    parts = folder / "out.csv.parts"
    assert sorted(path.name for path in parts.iterdir()) == [
        *(f"part-0000{i}.parquet" for i in range(3)),
        "parts.json",
    ]
    assert len(read(parts / "part-00002.parquet")["label"]) == 10
    assert not (folder / "out.csv").exists()


def test_resume_judges_only_what_is_missing(folder):
    stopped(folder, 25, rows_per_part=10)
    classifier = make_classifier()
    summary = predict(folder, classifier=classifier, rows_per_part=10, resume=True)
    assert classifier.engine.compute.asked == 20
    assert (summary.rows, summary.parts, sum(summary.labels.values())) == (50, 5, 50)
    predict(folder, output="whole.csv", rows_per_part=10)
    assert (folder / "out.csv").read_bytes() == (folder / "whole.csv").read_bytes()


@pytest.mark.parametrize("has_folder", [False, True])
@pytest.mark.parametrize("resume", [False, True])
def test_a_run_without_parts_is_new(folder, has_folder, resume):
    if has_folder:
        (folder / "out.csv.parts").mkdir()
    assert predict(folder, resume=resume).rows == 50


def test_resume_says_that_a_run_is_finished(folder):
    predict(folder)
    with pytest.raises(
        DataError, match=r"out.csv: is finished already; --overwrite to do it again"
    ):
        predict(folder, resume=True)
    assert predict(folder, resume=True, overwrite=True).rows == 50


def test_parts_are_kept_unless_told_to_resume(folder):
    stopped(folder, 25, rows_per_part=10)
    with pytest.raises(
        DataError, match=r"out.csv.parts: holds 3 part\(s\) of an earlier run; --resume goes on"
    ):
        predict(folder, rows_per_part=10)
    assert len(list((folder / "out.csv.parts").iterdir())) == 4


def test_a_run_that_had_no_part_yet_stands_in_nobodys_way(folder):
    stopped(folder, 0)
    assert predict(folder, rows_per_part=5).rows == 50


def test_resume_names_all_that_changed(folder):
    stopped(folder, 25, rows_per_part=10)
    before = (folder / "in.csv").read_text()
    (folder / "in.csv").write_text(before.replace("good", "bad"))
    with pytest.raises(DataError) as caught:
        predict(
            folder,
            classifier=make_classifier(sha256="abd"),
            rows_per_part=20,
            stride=2,
            resume=True,
        )
    for change in ("input_sha256 was '", "rows_per_part was 10 and is 20", "stride was None and is 2",
                   "model_sha256 was 'abc' and is 'abd'"):  # fmt: skip
        assert change in str(caught.value)
    assert "encoding" not in str(caught.value)
    assert not (folder / "out.csv").exists()


@pytest.mark.parametrize("content", [None, b"{", b"\xff", b"[]", b'{"mine": 1}'])
def test_a_folder_that_is_none_of_parts_is_left_alone(folder, content):
    (folder / "out.csv.parts").mkdir()
    (folder / "out.csv.parts/diary").write_text("precious")
    if content is not None:
        (folder / "out.csv.parts/parts.json").write_bytes(content)
    with pytest.raises(
        DataError, match=r"out.csv.parts/parts.json: cannot be read .*; move that folder away"
    ):
        predict(folder, resume=True)
    assert (folder / "out.csv.parts/diary").read_text() == "precious"


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_killed_and_resumed_run_gives_the_same_bytes(tmp_path):
    name = "reviews.parquet"
    write(
        tmp_path / f"in-{name}",
        {"id": list(range(60)), "text": [*(text for text, _ in toy_rows(59)), ""]},
    )
    code = (
        "from pathlib import Path\nfrom tests.commands.test_predict import make_classifier, predict\n"
        f"predict(Path({str(tmp_path)!r}), 'in-{name}', {name!r}, make_classifier(seconds=0.2), rows_per_part=10)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    try:
        wait_for(lambda: len(list(tmp_path.glob(f"{name}.parts/part-*"))) >= 2)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not (tmp_path / name).exists()
    classifier = make_classifier()
    summary = predict(tmp_path, f"in-{name}", name, classifier, rows_per_part=10, resume=True)
    assert 0 < classifier.engine.compute.asked < 59
    assert (summary.rows, summary.bad_rows) == (60, 1)
    predict(tmp_path, f"in-{name}", f"whole-{name}", rows_per_part=10)
    assert (tmp_path / name).read_bytes() == (tmp_path / f"whole-{name}").read_bytes()
    assert not (tmp_path / f"{name}.parts").exists()


# Two runs at once


def classifier_during(act):
    """A classifier that does something whenever it is asked."""
    classifier = make_classifier()

    def engine(input_ids, attention_mask):
        act()
        return classifier.engine.compute(input_ids, attention_mask)

    return Classifier(
        LABELS,
        classifier.encoder,
        Engine(engine, 8192),
        clean=False,
        calibration=None,
        sha256="abc",
    )


def test_a_second_run_on_one_output_is_refused(folder):
    (folder / "link.csv").symlink_to("out.csv")
    faults = []

    def run_again():
        for name in ("out.csv", "link.csv"):
            with pytest.raises(DataError) as caught:
                predict(folder, output=name, resume=True, overwrite=True)
            faults.append(str(caught.value))

    assert predict(folder, classifier=classifier_during(run_again), rows_per_part=50).rows == 50
    assert set(faults) == {f"another run is writing {folder / 'out.csv'}; wait until it ends"}
    assert sorted(path.name for path in folder.iterdir()) == ["in.csv", "link.csv", "out.csv"]


def test_the_lock_of_a_killed_run_keeps_nobody_out(folder):
    (folder / "out.csv.parts.lock").touch()
    assert predict(folder).rows == 50
    assert not (folder / "out.csv.parts.lock").exists()


def test_an_output_that_another_run_has_just_finished_is_kept(folder, monkeypatch):
    flock = fcntl.flock
    monkeypatch.setattr(
        fcntl, "flock", lambda *args: (flock(*args), (folder / "out.csv").write_text("theirs"))
    )
    with pytest.raises(DataError, match=r"out.csv: exists already"):
        predict(folder)
    assert (folder / "out.csv").read_text() == "theirs"


def test_an_input_that_changes_while_it_is_read_is_refused(folder):
    def change():
        (folder / "in.csv").write_text((folder / "in.csv").read_text().replace("good", "bad"))

    with pytest.raises(DataError, match=r"in.csv: changed while it was read"):
        predict(folder, classifier=classifier_during(change))
    assert not (folder / "out.csv").exists()


# Several processes


def test_two_processes_share_the_parts_and_give_the_same_bytes(tmp_path):
    write(tmp_path / "in.csv", {"text": [text for text, _ in toy_rows(50)]})
    script = tmp_path / "script.py"
    script.write_text(
        "import json, os\nfrom pathlib import Path\n"
        "from tests.commands.test_predict import DataError, make_classifier, predict\n"
        "classifier = make_classifier()\n"
        f"folder = Path({str(tmp_path)!r})\n"
        "try:\n    predict(folder, output='held.csv')\nexcept DataError as error:\n    refusal = str(error)\n"
        "summary = predict(folder, classifier=classifier, rows_per_part=10)\n"
        "assert (folder / 'out.csv').is_file()\n"
        "found = [classifier.engine.compute.asked, summary.rows, summary.parts, summary.labels, refusal]\n"
        "(folder / f'rank{os.environ[\"RANK\"]}.json').write_text(json.dumps(found))\n"
    )
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        str(script),
    ]
    with (tmp_path / "held.csv.parts.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, check=False, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    refusal = f"another run is writing {tmp_path / 'held.csv'}; wait until it ends"
    labels = predict(tmp_path, output="whole.csv", rows_per_part=10).labels
    assert [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1)] == [
        [30, 50, 5, labels, refusal],
        [20, 50, 5, labels, refusal],
    ]
    assert (tmp_path / "out.csv").read_bytes() == (tmp_path / "whole.csv").read_bytes()
    assert not (tmp_path / "out.csv.parts").exists()


# Standard input, memory, imports


def test_lines_are_answered_in_their_order():
    lines = ["a good film\n", "\n", "bad\r\n", "dull \udcff", "superb"]
    answers = list(predict_lines(make_classifier(), iter(lines)))
    assert [answer.text for answer in answers] == [
        "a good film",
        "",
        "bad",
        "dull \udcff",
        "superb",
    ]
    assert [answer.prediction and answer.prediction.label for answer in answers] == [
        "positive", None, "negative", None, "positive"]  # fmt: skip
    assert [answer.error for answer in answers] == [
        None,
        "text is empty",
        None,
        "text is no Unicode",
        None,
    ]


def test_lines_are_answered_before_all_are_read():
    read = []
    answers = predict_lines(make_classifier(), (read.append(i) or "good" for i in range(5000)))
    next(answers)
    assert len(read) == 1000
    assert len(list(answers)) == 4999


def test_no_more_than_a_part_is_judged_at_once(folder):
    classifier, longest = make_classifier(), []

    class Watched(Classifier):
        def predict(self, texts, **options):
            longest.append(len(texts))
            return super().predict(texts, **options)

    watched = Watched(
        LABELS, classifier.encoder, classifier.engine, clean=False, calibration=None, sha256="abc"
    )
    predict(folder, classifier=watched, rows_per_part=7)
    assert max(longest) == 7
    assert sum(longest) == 50


def test_a_file_is_predicted_without_torch(tmp_path):
    (tmp_path / "in.csv.gz").write_bytes(gzip.compress(b"text\ngood\n"))
    code = (
        "import sys\nfrom pathlib import Path\nfrom tests.commands.test_predict import make_classifier, predict\n"
        f"predict(Path({str(tmp_path)!r}), 'in.csv.gz', 'out.parquet')\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_progress_counts_every_row(folder, capsys):
    predict(folder, progress=True, rows_per_part=10)
    assert "50/50" in capsys.readouterr().err


# Label sets


def make_sets(low, high):
    """A calibration with these thresholds at 0.5."""
    return {"temperature": 2.0, "label_scores": [[low], [high]]}


@pytest.mark.parametrize("output", ["out.csv", "out.jsonl", "out.parquet"])
@pytest.mark.parametrize(
    ("thresholds", "expected"),
    [((0.0, 0.0), []), ((0.0, 1.0), ["positive"]), ((1.0, 1.0), ["negative", "positive"])],
)
def test_a_coverage_adds_the_label_set_and_whether_it_is_one_label(
    folder, output, thresholds, expected
):
    classifier = dataclasses.replace(make_classifier(), calibration=make_sets(*thresholds))
    predict(folder, output=output, classifier=classifier, coverage=0.5, all_scores=True)
    found = read(folder / output)
    assert list(found)[2:6] == ["label", "score", "label_set", "is_certain"]
    assert [json.loads(cell) for cell in found["label_set"]] == [expected] * 50
    assert {str(cell).lower() for cell in found["is_certain"]} == {str(len(expected) == 1).lower()}
    answered = classifier.predict(read(folder / "in.csv")["text"], calibrated=True)
    assert list(map(float, found["score"])) == [answer.score for answer in answered]


def test_a_line_shows_its_label_set():
    classifier = dataclasses.replace(make_classifier(), calibration=make_sets(1.0, 1.0))
    answers = list(predict_lines(classifier, ["good film"], coverage=0.5))
    shown = show_answer(answers[0], classifier.task, all_scores=False, as_json=False)
    assert shown.split("\t")[2:] == ["{negative, positive}", "good film"]
    shown = show_answer(answers[0], classifier.task, all_scores=False, as_json=True)
    assert json.loads(shown)["label_set"] == ["negative", "positive"]
    assert json.loads(shown)["is_certain"] is False


def test_parts_of_another_coverage_are_not_gone_on_with(folder):
    stopped(folder, 25, rows_per_part=10)
    classifier = dataclasses.replace(make_classifier(), calibration=make_sets(1.0, 1.0))
    with pytest.raises(DataError, match=r"coverage was None and is 0\.5"):
        predict(folder, classifier=classifier, rows_per_part=10, resume=True, coverage=0.5)
