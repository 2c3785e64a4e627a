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

from lora_sentiment.errors import ModelError
from lora_sentiment.evaluation.statistics import paired_bootstrap
from lora_sentiment.recipe.recipe import Recipe
from tests.conftest import BAD, FILLERS, GOOD

SCRIPT = Path(__file__).parents[2] / "benchmarks/methods.py"
sys.path.insert(0, str(SCRIPT.parent))
import methods  # noqa: E402
import methods_table  # noqa: E402
from journal import Journal  # noqa: E402

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


def test_every_method_has_as_many_rates_to_try():
    assert {len(set(rates)) for rates in methods.RATES.values()} == {3}
    assert all(min(rates) < rates[0] < max(rates) for rates in methods.RATES.values())


@pytest.mark.parametrize(
    "change", ["--base=other", "--epochs=3", "--rows=100", "--set=train.batch_size=8"]
)
def test_another_setting_is_another_run(arguments, change):
    def key(*more: str) -> str:
        found = methods.parse_arguments([*arguments, *more])
        return methods.make_job(
            found, methods.Row("sst5", "full"), stage="final", seed=42, rate=1e-4
        ).key

    assert key() == key()
    assert key(change) != key()


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


def test_a_torn_line_is_dropped(tmp_path):
    path = tmp_path / "methods.jsonl"
    path.write_text('{"key": "a"}\n{"key": "b", "met', encoding="utf-8")
    journal = Journal(path)
    assert list(journal.lines) == ["a"]
    journal.append({"key": "c"})
    assert list(Journal(path).lines) == ["a", "c"]


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


def test_equal_accuracy_is_decided_by_the_log_loss():
    def line(rate: float, log_loss: float) -> dict:
        return {"rate": rate, "metrics": {"validation": {"accuracy": 0.5, "log_loss": log_loss}}}

    row = methods.Row("sst5", "full", tries=[line(1.0, 0.7), line(2.0, 0.6), line(3.0, 0.8)])
    assert row.rates == [2.0, 1.0, 3.0]


def test_a_rate_that_does_not_hold_in_the_whole_run_gives_way_to_the_next(
    arguments, fake_runs, tmp_path, monkeypatch
):
    plain = methods.run_isolated

    def run(job: methods.Job, cache: Path) -> dict:
        line = plain(job, cache)
        if job.stage == "final" and job.rate in lost:
            line["metrics"]["validation"] = {
                **line["metrics"]["validation"],
                "accuracy": 0.2 - 100 * job.rate,
            }
        return line

    monkeypatch.setattr(methods, "run_isolated", run)
    lost = [5e-5]
    methods.main([*arguments, "--tries=3", "--seeds=2", "--methods", "full"])
    finals = [(job.rate, job.seed) for job in fake_runs if job.stage == "final"]
    assert finals == [(5e-5, 42), (2e-5, 42), (2e-5, 43)]
    assert table_rows(tmp_path / "out")["full"][3] == "2e-05 (edge)"
    assert "| 5e-05: 0.1950 |" in (tmp_path / "out/methods.md").read_text(encoding="utf-8")
    # Where none holds, the best of them stands.
    lost += [2e-5, 1e-4]
    methods.main([*arguments, "--tries=3", "--methods", "full", "--out", str(tmp_path / "none")])
    assert table_rows(tmp_path / "none")["full"][3] == "2e-05 (edge)"


def test_another_page_names_itself_and_its_methods(arguments, fake_runs, tmp_path):
    assert methods.main([*arguments, "--name=own", "--methods", *TWO]) == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"own.md", "own.jsonl"}
    assert "--methods full 'LoRA q,v' --name own " in (tmp_path / "out/own.md").read_text(
        encoding="utf-8"
    )


def test_a_rate_that_diverged_is_never_chosen(arguments, fake_runs, tmp_path, monkeypatch):
    plain = methods.run_isolated

    def run(job: methods.Job, cache: Path) -> dict:
        line = plain(job, cache)
        if job.rate == 5e-5:
            del line["metrics"]
            line["failed"] = "step 3: the loss is nan"
        return line

    monkeypatch.setattr(methods, "run_isolated", run)
    assert methods.main([*arguments, "--tries=3", "--methods", "full"]) == 0
    text = (tmp_path / "out/methods.md").read_text(encoding="utf-8")
    assert table_rows(tmp_path / "out")["full"][3] == "2e-05 (edge)"
    assert "5e-05: failed" in text


def test_a_run_that_cannot_be_made_leaves_the_others(
    arguments, fake_runs, tmp_path, monkeypatch, capsys
):
    plain = methods.run_isolated

    def run(job: methods.Job, cache: Path) -> dict:
        if job.method == "full":
            raise ModelError("no such base")
        return plain(job, cache)

    monkeypatch.setattr(methods, "run_isolated", run)
    assert methods.main([*arguments, "--methods", *TWO]) == 1
    assert "sst5 full: no such base" in capsys.readouterr().err
    rows = table_rows(tmp_path / "out")
    assert rows["LoRA q,v"][4].startswith("0.6667")
    assert rows["LoRA q,v"][6:8] == ["", ""]
    assert rows["full"][0] == "not finished"


def test_a_final_run_whose_rows_the_journal_lacks_is_run_again_and_never_rendered_away(
    arguments, fake_runs, tmp_path
):
    methods.main([*arguments, "--methods", "full"])
    journal, page = tmp_path / "out/methods.jsonl", tmp_path / "out/methods.md"
    lines = [json.loads(line) for line in journal.read_text(encoding="utf-8").splitlines()]
    old = [{key: value for key, value in line.items() if key != "right"} for line in lines]
    journal.write_text("".join(json.dumps(line) + "\n" for line in old), encoding="utf-8")
    before = page.read_text(encoding="utf-8")
    with pytest.raises(SystemExit, match="does not say which rows"):
        methods.main([*arguments, "--methods", "LoRA q,v", "full", "--render"])
    assert page.read_text(encoding="utf-8") == before
    methods.main([*arguments, "--methods", "full"])
    assert [job.stage for job in fake_runs] == ["try", "final", "final"]


def test_rendering_runs_nothing(arguments, fake_runs, tmp_path):
    assert methods.main([*arguments, "--methods", "full", "--render"]) == 0
    assert fake_runs == []
    methods.main([*arguments, "--methods", "full"])
    (tmp_path / "out/methods.md").unlink()
    methods.main([*arguments, "--methods", *TWO, "--render"])
    assert len(fake_runs) == 2
    assert table_rows(tmp_path / "out")["full"][4].startswith("0.6667")


def test_the_page_says_what_it_was_made_from(arguments, fake_runs, tmp_path, sst5):
    methods.main([*arguments, "--methods", *TWO])
    text = (tmp_path / "out/methods.md").read_text(encoding="utf-8")
    for fact in (
        "`tiny`",
        "`SetFit/sst5`",
        "2030-01-01",
        "x 1",
        "seeds 42",
        "--tries-rows 60",
        "judged on the 300 of test",
    ):
        assert fact in text
    assert str(tmp_path) not in text


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


def test_neither_is_said_where_the_rows_do_not_tell():
    found = methods_table.compare_rows(np.roll(right(200, 300), 20), right(200, 300))
    assert found.value == 0
    assert not methods_table.is_not_worse(found)
    assert found.high > 0


def test_a_folder_without_one_file_a_split_is_refused(arguments, sst5):
    (sst5 / "test.csv").rename(sst5 / "held_out.csv")
    with pytest.raises(SystemExit, match="no file for test"):
        methods.main([*arguments, "--methods", "full"])


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
