import json
import os
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace

import accelerate.commands.config.config_args as accelerate_config
import psutil
import pytest
import torch
from huggingface_hub import constants
from huggingface_hub.utils import close_session

from lora_sentiment.commands import doctor
from lora_sentiment.commands.doctor import examine
from lora_sentiment.commands.estimate import estimate
from lora_sentiment.models.load import resolve_dtype
from lora_sentiment.recipe.recipe import Recipe

PROXIES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")
GIB = 2**30


@pytest.fixture
def plain(monkeypatch, tmp_path):
    """A machine without any trap: a CPU with AMX, one core for torch's threads, much room, no Hub, no settings."""
    for name in (
        *(
            "OMP_NUM_THREADS",
            "LD_PRELOAD",
            "DYLD_INSERT_LIBRARIES",
            "HF_HUB_OFFLINE",
            "HF_DATASETS_OFFLINE",
        ),
        *(
            "TRANSFORMERS_OFFLINE",
            "ACCELERATE_USE_DEEPSPEED",
            "ACCELERATE_USE_FSDP",
            "ACCELERATE_MIXED_PRECISION",
        ),
        *("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "CUDA_VISIBLE_DEVICES", "HF_TOKEN"),
        *PROXIES,
        *map(str.upper, PROXIES),
    ):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1}, raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(
        torch.cpu, "get_capabilities", lambda: {"amx_bf16": True, "avx2": True, "cpu_name": "A CPU"}
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(torch.xpu, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(doctor, "PROC", tmp_path / "proc")
    monkeypatch.setattr(doctor, "CGROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(doctor, "NVIDIA", tmp_path / "nvidia0")
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=50 * GIB))
    monkeypatch.setattr(
        psutil, "virtual_memory", lambda: SimpleNamespace(total=16 * GIB, available=8 * GIB)
    )
    monkeypatch.setattr(
        doctor, "_version", lambda name: None if name in ("bitsandbytes", "kernels") else "1.2"
    )
    monkeypatch.setattr(
        accelerate_config, "default_config_file", str(tmp_path / "default_config.yaml")
    )
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr(constants, "ENDPOINT", "http://hub.invalid")
    return tmp_path


def note(part: str, **options) -> str:
    """Return the one note that a machine with one trap has, which must hold a part."""
    notes = examine(hub=False, **options).notes
    assert len(notes) == 1, notes
    assert part in notes[0]
    return notes[0]


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def cuda(monkeypatch, capability=(8, 0), free=40 * GIB):
    """Give the machine a GPU."""

    def memory(index):
        if free is None:
            raise RuntimeError("CUDA error: out of memory\nCompile with ...")
        return free, 80 * GIB

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda i: "A GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: capability)
    monkeypatch.setattr(torch.cuda, "mem_get_info", memory)


def test_a_machine_without_a_trap_has_no_note(plain):
    found = examine(hub=False)
    assert found.notes == ()
    assert found.to_lines()[-1] == "no known trap is seen"


def test_facts_stand_in_the_json_and_in_the_lines(plain):
    write(plain / "hub/models--a/blobs/x", "12345")
    write(plain / "token", "hf_secret")
    found = examine(hub=False)
    facts = json.loads(json.dumps(found.as_dict()))
    assert facts["versions"]["torch"] == "1.2"
    assert facts["versions"]["kernels"] is None
    assert facts["cpu"]["processor"] == "A CPU"
    assert facts["cpu"]["capabilities"] == ["avx2", "amx_bf16"]
    assert (facts["cpu"]["cores"], facts["cpu"]["usable_cores"], facts["cpu"]["torch_threads"]) == (
        4,
        2,
        2,
    )
    assert facts["memory"]["available"] == 8 * GIB
    assert facts["devices"] == [
        {"kind": "cpu", "native": ["float32", "bfloat16"], "auto": "bfloat16"}
    ]
    assert set(facts["disks"].values()) == {50 * GIB}
    assert facts["hub"]["cache_bytes"] == 5
    assert facts["hub"]["reachable"] is None
    assert facts["hub"]["token"] is True
    assert "hf_secret" not in json.dumps(facts)
    lines = found.to_lines()
    assert any(line.split() == ["memory", "available", "8.00", "GiB"] for line in lines)
    assert any(line.split() == ["cpu", "native", "float32,", "bfloat16"] for line in lines)
    assert "hf_secret" not in "\n".join(lines)


def test_this_very_machine_can_be_looked_at():
    found = examine(hub=False)
    assert found.versions["torch"] == torch.__version__
    assert found.versions["python"] == ".".join(map(str, sys.version_info[:3]))
    assert found.memory["total"] == psutil.virtual_memory().total
    assert json.dumps(found.as_dict())
    assert len(found.to_lines()) > 20


def test_a_download_that_is_renamed_meanwhile_counts_nothing(plain):
    assert doctor._size(plain / "blobs/x.incomplete") == 0


def test_a_package_that_is_absent_has_no_version():
    assert doctor._version("torch") == torch.__version__
    assert doctor._version("no-such-package-here") is None


@pytest.mark.parametrize(
    ("capabilities", "capability"),
    [
        ({}, None),
        ({"avx512_bf16": True}, None),
        ({"amx_bf16": True}, None),
        ({}, (7, 5)),
        ({}, (8, 0)),
        ({}, (12, 0)),
    ],
)
def test_auto_is_the_dtype_that_training_resolves_it_to(
    plain, monkeypatch, capabilities, capability
):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    if capability:
        cuda(monkeypatch, capability)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    first = examine(hub=False).devices[0]
    assert str(resolve_dtype("auto", torch.device(first["kind"]))) == f"torch.{first['auto']}"
    assert first["auto"] != "bfloat16" or "bfloat16" in first["native"]


@pytest.mark.parametrize("auto", ["float32", "bfloat16"])
def test_the_main_recipe_is_that_of_the_repository(plain, monkeypatch, auto):
    path = Path(__file__).parents[2] / "recipes/imdb_lora.yaml"
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": auto == "bfloat16"})
    expected = estimate(
        Recipe.load(path, [f"model.dtype={auto}", "data.labels=[negative, positive]"])
    ).resident
    assert examine(hub=False).memory["needed"] == expected


@pytest.mark.parametrize(
    ("capability", "how"), [("avx2", "emulated"), ("avx512_bf16", "no faster")]
)
def test_bfloat16_that_is_no_faster(plain, monkeypatch, capability, how):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {capability: True})
    assert f"save memory and be {how}" in note("auto means float32")
    cuda(monkeypatch)
    assert examine(hub=False).notes == ()


def test_a_launchers_omp_num_threads(plain, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert "unset it" in note("OMP_NUM_THREADS=1 with 2 usable cores")
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert examine(hub=False).notes == ()


def test_more_threads_than_cores(plain, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0}, raising=False)
    assert "set OMP_NUM_THREADS=1" in note("2 threads on 1 usable cores")


@pytest.mark.parametrize(
    ("group", "files"),
    [
        ("0::/", {"cpu.max": "150000 100000"}),
        ("0::/a.slice/b", {"a.slice/cpu.max": "150000 100000", "a.slice/b/cpu.max": "max 100000"}),
        (
            "4:cpu,cpuacct:/docker/1",
            {"cpu/cpu.cfs_quota_us": "150000", "cpu/cpu.cfs_period_us": "100000"},
        ),
    ],
)
def test_a_cgroup_that_allows_less_than_the_cores(plain, group, files):
    write(plain / "proc/self/cgroup", f"1:name=systemd:/x\n{group}\n")
    for name, text in files.items():
        write(plain / "cgroup" / name, text + "\n")
    assert "taskset -c 0 ..." in note(
        "cgroups allow 1.5 cores' worth of time and 2 cores are usable"
    )
    assert examine(hub=False).cpu["quota"] == 1.5


@pytest.mark.parametrize(
    ("group", "files"),
    [
        ("0::/", {"cpu.max": "max 100000", "memory.max": "max"}),
        ("0::/", {"cpu.max": "200000 100000", "memory.max": str(4 * GIB)}),
        ("4:cpu:/", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}),
        ("4:memory:/", {"memory/memory.limit_in_bytes": "9223372036854771712"}),
    ],
)
def test_a_cgroup_without_a_tight_limit_is_no_trap(plain, group, files):
    write(plain / "proc/self/cgroup", group)
    for name, text in files.items():
        write(plain / "cgroup" / name, text)
    found = examine(hub=False)
    assert found.notes == ()
    assert found.memory["limit"] in (None, 4 * GIB)


def test_a_gpu_that_a_cpu_build_leaves_idle(plain, monkeypatch):
    write(plain / "nvidia0", "")
    assert "Install the CUDA build" in note("torch 1.2 is a CPU build")
    cuda(monkeypatch)
    assert examine(hub=False).notes == ()


def test_a_gpu_that_a_cuda_build_does_not_find(plain, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/nvidia-smi")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    assert "CUDA_VISIBLE_DEVICES=-1" in note(
        "torch for cuda 13.0 finds no GPU: training takes the cpu"
    )


def test_an_old_gpu_emulates_bfloat16(plain, monkeypatch):
    cuda(monkeypatch, (7, 5))
    assert "auto means float16" in note("cuda:0 (A GPU, capability 7.5) emulates bfloat16")


def test_a_gpu_that_does_not_tell_its_memory(plain, monkeypatch):
    cuda(monkeypatch, free=None)
    assert "Compile with" not in note(
        "cuda:0 does not tell its free memory (CUDA error: out of memory)"
    )


def test_bitsandbytes_on_a_cpu(plain, monkeypatch):
    monkeypatch.setattr(doctor, "_version", lambda name: None if name == "kernels" else "1.2")
    assert "stock engine" in note("bitsandbytes without CUDA")
    cuda(monkeypatch)
    assert examine(hub=False).notes == ()


@pytest.mark.parametrize("kind", ["mps", "xpu"])
def test_a_device_that_nobody_measured(plain, monkeypatch, kind):
    monkeypatch.setattr(doctor, "_version", lambda name: None if name == "kernels" else "1.2")
    monkeypatch.setattr(
        torch.backends.mps if kind == "mps" else torch.xpu, "is_available", lambda: True
    )
    monkeypatch.setattr(torch.xpu, "get_device_name", lambda: "Apple GPU")
    for call in ("get_device_capability", "mem_get_info", "get_device_name", "device_count"):
        monkeypatch.setattr(torch.cuda, call, lambda *given: pytest.fail("CUDA was asked"))
    assert note(
        f"training takes {kind} (Apple GPU), with the stock forward pass in float32; nobody measured"
    )
    assert [device["kind"] for device in examine(hub=False).devices] == [kind, "cpu"]
    assert examine(hub=False).devices[0]["auto"] == "float32"


def test_the_package_kernels(plain, monkeypatch):
    monkeypatch.setattr(doctor, "_version", lambda name: None if name == "bitsandbytes" else "1.2")
    assert "pip uninstall kernels" in note("the package kernels 1.2 is installed")


def test_memory_below_what_the_main_recipe_holds(plain, monkeypatch):
    monkeypatch.setattr(
        psutil, "virtual_memory", lambda: SimpleNamespace(total=16 * GIB, available=GIB // 2)
    )
    assert "estimate RECIPE --budget" in note("0.50 GiB of memory are left for cpu")


def test_a_cgroup_below_what_the_main_recipe_holds(plain):
    write(plain / "proc/self/cgroup", "0::/")
    write(plain / "cgroup/memory.max", str(GIB))
    note("1.00 GiB of memory are left for cpu")


def test_a_gpu_with_less_free_than_the_main_recipe_holds(plain, monkeypatch):
    cuda(monkeypatch, free=GIB // 8)
    note("0.12 GiB of memory are left for cuda:0")


def test_a_disk_nearly_full(plain, monkeypatch):
    monkeypatch.chdir(plain)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", "/cache/not/made/yet")
    asked = []

    def usage(path):
        asked.append(path)
        return SimpleNamespace(free=(GIB - 1) if path == plain else 50 * GIB)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    assert "HF_HOME" in note(f"are free on the disk of {plain}:")
    assert all(path.exists() for path in asked)


@pytest.mark.parametrize(
    "library", ["/usr/lib/libtcmalloc_minimal.so.4", "/usr/lib/libjemalloc.so.2"]
)
def test_another_allocator(plain, monkeypatch, library):
    monkeypatch.setenv("LD_PRELOAD", f"/usr/lib/libfirst.so {library}")
    note("malloc is preloaded")
    monkeypatch.setenv("LD_PRELOAD", "/usr/lib/libfirst.so")
    assert examine(hub=False).notes == ()


@pytest.mark.parametrize(
    ("enabled", "autogroup", "group", "nice", "seen"),
    [
        ("1", "/autogroup-89 nice 0", "0::/", 10, True),
        ("0", "/autogroup-89 nice 0", "0::/", 10, False),
        ("1", "/autogroup-89 nice 10", "0::/", 10, False),
        ("1", "/autogroup-89 nice 0", "0::/user.slice", 10, False),
        ("1", "/autogroup-89 nice 0", "4:cpu:/", 0, False),
    ],
)
def test_niceness_that_an_autogroup_hides(
    plain, monkeypatch, enabled, autogroup, group, nice, seen
):
    write(plain / "proc/sys/kernel/sched_autogroup_enabled", enabled)
    write(plain / "proc/self/autogroup", autogroup)
    write(plain / "proc/self/cgroup", group)
    monkeypatch.setattr(os, "getpriority", lambda which, who: nice)
    if seen:
        note("nice 10 in an autogroup of nice 0")
    else:
        assert examine(hub=False).notes == ()


@pytest.mark.parametrize(
    ("config", "part"),
    [
        ("distributed_type: DEEPSPEED", "distributed_type DEEPSPEED: training refuses it"),
        ("distributed_type: FSDP", "distributed_type FSDP: training refuses it"),
        ("mixed_precision: fp16", "mixed_precision fp16: training refuses it"),
        (
            "distributed_type: MULTI_CPU\nnum_processes: 2",
            "torchrun --nproc_per_node 2 -m lora_sentiment.train",
        ),
        ("[", "holds no settings (while parsing a flow node): accelerate launch stops at it"),
        ("DEEPSPEED", "holds no settings (DEEPSPEED)"),
    ],
)
def test_an_accelerate_config_that_training_refuses(plain, config, part):
    write(plain / "default_config.yaml", config)
    assert str(plain / "default_config.yaml") in note(part)


@pytest.mark.parametrize(
    "config",
    [
        "{distributed_type: 'NO', mixed_precision: 'no', num_processes: 1}",
        "mixed_precision: no",
        "mixed_precision: bf16",
        "{num_processes: 2, mpirun_config: {mpirun_hostfile: hosts}}",
        "num_processes: -1",
    ],
)
def test_an_accelerate_config_that_agrees_is_no_trap(plain, config):
    write(plain / "default_config.yaml", config)
    assert examine(hub=False).notes == ()


@pytest.mark.parametrize(
    ("name", "bad", "good"),
    [
        ("ACCELERATE_USE_DEEPSPEED", "true", "false"),
        ("ACCELERATE_USE_FSDP", "true", "false"),
        ("ACCELERATE_MIXED_PRECISION", "fp16", "bf16"),
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4", "1"),
    ],
)
def test_launch_settings_in_the_environment(plain, monkeypatch, name, bad, good):
    monkeypatch.setenv(name, bad)
    note(f"{name}={bad}: training refuses it")
    monkeypatch.setenv(name, good)
    assert examine(hub=False).notes == ()


@pytest.mark.parametrize("name", ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE"])
def test_offline_variables(plain, monkeypatch, name):
    monkeypatch.setenv(name, "1")
    note(f"{name} set: by name only what is in the cache is found")
    monkeypatch.setenv(name, "0")
    assert examine(hub=False).notes == ()


def test_offline_asks_nothing(plain, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(doctor, "ask_hub", lambda timeout: pytest.fail("it was asked"))
    assert examine().hub["answer"] == "not asked: offline"


def test_a_proxy_is_named_without_its_login(plain, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://me:secret@proxy:3128")
    assert "secret" not in note("through the proxy http://proxy:3128")
    monkeypatch.setenv("no_proxy", "hub.invalid")
    assert examine(hub=False).notes == ()


@pytest.fixture
def answer(plain, monkeypatch):
    """Let a server of this machine be the Hub; it answers the status that is put into the list."""
    status = [200]

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.send_response(status[0])
            self.end_headers()

        def log_message(self, *arguments):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    monkeypatch.setattr(constants, "ENDPOINT", f"http://user:secret@127.0.0.1:{server.server_port}")
    close_session()
    yield status
    server.shutdown()
    thread.join()
    server.server_close()
    close_session()


@pytest.mark.parametrize(
    ("status", "reachable"), [(200, True), (404, True), (401, False), (403, False), (503, False)]
)
def test_what_the_hub_answered(answer, status, reachable):
    answer[0] = status
    found = examine()
    assert found.hub["reachable"] is reachable
    assert found.hub["answer"].startswith(str(status))
    assert "secret" not in str(found)
    assert len(found.notes) == (not reachable)
    assert reachable or f"does not serve this machine ({status}" in found.notes[0]


@pytest.mark.parametrize(
    ("endpoint", "proxy", "part"),
    [
        ("http://127.0.0.1:1", "", "ConnectError"),
        ("huggingface.co", "", "UnsupportedProtocol"),
        ("http://127.0.0.1:port", "", "InvalidURL"),
        ("http://127.0.0.1:1", "socks5://127.0.0.1:1", "socksio"),
        ("http://127.0.0.1:1", "foo://me:secret@x", "Unknown scheme"),
        ("http://127.0.0.1:1", "http://proxy:port", "Invalid port"),
    ],
)
def test_a_hub_that_cannot_be_asked_is_a_note_not_a_traceback(
    plain, monkeypatch, endpoint, proxy, part
):
    if proxy.startswith("socks"):
        monkeypatch.setitem(sys.modules, "socksio", None)
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setenv("http_proxy", proxy)
    close_session()
    found = examine(timeout=2)
    close_session()
    assert found.hub["reachable"] is False
    assert part in found.hub["answer"]
    assert part in found.notes[-1]
    assert "secret" not in str(found)


def test_torch_is_not_imported_with_the_module():
    code = "import sys, lora_sentiment.commands.doctor; assert not {'torch', 'transformers', 'peft'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("free", [3, 40])
def test_the_main_recipe_fits_a_gpu_that_it_can_be_cut_for(plain, monkeypatch, free):
    cuda(monkeypatch, free=free * GIB)
    assert examine(hub=False).memory["needed"] <= free * GIB
