"""The notebook runs from its first cell to its last."""

import json
import os
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).parents[1] / "examples"


def test_the_walkthrough_runs_with_nothing_but_the_package(tmp_path):
    cells = json.loads((FOLDER / "walkthrough.ipynb").read_text(encoding="utf-8"))["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    assert len(code) > 5
    # Every cell runs as printed, except that training takes a few steps.
    settings = '[f"output.dir={folder}/adapter"]'
    assert code[0].count(settings) == 1
    code[0] = code[0].replace(settings, f'{settings} + ["train.max_steps=20"]')
    environment = {
        **os.environ,
        "MPLBACKEND": "Agg",
        "TMPDIR": str(tmp_path),
        "PYTHONPATH": str(FOLDER.parent),
    }
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(code)],
        cwd=FOLDER,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    said = done.stdout
    # What was trained, what it answers, and that the stock pipeline takes the merged model.
    assert "49,152 adapter + 148,610 head" in said
    assert said.count("Dull, long and not worth a cent.") == 2
    assert "'score'" in said
