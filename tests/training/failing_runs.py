"""Launches of two processes of which one fails: what test_several.py starts as a program, and where each one fails.

It forks, as stopped_runs.py does: the parent imports once and starts no thread; each child is a process of a launch. It
prints what came of them as JSON.
"""

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lora_sentiment.train  # noqa: F401 - once, before the forks
from lora_sentiment import cli
from lora_sentiment.errors import DataError
from lora_sentiment.training import loop
from tests.training.stopped_runs import fork_two, wait


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def find_bad_row() -> None:
    raise DataError("row 7: is bad, and only here")


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
    """Let this process fail where it first judges validation."""

    def failing(*arguments: Any, **values: Any) -> Any:
        fail()

    loop.predict_logits = failing


FAILURES: dict[str, Callable[[], None]] = {
    "killed in a step": lambda: fail_in_step(kill),
    "killed in an evaluation": lambda: fail_in_evaluation(kill),
    "an error in a step": lambda: fail_in_step(find_bad_row),
    "out of memory in an evaluation": lambda: fail_in_evaluation(run_out_of_memory),
    "other train rows": lambda: None,
    "other test rows": lambda: None,
    "a folder of its own": lambda: None,
    "the same bad row in files of their own": lambda: None,
}


def launch(recipe: Path, name: str) -> dict[str, Any]:
    """Start two processes, of which the second fails; say how both ended, what they wrote, and after how long."""
    errors = recipe.with_name(f"{name}.txt")

    def run() -> None:
        overrides = ["output.overwrite=true", f"output.dir={recipe.parent}/{name}"]
        if name == "the same bad row in files of their own":
            bad = f"{recipe.parent}/bad{os.environ['RANK']}.csv"
            overrides.append(f"data.source={{train: {recipe.parent}/train.csv, test: {bad}}}")
        if os.environ["RANK"] == "1":
            FAILURES[name]()
            # As on a machine with a disk of its own.
            overrides += {
                "other train rows": [
                    f"data.source={{train: {recipe.parent}/own.csv, test: {recipe.parent}/test.csv}}"
                ],
                "other test rows": [
                    f"data.source={{train: {recipe.parent}/train.csv, test: {recipe.parent}/own.csv}}"
                ],
                "a folder of its own": [f"output.dir={recipe.parent}", "output.overwrite=false"],
            }.get(name, [])
        cli.main(["train", str(recipe), *overrides])

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


if __name__ == "__main__":
    recipe = Path(sys.argv[1])
    sys.stdout.write(json.dumps({name: launch(recipe, name) for name in FAILURES}))
