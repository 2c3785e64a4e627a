"""Launches of two processes, for test_several.py.

Started as a program it forks, as stopped_runs.py does: the parent imports once and starts no thread;
each child is a process of a launch. It prints the results of the launches as JSON.
"""

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

import lora_sentiment.tasks.metrics
import lora_sentiment.train  # noqa: F401 - once, before the forks
from lora_sentiment import cli
from lora_sentiment.training import loop
from tests.training.stopped_runs import fork, fork_two, wait

PLAIN = ("model.dropout=0", "model.attention_dropout=0", "model.seq_classif_dropout=0")
WEIGHED = (*PLAIN, "train.class_weights=[1, 3]", "train.label_smoothing_factor=0.1")
GRADIENTS = (
    *WEIGHED,
    "train.max_steps=1",
    # With B = 0, the usual start, A gets no gradient.
    "method.init_lora_weights=orthogonal",
    "method.target_modules=all-linear",
)


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def run_out_of_memory() -> None:
    raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 byte")


def fail_in_step(fail: Callable[[], None]) -> None:
    """Let this process fail in its fourth optimizer step."""
    backward = loop._Loop._backward

    def failing(self: Any, *arguments: Any) -> Any:
        if self.done == 3:
            fail()
        return backward(self, *arguments)

    loop._Loop._backward = failing


def fail_in_evaluation(fail: Callable[[], None]) -> None:
    """Let this process fail at the first evaluation on validation."""

    def failing(*arguments: Any, **values: Any) -> Any:
        fail()

    loop.predict_logits = failing


def save_gradients(path: Path) -> None:
    """Let the main process save the gradients of the first step, added up over the processes."""
    reduce = loop._Loop._reduce

    def saving(self: Any, loss: Any) -> Any:
        reduced = reduce(self, loss)
        if self.accelerator.is_main_process:
            gradients = {}
            for name, parameter in self.parameters.items():
                if parameter.grad is not None:
                    gradients[name] = parameter.grad.clone()
            save_file(gradients, path)
        return reduced

    loop._Loop._reduce = saving


def launch(
    recipe: Path,
    name: str,
    *overrides: str,
    second: tuple[str, ...] = (),
    fail: Callable[[], None] | None = None,
) -> dict[str, Any]:
    """Train with two processes; return their exit codes, their output and the seconds between them.

    Args:
        recipe: The recipe.
        name: Names the output folder.
        overrides: Of both processes.
        second: More overrides of the second process, as on a machine with a disk of its own.
        fail: What the second process calls before it trains.
    """
    errors = recipe.with_name(f"{name}.txt")

    def run() -> None:
        arguments = ["output.overwrite=true", f"output.dir={recipe.parent}/{name}", *overrides]
        rank = os.environ["RANK"]
        if rank == "1":
            arguments += second
            if fail:
                fail()
        cli.main(["train", str(recipe), *(each.replace("RANK", rank) for each in arguments)])

    main, other = fork_two(run, errors=errors)
    try:
        codes = [wait(other)]
    except AssertionError:
        os.kill(main, signal.SIGKILL)
        raise
    began = time.monotonic()
    codes.insert(0, wait(main))
    text = errors.read_text(encoding="utf-8", errors="replace")
    return {"codes": codes, "seconds": time.monotonic() - began, "text": text}


def compare_gradients(recipe: Path) -> None:
    """Save the gradients of the stock encoder in one process, and of the fast one in two."""

    def run(engine: str) -> None:
        save_gradients(recipe.with_name(f"{engine}.safetensors"))
        folder = f"output.dir={recipe.parent}/gradients-{engine}"
        cli.main(["train", str(recipe), *GRADIENTS, f"train.engine={engine}", folder])

    errors = recipe.with_name("gradients.txt")
    stock = fork(lambda: run("stock"), errors=errors)
    fast = fork_two(lambda: run("fast"), errors=errors)
    codes = [wait(pid) for pid in (stock, *fast)]
    assert codes == [0, 0, 0], errors.read_text(encoding="utf-8")


def source(recipe: Path, train: str, test: str) -> str:
    return f"data.source={{train: {recipe.parent}/{train}.csv, test: {recipe.parent}/{test}.csv}}"


def main(recipe: Path) -> None:
    own_folder = (f"output.dir={recipe.parent}", "output.overwrite=false")
    failures: dict[str, Callable[[], None]] = {
        "killed in a step": lambda: fail_in_step(kill),
        "out of memory in an evaluation": lambda: fail_in_evaluation(run_out_of_memory),
    }
    found = {name: launch(recipe, name, fail=fail) for name, fail in failures.items()}
    found["two"] = launch(recipe, "two", *WEIGHED)
    found["other test rows"] = launch(
        recipe, "other test rows", second=(source(recipe, "train", "own"),)
    )
    found["a folder of its own"] = launch(recipe, "a folder of its own", second=own_folder)
    found["the same bad row in files of their own"] = launch(
        recipe, "the same bad row in files of their own", source(recipe, "train", "badRANK")
    )
    compare_gradients(recipe)
    sys.stdout.write(json.dumps(found))


if __name__ == "__main__":
    # One thread for each process of a pair, and so the same bits as on two machines of one core.
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])
    main(Path(sys.argv[1]))
