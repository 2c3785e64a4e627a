import math

import numpy as np
import pytest
import torch
from accelerate import Accelerator, PartialState

from lora_sentiment.data.batches import TextEncoder
from lora_sentiment.data.rows import Rows
from lora_sentiment.errors import TrainingError
from lora_sentiment.fast.encoder import use_fast_encoder
from lora_sentiment.models.load import load_base
from lora_sentiment.models.wrap import make_trainable, trainable_tensors
from lora_sentiment.recipe.method import LoraMethod
from lora_sentiment.recipe.model import ModelConfig
from lora_sentiment.recipe.train import TrainConfig
from lora_sentiment.tasks import SINGLE_LABEL, single_label
from lora_sentiment.tasks.single_label import loss_sum
from lora_sentiment.training import loop
from lora_sentiment.training.loop import fit
from lora_sentiment.training.optimizer import make_optimizer
from lora_sentiment.training.processes import make_accelerator
from tests.conftest import toy_rows

CONFIG = ModelConfig(name="any")


@pytest.fixture
def run(tiny_base):
    def run(max_tokens=100, dropout=0.0, prepare=None, num_rows=90, **values):
        torch.manual_seed(0)
        config = ModelConfig(
            name=str(tiny_base), max_length=16, dropout=dropout, attention_dropout=dropout
        )
        base = load_base(config, labels=("negative", "positive"))
        base.model.dropout.p = dropout
        model = make_trainable(base, LoraMethod(r=4, lora_alpha=8), CONFIG, dtype=torch.float32)
        if prepare:
            prepare(model)
        model.to(make_accelerator(PartialState(), "float32").device)
        rows = toy_rows(num_rows)
        labels = np.array([int(label == "positive") for _, label in rows])
        encoded = TextEncoder.of(base.tokenizer, max_length=16, truncation="head").encode(
            Rows([text for text, _ in rows], labels, np.arange(1, len(rows) + 1))
        )
        history = fit(
            model,
            train=encoded,
            validation=encoded,
            task=SINGLE_LABEL,
            numbers=np.arange(1, len(rows) + 1),
            config=TrainConfig(
                **{"batch_size": 16, "learning_rate": 1e-2, "num_train_epochs": 1.0, **values}
            ),
            method=LoraMethod(r=4, lora_alpha=8),
            accelerator=make_accelerator(PartialState(), "float32"),
            max_tokens=max_tokens,
        )
        return model, history

    return run


def test_a_learnable_toy_is_learned(run):
    _, history = run(num_train_epochs=8.0)
    assert history.steps[-1].loss < 0.5 * history.steps[0].loss
    assert history.evaluations[-1].scores["accuracy"] > 0.9


def test_steps_epochs_and_tokens_are_counted(run):
    _, history = run(num_train_epochs=1.5)
    assert [point.step for point in history.steps] == list(range(1, 10))
    assert [point.step for point in history.evaluations] == [6, 9]
    assert history.tokens > 90 * 5
    _, history = run(max_steps=2)
    assert len(history.steps) == 2


def test_the_loss_does_not_depend_on_the_cut(run):
    """One micro-batch of 16 rows or sixteen of one: fp32, dropout off."""
    losses = [[point.loss for point in run(max_tokens=cut)[1].steps] for cut in (10_000, 45, 1)]
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)
    assert losses[2] == pytest.approx(losses[0], abs=1e-5)


def test_the_best_tensors_are_kept(run, monkeypatch):
    scores = iter([0.5, 0.9, 0.7, 0.6])
    kept = []

    def score(logits, labels, name):
        return next(scores) if name == "mcc" else 0.5

    monkeypatch.setattr(SINGLE_LABEL, "quick_score", score)
    clone = loop._Loop._evaluate

    def spy(self, step):
        clone(self, step)
        kept.append({name: p.detach().clone() for name, p in self.parameters.items()})

    monkeypatch.setattr(loop._Loop, "_evaluate", spy)
    model, history = run(metric_for_best_model="mcc", eval_steps=2, max_steps=8)
    assert history.best_step == 4
    assert [point.best for point in history.evaluations] == [True, True, False, False]
    assert all(torch.equal(p, kept[1][name]) for name, p in trainable_tensors(model).items())


def test_a_loss_is_better_when_lower(run, monkeypatch):
    scores = iter([0.9, 0.5, 0.7])
    monkeypatch.setattr(
        SINGLE_LABEL,
        "quick_score",
        lambda logits, labels, name: next(scores) if name == "ece" else 0.5,
    )
    _, history = run(metric_for_best_model="ece", eval_steps=1, max_steps=3)
    assert history.best_step == 2


def test_patience_stops_early(run, monkeypatch):
    monkeypatch.setattr(SINGLE_LABEL, "quick_score", lambda logits, labels, name: 0.5)
    _, history = run(early_stopping_patience=2, eval_steps=1, max_steps=6)
    assert history.stopped_early
    assert len(history.steps) == 3


def test_a_loss_that_is_not_finite_stops_with_step_and_rows(run):
    def poison(model):
        with torch.no_grad():
            model.base_model.model.distilbert.embeddings.word_embeddings.weight.fill_(math.nan)

    with pytest.raises(
        TrainingError, match=r"step 1: the loss is nan on the step of train rows \d+, \d+"
    ):
        run(prepare=poison)


def test_gradients_that_are_not_finite_stop_too(run, monkeypatch):
    monkeypatch.setattr(Accelerator, "clip_grad_norm_", lambda *_: torch.tensor(math.inf))
    with pytest.raises(TrainingError, match="step 1: the gradient"):
        run()


def use_fast(model):
    """To see that a mask is all ones, transformers' own forward waits."""
    assert use_fast_encoder(model, compute_dtype=torch.float32) is None


def read_every(monkeypatch, num_steps):
    """Let the loop read what its steps gave as seldom as on a GPU; return how many steps each reading found."""
    monkeypatch.setattr(loop._Loop, "_resume", lambda self: setattr(self, "read_steps", num_steps))
    found, read = [], loop._Loop._read

    def spy(self):
        if self.unread:
            found.append(len(self.unread))
        read(self)

    monkeypatch.setattr(loop._Loop, "_read", spy)
    return found


def logged(monkeypatch):
    """What is told to trackers from now on, without the time."""
    rows = []

    def log(self, values, step):
        rows.append(
            {"step": step, **{name: value for name, value in values.items() if name != "seconds"}}
        )

    monkeypatch.setattr(Accelerator, "log", log)
    return rows


def test_steps_that_are_read_late_are_those_that_were_read_at_once(run, monkeypatch):
    rows = logged(monkeypatch)
    model, history = run(max_steps=11, eval_steps=5)
    at_once, rows[:] = list(rows), []
    found = read_every(monkeypatch, 4)
    late_model, late = run(max_steps=11, eval_steps=5)
    assert rows == at_once
    assert found == [4, 1, 4, 1, 1]  # before an evaluation nothing stays unread
    assert (late.steps, late.evaluations, late.tokens) == (
        history.steps,
        history.evaluations,
        history.tokens,
    )
    plain, kept = (trainable_tensors(each) for each in (model, late_model))
    assert all(torch.equal(plain[name], kept[name]) for name in plain)


def test_a_step_that_went_wrong_is_named_though_it_is_read_late(run, monkeypatch):
    plain, norms = Accelerator.clip_grad_norm_, iter([1.0, 1.0, math.nan, 1.0, 1.0, 1.0])
    monkeypatch.setattr(
        Accelerator,
        "clip_grad_norm_",
        lambda self, parameters, limit: plain(self, parameters, limit) * next(norms),
    )
    assert read_every(monkeypatch, 4) == []
    with pytest.raises(TrainingError, match="step 3: the gradient's norm is nan"):
        run(max_steps=6)


@pytest.mark.gpu
@pytest.mark.usefixtures("gpu")
def test_between_readings_the_host_does_not_wait_for_a_gpu(run, monkeypatch):
    step = loop._Loop._step

    def watched(self, *given):
        torch.cuda.set_sync_debug_mode("error")
        try:
            step(self, *given)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    found = read_every(monkeypatch, 10**6)
    monkeypatch.setattr(loop._Loop, "_step", watched)
    monkeypatch.setattr(
        loop._Loop, "_is_due", lambda self, every, step=None: step is None and self.done == 8
    )
    run(max_steps=8, prepare=use_fast, class_weights="balanced")
    assert found == []


@pytest.mark.parametrize(
    ("kind", "ratio", "expected"),
    [
        ("linear", 0.0, [1, 0.75, 0.5, 0.25]),
        ("linear", 0.5, [0, 0.5, 1, 0.5]),
        ("constant", 0.0, [1, 1, 1, 1]),
        ("constant_with_warmup", 0.5, [0, 0.5, 1, 1]),
        ("cosine", 0.0, [1, 0.853553, 0.5, 0.146447]),
    ],
)
def test_schedules(run, kind, ratio, expected):
    _, history = run(max_steps=4, lr_scheduler_type=kind, warmup_ratio=ratio, learning_rate=1.0)
    assert [point.learning_rate for point in history.steps] == pytest.approx(expected, abs=1e-6)


def test_gradients_are_clipped(run):
    norms = []
    plain = Accelerator.clip_grad_norm_

    def spy(self, parameters, limit):
        norm = plain(self, parameters, limit)
        norms.append(
            float(torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]))
        )
        return norm

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Accelerator, "clip_grad_norm_", spy)
        run(max_grad_norm=0.01, max_steps=2)
        assert max(norms) <= 0.0101
        norms.clear()
        run(max_grad_norm=0.0, max_steps=2)
        assert max(norms) > 0.0101


def test_biases_and_norms_are_not_decayed():
    parameters = {"w": torch.nn.Parameter(torch.ones(2, 2)), "b": torch.nn.Parameter(torch.ones(2))}
    groups = make_optimizer(parameters, TrainConfig(weight_decay=0.3), ratios={}).param_groups
    assert [(len(g["params"]), g["params"][0].ndim, g["weight_decay"]) for g in groups] == [
        (1, 2, 0.3),
        (1, 1, 0.0),
    ]
    assert groups[0]["fused"]


def test_a_steps_loss_is_torchs_weighted_mean(run, monkeypatch):
    seen = []

    def spy(logits, labels, **values):
        seen.append((logits.detach(), labels))
        return loss_sum(logits, labels, **values)

    monkeypatch.setattr(single_label, "loss_sum", spy)
    _, history = run(
        class_weights=(0.2, 3.0), label_smoothing_factor=0.1, batch_size=90, max_steps=1
    )
    assert len(seen) > 1
    logits, labels = (torch.cat(parts) for parts in zip(*seen, strict=True))
    expected = torch.nn.functional.cross_entropy(
        logits, labels, weight=torch.tensor([0.2, 3.0]), label_smoothing=0.1
    )
    assert history.steps[0].loss == pytest.approx(float(expected), rel=1e-5)
