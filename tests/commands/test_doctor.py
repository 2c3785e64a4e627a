import json
import os
import shutil
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from huggingface_hub import constants
from huggingface_hub.utils import close_session

from lora_sentiment.commands import doctor
from lora_sentiment.commands.doctor import examine
from lora_sentiment.commands.estimate import estimate
from lora_sentiment.recipe.recipe import Recipe

PROXIES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")
GIB = 2**30


@pytest.fixture
def plain(monkeypatch, tmp_path):
    """A machine without a known problem: much room, no GPU, no Hub, no settings."""
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    for name in PROXIES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1}, raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    flags = {"amx_bf16": True, "avx2": True, "cpu_name": "A CPU"}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: flags)
    for module in (torch.cuda, torch.backends.mps, torch.xpu):
        monkeypatch.setattr(module, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(doctor, "CGROUP", tmp_path / "cgroup")
    monkeypatch.setattr(doctor, "NVIDIA", tmp_path / "nvidia0")
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=50 * GIB))
    ram = SimpleNamespace(total=16 * GIB, available=8 * GIB)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: ram)
    versions = {"kernels": None, "bitsandbytes": None}
    monkeypatch.setattr(doctor, "_find_version", lambda name: versions.get(name, "1.2"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr(constants, "ENDPOINT", "http://hub.invalid")
    return tmp_path


def note(part: str, **options) -> str:
    """Return the one note that a machine with one problem has, which must hold a part."""
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


def test_a_machine_without_a_problem_has_no_note(plain):
    found = examine(hub=False)
    assert found.notes == ()
    assert found.to_lines()[-1] == "no known problem is seen"


def test_facts_stand_in_the_json_and_in_the_lines(plain):
    write(plain / "token", "hf_secret")
    found = examine(hub=False)
    facts = json.loads(json.dumps(found.as_dict()))
    assert facts["versions"]["torch"] == "1.2"
    assert facts["versions"]["kernels"] is None
    assert facts["cpu"]["processor"] == "A CPU"
    assert facts["cpu"]["capabilities"] == ["avx2", "amx_bf16"]
    assert (facts["cpu"]["cores"], facts["cpu"]["usable_cores"]) == (4, 2)
    assert facts["memory"] == {"total": 16 * GIB, "available": 8 * GIB, "limit": None}
    assert facts["devices"] == [
        {"kind": "cpu", "native": ["float32", "bfloat16"], "auto": "bfloat16"}
    ]
    assert set(facts["disks"].values()) == {50 * GIB}
    assert facts["hub"]["reachable"] is None
    assert facts["hub"]["token"] is True
    lines = found.to_lines()
    assert any(line.split() == ["memory", "available", "8.00", "GiB"] for line in lines)
    assert any(line.split() == ["cpu", "native", "float32,", "bfloat16"] for line in lines)
    assert "hf_secret" not in "\n".join(lines) + json.dumps(facts)


def test_this_very_machine_can_be_examined():
    found = examine(hub=False)
    assert found.versions["torch"] == torch.__version__
    assert found.versions["python"] == ".".join(map(str, sys.version_info[:3]))
    assert found.memory["total"] == psutil.virtual_memory().total
    assert json.dumps(found.as_dict())
    assert len(found.to_lines()) > 20


def test_a_package_that_is_absent_has_no_version():
    assert doctor._find_version("torch") == torch.__version__
    assert doctor._find_version("no-such-package-here") is None


@pytest.mark.parametrize(
    ("capability", "native"), [((7, 5), False), ((8, 0), True), ((12, 0), True)]
)
def test_a_gpu_and_the_meaning_of_auto_on_it(plain, monkeypatch, capability, native):
    cuda(monkeypatch, capability)
    found = examine(hub=False)
    first = found.devices[0]
    assert first["kind"] == "cuda:0"
    assert ("bfloat16" in first["native"]) is native
    assert first["auto"] == ("bfloat16" if native else "float16")
    assert (first["free_bytes"], first["total_bytes"]) == (40 * GIB, 80 * GIB)
    assert found.notes == ()


@pytest.mark.parametrize("kind", ["mps", "xpu"])
def test_other_devices_compute_in_float32(plain, monkeypatch, kind):
    module = torch.backends.mps if kind == "mps" else torch.xpu
    monkeypatch.setattr(module, "is_available", lambda: True)
    monkeypatch.setattr(torch.xpu, "get_device_name", lambda: "Its name")
    found = examine(hub=False)
    assert [device["kind"] for device in found.devices] == [kind, "cpu"]
    assert found.devices[0]["auto"] == "float32"


def test_the_main_recipe_needs_what_doctor_says():
    path = Path(__file__).parents[2] / "recipes/imdb_lora.yaml"
    overrides = ["model.dtype=float32", "data.labels=[negative, positive]"]
    needed = estimate(Recipe.load(path, overrides)).resident
    assert 0.7 * doctor.LOW_MEMORY < needed < doctor.LOW_MEMORY


def test_a_container_that_allows_less_than_the_cores(plain):
    write(plain / "cgroup/cpu.max", "150000 100000\n")
    assert "taskset -c 0." in note("allows the time of 1.5 cores, and 2 cores are usable")
    assert examine(hub=False).cpu["quota"] == 1.5


@pytest.mark.parametrize(
    ("quota", "memory", "limit"),
    [("max 100000", "max", None), ("200000 100000", str(4 * GIB), 4 * GIB)],
)
def test_a_container_without_a_tight_limit_is_no_problem(plain, quota, memory, limit):
    write(plain / "cgroup/cpu.max", quota)
    write(plain / "cgroup/memory.max", memory)
    found = examine(hub=False)
    assert found.notes == ()
    assert found.memory["limit"] == limit


def test_a_gpu_that_a_cpu_build_leaves_idle(plain, monkeypatch):
    write(plain / "nvidia0", "")
    assert "Install the CUDA build" in note("torch 1.2 is a CPU build")
    cuda(monkeypatch)
    assert examine(hub=False).notes == ()


def test_a_gpu_that_a_cuda_build_does_not_find(plain, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/nvidia-smi")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    assert "CUDA_VISIBLE_DEVICES=-1" in note("torch for cuda 13.0 finds no GPU: training takes cpu")


def test_a_gpu_that_does_not_tell_its_memory(plain, monkeypatch):
    cuda(monkeypatch, free=None)
    assert "Compile with" not in note(
        "cuda:0 does not tell its free memory (CUDA error: out of memory)"
    )


def test_the_package_kernels(plain, monkeypatch):
    monkeypatch.setattr(doctor, "_find_version", lambda name: "1.2")
    assert "pip uninstall kernels" in note("the package kernels 1.2 is installed")


def test_too_little_memory(plain, monkeypatch):
    ram = SimpleNamespace(total=16 * GIB, available=GIB // 2)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: ram)
    assert "estimate RECIPE --budget" in note("cpu has 0.50 GiB of free memory")


def test_too_little_memory_in_a_container(plain):
    write(plain / "cgroup/memory.max", str(GIB))
    note("cpu has 1.00 GiB of free memory")


def test_too_little_memory_of_a_gpu(plain, monkeypatch):
    cuda(monkeypatch, free=GIB // 8)
    note("cuda:0 has 0.12 GiB of free memory")


def test_a_disk_nearly_full(plain, monkeypatch):
    monkeypatch.chdir(plain)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", "/cache/not/made/yet")
    asked = []

    def usage(path):
        asked.append(path)
        return SimpleNamespace(free=(GIB - 1) if path == plain else 50 * GIB)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    assert "HF_HOME" in note(f"the disk of {plain} has ")
    assert all(path.exists() for path in asked)


@pytest.mark.parametrize("name", ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE"])
def test_offline_variables(plain, monkeypatch, name):
    monkeypatch.setenv(name, "1")
    note(f"{name} is set: Hub names are found in the cache only")
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
