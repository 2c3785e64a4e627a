import pytest
import torch

from lora_sentiment.commands.doctor import examine
from lora_sentiment.commands.estimate import _native_bytes
from lora_sentiment.errors import ModelError
from lora_sentiment.models import dtype as dtype_module
from lora_sentiment.models.dtype import resolve_dtype

CPU = torch.device("cpu")


@pytest.fixture
def cpu(monkeypatch, tmp_path):
    """Return a function that gives this machine a CPU: its instruction sets, and its maker."""

    def pretend(capabilities, maker, *, proc=True):
        flags = dict.fromkeys(capabilities.split(), True)
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: flags)
        monkeypatch.setattr(dtype_module, "CPUINFO", tmp_path / "cpuinfo")
        monkeypatch.setattr(dtype_module.platform, "processor", lambda: maker)
        if proc:
            (tmp_path / "cpuinfo").write_text(f"processor : 0\nvendor_id : {maker}\nflags : fpu\n")

    return pretend


@pytest.mark.parametrize(
    ("capabilities", "maker", "expected"),
    [
        ("avx2", "GenuineIntel", torch.float32),
        ("avx512_bf16", "GenuineIntel", torch.float32),
        ("avx512_bf16 amx_bf16", "GenuineIntel", torch.bfloat16),
        ("avx2", "AuthenticAMD", torch.float32),
        ("avx512_bf16", "AuthenticAMD", torch.bfloat16),
    ],
)
@pytest.mark.parametrize("proc", [True, False], ids=["Linux", "elsewhere"])
def test_auto_is_bf16_only_if_the_cpu_multiplies_it_faster(
    cpu, capabilities, maker, expected, proc
):
    cpu(capabilities, maker, proc=proc)
    assert resolve_dtype("auto", CPU) == expected
    assert resolve_dtype("bfloat16", CPU) == torch.bfloat16
    assert _native_bytes() == expected.itemsize
    assert examine(hub=False).devices[-1]["auto"] == str(expected).removeprefix("torch.")


@pytest.mark.parametrize(
    ("capability", "expected"), [((8, 0), torch.bfloat16), ((7, 5), torch.float16)]
)
def test_auto_is_fp16_on_older_cards(monkeypatch, capability, expected):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert resolve_dtype("auto", torch.device("cuda")) == expected


@pytest.mark.parametrize("kind", ["mps", "xpu"])
def test_other_devices_compute_in_float32_alone(cpu, kind):
    cpu("amx_bf16", "GenuineIntel")
    device = torch.device(kind)
    assert resolve_dtype("auto", device) == torch.float32
    assert resolve_dtype("float32", device) == torch.float32
    with pytest.raises(ModelError, match=f"found 'float16'; allowed on {kind}: float32, auto"):
        resolve_dtype("float16", device)


def test_an_unknown_dtype_is_refused():
    with pytest.raises(ModelError, match=r"found 'float23'; allowed: auto, .*mean 'float32'\?"):
        resolve_dtype("float23", CPU)
