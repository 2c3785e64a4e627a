"""Other people's runtimes give our answers: 1,000 real reviews through the stock pipeline and ONNX Runtime."""

import json
import subprocess
import sys
from collections import Counter

import numpy as np
import pyarrow.parquet as pq
import pytest

from lora_sentiment.adapter.export import export
from lora_sentiment.adapter.merge import merge
from lora_sentiment.classifier import load
from lora_sentiment.cleaning import clean_text
from lora_sentiment.recipe.recipe import Recipe
from lora_sentiment.train import train

pytestmark = [pytest.mark.slow, pytest.mark.shared]

WITHOUT_TORCH = """
import json, sys
from lora_sentiment import load

path, texts, out = sys.argv[1:]
found = load(path).probabilities(json.load(open(texts)))
assert not {"torch", "transformers"} & set(sys.modules)
json.dump(found.tolist(), open(out, "w"))
"""


@pytest.fixture(scope="module")
def adapter(shared, tmp_path_factory):
    """LoRA on the real base, after a few steps on real reviews, at most 128 tokens."""
    folder = tmp_path_factory.mktemp("outside")
    data = shared / "data/imdb"
    recipe = folder / "short.yaml"
    recipe.write_text(
        f"data: {{source: {{train: {data}/train.parquet, test: {data}/test.parquet}}, max_train_rows: 700,"
        " max_test_rows: 50}\n"
        f"model: {{name: {shared}/models/minilm-l6-distilbert, max_length: 128, dtype: float32}}\n"
        "method: {r: 8, lora_alpha: 16, target_modules: all-linear}\n"
        f"train: {{max_steps: 15, learning_rate: 1e-3}}\noutput: {{dir: {folder}/adapter}}\n"
    )
    return train(Recipe.load(recipe)).adapter


@pytest.fixture(scope="module")
def texts(shared):
    """Every 25th of the 25,000 test reviews, as cleaned for training."""
    column = pq.read_table(shared / "data/imdb/test.parquet")["text"][::25].to_pylist()
    assert len(column) == 1000
    return [clean_text(text, Counter()) for text in column]


@pytest.fixture(scope="module")
def ours(adapter, texts):
    return load(adapter, dtype="float32").predict(texts)


def test_the_stock_pipeline_gives_our_labels_and_scores_from_the_merged_folder(
    adapter, texts, ours, tmp_path
):
    from transformers import pipeline

    merge(adapter, tmp_path / "merged")
    stock = pipeline("text-classification", model=str(tmp_path / "merged"))
    found = stock(texts, truncation=True)
    assert [row["label"] for row in found] == [prediction.label for prediction in ours]
    differences = [
        abs(row["score"] - prediction.score) for row, prediction in zip(found, ours, strict=True)
    ]
    assert max(differences) <= 1e-5


def test_an_onnx_file_gives_our_labels_and_scores_without_torch(adapter, texts, ours, tmp_path):
    export(adapter, tmp_path / "out", format="onnx")
    (tmp_path / "texts.json").write_text(json.dumps(texts))
    arguments = [tmp_path / "out/onnx/model.onnx", tmp_path / "texts.json", tmp_path / "found.json"]
    subprocess.run([sys.executable, "-c", WITHOUT_TORCH, *map(str, arguments)], check=True)
    found = np.array(json.loads((tmp_path / "found.json").read_text()))
    assert [prediction.label for prediction in ours] == [
        list(ours[0].scores)[i] for i in found.argmax(axis=1)
    ]
    expected = np.array([list(prediction.scores.values()) for prediction in ours])
    assert np.abs(found - expected).max() <= 1e-5
