"""Whole commands, started as a person starts them, stopped and killed: what the launcher says, and what is left."""

import os
import re
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

from lora_sentiment.errors import TrainingError
from lora_sentiment.files import hash_file
from lora_sentiment.recipe.recipe import Recipe
from lora_sentiment.train import train
from tests.training.stopped_runs import read_metrics

ROOT = Path(__file__).parents[2]
TORCHRUN = ("torch.distributed.run", "--nproc_per_node", "2", "-m", "lora_sentiment.train")
ACCELERATE = ("accelerate.commands.launch", "-m", "lora_sentiment.train")
OVERRIDES = ("train.num_train_epochs=20", "train.save_steps=5")


@contextmanager
def launched(recipe, *command):
    """Start a command in a session of its own, as a terminal does; give the process once it has trained 12 steps."""
    log = (recipe.parent / "log.txt").open("a+")
    full = [sys.executable, "-m", *command, str(recipe), *OVERRIDES]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        full, env=environment, stdout=log, stderr=log, start_new_session=True
    )
    lines = recipe.parent / "adapter.run/metrics.csv"
    before = count_lines(lines)
    try:
        while process.poll() is None and count_lines(lines) < before + 12:
            time.sleep(0.02)
        yield process
        process.wait(120)
    finally:
        log.close()
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def count_lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def run_through(recipe, *overrides):
    command = [sys.executable, "-m", *TORCHRUN, str(recipe), *OVERRIDES, *overrides]
    subprocess.run(command, cwd=ROOT, check=True, stderr=subprocess.DEVNULL)


def wait_for_saved(folder: Path, told: str) -> None:
    """Wait until a run that outlives its launcher has said that it is saved and has let go of its folder."""
    until = time.monotonic() + 60
    while (folder / "adapter.run/lock").exists() or told not in (folder / "log.txt").read_text():
        assert time.monotonic() < until, (folder / "log.txt").read_text()
        time.sleep(0.05)


def ranks_of(launcher: int) -> list[int]:
    return [
        int(pid) for pid in Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    ]


@pytest.mark.slow
@pytest.mark.skipif(
    not Path("/proc/self/task").is_dir(), reason="finds the processes of a launcher in /proc"
)
def test_two_processes_of_torchrun_told_to_stop_and_killed_go_on_to_the_same_adapter(toy_recipe):
    with launched(toy_recipe, *TORCHRUN) as process:
        process.send_signal(signal.SIGTERM)
    assert process.returncode == 1  # torchrun's own, whatever its processes end with
    told = (toy_recipe.parent / "log.txt").read_text()
    step = int(re.search(r"stopped by SIGTERM after step (\d+) of 140, saved in", told)[1])
    assert (toy_recipe.parent / f"adapter.run/checkpoints/step-{step:08d}").is_dir()
    with pytest.raises(TrainingError, match=r"machine\.num_processes: was 2, is 1"):
        train(Recipe.load(toy_recipe, OVERRIDES))
    for rank in (0, 1):
        with launched(toy_recipe, *TORCHRUN) as process:
            os.kill(ranks_of(process.pid)[rank], signal.SIGKILL)
        assert process.returncode == 1
        assert not (toy_recipe.parent / "adapter").exists()
    run_through(toy_recipe)
    run_through(toy_recipe, f"output.dir={toy_recipe.parent}/whole")
    names = ("adapter", "whole")
    found, whole = [
        hash_file(toy_recipe.parent / name / "adapter_model.safetensors") for name in names
    ]
    assert found == whole
    found, whole = [read_metrics(toy_recipe.parent / f"{name}.run") for name in names]
    assert found == whole


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_what_a_launcher_says_of_a_run_that_is_told_to_stop(toy_recipe, number):
    """A Ctrl-C and a batch system's SIGTERM reach the whole group; launchers have exit codes of their own."""
    told = f"stopped by {number.name} after step"
    with launched(toy_recipe, "lora_sentiment.train") as process:
        os.killpg(process.pid, number)
    assert process.returncode == 75
    wait_for_saved(toy_recipe.parent, told)
    (toy_recipe.parent / "log.txt").write_text("")
    with launched(toy_recipe, *ACCELERATE) as process:
        os.killpg(process.pid, number)
    assert process.returncode == -number  # it does not wait for the run, which saves all the same
    wait_for_saved(toy_recipe.parent, told)
    assert train(Recipe.load(toy_recipe, OVERRIDES)).history.resumed[1:] != []
