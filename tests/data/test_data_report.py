import json
import re

import numpy as np
import pytest

from lora_sentiment.commands.data import describe_data
from lora_sentiment.data.batches import Encoded
from lora_sentiment.data.report import (
    describe_role,
    describe_unlabelled,
    log_warnings,
    report_lines,
)
from lora_sentiment.data.rows import Counts, Rows
from lora_sentiment.errors import LoraSentimentError, ModelError
from lora_sentiment.recipe.recipe import Recipe
from lora_sentiment.tasks import SINGLE_LABEL
from tests.conftest import toy_rows, write_csv

NAMES = ("bad", "good")


def describe(texts, labels, lengths=None, **values):
    rows = Rows(list(texts), np.array(labels), np.arange(11, 11 + len(labels)))
    whole = np.array(lengths or [5] * len(labels))
    inputs = np.minimum(whole, 10)
    offsets = np.concatenate([[0], np.cumsum(inputs)])
    encoded = Encoded(
        np.zeros(offsets[-1], np.int32), offsets, rows.labels, int((whole > 10).sum()), 0, whole
    )
    return describe_role(
        rows,
        encoded,
        names=NAMES,
        task=SINGLE_LABEL,
        max_length=10,
        **{"read": Counts(), **values},
    )


def digests(texts):
    return Rows(list(texts), np.zeros(len(texts)), np.zeros(len(texts))).digests


def test_rows_and_labels_are_counted():
    block = describe("abc", [0, 1, 1])
    assert block["rows"] == 3
    assert block["labels"] == {"bad": 1, "good": 2}
    assert describe("ab", [0, 1], read=None)["carved_from"] == "train"


def test_repeated_texts_are_counted_by_label_without_the_first():
    assert describe("aabab", [0, 0, 1, 1, 1])["duplicates"] == {
        "same_label": {"rows": 2, "first": [12, 15]},
        "other_label": {"rows": 1, "first": [14]},
    }


def test_texts_that_training_has_seen_are_counted_with_their_rows():
    block = describe("abc", [0, 1, 1], seen_texts=digests("ca"))
    assert block["seen"] == {"rows": 2, "first": [11, 13]}
    assert "seen" not in describe("abc", [0, 1, 1])


def test_lengths_are_of_whole_texts_and_tokens_of_inputs():
    block = describe(map(str, range(100)), [0, 1] * 50, lengths=list(range(1, 101)))
    assert block["tokens"] == {
        "tokens": sum(range(1, 10)) + 91 * 10,
        "max_length": 10,
        "truncated": 90,
        "unknown": 0,
        "unknown_share": 0.0,
        "lengths": {"50%": 50, "90%": 90, "99%": 99, "longest": 100},
    }


def test_the_table_is_aligned_and_row_numbers_stand_below():
    read = Counts(read=9, dropped={"text is empty": [3, 4, 5, 6, 7, 8]})
    read.cleaned["html entities"] = 2
    report = {
        "train": describe("aa", [0, 1], read=read),
        "test": describe("ab", [0, 1], seen_texts=digests("b")),
        **describe_unlabelled({"dev": 7}),
    }
    lines = report_lines(report)
    table = [line for line in lines if ":" not in line]
    assert len({len(line) for line in table}) == 1
    assert table[0].split() == ["train", "test"]
    assert [line for line in lines if line not in table] == [
        "train: text is empty, DROPPED: 6 rows: 3, 4, 5, 6, 7, ...",
        "train: rows read 9, of which cleaned: 2 html entities",
        "train: text stands earlier under another label: 1 row: 12",
        "test: text was seen in training: 1 row: 12",
        "dev: 7 rows without labels (all are -1): not evaluated",
    ]
    assert report_lines(report, ["dev"]) == lines[-1:]


def test_many_labels_share_a_line():
    rows = Rows([str(i) for i in range(30)], np.arange(30), np.arange(30))
    encoded = Encoded(np.zeros(30, np.int32), np.arange(31), rows.labels, 0, 0)
    names = [f"class {i}" for i in range(30)]
    block = describe_role(rows, encoded, names=names, task=SINGLE_LABEL, max_length=10, read=None)
    lines = report_lines({"train": block})
    assert lines[10].split() == ["22", "more,", "each", "1", "to", "1"]
    assert len(lines) <= 20


def make_report(share, labels=("bad", "good"), role="train"):
    """Return the part of a report that warnings are made of."""
    block = {"labels": {name: i + 1 for i, name in enumerate(labels)}, "rows": 9}
    return {role: {**block, "tokens": {"unknown_share": share}}}


def find_warnings(caplog, report):
    caplog.clear()
    log_warnings(report)
    return [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]


@pytest.mark.parametrize(
    ("names", "groups"),
    [
        (["Neg", "neg", "pos"], ["'Neg' (1 rows), 'neg' (2 rows)"]),
        (["NEG", "Neg", "POS", "neg", "pos"], ["'NEG'.*'Neg'.*'neg'", "'POS'.*'pos'"]),
        (["very good", "very  good", "verygood", "x"], ["'very good'.*'very  good'.*'verygood'"]),
        (["caf\u00e9", "cafe\u0301"], ["(1 rows), .*(2 rows)"]),
        (["\uff2e\uff45\uff47", "neg"], ["'neg'"]),
        (["a\u200bb", "ab"], ["'ab'"]),
        (["STRASSE", "stra\u00dfe"], ["'STRASSE'"]),
        (["\u2764", "\u2764\ufe0f", "co\u00adop", "coop"], ["'\u2764'", "'coop'"]),
        (["neg", "negative", "0", "00", "pos"], []),
    ],
)
def test_labels_that_differ_in_case_blanks_or_form_alone_are_warned_of(names, groups, caplog):
    warnings = find_warnings(caplog, make_report(0.0, names))
    assert len(warnings) == len(groups)
    for warning, group in zip(warnings, groups, strict=True):
        assert re.search(group.replace("(", r"\(").replace(")", r"\)"), warning)
    assert not find_warnings(caplog, make_report(0.0, names, role="validation"))


@pytest.mark.parametrize(
    ("counts", "shown"),
    [
        ({"a": 0, "b": 3, "c": 3}, "a"),
        ({"a": 3, "b": 0, "c": 0}, "b, c"),
        ({f"l{i}": i // 30 for i in range(60)}, "l0, l1, l2, l3, l4, l5, l6, l7, and 22 more"),
        ({"a": 1, "b": 1}, None),
    ],
)
def test_labels_without_training_rows_are_warned_of(counts, shown, caplog):
    report = make_report(0.0)
    report["train"]["labels"] = counts
    warnings = find_warnings(caplog, report)
    expected = [f"train: no row has the label {shown}; integers count labels from 0"]
    assert warnings == (expected if shown else [])
    assert not find_warnings(caplog, {"validation": report["train"]})


@pytest.mark.parametrize(("share", "warned"), [(0.199, False), (0.2, True), (1.0, True)])
def test_unknown_tokens_are_warned_of_from_a_fifth_on(share, warned, caplog):
    warnings = find_warnings(caplog, make_report(share, role="dev"))
    assert len(warnings) == warned
    assert not warned or f"dev: {share:.1%} of the tokens are [UNK]" in warnings[0]


@pytest.mark.parametrize(
    ("texts", "share"),
    [
        (["好评 差评", "质量 太差"], 1.0),
        (["Это плохой чайник", "so so so"], 0.5),
        (["정말 좋아요", "👍"], 1.0),
        (["it was good", "so bad"], 0.0),
        (["good 👍", "the meal was so quite 👍"], 2 / 8),
    ],
)
def test_unknown_tokens_are_counted_without_cls_and_sep(texts, share, tiny_base, toy_recipe, toy):
    write_csv(toy / "test.csv", [(text, "positive") for text in texts])
    report = describe_data(Recipe.load(toy_recipe))
    tokens = report["test"]["tokens"]
    assert tokens["unknown_share"] == pytest.approx(share)
    assert tokens["unknown"] == round(share * (tokens["tokens"] - 4))
    assert report["train"]["tokens"]["unknown"] == 0
    unknown = report_lines(report)[-5 - len(report) :]
    assert any(f"{share:.1%}" in line for line in unknown)


@pytest.fixture
def leaky(toy):
    """Toy data with a twin, an empty text, an unknown label, and two train texts in test."""
    rows = toy_rows(161)
    write_csv(
        toy / "train.csv",
        [*rows[:120], rows[0], ("", "positive"), ("private words", "private label")],
    )
    write_csv(toy / "test.csv", [*rows[120:140], *rows[:2]])
    return toy


def test_a_survey_finds_what_was_hidden_and_saves_no_text(leaky, toy_recipe):
    overrides = ["data.on_bad_row=drop", "data.labels=[negative, positive]"]
    report = describe_data(Recipe.load(toy_recipe, overrides))
    assert list(report) == ["train", "validation", "test"]
    assert report["train"]["read"] == 123
    assert report["train"]["dropped"] == {
        "text is empty": {"rows": 1, "first": [122]},
        "label is unknown": {"rows": 1, "first": [123]},
    }
    twins = [report[role]["duplicates"]["same_label"]["rows"] for role in ("train", "validation")]
    assert sorted(twins) == [0, 1]
    assert report["test"]["seen"] == {"rows": 2, "first": [21, 22]}
    assert report["train"]["rows"] + report["validation"]["rows"] == 121
    assert report["train"]["tokens"]["max_length"] == 16
    said = json.dumps(report) + "\n".join(report_lines(report))
    assert "private" not in said
    assert "film" not in said


def test_a_survey_counts_a_split_whose_labels_are_hidden(toy, toy_recipe):
    write_csv(toy / "test.csv", [("fine", "-1"), ("poor", "-1")])
    report = describe_data(Recipe.load(toy_recipe))
    assert report["test"] == {"read": 2, "rows": 0, "unlabelled": 2}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.max_length=65", "more than the 64 positions"),
        ("model.revision=v2", "a folder, which has no revisions"),
    ],
)
def test_a_survey_refuses_a_base_that_training_would(toy_recipe, override, message):
    with pytest.raises(ModelError, match=message):
        describe_data(Recipe.load(toy_recipe, [override]))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.metric_for_best_model=auroc", "validation: all 4 rows have the label 'positive'"),
        ("train.metric_for_best_model=mcc", "so mcc cannot choose the best model"),
        ("train.class_weights=[1, 2, 3]", "found 3 weights; give one for each of the 2 labels"),
        ("train.class_weights=[1, 1, 1, 1]", "found 4 weights"),
    ],
)
def test_a_survey_refuses_settings_that_the_rows_do_not_serve(toy, toy_recipe, override, message):
    write_csv(toy / "one.csv", [(f"good {i}", "positive") for i in range(4)])
    source = f"data.source={{train: {toy}/train.csv, validation: {toy}/one.csv}}"
    with pytest.raises(LoraSentimentError, match=message):
        describe_data(Recipe.load(toy_recipe, [source, override]))


def test_a_label_takes_one_line_of_the_table_and_no_more_than_40_characters():
    names = ("yes\n| x |", "a\rb", "c\u2028d", "\x1b[31mred", "L" * 500, "L" * 400 + "M")
    rows = Rows([str(i) for i in range(6)], np.arange(6), np.arange(6))
    encoded = Encoded(np.zeros(6, np.int32), np.arange(7), rows.labels, 0, 0)
    block = describe_role(rows, encoded, names=names, task=SINGLE_LABEL, max_length=10, read=None)
    lines = report_lines({"train": block})
    assert all(line.isprintable() for line in lines)
    assert max(map(len, lines)) < 60
    assert sum("LLLL" in line for line in lines) == 2
