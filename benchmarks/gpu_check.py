"""`make gpu`: for a machine with a card, its own torch and no network. It builds no environment.

    python benchmarks/gpu_check.py --out FOLDER [arguments of benchmarks/gpu.py]

It says which packages are missing or too old and how to carry them here, and goes on all the same. Then it runs the
tests marked `gpu`. Each test is a line of gpu_tests.txt when it begins and when it ends, with the traceback of one that
fails, so that nothing is lost where the time runs out. Then it runs benchmarks/gpu.py, whatever the tests said. The
exit status is 1 if a test or a row failed.

Until the tests run this imports the standard library alone, and `packaging`.
"""

import argparse
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
FOR_TESTS = ("pytest", "hypothesis")
"""What the tests marked gpu need beside the package's own requirements."""


def find_faults(
    requirements: Sequence[str], read_version: Callable[[str], str] = version
) -> tuple[dict[str, str], dict[str, str]]:
    """Return what is missing and what has the wrong version: requirement to the version that is there.

    Args:
        requirements: As pyproject.toml writes them. What the installed ones need in turn is looked at too.
        read_version: Returns the version of a package that is installed.
    """
    from packaging.requirements import Requirement

    missing: dict[str, str] = {}
    unfit: dict[str, str] = {}
    seen: set[str] = set()
    left = list(requirements)
    while left:
        wanted = Requirement(left.pop(0))
        if wanted.marker is not None and not wanted.marker.evaluate({"extra": ""}):
            continue
        shown = f"{wanted.name}{wanted.specifier}"
        try:
            found = read_version(wanted.name)
        except PackageNotFoundError:
            missing[shown] = ""
            continue
        if not wanted.specifier.contains(found, prereleases=True):
            unfit[shown] = found
        # torch's build decides which CUDA packages it needs, and it is here.
        if wanted.name.lower() not in seen | {"torch"}:
            seen.add(wanted.name.lower())
            left += requires_of(wanted.name)
    return missing, unfit


def requires_of(name: str) -> list[str]:
    """Return what an installed package needs."""
    try:
        return requires(name) or []
    except PackageNotFoundError:
        return []


def explain(missing: dict[str, str], unfit: dict[str, str]) -> str:
    """Return what is missing or too old, and how to carry what is missing."""
    if not missing and not unfit:
        return "All required packages are here."
    lines = [f"missing: {name}" for name in missing]
    lines += [
        f"another version than wanted: {name}, found {found}" for name, found in unfit.items()
    ]
    if missing:
        python = ".".join(map(str, sys.version_info[:2]))
        names = " ".join(f"'{name}'" for name in missing)
        lines += [
            "On a machine with a network:",
            f"    python -m pip download --no-deps --only-binary=:all: --python-version {python} --dest wheels {names}",
            "Copy the folder wheels here. Then:",
            "    python -m pip install --no-index --no-deps --target carried wheels/*.whl",
            "    PYTHONPATH=carried make gpu",
            "What these packages need in turn is named by the next call.",
        ]
    if unfit:
        lines.append("Other versions were not tested: read failures with that in mind.")
    return "\n".join(lines)


class Report:
    """Pytest's plugin that writes each test to a file as it begins and as it ends."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.write_text("", encoding="utf-8")

    def write(self, text: str) -> None:
        """Add a line; the file is closed again, so that a killed process leaves it whole."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(f"{text}\n")

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        """Note which test runs."""
        self.write(f"begins {nodeid}")

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Note how it ended, and why where it did not pass."""
        if report.when == "call" or not report.passed:
            self.write(f"{report.outcome} {report.nodeid} {report.when} {report.duration:.1f} s")
            if report.failed:
                self.write(report.longreprtext)
            elif report.skipped:
                self.write(
                    f"  {report.longrepr[-1] if isinstance(report.longrepr, tuple) else report.longrepr}"
                )

    def pytest_collectreport(self, report: Any) -> None:
        """Note a file of tests that cannot be read."""
        if report.failed:
            self.write(f"failed {report.nodeid} collection\n{report.longreprtext}")


def list_files() -> Iterator[str]:
    """Yield the files that hold tests marked gpu; the others may import what is not here."""
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        if "pytest.mark.gpu" in path.read_text(encoding="utf-8"):
            yield str(path)


def run_tests(report: Path) -> int:
    """Run the tests marked gpu in this process and return pytest's exit status."""
    import pytest

    options = [
        "-m",
        "gpu",
        "-p",
        "no:cacheprovider",
        "-rA",
        "--tb=short",
        "-v",
        "--continue-on-collection-errors",
    ]
    return int(pytest.main([*options, *list_files()], plugins=[Report(report)]))


def run_child(arguments: list[str], *, limit: float | None) -> int:
    """Run this interpreter from the root of the repository; return its exit status, 124 where the time was up."""
    try:
        return subprocess.run(
            [sys.executable, "-u", *arguments], cwd=ROOT, timeout=limit, check=False
        ).returncode
    except subprocess.TimeoutExpired:
        return 124


def main(argv: Sequence[str] | None = None) -> int:
    """Check, test, measure."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--out", type=Path, default=ROOT / "benchmarks", help="folder of all results"
    )
    parser.add_argument(
        "--tests-limit",
        type=float,
        default=240,
        metavar="SECONDS",
        help="most that the tests may take",
    )
    parser.add_argument("--tests-into", type=Path, help=argparse.SUPPRESS)
    arguments, rest = parser.parse_known_args(argv)
    if arguments.tests_into:
        return run_tests(arguments.tests_into)
    out = arguments.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    print(explain(*find_faults([*project["dependencies"], *FOR_TESTS])), flush=True)
    own = str(Path(__file__).resolve())
    tests = run_child(
        [own, "--tests-into", str(out / "gpu_tests.txt")], limit=arguments.tests_limit
    )
    if tests == 124:
        print(
            f"The tests did not end in {arguments.tests_limit:,.0f} s; gpu_tests.txt says which one ran.",
            flush=True,
        )
    measured = run_child([str(Path(own).with_name("gpu.py")), "--out", str(out), *rest], limit=None)
    # 5: no test was collected, which shows nothing.
    print(
        f"tests: exit status {tests}; benchmark: exit status {measured}; results in {out}",
        flush=True,
    )
    return 1 if tests or measured else 0


if __name__ == "__main__":
    sys.exit(main())
