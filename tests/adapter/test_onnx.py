"""A session says in one line what is wrong with a file."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from transformers import AutoModelForSequenceClassification

from lora_sentiment.adapter import graph
from lora_sentiment.adapter.onnx import count_threads, open_session
from lora_sentiment.errors import AdapterError, ModelError
from lora_sentiment.models.families import FAMILIES
from tests.tiny_families import make_config


def write_graph(path: Path, *, names=("input_ids", "attention_mask"), output="logits") -> Path:
    """A graph whose answer is the sum of its two inputs, as floats."""
    inputs = [
        helper.make_tensor_value_info(name, TensorProto.INT64, ["batch", "length"])
        for name in names
    ]
    nodes = [
        helper.make_node("Add", list(names), ["sum"]),
        helper.make_node("Cast", ["sum"], [output], to=TensorProto.FLOAT),
    ]
    outputs = [helper.make_tensor_value_info(output, TensorProto.FLOAT, ["batch", "length"])]
    graph = helper.make_graph(nodes, "sum", inputs, outputs)
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), path
    )
    return path


def test_a_missing_mask_is_all_ones(tmp_path):
    session = open_session(write_graph(tmp_path / "a.onnx")).compute
    ids = np.array([[5, 6]])
    assert session(ids, None).tolist() == [[6.0, 7.0]]
    assert session(ids, np.array([[1, 0]])).tolist() == [[6.0, 6.0]]
    assert session(ids, None).dtype == np.float32


def test_a_file_that_is_no_classifier_is_refused(tmp_path):
    path = tmp_path / "a.onnx"
    with pytest.raises(AdapterError, match="no such file"):
        open_session(path)
    path.write_bytes(b"no graph at all")
    with pytest.raises(AdapterError, match=r"a\.onnx: ONNX Runtime cannot open it"):
        open_session(path)
    path.write_bytes(write_graph(path).read_bytes()[:-40])
    with pytest.raises(AdapterError, match="cannot open it"):
        open_session(path)
    with pytest.raises(
        AdapterError, match=r"has the inputs ids, attention_mask and the outputs logits"
    ):
        open_session(write_graph(path, names=("ids", "attention_mask")))
    with pytest.raises(
        AdapterError, match="and the outputs scores; a classifier of this package has"
    ):
        open_session(write_graph(path, output="scores"))


def test_inputs_that_do_not_fit_are_refused(tmp_path):
    session = open_session(write_graph(tmp_path / "a.onnx")).compute
    with pytest.raises(AdapterError, match="cannot compute it"):
        session(np.ones((2, 3), dtype=np.int64), np.ones((2, 4), dtype=np.int64))
    with pytest.raises(AdapterError, match="cannot compute it"):
        session(np.ones(3, dtype=np.int64), None)


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ModelError, match=r"pip install 'lora_sentiment\[onnx\]'"):
        open_session(tmp_path / "a.onnx")


@pytest.mark.parametrize(
    ("value", "expected"), [("3", 3), ("7,1", 7), ("", None), (None, None), ("no", None)]
)
def test_threads_are_those_asked_for_or_all_usable_cores(value, expected, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if value is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", value)
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    assert count_threads() == (expected or usable)


def test_opening_a_file_imports_no_torch(tmp_path):
    path = write_graph(tmp_path / "a.onnx")
    code = (
        "import sys; from pathlib import Path; from lora_sentiment.adapter.onnx import "
        "open_session; "
        f"open_session(Path({str(path)!r})); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    "model_type",
    [
        "bert",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in FAMILIES
            if name not in ("bert", "distilbert")
        ),
    ],
)
def test_the_graph_of_every_family_answers_as_the_model(model_type, tmp_path):
    """At other sizes and lengths than those that were traced. DistilBERT's is tested in test_export."""
    torch.manual_seed(0)
    config = make_config(model_type, num_labels=3)
    model = AutoModelForSequenceClassification.from_config(config).eval()
    graph.write_graph(model, tmp_path / "a.onnx")
    session = open_session(tmp_path / "a.onnx")
    for num_rows, length in ((1, 5), (3, 17), (2, 64)):
        ids = np.random.default_rng(length).integers(5, 80, (num_rows, length))
        mask = np.ones_like(ids)
        if num_rows > 1:
            ids[1, length // 2 :] = config.pad_token_id
            mask[1, length // 2 :] = 0
        with torch.inference_mode():
            answer = model(input_ids=torch.tensor(ids), attention_mask=torch.tensor(mask))
        np.testing.assert_allclose(session.compute(ids, mask), answer.logits, atol=1e-5, rtol=0)
