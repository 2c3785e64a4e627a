"""The notebook and the scripts of examples/ run. tests/clients has the one for Node."""

import json
import runpy
import sys
import tempfile
from pathlib import Path

import matplotlib
import pytest

FOLDER = Path(__file__).parents[1] / "examples"


def test_the_walkthrough_runs_with_nothing_but_the_package(tmp_path, monkeypatch, capsys):
    cells = json.loads((FOLDER / "walkthrough.ipynb").read_text(encoding="utf-8"))["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    assert len(code) > 5
    # Every cell runs as printed, except that training takes a few steps.
    settings = '[f"output.dir={folder}/adapter"]'
    assert code[0].count(settings) == 1
    code[0] = code[0].replace(settings, f'{settings} + ["train.max_steps=3"]')
    matplotlib.use("Agg")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.chdir(FOLDER)
    exec("\n".join(code), {})
    said = capsys.readouterr().out
    # What was trained, what it answers, and that the stock pipeline takes the merged model.
    assert "221,184 adapter + 148,610 head" in said
    assert said.count("Dull, long and not worth a cent.") == 2
    assert "'score'" in said


@pytest.fixture
def run(monkeypatch, capsys):
    """A function that runs a script from the top of the repository, and returns what it printed."""

    def run(name, *arguments):
        monkeypatch.chdir(FOLDER.parent)
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        runpy.run_path(str(FOLDER / name), run_name="__main__")
        return capsys.readouterr().out

    return run


def test_long_documents(run):
    said = run("long_documents.py", "adapters/imdb_small").splitlines()
    # The last sentence is all that the windows before it do not see.
    assert [line.split()[0] for line in said] == ["cut", "whole"]
    assert said[0].split()[2] != said[1].split()[2]


@pytest.mark.slow
def test_methods_side_by_side(run, tmp_path):
    said = run("compare_methods.py", "recipes/quickstart.yaml", tmp_path, "train.max_steps=2")
    rows = [line for line in said.splitlines() if line.startswith("|")]
    assert len(rows) == 2 + 4
    assert "100.00%" in rows[-1]


@pytest.mark.slow
def test_a_csv_of_ones_own_and_two_adapters_behind_one_server(run, tmp_path):
    folder = tmp_path / "mine"
    said = run("own_csv.py", "recipes/my_data.csv", "message", "kind", folder, "train.max_steps=2")
    lines = said.splitlines()
    assert lines[0].startswith(f"{folder}: test accuracy ")
    assert {line.split()[0] for line in lines[1:]} <= {"complaint", "praise", "question"}
    assert len(lines) == 3
    said = run("serve_two_adapters.py", "adapters/imdb_small", folder).splitlines()
    assert said[0].startswith("imdb_small pos ")
    assert said[1].startswith("mine ")
