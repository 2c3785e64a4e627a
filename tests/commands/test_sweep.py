"""A grid of runs: what is an axis, what is refused, what is chosen, and that a stopped sweep goes on."""

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from lora_sentiment import train as train_module
from lora_sentiment.commands.estimate import resolve_recipe
from lora_sentiment.commands.sweep import make_columns, make_trials, sweep
from lora_sentiment.data.rows import load_data
from lora_sentiment.errors import AdapterError, DataError, ModelError, RecipeError
from lora_sentiment.recipe.recipe import Recipe
from tests.conftest import toy_rows, write_csv

GRID = ("train.learning_rate=[1e-5, 1e-2]", "train.max_steps=4", "method.r=[2, 4]")


@pytest.fixture(scope="module")
def done(tiny_base, tmp_path_factory):
    """A recipe whose test file is not there, and its finished sweep over GRID."""
    folder = tmp_path_factory.mktemp("sweep")
    write_csv(folder / "train.csv", toy_rows(120))
    path = folder / "toy.yaml"
    path.write_text(
        f"data: {{source: {{train: {folder}/train.csv, test: {folder}/test.csv}}}}\n"
        f"model: {{name: {tiny_base}, max_length: 16, dtype: float32}}\n"
        f"train: {{batch_size: 16}}\noutput: {{dir: {folder}/adapter}}\n",
        encoding="utf-8",
    )
    return path, sweep(path, GRID)


@pytest.fixture
def no_training(monkeypatch):
    def refuse(recipe, **_):
        raise AssertionError(f"{recipe.name} was trained")

    monkeypatch.setattr(train_module, "train", refuse)


def values_of(path: Path, *assignments: str) -> list[dict]:
    return [dict(trial.values) for trial in make_trials(path, assignments)]


def scores(folder: Path) -> dict:
    return json.loads((folder / "report.json").read_text(encoding="utf-8"))["validation"]


@pytest.mark.parametrize(
    ("assignment", "values"),
    [
        ("train.learning_rate=[1e-4, 5e-4]", [1e-4, 5e-4]),
        ("method.kind=[lora, head]", ["lora", "head"]),
        ("method=[{kind: lora, r: 2}, {kind: head}]", [{"kind": "lora", "r": 2}, {"kind": "head"}]),
        ("method.rank_pattern=[{q_lin: 2}, {}]", [{"q_lin": 2}, {}]),
        ("method.rank_pattern.q_lin=[2, 16]", [2, 16]),
        ("method.target_modules=[[q_lin], [q_lin, v_lin]]", [["q_lin"], ["q_lin", "v_lin"]]),
        ("method.target_modules=[all-linear, [q_lin]]", ["all-linear", ["q_lin"]]),
        ("method.layers_to_transform=[[0], null]", [[0], None]),
        ("train.class_weights=[balanced, null]", ["balanced", None]),
        ("train.class_weights=[[1.0, 2.0], balanced]", [[1.0, 2.0], "balanced"]),
    ],
)
def test_a_list_is_an_axis_where_the_schema_takes_one_value(toy_recipe, assignment, values):
    # Without `r`, which not every method knows.
    text = toy_recipe.read_text(encoding="utf-8").replace("method: {r: 4, lora_alpha: 8}\n", "")
    toy_recipe.write_text(text, encoding="utf-8")
    assert [list(found.values()) for found in values_of(toy_recipe, assignment)] == [
        [value] for value in values
    ]


@pytest.mark.parametrize(
    "plain",
    [
        "method.target_modules=[q_lin, k_lin]",
        "method.target_modules=[[q_lin, k_lin]]",
        "data.labels=[negative, positive]",
        "train.class_weights=[1.0, 2.0]",
        "train.report_to=[]",
        "train.warmup_ratio=[0.1]",
    ],
)
def test_one_value_is_no_axis_and_is_in_every_run(toy_recipe, plain):
    trials = make_trials(toy_recipe, [plain, "method.r=[2, 4]"])
    assert [dict(trial.values) for trial in trials] == [{"method.r": 2}, {"method.r": 4}]
    key, _, text = plain.partition("=")
    section, name = key.split(".")
    expected = Recipe.load(
        toy_recipe, [f"{key}={text[1:-1]}" if text in ("[0.1]", "[[q_lin, k_lin]]") else plain]
    )
    for trial in trials:
        assert getattr(getattr(trial.run, section), name) == getattr(
            getattr(expected, section), name
        )


def test_the_last_axis_is_the_fastest_and_overrides_keep_their_order(toy_recipe):
    trials = make_trials(
        toy_recipe, ["train.seed=[1, 2]", "method={kind: lora, r: 2}", "method.lora_alpha=[4, 8]"]
    )
    assert [list(trial.values.values()) for trial in trials] == [[1, 4], [1, 8], [2, 4], [2, 8]]
    assert trials[1].overrides == (
        "train.seed=1",
        "method={kind: lora, r: 2}",
        "method.lora_alpha=8",
    )
    assert [trial.recipe for trial in trials] == [
        Recipe.load(toy_recipe, trial.overrides) for trial in trials
    ]


@pytest.mark.parametrize(
    "text", ["007", "no", "a, b", "x: y", "'", "ü #1", "null", "1e-4", " ", "${HOME}"]
)
def test_a_value_walks_into_the_recipe_as_it_is(toy_recipe, text):
    trials = make_trials(
        toy_recipe, [f"data.text_column={json.dumps([text, 'other'], ensure_ascii=False)}"]
    )
    assert [trial.recipe.data.text_column for trial in trials] == [text, "other"]


def test_runs_are_named_by_their_values_and_by_all_else(toy_recipe):
    def names(*assignments: str) -> list[str]:
        return [trial.run.folder.name for trial in make_trials(toy_recipe, assignments)]

    first = names("train.learning_rate=[1e-4, 1e-3]", "method.target_modules=[[q_lin], [v_lin]]")
    assert first[0].startswith("learning_rate-0.0001-target_modules-q_lin-")
    assert len(set(first)) == 4
    more = names(
        "train.learning_rate=[1e-4, 1e-3, 1e-2]", "method.target_modules=[[q_lin], [v_lin]]"
    )
    assert set(first) < set(more)
    other = names(
        "train.seed=1",
        "train.learning_rate=[1e-4, 1e-3]",
        "method.target_modules=[[q_lin], [v_lin]]",
    )
    assert not set(first) & set(other)
    moved = names(
        "output.dir=x",
        "train.learning_rate=[1e-4, 1e-3]",
        "method.target_modules=[[q_lin], [v_lin]]",
    )
    assert moved == first
    assert names("train.learning_rate=[1e30, 1e-30]")[0].startswith("learning_rate-1.0e30-")
    assert make_trials(toy_recipe, ["output.dir=x/y", "method.r=[1, 2]"])[
        0
    ].run.folder.parent == Path("x/y.sweep")


@pytest.mark.parametrize(
    ("assignments", "message"),
    [
        ([], "no key has several values; give one a list, such as 'train.learning_rate="),
        (["method.r=[4]"], "no key has several values"),
        (
            ["method.target_modules=[q_lin, v_lin]"],
            "to vary method.target_modules, which takes a list, give a list of",
        ),
        (["method.r=4", "train.sed=1"], "train.sed: unknown key; did you mean 'seed'?"),
        (["method.rr=[4, 8]"], "method.rr: unknown key"),
        (["trian.seed=[4, 8]"], "trian: unknown key; did you mean 'train'?"),
        (["method.r=[4, 8"], "override 'method.r=[4, 8': line 1"),
        (["method.r"], "override 'method.r': expected key=value"),
        (["=[1, 2]"], "override '=1': expected key=value"),
        (["method.r=[4, 8]", "method.r=2"], "method.r: stands 2 times; give it once"),
        (["method.r=[4, 8]", "train.seed=[]"], "train.seed: found an empty list"),
        (["method.r=[4, 4]"], "method.r=4 and method.r=4 are the same run"),
        (["train.learning_rate=[1e-4, 0.0001]"], "are the same run; leave one of them out"),
        (["method.r=[4, 8]", "method={kind: head}"], "method.r=4 and method.r=8 are the same run"),
        (
            ["method.r=[4, 0]"],
            r"method.r: found 0; allowed: greater than or equal to 1 (with method.r=0)",
        ),
        (
            ["train.engine=[auto, fast]", "method.use_dora=[false, true]"],
            "set train.engine=auto (with train.engine=fast method.use_dora=true)",
        ),
        (
            ["train.seed=[1, 2]", "method.kind=[lora, vera]", "method.lora_alpha=4"],
            "(with train.seed=1 method.kind=vera and 1 more of 4 combinations)",
        ),
        (
            ["train.metric_for_best_model=[accuracy, mcc]"],
            "train.metric_for_best_model: is no axis",
        ),
        (["output.dir=[a, b]"], "name, output: are no axes"),
        (["name=[a, b]"], "name, output: are no axes"),
        (
            [
                "train.seed=[" + ", ".join(map(str, range(40))) + "]",
                "method.r=[" + "1, " * 30 + "2]",
            ],
            "1,240 combin",
        ),
        (
            ["data.source=['nowhere-*.csv', 'x.csv']"],
            "(with data.source=nowhere-*.csv)",
        ),
    ],
)
def test_a_fault_of_the_grid_is_told_before_anything_runs(
    toy_recipe, no_training, assignments, message
):
    with pytest.raises((RecipeError, DataError)) as caught:
        sweep(toy_recipe, assignments)
    assert message in str(caught.value)
    assert not (toy_recipe.parent / "adapter.sweep").exists()


def test_all_faults_are_told_at_once_and_each_once(toy_recipe):
    with pytest.raises(RecipeError) as caught:
        make_trials(toy_recipe, ["method.r=[4, 0]", "train.sed=1", "train.seed=[1, -1]"])
    lines = str(caught.value).splitlines()
    assert len(lines) == 3
    assert [line.count("(with") for line in sorted(lines)] == [1, 0, 1]


def test_a_missing_recipe_is_told_once(tmp_path):
    with pytest.raises(RecipeError, match="no such recipe file") as caught:
        sweep(tmp_path / "none.yaml", ["method.r=[1, 2]"])
    assert str(caught.value).count("\n") == 0


def test_what_is_judged_is_left_out_and_the_rest_stays(toy_recipe):
    asked = "data.source={train: a.csv, validation: b.csv, test: c.csv, other_shop: d.csv}"
    for trial in make_trials(
        toy_recipe, [asked, "data.test_fraction=0.2", "data.max_test_rows=5", "method.r=[2, 4]"]
    ):
        assert trial.run.data.source == {"train": "a.csv", "validation": "b.csv"}
        assert trial.run.data.test_fraction == 0
        assert trial.recipe.data.test_fraction == 0.2
    (trial, _) = make_trials(
        toy_recipe, ["data.source=a.csv", "data.test_fraction=0.2", "method.r=[2, 4]"]
    )
    assert trial.run.data == trial.recipe.data


def test_of_the_bundled_reviews_too(toy_recipe):
    columns = ("data.source=bundled", "data.text_column=text", "data.label_column=label")
    (trial, _) = make_trials(toy_recipe, [*columns, "method.r=[2, 4]"])
    found = load_data(trial.run.data)
    whole = load_data(trial.recipe.data)
    assert (found.judged, whole.judged) == ((), ("test",))
    assert found.train.fingerprint == whole.train.fingerprint
    assert found.validation.fingerprint == whole.validation.fingerprint


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("null", {"train": "train", "validation": "validation"}),
        ("{train: test, test: train}", {"train": "test"}),
        (
            "{train: train, validation: unsupervised, other_shop: test}",
            {"train": "train", "validation": "unsupervised"},
        ),
    ],
)
def test_of_a_hub_data_set_the_splits_are_named(toy_recipe, monkeypatch, given, kept):
    asked = []

    def split_names(*arguments, **_):
        asked.append(arguments)
        return ["unsupervised", "test", "validation", "train"]

    monkeypatch.setattr("datasets.get_dataset_split_names", split_names)
    trials = make_trials(
        toy_recipe, ["data.source=some/reviews", f"data.splits={given}", "method.r=[2, 4]"]
    )
    assert [trial.run.data.splits for trial in trials] == [kept, kept]
    assert len(asked) == 1


def test_every_combination_runs_without_the_rows_that_are_judged(done):
    path, found = done
    assert not (path.parent / "test.csv").exists()
    assert found.axes == ("train.learning_rate", "method.r")
    assert [tuple(row.values.values()) for row in found.rows] == [
        (1e-5, 2),
        (1e-5, 4),
        (1e-2, 2),
        (1e-2, 4),
    ]
    assert {row.folder.parent for row in found.rows} == {path.parent / "adapter.sweep"}
    assert not any(row.earlier or row.diverged for row in found.rows)
    for row in found.rows:
        report = json.loads((row.folder / "report.json").read_text(encoding="utf-8"))
        assert row.validation == report["validation"]
        assert "test" not in report
        assert report["train"]["steps"] == 4
        ran = Recipe.load(row.folder / "recipe.yaml")
        assert (ran.train.learning_rate, ran.method.r) == tuple(row.values.values())
    assert not (path.parent / "adapter").exists()


def test_the_best_one_is_best_on_validation_and_its_command_trains_it(done):
    path, found = done
    ranks = [
        (row.validation["accuracy"]["value"], -row.validation["log_loss"]["value"])
        for row in found.rows
    ]
    assert found.best == ranks.index(max(ranks))
    command = shlex.split(found.command)
    assert command[:5] == ["accelerate", "launch", "-m", "lora_sentiment.train", str(path)]
    write_csv(path.parent / "test.csv", toy_rows(161)[120:])
    try:
        run = train_module.train(
            Recipe.load(command[4], [*command[5:], f"output.dir={path.parent}/best"])
        )
    finally:
        (path.parent / "test.csv").unlink()
    # Alone or after others, with something to judge or without: the same run.
    assert run.report["validation"] == found.rows[found.best].validation
    assert run.report["test"]["accuracy"]["value"] is not None


def test_a_finished_sweep_is_not_run_again(done, no_training):
    path, found = done
    again = sweep(path, GRID)
    assert all(row.earlier for row in again.rows)
    assert [row.validation for row in again.rows] == [row.validation for row in found.rows]
    assert (again.best, again.command) == (found.best, found.command)


def test_a_metric_that_falls_is_chosen_by_its_least_value_and_ties_by_log_loss(done, no_training):
    path, found = done
    kept = {
        row.folder: (row.folder / "report.json").read_text(encoding="utf-8") for row in found.rows
    }

    def best(figures: list[tuple[float, float]]) -> int | None:
        for row, (accuracy, log_loss) in zip(found.rows, figures, strict=True):
            report = json.loads(kept[row.folder])
            report["validation"]["accuracy"]["value"] = accuracy
            report["validation"]["log_loss"]["value"] = log_loss
            (row.folder / "report.json").write_text(json.dumps(report), encoding="utf-8")
        return sweep(path, GRID).best

    try:
        assert best([(0.5, 0.1), (0.9, 0.9), (0.8, 0.1), (0.7, 0.1)]) == 1
        assert best([(0.9, 0.5), (0.9, 0.2), (0.9, 0.3), (0.8, 0.1)]) == 1
        assert best([(0.9, 0.5), (0.9, 0.5), (0.9, 0.5), (0.8, 0.1)]) == 0
    finally:
        for folder, text in kept.items():
            (folder / "report.json").write_text(text, encoding="utf-8")


def test_log_loss_is_chosen_by_its_least_value(toy_recipe):
    found = sweep(
        toy_recipe, ["train.metric_for_best_model=log_loss", "train.learning_rate=[1e-6, 3e-2]"]
    )
    losses = [row.validation["log_loss"]["value"] for row in found.rows]
    assert losses[1] < losses[0]
    assert (found.metric, found.best) == ("log_loss", 1)
    assert list(make_columns(found))[:3] == ["best", "train.learning_rate", "log_loss"]


def test_the_table_shows_axes_figures_and_the_best(done):
    _, found = done
    columns = make_columns(found)
    assert list(columns) == [
        "best", "train.learning_rate", "method.r", "accuracy", "macro_f1", "log_loss", "best step", "time",
    ]  # fmt: skip
    assert [i for i, cell in enumerate(columns["best"]) if cell] == [found.best]
    assert columns["method.r"] == ["2", "4", "2", "4"]
    assert columns["accuracy"][0].startswith(
        f"{found.rows[0].validation['accuracy']['value']:.4f} ["
    )
    assert {len(cells) for cells in columns.values()} == {4}
    (note,) = found.notes
    assert note.startswith("best: by accuracy on validation, ties by log_loss")


def test_the_figures_are_json(done):
    _, found = done
    read = json.loads(json.dumps(found.as_dict()))
    assert read["rows"][0]["folder"] == str(found.rows[0].folder)
    assert read["rows"][3]["values"] == {"train.learning_rate": 0.01, "method.r": 4}


def test_a_run_that_diverges_is_a_row_and_is_not_run_again(toy_recipe, monkeypatch):
    grid = ["train.learning_rate=[1e30, 1e-2]", "train.max_steps=4"]
    found = sweep(toy_recipe, grid)
    assert found.rows[0].diverged
    assert found.rows[0].validation is None
    assert not found.rows[0].folder.exists()
    assert (found.rows[1].diverged, found.best) == (None, 1)
    assert "train.learning_rate=0.01" in found.command
    assert make_columns(found)["note"] == ["diverged", ""]
    assert any("*.diverged.txt say where a run diverged" in note for note in found.notes)
    monkeypatch.setattr(train_module, "train", None)
    again = sweep(toy_recipe, grid)
    assert (again.rows[0].diverged, again.best) == (found.rows[0].diverged, 1)


@pytest.mark.parametrize(("rate", "steps"), [("1e4", 3), ("1e38", 1)])
def test_however_a_run_diverges_the_sweep_goes_on(toy_recipe, rate, steps):
    grid = [
        f"train.learning_rate=[{rate}, 2e38]",
        f"train.max_steps={steps}",
        "train.max_grad_norm=0",
    ]
    found = sweep(toy_recipe, grid)
    assert len(found.rows) == 2
    assert found.best is None or found.rows[found.best].validation


def test_where_all_diverge_there_is_no_best(toy_recipe):
    found = sweep(toy_recipe, ["train.learning_rate=[1e30, 2e30]", "train.max_steps=4"])
    assert (found.best, found.command) == (None, None)
    assert found.notes[0].startswith("every run diverged; lower train.learning_rate")
    assert "best" not in make_columns(found)


def test_anything_else_stops_with_its_message_and_what_ran_stays(toy_recipe, tiny_base):
    grid = [f"model.name=[{tiny_base}, {toy_recipe.parent}/none]", "train.max_steps=1"]
    with pytest.raises(ModelError, match="none"):
        sweep(toy_recipe, grid)
    first, second = (trial.run.folder for trial in make_trials(toy_recipe, grid))
    assert (first / "report.json").is_file()
    assert not second.exists()


@pytest.mark.parametrize("left", ["nothing", "another run", "half a report"])
def test_a_folder_of_something_else_is_refused_before_anything_runs(
    toy_recipe, tmp_path, no_training, left
):
    trials = make_trials(toy_recipe, ["method.r=[2, 4]"])
    folder = trials[1].run.folder
    folder.mkdir(parents=True)
    other = trials[0].run if left == "another run" else trials[1].run
    if left != "nothing":
        (folder / "recipe.yaml").write_text(resolve_recipe(other).to_yaml(), encoding="utf-8")
        (folder / "report.json").write_text(
            "{}" if left == "another run" else '{"valid', encoding="utf-8"
        )
    if left == "half a report":
        trials[0].run.folder.with_name(trials[0].run.folder.name + ".diverged.txt").write_text(
            "step 1", "utf-8"
        )
    with pytest.raises(AdapterError) as caught:
        sweep(toy_recipe, ["method.r=[2, 4]"])
    told = (
        "its figures cannot be read"
        if left == "half a report"
        else "holds something else than this run"
    )
    assert str(caught.value).startswith(f"{folder}: {told}")


def test_a_run_stopped_before_its_last_rename_is_run_again(done):
    path, found = done
    folder = found.rows[1].folder
    left = folder.with_name(folder.name + ".run")
    folder.rename(left / "adapter")
    again = sweep(path, GRID)
    assert [row.earlier for row in again.rows] == [True, False, True, True]
    assert [row.validation for row in again.rows] == [row.validation for row in found.rows]
    assert not (left / "adapter").exists()


def test_a_stopped_sweep_goes_on_where_it_was(toy_recipe, monkeypatch):
    """A run itself goes on from its checkpoint: see the tests of training."""
    grid = ["train.seed=[1, 2, 3]", "train.max_steps=2"]
    started = []

    def train(recipe, **_):
        started.append(recipe.folder)
        if len(started) == 2:
            raise KeyboardInterrupt
        return own_train(recipe)

    own_train = train_module.train
    monkeypatch.setattr(train_module, "train", train)
    with pytest.raises(KeyboardInterrupt):
        sweep(toy_recipe, grid)
    found = sweep(toy_recipe, grid)
    folders = [row.folder for row in found.rows]
    assert [row.earlier for row in found.rows] == [True, False, False]
    assert started == [folders[0], folders[1], folders[1], folders[2]]
    assert all((folder / "report.json").is_file() for folder in folders)


def test_a_carved_test_is_kept_out_of_training_and_out_of_the_choice(toy_recipe):
    grid = [
        f"data.source={toy_recipe.parent}/train.csv",
        "data.test_fraction=0.2",
        "method.r=[2, 4]",
    ]
    found = sweep(toy_recipe, [*grid, "train.max_steps=1"])
    report = json.loads((found.rows[0].folder / "report.json").read_text(encoding="utf-8"))
    assert report["data"]["train"]["rows"] == 86
    assert any(note.startswith("data.test_fraction: no run trained on") for note in found.notes)
    assert "test" not in json.dumps(make_columns(found))


def test_figures_of_other_rows_and_a_taken_folder_are_noted(toy_recipe):
    (toy_recipe.parent / "adapter").mkdir()
    found = sweep(toy_recipe, ["data.split_seed=[0, 1]", "train.max_steps=1"])
    assert "the runs were not judged on the same validation rows" in " ".join(found.notes)
    assert (
        f"{toy_recipe.parent}/adapter exists: set output.overwrite=true or another output.dir"
        in found.notes
    )


def test_a_fault_of_the_grid_does_not_wait_for_torch(toy_recipe):
    code = (
        "import sys, pathlib, lora_sentiment.commands.sweep as s\n"
        "s.make_trials(pathlib.Path(sys.argv[1]), ['method.r=[2, 4]'])\n"
        "print(*{'torch', 'transformers', 'peft', 'datasets', 'sklearn', 'evaluate'} & set(sys.modules))"
    )
    command = [sys.executable, "-c", code, str(toy_recipe)]
    assert subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip() == ""


def test_several_processes_are_refused(toy_recipe, monkeypatch, no_training):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(
        RecipeError, match="found 2 processes; it runs in one: start it without a launcher"
    ):
        sweep(toy_recipe, ["method.r=[2, 4]"])
