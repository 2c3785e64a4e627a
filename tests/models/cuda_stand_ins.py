"""What a torch that was built for CPUs lacks to run a forward pass on fake tensors of a GPU."""

import ctypes
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from lora_sentiment.fast import fused
from lora_sentiment.models import memory

CUDA, META = 1, 14
"""Kinds of devices, as c10/core/DeviceType.h numbers them."""


class _Attention(TorchFunctionMode):
    """Chooses an attention kernel as an H100 does. That choice alone asks torch's CUDA library."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is not functional.scaled_dot_product_attention or not args[0].is_cuda:
            return func(*args, **kwargs)
        q, k, v = args[:3]
        if torch.is_autocast_enabled("cuda"):
            q, k, v = (each.to(torch.get_autocast_dtype("cuda")) for each in (q, k, v))
        if q.dtype == torch.float32:
            attention = torch.ops.aten._scaled_dot_product_efficient_attention
            return attention(q, k, v, None, torch.is_grad_enabled(), kwargs["dropout_p"])[0]
        attention = torch.ops.aten._scaled_dot_product_flash_attention
        return attention(q, k, v, kwargs["dropout_p"])[0]


@contextmanager
def cuda_stand_ins(monkeypatch):
    """Let fake tensors be on an H100, as far as a forward pass needs it."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *device: (9, 0))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *options: True)
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(fused, "why_not_fused", lambda: None)
    monkeypatch.setattr(memory, "why_not_fused", lambda: None)
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib/libc10.so"))
    name = "_ZN3c104impl26device_guard_impl_registryE"
    guards = (ctypes.c_void_p * 20).in_dll(library, name)
    own = guards[CUDA]
    # The guard switches between devices. That of the meta device does nothing.
    guards[CUDA] = guards[META]
    try:
        with _Attention():
            yield
    finally:
        guards[CUDA] = own
