"""Generators on devices that this machine does not have."""

import pytest
import torch

from lora_sentiment.training.signals import is_out_of_memory
from lora_sentiment.training.state import get_rng_state, set_rng_state


@pytest.mark.parametrize("kind", ["mps", "xpu"])
def test_the_generator_of_another_device_is_taken_and_put_back(monkeypatch, kind):
    device = torch.device(kind)
    module = torch.get_device_module(device)
    states = [torch.arange(4, dtype=torch.uint8)]
    monkeypatch.setattr(module, "get_rng_state", lambda: states[-1])
    monkeypatch.setattr(module, "set_rng_state", states.append)
    taken = get_rng_state(device)
    assert [name.rpartition(".")[2] for name in taken] == ["cpu", kind]
    before = torch.rand(3)
    set_rng_state({**taken, f"rng.{kind}": torch.ones(4, dtype=torch.uint8)}, device)
    assert torch.equal(torch.rand(3), before)
    assert torch.equal(states[-1], torch.ones(4, dtype=torch.uint8))


def test_memory_that_runs_out_on_apples_gpu_is_known_by_its_words():
    words = "MPS backend out of memory (MPS allocated: 18.0 GB, other allocations: 384.0 KB, max allowed: 18.1 GB)."
    assert is_out_of_memory(RuntimeError(words))
