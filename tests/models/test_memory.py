from dataclasses import replace

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from lora_sentiment.fast import kernels
from lora_sentiment.fast.encoder import use_fast_encoder
from lora_sentiment.models import memory
from lora_sentiment.models.load import load_base
from lora_sentiment.models.memory import Plan, estimate_memory, runs_fast
from lora_sentiment.models.parameters import inference_tokens
from lora_sentiment.models.wrap import make_trainable, trainable_tensors
from lora_sentiment.recipe.method import METHODS
from lora_sentiment.recipe.model import ModelConfig
from lora_sentiment.recipe.train import TrainConfig
from lora_sentiment.training.optimizer import make_optimizer

ROWS, LENGTH = 16, 64
LABELS = ("a", "b")


def make(tiny_base, method, *, engine="auto", **model):
    """A model in training mode with its engine, and the plan that is to describe it."""
    config = ModelConfig(name=str(tiny_base), max_length=LENGTH, **model)
    section = METHODS[method["kind"]](**method)
    torch.manual_seed(0)
    base = load_base(config, labels=LABELS)
    trained = make_trainable(base, section, config, dtype=torch.float32, num_steps=10)
    fast = engine == "auto" and use_fast_encoder(trained, compute_dtype=torch.float32) is None
    dropouts = {
        name: 0.1 if model.get(name) is None else model[name]
        for name in ("dropout", "attention_dropout")
    }
    plan = Plan(
        base.shape, section, config, len(LABELS), inference_tokens("cpu"), fast=fast, **dropouts
    )
    return trained.train(), plan


def storages(tensors):
    return {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors
    }


def saved_for_backward(model):
    """Bytes that autograd saves beside the model's own tensors and what the engine prepared."""
    ids = torch.randint(0, 20, (ROWS, LENGTH))
    model(input_ids=ids)
    own = storages([*model.parameters(), *model.buffers(), *prepared(model)])
    saved = {}
    with saved_tensors_hooks(
        lambda tensor: saved.update(storages([tensor])) or tensor, lambda tensor: tensor
    ):
        logits = model(input_ids=ids).logits
    assert logits.requires_grad
    return sum(size for address, size in saved.items() if address not in own)


def prepared(model):
    forwards = (getattr(vars(part).get("forward"), "__self__", None) for part in model.modules())
    return [
        ready.stacked
        for forward in forwards
        if forward is not None
        for ready in forward.prepared.values()
    ]


LORA = {"kind": "lora"}
ALL = {"kind": "lora", "target_modules": "all-linear"}
CASES = [
    (LORA, {}),
    (ALL, {}),
    ({**LORA, "lora_dropout": 0.1}, {}),
    ({**ALL, "lora_dropout": 0.1}, {}),
    ({**LORA, "layers_to_transform": [1]}, {}),
    ({**LORA, "layers_to_transform": [0]}, {}),
    (LORA, {"dropout": 0.0, "attention_dropout": 0.0}),
    (LORA, {"engine": "stock"}),
    (ALL, {"engine": "stock"}),
    ({**LORA, "lora_dropout": 0.1}, {"engine": "stock"}),
    (LORA, {"engine": "stock", "attention_dropout": 0.0}),
    ({**LORA, "use_dora": True}, {}),
    (LORA, {"quantize": "nf4"}),
    ({"kind": "full"}, {}),
    ({"kind": "full"}, {"engine": "stock"}),
    ({"kind": "unfreeze", "patterns": ["*.bias"]}, {}),
    ({"kind": "unfreeze", "patterns": ["transformer.layer.0.*"]}, {}),
    ({"kind": "unfreeze", "patterns": ["embeddings.*"]}, {"engine": "stock"}),
    ({"kind": "unfreeze", "last_layers": 1}, {"engine": "stock"}),
    ({"kind": "adalora"}, {}),
    ({"kind": "ia3"}, {}),
    ({"kind": "vera", "r": 4}, {}),
]


@pytest.mark.parametrize(("method", "options"), CASES, ids=str)
def test_activations_are_what_autograd_saves(tiny_base, method, options):
    model, plan = make(tiny_base, method, **options)
    found = saved_for_backward(model)
    expected = estimate_memory(plan, rows=ROWS, length=LENGTH, batch_size=ROWS).activations
    assert expected == pytest.approx(found, rel=0.05)


def test_int8_keeps_the_input_of_every_linear_beside_what_autograd_saves(tiny_base):
    model, plan = make(tiny_base, LORA, quantize="int8")
    kept = {}
    ids = torch.randint(0, 20, (ROWS, LENGTH))

    def remember(tensor):
        kept.update(storages([tensor]))
        return tensor

    own = storages([*model.parameters(), *model.buffers()])
    with saved_tensors_hooks(remember, lambda tensor: tensor):
        logits = model(input_ids=ids).logits
        for node in nodes(logits.grad_fn):
            # bitsandbytes puts it on the node itself, where no hook sees it.
            if isinstance(getattr(node, "A", None), torch.Tensor):
                remember(node.A)
    found = sum(size for address, size in kept.items() if address not in own)
    expected = estimate_memory(plan, rows=ROWS, length=LENGTH, batch_size=ROWS).activations
    assert expected == pytest.approx(found, rel=0.05)


def nodes(root):
    seen, left = set(), [root]
    while left:
        node = left.pop()
        if node is not None and node not in seen:
            seen.add(node)
            left += [other for other, _ in node.next_functions]
    return seen


@pytest.mark.parametrize(
    "method",
    [
        *({"kind": kind} for kind in METHODS if kind != "unfreeze"),
        {"kind": "unfreeze", "last_layers": 1},
        {"kind": "lora", "use_dora": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("quantize", ["none", "nf4"])
def test_the_engine_that_is_estimated_is_the_one_that_runs(tiny_base, method, quantize):
    if quantize != "none" and method["kind"] in ("full", "unfreeze", "vera"):
        pytest.skip("refused on a quantised base")
    _, plan = make(tiny_base, method, quantize=quantize)
    assert runs_fast(plan.method, plan.model, engine="auto") == plan.fast


@pytest.mark.parametrize(
    ("method", "options"),
    [
        (LORA, {}),
        ({"kind": "full"}, {}),
        ({"kind": "head"}, {}),
        (LORA, {"quantize": "int8"}),
        (LORA, {"quantize": "nf4"}),
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
    # A stack of one weight is that weight itself.
    weights = storages([*model.parameters(), *scales(model), *prepared(model)])
    assert expected.weights == pytest.approx(sum(weights.values()), rel=0.01)
    assert expected.gradients == sum(p.grad.nbytes for p in parameters.values())
    moments = [
        t for state in optimizer.state.values() for t in state.values() if t.ndim or t.numel() > 1
    ]
    assert expected.optimizer == pytest.approx(sum(t.nbytes for t in moments), rel=0.01)


def scales(model):
    for module in model.modules():
        scale = getattr(getattr(module, "state", None), "SCB", None)
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        yield from (t for t in (scale, state and state.absmax) if t is not None)


def test_the_constants_are_the_engines_own():
    assert memory.CHUNK_ELEMENTS == kernels.CHUNK_ELEMENTS
    assert memory.FUSED_FROM == kernels.FUSED_ATTENTION_FROM


def test_an_evaluation_holds_what_its_device_takes_at_once(tiny_base):
    _, plan = make(tiny_base, {"kind": "full"})
    tokens = [inference_tokens("cpu"), 2 * inference_tokens("cpu"), 3 * inference_tokens("cpu")]
    plans = [replace(plan, evaluation_tokens=each) for each in tokens]
    one, two, three = (
        estimate_memory(each, rows=1, length=LENGTH, batch_size=1).evaluating for each in plans
    )
    assert two - one == three - two > 0


def test_a_step_holds_gradients_and_activations_together_only_from_the_second_micro_batch(
    tiny_base,
):
    _, plan = make(tiny_base, {"kind": "full"})
    one, two = (
        estimate_memory(plan, rows=ROWS, length=LENGTH, batch_size=size)
        for size in (ROWS, 2 * ROWS)
    )
    assert two.step - one.step == one.gradients
    assert one.step == one.weights + one.kept + one.optimizer + one.activations + one.workspace


@pytest.mark.parametrize("engine", ["stock", "auto"])
def test_checkpointing_keeps_one_block_and_the_inputs(tiny_base, engine):
    _, plan = make(tiny_base, {"kind": "full"}, engine=engine)
    plans = (replace(plan, checkpointing=on) for on in (False, True))
    plain, less = (
        estimate_memory(each, rows=ROWS, length=LENGTH, batch_size=ROWS) for each in plans
    )
    assert less.activations < plain.activations


def test_a_quantised_base_is_loaded_beside_the_plain_one(tiny_base):
    _, plan = make(tiny_base, LORA, quantize="nf4")
    found = estimate_memory(plan, rows=1, length=8, batch_size=1)
    assert found.loading > found.weights + 4 * plan.shape.num_encoder
