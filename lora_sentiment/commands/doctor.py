"""Versions, processor, memory, devices and Hub of this machine, and its known problems."""

import os
import platform
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import psutil
import torch
from huggingface_hub import constants, get_token

from lora_sentiment.hub import ask_hub, without_login
from lora_sentiment.models.dtype import resolve_dtype

LOW_MEMORY = 2 * 2**30
"""Bytes: `recipes/imdb_lora.yaml` needs 1.8e9 on a CPU in float32."""
LOW_DISK = 2**30
"""Bytes: a base takes 268 MB, the reviews of IMDB 0.2 GB, and a merged model 268 MB."""
PACKAGES = (
    "lora_sentiment",
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "datasets",
    "evaluate",
    "bitsandbytes",
    "tokenizers",
    "safetensors",
    "huggingface_hub",
    "onnxruntime",
    "kernels",
)
CAPABILITIES = (
    "avx2",
    "avx512_f",
    "avx512_bf16",
    "avx512_fp16",
    "avx512_vnni",
    "amx_bf16",
    "amx_fp16",
    "amx_int8",
)
OFFLINE_VARIABLES = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE")
CGROUP, NVIDIA = Path("/sys/fs/cgroup"), Path("/dev/nvidia0")


@dataclass(frozen=True)
class Diagnosis:
    """Facts of this machine, with a note for each known problem: its sign, its effect, its remedy.

    Attributes:
        versions: Version of each package; None if it is not installed.
        cpu: Name, instruction sets, and cores: all, usable by this process, and the quota of a
            container in cores.
        memory: Bytes: total, available, and the limit of a container.
        devices: Devices of torch, first the one that training takes. `native` dtypes are multiplied
            without emulation. `auto` is the meaning of `model.dtype: auto`. `trouble` is the error
            of a GPU that does not tell its free bytes.
        disks: Free bytes of the current folder and of the Hub's cache.
        hub: Address without login, whether there is a token, and whether the Hub answers; None if
            it was not asked.
        notes: The notes.
    """

    versions: Mapping[str, str | None]
    cpu: Mapping[str, Any]
    memory: Mapping[str, int | None]
    devices: tuple[Mapping[str, Any], ...]
    disks: Mapping[str, int]
    hub: Mapping[str, Any]
    notes: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """Return facts and notes for JSON."""
        return asdict(self)

    def to_lines(self) -> list[str]:
        """Return facts in two columns, then the notes, for a terminal."""
        rows = {**self.versions, **self.cpu}
        for key, value in self.memory.items():
            rows[f"memory {key}"] = _show_bytes(value)
        for device in self.devices:
            for key, value in device.items():
                shown = _show_bytes(value) if key.endswith("_bytes") else value
                rows[f"{device['kind']} {key.removesuffix('_bytes')}"] = shown
        for folder, size in self.disks.items():
            rows[f"free for {folder}"] = _show_bytes(size)
        for key, value in self.hub.items():
            rows[f"Hub {key}"] = value
        width = max(len(name) for name in rows)
        facts = [f"{name:<{width}}  {_show(value)}" for name, value in rows.items()]
        notes = [f"* {note}" for note in self.notes]
        return [*facts, "", *(notes or ["no known problem is seen"])]


def examine(*, hub: bool = True, timeout: float = 5.0) -> Diagnosis:
    """Examine this machine.

    Args:
        hub: Whether to ask the Hub for an answer.
        timeout: Seconds for each of connecting and answering.
    """
    versions: dict[str, str | None] = {"python": platform.python_version()}
    versions |= {name: _find_version(name) for name in PACKAGES}
    cpu = _examine_cpu()
    devices = _examine_devices()
    client = _examine_hub(timeout if hub else None)
    ram = psutil.virtual_memory()
    memory = {"total": ram.total, "available": ram.available, "limit": _read_memory_limit()}
    folders = (str(Path.cwd()), client["cache_folder"])
    disks = {folder: _count_free_bytes(Path(folder)) for folder in folders}
    notes = (
        *_note_processor(cpu),
        *_note_devices(devices, cpu["torch_build"], versions),
        *_note_space(devices[0], memory, disks),
        *_note_hub(client),
    )
    return Diagnosis(versions, cpu, memory, devices, disks, client, notes)


def _find_version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _examine_cpu() -> dict[str, Any]:
    capabilities = torch.cpu.get_capabilities()
    build = "cpu"
    for name in ("hip", "cuda"):
        built_for = getattr(torch.version, name, None)
        if built_for:
            build = f"{name} {built_for}"
    cores = os.cpu_count() or 1
    return {
        "system": platform.platform(),
        "processor": str(
            capabilities.get("cpu_name") or platform.processor() or platform.machine()
        ),
        "capabilities": [name for name in CAPABILITIES if capabilities.get(name)],
        "cores": cores,
        "usable_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else cores,
        "quota": _read_cpu_quota(),
        "torch_build": build,
    }


def _examine_devices() -> tuple[dict[str, Any], ...]:
    devices: list[dict[str, Any]] = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        capability = torch.cuda.get_device_capability(index)
        device: dict[str, Any] = {
            "kind": f"cuda:{index}",
            "name": torch.cuda.get_device_name(index),
            "capability": "{}.{}".format(*capability),
            "native": ["float32", "float16"],
        }
        if capability >= (8, 0):
            device["native"].append("bfloat16")
        try:
            device["free_bytes"], device["total_bytes"] = torch.cuda.mem_get_info(index)
        except RuntimeError as error:  # it is full, or another process reserved it
            device["trouble"] = str(error).splitlines()[0]
        devices.append(device)
    short = ["float32", "float16"]
    if torch.backends.mps.is_available():
        devices.append({"kind": "mps", "name": "Apple GPU", "native": short})
    if torch.xpu.is_available():
        devices.append({"kind": "xpu", "name": torch.xpu.get_device_name(), "native": short})
    capabilities = torch.cpu.get_capabilities()
    native = ["float32"]
    for dtype, suffix in (("bfloat16", "bf16"), ("float16", "fp16")):
        if capabilities.get(f"amx_{suffix}") or capabilities.get(f"avx512_{suffix}"):
            native.append(dtype)
    devices.append({"kind": "cpu", "native": native})
    for device in devices:
        auto = resolve_dtype("auto", torch.device(device["kind"]))
        device["auto"] = str(auto).removeprefix("torch.")
    return tuple(devices)


def _count_free_bytes(folder: Path) -> int:
    """Return the free bytes of a folder's disk. The folder need not exist."""
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    return shutil.disk_usage(existing).free


def _examine_hub(timeout: float | None) -> dict[str, Any]:
    """Return the settings of the Hub's client, and the Hub's answer; None asks for no answer."""
    reachable, text = None, "not asked"
    if constants.is_offline_mode():
        text = "not asked: offline"
    elif timeout is not None:
        answer = ask_hub(timeout)
        text = answer.text
        # A mirror may have no front page.
        reachable = answer.status is not None and (answer.status < 400 or answer.status == 404)
    offline = [
        name
        for name in OFFLINE_VARIABLES
        if os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE")
    ]
    return {
        "endpoint": without_login(constants.ENDPOINT),
        "reachable": reachable,
        "answer": text,
        "token": get_token() is not None,
        "proxy": _find_proxy(constants.ENDPOINT),
        "offline": offline,
        "HF_HOME": constants.HF_HOME,
        "cache_folder": constants.HF_HUB_CACHE,
    }


def _find_proxy(endpoint: str) -> str | None:
    """Return the proxy for an address, from the environment or the system's settings."""
    address = urlsplit(endpoint)
    proxies = getproxies()
    proxy = proxies.get(address.scheme) or proxies.get("all")
    if not address.hostname or not proxy or proxy_bypass(address.hostname):
        return None
    return without_login(proxy if "://" in proxy else f"http://{proxy}")


def _read_cgroup(name: str) -> list[str]:
    """Return the words of a cgroup file of this container; none without cgroups of version 2."""
    path = CGROUP / name
    return path.read_text(encoding="utf-8").split() if path.is_file() else []


def _read_cpu_quota() -> float | None:
    """Return the processor time that the container allows, in cores."""
    words = _read_cgroup("cpu.max")
    if not words or words[0] == "max":
        return None
    return int(words[0]) / int(words[1])


def _read_memory_limit() -> int | None:
    words = _read_cgroup("memory.max")
    return None if not words or words[0] == "max" else int(words[0])


def _note_processor(cpu: Mapping[str, Any]) -> Iterator[str]:
    quota, usable = cpu["quota"], cpu["usable_cores"]
    if quota is not None and quota < usable:
        cores = ",".join(map(str, range(max(1, int(quota)))))
        yield (
            f"the container allows the time of {quota:g} cores, and {usable} cores are usable: "
            f"training starts {usable} threads, which then stop together. Raise the limit, or "
            f"start training with taskset -c {cores}."
        )


def _note_devices(
    devices: tuple[Mapping[str, Any], ...], build: str, versions: Mapping[str, Any]
) -> Iterator[str]:
    first = devices[0]["kind"]
    has_driver = NVIDIA.exists() or shutil.which("nvidia-smi") is not None
    if has_driver and build == "cpu":
        yield (
            f"this machine has an NVIDIA driver, and torch {versions['torch']} is a CPU build: the "
            "GPU stays idle. Install the CUDA build, as PyTorch's page on installing says."
        )
    if has_driver and build.startswith("cuda") and not first.startswith("cuda"):
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        yield (
            f"this machine has an NVIDIA driver, and torch for {build} finds no GPU: training "
            f"takes {first}. Run nvidia-smi, and check CUDA_VISIBLE_DEVICES={visible}."
        )
    for device in devices:
        if "trouble" in device:
            yield (
                f"{device['kind']} does not tell its free memory ({device['trouble']}): it may be "
                "full, or reserved by another process. Run nvidia-smi, or choose another GPU with "
                "CUDA_VISIBLE_DEVICES."
            )
    if versions["kernels"]:
        yield (
            f"the package kernels {versions['kernels']} is installed: with it, bitsandbytes "
            "fetches code from the Hub and runs it. This package does not need it: pip uninstall "
            "kernels."
        )


def _note_space(
    first: Mapping[str, Any], memory: Mapping[str, int | None], disks: Mapping[str, int]
) -> Iterator[str]:
    sizes = [memory["available"], memory["limit"]]
    if first["kind"].startswith("cuda"):
        sizes = [first.get("free_bytes")]
    free = min((size for size in sizes if size is not None), default=LOW_MEMORY)
    if free < LOW_MEMORY:
        yield (
            f"{first['kind']} has {_show_bytes(free)} of free memory, and recipes/imdb_lora.yaml "
            f"needs about {_show_bytes(LOW_MEMORY)}: it may run out. Close other programs, or "
            "lower train.max_tokens_per_micro_batch; lora-sentiment estimate RECIPE --budget SIZE "
            "says how far."
        )
    for folder, free in disks.items():
        if free < LOW_DISK:
            yield (
                f"the disk of {folder} has {_show_bytes(free)} free: base and reviews of "
                "recipes/imdb_lora.yaml take about 0.5 GB, a merged model 0.3 GB. Free some space; "
                "HF_HOME moves the Hub's cache."
            )


def _note_hub(hub: Mapping[str, Any]) -> Iterator[str]:
    if hub["offline"]:
        yield (
            f"{', '.join(hub['offline'])} is set: Hub names are found in the cache only. Unset it "
            "to download."
        )
    if hub["proxy"]:
        yield (
            f"{hub['endpoint']} is asked through the proxy {hub['proxy']}: its refusals look like "
            "the Hub's. If you do not want the proxy, unset it, or name the host in NO_PROXY."
        )
    if hub["reachable"] is False:
        yield (
            f"{hub['endpoint']} does not serve this machine ({hub['answer']}): Hub names are found "
            "in the cache only. Give folders and files in model.name and data.source, or a mirror "
            "in HF_ENDPOINT."
        )


def _show_bytes(size: int | None) -> str:
    return "none" if size is None else f"{size / 2**30:,.2f} GiB"


def _show(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(value) or "none"
    return "none" if value is None else str(value)
