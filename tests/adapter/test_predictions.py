import hashlib

import numpy as np
import pytest

from lora_sentiment.adapter.predictions import (
    PREDICTIONS,
    Predictions,
    load_predictions,
    save_predictions,
)
from lora_sentiment.errors import AdapterError


def make(seed):
    logits = np.random.default_rng(seed).normal(size=(5, 3)).astype(np.float32)
    return Predictions(logits, np.array([0, 1, 2, 0, 1]), hashlib.sha256(bytes([seed])).hexdigest())


def test_what_is_saved_reads_back_equal_by_role(tmp_path):
    given = {"validation": make(0), "test": make(1)}
    save_predictions(tmp_path, given)
    found = load_predictions(tmp_path)
    assert found.keys() == given.keys()
    for role, predictions in given.items():
        assert np.array_equal(found[role].logits, predictions.logits)
        assert np.array_equal(found[role].labels, predictions.labels)
        assert found[role].fingerprint == predictions.fingerprint


def test_the_bytes_repeat_whatever_the_order(tmp_path):
    given = {"validation": make(0), "test": make(1)}
    save_predictions(tmp_path, given)
    first = (tmp_path / PREDICTIONS).read_bytes()
    save_predictions(tmp_path, dict(reversed(given.items())))
    assert (tmp_path / PREDICTIONS).read_bytes() == first


def test_a_folder_without_predictions_has_none(tmp_path):
    assert load_predictions(tmp_path) == {}


def test_a_damaged_file_is_refused(tmp_path):
    (tmp_path / PREDICTIONS).write_bytes(b"no safetensors")
    with pytest.raises(AdapterError, match="cannot be read"):
        load_predictions(tmp_path)
