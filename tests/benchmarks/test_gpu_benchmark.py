"""The benchmark for a GPU and `make gpu`: all of it walks on a CPU, and its page is made of its lines alone."""

import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks/gpu.py"
sys.path.insert(0, str(SCRIPT.parent))
import gpu  # noqa: E402
import gpu_check  # noqa: E402
import gpu_parts  # noqa: E402
from gpu_table import AIMS, render  # noqa: E402


@pytest.fixture
def here(monkeypatch):
    """Run the parts in this process."""
    monkeypatch.setattr(
        gpu, "run_isolated", lambda function, *given, log, preload: function(*given)
    )


@pytest.fixture
def settings(tiny_base, tmp_path):
    return gpu_parts.Settings(
        "now", tmp_path, None, {}, str(tiny_base), 300, time.time() + 300, True
    )


def read(folder):
    """The last line of each row."""
    found = map(json.loads, (folder / "gpu.jsonl").read_text(encoding="utf-8").splitlines())
    return {(line["part"], line["row"]): line for line in found}


@pytest.mark.slow
@pytest.mark.usefixtures("here", "one_thread")
def test_every_part_walks_on_a_cpu(tiny_base, toy, tmp_path, monkeypatch):
    run_command, commands = gpu_parts.run_command, []

    def run_one(recipe, overrides, settings, *, limit):
        """The whole command for the bundled base takes longer, and shows the same."""
        commands.append(recipe)
        return run_command(
            "imdb_lora",
            [f"model.name={tiny_base}", "data.source=bundled", *small],
            settings,
            limit=limit,
        )

    small = ["model.max_length=16"]
    monkeypatch.setattr(gpu_parts, "run_command", run_one)
    assert gpu.main(["--quick", f"--out={tmp_path}/out", "--only", "quickstart"]) == 0
    line = read(tmp_path / "out")["whole", "recipes/quickstart.yaml"]
    assert (commands, line["steps"], line["test_rows"]) == (["quickstart"], 2, 100)
    assert 0 < line["seconds"] < line["wall_seconds"]
    assert (
        0 <= line["accuracy"]["low"] <= line["accuracy"]["value"] <= line["accuracy"]["high"] <= 1
    )

    monkeypatch.setattr(gpu_parts, "run_command", lambda *given, **more: {"failed": "not here"})
    shutil.rmtree(tmp_path / "out")
    status = gpu.main(["--quick", f"--out={tmp_path}/out", f"--base-small={tiny_base}"])
    lines = read(tmp_path / "out")
    assert status == 1
    assert [key for key, line in lines.items() if "failed" in line] == [
        ("whole", "recipes/imdb_lora.yaml, one epoch"),
        ("whole", "recipes/quickstart.yaml"),
    ]
    skipped = {key: line["skipped"] for key, line in lines.items() if "skipped" in line}
    assert all(key[0] != "ablation" or key[1].startswith("without") for key in skipped)
    assert {key[1]: reason for key, reason in skipped.items() if key[0] != "ablation"} == {
        "ours, eager": "only a GPU has graphs",
        "B, cuDNN off": "only a GPU has cuDNN",
        "B, compiled": "a CPU compiles for minutes",
        "pipeline, batches of 16, bfloat16": "a CPU walks this in float32 alone",
        "pipeline, batches of 16, float16": "a CPU walks this in float32 alone",
    }
    for part in ("imdb", "sst2", "ag_news"):
        for row in ("ours", "D"):
            line = lines[part, row]
            assert (line["first_steps"], line["steps"]) == (1, 2)
            assert (
                min(line["first_seconds"], line["seconds"], line["first_tokens"], line["tokens"])
                > 0
            )
            assert 0.1 < line["loss"] < 4
    assert (
        lines["inference", "ours, forward alone, the whole pool"]["tokens"]
        == lines["imdb", "rows read and tokenised"]["tokens"]
    )
    assert lines["inference", "pipeline, batches of 16, float32"]["texts"] == 8
    for recipe in gpu_parts.MEMORY_RECIPES:
        # Of so little, the process's own size says next to nothing on a CPU.
        assert "measured_bytes" in lines["memory", recipe]
        assert lines["memory", recipe]["estimated_bytes"] > 0
    page = (tmp_path / "out/gpu.md").read_text(encoding="utf-8")
    assert "No figure here means anything" in page
    assert "### Aims" not in page
    assert str(tmp_path) not in page + json.dumps(list(lines.values()))


def head(run, **more):
    facts = {
        "machine": "A GPU",
        "driver": "1.2",
        "versions": {"torch": "2"},
        "date": "2030-01-01",
        "code": "c0de",
    }
    return {
        "part": "machine",
        "row": "machine",
        "run": run,
        "command": "python",
        "quick": False,
        "cuda": True,
        **facts,
        **more,
    }


def trained(run, row, speed, *, part="imdb", **more):
    line = {
        "part": part,
        "row": row,
        "run": run,
        "dtype": "bfloat16",
        "length": 512,
        "batch_size": 32,
        "loss": 0.5,
    }
    line |= {
        "first_steps": 50,
        "first_seconds": 5.0,
        "first_tokens": 100,
        "steps": 40,
        "steps_wanted": 40,
    }
    return line | {"seconds": 2.0, "tokens": 2 * speed, "peak_bytes": 2**20} | more


def cells(page, row):
    """The cells of each table's row of that name."""
    lines = [line for line in page.splitlines() if line.startswith(f"| {row} |")]
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]


def test_ratios_are_of_rows_of_the_same_run():
    speeds = {"ours": 1000, "D": 100, "B": 300, "B, compiled": 400}
    first = [trained("a", row, speed) for row, speed in speeds.items()]
    failed = {"part": "imdb", "row": "D", "run": "b", "failed": "why"}
    page = render(
        [head("a"), *first, head("b"), trained("b", "ours", 1000), trained("b", "B", 500), failed]
    )
    newest, oldest = cells(page, "ours")
    assert (newest[6:9], oldest[6:9]) == (["1,000", "", "2.00"], ["1,000", "10.00", "2.50"])
    assert "- D: failed: why" in page
    assert page.index("started b") < page.index("started a")


def test_aims_stand_beside_what_was_measured_and_stay_where_it_was_not():
    lines = [
        head("a"),
        trained("a", "ours", 1_300_000),
        trained("a", "D", 100_000),
        trained("a", "ours", 600, part="sst2"),
    ]
    memory = {"part": "memory", "run": "a", "rows": 4, "length": 128, "measured_bytes": 100}
    lines += [
        {**memory, "row": "imdb_full", "estimated_bytes": 108},
        {**memory, "row": "imdb_lora", "estimated_bytes": 85},
    ]
    page = render(lines)
    assert cells(page, "the same, times D") == [["the same, times D", "≥ 15", "13.00", "missed"]]
    assert cells(page, "IMDB at 512, ours, tokens/s after the first steps")[0][2:] == [
        "1,300,000",
        "met",
    ]
    assert cells(page, "SST-2 at 128, ours, times D")[0][2:] == ["", "not measured"]
    assert cells(page, "memory, the worst estimate, % off")[0][2:] == ["15.00", "missed"]
    assert page.count("| not measured |") == len(AIMS) - 4


def test_a_row_that_fails_or_hangs_is_a_line_with_the_reason_and_the_next_is_measured(
    settings, tmp_path
):
    recorder = gpu_parts.Recorder(settings)

    def fail():
        raise RuntimeError(f"no file {tmp_path}/here.txt")

    def hang():
        time.sleep(30)

    recorder.measure("imdb", "D", 5, fail)
    recorder.settings = replace(settings, quick=False)
    recorder.measure("imdb", "B", -gpu_parts.GRACE + 0.2, hang)
    recorder.settings = replace(settings, ends=0)
    recorder.measure("imdb", "ours", 5, dict)
    lines = read(tmp_path)
    assert lines["imdb", "D"]["failed"] == "RuntimeError: no file .../here.txt"
    assert lines["imdb", "B"]["failed"].startswith("TimeoutError: stopped after")
    assert lines["imdb", "ours"]["skipped"] == "the budget of 300 s was spent"


def test_what_is_missing_or_has_another_version_is_named_with_the_way_to_carry_it():
    versions = {"torch": "2.11.0+cu130", "typer": "0.30"}

    def read_version(name):
        if name not in versions:
            raise PackageNotFoundError(name)
        return versions[name]

    wanted = ["torch>=2.13,<3", "typer>=0.29", "httpx2>=2.16", "colorama; sys_platform == 'win32'"]
    missing, unfit = gpu_check.find_faults([*wanted], read_version)
    assert unfit == {"torch<3,>=2.13": "2.11.0+cu130"}
    assert missing["httpx2>=2.16"] == ""
    assert "colorama" not in missing
    said = gpu_check.explain(missing, unfit)
    assert f"--python-version 3.{sys.version_info.minor} --dest wheels" in said
    assert "'httpx2>=2.16'" in said
    assert "torch<3,>=2.13, found 2.11.0+cu130" in said
    assert gpu_check.explain({}, {}) == "All required packages are here."


TESTS = """\
import os
import time

import pytest


@pytest.mark.gpu
def test_good():
    assert os.environ.get("CUDA_VISIBLE_DEVICES") == "3"


@pytest.mark.gpu
def test_bad():
    assert 1 + 1 == 3


@pytest.mark.gpu
def test_slow():
    time.sleep(60)


def test_of_the_cpu():
    raise AssertionError
"""


@pytest.fixture
def machine(tmp_path):
    """A repository of three tests for a GPU, and a benchmark that says what it was given and fails where told to."""
    root = SCRIPT.parents[1]
    for folder in ("tests", "benchmarks"):
        (tmp_path / folder).mkdir()
    for file in ("pyproject.toml", "Makefile", "tests/conftest.py", "benchmarks/gpu_check.py"):
        shutil.copy(root / file, tmp_path / file)
    (tmp_path / "tests/test_some.py").write_text(TESTS, encoding="utf-8")
    (tmp_path / "tests/test_broken.py").write_text(
        "import no_such_module\npytest.mark.gpu", encoding="utf-8"
    )
    (tmp_path / "tests/test_other.py").write_text(
        "import another_that_is_not_here", encoding="utf-8"
    )
    (tmp_path / "benchmarks/gpu.py").write_text(
        "import sys\nprint('measured', *sys.argv[1:])", encoding="utf-8"
    )
    return tmp_path


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_make_gpu_builds_nothing_tests_and_measures_and_loses_no_report(machine):
    flags = "--tests-limit 20 --only memory"
    done = subprocess.run(
        ["make", "gpu", f"PYTHON={sys.executable}", f"OUT={machine}/out", f"GPU_FLAGS={flags}"],
        cwd=machine, env={**os.environ, "CUDA_VISIBLE_DEVICES": "3"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode != 0
    assert f"measured --out {machine}/out --only memory" in done.stdout
    assert "tests: exit status 124; benchmark: exit status 0" in done.stdout
    report = (machine / "out/gpu_tests.txt").read_text(encoding="utf-8")
    assert "passed tests/test_some.py::test_good call" in report
    assert "failed tests/test_some.py::test_bad call" in report
    assert "assert (1 + 1) == 3" in report
    assert "No module named 'no_such_module'" in report
    assert "another_that_is_not_here" not in report
    assert report.splitlines()[-1] == "begins tests/test_some.py::test_slow"
    assert "test_of_the_cpu" not in report
    assert not (machine / ".venv").exists()
