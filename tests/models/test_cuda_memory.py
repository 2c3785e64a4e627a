"""The estimate for a GPU, held against recorded figures.

cuda_memory.json holds outputs of the formulas that this estimate replaced. A test held those
formulas against the real code, run with stand-ins for a GPU's kernels.
"""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import DistilBertConfig

from lora_sentiment.models.memory import CUBLAS_BYTES, CUDA_SHARE, Plan, estimate_memory
from lora_sentiment.recipe.method import METHODS
from lora_sentiment.recipe.model import ModelConfig
from lora_sentiment.training import micro_batch
from tests.models.cuda_stand_ins import cuda_stand_ins

CASES = json.loads(Path(__file__).with_name("cuda_memory.json").read_text(encoding="utf-8"))
ROWS, LENGTH = 16, 512


@pytest.fixture(autouse=True)
def gpu(monkeypatch):
    with cuda_stand_ins(monkeypatch):
        yield


def make_plan(method, *, dtype="bfloat16", quantize="none", engine="auto"):
    return Plan(
        DistilBertConfig(n_layers=3, vocab_size=2000),
        METHODS[method["kind"]].model_validate(method, strict=False),
        ModelConfig(name="none", quantize=quantize),
        engine=engine,
        dtype=getattr(torch, dtype),
        device="cuda",
    )


@pytest.mark.parametrize(("method", "options", "activations", "step", "evaluation"), CASES, ids=str)
def test_a_gpu_holds_what_the_real_code_held(method, options, activations, step, evaluation):
    memory = estimate_memory(
        make_plan(method, **options), rows=ROWS, length=LENGTH, batch_size=ROWS
    )
    between = memory.weights + memory.kept + memory.optimizer + memory.fixed
    assert memory.activations / 2**20 == pytest.approx(activations, rel=0.05, abs=2)
    assert (memory.activations + memory.workspace) / 2**20 == pytest.approx(step, rel=0.13)
    assert (memory.evaluating - between) / 2**20 == pytest.approx(evaluation, rel=0.13)


def test_graphs_hold_their_gradients_and_reserve_a_second_copy():
    plan = make_plan({"kind": "full"})
    plain, graphs = (
        estimate_memory(replace(plan, cuda_graphs=on), rows=ROWS, length=LENGTH, batch_size=ROWS)
        for on in (False, True)
    )
    first = plain.activations + plain.workspace
    assert graphs.step - plain.step == graphs.gradients + 2 * CUBLAS_BYTES
    assert (plain.pool, graphs.pool) == (0, first)
    assert graphs.resident == graphs.evaluating + 2 * first
    assert plain.resident == plain.evaluating + first


def test_checkpointing_holds_one_block_and_runs_without_graphs():
    plan = make_plan({"kind": "full"})
    plain, less = (
        estimate_memory(
            replace(plan, checkpointing=on, cuda_graphs=on),
            rows=ROWS,
            length=LENGTH,
            batch_size=ROWS,
        )
        for on in (False, True)
    )
    assert less.pool == 0
    assert plain.activations / 3 < less.activations < plain.activations


def test_the_share_of_memory_is_the_runs_own():
    assert CUDA_SHARE == micro_batch.SHARE
