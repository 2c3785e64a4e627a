"""The benchmark of methods: what it runs, that it goes on after a kill, and what its table claims."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from lora_sentiment.evaluation.statistics import paired_bootstrap
from lora_sentiment.recipe.recipe import Recipe
from tests.conftest import BAD, FILLERS, GOOD

SCRIPT = Path(__file__).parents[2] / "benchmarks/methods.py"
sys.path.insert(0, str(SCRIPT.parent))
import methods  # noqa: E402
import methods_table  # noqa: E402

TWO = ["full", "LoRA q,v"]


@pytest.fixture
def sst5(tmp_path: Path) -> Path:
    """A folder with train, validation and test in five classes."""
    folder = tmp_path / "sst5"
    folder.mkdir()
    words = [*GOOD, *BAD]
    for split, num_rows, first in (("train", 80, 0), ("validation", 20, 100), ("test", 30, 200)):
        with (folder / f"{split}.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["text", "label"])
            for i in range(first, first + num_rows):
                writer.writerow(
                    [
                        f"{FILLERS[i % 14]} {words[i % 5]} {FILLERS[(i * 3) % 14]} {'abcdefgh'[i % 8]}",
                        i % 5,
                    ]
                )
    return folder


@pytest.fixture
def arguments(sst5: Path, tiny_base: Path, tmp_path: Path) -> list[str]:
    """The command line of a benchmark that takes seconds."""
    return [
        f"--data=sst5={sst5}",
        f"--base={tiny_base}",
        f"--out={tmp_path}/out",
        f"--cache={tmp_path}/cache",
        "--tries=1",
        "--tries-rows=60",
        "--epochs=1",
        *("--set=model.max_length=12", "--set=model.dtype=float32", "--set=train.batch_size=20"),
    ]


def table_rows(folder: Path) -> dict[str, list[str]]:
    """Return the table of final runs: method to its cells."""
    lines = (folder / "methods.md").read_text(encoding="utf-8").splitlines()
    cells = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("| ")
    ]
    return {row[0]: row[1:] for row in cells if len(row) == 13}


def fake_line(job: methods.Job, *, accuracy: float) -> dict:
    """Return what a run would have written, without running."""
    figures = {"accuracy": accuracy, "macro_f1": accuracy, "log_loss": 1.0}
    parameters = {"trainable": 10, "share": 0.1, "adapter_bytes": 100}
    cost = {
        "seconds": 1.0,
        "wall_seconds": 2.0,
        "tokens_per_second": 3.0,
        "peak_memory_bytes": 2**20,
        "engine": "fast",
    }
    return {
        **{
            "key": job.key,
            "dataset": job.dataset,
            "method": job.method,
            "stage": job.stage,
            "seed": job.seed,
        },
        **{
            "rate": job.rate,
            "epochs": 1,
            "base": "b",
            "source": "SetFit/sst5",
            "machine": "m",
            "versions": {"x": "1"},
        },
        **{
            "date": "2030-01-01",
            "rows": {"train": 5, "validation": 6, "test": 300},
            "parameters": parameters,
        },
        **{"metrics": {"validation": figures, "test": figures}, "train": cost},
        **({"right": methods.pack(np.arange(300) < 200)} if job.stage == "final" else {}),
    }


@pytest.fixture
def fake_runs(monkeypatch: pytest.MonkeyPatch) -> list[methods.Job]:
    """Replace runs by figures: the middle rate is the best, and every final run has 200 of 300 rows right."""
    jobs: list[methods.Job] = []

    def run(job: methods.Job, cache: Path) -> dict:
        jobs.append(job)
        return fake_line(
            job, accuracy=0.5 - 0.1 * methods.RATES[methods.METHODS[job.method][0]].index(job.rate)
        )

    monkeypatch.setattr(methods, "run_isolated", run)
    return jobs


@pytest.mark.parametrize("dataset", methods.DATASETS)
def test_every_method_makes_a_valid_recipe_and_a_run_of_its_own(dataset):
    found = methods.parse_arguments(["--datasets", dataset])
    keys = set()
    for method, (family, _) in methods.METHODS.items():
        for rate in methods.RATES[family]:
            for stage in ("try", "final"):
                job = methods.make_job(
                    found, methods.Row(dataset, method), stage=stage, seed=42, rate=rate
                )
                recipe = Recipe.load(job.recipe, job.overrides)
                keys.add(job.key)
                assert recipe.train.learning_rate == rate
                assert recipe.data.max_train_rows == (10_000 if stage == "try" else None)
                assert ("test" in (recipe.data.splits or {})) == (stage == "final")
    assert len(keys) == len(methods.METHODS) * 3 * 2


def test_a_killed_benchmark_goes_on_where_it_was(arguments, tmp_path, monkeypatch):
    """In this process, the kill at the start of the third of four runs."""
    begun: list[methods.Job] = []

    def run(job: methods.Job, cache: Path) -> dict:
        begun.append(job)
        if len(begun) == 3:
            raise KeyboardInterrupt
        return methods.run_job(job, cache)

    monkeypatch.setattr(methods, "run_isolated", run)
    with pytest.raises(KeyboardInterrupt):
        methods.main([*arguments, "--methods", *TWO])
    journal = tmp_path / "out/methods.jsonl"
    finished = journal.read_text(encoding="utf-8")
    assert [json.loads(line)["stage"] for line in finished.splitlines()] == ["try", "final"]
    assert methods.main([*arguments, "--methods", *TWO]) == 0
    assert [job.method for job in begun] == ["full", "full", "LoRA q,v", "LoRA q,v", "LoRA q,v"]
    assert journal.read_text(encoding="utf-8").startswith(finished)
    lines = [json.loads(line) for line in journal.read_text(encoding="utf-8").splitlines()]
    assert len(lines) == 4
    for line in lines:
        assert line["rows"]["train"] == (60 if line["stage"] == "try" else 80)
        assert ("test" in line["metrics"]) == (line["stage"] == "final")
        assert line["train"]["tokens_per_second"] > 0
        assert line["parameters"]["trainable"] > 0
    for line in lines[1::2]:
        right = methods.unpack(line)
        assert right.mean() == pytest.approx(line["metrics"]["test"]["accuracy"])
        assert len(right) == line["rows"]["test"] == 30
    assert list((tmp_path / "cache").iterdir()) == []
    assert list(table_rows(tmp_path / "out")) == ["method", *TWO]


def test_the_best_rate_on_validation_gets_the_final_runs(arguments, fake_runs, tmp_path):
    methods.main([*arguments, "--tries=3", "--seeds=2", "--methods", *TWO])
    finals = [(job.method, job.rate, job.seed) for job in fake_runs if job.stage == "final"]
    assert finals == [
        ("full", 5e-5, 42),
        ("full", 5e-5, 43),
        ("LoRA q,v", 1e-3, 42),
        ("LoRA q,v", 1e-3, 43),
    ]
    assert {job.seed for job in fake_runs if job.stage == "try"} == {42}


def right(num_right: int, num_rows: int = 2000) -> np.ndarray:
    return (np.arange(num_rows) < num_right)[None]


def test_one_seed_is_the_paired_bootstrap():
    ours, reference = np.random.default_rng(0).random((2, 1, 400)) < 0.7
    expected = paired_bootstrap(ours[0], reference[0], num_resamples=methods_table.NUM_RESAMPLES)
    assert methods_table.compare_rows(ours, reference) == expected


def test_seeds_that_differ_widen_the_interval():
    alike = np.repeat(right(1000), 3, axis=0)
    apart = np.concatenate([right(800), right(1000), right(1200)])
    reference = np.repeat(right(1000), 3, axis=0)
    assert methods_table.compare_rows(alike, reference).low == 0
    found = methods_table.compare_rows(apart, reference)
    assert found.value == 0
    assert found.low < -0.05


@pytest.mark.parametrize(
    ("num_right", "verdict"),
    [
        (1500, "not worse"),
        (1499, "not worse"),
        (1490, "worse"),
        (1400, "worse"),
        (1600, "not worse"),
    ],
)
def test_not_worse_only_where_the_lower_end_is_above_the_margin(
    num_right, verdict, arguments, tmp_path
):
    found = methods.parse_arguments(arguments)
    rows = []
    for method, bits in (("full", right(1500)), ("LoRA q,v", right(num_right))):
        row = methods.Row("sst5", method)
        job = methods.make_job(found, row, stage="final", seed=42, rate=1e-3)
        row.tries, row.finals, row.right = (
            [fake_line(job, accuracy=0.5)],
            [fake_line(job, accuracy=0.5)],
            bits,
        )
        rows.append(row)
    (tmp_path / "methods.md").write_text(methods_table.render(rows, found), encoding="utf-8")
    assert table_rows(tmp_path)["LoRA q,v"][7] == verdict
    smallest = "The smallest that is not worse than full fine-tuning: LoRA q,v."
    assert (smallest in (tmp_path / "methods.md").read_text(encoding="utf-8")) == (
        verdict == "not worse"
    )


@pytest.mark.slow
def test_nothing_is_left_running_after_a_kill_and_the_table_is_made(arguments, tmp_path):
    command = [sys.executable, str(SCRIPT), *arguments, "--methods", *TWO]
    environment = {**os.environ, "PYTHONPATH": str(SCRIPT.parents[1])}
    script = subprocess.Popen(command, env=environment, start_new_session=True)
    journal = tmp_path / "out/methods.jsonl"
    deadline = time.monotonic() + 300
    while not journal.is_file() and script.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    script.send_signal(signal.SIGKILL)
    script.wait()
    num_finished = len(journal.read_text(encoding="utf-8").splitlines())
    for _ in range(100):
        if not is_group_alive(script.pid):
            break
        time.sleep(0.1)
    assert not is_group_alive(script.pid)
    assert 1 <= num_finished < 4
    subprocess.run(command, env=environment, check=True)
    lines = [json.loads(line) for line in journal.read_text(encoding="utf-8").splitlines()]
    assert len({line["key"] for line in lines}) == len(lines) == 4
    assert list(table_rows(tmp_path / "out")) == ["method", *TWO]


def is_group_alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True
