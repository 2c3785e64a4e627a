"""Every task on several methods: trained, saved, reloaded, merged, exported, and answered by other programs."""

import contextlib
import json
import re

import numpy as np
import pytest
from onnxruntime import InferenceSession
from transformers import AutoTokenizer, pipeline

from lora_sentiment.adapter.export import export
from lora_sentiment.adapter.merge import merge
from lora_sentiment.classifier import load
from lora_sentiment.commands.evaluate import evaluate
from lora_sentiment.commands.predict import predict_file
from lora_sentiment.data.rows import load_data
from lora_sentiment.errors import DataError, RecipeError
from lora_sentiment.recipe.data import DataConfig
from lora_sentiment.recipe.recipe import Recipe
from lora_sentiment.tasks.multi_label import make_label_weights
from lora_sentiment.train import train
from tests.conftest import BAD, FILLERS, GOOD
from tests.tiny_families import save_family_base

WORDS = {"good": GOOD, "bad": BAD, "odd": ("the", "a", "and", "so", "it", "quite")}
COLUMNS = {"single_label": "label", "multi_label": "labels", "regression": "stars"}
CALIBRATION = {"single_label": 0.2, "multi_label": 0, "regression": 0}
TEXTS = ["a good film", "the bad plot was awful", "so it was quite good and bad", "book"]
PAIRS = [("a good film", "it was bad"), ("the", "awful plot and so it was quite good and bad"),
         ("so it was quite good and bad and so it was", "a plot"), ("book", "good")]  # fmt: skip
# DistilBERT has no types of tokens. BERT has, and other names and dropouts.
INPUTS = {"text": ("distilbert", TEXTS), "pair": ("bert", PAIRS)}


def make_rows(num_rows):
    """Texts with words of some kinds: their first kind, all kinds, and stars from 10 to 30.

    The first half of the words is `first`, the others are `second`.
    """
    rows = []
    for i in range(num_rows):
        kinds = [kind for bit, kind in enumerate(WORDS) if (i >> bit) & 1]
        words = [
            FILLERS[i % 6],
            *(WORDS[kind][i % 6] for kind in kinds),
            "abcdefghijklmnop"[i % 16],
        ]
        stars = 20 + 10 * ("good" in kinds) - 10 * ("bad" in kinds)
        text = " ".join(words) + "!" * (i // 16)
        half = 1 + i % len(words[1:])
        rows.append(
            {
                "text": text,
                "first": " ".join(words[:half]),
                "second": " ".join(words[half:]) + "!" * (i // 16),
                "label": "good" if "good" in kinds else "rest",
                "labels": kinds,
                "stars": stars,
            }
        )
    return rows


@pytest.fixture(scope="module")
def rows_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("tasks") / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in make_rows(96)), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def bases(tmp_path_factory, tiny_base):
    bert = save_family_base(tmp_path_factory.mktemp("base") / "bert", "bert")
    return {"distilbert": tiny_base, "bert": bert}


@pytest.fixture
def run(tmp_path, bases, rows_file):
    def train_task(task, kind="lora", *overrides, of="text"):
        recipe = tmp_path / "r.yaml"
        columns = "text_column: text"
        if of == "pair":
            columns = "text_column: first, text_pair_column: second"
        recipe.write_text(
            f"data: {{source: {rows_file}, task: {task}, label_column: {COLUMNS[task]}, test_fraction: 0.2,\n"
            f"       {columns}}}\n"
            f"model: {{name: {bases[INPUTS[of][0]]}, max_length: 16, dtype: float32, dropout: 0.0}}\n"
            f"method: {{kind: {kind}}}\n"
            "train: {num_train_epochs: 6, batch_size: 24, learning_rate: 5e-3}\n"
            f"output: {{dir: {tmp_path}/adapter}}\n",
            encoding="utf-8",
        )
        return train(Recipe.load(recipe, overrides))

    return train_task


def walk(task, kind, of, run, folder):
    """Train, save, reload, evaluate and merge; return the adapter, its folder, its texts and their scores."""
    overrides = [f"data.calibration_fraction={CALIBRATION[task]}"]
    if of == "text":
        overrides.append(
            "model.truncation=head_tail"
        )  # then a card has code that cuts as training did
    done = run(task, kind, *overrides, of=of)
    texts = INPUTS[of][1]
    losses = np.array([point.loss for point in done.history.steps]).reshape(6, -1).mean(axis=1)
    assert losses[-1] < losses[0]
    adapter = load(done.adapter)
    scores = adapter.probabilities(texts)
    again = evaluate(done.adapter, split="test")
    report = json.loads((done.adapter / "report.json").read_text(encoding="utf-8"))
    assert again.as_dict() == {"split": "test", "num_rows": again.num_rows, **report["test"]}
    merged = merge(done.adapter, folder / "merged").folder
    assert_same_answers(load(merged), adapter, texts)
    given = texts
    for place in (done.adapter, merged):
        assert ("pair" in (place / "README.md").read_text(encoding="utf-8")) == (of == "pair")
    if of == "pair":
        given = [{"text": first, "text_pair": second} for first, second in texts]
    else:
        assert_code_of_card_answers(merged, adapter, texts)
    stock = pipeline("text-classification", model=str(merged), top_k=None)
    for answer, own in zip(stock(given, truncation=True), scores, strict=True):
        row = {part["label"]: part["score"] for part in answer}
        np.testing.assert_allclose([row[name] for name in adapter.labels], own, atol=1e-5)
    return adapter, done.adapter, texts, scores


def assert_code_of_card_answers(folder, adapter, texts):
    readme = (folder / "README.md").read_text(encoding="utf-8")
    (code,) = re.findall(
        r"```python\n(import (?:(?!```).)*classify_as_trained.*?)```", readme, re.DOTALL
    )
    names = {}
    with contextlib.chdir(folder.parent):
        exec(code, names)
    for text, scores in zip(texts, adapter.probabilities(texts), strict=True):
        expected = dict(zip(adapter.labels, scores, strict=True))
        assert names["classify_as_trained"](text) == pytest.approx(expected, abs=1e-5)


def assert_same_answers(other, adapter, texts):
    assert other.task is adapter.task
    expected = adapter.probabilities(texts)
    np.testing.assert_allclose(other.probabilities(texts), expected, atol=1e-5)
    for one, same in zip(adapter.predict(texts), other.predict(texts), strict=True):
        assert (one.label, one.labels) == (same.label, same.labels)
    if CALIBRATION[adapter.task.name]:
        sets = [answer.label_set for answer in adapter.predict(texts, coverage=0.6)]
        assert [answer.label_set for answer in other.predict(texts, coverage=0.6)] == sets


SHORT = [("single_label", "full", "pair"), ("multi_label", "lora", "pair"), ("regression", "head", "text")]  # fmt: skip


@pytest.mark.parametrize(("task", "kind", "of"), SHORT)
def test_every_task_goes_from_rows_to_a_stock_pipeline(task, kind, of, run, tmp_path):
    walk(task, kind, of, run, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("of", INPUTS)
@pytest.mark.parametrize("kind", ["lora", "full", "head"])
@pytest.mark.parametrize("task", COLUMNS)
def test_every_task_goes_from_rows_to_other_programs(task, kind, of, run, tmp_path):
    adapter, folder, texts, scores = walk(task, kind, of, run, tmp_path)
    exported = export(folder, tmp_path / "onnx", format="onnx").folder
    assert_same_answers(load(exported), adapter, texts)
    if of == "text":
        assert_code_of_card_answers(exported, adapter, texts)
        readme = (exported / "README.md").read_text(encoding="utf-8")
        assert ("applies softmax to every model" in readme) == (task != "single_label")
    tokenizer = AutoTokenizer.from_pretrained(exported)
    session = InferenceSession(exported / "onnx/model.onnx")
    for text, own in zip(texts, scores, strict=True):
        parts = (text,) if of == "text" else text
        logits = session.run(None, dict(tokenizer(*parts, truncation=True, return_tensors="np")))[0]
        np.testing.assert_allclose(adapter.task.compute_scores(logits)[0], own, atol=1e-5)


def test_multi_label_thresholds_decide_and_a_row_may_have_no_label(run, tmp_path):
    done = run("multi_label")
    adapter = load(done.adapter)
    assert adapter.labels == ("bad", "good", "odd")
    thresholds = np.array(adapter.calibration["thresholds"])
    for prediction, scores in zip(
        adapter.predict(TEXTS), adapter.probabilities(TEXTS), strict=True
    ):
        assert prediction.labels == [
            adapter.labels[i] for i in np.flatnonzero(scores >= thresholds)
        ]
    rows = tmp_path / "in.csv"
    rows.write_text("text\ngood film\nbook\n", encoding="utf-8")
    summary = predict_file(
        adapter, input=rows, output=tmp_path / "out.csv", all_scores=True, progress=False
    )
    assert set(summary.labels) == {"bad", "good", "odd"}
    header = (tmp_path / "out.csv").read_text(encoding="utf-8").splitlines()[0]
    assert header == "text,labels,score_bad,score_good,score_odd"


def test_regression_answers_in_real_units(run, tmp_path):
    done = run("regression", "full", "train.num_train_epochs=8", "train.huber_delta=1.0")
    values = [prediction.value for prediction in load(done.adapter).predict(TEXTS)]
    assert all(5 < value < 35 for value in values)
    assert done.report["test"]["mae"]["value"] < 10
    rows = tmp_path / "in.csv"
    rows.write_text("text\ngood film\n", encoding="utf-8")
    predict_file(load(done.adapter), input=rows, output=tmp_path / "out.csv", progress=False)
    assert (tmp_path / "out.csv").read_text(encoding="utf-8").startswith("text,value\n")


BROKEN = {
    "a third value": (
        {"label_columns": ["x", "y"], "task": "multi_label"},
        "text,x,y\na,0,1\nb,2,0\nc,1,1\n",
        "row 2: column 'x': found '2'; allowed: 0 or 1",
    ),
    "text among numbers": (
        {"label_column": "n", "task": "regression"},
        "text,n\na,1.5\nb,good\nc,2\n",
        "row 2: column 'n': found 'good'; allowed: a finite number",
    ),
    "a number as Python writes it": (
        {"label_column": "n", "task": "regression"},
        "text,n\na,1.5\nb,1_000\nc,2\n",
        "row 2: column 'n': found '1_000'; allowed: a finite number",
    ),
    "a label outside": (
        {"label_column": "l", "task": "multi_label", "labels": ["x", "y"]},
        'text,l\na,"x,y"\nb,x\nc,"x,z"\n',
        "row 3: column 'l': label 'z' is none of x, y",
    ),
    "one class in a column": (
        {"label_columns": ["x", "y"], "task": "multi_label"},
        "text,x,y\na,0,1\nb,0,0\n",
        "rows 1 to 2, column 'x': no row has the label 'x'",
    ),
    "one number": (
        {"label_column": "n", "task": "regression"},
        "text,n\na,3\nb,3\n",
        "rows 1 to 2, column 'n': every value is 3",
    ),
    "a single label outside": (
        {"label_column": "l", "labels": ["x", "y"]},
        "text,l\na,x\nb,z\nc,y\n",
        "row 2: label 'z' is none of x, y; column 'l'",
    ),
    "a missing single label": (
        {"label_column": "l"},
        "text,l\na,x\nb,\nc,y\n",
        "row 2: label is missing; column 'l'",
    ),
    "one single label": (
        {"label_column": "l"},
        "text,l\na,x\nb,x\n",
        "rows 1 to 2, column 'l': every row has the label 'x'",
    ),
    "an empty pair": (
        {"text_pair_column": "q", "label_column": "l"},
        "text,q,l\na,b,x\nc, ,y\n",
        "row 2: text is empty; column 'q'",
    ),
    "a missing number": (
        {"label_column": "n", "task": "regression"},
        "text,n\na,3\nb,\nc,4\n",
        "row 2: column 'n': is missing",
    ),
}


@pytest.mark.parametrize(("config", "content", "message"), BROKEN.values(), ids=BROKEN)
def test_broken_labels_are_told_by_row_and_column(config, content, message, tmp_path):
    (tmp_path / "d.csv").write_text(content, encoding="utf-8")
    values = {**config, "source": str(tmp_path / "d.csv")}
    for key in ("label_columns", "labels"):
        if key in values:
            values[key] = tuple(values[key])
    with pytest.raises(DataError) as caught:
        load_data(DataConfig(**values))
    lines = [line for line in str(caught.value).splitlines() if re.search(r": rows? \d", line)]
    assert len(lines) == 1
    assert message in lines[0]


def test_a_carve_that_leaves_one_value_is_told(tmp_path):
    path = tmp_path / "d.csv"
    path.write_text("text,n\n" + "".join(f"t{i},{3 + (i == 7)}\n" for i in range(20)), "utf-8")
    config = {"source": str(path), "label_column": "n", "task": "regression"}
    told = []
    for seed in range(8):
        try:
            load_data(DataConfig(**config, validation_fraction=0.4, split_seed=seed))
        except DataError as error:
            told.append(str(error))
    assert told
    assert all("after rows were carved out of it: rows 1 to" in message for message in told)


def test_balanced_weights_need_rows_with_and_without_each_label():
    labels = np.array([[1, 0], [1, 1]])
    with pytest.raises(
        DataError, match="balanced needs rows with and without each label; not so for a;"
    ):
        make_label_weights("balanced", labels=labels, names=("a", "b"))


CONFLICTS = {
    "train.metric_for_best_model: accuracy is no metric of data.task=regression": (
        "regression", ["train.metric_for_best_model=accuracy"]),
    "train.class_weights: is for labels": ("regression", ["train.class_weights=balanced"]),
    "train.huber_delta: is for data.task=regression": ("multi_label", ["train.huber_delta=1.0"]),
    "label_columns are columns of 0 and 1": ("single_label", ["data.label_columns=[a, b]"]),
}  # fmt: skip


@pytest.mark.parametrize("message", CONFLICTS)
def test_settings_of_another_task_are_refused(message, tmp_path):
    task, overrides = CONFLICTS[message]
    path = tmp_path / "r.yaml"
    path.write_text(
        f"data: {{source: a/b, task: {task}}}\nmodel: {{name: bundled}}\n", encoding="utf-8"
    )
    with pytest.raises(RecipeError, match=message):
        Recipe.load(path, overrides)
