import json
import re
import shlex
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_sentiment.cleaning import clean_text
from lora_sentiment.data import sources
from lora_sentiment.data.rows import (
    Rows,
    carve,
    digest_text,
    load_data,
    load_judged,
    load_raw_texts,
    load_rows,
    sample,
)
from lora_sentiment.data.tables import TableWriter, read_table
from lora_sentiment.errors import DataError
from lora_sentiment.recipe.data import DataConfig
from lora_sentiment.tasks import SINGLE_LABEL, label_values
from tests.conftest import toy_rows, write_csv


def make_rows(texts, labels):
    return Rows(list(texts), np.array(labels, dtype=np.int64), np.arange(1, len(labels) + 1))


def config(folder, **values):
    return DataConfig(
        source={"train": str(folder / "train.csv"), "test": str(folder / "test.csv")}, **values
    )


def test_string_labels_are_sorted_and_counted(toy):
    data = load_data(config(toy))
    assert data.labels == ("negative", "positive")
    assert Counter(data.train.labels.tolist()) == {0: 54, 1: 54}
    assert len(data.train) == 108
    assert len(data.validation) == 12
    assert Counter(data.validation.labels.tolist()) == {0: 6, 1: 6}


def test_the_test_split_is_read_apart(toy, monkeypatch):
    read = []
    monkeypatch.setattr(
        sources,
        "read_table",
        lambda path, **values: read.append(path.name) or read_table(path, **values),
    )
    data = load_data(config(toy))
    assert read == ["train.csv"]
    assert len(load_judged(config(toy), role="test", labels=data.labels)[0]) == 41
    assert read == ["train.csv", "test.csv"]


def test_a_test_file_that_is_missing_or_lacks_a_column_shows_at_the_start(toy):
    write_csv(toy / "test.csv", toy_rows(4), header=("text", "lable"))
    with pytest.raises(DataError, match=r"test\.csv: no column 'label'"):
        load_data(config(toy))
    (toy / "test.csv").unlink()
    with pytest.raises(DataError, match=r"test\.csv"):
        load_data(config(toy))


@pytest.mark.parametrize(
    ("values", "names", "expected", "found"),
    [
        (["10", "9", "10", "9"], None, ("9", "10"), [1, 0, 1, 0]),
        (["0", "1", "0", "1"], ("neg", "pos"), ("neg", "pos"), [0, 1, 0, 1]),
        (["pos", "neg", "pos", "neg"], ("pos", "neg"), ("pos", "neg"), [0, 1, 0, 1]),
        (["1", "2", "1", "2"], ("2", "1"), ("2", "1"), [1, 0, 1, 0]),
        ([1, "1", 2, 2], None, ("1", "2"), [0, 0, 1, 1]),
    ],
)
def test_labels_map_to_names(tmp_path, values, names, expected, found):
    path = tmp_path / "a.jsonl"
    lines = [json.dumps({"text": f"text {i}", "label": value}) for i, value in enumerate(values)]
    path.write_text("\n".join(lines))
    given_config = DataConfig(source={"train": str(path), "validation": str(path)}, labels=names)
    data = load_data(given_config)
    assert data.labels == expected
    assert data.train.labels.tolist() == found


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (("", "positive"), "row 121: text is empty"),
        ((" <br /> ", "positive"), "row 121: text is empty"),
        (("fine", ""), "row 121: label is missing"),
    ],
)
def test_a_bad_row_is_an_error_or_counted(toy, row, message):
    write_csv(toy / "train.csv", [*toy_rows(120), row])
    with pytest.raises(DataError, match=message):
        load_data(config(toy))
    data = load_data(config(toy, on_bad_row="drop"))
    assert data.counts["train"].kept == 120
    assert list(data.counts["train"].dropped.values()) == [[121]]


def test_what_was_dropped_is_told_by_kind_and_row_without_its_text(toy):
    bad = [("fine", "secret word"), ("", "positive"), ("poor", "another"), ("so", "")]
    write_csv(toy / "train.csv", [*toy_rows(120), *bad])
    dropped = (
        load_data(config(toy, on_bad_row="drop", labels=["negative", "positive"]))
        .counts["train"]
        .dropped
    )
    assert dropped == {
        "label is unknown": [121, 123],
        "text is empty": [122],
        "label is missing": [124],
    }


def test_a_missing_number_is_a_missing_label(tmp_path):
    pq.write_table(
        pa.table({"text": list("abcd"), "label": ["0", "1", None, "1"]}), tmp_path / "a.parquet"
    )
    with pytest.raises(DataError, match="row 3: label is missing"):
        load_rows(DataConfig(source=str(tmp_path / "a.parquet")), split="test", labels=("0", "1"))
    pq.write_table(
        pa.table({"text": list("ab"), "label": [float("nan"), 1.0]}), tmp_path / "a.parquet"
    )
    with pytest.raises(
        DataError,
        match=r"row 1: label is missing; column 'label'\n.*row 2: label '1\.0' is none of 0, 1",
    ):
        load_rows(DataConfig(source=str(tmp_path / "a.parquet")), split="test", labels=("0", "1"))


def test_decimals_are_names_where_the_recipe_says_so(tmp_path):
    path = write_csv(tmp_path / "a.csv", [(f"text {i}", ("0.0", "1.0")[i % 2]) for i in range(20)])
    with pytest.raises(DataError, match=r"the labels are decimal numbers, such as 0\.0"):
        load_data(DataConfig(source=str(path)))
    assert load_data(DataConfig(source=str(path), labels=["0.0", "1.0"])).labels == ("0.0", "1.0")


@pytest.mark.parametrize(
    ("counts", "num_rows", "lost"),
    [
        ({"a": 90, "b": 90, "rare": 2}, 20, "rare"),
        ({"a": 90, "b": 2, "c": 2, "d": 2}, 10, "b, c|b, d|c, d|b, c, d"),
        ({"a": 3, "b": 3, "c": 3}, 2, "a|b|c"),
        ({"a": 90, "b": 90, "rare": 12}, 20, None),
        ({"a": 90, "b": 90}, 500, None),
    ],
)
@pytest.mark.parametrize("labels", ["found", "stated"])
def test_a_sample_without_rows_of_a_label_is_refused(tmp_path, counts, num_rows, lost, labels):
    values = [name for name, count in counts.items() for _ in range(count)]
    path = write_labels(tmp_path / "a.csv", values)
    names = list(counts) if labels == "stated" else None
    source = {"train": str(path), "validation": str(path)}
    sampled = DataConfig(source=source, max_train_rows=num_rows, labels=names)
    if lost is None:
        assert len(load_data(sampled).labels) == len(counts)
        return
    message = rf"a sample of {num_rows} rows holds no row of ({lost}); set data.max_train_rows high"
    with pytest.raises(DataError, match=message):
        load_data(sampled)


def test_integers_are_no_positions_where_the_names_are_integers(tmp_path):
    path = write_csv(tmp_path / "a.csv", [("a", "0"), ("b", "4")])
    with pytest.raises(DataError, match="row 1: label '0' is none of 1, 2"):
        load_rows(DataConfig(source=str(path)), split="test", labels=("1", "2"))


def write_labels(path, values):
    """Write a table with a text of its own for each label value."""
    texts = [f"text {i}" for i in range(len(values))]
    with TableWriter(path, columns=["text", "label"]) as writer:
        writer.write({"text": texts, "label": list(values)})
    return path


WORDS = ["problem", "approval"] * 10


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("second.csv", ["0", "1"] * 5),
        ("second.tsv.gz", ["1", "0", "1"]),
        ("second.jsonl", [1, 0, 0]),
        ("second.parquet", [0, 1, 1]),
        ("one class.csv", ["1", "1", "1"]),
        ("from one.csv", ["1", "2"]),
        ("decimals.csv", ["0.0", "1.0"]),
        ("blanks.csv", [" 0", "1 "]),
        ("stars.csv", ["1", "2", "3", "4", "5"]),
    ],
)
@pytest.mark.parametrize("drop", ["drop", "error"])
def test_integers_of_a_second_file_never_stand_for_names_that_were_only_sorted(
    tmp_path, name, values, drop
):
    train = str(write_labels(tmp_path / "train.csv", WORDS))
    second = str(write_labels(tmp_path / name, values))
    message = (
        f"{name}: its labels are the integers .*, but the names of the labels were only sorted, so "
        "0=approval, 1=problem would be a guess; write the names in the file, or train with "
        "data.labels"
    )
    roles = DataConfig(source={"train": train, "validation": second}, on_bad_row=drop)
    with pytest.raises(DataError, match=message):
        load_data(roles)
    judged = DataConfig(source={"train": train, "test": second}, on_bad_row=drop)
    data = load_data(judged)
    with pytest.raises(DataError, match=message):
        load_judged(judged, role="test", labels=data.labels)
    other = data.config.model_copy(update={"source": second})
    with pytest.raises(DataError, match=message):
        load_rows(other, split="test", labels=data.labels)


def test_integers_of_a_second_file_are_positions_in_names_that_the_recipe_states(tmp_path):
    train = write_labels(tmp_path / "train.csv", WORDS)
    second = write_labels(tmp_path / "second.csv", ["0", "1"])
    roles = {"train": str(train), "validation": str(second)}
    data = load_data(DataConfig(source=roles, labels=["problem", "approval"]))
    assert data.validation.labels.tolist() == [0, 1]
    other = data.config.model_copy(update={"source": str(second)})
    assert load_rows(other, split="test", labels=data.labels)[0].labels.tolist() == [0, 1]


@pytest.mark.parametrize(
    ("values", "words", "refused"),
    [
        (["0", "1"], ["approval", "problem"], True),
        (["1", "0", ""], ["good", "bad", "", "bad"], True),
        (["0", "1", "2"], ["good", "bad", "so"], True),
        (["0", "1"], ["good", "bad", "so"], False),
        (["1", "2"], ["NA", "unknown"], False),
        (["1", "2", "3"], ["n/a"], False),
        (["10", "20"], ["many", "none"], False),
        (["0"], ["bad", "good"], False),
    ],
)
@pytest.mark.parametrize("num_files", [1, 2])
def test_files_of_integers_beside_files_of_as_many_names_are_refused(
    tmp_path, values, words, refused, num_files
):
    if num_files == 2:
        write_labels(tmp_path / "a.csv", words * 4)
        write_csv(tmp_path / "b.csv", [(f"other {i}", value) for i, value in enumerate(values * 4)])
    else:
        write_labels(tmp_path / "a.csv", [*values, *words] * 4)
    refused &= num_files == 2
    values = [value for value in values if value]
    words = sorted({word for word in words if word})
    mixed = DataConfig(source=str(tmp_path / "*.csv"), on_bad_row="drop")
    if refused:
        with pytest.raises(DataError, match=r"some labels are the integers .*, others the names"):
            load_data(mixed)
    else:
        assert set(load_data(mixed).labels) == {*values, *words}
    stated = mixed.model_copy(update={"labels": (*values, *words)})
    assert load_data(stated).labels == (*values, *words)


THREE = ("bad", "middling", "good")


@pytest.mark.parametrize(
    ("names", "values", "advice"),
    [
        (THREE, ["2", "3", "1"], "subtract 1 from each label, or write the names in the file"),
        (THREE, [1, 2, 3], "subtract 1 from each label, or"),
        (THREE, ["1.0", "2.0", "3.0"], "subtract 1 from each label and write it without a decimal"),
        (THREE, ["1,00", "2,00", "3,00"], "subtract 1 from each label and write it without a deci"),
        (THREE, [" 1", "2", "3\u00a0", ""], "subtract 1 from each label, or"),
        (THREE, ["1", "3"], "subtract 1 from each label, or"),
        (THREE, ["-1", "0", "1"], "add 1 to each label, or"),
        (("neg", "pos"), ["1", "2"], "subtract 1 from each label, or"),
        (("neg", "pos"), [-1, 1], "write 0 for -1, or write the names in the file"),
        (("neg", "pos"), ["-1", "+1"], "write 0 for -1, or write the names in the file"),
        (("neg", "pos"), ["01", "02"], "subtract 1 from each label, or"),
    ],
)
@pytest.mark.parametrize("drop", ["drop", "error"])
def test_labels_that_count_from_another_number_are_told_so(tmp_path, names, values, advice, drop):
    path = write_labels(tmp_path / "a.jsonl", values * 4)
    message = rf"a\.jsonl: its labels are .*, but here they count from \d to \d \(.*\); {advice}"
    stated = DataConfig(source=str(path), labels=names, on_bad_row=drop)
    with pytest.raises(DataError, match=message) as caught:
        load_data(stated)
    assert not caught.value.advice
    with pytest.raises(DataError, match=message):
        load_rows(stated, split="test", labels=names)


@pytest.mark.parametrize(
    ("names", "values", "bad"),
    [
        (("1", "2", "3", "4"), ["2", "3", "4", "5"], "row 4: label '5' is none of 1, 2, 3, 4"),
        (("0", "1"), ["1", "1", "2"], "row 3: label '2' is none of 0, 1"),
        (("0", "1", "2"), ["-1", "0", "1"], "row 1: label '-1' is none of 0, 1, 2"),
        (("1", "2", "3"), ["0", "1", "2"], "row 1: label '0' is none of 1, 2, 3"),
    ],
)
def test_integers_of_another_scale_are_no_names_that_count_from_another_number(
    tmp_path, names, values, bad
):
    path = write_labels(tmp_path / "a.csv", values)
    scale = DataConfig(source=str(path))
    with pytest.raises(DataError, match=bad) as caught:
        load_rows(scale, split="test", labels=names)
    assert str(caught.value).endswith("\ncorrect them, or set data.on_bad_row=drop")
    dropping = scale.model_copy(update={"on_bad_row": "drop"})
    assert len(load_rows(dropping, split="test", labels=names)[0]) == len(values) - 1


@pytest.mark.parametrize("value", ["Neg", "NEG", "n eg", "ｎｅｇ", "ne\u200dg"])
def test_a_label_that_nearly_is_a_name_is_told_with_the_name(tmp_path, value):
    path = write_labels(tmp_path / "a.csv", ["neg", "pos", value, "poss"])
    with pytest.raises(DataError) as caught:
        load_rows(DataConfig(source=str(path)), split="test", labels=("neg", "pos"))
    lines = str(caught.value).splitlines()
    assert lines[0].endswith(
        "it differs from 'neg' only in case, blanks or the form of a character; column 'label'"
    )
    assert lines[1].endswith("label 'poss' is none of neg, pos; column 'label'")


@pytest.mark.parametrize("values", [["1,00", "2,00"], ["4,5", "1,5"], ["0,5", "1"], ["1.0", ",5"]])
def test_numbers_with_a_decimal_comma_are_decimal_numbers(tmp_path, values):
    path = write_labels(tmp_path / "a.jsonl", values * 8)
    with pytest.raises(DataError, match="the labels are decimal numbers, such as"):
        load_data(DataConfig(source=str(path)))


@pytest.mark.parametrize(
    ("names", "values", "expected"),
    [
        (THREE, ["0", "2"], [0, 2]),
        (THREE, ["1", "1"], [1, 1]),
        (THREE, ["0", "1", "9"], [0, 1]),
        (THREE, ["-1", "0", "1", "2"], [0, 1, 2]),
        (("1", "2", "3"), ["2", "3"], [1, 2]),
        (("0.0", "1.0"), ["0.0", "1.0"], [0, 1]),
        (("0.0", "1.0"), ["0", "1"], [0, 1]),
    ],
)
def test_rows_to_judge_may_lack_a_label_and_lose_a_stray_integer(tmp_path, names, values, expected):
    path = write_labels(tmp_path / "a.csv", values)
    stated = DataConfig(source=str(path), labels=names, on_bad_row="drop")
    assert load_rows(stated, split="test", labels=names)[0].labels.tolist() == expected


@pytest.mark.parametrize(
    ("names", "values", "lost"),
    [
        (THREE, ["bad", "good", "midling"], "middling"),
        (("a", "b", "c", "d"), ["a", "b", "x"], "c, d"),
        (THREE, ["0", "1", "9"], "good"),
        (THREE, ["0", "1", ""], "good"),
    ],
)
def test_dropping_never_costs_training_a_label(tmp_path, names, values, lost):
    path = write_labels(tmp_path / "a.csv", values * 4)
    stated = DataConfig(source=str(path), labels=names)
    with pytest.raises(DataError, match="correct them") as caught:
        load_data(stated)
    assert not caught.value.advice
    with pytest.raises(DataError, match=f"no row is left for {lost} after dropping 4 rows"):
        load_data(stated.model_copy(update={"on_bad_row": "drop"}))


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_integers_with_a_decimal_point_are_told_so(tmp_path, suffix):
    values = [0.0, 1.0, 2.0] * 4
    path = write_labels(tmp_path / f"a.{suffix}", values)
    with pytest.raises(DataError, match=r"label '1\.0' .*; write integers without a decimal point"):
        load_data(DataConfig(source=str(path), labels=THREE))


def test_dropping_is_advised_where_it_helps(tmp_path):
    path = write_labels(tmp_path / "a.csv", ["bad", "good", ""] * 4)
    with pytest.raises(DataError, match="label is missing") as caught:
        load_data(DataConfig(source=str(path)))
    assert str(caught.value).endswith("correct them, or set data.on_bad_row=drop")
    path = write_labels(tmp_path / "a.csv", ["bad", "good", "", ""] * 4)
    with pytest.raises(DataError, match="label is missing") as caught:
        load_data(DataConfig(source=str(path)))
    assert str(caught.value).endswith("correct them")


BLANKS = [" ", "\t", "\u00a0", "\u3000", "\u200b", "\ufeff", "\u200e", "\r\n", " \u2060 "]


@pytest.mark.parametrize("blank", BLANKS)
@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_blanks_around_labels_and_column_names_are_no_part_of_them(tmp_path, blank, suffix):
    path = tmp_path / f"a.{suffix}"
    header = [f"{blank}text{blank}", f"x{blank}y", f"label{blank}"]
    labels = ["neg", f"{blank}neg", f"pos{blank}", f"{blank}pos{blank}"] * 4
    texts = [f"text {i}" for i in range(16)]
    with TableWriter(path, columns=header) as writer:
        writer.write(dict(zip(header, (texts, texts, labels), strict=True)))
    for column in ("label", " label"):
        roles = {"train": str(path), "validation": str(path)}
        data = load_data(DataConfig(source=roles, label_column=column))
        assert data.labels == ("neg", "pos")
        assert data.train.labels.tolist() == data.validation.labels.tolist() == [0, 0, 1, 1] * 4
    stated = DataConfig(source=str(path), labels=[f"{blank}pos", "neg"])
    assert load_data(stated).labels == ("pos", "neg")
    rows, _ = load_rows(stated, split="test", labels=("pos", "neg"))
    assert rows.labels.tolist() == [1, 1, 0, 0] * 4


def test_a_label_of_blanks_is_missing_and_names_that_differ_in_blanks_alone_are_refused(tmp_path):
    path = write_labels(tmp_path / "a.csv", ["a", "b", " "] * 4)
    with pytest.raises(DataError, match="row 3: label is missing"):
        load_data(DataConfig(source=str(path)))
    for names in (["a", "a "], ["a", " "]):
        with pytest.raises(DataError, match="blanks around a name do not count"):
            load_data(DataConfig(source=str(path), labels=names))


def test_of_two_columns_that_differ_in_blanks_the_exact_one_is_read(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("text,label, label\n" + "a,x,1\nb,y,2\nc,x,1\nd,y,2\n")
    assert load_data(DataConfig(source=str(path))).labels == ("x", "y")
    assert load_data(DataConfig(source=str(path), label_column=" label")).labels == ("1", "2")
    path.write_text("text,label , label\na,x,1\nb,y,2\n")
    with pytest.raises(DataError, match="no column 'label'"):
        load_data(DataConfig(source=str(path)))


def test_labels_that_older_versions_kept_with_blanks_are_found_again(tmp_path):
    old = ("neg", "neg ", " pos")
    path = write_labels(tmp_path / "a.csv", ["neg", "neg ", " pos", "pos"] * 4)
    rows = load_data(DataConfig(source=str(path), validation_fraction=0.3), labels=old)
    assert rows.labels == old
    rows, _ = load_rows(DataConfig(source=str(path)), split="test", labels=old)
    assert rows.labels.tolist() == [0, 1, 2, 2] * 4


@pytest.mark.parametrize(
    ("own", "ours", "expected"),
    [
        (("positive", "negative"), ("negative", "positive"), ["positive", "negative", -1]),
        (("neg", "pos"), ("negative", "positive"), [0, 1, -1]),
        (("a", "b"), ("b", "c", "a"), ["a", "b", -1]),
    ],
)
def test_a_data_sets_own_names_are_matched_by_name_or_renamed(own, ours, expected):
    assert label_values.rename([0, 1, -1], own, ours, "x", is_ordered=True) == expected


@pytest.mark.parametrize(
    ("own", "ours", "is_ordered"),
    [
        (("a", "b"), ("a", "c"), True),
        (("a", "b", "c"), ("x", "y"), True),
        (("a", "b"), ("x", "y"), False),
    ],
)
def test_names_that_half_match_are_refused(own, ours, is_ordered):
    with pytest.raises(DataError, match="its labels are a, b"):
        label_values.rename([0], own, ours, "x", is_ordered=is_ordered)


def test_a_glob_reads_all_its_files(toy):
    data = load_data(DataConfig(source=str(toy / "*.csv")))
    assert data.counts["train"].read == 161


def test_test_can_be_carved_and_shares_no_text(toy):
    data = load_data(
        DataConfig(source=str(toy / "train.csv"), test_fraction=0.2, validation_fraction=0.25)
    )
    parts = [set(data.train.texts), set(data.validation.texts), set(data.carved_test.texts)]
    assert len(data.carved_test) == 24
    assert set(data.seen_texts.tolist()) == {digest_text(text) for text in parts[0] | parts[1]}
    assert not parts[0] & parts[1]
    assert not parts[0] & parts[2]
    assert not parts[1] & parts[2]


def test_a_lone_file_is_read_whatever_it_is_called(toy):
    rows, _ = load_rows(
        DataConfig(source=str(toy / "test.csv")), split="test", labels=("negative", "positive")
    )
    assert len(rows) == 41


def test_of_the_bundled_reviews_the_split_that_is_named_is_read():
    config = DataConfig(source="bundled")
    found = {
        split: load_rows(config, split=split, labels=("negative", "positive"))[0]
        for split in ("train", "test")
    }
    assert {split: len(rows) for split, rows in found.items()} == {"train": 400, "test": 100}
    with pytest.raises(
        DataError, match=r"split: found 'dev'; 'bundled' has train, validation, test$"
    ):
        load_rows(config, split="dev", labels=("negative", "positive"))


labelled = st.lists(
    st.tuples(st.sampled_from("abcdefghijklmnop"), st.integers(0, 2)), min_size=12, max_size=80
)


@given(labelled, st.floats(0.05, 0.6), st.integers(0, 3))
def test_a_carve_loses_no_row_and_keeps_duplicates_together(pairs, fraction, seed):
    rows = make_rows([t for t, _ in pairs], [label for _, label in pairs])
    try:
        rest, carved = carve(rows, "abc", SINGLE_LABEL, fraction=fraction, seed=seed, key="k")
    except DataError:
        return
    assert sorted([*rest.numbers, *carved.numbers]) == rows.numbers.tolist()
    assert not set(rest.texts) & set(carved.texts)
    assert (
        carve(rows, "abc", SINGLE_LABEL, fraction=fraction, seed=seed, key="k")[1].numbers.tolist()
        == carved.numbers.tolist()
    )


@pytest.mark.parametrize(("texts", "is_advised"), [(["x"] * 3, False), (["x", "y", "z"], True)])
def test_a_lower_fraction_is_advised_only_where_it_can_help(texts, is_advised):
    # Texts that stand under another label first are carved with that one.
    others = [*map(str, range(20)), *(texts if is_advised else [])]
    rows = make_rows([*others, *texts], [0] * len(others) + [1] * 3)
    faults = []
    for seed in range(20):
        try:
            carve(rows, "ab", SINGLE_LABEL, fraction=0.5, seed=seed, key="data.test_fraction")
        except DataError as error:
            faults.append("or lower data.test_fraction" in str(error))
    assert faults
    assert set(faults) == {is_advised}


def test_a_carve_is_stratified_and_its_seed_decides():
    rows = make_rows(map(str, range(1000)), [int(i < 200) for i in range(1000)])
    _, carved = carve(rows, "abc", SINGLE_LABEL, fraction=0.1, seed=0, key="k")
    assert Counter(carved.labels.tolist()) == {0: 80, 1: 20}
    assert (
        carve(rows, "abc", SINGLE_LABEL, fraction=0.1, seed=1, key="k")[1].numbers.tolist()
        != carved.numbers.tolist()
    )


@pytest.mark.parametrize(
    ("counts", "values", "rare"),
    [
        ({"a": 9, "b": 9, "rare0": 1, "rare1": 1}, {}, {"rare0": 1, "rare1": 1}),
        ({"a": 9, "b": 9, "c": 1}, {"validation_fraction": 0.01}, {"c": 1}),
        ({"a": 9, "b": 9, "c": 2, "d": 1}, {"test_fraction": 0.1}, {"c": 2, "d": 1}),
        ({"a": 9, **{f"x{i:02}": 1 for i in range(40)}}, {}, {f"x{i:02}": 1 for i in range(40)}),
        ({"0": 9, "1": 9, "2": 1}, {}, {"2": 1}),
    ],
)
def test_all_labels_too_rare_to_carve_are_named_with_a_way_out(tmp_path, counts, values, rare):
    labels = [name for name, count in counts.items() for _ in range(count)]
    sparse = DataConfig(source=str(write_labels(tmp_path / "a.csv", labels)), **values)
    with pytest.raises(DataError) as caught:
        load_data(sparse)
    lines = str(caught.value).splitlines()
    assert len(lines) == 2
    assert re.findall(r"'([^']+)'", lines[0]) == list(rare)
    assert re.findall(r"\((\d+)\)", lines[0]) == list(map(str, rare.values()))
    assert "lower" not in lines[-1]
    kept = [name for name in counts if name not in rare]
    if len(kept) < 2:
        assert "data.labels" not in lines[-1]
        return
    stated, drop = shlex.split(lines[-1])[-2:]
    assert drop == "data.on_bad_row=drop"
    assert json.loads(stated.removeprefix("data.labels=")) == kept
    mended = sparse.model_copy(update={"labels": tuple(kept), "on_bad_row": "drop"})
    assert load_data(mended).counts["train"].kept == 18
    validation = write_csv(tmp_path / "v.csv", [("v", kept[0])])
    named = {"train": sparse.source, "validation": str(validation), "test": str(validation)}
    assert load_data(sparse.model_copy(update={"source": named})).labels == tuple(sorted(counts))


def test_a_rare_label_that_is_another_in_other_letters_is_named_with_it(tmp_path):
    rows = [(f"text {i}", ["good", "bad"][i % 2]) for i in range(20)] + [("so", "Good")]
    path = write_csv(tmp_path / "a.csv", rows)
    with pytest.raises(DataError, match="'Good' has too few distinct texts") as caught:
        load_data(DataConfig(source=str(path)))
    assert (
        "labels differ only in case, blanks or the form of a character: 'Good', 'good'; if they "
        "are one label, write it in one way"
    ) in str(caught.value)


def test_a_label_of_repeated_texts_is_rare_and_stated_names_of_integers_stay(tmp_path):
    rows = [(f"text {i}", str(i % 2 + 1)) for i in range(20)] + [("same", "0")] * 5
    path = write_csv(tmp_path / "a.csv", rows)
    with pytest.raises(DataError, match=r"label 'c' has too few .* rows \(5\)") as caught:
        load_data(DataConfig(source=str(path), labels=["c", "a", "b"]))
    # Without c the integers would stand for other names.
    assert "data.labels" not in str(caught.value)


@given(st.integers(10, 200), st.integers(1, 10), st.integers(0, 5))
def test_a_sample_keeps_the_shares(num_rows, wanted, seed):
    rows = make_rows(map(str, range(num_rows)), [int(i % 5 == 0) for i in range(num_rows)])
    taken = sample(rows, SINGLE_LABEL, num_rows=wanted, seed=seed)
    assert len(taken) == wanted == len(set(taken.numbers.tolist()))
    assert abs(taken.labels.sum() - wanted * rows.labels.mean()) <= 1


def test_the_fingerprint_sees_texts_labels_and_order():
    prints = {
        make_rows(["a", "b"], [0, 1]).fingerprint,
        make_rows(["a", "b"], [1, 0]).fingerprint,
        make_rows(["b", "a"], [1, 0]).fingerprint,
        make_rows(["ab", ""], [0, 1]).fingerprint,
    }
    assert len(prints) == 4


def test_every_role_is_judged_in_the_recipes_order(toy):
    files = {"train": "train.csv", "dev": "test.csv", "test_2": "test.csv"}
    several = DataConfig(
        source={role: str(toy / name) for role, name in files.items()}, test_fraction=0.2
    )
    data = load_data(several)
    assert data.judged == ("dev", "test_2")
    assert data.carved_test is None
    assert len(data.train) + len(data.validation) == 120
    rows, counts = load_judged(several, role="dev", labels=data.labels)
    assert len(rows) == counts.kept == 41


def test_the_sample_of_judged_rows_is_of_every_role(toy):
    several = config(toy, max_test_rows=10)
    assert len(load_judged(several, role="test", labels=("negative", "positive"))[0]) == 10


@pytest.mark.parametrize("hidden", [-1, "-1"])
def test_hidden_labels_are_counted_and_not_judged(toy, hidden):
    (toy / "test.jsonl").write_text(
        "".join(json.dumps({"text": t, "label": hidden}) + "\n" for t in "abc")
    )
    several = DataConfig(source={"train": str(toy / "train.csv"), "test": str(toy / "test.jsonl")})
    rows, counts = load_judged(several, role="test", labels=("negative", "positive"))
    assert rows is None
    assert (counts.read, counts.unlabelled, counts.kept) == (3, 3, 0)


def test_some_hidden_labels_are_bad_rows_and_minus_one_can_be_a_label(toy):
    write_csv(toy / "test.csv", [("a", "-1"), ("b", "positive")])
    with pytest.raises(DataError, match="row 1: label '-1' is none of negative, positive"):
        load_judged(config(toy), role="test", labels=("negative", "positive"))
    write_csv(toy / "test.csv", [("a", "-1"), ("b", "-1")])
    assert load_judged(config(toy), role="test", labels=("-1", "1"))[0].labels.tolist() == [0, 0]


def test_files_have_no_splits_to_name(toy):
    with pytest.raises(
        DataError,
        match=r"data\.splits: found .* but .* are files; name files by role: data\.source=",
    ):
        load_data(DataConfig(source=str(toy / "train.csv"), splits={"train": "train"}))


@pytest.fixture
def hub_set(monkeypatch):
    """A Hub data set with the splits of SST-2, whose test labels are hidden."""
    import datasets

    features = datasets.Features(
        {
            "text": datasets.Value("string"),
            "label": datasets.ClassLabel(names=["negative", "positive"]),
        }
    )
    own = {
        "train": toy_rows(60),
        "validation": toy_rows(80)[60:],
        "test": [(text, -1) for text, _ in toy_rows(9)],
    }

    def load(name, configuration, *, split, revision):
        columns = {
            "text": [text for text, _ in own[split]],
            "label": [label for _, label in own[split]],
        }
        return datasets.Dataset.from_dict(columns, features=features)

    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda *_, **__: list(own))
    monkeypatch.setattr(datasets, "load_dataset", load)
    return DataConfig(source="own/sst2")


def test_a_hub_data_sets_splits_take_the_roles_that_the_recipe_gives(hub_set):
    given_config = hub_set.model_copy(
        update={"splits": {"train": "train", "dev": "validation", "test": "test"}}
    )
    data = load_data(given_config)
    assert data.judged == ("dev", "test")
    assert (len(data.train), len(data.validation)) == (
        54,
        6,
    )  # carved, because no split has the role
    assert len(load_judged(given_config, role="dev", labels=data.labels)[0]) == 20
    assert load_judged(given_config, role="test", labels=data.labels)[0] is None
    assert data.config == given_config.model_copy(update={"labels": ("negative", "positive")})


def test_without_roles_a_hub_data_sets_splits_are_what_they_are_called(hub_set):
    data = load_data(hub_set)
    assert (len(data.train), len(data.validation), data.judged) == (60, 20, ("test",))


def test_rows_to_judge_are_a_split_by_its_own_name(hub_set):
    rows, _ = load_rows(hub_set, split="validation", labels=("negative", "positive"))
    assert len(rows) == 20
    with pytest.raises(DataError, match="has no split 'dev'; it has train, validation, test"):
        load_rows(hub_set, split="dev", labels=("negative", "positive"))


def test_recorded_splits_do_not_bind_a_file_that_is_given_instead(toy):
    recorded = DataConfig(source="own/sst2", splits={"train": "train", "dev": "validation"})
    instead = recorded.model_copy(update={"source": str(toy / "test.csv")})
    assert len(load_rows(instead, split="test", labels=("negative", "positive"))[0]) == 41


def write_raw(folder, kind, rows):
    """Write rows as a table of some kind, and return its source."""
    if kind == "parquet":
        columns = {"text": [text for text, _ in rows], "label": [label for _, label in rows]}
        pq.write_table(pa.table(columns), folder / "raw.parquet")
        return str(folder / "raw.parquet")
    if kind == "jsonl":
        lines = [json.dumps({"text": text, "label": label}) for text, label in rows]
        (folder / "raw.jsonl").write_text("\n".join(lines))
        return str(folder / "raw.jsonl")
    if kind == "pattern":
        write_csv(folder / "raw1.csv", rows[:50])
        write_csv(folder / "raw2.csv", rows[50:])
        return str(folder / "raw*.csv")
    path = str(write_csv(folder / "raw.csv", rows))
    return {"train": path, "validation": path} if kind == "own split" else path


@pytest.mark.parametrize("kind", ["csv", "parquet", "jsonl", "pattern", "own split"])
@pytest.mark.parametrize("max_rows", [None, 80])
def test_raw_texts_are_those_of_the_same_rows_before_cleaning(kind, max_rows, tmp_path):
    rows = [
        (f"<b>{i}</b><br />{text} &amp;\u00a0", label)
        for i, (text, label) in enumerate(toy_rows(100))
    ]
    rows[3], rows[60] = (" <br />", "positive"), ("no label", "")
    source = write_raw(tmp_path, kind, rows)
    config = DataConfig(source=source, on_bad_row="drop", max_train_rows=max_rows)
    data = load_data(config)
    role = "validation" if "validation" in data.counts else "train"
    raw = load_raw_texts(config, data.validation, role=role)
    assert raw == [rows[number - 1][0] for number in data.validation.numbers]
    assert [clean_text(text, Counter()) for text in raw] == list(data.validation.texts)
