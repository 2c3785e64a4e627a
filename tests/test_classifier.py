import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, TaskType, get_peft_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from lora_sentiment.adapter.merge import merge
from lora_sentiment.classifier import Classifier, Prediction, load
from lora_sentiment.errors import AdapterError, DataError, ModelError
from lora_sentiment.models.load import load_base
from lora_sentiment.recipe.model import ModelConfig

SAVED = Path(__file__).parent / "saved"
TEXTS = ["a good film.", "the plot was dull and so weak, really a poor meal", "fine"]
LONG = " ".join(["the good plot was", "a dull film"] * 12)


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


def test_an_adapter_answers_in_order_whatever_the_lengths(toy_adapter):
    classifier = load(toy_adapter)
    found = classifier.predict(TEXTS)
    assert [p.label for p in found] == ["positive", "negative", "positive"]
    for text, prediction in zip(TEXTS, found, strict=True):
        (alone,) = classifier.predict([text])
        assert alone.score == pytest.approx(prediction.score, abs=1e-6)
        assert (
            prediction.score
            == max(prediction.scores.values())
            == prediction.scores[prediction.label]
        )
        assert sum(prediction.scores.values()) == pytest.approx(1)
    assert classifier.unverified == ()
    assert classifier.predict([]) == []


def test_texts_are_cleaned_as_they_were_for_training(toy_adapter):
    classifier = load(toy_adapter)
    assert classifier.predict(["a&nbsp;good<br />film."]) == classifier.predict(["a good film."])


def test_a_long_text_is_cut_or_read_in_windows(toy_adapter):
    classifier = load(toy_adapter)
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


def test_a_stride_that_leaves_no_room_is_refused(toy_adapter):
    with pytest.raises(ModelError, match="stride: found 14; allowed: 0 to 13"):
        load(toy_adapter).predict(["a"], stride=14)


def test_a_temperature_moves_scores_and_no_label(toy_adapter):
    classifier = load(toy_adapter)
    plain, calibrated = classifier.predict(TEXTS), classifier.predict(TEXTS, calibrated=True)
    assert [p.label for p in plain] == [p.label for p in calibrated]
    logits = (
        np.log(plain[0].scores["positive"] / plain[0].scores["negative"]) / classifier.temperature
    )
    assert calibrated[0].scores["positive"] == pytest.approx(1 / (1 + np.exp(-logits)), abs=1e-6)


def test_a_stock_peft_folder_answers_as_stock_peft_and_says_what_is_unverified(stock, tiny_base):
    folder, model = stock
    classifier = load(folder, labels=["bad", "good"], dtype="float32")
    np.testing.assert_allclose(
        classifier.probabilities(TEXTS), stock_probabilities(model, tiny_base, TEXTS), atol=1e-5
    )
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
    assert load(folder, labels=["bad", "good"], base=str(tmp_path / "moved")).labels == (
        "bad",
        "good",
    )


def test_a_stock_peft_folder_that_lost_half_of_its_head_is_refused(tmp_path, tiny_base):
    model = AutoModelForSequenceClassification.from_pretrained(tiny_base, num_labels=2)
    # What PEFT saves by itself: the classifier alone.
    get_peft_model(
        model, LoraConfig(task_type=TaskType.SEQ_CLS, target_modules=["q_lin"])
    ).save_pretrained(tmp_path)
    with pytest.raises(AdapterError, match="pre_classifier is in neither the adapter nor the base"):
        load(tmp_path, labels=["bad", "good"])


def test_a_stock_model_folder_answers_and_says_that_nobody_vouches_for_it(tmp_path, tiny_base):
    torch.manual_seed(1)
    model = AutoModelForSequenceClassification.from_pretrained(
        tiny_base, id2label={0: "bad", 1: "good", 2: "so"}
    )
    model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny_base).save_pretrained(tmp_path)
    classifier = load(tmp_path, dtype="float32")
    assert classifier.labels == ("bad", "good", "so")
    assert classifier.unverified
    expected = stock_probabilities(model.eval(), tiny_base, TEXTS)
    np.testing.assert_allclose(classifier.probabilities(TEXTS), expected, atol=1e-5)
    with pytest.raises(ModelError, match="leave out base"):
        load(tmp_path, base="b")
    assert load(tmp_path, labels=["x", "y", "z"]).labels == ("x", "y", "z")


def test_an_encoder_alone_and_an_empty_folder_are_refused(tiny_base, tmp_path):
    with pytest.raises(AdapterError, match="without a classification head"):
        load(tiny_base)
    with pytest.raises(AdapterError, match="holds no model; expected"):
        load(tmp_path)
    with pytest.raises(AdapterError, match=r"no such folder or \.onnx file"):
        load(tmp_path / "none")


def test_options_that_an_adapter_knows_itself_are_refused(toy_adapter):
    with pytest.raises(ModelError, match="leave out max_length"):
        load(toy_adapter, max_length=8)


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ("A lovely film.", "found one string; give a list"),
        (["fine", None], r"texts\[1\]: found a NoneType"),
    ],
)
def test_what_is_no_list_of_texts_is_refused(toy_adapter, texts, message):
    with pytest.raises(DataError, match=message):
        load(toy_adapter).predict(texts)


def test_half_a_surrogate_pair_is_cleaned_away_or_refused(toy_adapter):
    classifier = load(toy_adapter)
    assert classifier.predict(["good\udcff"]) == classifier.predict(["good"])
    with pytest.raises(DataError, match="half of a surrogate pair"):
        dataclasses.replace(classifier, clean=False).predict(["good\udcff"])


@pytest.mark.parametrize("value", [7, 0, -1, "8", True])
def test_a_max_length_that_is_none_is_refused(stock, value):
    with pytest.raises(ModelError, match=r"max_length: found .*; allowed: 8 or more"):
        load(stock[0], labels=["bad", "good"], max_length=value)


@pytest.mark.parametrize("labels", [["a", "a"], ["a", ""], ["a"]])
def test_labels_that_cannot_be_told_apart_are_refused(labels):
    with pytest.raises(AdapterError, match="two or more different names"):
        Classifier(tuple(labels), None, None, False, None, "")


def test_labels_as_one_string_are_refused(stock):
    with pytest.raises(ModelError, match="found the string 'ab'; give a list"):
        load(stock[0], labels="ab")


def test_another_number_of_answers_than_labels_is_refused(toy_adapter):
    classifier = dataclasses.replace(load(toy_adapter), labels=("a", "b", "c"))
    with pytest.raises(AdapterError, match=r"answers .* values a text for 3 labels"):
        classifier.predict(TEXTS)


def test_all_that_decides_an_answer_is_in_the_hash(toy_adapter, stock):
    hashes = [load(toy_adapter, dtype=dtype).sha256 for dtype in ("float32", "bfloat16", "float32")]
    assert hashes[0] == hashes[2] != hashes[1]
    first, second = (load(stock[0], labels=["bad", "good"], max_length=n).sha256 for n in (8, 16))
    assert first != second


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target_modules": ["nothing"]}, "cannot be used: No modules were targeted"),
        ({"r": "8"}, "r: Input should be a valid integer"),
        ({"peft_type": "BOFT"}, "has peft_type 'BOFT'; this package reads LORA"),
        ({"task_type": "OTHER"}, "task_type: Input should be 'SEQ_CLS'"),
    ],
)
def test_a_configuration_that_peft_refuses_is_one_line(stock, change, message):
    path = stock[0] / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(AdapterError, match=rf"adapter_config\.json: {message}"):
        load(stock[0], labels=["bad", "good"])


@pytest.fixture
def merged(toy_adapter, tmp_path):
    merge(toy_adapter, tmp_path / "merged")
    return tmp_path / "merged"


def test_a_merged_model_is_no_base_of_a_stock_adapter(stock, merged):
    with pytest.raises(AdapterError, match="is not a base: it already holds the adapter"):
        load(stock[0], labels=["bad", "good"], base=str(merged))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (
            "config.json",
            {"id2label": {"0": "positive", "1": "negative"}},
            r"config\.json: was altered",
        ),
        ("config.json", {"n_heads": 2}, r"config\.json: was altered .*its labels, shape or task"),
        ("config.json", {"num_attention_heads": 2}, r"config\.json: was altered"),
        ("config.json", {"activation": "relu"}, r"config\.json: was altered"),
        ("config.json", {"problem_type": "regression"}, r"config\.json: was altered"),
        (
            "tokenizer.json",
            {"normalizer": None},
            "was altered .*the tokenizer or its special tokens",
        ),
        ("tokenizer_config.json", {"cls_token": "good"}, r"tokenizer_config\.json was altered"),
        ("config.json", {"lora_sentiment": {"files": {}}}, "no hash of this file is recorded"),
        ("config.json", {"lora_sentiment": {"max_length": 2}}, "greater than or equal to 8"),
    ],
)
def test_an_altered_merged_folder_is_refused(merged, name, change, message):
    path = merged / name
    values = json.loads(path.read_text())
    if "lora_sentiment" in change:
        change = {"lora_sentiment": values["lora_sentiment"] | change["lora_sentiment"]}
    path.write_text(json.dumps(values | change))
    with pytest.raises(AdapterError, match=message):
        load(merged)


def save_again(merged, folder):
    """Load and save a model as a user of stock transformers does, after some calls."""
    model = AutoModelForSequenceClassification.from_pretrained(merged)
    tokenizer = AutoTokenizer.from_pretrained(merged)
    tokenizer(["a good film " * 40, "bad"], truncation=True, padding=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def save_by_transformers_4(merged, folder):
    """Save as transformers 4.57 does."""
    save_again(merged, folder)
    config = json.loads((folder / "config.json").read_text())
    for key in ("bos_token_id", "eos_token_id", "tie_word_embeddings", "dtype"):
        config.pop(key)
    config |= {"transformers_version": "4.57.6", "torch_dtype": "float32", "_name_or_path": "m"}
    (folder / "config.json").write_text(json.dumps(config))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings |= {
        "tokenizer_class": "PreTrainedTokenizer",
        "added_tokens_decoder": {"0": {"content": "[PAD]", "special": True}},
        "clean_up_tokenization_spaces": False,
        "extra_special_tokens": {},
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def choose_another_tokenizer_class(merged, folder):
    """Only stock transformers lets these decide how a text is read."""
    shutil.copytree(merged, folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings |= {"tokenizer_class": "DistilBertTokenizer", "do_lower_case": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


@pytest.mark.parametrize(
    "save", [save_again, save_by_transformers_4, choose_another_tokenizer_class]
)
def test_a_merged_model_that_was_saved_again_answers_the_same(save, merged, tmp_path):
    save(merged, tmp_path / "again")
    texts = ["A GOOD film", "bad &amp; dull <br /> " * 9, "caf&eacute; it&#39;s weak"]
    before, after = load(merged), load(tmp_path / "again")
    np.testing.assert_array_equal(after.probabilities(texts), before.probabilities(texts))
    assert after.sha256 == before.sha256


def test_an_older_record_tells_what_it_covers(tmp_path):
    old = Path(__file__).parent / "saved/merged"
    shutil.copytree(old, tmp_path / "again")
    config = json.loads((old / "config.json").read_text())
    config["transformers_version"] = "5.24.0"
    (tmp_path / "again/config.json").write_text(json.dumps(config))
    with pytest.raises(AdapterError, match="an older version made of the whole file"):
        load(tmp_path / "again")


def test_importing_the_classifier_imports_no_torch():
    code = "import sys, lora_sentiment.classifier; assert not {'torch', 'transformers', 'datasets'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_package_itself_gives_load():
    code = (
        "import sys, lora_sentiment; assert 'tokenizers' not in sys.modules; from lora_sentiment "
        "import load;"
        "from lora_sentiment.classifier import load as same; assert load is same;"
        "assert not hasattr(lora_sentiment, 'nothing')"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_stock_model_without_names_has_transformers_own(tmp_path, tiny_base):
    AutoModelForSequenceClassification.from_pretrained(tiny_base).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny_base).save_pretrained(tmp_path)
    assert load(tmp_path).labels == ("LABEL_0", "LABEL_1")


NO_TOKEN = ["", "   ", "\u200d", "\u00ad", "\x00\x07", "\u200b\ufeff", " \n\t", "[SEP] [PAD]"]


@pytest.mark.parametrize("form", ["adapter", "merged", "onnx"])
def test_a_text_without_tokens_gets_no_label(toy_adapter, form):
    classifier = load(toy_adapter if form == "adapter" else SAVED / form)
    good, *empty = classifier.predict(["good", *NO_TOKEN])
    assert good.label in classifier.labels
    assert good.error is None
    assert empty == [Prediction(error="text is empty")] * len(NO_TOKEN)


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"problem_type": "regression"}, "a regression has one, the name of its value"),
        ({"problem_type": "token_classification"}, "problem_type is 'token_classification'"),
        ({"problem_type": ["x"]}, r"problem_type is \['x'\]"),
        ({"id2label": {"0": "LABEL_0"}}, "has one label and no problem_type"),
    ],
)
@pytest.mark.parametrize("form", ["merged", "onnx"])
def test_a_model_of_another_task_is_refused(tmp_path, form, facts, message):
    folder = Path(shutil.copytree(SAVED / form, tmp_path / "model"))
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    del config["lora_sentiment"]
    (folder / "config.json").write_text(json.dumps(config | facts), encoding="utf-8")
    with pytest.raises(AdapterError, match=message):
        load(folder)


def test_a_base_of_another_task_serves_training_and_decides_a_stock_peft_folder(
    stock, tmp_path, tiny_base
):
    folder, _ = stock
    base = Path(shutil.copytree(tiny_base, tmp_path / "multi"))
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    config["problem_type"] = "multi_label_classification"
    (base / "config.json").write_text(json.dumps(config), encoding="utf-8")
    loaded = load_base(ModelConfig(name=str(base), max_length=16), labels=("bad", "good"))
    assert loaded.config.problem_type is None
    single = load(folder, labels=["bad", "good"], base=str(tiny_base))
    multi = load(folder, labels=["bad", "good"], base=str(base))
    one, many = single.probabilities(["good"])[0], multi.probabilities(["good"])[0]
    # The same two logits: their softmax is the sigmoid of their difference.
    assert np.log(many / (1 - many)) @ [-1, 1] == pytest.approx(np.log(one[1] / one[0]), abs=1e-4)
    assert multi.predict(["good"])[0].labels == [
        multi.labels[i] for i in np.flatnonzero(many >= 0.5)
    ]
