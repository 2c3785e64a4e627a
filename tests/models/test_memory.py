"""The estimate beside real forward and backward passes on a CPU."""

from dataclasses import replace

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from lora_sentiment.fast import kernels
from lora_sentiment.fast.encoder import use_fast_encoder
from lora_sentiment.models import memory
from lora_sentiment.models.load import load_base
from lora_sentiment.models.memory import Plan, estimate_memory, measure_step, runs_fast
from lora_sentiment.models.sizes import weight_tensors
from lora_sentiment.models.token_limits import inference_tokens
from lora_sentiment.models.wrap import make_trainable, trainable_tensors
from lora_sentiment.recipe.method import METHODS
from lora_sentiment.recipe.model import ModelConfig
from lora_sentiment.recipe.train import TrainConfig
from lora_sentiment.training.optimizer import make_optimizer

ROWS, LENGTH = 16, 64
LABELS = ("a", "b")


@pytest.fixture
def small_chunks(monkeypatch):
    """Several chunks of attention, each small beside a tiny model's activations."""
    monkeypatch.setattr(kernels, "CHUNK_ELEMENTS", 2**14)


def make(tiny_base, method, *, engine="auto", dtype="float32", **model):
    """A real model in training mode with its engine, and the plan that is to describe it."""
    config = ModelConfig(name=str(tiny_base), max_length=LENGTH, **model)
    section = METHODS[method["kind"]](**method)
    torch.manual_seed(0)
    base = load_base(config, labels=LABELS)
    dtype = getattr(torch, dtype)
    plan = Plan(base.config, section, config, engine=engine, dtype=dtype)
    trained = make_trainable(base, section, config, dtype=dtype, num_steps=10)
    if engine == "auto":
        use_fast_encoder(trained, compute_dtype=dtype)
    return trained.train(), plan


def storages(tensors):
    return {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors
    }


def measure(model, dtype):
    """Bytes that autograd keeps for the backward pass, and the peak of both passes, beside the model's own."""
    ids = torch.randint(0, 20, (ROWS, LENGTH))
    autocast = torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32)
    with autocast:
        model(input_ids=ids)
    own = [*weight_tensors(model), *model.buffers(), *memory._prepared_tensors(model)]
    kept = {}

    def remember(tensor):
        kept.update(storages([tensor]))
        return tensor

    with autocast, memory._LiveBytes(own) as live:
        with saved_tensors_hooks(remember, lambda tensor: tensor):
            logits = model(input_ids=ids).logits
        for node in nodes(logits.grad_fn):
            # bitsandbytes puts the input of an 8-bit linear on the node itself, where no hook sees it.
            if isinstance(getattr(node, "A", None), torch.Tensor):
                remember(node.A)
        for address in storages(own):
            kept.pop(address, None)
        logits.float().sum().backward()
    return sum(kept.values()), live.peak


def nodes(root):
    seen, left = set(), [root]
    while left:
        node = left.pop()
        if node is not None and node not in seen:
            seen.add(node)
            left += [other for other, _ in node.next_functions]
    return seen


LORA = {"kind": "lora"}
ALL = {"kind": "lora", "target_modules": "all-linear"}
CASES = [
    (LORA, {}),
    ({**ALL, "lora_dropout": 0.1}, {}),
    ({**LORA, "layers_to_transform": [1]}, {}),
    (LORA, {"dropout": 0.0, "attention_dropout": 0.0}),
    (LORA, {"dtype": "bfloat16"}),
    (LORA, {"engine": "stock", "dtype": "bfloat16"}),
    ({**LORA, "lora_dropout": 0.1}, {"engine": "stock"}),
    (LORA, {"engine": "stock", "attention_dropout": 0.0}),
    ({**LORA, "use_dora": True}, {}),
    (LORA, {"quantize": "nf4", "double_quant": True}),
    (LORA, {"quantize": "int8"}),
    ({"kind": "full"}, {}),
    ({"kind": "full"}, {"engine": "stock"}),
    ({"kind": "unfreeze", "patterns": ["transformer.layer.0.*"]}, {}),
    ({"kind": "unfreeze", "patterns": ["embeddings.*"]}, {"engine": "stock"}),
    ({"kind": "head"}, {}),
    ({"kind": "adalora"}, {}),
    ({"kind": "ia3"}, {}),
    ({"kind": "vera", "r": 4}, {}),
]


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize(("method", "options"), CASES, ids=str)
def test_a_step_without_values_holds_what_a_real_one_holds(tiny_base, method, options):
    model, plan = make(tiny_base, method, **options)
    kept, peak = measure(model, plan.dtype)
    activations, workspace = measure_step(plan, rows=ROWS, length=LENGTH)
    assert activations == pytest.approx(kept, rel=0.05, abs=2**14)
    # bitsandbytes' kernels hold buffers of their own.
    tolerance = 0.02 if plan.model.quantize == "none" else 0.1
    assert activations + workspace == pytest.approx(peak, rel=tolerance)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        (LORA, {}),
        ({"kind": "full"}, {}),
        ({"kind": "head"}, {}),
        (LORA, {"quantize": "int8"}),
        (LORA, {"quantize": "nf4", "double_quant": True}),
    ],
    ids=str,
)
def test_weights_gradients_and_moments_are_what_is_held(tiny_base, method, options):
    model, plan = make(tiny_base, method, **options)
    expected = estimate_memory(plan, rows=1, length=8, batch_size=1)
    parameters = trainable_tensors(model)
    optimizer = make_optimizer(parameters, TrainConfig(), ratios={})
    model(
        input_ids=torch.ones(1, 8, dtype=torch.int64), labels=torch.zeros(1, dtype=torch.int64)
    ).loss.backward()
    optimizer.step()
    weights = storages([*weight_tensors(model), *memory._prepared_tensors(model)])
    assert expected.weights == pytest.approx(sum(weights.values()), rel=0.01)
    assert expected.gradients == sum(p.grad.nbytes for p in parameters.values())
    moments = [
        t for state in optimizer.state.values() for t in state.values() if t.ndim or t.numel() > 1
    ]
    assert expected.optimizer == pytest.approx(sum(t.nbytes for t in moments), rel=0.01)


def test_the_engine_is_the_one_that_runs(tiny_base):
    engines = {}
    for name, method, options in (
        ("lora", LORA, {}),
        ("asked for", LORA, {"engine": "stock"}),
        ("dora", {**LORA, "use_dora": True}, {}),
        ("nf4", LORA, {"quantize": "nf4"}),
    ):
        _, plan = make(tiny_base, method, **options)
        engines[name] = runs_fast(plan)
    assert engines == {"lora": True, "asked for": False, "dora": False, "nf4": False}


@pytest.mark.usefixtures("small_chunks")
def test_an_evaluation_holds_what_its_device_takes_at_once(tiny_base, monkeypatch):
    held = []
    for share in (1, 2, 3):
        monkeypatch.setattr(memory, "inference_tokens", lambda kind, n=share: 1024 * n)
        _, plan = make(tiny_base, {"kind": "full"})
        held.append(estimate_memory(plan, rows=1, length=LENGTH, batch_size=1).evaluating)
    assert inference_tokens("cpu") == 1024
    assert held[0] < held[1] < held[2]


def test_gradients_and_activations_are_held_together_only_from_the_second_micro_batch(tiny_base):
    _, plan = make(tiny_base, {"kind": "full"})
    one, two = (
        estimate_memory(plan, rows=ROWS, length=LENGTH, batch_size=size)
        for size in (ROWS, 2 * ROWS)
    )
    assert two.step - one.step == one.gradients
    assert one.step == one.weights + one.kept + one.optimizer + one.activations + one.workspace


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("engine", ["stock", "auto"])
def test_checkpointing_keeps_one_block_and_the_inputs(tiny_base, engine):
    _, plan = make(tiny_base, {"kind": "full"}, engine=engine)
    held = [
        estimate_memory(replace(plan, checkpointing=on), rows=ROWS, length=LENGTH, batch_size=ROWS)
        for on in (False, True)
    ]
    assert held[1].step <= held[0].step
    assert held[1].activations < held[0].activations / 2


def test_a_quantised_base_is_loaded_beside_the_plain_one(tiny_base):
    _, plan = make(tiny_base, LORA, quantize="nf4")
    held = estimate_memory(plan, rows=1, length=8, batch_size=1)
    plain = replace(plan, model=plan.model.model_copy(update={"quantize": "none"}), engine="stock")
    assert (
        held.loading
        > held.weights
        + estimate_memory(
            replace(plain, method=METHODS["full"](kind="full")), rows=1, length=8, batch_size=1
        ).weights
        - 4096
    )
