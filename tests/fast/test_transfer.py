"""Copies to a device: what arrives, and when memory of the host is written again."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from lora_sentiment.fast import transfer
from lora_sentiment.fast.transfer import NUM_BUFFERS, HostBuffers


def make_arrays(number):
    return [np.arange(number, number + 3, dtype=np.int32), np.full(2, number, dtype=np.int32)]


def test_arrays_arrive_one_after_another():
    host = HostBuffers(torch.device("cpu"))
    assert host.send(make_arrays(4)).tolist() == [4, 5, 6, 4, 4]
    place = torch.zeros(5, dtype=torch.int32)
    assert host.send(make_arrays(1), place) is place
    assert place.tolist() == [1, 2, 3, 1, 1]


def test_memory_is_written_again_only_when_the_copy_from_it_is_done(monkeypatch):
    told = []

    class Event:
        def __init__(self):
            self.number = sum(kind == "made" for kind, _ in told)
            told.append(("made", self.number))

        def record(self):
            told.append(("recorded", self.number))

        def synchronize(self):
            told.append(("waited", self.number))

    plain = torch.empty
    monkeypatch.setattr(transfer.torch.cuda, "Event", Event)
    monkeypatch.setattr(
        transfer.torch, "empty", lambda size, dtype, pin_memory: plain(size, dtype=dtype)
    )
    host = HostBuffers(SimpleNamespace(type="cuda"))
    place = plain(5, dtype=torch.int32)
    for number in range(NUM_BUFFERS + 2):
        host.send(make_arrays(number), place)
        assert place.tolist() == [number, number + 1, number + 2, number, number]
    assert [number for kind, number in told if kind == "waited"] == [0, 1]
    assert told.index(("waited", 0)) > told.index(("recorded", NUM_BUFFERS - 1))


@pytest.mark.gpu
def test_on_a_gpu_every_copy_holds_what_was_sent(gpu):
    host = HostBuffers(gpu)
    busy = torch.randn(4096, 4096, device=gpu)
    found = []
    for number in range(3 * NUM_BUFFERS):
        busy = busy @ busy
        found.append(host.send(make_arrays(number)))
    assert [each.tolist() for each in found] == [
        [n, n + 1, n + 2, n, n] for n in range(3 * NUM_BUFFERS)
    ]
