import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from lora_sentiment import cli
from lora_sentiment.adapter.predictions import load_predictions, save_predictions
from lora_sentiment.commands.compare import (
    compare,
    describe,
    draw,
    make_columns,
    make_notes,
    to_markdown,
)
from lora_sentiment.errors import AdapterError, LoraSentimentError, RecipeError
from lora_sentiment.evaluation.statistics import mcnemar, paired_bootstrap
from lora_sentiment.models.families import FAMILIES, resolve_targets
from lora_sentiment.recipe.method import METHODS
from lora_sentiment.recipe.recipe import Recipe

RECIPES = Path(__file__).parents[2] / "recipes"


def find_correct(predictions):
    return predictions.logits.argmax(axis=1) == predictions.labels


@pytest.fixture(scope="module")
def runs(tiny_base, tmp_path_factory):
    """Two recipes on the same rows, both run: LoRA, and the head alone."""
    from lora_sentiment.train import train
    from tests.conftest import toy_rows, write_csv

    folder = tmp_path_factory.mktemp("runs")
    rows = toy_rows(161)
    write_csv(folder / "train.csv", rows[:120])
    write_csv(folder / "test.csv", rows[120:])
    for name, method in (("low_rank", "{kind: lora, r: 4}"), ("probe", "{kind: head}")):
        (folder / f"{name}.yaml").write_text(
            f"data: {{source: {{train: {folder}/train.csv, test: {folder}/test.csv}}}}\n"
            f"model: {{name: {tiny_base}, max_length: 16}}\nmethod: {method}\n"
            f"train: {{max_steps: 6, batch_size: 16, learning_rate: 1e-2}}\noutput: {{dir: {folder}/{name}}}\n",
            encoding="utf-8",
        )
        train(Recipe.load(folder / f"{name}.yaml"))
    return folder


def test_counts_and_bytes_of_a_recipe(tmp_path):
    (row,) = compare([RECIPES / "imdb_lora.yaml"])
    assert (row.counts.adapter, row.counts.head, row.counts.trainable) == (
        147_456,
        592_130,
        739_586,
    )
    assert row.optimizer_bytes == 8 * row.counts.trainable
    assert 0 < row.file_bytes - 4 * row.counts.trainable < 8192
    assert row.measured is None
    assert row.paired is None


def test_what_ran_shows_what_it_measured_and_is_paired_with_the_first(runs):
    first, second = compare([runs / "low_rank.yaml", runs / "probe.yaml"])
    report = json.loads((runs / "probe/report.json").read_text(encoding="utf-8"))
    assert second.measured["role"] == "test"
    assert second.measured["accuracy"] == report["test"]["accuracy"]
    assert second.measured["peak_memory_bytes"] == report["train"]["peak_memory_bytes"]
    assert first.paired is None
    own, other = (
        find_correct(load_predictions(runs / name)["test"]) for name in ("probe", "low_rank")
    )
    assert second.paired["num_rows"] == 41
    assert second.paired["mcnemar"] == mcnemar(own, other)
    assert second.paired["difference"] == paired_bootstrap(own, other).as_dict()
    difference = report["test"]["accuracy"]["value"] - first.measured["accuracy"]["value"]
    assert second.paired["difference"]["value"] == pytest.approx(difference)


def test_an_adapter_folder_gives_the_row_of_its_recipe(runs):
    recipe, adapter = (compare([path])[0] for path in (runs / "low_rank.yaml", runs / "low_rank"))
    assert adapter == recipe
    assert adapter.file_bytes == (runs / "low_rank/adapter_model.safetensors").stat().st_size
    assert adapter.notes == ("model.dtype auto is taken as float32",)


def test_the_file_size_before_a_run_is_the_one_after(runs, tmp_path):
    """Label names are read from the data, so a recipe that has not run must be told how many there are."""
    for name in ("low_rank", "probe"):
        text = (
            (runs / f"{name}.yaml")
            .read_text(encoding="utf-8")
            .replace(f"{runs}/{name}", f"{tmp_path}/none")
        )
        text = text.replace("data: {", "data: {labels: [negative, positive], ")
        (tmp_path / f"{name}.yaml").write_text(text, encoding="utf-8")
        before, after = compare([tmp_path / f"{name}.yaml", runs / name])
        assert before.measured is None
        assert before.file_bytes == after.file_bytes


def test_other_rows_are_not_paired(runs, tmp_path):
    shutil.copytree(runs / "probe", tmp_path / "other")
    predictions = load_predictions(runs / "probe")
    test = predictions["test"]
    other = type(test)(test.logits, test.labels, "ab" * 32)
    save_predictions(tmp_path / "other", {**predictions, "test": other})
    _, row = compare([runs / "low_rank", tmp_path / "other"])
    assert row.paired is None
    assert "not paired with low_rank: judged on other rows" in row.notes


def test_a_run_without_predictions_is_shown_and_not_paired(runs, tmp_path):
    shutil.copytree(runs / "probe", tmp_path / "old")
    (tmp_path / "old/predictions.safetensors").unlink()
    _, row = compare([runs / "low_rank", tmp_path / "old"])
    assert row.measured is not None
    assert "not paired with low_rank: no predictions of test in both" in row.notes


def test_a_recipe_changed_since_its_run_does_not_show_the_old_figures(runs, tmp_path):
    text = (runs / "probe.yaml").read_text(encoding="utf-8")
    (tmp_path / "probe.yaml").write_text(
        text.replace("max_steps: 6", "max_steps: 7"), encoding="utf-8"
    )
    (row,) = compare([tmp_path / "probe.yaml"])
    assert row.measured is None
    assert any("another version of this recipe" in note for note in row.notes)


def test_the_predictions_are_those_of_the_report(runs):
    report = json.loads((runs / "low_rank/report.json").read_text(encoding="utf-8"))
    predictions = load_predictions(runs / "low_rank")
    assert predictions.keys() == {"validation", "test"}
    for role, found in predictions.items():
        assert np.mean(find_correct(found)) == pytest.approx(report[role]["accuracy"]["value"])


def test_markdown_has_a_row_each_and_says_what_was_assumed(runs):
    rows = compare([runs / "low_rank", runs / "probe"])
    lines = to_markdown(rows).splitlines()
    assert lines[0].startswith(
        "| name | method | adapter | head | trainable | share | file | optimizer | memory, est. |"
    )
    assert lines[2].startswith("| low_rank | lora r=4 q,v | 1,024 | 1,122 | 2,146 |")
    assert len({line.count("|") for line in lines[:4]}) == 1
    assert any(
        note.startswith("- against the first: accuracy minus that of low_rank") for note in lines
    )


def test_columns_without_anything_to_say_are_left_out(runs):
    rows = compare([RECIPES / "imdb_lora.yaml", RECIPES / "imdb_full.yaml"])
    columns = make_columns(rows)
    assert "encoder" in columns
    assert not {"base", "quantize", "accuracy", "against the first"} & columns.keys()
    assert make_notes(rows)[0] == "base: distilbert/distilbert-base-uncased"
    assert "base" in make_columns(compare([RECIPES / "imdb_lora.yaml", runs / "probe"]))


@pytest.mark.parametrize(
    ("method", "head", "words"),
    [
        (
            {"kind": "lora", "use_dora": True, "target_modules": "all-linear"},
            "full",
            "lora DoRA r=8 all-linear",
        ),
        (
            {"kind": "lora", "loraplus_lr_ratio": 4.0, "r": 2},
            "low_rank",
            "lora LoRA+ r=2 q,v head low_rank",
        ),
        ({"kind": "lora", "init_lora_weights": "pissa"}, "full", "lora pissa r=8 q,v"),
        ({"kind": "ia3"}, "full", "ia3 k,v,lin2"),
        ({"kind": "unfreeze", "last_layers": 2}, "full", "unfreeze last 2"),
        ({"kind": "unfreeze", "patterns": ["*.bias"]}, "full", "unfreeze *.bias"),
        ({"kind": "head"}, "classifier", "head head classifier"),
    ],
    ids=str,
)
def test_a_method_in_a_few_words(method, head, words):
    whole = resolve_targets(METHODS[method["kind"]](**method), FAMILIES["distilbert"])
    assert describe(whole, head) == words


def test_the_picture_shows_what_ran(runs, tmp_path):
    draw(
        compare([runs / "low_rank", runs / "probe", RECIPES / "imdb_lora.yaml"]),
        tmp_path / "pareto.png",
    )
    assert imread(tmp_path / "pareto.png").shape[:2] == (600, 960)
    with pytest.raises(RecipeError, match="none of these has a report"):
        draw(compare([RECIPES / "imdb_lora.yaml"]), tmp_path / "none.png")


def test_what_is_neither_recipe_nor_adapter_is_refused(tmp_path):
    with pytest.raises(AdapterError, match="is no adapter folder"):
        compare([tmp_path])
    with pytest.raises(LoraSentimentError, match="no such recipe"):
        compare([tmp_path / "none.yaml"])


def test_a_damaged_report_is_named(runs, tmp_path):
    shutil.copytree(runs / "probe", tmp_path / "bad")
    deep = "[" * 100_000
    for text in (
        "{",
        "[]",
        '{"train": {}}',
        '{"test": {}, "train": {}}',
        '{"test": {}, "test": {}}',
        deep,
    ):
        (tmp_path / "bad/report.json").write_text(text, encoding="utf-8")
        with pytest.raises(AdapterError, match=r"report\.json"):
            compare([tmp_path / "bad"])


def test_the_docs_have_the_table_of_the_recipes(tmp_path, monkeypatch, capsys):
    # As a newcomer sees it: no base in the cache, no adapter trained.
    names = [str(path) for path in sorted(RECIPES.glob("*.yaml"))]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(SystemExit) as ended:
        cli.main(["compare", *names, "--markdown"])
    assert ended.value.code == 0
    page = (RECIPES.parent / "docs/methods.md").read_text(encoding="utf-8").splitlines()
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    start = page.index(lines[0])
    for line, written in zip(lines, page[start:], strict=False):
        # The estimate is measured with the installed torch.
        row, memory = _split_memory(line)
        assert row == _split_memory(written)[0]
        assert memory == pytest.approx(_split_memory(written)[1], rel=0.05)


def _split_memory(line):
    """A row of the table without its last cell, and the GiB in that cell; 0 for other lines."""
    row, _, cell = line.removesuffix(" |").rpartition(" | ")
    return (row, float(cell.removesuffix(" GiB"))) if cell.endswith(" GiB") else (line, 0.0)


def test_runs_of_equal_names_are_told_apart_by_their_paths(tmp_path):
    text = (RECIPES / "imdb_lora.yaml").read_text(encoding="utf-8")
    paths = []
    for folder in ("one", "two", "two/one"):
        (tmp_path / folder).mkdir()
        paths.append(tmp_path / folder / "recipe.yaml")
        paths[-1].write_text(text + "\nname: same\n", encoding="utf-8")
    rows = compare([*paths, RECIPES / "imdb_lora.yaml"])
    names = [row.name for row in rows]
    assert names[1] == "two/recipe.yaml"
    assert names[0] == f"{tmp_path.name}/one/recipe.yaml"
    assert names[2] == "two/one/recipe.yaml"
    assert names[3] == "imdb_lora"


def test_equal_recipes_in_adapter_folders_are_named_by_folder(runs, tmp_path):
    for name in ("first", "second"):
        shutil.copytree(runs / "probe", tmp_path / name)
    rows = compare([tmp_path / "first", tmp_path / "second", runs / "low_rank"])
    assert [row.name for row in rows] == ["first", "second", "low_rank"]
    third = shutil.copytree(runs / "low_rank", tmp_path / "third")
    recipe = (third / "recipe.yaml").read_text().replace("name: low_rank", "name: second")
    (third / "recipe.yaml").write_text(recipe)
    names = [row.name for row in compare([tmp_path / "first", tmp_path / "second", third])]
    assert names == ["first", f"{tmp_path.name}/second", f"{tmp_path.name}/third"]
    assert "other rows" not in " ".join(make_notes(rows))


@pytest.mark.parametrize("left_out", [["a.run"], ["b.sweep"], ["a.run", "b.run", "c.sweep"]])
def test_folders_beside_adapters_are_left_out_with_a_warning(runs, tmp_path, left_out, caplog):
    shutil.copytree(runs / "low_rank", tmp_path / "lora")
    for name in left_out:
        (tmp_path / name).mkdir()
    paths = sorted(tmp_path.iterdir())
    assert [row.folder for row in compare(paths)] == [tmp_path / "lora"]
    assert all(f"{tmp_path / name}: left out" in caplog.text for name in left_out)
    with pytest.raises(AdapterError, match="no finished run is left"):
        compare([tmp_path / name for name in left_out])


@pytest.mark.parametrize("name", ["gone/plot.png", "plot.txt"])
def test_a_plot_that_cannot_be_written_is_one_message(runs, tmp_path, name):
    rows = compare([runs / "probe"])
    with pytest.raises(RecipeError, match=r"--plot: .* cannot be drawn"):
        draw(rows, tmp_path / name)
    assert not list(tmp_path.iterdir())
