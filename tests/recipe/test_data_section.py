"""Which roles splits may have."""

import pytest
from pydantic import ValidationError

from lora_sentiment.recipe.data import DataConfig
from lora_sentiment.training.report import report_roles


@pytest.mark.parametrize("key", ["source", "splits"])
def test_any_role_beside_train_and_validation_is_one_to_judge(key):
    roles = {"train": "a", "dev": "b", "test": "c", "test_2": "d"}
    assert getattr(DataConfig(**{"source": "x/y", key: roles}), key) == roles


@pytest.mark.parametrize("key", ["source", "splits"])
@pytest.mark.parametrize(
    ("role", "message"),
    [
        ("validaton", "found split 'validaton'; did you mean 'validation'"),
        ("val", "found split 'val'; did you mean 'validation'"),
        ("tset", "found split 'tset'; did you mean 'test'"),
        ("Dev", "found split 'Dev'; allowed: train, validation, test, or a name of your own"),
        ("2nd", "found split '2nd'; allowed"),
        ("a-b", "found split 'a-b'; allowed"),
        ("parameters", "found split 'parameters'; allowed"),
        ("quantisation", "found split 'quantisation'; allowed"),
        ("tokens", "found split 'tokens'; allowed"),
    ],
)
def test_a_misspelt_or_taken_role_is_refused(key, role, message):
    with pytest.raises(ValidationError, match=message):
        DataConfig(**{"source": "x/y", key: {"train": "a", role: "b"}})


@pytest.mark.parametrize("key", ["source", "splits"])
def test_roles_need_train(key):
    with pytest.raises(ValidationError, match="has no 'train'"):
        DataConfig(**{"source": "x/y", key: {"test": "b"}})


def test_splits_and_files_by_role_exclude_each_other():
    with pytest.raises(ValidationError, match=r"data\.source names files by role already"):
        DataConfig(source={"train": "a.csv"}, splits={"train": "train"})


def test_a_split_has_one_role():
    with pytest.raises(ValidationError, match="found split 'validation' under two roles"):
        DataConfig(
            source="x/y",
            splits={"train": "train", "validation": "validation", "test": "validation"},
        )


def test_the_roles_of_a_report_are_its_other_blocks_validation_first():
    report = dict.fromkeys(
        ["schema", "dev", "train", "test", "validation", "data", "parameters", "quantisation"]
    )
    assert report_roles(report) == ["validation", "dev", "test"]
    assert report_roles({"schema": 1, "train": {}}) == []
