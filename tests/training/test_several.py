"""Several processes and machines: the figures of one, and an end for all where one fails."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from lora_sentiment.files import hash_file
from lora_sentiment.recipe.recipe import Recipe
from lora_sentiment.train import train
from tests.conftest import CORES, free_port, toy_rows, write_csv
from tests.training.two_processes import WEIGHED

ROOT = Path(__file__).parents[2]
COUNTED = ("accuracy", "macro_f1", "mcc")
"""Metrics of labels alone: equal to the last bit, unless two logits of a row are closer than rounding."""
SECONDS_TO_END = 30


@pytest.fixture(scope="module")
def recipe(tiny_base, tmp_path_factory) -> Path:
    """A recipe of seven steps that is judged on 101 rows, which no two processes share evenly."""
    folder = tmp_path_factory.mktemp("several")
    rows = toy_rows(221)
    write_csv(folder / "train.csv", rows[:120])
    write_csv(folder / "test.csv", rows[120:])
    write_csv(folder / "own.csv", rows[100:])
    for rank in range(2):
        write_csv(
            folder / f"bad{rank}.csv", [*rows[120:139], ("some words", "neither"), *rows[140:]]
        )
    (folder / "toy.yaml").write_text(
        f"data: {{source: {{train: {folder}/train.csv, test: {folder}/test.csv}}}}\n"
        f"model: {{name: {tiny_base}, max_length: 16, dtype: float32}}\n"
        "method: {r: 4, lora_alpha: 8}\n"
        "train: {num_train_epochs: 1, batch_size: 16, learning_rate: 1e-2, max_tokens_per_micro_batch: 100}\n",
        encoding="utf-8",
    )
    return folder / "toy.yaml"


def start(
    recipe: Path,
    *overrides: str,
    torchrun: tuple[str, ...],
    cores: list[int],
    script=("-m", "lora_sentiment.train"),
):
    """Start a launcher that may use these cores only, so that every process has one thread."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        *torchrun,
        *script,
        str(recipe),
        *overrides,
    ]
    launcher = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
        env={**os.environ, "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": str(ROOT)}, start_new_session=True,
        preexec_fn=lambda: os.sched_setaffinity(0, cores),
    )  # fmt: skip
    LAUNCHERS.append(launcher)
    return launcher


LAUNCHERS = []


@pytest.fixture(autouse=True, scope="module")
def end_what_a_failure_left():
    yield
    for launcher in LAUNCHERS:
        if launcher.poll() is None:
            os.killpg(launcher.pid, signal.SIGKILL)


def start_two_machines(recipe: Path, *overrides: str, **values):
    """Start two launchers of one process each, as two machines would, each at an address of its own."""
    place = ("--master_addr", "127.0.0.1", "--master_port", str(free_port()))
    where = ("--nnodes", "2", "--nproc_per_node", "1", *place)
    return [
        start(
            recipe,
            *overrides,
            torchrun=(*where, "--node_rank", str(rank), "--local_addr", f"127.0.0.{rank + 1}"),
            cores=[CORES[rank % len(CORES)]],
            **values,
        )
        for rank in range(2)
    ]


@pytest.fixture(scope="module")
def launched(recipe) -> dict[str, dict]:
    """The results of launches of two processes, by name."""
    command = [sys.executable, "-m", "tests.training.two_processes", str(recipe)]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=ROOT, timeout=600
    )
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


def test_two_processes_train_as_one(recipe, launched):
    """Other rows are batched together, so the last bits of a logit differ: fp32 has 24."""
    assert launched["two"]["codes"] == [0, 0], launched["two"]["text"]
    folder = recipe.parent / "two"
    one = train(Recipe.load(recipe, [*WEIGHED, f"output.dir={recipe.parent}/one"]))
    with (recipe.parent / "two.run/metrics.csv").open(newline="") as file:
        losses = [float(row["loss"]) for row in csv.DictReader(file) if row["loss"]]
    assert losses == pytest.approx([point.loss for point in one.history.steps], abs=1e-4)
    report = json.loads((folder / "report.json").read_text())
    assert report["data"] == one.report["data"]
    assert report["data"]["test"]["rows"] == 101
    for role in ("validation", "test"):
        assert len(report[role]) == 8
        for metric, found in report[role].items():
            tolerance = 1e-12 if metric in COUNTED else 1e-5
            own = one.report[role][metric]
            assert found.keys() == own.keys()
            for key, value in found.items():
                same = value == (
                    own[key]
                    if isinstance(value, str)
                    else pytest.approx(own[key], abs=tolerance, rel=0)
                )
                assert same, (role, metric, key)
    assert launched["two"]["text"].count("saved and verified") == 1


def test_two_processes_add_up_to_the_gradients_of_the_stock_encoder(recipe, launched):
    """At the first step, tensor by tensor."""
    stock = load_file(recipe.parent / "stock.safetensors")
    fast = load_file(recipe.parent / "fast.safetensors")
    assert stock.keys() == fast.keys()
    assert sum("lora_A" in name for name in stock) == 12
    for name, expected in stock.items():
        assert (fast[name] - expected).norm() <= 1e-4 * expected.norm(), name


@pytest.mark.slow  # four processes import everything
def test_two_machines_train_as_two_processes(recipe, launched):
    """Without a common disk: only the first machine's main process uses the run's folder."""
    folder = recipe.parent / "machines"
    launchers = start_two_machines(recipe, *WEIGHED, f"output.dir={folder}")
    (first, errors), (second, no_errors) = [
        launcher.communicate(timeout=300) for launcher in launchers
    ]
    assert [launcher.returncode for launcher in launchers] == [0, 0], errors + no_errors
    two = recipe.parent / "two"
    for name in ("adapter_model.safetensors", "predictions.safetensors"):
        assert hash_file(folder / name) == hash_file(two / name), name
    assert "test (95 % intervals)" in first
    assert second == ""
    assert errors.count("saved and verified") == 1
    assert "saved" not in no_errors


LOST = "error: another process of this launch ended, so this one ends too"


@pytest.mark.parametrize(
    ("how", "code", "said"),
    [
        ("killed in a step", -9, LOST),
        (
            "out of memory in an evaluation",
            1,
            "error (process 1): step 8: memory ran out in the optimizer",
        ),
    ],
)
def test_one_process_that_fails_ends_the_other_with_the_reason(launched, how, code, said):
    """The connection breaks with the process, so no patience of a collective is waited for."""
    found = launched[how]
    assert found["codes"] == [1, code], found["text"]
    assert found["seconds"] < SECONDS_TO_END
    assert found["text"].count(said) == found["text"].count(LOST) == 1
    assert "Traceback" not in found["text"]


def test_machines_that_read_other_rows_are_refused_by_all_alike(launched):
    found = launched["other test rows"]
    assert found["codes"] == [1, 1], found["text"]
    assert found["text"].count("process 1 has another ") == 2
    differs = found["text"].partition("process 1 has another ")[2].partition(" than process 0")[0]
    assert "test" in differs


def test_what_lies_where_another_machine_writes_nothing_is_no_matter(launched):
    assert launched["a folder of its own"]["codes"] == [0, 0], launched["a folder of its own"][
        "text"
    ]


def test_the_same_bad_row_in_files_of_other_names_does_not_cost_the_adapter(launched):
    found = launched["the same bad row in files of their own"]
    assert found["codes"] == [1, 1], found["text"]
    assert found["text"].count(": row 20: label 'neither'") == 2
    assert found["text"].count("the adapter is saved in") == 2
    assert "process 1 has another" not in found["text"]


@pytest.mark.slow
def test_a_process_killed_on_one_machine_ends_the_other(recipe, tmp_path):
    script = tmp_path / "killed.py"
    script.write_text(
        "import os, sys\n"
        "from lora_sentiment import cli\n"
        "from tests.training.two_processes import fail_in_step, kill\n"
        "if os.environ['RANK'] == '1':\n    fail_in_step(kill)\n"
        "cli.main(['train', *sys.argv[1:]])\n"
    )
    launchers = start_two_machines(recipe, f"output.dir={tmp_path}/a", script=(str(script),))
    _, second = launchers[1].communicate(timeout=300)
    began = time.monotonic()
    _, first = launchers[0].communicate(timeout=SECONDS_TO_END)
    assert time.monotonic() - began < SECONDS_TO_END
    assert [launcher.returncode for launcher in launchers] == [1, 1]
    assert LOST in first
    assert "Signal 9 (SIGKILL)" in second
    assert not (tmp_path / "a").exists()
