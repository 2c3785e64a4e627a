import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from peft import LoraConfig, TaskType, get_peft_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from lora_sentiment.classifier import load
from lora_sentiment.errors import AdapterError, ModelError
from lora_sentiment.recipe import Recipe
from lora_sentiment.train import train
from tests.conftest import toy_rows

TEXTS = ["a good film.", "the plot was dull and so weak, really a poor meal", "fine"]
LONG = " ".join(["the good plot was", "a dull film"] * 12)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_base):
    """A toy adapter, at most 16 tokens a text."""
    folder = tmp_path_factory.mktemp("trained")
    rows = toy_rows(80)
    lines = ["text,label", *(f"{text},{label}" for text, label in rows)]
    (folder / "train.csv").write_text("\n".join(lines))
    recipe = folder / "toy.yaml"
    recipe.write_text(
        f"data: {{source: {folder}/train.csv}}\nmodel: {{name: {tiny_base}, max_length: 16}}\n"
        f"train: {{num_train_epochs: 2, learning_rate: 1e-2}}\noutput: {{dir: {folder}/adapter}}\n"
    )
    return train(Recipe.load(recipe)).adapter


@pytest.fixture
def stock(tmp_path, tiny_base):
    """A PEFT folder that this package did not write."""
    torch.manual_seed(3)
    model = AutoModelForSequenceClassification.from_pretrained(tiny_base, num_labels=2)
    config = LoraConfig(
        task_type=TaskType.SEQ_CLS,
        target_modules=["q_lin", "v_lin"],
        modules_to_save=["pre_classifier", "classifier"],
        init_lora_weights=False,
        base_model_name_or_path=str(tiny_base),
    )
    peft = get_peft_model(model, config)
    peft.save_pretrained(tmp_path / "stock")
    return tmp_path / "stock", peft.eval()


def stock_probabilities(model, base, texts):
    tokenizer = AutoTokenizer.from_pretrained(base)
    with torch.inference_mode():
        rows = [model(**tokenizer(text, return_tensors="pt")).logits[0] for text in texts]
    return torch.stack(rows).softmax(-1).numpy()


def test_an_adapter_answers_in_order_whatever_the_lengths(trained):
    classifier = load(trained)
    found = classifier.predict(TEXTS)
    assert [p.label for p in found] == ["positive", "negative", "positive"]
    for text, prediction in zip(TEXTS, found, strict=True):
        (alone,) = classifier.predict([text])
        assert alone.score == pytest.approx(prediction.score, abs=1e-6)
        assert prediction.score == max(prediction.scores.values()) == prediction.scores[prediction.label]
        assert sum(prediction.scores.values()) == pytest.approx(1)
    assert classifier.unverified == ()
    assert classifier.predict([]) == []


def test_texts_are_cleaned_as_they_were_for_training(trained):
    classifier = load(trained)
    assert classifier.predict(["a&nbsp;good<br />film."]) == classifier.predict(["a good film."])


def test_a_long_text_is_cut_or_read_in_windows(trained):
    classifier = load(trained)
    words = LONG.split()
    assert classifier.predict([LONG]) == classifier.predict([" ".join(words[:14])])
    ids = classifier.encoder.tokenise([LONG])[0]
    windows = classifier.encoder.windows(ids, stride=4)
    assert [len(window) for window in windows] == [14] * len(windows)
    assert windows[0][-4:] == windows[1][:4]
    assert windows[-1] == ids[-14:]
    pooled = classifier.probabilities([LONG, "fine"], stride=4)
    alone = classifier.probabilities(
        [" ".join(words[i : i + 14]) for i in (*range(0, len(words) - 14, 10), len(words) - 14)]
    )
    np.testing.assert_allclose(pooled[0], alone.mean(axis=0), atol=1e-6)
    np.testing.assert_allclose(pooled[1], classifier.probabilities(["fine"])[0], atol=1e-6)


def test_a_stride_that_leaves_no_room_is_refused(trained):
    with pytest.raises(ModelError, match="stride: found 14; allowed: 0 to 13"):
        load(trained).predict(["a"], stride=14)


def test_a_temperature_moves_scores_and_no_label(trained):
    classifier = load(trained)
    plain, calibrated = classifier.predict(TEXTS), classifier.predict(TEXTS, calibrated=True)
    assert [p.label for p in plain] == [p.label for p in calibrated]
    logits = np.log(plain[0].scores["positive"] / plain[0].scores["negative"]) / classifier.temperature
    assert calibrated[0].scores["positive"] == pytest.approx(1 / (1 + np.exp(-logits)), abs=1e-6)


def test_a_stock_peft_folder_answers_as_stock_peft_and_says_what_is_unverified(stock, tiny_base):
    folder, model = stock
    classifier = load(folder, labels=["bad", "good"])
    np.testing.assert_allclose(classifier.probabilities(TEXTS), stock_probabilities(model, tiny_base, TEXTS), atol=1e-5)
    assert any("records no hash" in sentence for sentence in classifier.unverified)
    with pytest.raises(ModelError, match="was saved without a temperature"):
        classifier.predict(TEXTS, calibrated=True)


def test_a_stock_peft_folder_needs_labels_and_a_base(stock, tiny_base, tmp_path):
    folder, _ = stock
    with pytest.raises(ModelError, match="holds no label names"):
        load(folder)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": None}))
    with pytest.raises(ModelError, match="names no base"):
        load(folder, labels=["bad", "good"])
    shutil.copytree(tiny_base, tmp_path / "moved")
    assert load(folder, labels=["bad", "good"], base=str(tmp_path / "moved")).labels == ("bad", "good")


def test_a_stock_peft_folder_that_lost_half_of_its_head_is_refused(tmp_path, tiny_base):
    model = AutoModelForSequenceClassification.from_pretrained(tiny_base, num_labels=2)
    # What PEFT saves by itself: the classifier alone.
    get_peft_model(model, LoraConfig(task_type=TaskType.SEQ_CLS, target_modules=["q_lin"])).save_pretrained(tmp_path)
    with pytest.raises(AdapterError, match="pre_classifier is in neither the adapter nor the base"):
        load(tmp_path, labels=["bad", "good"])


def test_a_peft_kind_that_is_unknown_here_is_refused(stock):
    folder, _ = stock
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "peft_type": "BOFT"}))
    with pytest.raises(AdapterError, match="has peft_type 'BOFT'; this package reads LORA"):
        load(folder, labels=["bad", "good"])


def test_a_stock_model_folder_answers_and_says_that_nobody_vouches_for_it(tmp_path, tiny_base):
    torch.manual_seed(1)
    model = AutoModelForSequenceClassification.from_pretrained(tiny_base, id2label={0: "bad", 1: "good", 2: "so"})
    model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny_base).save_pretrained(tmp_path)
    classifier = load(tmp_path)
    assert classifier.labels == ("bad", "good", "so")
    assert classifier.unverified
    expected = stock_probabilities(model.eval(), tiny_base, TEXTS)
    np.testing.assert_allclose(classifier.probabilities(TEXTS), expected, atol=1e-5)
    with pytest.raises(ModelError, match="leave out labels and base"):
        load(tmp_path, labels=["a"], base="b")


def test_an_encoder_alone_and_an_empty_folder_are_refused(tiny_base, tmp_path):
    with pytest.raises(AdapterError, match="id2label names no two labels"):
        load(tiny_base)
    labelled = shutil.copytree(tiny_base, tmp_path / "labelled")
    values = json.loads((labelled / "config.json").read_text())
    (labelled / "config.json").write_text(json.dumps({**values, "id2label": {"0": "bad", "1": "good"}}))
    with pytest.raises(AdapterError, match="without a classification head"):
        load(labelled)
    with pytest.raises(AdapterError, match="holds no model; expected"):
        load(tmp_path)
    with pytest.raises(AdapterError, match=r"no such folder or \.onnx file"):
        load(tmp_path / "none")


def test_options_that_an_adapter_knows_itself_are_refused(trained):
    with pytest.raises(ModelError, match="leave out max_length"):
        load(trained, max_length=8)


def test_importing_the_classifier_imports_no_torch():
    code = "import sys, lora_sentiment.classifier; assert not {'torch', 'transformers', 'datasets'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_package_itself_gives_load():
    code = (
        "import sys, lora_sentiment; assert 'tokenizers' not in sys.modules; from lora_sentiment import load;"
        "from lora_sentiment.classifier import load as same; assert load is same;"
        "assert not hasattr(lora_sentiment, 'nothing')"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
