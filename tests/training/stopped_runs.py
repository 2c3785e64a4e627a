"""Runs on a toy, stopped and killed: what test_checkpoint.py and test_kills.py share.

Started as a program it forks: the parent imports and loads once and starts no thread; each child is a run of its own,
one process or two. It prints what came of them as JSON.
"""

import csv
import json
import math
import os
import random
import signal
import subprocess
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch
from accelerate import Accelerator, PartialState

import lora_sentiment.tasks.metrics  # noqa: F401 - once, before the forks
from lora_sentiment.adapter.weights import save_weights
from lora_sentiment.data.batches import TextEncoder
from lora_sentiment.data.rows import Rows
from lora_sentiment.errors import StoppedError
from lora_sentiment.files import hash_file
from lora_sentiment.models.load import load_base
from lora_sentiment.models.wrap import make_trainable
from lora_sentiment.recipe.method import LoraMethod
from lora_sentiment.recipe.model import ModelConfig
from lora_sentiment.recipe.train import TrainConfig
from lora_sentiment.tasks import SINGLE_LABEL
from lora_sentiment.training import backward, checkpoint, loop
from lora_sentiment.training.checkpoint import Store
from lora_sentiment.training.optimizer import count_steps
from tests.conftest import free_port, toy_rows

SETTINGS = {"train.learning_rate": 0.01, "machine.threads": 1, "method.kind": "lora", "method.r": 4}
NUM_ROWS = 90
STEPS_PER_EPOCH = 6  # of 16 rows, the last one of 10


def make_toy(base_folder: Path, *, dropout: float = 0.2) -> dict[str, Any]:
    """Return what every run starts from: base, model section, rows."""
    config = ModelConfig(
        name=str(base_folder), max_length=16, dropout=dropout, attention_dropout=dropout
    )
    torch.manual_seed(0)  # for the head
    base = load_base(config, labels=("negative", "positive"))
    rows = toy_rows(NUM_ROWS)
    labels = np.array([int(label == "positive") for _, label in rows])
    encoded = TextEncoder.of(base.tokenizer, max_length=16, truncation="head").encode(
        Rows([text for text, _ in rows], labels, np.arange(NUM_ROWS))
    )
    return {"base": base, "config": config, "encoded": encoded}


def fit_toy(
    folder: Path,
    toy: dict[str, Any],
    *,
    method: Any = None,
    max_tokens: int = 100,
    scaler: Any = None,
    **values: Any,
) -> Any:
    """Train in this process, which is given up after it; return the history. The main process leaves an adapter."""
    method = method or LoraMethod(r=4, lora_alpha=8, lora_dropout=0.1)
    settings = {
        "batch_size": 16,
        "learning_rate": 1e-2,
        "num_train_epochs": 2.0,
        "eval_steps": 4,
        **values,
    }
    config = TrainConfig(**settings)
    folder.mkdir(parents=True, exist_ok=True)
    state = PartialState(cpu=True)
    accelerator = Accelerator()
    if scaler:
        accelerator.scaler, accelerator.native_amp, accelerator.state._mixed_precision = (
            scaler,
            True,
            "fp16",
        )
    torch.manual_seed(0)
    num_steps = count_steps(NUM_ROWS, config)
    model = make_trainable(
        toy["base"], method, toy["config"], dtype=torch.float32, num_steps=num_steps
    )
    torch.manual_seed(config.seed + state.process_index)
    history = loop.fit(
        model,
        train=toy["encoded"],
        validation=toy["encoded"],
        task=SINGLE_LABEL,
        numbers=np.arange(NUM_ROWS),
        config=config,
        method=method,
        accelerator=accelerator,
        max_tokens=max_tokens,
        store=Store(folder, SETTINGS, limit=config.save_total_limit),
    )
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
    port = str(free_port())

    def join(rank: int) -> None:
        place = {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
            "WORLD_SIZE": "2",
            "LOCAL_WORLD_SIZE": "2",
        }
        os.environ.update(place, RANK=str(rank), LOCAL_RANK=str(rank))
        run()

    return [fork(lambda rank=rank: join(rank), errors=errors) for rank in range(2)]


def sha256(folder: Path) -> str:
    """Return the hash of the adapter that a run left."""
    return hash_file(folder / "adapter.safetensors")


def read_metrics(folder: Path) -> list[dict[str, str]]:
    """Return the lines of metrics.csv without the one column that is of the clock."""
    with (folder / "metrics.csv").open(newline="", encoding="utf-8") as file:
        return [
            {key: value for key, value in row.items() if key != "seconds"}
            for row in csv.DictReader(file)
        ]


def watch_saves(reach: Callable[[str], None]) -> None:
    """Call `reach` before and in the middle of every write, rename and removal of a save in this process."""
    save, write, take, remove = (
        checkpoint.save_checkpoint, checkpoint._write, checkpoint.replace_atomically, checkpoint.remove,
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

    def watched_remove(path: Path) -> None:
        reach(f"before removing {path.name}")
        if path.exists():
            # A run that was killed just after it made the folder left it empty.
            for file in list(path.iterdir())[:1]:
                file.unlink()
            reach("half removed")
        remove(path)

    def watched_save(*arguments: Any) -> Path:
        reach("begin")
        found = save(*arguments)
        reach("end")
        return found

    checkpoint._write, checkpoint.replace_atomically, checkpoint.remove = (
        watched_write,
        watched_take,
        watched_remove,
    )
    loop.save_checkpoint = watched_save


SHORT = {"max_steps": 3, "save_steps": 1, "eval_steps": 2, "save_total_limit": 1}
"""Saves after each step; the second one is watched."""


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
            watch_saves(
                second_save(lambda _: None if next(left) else os.kill(os.getpid(), signal.SIGKILL))
            )
            fit_toy(place, toy, **SHORT)

        codes = [wait(fork(killed)), wait(fork(lambda place=place: fit_toy(place, toy, **SHORT)))]
        found.append([point, codes, outcome(place, folder / "whole")])
    return {"points": found}


def outcome(folder: Path, whole: Path) -> list[bool]:
    """Return whether adapter and metrics are those of the uninterrupted run."""
    return [sha256(folder) == sha256(whole), read_metrics(folder) == read_metrics(whole)]


MOMENTS = {
    "part 2 of step 5": (4, 5),
    "part 2 of step 6": (4, 6),
    "step 7": (6, 7),
    "evaluation 4": (4, 5),
    "evaluated 4": (4, 5),
}
"""During accumulation, in an epoch's last step, right after it, before and right after an evaluation.

To each: the steps after which a run that saves every second step goes on, killed there and told to stop there.
"""


def stop_at_moments(
    toy: dict[str, Any], folder: Path, *, processes: int, stops: list[tuple[str, str]]
) -> dict[str, Any]:
    """Send a signal to one process of a run at one of MOMENTS; say how each ended, and the same gone on with.

    To each moment and signal: its two pairs of exit codes, the steps gone on after, and whether the outcome is equal.
    """

    def start(place: Path, moment: str = "", *, number: int = 0, rank: int = 0) -> list[int]:
        def run() -> None:
            if moment and os.environ.get("RANK", "0") == str(rank):
                watch_training(lambda name: signal.raise_signal(number) if name == moment else None)
            try:
                history = fit_toy(place, toy, max_steps=8, save_steps=2, max_tokens=50)
            except StoppedError as error:
                raise SystemExit(75) from error
            (place / f"resumed {os.environ.get('RANK', '0')}").write_text(
                json.dumps(history.resumed)
            )

        errors = place.with_name(f"{place.name}.txt")
        return [
            wait(pid)
            for pid in (
                [fork(run, errors=errors)] if processes == 1 else fork_two(run, errors=errors)
            )
        ]

    assert start(folder / "whole") == [0] * processes
    found = {}
    for count, (kind, moment) in enumerate(stops):
        name, rank = f"{kind} {moment}", count % processes
        codes = [
            start(folder / name, moment, number=signal.Signals[kind], rank=rank),
            start(folder / name),
        ]
        resumed = [
            json.loads((folder / name / f"resumed {rank}").read_text()) for rank in range(processes)
        ]
        found[name] = [codes, resumed, outcome(folder / name, folder / "whole")]
    return found


def signal_at(step: int, number: int) -> None:
    """Send this process a signal in the middle of an optimizer step."""
    backward = loop._Loop._backward

    def signalled(self: Any, *arguments: Any) -> torch.Tensor:
        if self.done + 1 == step:
            signal.raise_signal(number)
        return backward(self, *arguments)

    loop._Loop._backward = signalled


def watch_training(reach: Callable[[str], None]) -> None:
    """Call `reach` at every step, micro-batch of one and evaluation of this process, and when all are done."""
    run, step, evaluate = loop._Loop.run, loop._Loop._step, loop._Loop._evaluate
    make_batch, parts = backward.make_batch, {"step": 0, "part": 0}

    def watched_run(self: Any) -> Any:
        history = run(self)
        reach("trained")
        return history

    def watched_step(self: Any, number: int, index: Any) -> Any:
        reach(f"step {number}")
        parts.update(step=number, part=0)
        return step(self, number, index)

    def watched_batch(*arguments: Any, **named: Any) -> Any:
        parts["part"] += 1
        reach(f"part {parts['part']} of step {parts['step']}")
        return make_batch(*arguments, **named)

    def watched_evaluate(self: Any, number: int) -> None:
        reach(f"evaluation {number}")
        evaluate(self, number)
        reach(f"evaluated {number}")

    loop._Loop.run, loop._Loop._step, loop._Loop._evaluate = (
        watched_run,
        watched_step,
        watched_evaluate,
    )
    backward.make_batch = watched_batch


def start_watched(place: Path, toy: dict[str, Any], processes: int) -> tuple[list[int], TextIO]:
    """Start a run that tells where it is, a line each; return its process ids, the main one's first, and the lines."""
    reading, writing = os.pipe()

    def run() -> None:
        os.close(reading)
        if os.environ.get("RANK", "0") == "0":
            watch_saves(lambda name: os.write(writing, f"{name}\n".encode()))
            watch_training(lambda name: os.write(writing, f"{name}\n".encode()))
        fit_toy(place, toy, max_steps=24, save_steps=2, max_tokens=50)

    errors = place.with_name(f"{place.name}.txt")
    pids = [fork(run, errors=errors)] if processes == 1 else fork_two(run, errors=errors)
    os.close(writing)
    return pids, os.fdopen(reading)


def kill_as_launched(killed: int, pids: list[int]) -> None:
    """Kill a process and, as torchrun would, tell the others to stop: in start-up they would wait for it forever."""
    os.kill(killed, signal.SIGKILL)
    time.sleep(0.1)
    for pid in pids:
        if pid != killed:
            os.kill(pid, signal.SIGTERM)


def find_phase(heard: list[str]) -> str:
    """Return what a run was doing when it was last heard of."""
    if not any(line.startswith("step ") for line in heard):
        return "start-up"
    last = heard[-1].split()[0]
    phases = {"part": "step", "evaluated": "between", "trained": "the end", "end": "between"}
    return last if last in ("step", "evaluation") else phases.get(last, "save")


def kill_at_random(
    toy: dict[str, Any], folder: Path, *, kills: int, in_saves: int, processes: int
) -> dict[str, Any]:
    """Kill runs at random moments, that many of them inside a save, until each is through; say how each ended.

    A kill counts once the run has begun its first step: start-up has little to lose.
    """
    generator = random.Random()
    phases: Counter[str] = Counter()
    points: Counter[str] = Counter()
    outcomes, seconds, restarts = [], {"run": 0.0, "save": 0.0}, 0

    def attempt(place: Path, *, aim: str = "") -> bool:
        nonlocal restarts
        saved = max(
            (int(path.name[5:]) for path in checkpoint.list_checkpoints(place)),
            default=0,
        )
        began = time.monotonic()
        pids, lines = start_watched(place, toy, processes)
        heard, times = [], []
        if aim == "moment":
            time.sleep(generator.random() * seconds["run"])
        else:  # a save takes milliseconds, so one is waited for, and then hit anywhere in it
            number = generator.randint(1, 3) if aim else math.inf
            for line in lines:
                heard.append(line.strip())
                times.append(time.monotonic())
                if heard.count("begin") == number:
                    time.sleep(generator.random() * seconds["save"])
                    break
        if aim:
            kill_as_launched(generator.choice(pids), pids)
        codes = [wait(pid) for pid in pids]
        heard += [line.strip() for line in lines]
        lines.close()
        if not seconds["run"]:
            begins, ends = (
                [t for line, t in zip(heard, times, strict=True) if line == x]
                for x in ("begin", "end")
            )
            seconds.update(run=times[-1] - began, save=(sum(ends) - sum(begins)) / len(ends))
        steps = [int(line.split()[1]) for line in heard if line.startswith("step ")]
        # From the newest checkpoint, and not anew, which would lead to the same bytes.
        assert steps[:1] in ([], [saved + 1]), (place, saved, steps)
        restarts += bool(saved and steps)
        if -signal.SIGKILL in codes:
            phases[phase := find_phase(heard)] += 1
            points.update(heard[-1:] if phase == "save" else ())
        return codes == [0] * processes

    assert attempt(folder / "whole")
    while phases.total() - phases["start-up"] < kills or phases["save"] < in_saves:
        place = folder / str(len(outcomes))
        for aim in ("save", "moment", "save", "moment", ""):
            if attempt(place, aim=aim):
                break
        outcomes.append(outcome(place, folder / "whole"))
    killed = {"phases": phases, "points": points, "seconds": seconds, "restarts": restarts}
    return {**killed, "kills": phases.total() - phases["start-up"], "outcomes": outcomes}


def main(base: str, folder: str, wanted: str) -> None:
    """Run scenarios on a base, given as JSON (name to numbers), and print what came of each as JSON."""
    torch.set_num_threads(1)
    scenarios: dict[str, Callable[..., Any]] = {
        "points": kill_at_every_point,
        "one": partial(stop_at_moments, processes=1),
        "two": partial(stop_at_moments, processes=2),
        "random": kill_at_random,
    }
    found = {}
    for name, numbers in json.loads(wanted).items():
        place = Path(folder) / name
        place.mkdir()
        found[name] = scenarios[name](make_toy(Path(base)), place, **numbers)
    sys.stdout.write(json.dumps(found))


def run_scenarios(base: Path, folder: Path, **wanted: dict[str, Any]) -> dict[str, Any]:
    """Run scenarios in a process of their own, which has started no thread; return what came of each."""
    command = [
        sys.executable,
        "-m",
        "tests.training.stopped_runs",
        str(base),
        str(folder),
        json.dumps(wanted),
    ]
    root = Path(__file__).parents[2]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=root, timeout=3600
    )
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


if __name__ == "__main__":
    main(*sys.argv[1:])
