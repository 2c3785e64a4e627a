"""Which tests see a card."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = """\
import os
import subprocess
import sys

import pytest

SHOW = "import os; print(os.environ.get('CUDA_VISIBLE_DEVICES'))"


def seen() -> list[str]:
    child = subprocess.run([sys.executable, "-c", SHOW], capture_output=True, text=True, check=True)
    return [os.environ.get("CUDA_VISIBLE_DEVICES"), child.stdout.strip()]


def test_plain():
    assert seen() == ["-1", "-1"]


@pytest.mark.slow
def test_slow():
    assert seen() == ["-1", "-1"]


@pytest.mark.gpu
def test_on_a_card():
    assert seen() == ["3", "3"]


@pytest.mark.slow
@pytest.mark.gpu
def test_slow_on_a_card():
    assert seen() == ["3", "3"]
"""
ROOT = Path(__file__).parents[1]


@pytest.fixture
def run(tmp_path):
    """Run pytest with this conftest on four tests that say what they see, on a machine with a card 3."""
    (tmp_path / "tests").mkdir()
    shutil.copy(ROOT / "tests/conftest.py", tmp_path / "tests/conftest.py")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    (tmp_path / "tests/test_seen.py").write_text(TESTS, encoding="utf-8")

    def run(*arguments):
        return subprocess.run(
            [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *arguments],
            cwd=tmp_path, env={**os.environ, "CUDA_VISIBLE_DEVICES": "3"}, capture_output=True, text=True, check=False,
        )  # fmt: skip

    return run


@pytest.mark.parametrize(
    ("arguments", "passed"),
    [
        ([], 1),
        pytest.param(["-m", "not gpu"], 2, marks=pytest.mark.slow),
        (["-m", "gpu"], 2),
        pytest.param(["-m", "gpu and not slow"], 1, marks=pytest.mark.slow),
    ],
)
def test_the_card_is_seen_by_tests_with_the_marker_alone_and_by_what_they_start(
    run, arguments, passed
):
    done = run(*arguments)
    assert (done.returncode, f"{passed} passed" in done.stdout) == (0, True), done.stdout


@pytest.mark.parametrize(
    "asked", ["gpu or not slow", pytest.param("not (gpu)", marks=pytest.mark.slow)]
)
def test_the_card_and_tests_of_the_cpu_are_not_mixed(run, asked):
    done = run("-m", asked)
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert f"-m '{asked}' chose" in done.stderr
    assert "run -m gpu by itself" in done.stderr
    assert "passed" not in done.stdout
