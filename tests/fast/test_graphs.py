"""What is run eagerly, captured and replayed; and what the stand-in for CUDA graphs does."""

import pytest
import torch

from lora_sentiment.fast.graphs import GraphRunner
from tests.recorded_graphs import RecordedCapture


def test_a_key_runs_eagerly_then_is_captured_once_then_replayed():
    events = []

    def capture(body):
        events.append("capture")
        return lambda: events.append("replay")

    runner = GraphRunner(capture)
    for _ in range(4):
        runner.run("a", lambda: events.append("run"))
    assert events == ["run", "capture", "replay", "replay", "replay"]
    assert runner.num_graphs == 1


def test_keys_are_kept_apart_and_the_captured_body_stays():
    events = []

    def capture(body):
        return body

    runner = GraphRunner(capture)
    for number in range(3):
        for key in ("a", "b"):
            runner.run(key, lambda key=key, number=number: events.append((key, number)))
    assert [number for key, number in events if key == "a"] == [0, 1, 1]
    assert [number for key, number in events if key == "b"] == [0, 1, 1]
    assert runner.num_graphs == 2


def test_after_clear_a_key_begins_anew():
    events = []

    def capture(body):
        events.append("capture")
        return lambda: events.append("replay")

    runner = GraphRunner(capture)
    for _ in range(2):
        for _ in range(3):
            runner.run("a", lambda: events.append("run"))
        runner.clear()
        assert runner.num_graphs == 0
    assert events == ["run", "capture", "replay", "replay"] * 2


def test_a_failed_capture_is_no_graph():
    def capture(body):
        raise torch.OutOfMemoryError("the device is full")

    runner = GraphRunner(capture)
    runner.run("a", lambda: None)
    with pytest.raises(torch.OutOfMemoryError):
        runner.run("a", lambda: None)
    assert runner.num_graphs == 0


def test_the_stand_in_computes_nothing_at_capture_and_then_what_the_function_does():
    weight = torch.ones(3, requires_grad=True)
    weight.grad = torch.zeros(3)
    x, loss = torch.arange(3.0), torch.zeros(())

    def body():
        found = (weight * x).sum()
        found.backward()
        loss.copy_(found.detach())

    replay = RecordedCapture()(body)
    assert weight.grad.tolist() == [0, 0, 0]
    assert loss == 0
    replay()
    assert (weight.grad.tolist(), float(loss)) == ([0, 1, 2], 3)
    x.mul_(2)
    replay()
    assert (weight.grad.tolist(), float(loss)) == ([0, 3, 6], 6)


@pytest.mark.gpu
def test_a_gpu_captures_without_running_and_replays(gpu):
    x, y = torch.ones(4, device=gpu), torch.zeros(4, device=gpu)
    own = torch.cuda.Stream()
    own.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(own):
        runner = GraphRunner()
        for _ in range(3):
            runner.run("a", lambda: y.add_(x * 2))
            x.add_(1)
        other = torch.zeros(4, device=gpu)
        for _ in range(3):
            runner.run("b", lambda: other.add_(x))
    torch.cuda.current_stream().wait_stream(own)
    assert y.tolist() == [2 + 4 + 6] * 4
    assert other.tolist() == [12] * 4
    assert runner.num_graphs == 2
    runner.clear()
