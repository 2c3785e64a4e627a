"""Runs on a toy, stopped and killed: what test_checkpoint.py and test_kills.py share.

Started as a program it forks: the parent imports and loads once and starts no thread; each child is a run of its own,
one process or two. It prints what came of them as JSON.
"""

import csv
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator, PartialState

from lora_sentiment.adapter.weights import save_weights
from lora_sentiment.data.batches import encode
from lora_sentiment.data.rows import Rows
from lora_sentiment.errors import StoppedError
from lora_sentiment.files import hash_file
from lora_sentiment.model.base import load_base
from lora_sentiment.model.config import ModelConfig
from lora_sentiment.model.method_config import LoraMethod
from lora_sentiment.model.methods import make_trainable
from lora_sentiment.training import checkpoint, loop
from lora_sentiment.training.checkpoint import Store
from lora_sentiment.training.config import TrainConfig
from lora_sentiment.training.trackers import CsvTracker
from tests.conftest import toy_rows

SETTINGS = {"train.learning_rate": 0.01, "machine.threads": 1, "method.kind": "lora", "method.r": 4}
NUM_ROWS = 90
STEPS_PER_EPOCH = 6  # of 16 rows, the last one of 10


def make_toy(base_folder: Path, *, dropout: float = 0.2) -> dict[str, Any]:
    """Return what every run starts from: base, model section, rows."""
    config = ModelConfig(name=str(base_folder), max_length=16, dropout=dropout, attention_dropout=dropout)
    torch.manual_seed(0)  # for the head
    base = load_base(config, labels=("negative", "positive"))
    rows = toy_rows(NUM_ROWS)
    labels = np.array([int(label == "positive") for _, label in rows])
    encoded = encode(
        Rows([text for text, _ in rows], labels, np.arange(NUM_ROWS)),
        tokenizer=base.tokenizer,
        max_length=16,
        truncation="head",
    )
    return {"base": base, "config": config, "encoded": encoded}


def fit_toy(folder: Path, toy: dict[str, Any], *, method: Any = None, **values: Any) -> Any:
    """Train in this process, which is given up after it; return the history. The main process leaves an adapter."""
    method = method or LoraMethod(r=4, lora_alpha=8, lora_dropout=0.1)
    settings = {"batch_size": 16, "learning_rate": 1e-2, "num_train_epochs": 2.0, "eval_steps": 4, **values}
    config = TrainConfig(**settings)
    folder.mkdir(parents=True, exist_ok=True)
    state = PartialState(cpu=True)
    accelerator = Accelerator(log_with=[CsvTracker(folder)] if state.is_main_process else None)
    accelerator.init_trackers("toy")
    torch.manual_seed(0)
    num_steps = loop.count_steps(NUM_ROWS, config)
    model = make_trainable(toy["base"], method, toy["config"], dtype=torch.float32, num_steps=num_steps)
    torch.manual_seed(config.seed + state.process_index)
    history = loop.fit(
        model,
        train=toy["encoded"],
        validation=toy["encoded"],
        numbers=np.arange(NUM_ROWS),
        config=config,
        method=method,
        accelerator=accelerator,
        max_tokens=100,
        store=Store(folder / "checkpoints", SETTINGS, limit=config.save_total_limit),
    )
    accelerator.end_training()
    if state.is_main_process:
        aside = folder / "aside"
        aside.mkdir(exist_ok=True)
        save_weights(aside, model)
        (aside / "adapter_model.safetensors").rename(folder / "adapter.safetensors")
    return history


def fork(run: Callable[[], Any], *, errors: Path | None = None) -> int:
    """Start a run in a child and return its process id; it ends with 1 and a traceback where the run raises."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        if errors:
            handle = os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            os.dup2(handle, 1)
            os.dup2(handle, 2)
        run()
        code = 0
    except SystemExit as error:
        code = int(error.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def wait(pid: int, *, seconds: float = 120) -> int:
    """Return how a child ended: its exit code, or minus the signal that killed it."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    raise AssertionError(f"process {pid} did not end in {seconds} s")


def fork_two(run: Callable[[], Any], *, errors: Path | None = None) -> list[int]:
    """Start a run of two processes as torchrun would; return their process ids, the main one's first."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])

    def join(rank: int) -> None:
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        os.environ.update(place, RANK=str(rank), LOCAL_RANK=str(rank))
        run()

    return [fork(lambda rank=rank: join(rank), errors=errors) for rank in range(2)]


def sha256(folder: Path) -> str:
    """Return the hash of the adapter that a run left."""
    return hash_file(folder / "adapter.safetensors")


def read_metrics(folder: Path) -> list[dict[str, str]]:
    """Return the lines of metrics.csv without the one column that is of the clock."""
    with (folder / "metrics.csv").open(newline="", encoding="utf-8") as file:
        return [{key: value for key, value in row.items() if key != "seconds"} for row in csv.DictReader(file)]


def watch_saves(reach: Callable[[str], None]) -> None:
    """Call `reach` before and in the middle of every write, rename and removal of a save in this process."""
    save, write, take, remove = (
        checkpoint.save_checkpoint, checkpoint._write, checkpoint.take_place, checkpoint._remove,
    )  # fmt: skip

    def watched_write(path: Path, content: bytes) -> None:
        reach(f"before {path.name}")
        path.write_bytes(content[: len(content) // 2])
        reach(f"half of {path.name}")
        write(path, content)

    def watched_take(aside: Path, place: Path) -> None:
        reach("before the rename")
        take(aside, place)
        reach("after the rename")

    def watched_remove(path: Path, folder: Path) -> None:
        reach(f"before removing {path.name}")
        if path.exists():
            path.rename(folder / "removed")
            next((folder / "removed").iterdir()).unlink()
            reach("half removed")
        remove(path, folder)

    def watched_save(*arguments: Any) -> Path:
        reach("begin")
        found = save(*arguments)
        reach("end")
        return found

    checkpoint._write, checkpoint.take_place, checkpoint._remove = watched_write, watched_take, watched_remove
    loop.save_checkpoint = watched_save


SHORT = {"max_steps": 8, "save_steps": 3, "save_total_limit": 1}
"""Saves after 3, 6 and 8 steps."""


def kill_at_every_point(toy: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Kill a run at each point of its second save in turn and let it go on; say how each ended."""

    def second_save(then: Callable[[str], None]) -> Callable[[str], None]:
        seen = {"saves": 0}

        def reach(name: str) -> None:
            seen["saves"] += name == "begin"
            if seen["saves"] == 2:
                then(name)

        return reach

    def note() -> None:
        with (folder / "points").open("a", encoding="utf-8") as file:
            watch_saves(second_save(lambda name: print(name, file=file, flush=True)))
            fit_toy(folder / "whole", toy, **SHORT)

    assert wait(fork(note)) == 0
    points = (folder / "points").read_text(encoding="utf-8").splitlines()
    found = []
    for number, point in enumerate(points):
        place, left = folder / str(number), iter(range(number, -1, -1))

        def killed(place: Path = place, left: Any = left) -> None:
            watch_saves(second_save(lambda _: None if next(left) else os.kill(os.getpid(), signal.SIGKILL)))
            fit_toy(place, toy, **SHORT)

        codes = [wait(fork(killed)), wait(fork(lambda place=place: fit_toy(place, toy, **SHORT)))]
        found.append([point, codes, outcome(place, folder / "whole")])
    return {"points": found}


def outcome(folder: Path, whole: Path) -> list[bool]:
    """Return whether adapter and metrics are those of the uninterrupted run."""
    return [sha256(folder) == sha256(whole), read_metrics(folder) == read_metrics(whole)]


def stop_one_of_two(toy: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Tell one of two processes to stop in its fifth step, and let both go on."""
    codes = [wait(pid) for pid in fork_two(lambda: fit_toy(folder / "whole", toy, **SHORT))]

    def stopped() -> None:
        if os.environ["RANK"] == "1":
            signal_at(5, signal.SIGTERM)
        try:
            fit_toy(folder / "two", toy, **SHORT)
        except StoppedError as error:
            raise SystemExit(75 if "step 5 of 8" in str(error) else 3) from error

    codes += [wait(pid) for pid in fork_two(stopped)]
    codes += [wait(pid) for pid in fork_two(lambda: fit_toy(folder / "two", toy, **SHORT))]
    return {"codes": codes, "outcome": outcome(folder / "two", folder / "whole")}


def signal_at(step: int, number: int) -> None:
    """Send this process a signal in the middle of an optimizer step."""
    backward = loop._Loop._backward

    def signalled(self: Any, *arguments: Any) -> torch.Tensor:
        if self.done + 1 == step:
            signal.raise_signal(number)
        return backward(self, *arguments)

    loop._Loop._backward = signalled


def kill_at_random(toy: dict[str, Any], folder: Path, *, kills: int, in_saves: int, processes: int) -> dict[str, Any]:
    """Kill runs at random moments, that many of them inside a save, until each is through; say how each ended."""
    generator = random.Random(0)
    counts, outcomes = {"kills": 0, "in_saves": 0}, []

    def start(place: Path, pipe: int) -> list[int]:
        def run() -> None:
            tell = {"begin": b"(", "end": b")"}
            if os.environ.get("RANK", "0") == "0":
                watch_saves(lambda name: os.write(pipe, tell.get(name, b"")))
            fit_toy(place, toy, max_steps=24, save_steps=2)

        errors = folder / "errors.txt"
        return [fork(run, errors=errors)] if processes == 1 else fork_two(run, errors=errors)

    def attempt(place: Path, *, aim: str = "") -> bool:
        reading, writing = os.pipe()
        began, pids = time.monotonic(), start(place, writing)
        os.close(writing)
        heard = b""
        if aim == "save":  # it takes milliseconds, so it is waited for, and then hit anywhere in it
            heard = b"".join(os.read(reading, 1) for _ in range(generator.choice([1, 3])))
            time.sleep(generator.random() * 0.01)
        elif aim:
            time.sleep(generator.random() * seconds)
        if aim:
            os.kill(generator.choice(pids), signal.SIGKILL)
        codes = [wait(pid) for pid in pids]
        while more := os.read(reading, 4096):
            heard += more
        os.close(reading)
        counts["kills"] += -signal.SIGKILL in codes
        counts["in_saves"] += -signal.SIGKILL in codes and heard.endswith(b"(")
        durations.append(time.monotonic() - began)
        return codes == [0] * processes

    durations: list[float] = []
    assert attempt(folder / "whole")
    seconds = durations[0]
    while counts["kills"] < kills or counts["in_saves"] < in_saves:
        place = folder / str(len(outcomes))
        for aim in ("save", "moment", "save", "moment", ""):
            if attempt(place, aim=aim):
                break
        outcomes.append(outcome(place, folder / "whole"))
    return {**counts, "outcomes": outcomes}


def main(base: str, folder: str, wanted: str) -> None:
    """Run scenarios on a base, given as JSON (name to numbers), and print what came of each as JSON."""
    torch.set_num_threads(1)
    scenarios = {"points": kill_at_every_point, "two": stop_one_of_two, "random": kill_at_random}
    found = {}
    for name, numbers in json.loads(wanted).items():
        place = Path(folder) / name
        place.mkdir()
        found[name] = scenarios[name](make_toy(Path(base)), place, **numbers)
    sys.stdout.write(json.dumps(found))


def run_scenarios(base: Path, folder: Path, **wanted: dict[str, int]) -> dict[str, Any]:
    """Run scenarios in a process of their own, which has started no thread; return what came of each."""
    command = [sys.executable, "-m", "tests.training.stopped_runs", str(base), str(folder), json.dumps(wanted)]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=root, timeout=3600)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


if __name__ == "__main__":
    main(*sys.argv[1:])
