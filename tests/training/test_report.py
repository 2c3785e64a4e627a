import pytest
import torch

from lora_sentiment.training.report import peak_memory, reset_peak_memory


def test_peak_memory_counts_bytes_and_grows():
    reset_peak_memory(torch.device("cpu"))  # an earlier test's may be far above what is held now
    before = peak_memory(torch.device("cpu"))
    assert before > 50_000_000
    block = torch.ones(100_000_000)
    assert peak_memory(torch.device("cpu")) - before > 0.5 * block.numel()


@pytest.mark.parametrize("kind", ["mps", "xpu"])
def test_on_other_devices_the_memory_of_the_process_is_told(monkeypatch, kind):
    monkeypatch.setattr(torch, "cuda", None)
    reset_peak_memory(torch.device(kind))
    assert peak_memory(torch.device(kind)) > 50_000_000
