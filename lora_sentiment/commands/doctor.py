"""What this machine has for training, and a note for each known trap that is seen on it."""

import os
import platform
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.request import getproxies, proxy_bypass

import yaml
from transformers import AutoConfig

from lora_sentiment.commands.estimate import BASELINE_BYTES, cut_rows
from lora_sentiment.hub import ask_hub, without_login
from lora_sentiment.models.families import DISTILBERT
from lora_sentiment.models.load import DTYPES
from lora_sentiment.models.memory import Plan, estimate_memory
from lora_sentiment.recipe.recipe import Recipe

MAIN_RECIPE = {
    "name": "imdb_lora",
    "data": {"source": "stanfordnlp/imdb"},
    "model": {"name": "distilbert/distilbert-base-uncased", "truncation": "head_tail"},
}
"""What fixes the memory of `recipes/imdb_lora.yaml`, which an installed package does not bring."""
LOW_DISK = 2**30
"""Bytes: the main recipe fetches a base of 268 MB and reviews of about 0.2 GB; a merged model is another 268 MB."""
PROC, CGROUPS, NVIDIA = Path("/proc"), Path("/sys/fs/cgroup"), Path("/dev/nvidia0")
PACKAGES = (
    *(
        "lora_sentiment",
        "torch",
        "transformers",
        "peft",
        "accelerate",
        "datasets",
        "evaluate",
        "bitsandbytes",
    ),
    *("tokenizers", "safetensors", "huggingface_hub", "onnxruntime", "kernels"),
)
_OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE")
_CAPABILITIES = (
    "avx2",
    "avx512_f",
    "avx512_bf16",
    "avx512_fp16",
    "avx512_vnni",
    "amx_bf16",
    "amx_fp16",
    "amx_int8",
)
_PRECISIONS = {"float32": "no", "bfloat16": "bf16", "float16": "fp16"}


@dataclass(frozen=True)
class Diagnosis:
    """Facts of this machine, and a note for each trap: what was seen, what it means, what to do.

    Attributes:
        versions: Package to version; None where it is not installed.
        cpu: Name, cores (all, usable by this process, `quota` of cgroups in cores), threads, instruction sets.
        memory: Bytes: total, available, `limit` of cgroups, and what the main recipe is estimated to hold.
        devices: What torch computes on, the one that training takes first: `native` dtypes are multiplied without
            emulation, `auto` is what `model.dtype: auto` means, `trouble` what it answered instead of its free bytes.
        disks: Folder to bytes free: the current folder and the Hub's cache.
        hub: Addresses without their logins, `token` says whether there is one, `reachable` is None if not asked.
        notes: One for each trap that is seen.
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
        rows = [*self.versions.items(), *self.cpu.items()]
        rows += [(f"memory {key}_bytes", size) for key, size in self.memory.items()]
        rows += [
            (f"{device['kind']} {key}", value)
            for device in self.devices
            for key, value in device.items()
        ]
        rows += [(f"free for {folder}_bytes", size) for folder, size in self.disks.items()]
        rows += [(f"Hub {key}", value) for key, value in self.hub.items()]
        shown = {
            name.removesuffix("_bytes"): _show_bytes(value)
            if value and name.endswith("_bytes")
            else _show(value)
            for name, value in rows
        }
        facts = [f"{name:<{max(map(len, shown))}}  {value}" for name, value in shown.items()]
        return [*facts, "", *([f"* {note}" for note in self.notes] or ["no known trap is seen"])]


def examine(*, hub: bool = True, timeout: float = 5.0) -> Diagnosis:
    """Look at this machine.

    Args:
        hub: Ask the Hub whether it answers.
        timeout: Seconds for each of connecting and answering.
    """
    import psutil

    versions = {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}}
    cpu, devices, client = (
        _look_at_cpu(),
        _look_at_devices(),
        _look_at_hub(timeout if hub else None),
    )
    ram = psutil.virtual_memory()
    memory = {"total": ram.total, "available": ram.available, "limit": _memory_limit()}
    memory["needed"] = _main_memory(devices[0])
    disks = {
        folder: _free_bytes(Path(folder)) for folder in (str(Path.cwd()), client["cache_folder"])
    }
    notes = [
        *_cpu_notes(cpu),
        *_device_notes(devices, cpu, versions),
        *_room_notes(devices[0], memory, disks),
    ]
    notes += [*_environment_notes(), *_launch_notes(devices[0]), *_hub_notes(client)]
    return Diagnosis(versions, cpu, memory, devices, disks, client, tuple(notes))


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _look_at_cpu() -> dict[str, Any]:
    import torch

    capabilities = torch.cpu.get_capabilities()
    builds = (
        f"{name} {v}" for name in ("cuda", "hip") if (v := getattr(torch.version, name, None))
    )
    cores = os.cpu_count() or 1
    return {
        "system": platform.platform(),
        "processor": str(
            capabilities.get("cpu_name") or platform.processor() or platform.machine()
        ),
        "capabilities": [name for name in _CAPABILITIES if capabilities.get(name)],
        "cores": cores,
        "usable_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else cores,
        "quota": _cpu_quota(),
        "torch_build": next(builds, "cpu"),
        "torch_threads": torch.get_num_threads(),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS"),
    }


def _look_at_devices() -> tuple[dict[str, Any], ...]:
    """Return what torch computes on, first what training takes; `auto` is what `resolve_dtype` decides."""
    import torch

    devices: list[dict[str, Any]] = []
    for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        capability = torch.cuda.get_device_capability(i)
        new = capability >= (8, 0)
        native = ["float32", "float16", *(["bfloat16"] if new else [])]
        device = {
            "kind": f"cuda:{i}",
            "name": torch.cuda.get_device_name(i),
            "capability": "{}.{}".format(*capability),
        }
        devices.append({**device, "native": native, "auto": "bfloat16" if new else "float16"})
        try:
            devices[-1]["free_bytes"], devices[-1]["total_bytes"] = torch.cuda.mem_get_info(i)
        except RuntimeError as error:  # full, or another process has it to itself
            devices[-1]["trouble"] = str(error).splitlines()[0]
    if torch.backends.mps.is_available():
        devices.append(
            {
                "kind": "mps",
                "name": "Apple GPU",
                "native": ["float32", "float16"],
                "auto": "float32",
            }
        )
    if torch.xpu.is_available():
        name = torch.xpu.get_device_name()
        devices.append(
            {"kind": "xpu", "name": name, "native": ["float32", "float16"], "auto": "float32"}
        )
    found = torch.cpu.get_capabilities()
    native = ["float32"]
    for dtype, names in (
        ("bfloat16", ("amx_bf16", "avx512_bf16")),
        ("float16", ("amx_fp16", "avx512_fp16")),
    ):
        native += [dtype] if any(found.get(name) for name in names) else []
    return (
        *devices,
        {
            "kind": "cpu",
            "native": native,
            "auto": "bfloat16" if found.get("amx_bf16") else "float32",
        },
    )


def _main_memory(device: Mapping[str, Any]) -> int:
    """Estimate the bytes that the main recipe holds on a device, without looking for its base."""
    recipe = Recipe.model_validate(MAIN_RECIPE)
    kind = device["kind"].partition(":")[0]
    plan = Plan(
        AutoConfig.for_model(DISTILBERT.model_type),
        recipe.method,
        recipe.model,
        dtype=DTYPES[device["auto"]],
        device="cuda" if kind == "cuda" else "cpu",
        cuda_graphs=True,
    )
    length = recipe.model.max_length
    # Micro-batches on a GPU are as large as its free memory allows.
    rows = cut_rows(plan, recipe, length=length, budget=device.get("free_bytes"))
    memory = estimate_memory(plan, rows=rows, length=length, batch_size=recipe.train.batch_size)
    # Beside a CPU's tensors stand the interpreter and what glibc keeps of freed buffers.
    return memory.resident if kind == "cuda" else BASELINE_BYTES + memory.resident


def _free_bytes(folder: Path) -> int:
    """Return what is free on the disk that holds a folder, which need not stand yet."""
    return shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.exists())).free


def _look_at_hub(timeout: float | None) -> dict[str, Any]:
    """Return what the Hub's client says of itself, and what answered within a timeout; None asks nothing."""
    from huggingface_hub import constants, get_token

    files = (
        Path(folder, name) for folder, _, names in os.walk(constants.HF_HUB_CACHE) for name in names
    )
    reachable, answer = None, "not asked"
    if constants.is_offline_mode():
        answer = "not asked: offline"
    elif timeout is not None:
        found = ask_hub(timeout)
        answer = found.text
        # A mirror need not have a front page.
        reachable = found.status is not None and (found.status < 400 or found.status == 404)
    return {
        "endpoint": without_login(constants.ENDPOINT),
        "reachable": reachable,
        "answer": answer,
        "token": get_token() is not None,
        "proxy": _find_proxy(constants.ENDPOINT),
        "offline": [
            name
            for name in _OFFLINE
            if os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE")
        ],
        "HF_HOME": constants.HF_HOME,
        "cache_folder": constants.HF_HUB_CACHE,
        "cache_bytes": sum(map(_size, files)),
    }


def _size(path: Path) -> int:
    try:
        return path.lstat().st_size
    except FileNotFoundError:  # a download that was finished, and renamed, meanwhile
        return 0


def _find_proxy(endpoint: str) -> str | None:
    """Return the proxy for an address as the Hub's client finds it: environment, else the system's settings."""
    parts = re.match(r"(\w+)://(?:[^/]*@)?([^/:]+)", endpoint)
    proxies = getproxies()
    proxy = (proxies.get(parts[1].lower()) or proxies.get("all")) if parts else None
    if not parts or not proxy or proxy_bypass(parts[2]):
        return None
    return without_login(proxy if "://" in proxy else f"http://{proxy}")


def _read(path: Path) -> str:
    """Return a file of the kernel's; nothing where the system has none, or none for this process."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


def _cgroups(controller: str) -> list[str]:
    """Return this process's groups under a controller, and the one of version 2 (cgroups(7))."""
    lines = [line.split(":", 2) for line in _read(PROC / "self/cgroup").splitlines()]
    return [path for _, names, path in lines if not names or controller in names.split(",")]


def _read_cgroups(controller: str, name: str) -> list[str]:
    """Return what a file says for this process's groups and each above them, in either version's place."""
    groups = [
        group
        for path in _cgroups(controller)
        for group in (PurePosixPath(path), *PurePosixPath(path).parents)
    ]
    folders = {
        root / str(group).lstrip("/")
        for group in groups
        for root in (CGROUPS, CGROUPS / controller)
    }
    return [text for folder in sorted(folders) if (text := _read(folder / name))]


def _cpu_quota() -> float | None:
    """Return how many cores' worth of time the tightest group allows."""
    pairs = [text.split() for text in _read_cgroups("cpu", "cpu.max")]
    old = (_read_cgroups("cpu", f"cpu.cfs_{name}_us") for name in ("quota", "period"))
    pairs += [list(pair) for pair in zip(*old, strict=True)]
    return min(
        (int(time) / int(period) for time, period in pairs if time not in ("max", "-1")),
        default=None,
    )


def _memory_limit() -> int | None:
    found = [
        *_read_cgroups("memory", "memory.max"),
        *_read_cgroups("memory", "memory.limit_in_bytes"),
    ]
    # Version 1 says about 2 ** 63 where there is none.
    return min((int(text) for text in found if text != "max" and int(text) < 2**60), default=None)


def _cpu_notes(cpu: Mapping[str, Any]) -> Iterator[str]:
    usable, threads, quota, asked = (
        cpu[key] for key in ("usable_cores", "torch_threads", "quota", "OMP_NUM_THREADS")
    )
    own = "This package's verbs set their threads themselves"
    if asked and asked.isdigit() and int(asked) < usable:
        yield (
            f"OMP_NUM_THREADS={asked} with {usable} usable cores (launchers set 1): torch starts with {threads} "
            f"thread(s). {own}; for other code on torch, unset it."
        )
    if threads > usable:
        yield (
            f"torch starts with {threads} threads on {usable} usable cores: they wait for each other. {own}; for other "
            f"code on torch, set OMP_NUM_THREADS={usable}."
        )
    if quota is not None and quota < usable:
        yield (
            f"cgroups allow {quota:g} cores' worth of time and {usable} cores are usable: training starts {usable} "
            f"threads, which are then held up together. Raise the limit, or start it by taskset -c "
            f"{','.join(map(str, range(max(1, int(quota)))))} ..."
        )


def _device_notes(
    devices: tuple[Mapping[str, Any], ...], cpu: Mapping[str, Any], versions: Mapping[str, Any]
) -> Iterator[str]:
    first, build = devices[0], cpu["torch_build"]
    driver = NVIDIA.exists() or shutil.which("nvidia-smi") is not None
    on_gpu = first["kind"].startswith("cuda")
    if first["kind"] == "cpu" and first["auto"] == "float32":
        how = (
            "no faster, as measured on an Intel one"
            if "bfloat16" in first["native"]
            else "emulated, and slower"
        )
        yield (
            f"the CPU has no amx_bf16: bfloat16 would save memory and be {how}, so that model.dtype auto means float32 "
            "here. Leave it at auto, unless model.dtype=bfloat16 turns out faster."
        )
    if driver and build == "cpu":
        yield (
            f"an NVIDIA driver is here and torch {versions['torch']} is a CPU build: the GPU stays idle. Install "
            "the CUDA build, as PyTorch's own page on installing says."
        )
    if driver and build.startswith("cuda") and not on_gpu:
        yield (
            f"an NVIDIA driver is here and torch for {build} finds no GPU: training takes the {first['kind']}. See "
            f"what nvidia-smi says, or if CUDA_VISIBLE_DEVICES={os.environ.get('CUDA_VISIBLE_DEVICES', '')} hides it."
        )
    for device in devices:
        if device["auto"] == "float16":
            yield (
                f"{device['kind']} ({device['name']}, capability {device['capability']}) emulates bfloat16, whatever "
                "it reports: model.dtype auto means float16 there. Leave it at auto."
            )
        if "trouble" in device:
            yield (
                f"{device['kind']} does not tell its free memory ({device['trouble']}): it may be full or another "
                "process's own. See nvidia-smi, or choose another GPU by CUDA_VISIBLE_DEVICES."
            )
    if first["kind"] in ("mps", "xpu"):
        yield (
            f"training takes {first['kind']} ({first['name']}), with the stock forward pass in float32; nobody "
            "measured that. Leave train.engine and model.dtype at auto."
        )
    if first["kind"] == "cpu" and versions["bitsandbytes"]:
        yield (
            "bitsandbytes without CUDA: model.quantize works on the CPU, on the stock engine alone, which holds more "
            "than the small weights save. Choose it to try a recipe meant for a GPU; report.json gives what it saved."
        )
    if versions["kernels"]:
        yield (
            f"the package kernels {versions['kernels']} is installed: with it bitsandbytes fetches code from the Hub "
            "and runs it. Nothing here needs it: pip uninstall kernels."
        )


def _room_notes(
    first: Mapping[str, Any], memory: Mapping[str, Any], disks: Mapping[str, int]
) -> Iterator[str]:
    room = min(memory["available"], memory["limit"] or memory["available"])
    if first["kind"].startswith("cuda"):
        room = first.get("free_bytes", memory["needed"])
    if room < memory["needed"]:
        yield (
            f"{_show_bytes(room)} of memory are left for {first['kind']} and recipes/imdb_lora.yaml is estimated to "
            f"hold {_show_bytes(memory['needed'])}: it may run out. Close other programs or lower "
            "train.max_tokens_per_micro_batch; `lora-sentiment estimate RECIPE --budget SIZE` says how far."
        )
    for folder, free in disks.items():
        if free < LOW_DISK:
            yield (
                f"{_show_bytes(free)} are free on the disk of {folder}: base and reviews of recipes/imdb_lora.yaml "
                "take about 0.5 GB, a merged model 0.3 GB. Make room; HF_HOME moves the Hub's cache."
            )


def _environment_notes() -> Iterator[str]:
    preloaded = os.environ.get("LD_PRELOAD") or os.environ.get("DYLD_INSERT_LIBRARIES") or ""
    if allocator := re.search("tcmalloc|jemalloc", preloaded):
        yield (
            f"{allocator[0]} is preloaded: large micro-batches run faster than with glibc, and memory held is not what "
            "estimate and --probe say, which know glibc. Keep it for speed; start without it to compare memory."
        )
    own = _read(PROC / "sys/kernel/sched_autogroup_enabled") == "1" and _read(
        PROC / "self/autogroup"
    )
    # sched(7): autogroups do not count where a cgroup of the CPU controller does.
    counts = own and own.endswith(" nice 0") and set(_cgroups("cpu")) <= {"/"}
    if counts and (nice := os.getpriority(os.PRIO_PROCESS, 0)):
        yield (
            f"nice {nice} in an autogroup of nice 0: it counts within this session only, and work of other sessions "
            f"sees no difference. For that, in this shell: echo {nice} > /proc/self/autogroup"
        )


def _launch_notes(device: Mapping[str, Any]) -> Iterator[str]:
    """Yield what `accelerate launch` would bring that training refuses or that does not happen."""
    from accelerate.commands.config.config_args import default_config_file

    path = Path(default_config_file)
    config: Any = {}
    if path.is_file():
        try:
            config = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, yaml.YAMLError) as error:
            config = str(error).splitlines()[0]
    if not isinstance(config, dict):
        yield f"{path} holds no settings ({config}): accelerate launch stops at it. Mend or delete it."
        return
    kind, precision = (
        str(config.get("distributed_type")),
        str(config.get("mixed_precision") or "no"),
    )
    fine = {
        "MIXED_PRECISION": ("no", _PRECISIONS[device["auto"]]),
        "GRADIENT_ACCUMULATION_STEPS": ("1",),
    }
    asked = [f"{path}: distributed_type {kind}"] if kind in ("DEEPSPEED", "FSDP") else []
    asked += (
        [] if precision in fine["MIXED_PRECISION"] else [f"{path}: mixed_precision {precision}"]
    )
    switches = ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP")
    asked += [f"{name}=true" for name in switches if os.environ.get(name, "").lower() == "true"]
    for name, allowed in fine.items():
        value = os.environ.get(f"ACCELERATE_{name}", allowed[0])
        asked += [] if value in allowed else [f"ACCELERATE_{name}={value}"]
    for what in asked:
        yield f"{what}: training refuses it, the recipe decides (model.dtype auto means {device['auto']}). Take it out."
    processes = config.get("num_processes") or 1
    if (
        device["kind"] == "cpu"
        and processes not in (-1, 1)
        and "hostfile" not in str(config.get("mpirun_config"))
    ):
        yield (
            f"{path}: num_processes {processes}, and there is no GPU: accelerate launch starts one process then. For "
            f"more: torchrun --nproc_per_node {processes} -m lora_sentiment.train RECIPE"
        )


def _hub_notes(hub: Mapping[str, Any]) -> Iterator[str]:
    if hub["offline"]:
        yield f"{', '.join(hub['offline'])} set: by name only what is in the cache is found. Unset to download."
    if hub["proxy"]:
        yield (
            f"{hub['endpoint']} is asked through the proxy {hub['proxy']}: what that refuses looks like the Hub's "
            "answer. If it is not meant, unset it or name the host in NO_PROXY."
        )
    if hub["reachable"] is False:
        yield (
            f"{hub['endpoint']} does not serve this machine ({hub['answer']}): by name only what is in the cache is "
            "found. Give folders and files in model.name and data.source, or a mirror in HF_ENDPOINT."
        )


def _show_bytes(size: int) -> str:
    return f"{size / 2**30:,.2f} GiB"


def _show(value: Any) -> str:
    return (
        ", ".join(value) or "none"
        if isinstance(value, list)
        else "none"
        if value is None
        else str(value)
    )
