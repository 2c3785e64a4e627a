"""How large a micro-batch may be on a GPU: from measured bytes, and never more than is free."""

import copy
import weakref
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import PartialState
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch.autograd import Function
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import DistilBertConfig, DistilBertForSequenceClassification

from lora_sentiment import train
from lora_sentiment.data.packing import cut_packed
from lora_sentiment.data.rows import Rows
from lora_sentiment.errors import TrainingError
from lora_sentiment.fast import encoder
from lora_sentiment.fast.encoder import use_fast_encoder
from lora_sentiment.recipe.recipe import Recipe
from lora_sentiment.recipe.train import TrainConfig
from lora_sentiment.training import micro_batch
from lora_sentiment.training.micro_batch import (
    ROUND,
    SHARE,
    TRAINED_BYTES,
    Measured,
    fit_micro_batch,
    free_bytes,
    measure_micro_batch,
)
from lora_sentiment.training.processes import make_accelerator
from tests.fast.toy_encoder import find_encoder, make_lora

MIB, GIB = 2**20, 2**30


@st.composite
def questions(draw):
    measured = Measured(
        per_token=draw(st.floats(100, 1e6)),
        fixed=draw(st.floats(0, 1e9)),
        evaluation=draw(st.integers(0, 10**9)),
        free=draw(st.integers(0, 10**11)),
    )
    least = draw(st.integers(1, 512))
    given = {"least": least, "most": least * draw(st.integers(1, 256))}
    given["num_trained"] = draw(st.integers(0, 10**8))
    given["graphs"] = draw(st.booleans())
    return measured, given


@given(questions())
def test_a_micro_batch_fits_and_is_as_large_as_it_may_be(question):
    measured, given = question
    found = fit_micro_batch(measured, **given)
    assert given["least"] <= found <= given["most"]

    def needed(tokens):
        passes = (2 if given["graphs"] else 1) * (measured.fixed + tokens * measured.per_token)
        return passes + measured.evaluation + TRAINED_BYTES * given["num_trained"]

    free = SHARE * measured.free
    if found > given["least"]:
        assert needed(found) <= free * (1 + 1e-9)
    if found < given["most"]:
        assert needed(min(found + ROUND, given["most"])) > free * (1 - 1e-9)
        assert found % ROUND == 0 or found == given["least"]


@given(questions(), st.integers(0, 10**11))
def test_more_memory_never_makes_it_smaller_and_graphs_never_larger(question, more):
    measured, given = question
    found = fit_micro_batch(measured, **given)
    larger = Measured(measured.per_token, measured.fixed, measured.evaluation, measured.free + more)
    assert fit_micro_batch(larger, **given) >= found
    assert fit_micro_batch(measured, **{**given, "graphs": True}) <= found


def test_a_little_more_or_less_memory_does_not_change_the_cut():
    cuts = set()
    for free in range(4 * GIB, 4 * GIB + 40 * MIB, MIB):
        measured = Measured(100_000, 0, 0, free)
        settings = {"num_trained": 10**6, "most": 10**6, "least": 512, "graphs": True}
        cuts.add(fit_micro_batch(measured, **settings))
    assert len(cuts) <= 2


@pytest.mark.parametrize(("batch_size", "many"), [(32, 8), (8, 8), (5, 5), (1, 2)])
def test_the_bytes_of_a_token_are_told_from_two_sizes(monkeypatch, batch_size, many):
    model = torch.nn.Linear(2, 2).train(batch_size != 5)
    training = model.training
    seen, forked = [], []

    def peak(given, accelerator, rows, length):
        assert given is model
        seen.append((rows, length, model.training, torch.is_inference_mode_enabled()))
        if model.training:
            return 5000 + 70 * rows * length
        return 300 * rows * length

    def fork_rng(devices):
        forked.extend(devices)
        return nullcontext()

    monkeypatch.setattr(micro_batch, "_peak", peak)
    monkeypatch.setattr(micro_batch, "free_bytes", lambda device: 12345)
    monkeypatch.setattr(micro_batch, "inference_tokens", lambda kind: 1000)
    monkeypatch.setattr(torch.random, "fork_rng", fork_rng)
    device = torch.device("cuda")
    accelerator = SimpleNamespace(device=device)
    found = measure_micro_batch(
        model, accelerator=accelerator, max_length=128, batch_size=batch_size
    )
    assert found == Measured(per_token=70, fixed=5000, evaluation=300 * 7 * 128, free=12345)
    trained = [(rows, 128, True, False) for rows in (1, 1, many)]
    assert seen == [*trained, (7, 128, False, True)]
    assert model.training == training
    assert forked == [device]


def test_what_libraries_take_once_is_not_counted_twice(monkeypatch):
    peaks = iter([10**9, 5000, 12000, 100])
    monkeypatch.setattr(micro_batch, "_peak", lambda *_: next(peaks))
    monkeypatch.setattr(micro_batch, "free_bytes", lambda device: 1)
    monkeypatch.setattr(torch.random, "fork_rng", lambda devices: nullcontext())
    found = measure_micro_batch(
        torch.nn.Linear(1, 1),
        accelerator=SimpleNamespace(device=torch.device("cuda")),
        max_length=10,
        batch_size=8,
    )
    assert found.per_token == 100
    assert found.fixed == 4000


@pytest.mark.parametrize("packs", [True, False])
def test_measuring_a_pass_leaves_no_gradient_and_changes_no_weight(monkeypatch, packs):
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 100)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 1700)
    monkeypatch.setattr(micro_batch, "packs_rows", lambda *_: packs)
    model = make_lora()
    if packs:
        use_fast_encoder(model, compute_dtype=torch.float32)
    before = copy.deepcopy(model.state_dict())
    accelerator = make_accelerator(PartialState(), "float32")
    assert micro_batch._peak(model, accelerator, 2, 9) == 1600
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("fraction", "expected"),
    [(1.0, 500 + 200 - 50), (0.4, 400 - 50), (0.1, 100 - 50)],
    ids=["all", "held to 400", "held to 100"],
)
def test_free_memory_is_what_this_process_may_still_take(monkeypatch, fraction, expected):
    """Of 1000 bytes 500 are free; the allocator has 200, of which 50 are in use."""
    figures = {
        "mem_get_info": (500, 1000),
        "memory_reserved": 200,
        "get_per_process_memory_fraction": fraction,
        "memory_allocated": 50,
        "current_device": 0,
    }
    for name, value in figures.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    assert free_bytes(torch.device("cuda")) == expected


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors that are made and still there; `peak` is the most at once."""

    def __init__(self):
        super().__init__()
        self.known, self.live, self.peak = set(), 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        leaves = tree_leaves((args, kwargs))
        given = {each.untyped_storage()._cdata for each in leaves if isinstance(each, torch.Tensor)}
        for each in tree_leaves(found):
            if not isinstance(each, torch.Tensor):
                continue
            storage = each.untyped_storage()
            if storage._cdata in given or storage._cdata in self.known:
                continue
            self.known.add(storage._cdata)
            self.live += storage.nbytes()
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._free, storage._cdata, storage.nbytes())
        return found

    def _free(self, key, num_bytes):
        self.known.discard(key)
        self.live -= num_bytes


class FlashAttention(Function):
    """What flash attention keeps: inputs, output, and a sum in fp32 of each query and head."""

    @staticmethod
    def forward(ctx, q, k, v):
        y = torch.empty_like(q)
        sums = q.new_empty(q.shape[:2], dtype=torch.float32)
        ctx.save_for_backward(q, k, v, y, sums)
        return y

    @staticmethod
    def backward(ctx, grad):
        return tuple(torch.empty_like(each) for each in ctx.saved_tensors[:3])


def count_peak(model, accelerator, rows, length):
    """The peak of one packed pass, counted on tensors without values, the head left out."""
    meta = torch.device("meta")
    num_tokens = rows * length
    ids = torch.zeros(num_tokens, dtype=torch.int32, device=meta)
    ends = torch.zeros(rows + 1, dtype=torch.int32, device=meta)
    mode = LiveBytes()
    with mode:
        first = find_encoder(model).forward.__self__.encode_packed(ids, ids, ends, length)
        if torch.is_grad_enabled():
            first.float().sum().backward()
            del first
            for parameter in model.parameters():
                parameter.grad = None
    return mode.peak


@pytest.fixture
def distilbert(monkeypatch):
    """distilbert-base with LoRA on q and v in bfloat16, of shapes alone."""
    monkeypatch.setattr(
        encoder, "packed_attention", lambda q, k, v, **_: FlashAttention.apply(q, k, v)
    )
    monkeypatch.setattr(micro_batch, "_peak", count_peak)
    monkeypatch.setattr(torch.random, "fork_rng", lambda devices: nullcontext())
    with torch.device("meta"):
        model = DistilBertForSequenceClassification(DistilBertConfig())
        targets = ["q_lin", "v_lin"]
        config = LoraConfig(
            r=8, target_modules=targets, modules_to_save=["pre_classifier", "classifier"]
        )
        model = get_peft_model(model, config)
    monkeypatch.setattr(encoder, "FAST_DEVICES", ("meta",))
    assert use_fast_encoder(model, compute_dtype=torch.bfloat16) is None
    return model


# A CUDA context, the libraries' workspaces, and what other programs on the card hold.
OTHERS = 600 * MIB


@pytest.mark.parametrize(
    ("card", "most_parts"), [(80 * GIB, 1), (4 * GIB, 4)], ids=["80 GB", "4 GB"]
)
@pytest.mark.parametrize("length", [512, 128])
def test_a_step_of_distilbert_is_one_micro_batch_on_80_gb_and_at_most_four_on_4(
    distilbert, monkeypatch, card, most_parts, length
):
    """Counted on the plain formulas, which keep more than fused ones; not measured on a card."""
    # The base in fp32, and its linears once more in bfloat16.
    weights = sum(p.numel() * (4 + 2) for p in distilbert.parameters())
    monkeypatch.setattr(micro_batch, "free_bytes", lambda device: card - OTHERS - weights)
    monkeypatch.setattr(micro_batch, "inference_tokens", lambda kind: 32_768)
    measured = measure_micro_batch(
        distilbert,
        accelerator=SimpleNamespace(device=torch.device("meta")),
        max_length=length,
        batch_size=32,
    )
    # Six blocks that keep q, k, v, what attention gives, the norms' inputs, and lin1's output.
    kept = 6 * (3 + 1 + 2 + 4) * 768 * 2
    assert kept < measured.per_token < 3 * kept
    num_trained = sum(p.numel() for p in distilbert.parameters() if p.requires_grad)
    max_tokens = fit_micro_batch(
        measured, num_trained=num_trained, most=32 * length, least=length, graphs=True
    )
    longest_step = np.full(32, length)
    parts = cut_packed(np.arange(32), longest_step, max_tokens=max_tokens)
    assert len(parts) <= most_parts


def settings_of(recipe, *, max_tokens, device):
    rows = Rows(["a", "b"], np.array([0, 1]), np.arange(2))
    data = SimpleNamespace(train=rows, validation=rows, labels=("no", "yes"))
    setup = SimpleNamespace(
        engine="fast",
        data=data,
        base=SimpleNamespace(
            sha256="base",
            tokenizer=None,
            model=SimpleNamespace(config=DistilBertConfig()),
        ),
        model=SimpleNamespace(parameters=lambda: iter([SimpleNamespace(device=device)])),
        dtype=torch.float32,
        max_tokens=max_tokens,
        parent=None,
    )
    return train._settings(recipe, setup, frozen_sha256="frozen")


@pytest.mark.parametrize(
    ("device", "asked", "decides"),
    [("cuda", None, False), ("cuda", 4096, True), ("cpu", None, True)],
)
def test_a_measured_micro_batch_is_no_setting_that_stops_a_resume(
    toy_recipe, monkeypatch, device, asked, decides
):
    monkeypatch.setattr(train, "hash_tokenizer", lambda tokenizer: "tokenizer")
    recipe = Recipe.load(toy_recipe)
    values = recipe.train.model_copy(update={"max_tokens_per_micro_batch": asked})
    recipe = recipe.model_copy(update={"train": values})
    found = [
        settings_of(recipe, max_tokens=tokens, device=torch.device(device))
        for tokens in (4096, 8192)
    ]
    assert (found[0] != found[1]) == decides


@pytest.mark.parametrize("words", ["CUDA out of memory. Tried", "CUDA error: out of memory"])
def test_memory_that_runs_out_while_it_is_measured_is_one_message(monkeypatch, words):
    def fail(*given):
        raise torch.OutOfMemoryError(words)

    monkeypatch.setattr(micro_batch, "_peak", fail)
    monkeypatch.setattr(torch.random, "fork_rng", lambda devices: nullcontext())
    accelerator = SimpleNamespace(device=torch.device("cuda", 0))
    with pytest.raises(TrainingError, match=r"set train\.max_tokens_per_micro_batch yourself"):
        micro_batch.measure_micro_batch(
            torch.nn.Linear(1, 1), accelerator=accelerator, max_length=512, batch_size=32
        )


def test_a_process_measures_its_share_of_a_step(monkeypatch):
    asked = {}

    def choose(model, **given):
        asked.update(given)
        return 1024

    monkeypatch.setattr(train, "choose_max_tokens", choose)
    monkeypatch.setattr(train, "reset_peak_memory", lambda device: None)
    recipe = SimpleNamespace(
        train=TrainConfig(batch_size=30, max_steps=9), model=SimpleNamespace(max_length=128)
    )
    accelerator = SimpleNamespace(num_processes=4, device=torch.device("cpu"))
    assert train._measure_max_tokens(recipe, torch.nn.Linear(1, 1), accelerator, 9) == 1024
    assert (asked["batch_size"], asked["max_length"]) == (8, 128)
