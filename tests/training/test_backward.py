"""Packed micro-batches, replayed as graphs, train what eager ones and padded ones train.

A CPU packs no rows and captures nothing by itself: `force` makes it do so, with a stand-in.
"""

import logging
import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from torch import nn

from lora_sentiment.data.batches import TextEncoder
from lora_sentiment.data.rows import Rows
from lora_sentiment.errors import StoppedError, TrainingError
from lora_sentiment.fast.encoder import use_fast_encoder
from lora_sentiment.fast.graphs import GraphRunner
from lora_sentiment.models.load import load_base
from lora_sentiment.models.wrap import checkpoint_activations, make_trainable, trainable_tensors
from lora_sentiment.recipe.method import (
    FullMethod,
    HeadMethod,
    Ia3Method,
    LoraMethod,
    UnfreezeMethod,
)
from lora_sentiment.recipe.model import ModelConfig
from lora_sentiment.recipe.train import TrainConfig
from lora_sentiment.tasks import SINGLE_LABEL
from lora_sentiment.training import loop
from lora_sentiment.training.backward import PackedBackward, PaddedBackward
from lora_sentiment.training.checkpoint import Store
from lora_sentiment.training.loop import fit, why_not_graphs
from lora_sentiment.training.optimizer import GraphedUpdate, make_optimizer, make_schedule
from lora_sentiment.training.processes import make_accelerator
from lora_sentiment.training.signals import is_out_of_memory
from tests.conftest import toy_rows
from tests.recorded_graphs import RecordedCapture

pytestmark = pytest.mark.usefixtures("one_thread")
LORA = LoraMethod(r=4, lora_alpha=8)
METHODS = {
    "lora": LORA,
    "lora of two rates": LoraMethod(r=4, lora_alpha=8, loraplus_lr_ratio=4.0),
    "lora with dropout": LoraMethod(r=4, lora_alpha=8, lora_dropout=0.1),
    "head": HeadMethod(kind="head"),
    "unfreeze": UnfreezeMethod(kind="unfreeze", last_layers=1),
    "full": FullMethod(kind="full"),
}
NUM_ROWS = 90
NUM_STEPS = 12  # six an epoch
CUDA = torch.device("cuda")


def make_model(base_folder, method, *, dropout=0.0, fast=True):
    torch.manual_seed(0)
    config = ModelConfig(
        name=str(base_folder), max_length=16, dropout=dropout, attention_dropout=dropout
    )
    base = load_base(config, labels=("negative", "positive"))
    base.model.dropout.p = dropout
    model = make_trainable(base, method, config, dtype=torch.float32)
    if fast:
        assert use_fast_encoder(model, compute_dtype=torch.float32) is None
    return base, model


def encode(tokenizer):
    rows = toy_rows(NUM_ROWS)
    labels = np.array([int(label == "positive") for _, label in rows])
    encoder = TextEncoder.of(tokenizer, max_length=16, truncation="head")
    return encoder.encode(Rows([text for text, _ in rows], labels, np.arange(NUM_ROWS)))


@pytest.fixture
def force(monkeypatch):
    """Pack rows on a CPU, and replay steps as graphs where a capture is given."""

    def force(capture=None):
        monkeypatch.setattr(loop._Loop, "_packs_rows", lambda self: True)
        if capture is not None:
            monkeypatch.setattr(loop, "why_not_graphs", lambda *_, **__: None)
            make_graphs = staticmethod(lambda: GraphRunner(capture))
            monkeypatch.setattr(loop._Loop, "_make_graphs", make_graphs)

    return force


@pytest.fixture
def run(tiny_base, monkeypatch):
    """Train, and return the loop when all is done."""
    loops: list[Any] = []
    plain = loop._Loop.run

    def spy(self):
        loops.append(self)
        return plain(self)

    monkeypatch.setattr(loop._Loop, "run", spy)

    def run(
        method=LORA,
        *,
        dropout=0.0,
        max_tokens=10_000,
        scaler=None,
        store=None,
        checkpointing=False,
        **values,
    ):
        base, model = make_model(tiny_base, method, dropout=dropout)
        if checkpointing:
            checkpoint_activations(model)
        encoded = encode(base.tokenizer)
        accelerator = make_accelerator(PartialState(), "float32")
        model.to(accelerator.device)
        if scaler:
            accelerator.scaler, accelerator.native_amp = scaler, True
            accelerator.state._mixed_precision = "fp16"
        settings = {"batch_size": 16, "learning_rate": 1e-2, "max_steps": NUM_STEPS}
        settings |= {"eval_steps": NUM_STEPS, **values}
        torch.manual_seed(7)
        history = fit(
            model,
            train=encoded,
            validation=encoded,
            task=SINGLE_LABEL,
            numbers=np.arange(NUM_ROWS),
            config=TrainConfig(**settings),
            method=method,
            accelerator=accelerator,
            max_tokens=max_tokens,
            store=store,
        )
        found = loops[-1]
        assert found.history is history
        return found

    return run


def weights(done):
    return {name: p.detach().clone() for name, p in trainable_tensors(done.model).items()}


def largest_difference(one, other):
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).detach().abs().max()) for name in one)


def losses(done):
    return [point.loss for point in done.history.steps]


# Where a gradient is nothing but rounding, as of a key's bias, AdamW's default epsilon makes steps
# of it.
SETTINGS = {"adam_epsilon": 1e-3, "learning_rate": 3e-3, "metric_for_best_model": "log_loss"}


@pytest.mark.parametrize(
    ("name", "max_tokens"),
    [
        ("lora of two rates", 10_000),
        ("lora of two rates", 60),  # several micro-batches
        ("head", 10_000),
        ("unfreeze", 60),
        ("full", 10_000),
    ],
)
def test_weights_are_those_of_eager_and_of_padded_steps(run, force, tiny_base, name, max_tokens):
    settings = {"method": METHODS[name], "max_tokens": max_tokens, **SETTINGS}
    padded = run(**settings)
    force()
    eager = run(**settings)
    capture = RecordedCapture()
    force(capture)
    graphed = run(**settings)
    assert isinstance(padded.backward, PaddedBackward)
    assert isinstance(eager.backward, PackedBackward)
    assert capture.recordings
    assert losses(graphed) == pytest.approx(losses(eager), abs=1e-5)
    assert losses(graphed) == pytest.approx(losses(padded), abs=1e-5)
    assert largest_difference(weights(graphed), weights(eager)) <= 1e-5
    assert largest_difference(weights(graphed), weights(padded)) <= 1e-5
    _, untrained = make_model(tiny_base, METHODS[name])
    assert largest_difference(weights(graphed), trainable_tensors(untrained)) > 0.01


@pytest.mark.parametrize("name", ["lora with dropout", "full"])
def test_with_dropout_the_same_masks_are_drawn(run, force, name):
    force()
    eager = run(METHODS[name], dropout=0.2, **SETTINGS)
    state = torch.get_rng_state()
    force(RecordedCapture())
    graphed = run(METHODS[name], dropout=0.2, **SETTINGS)
    assert torch.equal(torch.get_rng_state(), state)
    assert losses(graphed) == pytest.approx(losses(eager), abs=1e-5)
    assert largest_difference(weights(graphed), weights(eager)) <= 1e-5
    assert losses(eager) != pytest.approx(losses(run(METHODS[name], **SETTINGS)), abs=1e-2)


def test_loss_weights_and_smoothing_are_those_of_padded_steps(run, force):
    settings = {"class_weights": (0.2, 3.0), "label_smoothing_factor": 0.1, **SETTINGS}
    padded = run(**settings)
    force(RecordedCapture())
    graphed = run(**settings)
    assert losses(graphed) == pytest.approx(losses(padded), abs=1e-5)
    assert largest_difference(weights(graphed), weights(padded)) <= 1e-5


def test_moments_steps_and_rates_of_the_optimizer_are_those_of_eager_steps(run, force):
    rates = {"lr_scheduler_type": "cosine", "warmup_ratio": 0.2}
    settings = {"method": METHODS["lora of two rates"], **rates, **SETTINGS}
    force()
    eager = run(**settings)
    force(RecordedCapture())
    graphed = run(**settings)
    assert [point.learning_rate for point in graphed.history.steps] == [
        point.learning_rate for point in eager.history.steps
    ]
    assert [point.grad_norm for point in graphed.history.steps] == pytest.approx(
        [point.grad_norm for point in eager.history.steps], rel=1e-4
    )
    groups = graphed.adamw.param_groups
    assert len(groups) == 2
    for group, expected in zip(groups, eager.adamw.param_groups, strict=True):
        assert type(group["lr"]) is float
        assert group["lr"] == expected["lr"]
    pairs = zip(graphed.parameters.values(), eager.parameters.values(), strict=True)
    for parameter, expected in pairs:
        found, state = graphed.adamw.state[parameter], eager.adamw.state[expected]
        assert found["step"] == state["step"] == NUM_STEPS
        for moment in ("exp_avg", "exp_avg_sq"):
            torch.testing.assert_close(found[moment], state[moment], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("max_tokens", [10_000, 60])
def test_each_size_is_captured_once_and_its_tensors_stay(run, force, monkeypatch, max_tokens):
    sizes, places = [], []
    fill, step = PackedBackward._fill, loop._Loop._step

    def spy_fill(self, packed, total):
        inputs = fill(self, packed, total)
        sizes.append(len(packed.input_ids))
        places.append((len(packed.input_ids), inputs.buffer.data_ptr(), self._loss.data_ptr()))
        assert inputs.input_ids.tolist() == packed.input_ids.tolist()
        assert inputs.position_ids.tolist() == packed.position_ids.tolist()
        assert inputs.cu_seq_lens.tolist() == packed.cu_seq_lens.tolist()
        assert inputs.labels.tolist() == packed.labels.tolist()
        assert float(inputs.total) == total
        return inputs

    gradients = []

    def spy_step(self, *given):
        step(self, *given)
        gradients.append([p.grad.data_ptr() for p in self.parameters.values()])

    monkeypatch.setattr(PackedBackward, "_fill", spy_fill)
    monkeypatch.setattr(loop._Loop, "_step", spy_step)
    capture = RecordedCapture()
    force(capture)
    done = run(max_tokens=max_tokens, max_steps=24)
    repeated = {size for size in sizes if sizes.count(size) > 1}
    assert len(repeated) > 1
    assert len(capture.recordings) == len(repeated) + 1  # and the update
    assert set(sizes) <= set(done.backward.plan.sizes)
    assert len(set(places)) == len(set(sizes))
    assert len({loss for _, _, loss in places}) == 1
    assert all(each == gradients[0] for each in gradients)


def test_a_step_without_new_rows_would_train_on_old_ones(run, force, monkeypatch):
    """The recorded stand-in is not fooled: without the copy of rows it gives other losses."""
    force(RecordedCapture())
    expected = losses(run())
    fill = PackedBackward._fill

    def stale(self, packed, total):
        known = self._inputs.get(len(packed.input_ids))
        return fill(self, packed, total) if known is None else known

    monkeypatch.setattr(PackedBackward, "_fill", stale)
    assert losses(run()) != pytest.approx(expected, abs=1e-2)


@pytest.mark.parametrize("step", [4, 7])
def test_a_resumed_run_gives_the_same(run, force, monkeypatch, tmp_path, step):
    settings = {"dropout": 0.2, "save_steps": 100, "eval_steps": 10, **SETTINGS}
    force(RecordedCapture())
    whole = run(**settings)
    plain = loop._Loop._step

    def stopping(self, number, index):
        plain(self, number, index)
        if number == step:
            self.signals.name = "SIGTERM"

    store = Store(tmp_path, {})
    with monkeypatch.context() as patch:
        patch.setattr(loop._Loop, "_step", stopping)
        with pytest.raises(StoppedError):
            run(store=store, **settings)
    resumed = run(store=store, **settings)
    assert resumed.history.resumed == [step]
    assert losses(resumed) == pytest.approx(losses(whole), abs=1e-5)
    assert largest_difference(weights(resumed), weights(whole)) <= 1e-5
    pairs = zip(resumed.parameters.values(), whole.parameters.values(), strict=True)
    for parameter, expected in pairs:
        found, state = resumed.adamw.state[parameter], whole.adamw.state[expected]
        assert found["step"] == state["step"]
        torch.testing.assert_close(found["exp_avg"], state["exp_avg"], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("failing_step", [1, 9])
def test_where_memory_runs_out_graphs_are_dropped_and_the_step_is_done_again(
    run, force, monkeypatch, failing_step
):
    force(RecordedCapture())
    whole = run(**SETTINGS)
    add, clear, step = PackedBackward.add_gradients, GraphRunner.clear, loop._Loop._step
    failed, clears, now, starts = [], [], [0], []

    def note_step(self, number, index):
        now[0] = number
        step(self, number, index)

    def failing(self, part, *, total):
        if now[0] == failing_step:
            starts.append(torch.get_rng_state().sum().item())
        loss = add(self, part, total=total)  # gradients are there when it runs out
        if now[0] == failing_step and not failed:
            torch.rand(3)
            failed.append(part)
            raise torch.OutOfMemoryError("CUDA out of memory")
        return loss

    def note_clear(self):
        clears.append((now[0], self.num_graphs))
        clear(self)

    monkeypatch.setattr(loop._Loop, "_step", note_step)
    monkeypatch.setattr(PackedBackward, "add_gradients", failing)
    monkeypatch.setattr(GraphRunner, "clear", note_clear)
    capture = RecordedCapture()
    force(capture)
    done = run(**SETTINGS)
    assert [number for number, _ in done.history.cuts] == [failing_step]
    assert [step for step, _ in clears] == [failing_step, NUM_STEPS]  # and at the end
    assert clears[0][1] > 0 or failing_step == 1
    assert starts[1] == starts[0]
    assert len(starts) > 2  # in two micro-batches
    assert done.graphs.num_graphs == 0  # and after the run nothing is held
    assert losses(done) == pytest.approx(losses(whole), abs=1e-5)
    assert largest_difference(weights(done), weights(whole)) <= 1e-5


def test_memory_that_runs_out_halves_what_was_packed(run, force, monkeypatch):
    """The new cut is half of the tokens that did not fit, not of what padding would add to them."""
    force()
    add, failed = PackedBackward.add_gradients, []

    def failing(self, part, *, total):
        lengths = self.encoded.lengths[part]
        if not failed and lengths.min() < lengths.max():
            failed.append(int(lengths.sum()))
            raise torch.OutOfMemoryError("CUDA out of memory")
        return add(self, part, total=total)

    monkeypatch.setattr(PackedBackward, "add_gradients", failing)
    done = run(max_steps=6)
    assert [tokens for _, tokens in done.history.cuts] == [failed[0] // 2]


def test_one_packed_row_that_does_not_fit_is_an_error(run, force, monkeypatch):
    force(RecordedCapture())

    def failing(self, part, *, total):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(PackedBackward, "add_gradients", failing)
    with pytest.raises(TrainingError, match="out of memory on a micro-batch of one row"):
        run()


def test_a_scaler_clips_and_steps_outside_of_a_graph(run, force, monkeypatch):
    Accelerator(cpu=True)

    def start():
        # Accelerate keeps it for a process's life.
        monkeypatch.setitem(AcceleratorState._shared_state, "_mixed_precision", "no")
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24, growth_interval=5)
        return run(scaler=scaler, max_steps=24), scaler.state_dict()

    force()
    eager, scale = start()
    capture = RecordedCapture()
    force(capture)
    graphed, again = start()
    monkeypatch.setitem(AcceleratorState._shared_state, "_mixed_precision", "no")
    norms = [point.grad_norm for point in graphed.history.steps]
    assert 2 < sum(not math.isfinite(norm) for norm in norms) < 12
    assert graphed.graphed_update is None
    assert capture.recordings
    names = " ".join(str(call[0]) for each in capture.recordings for call in each.calls)
    assert "mm" in names
    assert "adam" not in names
    assert "vector_norm" not in names
    assert again == scale
    assert losses(graphed) == pytest.approx(losses(eager), abs=1e-5)
    assert largest_difference(weights(graphed), weights(eager)) <= 1e-5


def why(model, *, device=CUDA, num_steps=100, **values):
    return why_not_graphs(model, TrainConfig(**values), device=device, num_steps=num_steps)


def test_graphs_run_where_they_can_and_else_the_reason_is_said(tiny_base):
    _, model = make_model(tiny_base, LORA)
    assert why(model) is None
    assert why(model, num_steps=3) is None
    assert why(model, cuda_graphs="off") == "train.cuda_graphs=off"
    assert why(model, device=torch.device("cpu")) == "the device is cpu"
    assert why(model, device=torch.device("mps")) == "the device is mps"
    assert "gradient_checkpointing" in why(model, gradient_checkpointing=True)
    assert why(model, num_steps=2) == "the run has 2 steps"


@pytest.mark.parametrize(
    "method", [LoraMethod(use_dora=True), Ia3Method(kind="ia3")], ids=["DoRA", "IA3"]
)
def test_methods_of_the_stock_forward_pass_run_eagerly(tiny_base, method):
    _, model = make_model(tiny_base, method, fast=False)
    assert use_fast_encoder(model, compute_dtype=torch.float32) is not None
    assert why(model) == "the stock forward pass runs"


def test_quantised_weights_run_eagerly(tiny_base):
    _, model = make_model(tiny_base, HeadMethod(kind="head"), fast=False)
    linear = model.get_submodule("distilbert").transformer.layer[0].ffn.lin1
    codes = torch.zeros(linear.weight.shape, dtype=torch.int8)
    linear.weight = nn.Parameter(codes, requires_grad=False)
    assert "quantised" in use_fast_encoder(model, compute_dtype=torch.float32)
    assert why(model) == "the stock forward pass runs"


@pytest.fixture
def make_loop(tiny_base, monkeypatch):
    """Make the loop of a run on a GPU that is not there; it cannot run."""

    def make_loop(*, fast=True, **values):
        base, model = make_model(tiny_base, LORA, fast=fast)
        encoded = encode(base.tokenizer)
        accelerator = SimpleNamespace(
            device=CUDA,
            prepare_optimizer=lambda optimizer: optimizer,
            scaler=None,
            process_index=0,
            num_processes=1,
        )
        monkeypatch.setattr(
            loop._Loop, "_make_graphs", staticmethod(lambda: GraphRunner(lambda b: b))
        )
        return loop._Loop(
            model,
            encoded,
            encoded,
            np.arange(NUM_ROWS),
            SINGLE_LABEL,
            TrainConfig(**{"batch_size": 16, "max_steps": 8, **values}),
            LORA,
            accelerator,
            10_000,
            None,
        )

    return make_loop


@pytest.mark.parametrize(
    ("fast", "values", "told"),
    [
        (True, {}, "CUDA graphs: on"),
        (True, {"cuda_graphs": "off"}, "CUDA graphs: off, because train.cuda_graphs=off"),
        (True, {"max_steps": 2}, "CUDA graphs: off, because the run has 2 steps"),
        (False, {}, "CUDA graphs: off, because the stock forward pass runs"),
    ],
)
def test_the_log_says_whether_graphs_run_and_why_not(make_loop, caplog, fast, values, told):
    caplog.set_level(logging.INFO, logger="lora_sentiment")
    found = make_loop(fast=fast, **values)
    assert told in caplog.text
    assert (found.graphs is not None) == (told == "CUDA graphs: on")
    assert (found.graphed_update is not None) == (found.graphs is not None)
    assert found._packs_rows() == fast
    # Each reading of losses waits for the GPU.
    assert found.read_steps == loop.GPU_READ_STEPS >= 10


def test_on_a_cpu_nothing_of_it_runs_and_nothing_is_said(run, caplog):
    caplog.set_level(logging.INFO, logger="lora_sentiment")
    done = run(max_steps=4)
    assert done.graphs is None
    assert done.graphed_update is None
    assert isinstance(done.backward, PaddedBackward)
    assert done.backward.lengths is None
    assert "CUDA graphs" not in caplog.text


def test_padded_rows_of_a_gpu_take_few_lengths_and_none_beyond_the_longest(make_loop):
    found = make_loop(fast=False)._make_backward()
    assert isinstance(found, PaddedBackward)
    longest = int(found.encoded.lengths.max())
    assert longest % 8
    assert found.lengths[-1] == longest  # a base may have no more positions than that
    assert len(found.lengths) <= 20


def test_gradient_checkpointing_packs_rows_and_runs_them_eagerly(run, force):
    force()
    plain = run(max_steps=4)
    checkpointed = run(max_steps=4, checkpointing=True, gradient_checkpointing=True)
    assert largest_difference(weights(plain), weights(checkpointed)) <= 1e-5


@pytest.mark.gpu
@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("name", ["lora of two rates", "full"])
@pytest.mark.parametrize("max_tokens", [10_000, 60])
def test_a_gpu_replays_what_it_runs_eagerly(run, monkeypatch, name, max_tokens):
    counts, clear = [], GraphRunner.clear

    def note_clear(self):
        counts.append(self.num_graphs)
        clear(self)

    monkeypatch.setattr(GraphRunner, "clear", note_clear)
    settings = {"method": METHODS[name], "max_tokens": max_tokens, **SETTINGS}
    eager = run(**settings, cuda_graphs="off")
    graphed = run(**settings)
    assert eager.graphs is None
    assert isinstance(eager.backward, PackedBackward)
    assert counts[0] > 2
    assert losses(graphed) == pytest.approx(losses(eager), abs=1e-4)
    assert largest_difference(weights(graphed), weights(eager)) <= 1e-4


@pytest.mark.gpu
@pytest.mark.usefixtures("gpu")
def test_on_a_gpu_dropout_draws_the_same_masks_in_graphs(run):
    eager = run(dropout=0.2, cuda_graphs="off", **SETTINGS)
    state = torch.cuda.get_rng_state()
    graphed = run(dropout=0.2, **SETTINGS)
    assert torch.equal(torch.cuda.get_rng_state(), state)
    assert losses(graphed) == pytest.approx(losses(eager), abs=1e-4)


def make_update(capture, *, max_norm=1.0, num_steps=6):
    """Two parameters of different rates, their update and their schedule."""
    torch.manual_seed(0)
    parameters = {"a": nn.Parameter(torch.randn(3, 2)), "b": nn.Parameter(torch.randn(2))}
    config = TrainConfig(learning_rate=0.1, weight_decay=0.1, lr_scheduler_type="cosine")
    optimizer = make_optimizer(parameters, config, ratios={"b": 5.0})
    update = None
    if capture:
        update = GraphedUpdate(
            optimizer,
            list(parameters.values()),
            max_norm=max_norm,
            graphs=GraphRunner(capture),
        )
    return parameters, optimizer, make_schedule(optimizer, config, num_steps=num_steps), update


@pytest.mark.parametrize("max_norm", [1.0, math.inf])
def test_a_graphed_update_is_clipping_and_adamw(max_norm):
    capture = RecordedCapture()
    ours, optimizer, schedule, update = make_update(capture, max_norm=max_norm)
    theirs, plain, plain_schedule, _ = make_update(None)
    generator = torch.Generator().manual_seed(3)
    norms, expected = [], []
    for _ in range(6):
        for name, parameter in ours.items():
            gradient = torch.randn(parameter.shape, generator=generator)
            parameter.grad.add_(gradient)
            theirs[name].grad = gradient.clone()
        norms.append(update())
        schedule.step()
        expected.append(float(nn.utils.clip_grad_norm_(theirs.values(), max_norm)))
        plain.step()
        plain_schedule.step()
        for group, other in zip(optimizer.param_groups, plain.param_groups, strict=True):
            assert type(group["lr"]) is float
            assert group["lr"] == other["lr"]
        for name, parameter in ours.items():
            torch.testing.assert_close(parameter, theirs[name], rtol=1e-6, atol=1e-6)
            assert not parameter.grad.any()
    assert [float(norm) for norm in norms] == pytest.approx(expected, rel=1e-5)
    assert max(expected) > 1
    assert len(capture.recordings) == 1


def test_the_groups_hold_numbers_again_when_an_update_fails(monkeypatch):
    _, optimizer, _, update = make_update(lambda body: body)
    monkeypatch.setattr(optimizer, "step", lambda: (_ for _ in ()).throw(RuntimeError("no")))
    with pytest.raises(RuntimeError, match="no"):
        update()
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.5]


def test_gradients_of_several_processes_are_added_where_a_graph_left_them():
    parameters = {name: torch.nn.Parameter(torch.zeros(3)) for name in ("one", "two")}
    gradients = []
    for parameter in parameters.values():
        parameter.grad = torch.arange(3.0)
        gradients.append(parameter.grad)
    accelerator = SimpleNamespace(num_processes=2, reduce=lambda flat, reduction: 2 * flat)
    stepping = SimpleNamespace(accelerator=accelerator, parameters=parameters)
    loss = loop._Loop._reduce(stepping, torch.tensor(5.0))
    assert loss == 10
    for parameter, gradient in zip(parameters.values(), gradients, strict=True):
        assert parameter.grad is gradient
        assert gradient.tolist() == [0, 2, 4]


def test_a_packed_step_waits_for_nothing_on_its_device(run, force, monkeypatch):
    force(capture=lambda body: body)
    waits, quiet = [], [False]
    step, read = loop._Loop._step, loop._Loop._read

    def watched(self, *given):
        quiet[0] = True
        step(self, *given)
        quiet[0] = False

    def reading(self):
        before, quiet[0] = quiet[0], False
        read(self)
        quiet[0] = before

    def watch(name, plain):
        def waiting(tensor, *given, **more):
            if quiet[0]:
                waits.append(name)
            return plain(tensor, *given, **more)

        monkeypatch.setattr(torch.Tensor, name, waiting)

    monkeypatch.setattr(loop._Loop, "_step", watched)
    monkeypatch.setattr(loop._Loop, "_read", reading)
    # AdamW on a CPU reads a rate that is a tensor; on a GPU its kernel does.
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self, closure=None: None)
    for name in ("tolist", "item", "cpu", "numpy", "__float__", "__int__", "__bool__"):
        watch(name, getattr(torch.Tensor, name))
    run(class_weights="balanced")
    assert waits == []


@pytest.mark.parametrize(
    "words",
    ["CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate(handle)"],
)
def test_other_words_for_memory_that_ran_out_are_known(words):
    assert is_out_of_memory(RuntimeError(words))
