"""The compute dtype: one rule for `model.dtype` in training, estimates, `doctor` and serving."""

import platform
from pathlib import Path

import torch

from lora_sentiment.errors import ModelError, did_you_mean

SHORT_DTYPE_DEVICES = ("cpu", "cuda")
"""Kinds of devices that may compute in bfloat16 or float16."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
CPUINFO = Path("/proc/cpuinfo")


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """Return the compute dtype for `model.dtype` on a device.

    `auto` is bfloat16 where that is faster than float32. On CUDA it is float16 before compute
    capability 8.0: GTX 16xx cards report bfloat16 but emulate it. On other devices than CPUs and
    CUDA's it is float32.

    Raises:
        ModelError: If no dtype has this name, or the device does not compute in it.
    """
    if name == "auto":
        return _choose_dtype(device)
    if name not in DTYPES:
        allowed = ", ".join(["auto", *DTYPES])
        hint = did_you_mean(name, list(DTYPES))
        raise ModelError(f"dtype: found {name!r}; allowed: {allowed}{hint}")
    if device.type not in SHORT_DTYPE_DEVICES and name != "float32":
        raise ModelError(
            f"dtype: found {name!r}; allowed on {device.type}: float32, auto; set dtype auto"
        )
    return DTYPES[name]


def _choose_dtype(device: torch.device) -> torch.dtype:
    if device.type == "cuda":
        has_bfloat16 = torch.cuda.get_device_capability(device) >= (8, 0)
        return torch.bfloat16 if has_bfloat16 else torch.float16
    if device.type == "cpu" and _is_bfloat16_faster():
        return torch.bfloat16
    return torch.float32


def _is_bfloat16_faster() -> bool:
    """Return whether this CPU multiplies bfloat16 faster than float32.

    Measured on two cores each. With AMX: 2,000 GFLOP/s in bfloat16, 225 in float32. AMD Zen 4 with
    avx512_bf16: 430 and 200; training distilbert's shape on IMDB at 512 tokens: 2,207 and 1,132
    tokens/s. Intel with avx512_bf16 and without AMX: 147, and 207 to 258 GFLOP/s.
    """
    capabilities = torch.cpu.get_capabilities()
    if capabilities.get("amx_bf16"):
        return True
    return bool(capabilities.get("avx512_bf16")) and _is_amd()


def _is_amd() -> bool:
    # torch names instruction sets, but not the maker. Windows names it in `platform.processor`.
    maker = CPUINFO.read_text(encoding="utf-8") if CPUINFO.is_file() else platform.processor()
    return "AuthenticAMD" in maker
