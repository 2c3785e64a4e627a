"""The benchmark of inference: every form answers every row once, and a stopped script goes on where it was."""

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from lora_sentiment.recipe.recipe import Recipe
from lora_sentiment.train import train

SCRIPT = Path(__file__).parents[2] / "benchmarks/inference.py"
FORMS = [
    "adapter",
    "merged",
    "ONNX",
    "ONNX int8",
    "ONNX int8 weights",
    "OpenVINO",
    "stock pipeline",
]
if find_spec("openvino") is None:
    FORMS.remove("OpenVINO")


@pytest.mark.slow  # more than a minute
def test_every_form_answers_every_row_and_a_stopped_script_goes_on(toy_recipe, tmp_path):
    adapter = train(Recipe.load(toy_recipe, ["train.num_train_epochs=2"])).adapter
    out = tmp_path / "out"
    out.mkdir()
    command = [
        sys.executable,
        str(SCRIPT),
        str(adapter),
        "--chunk=15",
        f"--out={out}",
        f"--cache={tmp_path}/cache",
    ]
    subprocess.run(command, check=True, capture_output=True)
    results = out / "inference.jsonl"
    lines = [json.loads(line) for line in results.read_text().splitlines()]
    assert [(line["start"], line["rows"], line["of"]) for line in lines] == [
        (0, 15, 41),
        (15, 15, 41),
        (30, 11, 41),
    ]
    assert all(list(line["forms"]) == FORMS for line in lines)
    accuracy = json.loads((adapter / "report.json").read_text())["test"]["accuracy"]["value"]
    for form in ("adapter", "merged", "ONNX", "stock pipeline"):
        assert sum(line["forms"][form]["right"] for line in lines) / 41 == accuracy
        assert max(line["forms"][form]["difference"] for line in lines) < 1e-5
    # Killed while it wrote the second chunk, that one alone is measured again.
    results.write_text(
        "".join(f"{json.dumps(line)}\n" for line in (lines[0], lines[2])) + '{"start": 15, "ro'
    )
    subprocess.run(command, check=True, capture_output=True)
    again = [json.loads(line) for line in results.read_text().splitlines()]
    assert [line["start"] for line in again] == [0, 30, 15]
    assert again[:2] == [lines[0], lines[2]]
    page = (out / "inference.md").read_text()
    assert "41 test rows" in page
    assert f"| merged | 41 | {accuracy:.4f} |" in page
