"""The notebook runs from its first cell to its last."""

import json
import tempfile
from pathlib import Path

import matplotlib

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
    assert "49,152 adapter + 148,610 head" in said
    assert said.count("Dull, long and not worth a cent.") == 2
    assert "'score'" in said
