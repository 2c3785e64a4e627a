import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import PartialState

from lora_sentiment.errors import ModelError, RecipeError, TrainingError
from lora_sentiment.training.processes import (
    explain_lost_process,
    join_launch,
    make_accelerator,
    set_threads,
)

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("ACCELERATE_USE_DEEPSPEED", "true", "DeepSpeed"),
        ("ACCELERATE_USE_FSDP", "true", "FSDP"),
        ("ACCELERATE_MIXED_PRECISION", "bf16", "--mixed_precision bf16"),
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4", "--gradient_accumulation_steps 4"),
        (
            "WORLD_SIZE",
            "abc",
            "WORLD_SIZE is 'abc' in the environment; a launcher sets a whole number from 1 to",
        ),
        ("WORLD_SIZE", "0", "WORLD_SIZE is '0'"),
        ("LOCAL_WORLD_SIZE", "0", "LOCAL_WORLD_SIZE is '0'"),
        ("RANK", "\N{SUPERSCRIPT TWO}", "RANK is"),
        ("LOCAL_RANK", "", "LOCAL_RANK is ''"),
        ("MASTER_PORT", "99999", "MASTER_PORT is '99999'"),
    ],
)
def test_launch_settings_that_disagree_are_refused_by_name(monkeypatch, variable, value, message):
    monkeypatch.setenv(variable, value)
    with pytest.raises(RecipeError, match=message):
        make_accelerator(join_launch(), "float32")


def test_a_rank_beyond_the_size_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "2")
    with pytest.raises(
        RecipeError, match="RANK is 2 in the environment, and WORLD_SIZE 2: ranks go from 0 to 1"
    ):
        join_launch()


@pytest.fixture
def two(monkeypatch):
    """The environment of the first of two processes, in a process that has joined none."""
    monkeypatch.setattr(PartialState, "_shared_state", {})
    for name, value in {
        "WORLD_SIZE": "2",
        "RANK": "0",
        "LOCAL_RANK": "0",
        "MASTER_PORT": "29511",
    }.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize("code", [0, 75])
def test_a_process_leaves_its_launch_before_it_ends(tmp_path, code):
    """Torch aborts a process now and then (8 in 60, on a busy machine) that ends without that."""
    script = tmp_path / "script.py"
    script.write_text(
        "import atexit, os, sys\nimport torch\n"
        "def note():\n"
        "    connected = torch.distributed.is_initialized()\n"
        f"    open({str(tmp_path)!r} + '/rank' + os.environ['RANK'], 'w').write(str(connected))\n"
        "atexit.register(note)\n"  # what is registered first is called last
        "from lora_sentiment.training.processes import join_launch\n"
        "join_launch().wait_for_everyone()\n"
        f"sys.exit({code})\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, str(script)], check=False, env=environment, capture_output=True, text=True
    )
    assert f"(exitcode: {code})" in done.stderr if code else done.returncode == 0, done.stderr
    assert [(tmp_path / f"rank{rank}").read_text() for rank in (0, 1)] == ["False", "False"]


def test_an_address_that_nobody_knows_is_refused_before_joining(monkeypatch, two):
    monkeypatch.setenv("MASTER_ADDR", "nosuchhost.invalid")
    with pytest.raises(
        RecipeError, match=r"MASTER_ADDR is 'nosuchhost\.invalid' in the environment, and no"
    ):
        join_launch()


def test_what_is_waited_for_is_said_and_a_signal_is_obeyed_meanwhile(monkeypatch, caplog, two):
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    caplog.set_level("INFO", "lora_sentiment")
    seen = []

    def join(**_):
        seen.append([signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)])
        return SimpleNamespace(num_processes=1)

    join._shared_state = {}
    monkeypatch.setattr("lora_sentiment.training.processes.PartialState", join)
    before = signal.signal(signal.SIGTERM, handler := lambda *_: None)
    try:
        with pytest.raises(RecipeError, match="2 processes were launched, and Accelerate joined 1"):
            join_launch()
        assert signal.getsignal(signal.SIGTERM) is handler
    finally:
        signal.signal(signal.SIGTERM, before)
    assert seen == [[signal.SIG_DFL, signal.SIG_DFL]]
    assert "waiting for all 2 processes at 127.0.0.1:29511" in caplog.text


def test_only_an_error_of_gloo_is_reported_as_a_lost_process():
    state = SimpleNamespace(num_processes=2)
    told = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:21"
    with (
        pytest.raises(TrainingError, match="another process of this launch ended"),
        explain_lost_process(state),
    ):
        raise RuntimeError(told)
    for other in ("/data/gloomy/rows.csv: is broken", "/data/gloo/rows.cc: is broken"):
        with pytest.raises(RuntimeError, match="is broken"), explain_lost_process(state):
            raise RuntimeError(other)


def test_a_launch_setting_that_agrees_is_fine(monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    assert make_accelerator(join_launch(), "float32").mixed_precision == "no"


@pytest.mark.skipif(torch.cuda.is_available(), reason="fp16 is right on a GPU")
def test_fp16_on_a_cpu_is_refused():
    with pytest.raises(ModelError, match="float16 needs a GPU"):
        make_accelerator(join_launch(), "float16")


def test_threads_are_the_usable_cores_divided_among_local_processes(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1})
    torch.set_num_threads(1)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert set_threads(PartialState()) == torch.get_num_threads() == 2
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert set_threads(PartialState()) == torch.get_num_threads() == 1
    monkeypatch.undo()
    set_threads(PartialState())
