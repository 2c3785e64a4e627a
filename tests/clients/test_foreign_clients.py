"""Other people's clients answer as this package does. `make clients` installs them and runs these tests.

They stand in a folder of their own: `node_modules`, and `old`, a virtual environment with older versions.
"""

import json
import os
import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from transformers import pipeline

from lora_sentiment.adapter.export import export
from lora_sentiment.adapter.merge import merge
from lora_sentiment.adapter.onnx import PLAIN, QUANTISED
from lora_sentiment.classifier import load, tokenise
from lora_sentiment.cleaning import clean_text
from lora_sentiment.recipe.method import LoraMethod
from lora_sentiment.recipe.recipe import Recipe
from lora_sentiment.train import train
from tests.random_adapters import save_random
from tests.serve.fake_pool import FakePool, make_adapter, running

pytestmark = pytest.mark.clients
HERE = Path(__file__).parent
CLIENTS = Path(os.environ.get("CLIENTS", HERE.parents[1] / ".venv/clients")).resolve()
LABELS = ("negative", "positive")
SHORT = [
    "a good film",
    "so poor<br />the meal &amp; the <br/>place",
    "naïve café?",
    "it&#39;s REALLY lovely!",
]
# The last one has more than 16 tokens. The pipeline of transformers.js cuts it after [SEP] was added.
TEXTS = [
    *SHORT,
    "the film was good and the book was fine and the meal was great and it was a poor place, so bad",
]
CODE = re.compile(r"```(python|js)\n(.*?)```", re.DOTALL)


@pytest.fixture(scope="session")
def packages() -> Path:
    """The folder of the JavaScript clients."""
    if shutil.which("node") is None:
        pytest.skip("Node is not installed")
    folder = CLIENTS / "node_modules"
    wanted = json.loads((HERE / "package.json").read_text())["dependencies"]
    for name, version in wanted.items():
        if not (folder / name).is_dir():
            pytest.skip(f"{name} is not in {folder}: make clients")
        installed = json.loads((folder / name / "package.json").read_text())["version"]
        assert installed == version, f"{name} {installed} is in {folder}: make clients"
    return folder


@pytest.fixture
def node(packages, tmp_path):
    """A function that runs a script of Node in a folder where the clients are found."""
    (tmp_path / "node_modules").symlink_to(packages)
    shutil.copy(HERE / "answer.mjs", tmp_path)

    def run(script, *arguments, asked=None):
        done = subprocess.run(
            ["node", script, *map(str, arguments)],
            cwd=tmp_path, input=json.dumps(asked), capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    return run


@pytest.fixture(scope="module")
def folders(tiny_base, tmp_path_factory) -> Path:
    """An adapter that reads the first tokens, the same merged, and both exports of it.

    `whole` is the export of an adapter that reads head and tail.
    """
    out = tmp_path_factory.mktemp("clients")
    method = LoraMethod(r=4, lora_alpha=8)
    save_random(out / "adapter", tiny_base, method, labels=LABELS, spread=0.1)
    merge(out / "adapter", out / "merged")
    for format in ("onnx-int8", "onnx-int8-weights"):
        export(out / "merged", out / format, format=format, max_drop=100)
    save_random(out / "both", tiny_base, method, labels=LABELS, spread=0.1, truncation="head_tail")
    export(out / "both", out / "whole", format="onnx-int8-weights", max_drop=100)
    return out


def scores_of(answers) -> list[dict[str, float]]:
    return [{row["label"]: row["score"] for row in answer} for answer in answers]


def check_scores(found, expected, *, within=1e-5):
    for own, other in zip(expected, found, strict=True):
        assert other == pytest.approx(own, abs=within)
        assert max(other, key=other.get) == max(own, key=own.get)


def predict_alone(path) -> list[dict[str, float]]:
    """One text at a time: answers of `onnx-int8` depend on the batch."""
    classifier = load(path)
    return [classifier.predict([text])[0].scores for text in SHORT]


@pytest.mark.parametrize(
    ("folder", "file", "dtype"),
    [
        ("onnx-int8", PLAIN, "fp32"),
        ("onnx-int8", QUANTISED, "q8"),
        ("onnx-int8-weights", QUANTISED, "q8"),
    ],
)
def test_transformers_js_answers_raw_texts_as_we_do(folder, file, dtype, folders, node):
    found = node("answer.mjs", "transformers.js", folders / folder, dtype, asked=SHORT)
    check_scores(scores_of(found), predict_alone(folders / folder / file))


@pytest.mark.parametrize("file", [PLAIN, QUANTISED])
@pytest.mark.parametrize("folder", ["onnx-int8", "onnx-int8-weights"])
def test_onnxruntime_node_computes_the_same_logits(folder, file, folders, node):
    classifier = load(folders / folder / file)
    inputs = [
        classifier.encoder.frame(classifier.encoder.truncate(ids))
        for ids in tokenise(classifier.encoder, TEXTS, clean=True)
    ]
    asked = [ids.tolist() for ids in inputs]
    found = node("answer.mjs", "onnxruntime-node", folders / folder / file, asked=asked)
    for ids, logits in zip(inputs, found, strict=True):
        (expected,) = classifier.engine.compute(ids[None].astype(np.int64), None)
        np.testing.assert_allclose(logits, expected, atol=1e-5)


def write_javascript(folder: Path, place: Path) -> None:
    """Copy an export, and write the code of its card as usual.mjs and reader.mjs beside the copy."""
    shutil.copytree(folder, place / folder.name)
    readme = (folder / "README.md").read_text(encoding="utf-8")
    usual, reader = [code for language, code in CODE.findall(readme) if language == "js"]
    (place / "usual.mjs").write_text(
        usual + 'console.log(JSON.stringify(await classify("A lovely film.", { top_k: null })));'
    )
    (place / "reader.mjs").write_text(
        f'import {{ readFileSync }} from "node:fs";\n{reader}\nconst found = [];\n'
        'for (const text of JSON.parse(readFileSync(0, "utf8"))) found.push(await classifyAsTrained(text));\n'
        "console.log(JSON.stringify(found));\n"
    )


@pytest.mark.parametrize("name", ["onnx-int8-weights", "whole"])
def test_the_javascript_of_a_card_runs_as_printed(name, folders, node, tmp_path):
    write_javascript(folders / name, tmp_path)
    ours = load(folders / name / QUANTISED)
    (expected,) = ours.predict(["A lovely film."])
    check_scores(scores_of([node("usual.mjs")]), [expected.scores])
    found = [dict(answer) for answer in node("reader.mjs", asked=TEXTS)]
    check_scores(found, [answer.scores for answer in ours.predict(TEXTS)])


def test_the_javascript_inference_client_gets_its_labels(node):
    with running(FakePool(make_adapter("one", "abc"))) as server:
        every, first = node("answer.mjs", "inference", server.address, asked=[{}, {"top_k": 1}])
    assert {row["label"] for row in every} == set("abc")
    assert first == every[:1]


@pytest.mark.parametrize("file", [PLAIN, QUANTISED])
def test_openvino_computes_the_same_logits(file, folders):
    openvino = pytest.importorskip("openvino")
    folder = folders / "onnx-int8-weights"
    settings = {"INFERENCE_PRECISION_HINT": "f32"}
    compiled = openvino.Core().compile_model(folder / file, "CPU", settings)
    ids = np.random.default_rng(0).integers(5, 50, size=(4, 12))
    mask = (np.arange(12) < np.arange(9, 13)[:, None]).astype(np.int64)
    found = compiled({"input_ids": ids, "attention_mask": mask})["logits"]
    expected = load(folder / file).engine.compute(ids, mask)
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.slow
def test_older_versions_answer_as_we_do(folders):
    """transformers 4.57 reads a merged folder, PEFT 0.13 an adapter."""
    python = CLIENTS / "old/bin/python"
    if not python.is_file():
        pytest.skip(f"{python} is absent: make clients")
    cleaned = [clean_text(text, Counter()) for text in TEXTS]
    done = subprocess.run(
        [python, HERE / "old_versions.py", folders / "merged", folders / "adapter"],
        input=json.dumps({"raw": TEXTS, "clean": cleaned}), capture_output=True, text=True,
        cwd=folders,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["versions"] == ["4.57.6", "0.13.2"]
    expected = [
        answer.scores for answer in load(folders / "adapter", dtype="float32").predict(TEXTS)
    ]
    check_scores(scores_of(found["merged"]), expected)
    check_scores([dict(zip(LABELS, scores, strict=True)) for scores in found["adapter"]], expected)


@pytest.mark.slow
@pytest.mark.shared
def test_a_thousand_raw_reviews_get_our_labels_everywhere(shared, node, tmp_path):
    """With a model that was trained on the first tokens of a text."""
    reviews = shared / "data/imdb"
    recipe = tmp_path / "head.yaml"
    recipe.write_text(
        f"data: {{source: {{train: {reviews}/train.parquet, test: {reviews}/test.parquet}}, max_train_rows: 600,"
        " max_test_rows: 50}\n"
        "model: {name: bundled, max_length: 128, truncation: head, dtype: float32}\n"
        f"train: {{max_steps: 20, learning_rate: 2e-3}}\noutput: {{dir: {tmp_path}/adapter}}\n"
    )
    adapter = train(Recipe.load(recipe)).adapter
    merge(adapter, tmp_path / "merged")
    export(tmp_path / "merged", tmp_path / "onnx", format="onnx")
    texts = pq.read_table(reviews / "test.parquet")["text"][::25].to_pylist()
    assert len(texts) == 1000
    expected = [answer.scores for answer in load(adapter, dtype="float32").predict(texts)]
    stock = pipeline("text-classification", str(tmp_path / "merged"), top_k=None)
    check_scores(scores_of(stock(texts, truncation=True)), expected)
    onnx = load(tmp_path / "onnx" / PLAIN).predict(texts)
    check_scores([answer.scores for answer in onnx], expected)
    write_javascript(tmp_path / "onnx", tmp_path / "js")
    found = [dict(answer) for answer in node("js/reader.mjs", asked=texts)]
    check_scores(found, expected)


def test_the_example_for_node_answers_as_we_do(folders, packages, tmp_path):
    (tmp_path / "node_modules").symlink_to(packages)
    shutil.copy(HERE.parents[1] / "examples/onnx_in_node.mjs", tmp_path)
    folder = folders / "onnx-int8"
    command = ["node", "onnx_in_node.mjs", folder, *SHORT]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    for line, scores in zip(lines, predict_alone(folder / PLAIN), strict=True):
        best = max(scores, key=scores.get)
        assert line[0] == best
        assert float(line[1]) == pytest.approx(scores[best], abs=1e-4)
