"""The counts of a GPU, held against the real code run on tensors of no bytes, with kernels that allocate as a GPU's."""

from dataclasses import replace

import pytest
import torch

from lora_sentiment.models.families import Shape
from lora_sentiment.models.memory import CUBLAS_BYTES, CUDA_SHARE, Plan, estimate_memory
from lora_sentiment.models.parameters import CUDA_INFERENCE_TOKENS
from lora_sentiment.recipe.method import METHODS
from lora_sentiment.recipe.model import ModelConfig
from lora_sentiment.training import micro_batch
from tests.models.cuda_stand_ins import make_model, run

ROWS = 16
LENGTHS = (128, 256, 512)
DISTILBERT = Shape(n_layers=3, vocab_size=2000)
MINILM = Shape(n_layers=3, vocab_size=2000, dim=384, hidden_dim=1536)
LORA = {"kind": "lora", "target_modules": ("q_lin", "v_lin")}
ALL = {"kind": "lora", "target_modules": "all-linear"}
FULL = {"kind": "full"}
CASES = [
    (LORA, {}),
    (ALL, {}),
    ({**ALL, "lora_dropout": 0.1}, {}),
    ({**LORA, "layers_to_transform": [1]}, {}),
    (LORA, {"dtype": "float32"}),
    (FULL, {}),
    ({"kind": "unfreeze", "last_layers": 1}, {}),
    ({"kind": "unfreeze", "last_layers": 2}, {}),
    ({"kind": "head"}, {}),
    ({"kind": "unfreeze", "patterns": ["transformer.layer.0.*"]}, {}),
    (LORA, {"quantize": "int8"}),
    (ALL, {"quantize": "int8"}),
    (LORA, {"quantize": "nf4"}),
    (ALL, {"quantize": "nf4"}),
    (LORA, {"engine": "stock"}),
    (ALL, {"engine": "stock"}),
    (FULL, {"engine": "stock"}),
]


def make(shape, method, options):
    """A model of no bytes, and the plan that is to describe it."""
    section = METHODS[method["kind"]](**method)
    quantize = options.get("quantize", "none")
    config = ModelConfig(name="meta", quantize=quantize)
    dtype = getattr(torch, options.get("dtype", "bfloat16"))
    fast = quantize == "none" and "engine" not in options
    plan = Plan(
        shape,
        section,
        config,
        num_labels=2,
        evaluation_tokens=CUDA_INFERENCE_TOKENS,
        element_bytes=dtype.itemsize,
        fast=fast,
        device="cuda",
    )
    plain = ModelConfig(name="meta")  # 8 and 4 bits come with the stand-ins
    model = make_model(shape, section, plain, dtype=dtype, fast=fast)
    return model, plan, {"fast": fast, "dtype": dtype, "quantize": quantize}


@pytest.mark.parametrize(
    "shape", [DISTILBERT, pytest.param(MINILM, marks=pytest.mark.slow)], ids=["768", "384"]
)
@pytest.mark.parametrize(("method", "options"), CASES, ids=str)
def test_activations_and_peak_are_what_the_code_holds(shape, method, options, monkeypatch):
    model, plan, how = make(shape, method, options)
    for length in LENGTHS:
        saved, peak = run(model, monkeypatch, rows=ROWS, length=length, **how)
        found = estimate_memory(plan, rows=ROWS, length=length, batch_size=ROWS)
        assert found.activations == pytest.approx(saved, rel=0.05, abs=2**20)
        assert found.activations + found.workspace == pytest.approx(peak, rel=0.06)


@pytest.mark.parametrize(("method", "options"), CASES, ids=str)
def test_an_evaluation_is_what_the_code_holds(method, options, monkeypatch):
    model, plan, how = make(DISTILBERT, method, options)
    model.eval()
    rows = CUDA_INFERENCE_TOKENS // 512
    _, peak = run(model, monkeypatch, rows=rows, length=512, backward=False, **how)
    found = estimate_memory(plan, rows=1, length=512, batch_size=1)
    held = found.weights + found.kept + found.optimizer + found.fixed
    assert found.evaluating - held == pytest.approx(peak, rel=0.08)


def test_graphs_hold_their_gradients_and_reserve_a_second_copy():
    plan = Plan(
        DISTILBERT,
        METHODS["full"](kind="full"),
        ModelConfig(name="meta"),
        2,
        1024,
        element_bytes=2,
        device="cuda",
    )
    plain, graphs = (
        estimate_memory(replace(plan, graphs=on), rows=ROWS, length=512, batch_size=ROWS)
        for on in (False, True)
    )
    first = plain.activations + plain.workspace
    assert graphs.step - plain.step == graphs.gradients + 2 * CUBLAS_BYTES
    assert (plain.pool, graphs.pool) == (0, first)
    assert graphs.resident == graphs.evaluating + 2 * first
    assert plain.resident == plain.evaluating + first


def test_the_share_of_memory_is_the_runs_own():
    assert CUDA_SHARE == micro_batch.SHARE
