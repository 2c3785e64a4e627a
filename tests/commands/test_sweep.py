"""A search of settings: axes, refusals, trials, the choice, and that a stopped sweep goes on."""

import json
import math
import os
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import optuna
import pytest

from lora_sentiment import train as train_module
from lora_sentiment.commands import sweep as sweep_module
from lora_sentiment.commands.estimate import resolve_recipe
from lora_sentiment.commands.runs import leave_out_judged
from lora_sentiment.commands.sweep import Space, make_columns, make_notes, parse_seconds, sweep
from lora_sentiment.data.rows import load_data
from lora_sentiment.errors import (
    AdapterError,
    DataError,
    DivergedError,
    ModelError,
    RecipeError,
    TrainingError,
)
from lora_sentiment.recipe.recipe import Recipe
from lora_sentiment.training.history import EvalPoint
from lora_sentiment.training.run_folder import name_run_folder
from tests.conftest import toy_rows, write_csv

GRID = ("train.learning_rate=[1e-5, 1e-2]", "train.max_steps=4", "method.r=[2, 4]")
RANGES = ("train.learning_rate=log(1e-5, 1e-2)", "method.r=int(2, 64)")


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


@dataclass
class Trainer:
    """Stands in for training: a run scores what `score` says of it, and raises what it raises."""

    score: object = lambda run: 1.0 / run.method.r
    evaluations: int = 0
    train_rows: str = "a"
    ran: list[Recipe] = field(default_factory=list)

    def __call__(self, run, *, on_evaluation=None, **_):
        self.ran.append(run)
        name_run_folder(run).mkdir(parents=True, exist_ok=True)
        score = self.score(run)
        points = []
        for number in range(self.evaluations):
            points.append(EvalPoint(10 * (number + 1), number, {}, score, True, 1, 1.0))
            on_evaluation(points)
        run.folder.mkdir()
        scores = {"accuracy": score, "macro_f1": score, "log_loss": 0.5}
        if isinstance(score, tuple):
            scores |= dict(zip(("accuracy", "log_loss"), score, strict=True))
        intervals = {name: {"value": value, "low": 0, "high": 1} for name, value in scores.items()}
        report = {"validation": intervals, "train": {"best_step": 4, "seconds": 1.5}}
        (run.folder / "report.json").write_text(json.dumps(report), encoding="utf-8")
        card = json.dumps({"data": self.find_fingerprints(run)})
        (run.folder / "card.json").write_text(card, encoding="utf-8")
        (run.folder / "recipe.yaml").write_text(resolve_recipe(run).to_yaml(), encoding="utf-8")

    def find_fingerprints(self, run):
        train = self.train_rows + str(run.data.max_train_rows)
        return {"train_sha256": train, "validation_sha256": str(run.data.split_seed)}


@pytest.fixture
def trainer(monkeypatch):
    stands_in = Trainer()
    monkeypatch.setattr(sweep_module, "train_run", stands_in)
    monkeypatch.setattr(sweep_module, "find_fingerprints", stands_in.find_fingerprints)
    return stands_in


def points_of(path: Path, *assignments: str) -> list[dict]:
    return Space.parse(path, assignments).list_points()


def runs_of(path: Path, *assignments: str) -> list[Recipe]:
    space = Space.parse(path, assignments)
    return [space.make_run(point) for point in space.list_points()]


def values_of(found: dict) -> list[dict]:
    return [row["values"] for row in found["rows"]]


# The axes


@pytest.mark.parametrize(
    ("assignment", "values"),
    [
        ("train.learning_rate=[1e-4, 5e-4]", [1e-4, 5e-4]),
        ("train.learning_rate=[1e-4, 0.0001]", [1e-4]),
        ("method.r=[4]", [4]),
        ("method.kind=[lora, head]", ["lora", "head"]),
        ("method=[{kind: lora, r: 2}, {kind: head}]", ["{kind: lora, r: 2}", "{kind: head}"]),
        ("method.rank_pattern=[{q_lin: 2}, {}]", ["{q_lin: 2}", "{}"]),
        ("method.rank_pattern.q_lin=[2, 16]", [2, 16]),
        ("method.target_modules=[[q_lin], [q_lin, v_lin]]", ["[q_lin]", "[q_lin, v_lin]"]),
        ("method.target_modules=[all-linear, [q_lin]]", ["all-linear", "[q_lin]"]),
        ("method.layers_to_transform=[[0], null]", ["[0]", "null"]),
        ("train.class_weights=[balanced, null]", ["balanced", "null"]),
        ("train.class_weights=[[1.0, 2.0], balanced]", ["[1.0, 2.0]", "balanced"]),
        ("train.gradient_checkpointing=[true, false]", ["true", "false"]),
        ("train.learning_rate=log(1e-4, 5e-3)", [1e-4, 5e-3]),
        ("train.learning_rate= uniform(1e-4,5e-3)", [1e-4, 5e-3]),
        ("method.r=int(2, 16)", [2, 16]),
    ],
)
def test_a_list_is_an_axis_where_the_recipe_takes_one_value(toy_recipe, assignment, values):
    # Without `r`, which not every method knows.
    text = toy_recipe.read_text(encoding="utf-8").replace("method: {r: 4, lora_alpha: 8}\n", "")
    toy_recipe.write_text(text, encoding="utf-8")
    key = assignment.partition("=")[0]
    assert points_of(toy_recipe, assignment) == [{key: value} for value in values]


@pytest.mark.parametrize(
    "plain",
    [
        "method.target_modules=[q_lin, k_lin]",
        "data.labels=[negative, positive]",
        "train.class_weights=[1.0, 2.0]",
        "train.report_to=[]",
    ],
)
def test_a_list_that_the_key_takes_is_one_value(toy_recipe, plain):
    axis = "method.r=[2, 4]"
    assert points_of(toy_recipe, plain, axis) == [{"method.r": 2}, {"method.r": 4}]
    section, name = plain.partition("=")[0].split(".")
    expected = getattr(getattr(Recipe.load(toy_recipe, [plain]), section), name)
    for run in runs_of(toy_recipe, plain, axis):
        assert getattr(getattr(run, section), name) == expected


def test_the_last_axis_is_the_fastest_and_overrides_keep_their_order(toy_recipe):
    assignments = ["train.seed=[1, 2]", "method={kind: lora, r: 2}", "method.lora_alpha=[4, 8]"]
    space = Space.parse(toy_recipe, assignments)
    points = space.list_points()
    assert [list(point.values()) for point in points] == [[1, 4], [1, 8], [2, 4], [2, 8]]
    assert list(space.apply(points[1]).values()) == [
        "train.seed=1",
        "method={kind: lora, r: 2}",
        "method.lora_alpha=8",
    ]


@pytest.mark.parametrize(
    "text", ["007", "no", "a, b", "x: y", "'", "ü #1", "null", "1e-4", " ", "${HOME}"]
)
def test_a_value_walks_into_the_recipe_as_it_is(toy_recipe, text):
    runs = runs_of(
        toy_recipe, f"data.text_column={json.dumps([text, 'other'], ensure_ascii=False)}"
    )
    assert [run.data.text_column for run in runs] == [text, "other"]


def test_a_run_has_a_folder_of_its_own_settings(toy_recipe):
    def folders(*assignments: str) -> list[str]:
        return [run.folder.name for run in runs_of(toy_recipe, *assignments)]

    first = folders("train.learning_rate=[1e-4, 1e-3]")
    assert len(set(first)) == 2
    assert folders("train.learning_rate=[1e-4, 1e-3, 1e-2]")[:2] == first
    assert not set(first) & set(folders("train.seed=1", "train.learning_rate=[1e-4, 1e-3]"))
    assert folders("output.dir=x", "train.learning_rate=[1e-4, 1e-3]") == first
    (run, _) = runs_of(toy_recipe, "output.dir=x/y", "method.r=[1, 2]")
    assert run.folder.parent == Path("x/y.sweep")


# What is refused


@pytest.mark.parametrize(
    ("assignments", "message"),
    [
        ([], "no key has several values; give one a list, such as 'train.learning_rate="),
        (["method.target_modules=[q_lin, v_lin]"], "a list of lists if it takes a list"),
        (["method.r=4", "train.sed=1"], "train.sed: unknown key; did you mean 'seed'?"),
        (["method.rr=[4, 8]"], "method.rr: unknown key"),
        (["trian.seed=[4, 8]"], "trian: unknown key; did you mean 'train'?"),
        (["method.r=[4, 8"], "method.r: line 1"),
        (["method.r"], "override 'method.r': expected key=value"),
        (["=[1, 2]"], "override '=1': expected key=value"),
        (["method.r=[4, 8]", "method.r=2"], "a key stands twice; give each key once"),
        (["method.r=[4, 8]", "train.seed=[]"], "train.seed: found []; allowed: a valid integer"),
        (["method.r=uniform(2, 4)"], "method.r: found 2.0; allowed: a valid integer (with"),
        (["method.r=[4, 0]"], "method.r: found 0; allowed: greater than or equal to 1 (with meth"),
        (["method.r=int(0, 4)"], "method.r: found 0; allowed: greater than or equal to 1 (with"),
        (["method.r=int(1.5, 4)"], "method.r: found int(1.5, 4) ("),
        (["method.r=int(8, 4)"], "method.r: found int(8, 4) ("),
        (["train.learning_rate=log(0, 1)"], "train.learning_rate: found log(0, 1) ("),
        (["train.learning_rate=log(a, b)"], "allowed: a list of values, log(LOW, HIGH), uniform("),
        (["train.learning_rate=log(1e-4)"], "train.learning_rate: found 'log(1e-4)'"),
        (
            ["train.engine=[auto, fast]", "method.use_dora=[false, true]"],
            "set train.engine=auto (with train.engine=fast method.use_dora=true)",
        ),
        (["train.metric_for_best_model=[accuracy, mcc]"], "train.metric_for_best_model are no ax"),
        (["output.dir=[a, b]"], "name, output and train.metric_for_best_model are no axes"),
        (["train.seed=" + str(list(range(40))), "method.r=" + str(list(range(1, 40)))], "at most"),
        (["data.source=['nowhere-*.csv', 'x.csv']"], "(with data.source=nowhere-*.csv)"),
    ],
)
def test_a_fault_is_told_before_anything_runs(toy_recipe, trainer, assignments, message):
    with pytest.raises((RecipeError, DataError)) as caught:
        sweep(toy_recipe, assignments)
    assert message in str(caught.value)
    assert not (toy_recipe.parent / "adapter.sweep").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sampler": "grid"}, "a grid has no ranges"),
        ({"num_seeds": 2}, "--seeds varies train.seed, which is an axis"),
        ({"write": Path("nowhere/best.yaml")}, "there is no folder nowhere; make it first"),
    ],
)
def test_options_that_do_not_fit_the_axes_are_refused(toy_recipe, trainer, options, message):
    with pytest.raises(RecipeError, match=message):
        sweep(toy_recipe, [*RANGES, "train.seed=[1, 2]"], **options)


def test_a_missing_recipe_is_told_once(tmp_path):
    with pytest.raises(RecipeError, match="no such recipe file") as caught:
        sweep(tmp_path / "none.yaml", ["method.r=[1, 2]"])
    assert str(caught.value).count("\n") == 0


def test_a_sweep_of_other_settings_is_refused_in_one_message(toy_recipe, trainer):
    sweep(toy_recipe, RANGES, num_trials=2)
    sweep(toy_recipe, RANGES, num_trials=3, sampler="random")
    for other in (RANGES[:1], (*RANGES, "train.max_steps=3"), (RANGES[0], "method.r=int(2, 32)")):
        with pytest.raises(RecipeError, match="holds a sweep of another recipe, other overrides"):
            sweep(toy_recipe, other, num_trials=2)
    assert len(trainer.ran) == 3


def test_a_broken_study_is_told_and_its_runs_are_kept(toy_recipe, trainer):
    first = sweep(toy_recipe, GRID)
    study = toy_recipe.parent / "adapter.sweep/study.db"
    study.write_bytes(b"nothing that sqlite knows" * 100)
    with pytest.raises(AdapterError, match=r"study\.db: cannot be used \(.*or delete it"):
        sweep(toy_recipe, GRID)
    study.unlink()
    assert sweep(toy_recipe, GRID) == first
    assert len(trainer.ran) == 4


def test_the_study_is_in_a_folder_of_any_name(toy_recipe, trainer):
    folder = toy_recipe.parent / "a {b}?mode=ro#%20"
    sweep(toy_recipe, [*GRID, f"output.dir='{folder}/adapter'"], num_trials=1)
    assert (folder / "adapter.sweep/study.db").is_file()


def test_one_sweep_at_a_time_has_the_folder(toy_recipe, trainer):
    def score(run):
        with pytest.raises(RecipeError, match="another run is at work here"):
            sweep(toy_recipe, GRID)
        return 1.0

    trainer.score = score
    assert len(sweep(toy_recipe, GRID)["rows"]) == 4


def test_several_processes_are_refused(toy_recipe, monkeypatch, trainer):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(
        RecipeError, match="found 2 processes; it runs in one: start it without a launcher"
    ):
        sweep(toy_recipe, ["method.r=[2, 4]"])


def test_a_fault_does_not_wait_for_torch(toy_recipe):
    code = (
        "import sys, pathlib, lora_sentiment.commands.sweep as s\n"
        "space = s.Space.parse(pathlib.Path(sys.argv[1]), ['method.r=[2, 4]'])\n"
        "space.check(space.list_points())\n"
        "print(*{'torch', 'transformers', 'peft', 'datasets', 'sklearn', 'evaluate'} & set(sys.modules))"
    )
    command = [sys.executable, "-c", code, str(toy_recipe)]
    assert subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip() == ""


@pytest.mark.parametrize(
    ("text", "seconds"), [("90s", 90), ("20min", 1200), ("1.5h", 5400), ("2 min", 120)]
)
def test_a_budget_is_a_time_with_its_unit(text, seconds):
    assert parse_seconds(text) == seconds


@pytest.mark.parametrize("text", ["", "20", "min", "0s", "1d", "-1s", "1e3s"])
def test_another_budget_is_refused(text):
    with pytest.raises(RecipeError, match=r"--budget: found .*such as 20min"):
        parse_seconds(text)


# The rows that are judged


def test_what_is_judged_is_left_out_and_the_rest_stays(toy_recipe):
    asked = "data.source={train: a.csv, validation: b.csv, test: c.csv, other_shop: d.csv}"
    for run in runs_of(
        toy_recipe, asked, "data.test_fraction=0.2", "data.max_test_rows=5", "method.r=[2, 4]"
    ):
        assert run.data.source == {"train": "a.csv", "validation": "b.csv"}
        assert run.data.test_fraction == 0
    carved = ["data.source=a.csv", "data.test_fraction=0.2"]
    (run, _) = runs_of(toy_recipe, *carved, "method.r=[2, 4]")
    assert run.data == Recipe.load(toy_recipe, carved).data


def test_of_the_bundled_reviews_too(toy_recipe):
    columns = ("data.source=bundled", "data.text_column=text", "data.label_column=label")
    config = Recipe.load(toy_recipe, columns).data
    found = load_data(leave_out_judged(config))
    whole = load_data(config)
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
    runs = runs_of(
        toy_recipe, "data.source=some/reviews", f"data.splits={given}", "method.r=[2, 4]"
    )
    assert [run.data.splits for run in runs] == [kept, kept]
    assert len(asked) == 1


# A grid that is trained


def test_every_combination_runs_without_the_rows_that_are_judged(done):
    path, found = done
    assert not (path.parent / "test.csv").exists()
    assert [tuple(row["values"].values()) for row in found["rows"]] == [
        (1e-5, 2),
        (1e-5, 4),
        (1e-2, 2),
        (1e-2, 4),
    ]
    for row in found["rows"]:
        folder = Path(row["folder"])
        assert folder.parent == path.parent / "adapter.sweep"
        report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
        assert row["validation"] == report["validation"]
        assert "test" not in report
        assert report["train"]["steps"] == 4
        ran = Recipe.load(folder / "recipe.yaml")
        assert (ran.train.learning_rate, ran.method.r) == tuple(row["values"].values())
    assert not (path.parent / "adapter").exists()


def test_the_best_one_is_best_on_validation_and_its_command_trains_it(done):
    path, found = done
    ranks = []
    for row in found["rows"]:
        scores = row["validation"]
        ranks.append((scores["accuracy"]["value"], -scores["log_loss"]["value"]))
    assert found["best"] == found["rows"][ranks.index(max(ranks))]
    command = shlex.split(found["command"])
    assert command[:3] == ["lora-sentiment", "train", str(path)]
    write_csv(path.parent / "test.csv", toy_rows(161)[120:])
    try:
        run = train_module.train(
            Recipe.load(command[2], [*command[3:], f"output.dir={path.parent}/best"])
        )
    finally:
        (path.parent / "test.csv").unlink()
    # Alone or after others, with something to judge or without: the same run.
    assert run.report["validation"] == found["best"]["validation"]
    assert run.report["test"]["accuracy"]["value"] is not None


def test_a_finished_sweep_is_not_run_again(done, monkeypatch):
    monkeypatch.setattr(sweep_module, "train_run", None)
    path, found = done
    assert sweep(path, GRID) == found


def test_the_table_shows_axes_figures_and_the_best(done):
    _, found = done
    columns = make_columns(found)
    assert list(columns) == [
        "best", "train.learning_rate", "method.r", "accuracy", "macro_f1", "log_loss", "time", "note",
    ]  # fmt: skip
    best = found["rows"].index(found["best"])
    assert [i for i, cell in enumerate(columns["best"]) if cell] == [best]
    assert columns["method.r"] == ["2", "4", "2", "4"]
    value = found["rows"][0]["validation"]["accuracy"]["value"]
    assert columns["accuracy"][0].startswith(f"{value:.4f} [")
    (note,) = make_notes(found)
    assert note.startswith("best: by accuracy on validation, ties by log_loss")


def test_the_figures_are_json(done):
    _, found = done
    assert json.loads(json.dumps(found)) == found


def test_a_carved_test_is_kept_out_of_training_and_out_of_the_choice(toy_recipe):
    found = sweep(
        toy_recipe,
        [
            f"data.source={toy_recipe.parent}/train.csv",
            "data.test_fraction=0.2",
            "method.r=[2, 4]",
            "train.max_steps=1",
        ],
        num_trials=1,
    )
    report = json.loads((Path(found["best"]["folder"]) / "report.json").read_text(encoding="utf-8"))
    assert report["data"]["train"]["rows"] == 86
    assert "test" not in found["best"]
    assert "test" not in report


# The choice


@pytest.mark.parametrize(
    ("figures", "best"),
    [
        ([(0.5, 0.1), (0.9, 0.9), (0.8, 0.1)], 1),
        ([(0.9, 0.5), (0.9, 0.2), (0.8, 0.1)], 1),
        ([(0.9, 0.5), (0.9, 0.5), (0.8, 0.1)], 0),
    ],
)
@pytest.mark.parametrize("metric", ["accuracy", "log_loss"])
def test_the_best_one_has_the_best_metric_and_ties_go_by_log_loss(
    toy_recipe, trainer, figures, best, metric
):
    if metric == "log_loss":
        best = min(range(3), key=lambda i: figures[i][1])
    trainer.score = lambda run: figures[run.method.r - 1]
    found = sweep(toy_recipe, [f"train.metric_for_best_model={metric}", "method.r=[1, 2, 3]"])
    assert found["rows"].index(found["best"]) == best
    assert found["metrics"][0] == metric


def test_the_written_recipe_has_the_best_values_and_the_original(toy_recipe, trainer):
    written = toy_recipe.parent / "best.yaml"
    written.write_text("an older one", encoding="utf-8")
    found = sweep(toy_recipe, ["method.target_modules=[[q_lin], [v_lin]]", *GRID], write=written)
    overrides = shlex.split(found["command"])[3:]
    assert len(overrides) == 4
    expected = Recipe.load(toy_recipe, [*overrides, "name=best"])
    assert Recipe.load(written) == expected
    text = written.read_text(encoding="utf-8")
    assert "weight_decay" not in text, "no defaults"
    assert [path.name for path in toy_recipe.parent.glob(".*.yaml")] == []


def test_the_best_runs_again_with_other_seeds_and_their_spread_is_shown(toy_recipe, trainer):
    trainer.score = lambda run: run.train.seed / 100 if run.method.r == 4 else 0.1
    options = {"num_seeds": 3}
    found = sweep(toy_recipe, ["train.seed=10", "method.r=[2, 4]"], **options)
    assert found["best"]["values"] == {"method.r": 2}
    found = sweep(
        toy_recipe, ["train.seed=40", "output.dir=" + str(toy_recipe.parent / "b"), "method.r=[2, 4]"],
        **options,
    )  # fmt: skip
    assert [run.train.seed for run in trainer.ran[4:]] == [40, 40, 41, 42]
    assert [row["validation"]["accuracy"]["value"] for row in found["seeds"]] == [0.4, 0.41, 0.42]
    assert "3 seeds: accuracy 0.4100 on average, standard deviation 0.0100" in " ".join(
        make_notes(found)
    )
    num_ran = len(trainer.ran)
    again = sweep(
        toy_recipe, ["train.seed=40", "output.dir=" + str(toy_recipe.parent / "b"), "method.r=[2, 4]"],
        **options,
    )  # fmt: skip
    assert (again, len(trainer.ran)) == (found, num_ran)


# Samplers


@pytest.mark.parametrize(
    ("assignments", "options", "num_rows"),
    [
        (GRID, {}, 4),
        (GRID, {"sampler": "grid", "num_trials": 3}, 3),
        (GRID, {"sampler": "grid", "num_trials": 7}, 4),
        (RANGES, {"num_trials": 5}, 5),
        (RANGES, {"sampler": "random", "num_trials": 5}, 5),
        (RANGES, {"budget": 0.001}, 0),
    ],
)
def test_a_sweep_ends_with_its_grid_its_trials_or_its_budget(
    toy_recipe, trainer, assignments, options, num_rows
):
    found = sweep(toy_recipe, assignments, **options)
    assert len(found["rows"]) == len(trainer.ran) == num_rows
    for row in found["rows"]:
        assert 1e-5 <= row["values"]["train.learning_rate"] <= 1e-2
        assert 2 <= row["values"]["method.r"] <= 64


def test_the_running_trial_ends_after_the_budget_and_no_other_starts(
    toy_recipe, trainer, monkeypatch
):
    now = [0.0]
    monkeypatch.setattr(sweep_module.time, "monotonic", lambda: now[0])

    def score(run):
        now[0] += 60
        return 0.5

    trainer.score = score
    assert len(sweep(toy_recipe, RANGES, budget=90)["rows"]) == 2
    assert len(sweep(toy_recipe, RANGES, budget=90)["rows"]) == 4


def test_tpe_learns_where_the_best_values_are(toy_recipe, trainer):
    def score(run):
        return -((math.log10(run.train.learning_rate) + 3) ** 2)

    trainer.score = score
    sweep(toy_recipe, RANGES, num_trials=20)
    scores = [score(run) for run in trainer.ran]
    assert sum(scores[-8:]) > sum(scores[:8]) / 2


def test_a_combination_that_is_drawn_again_is_not_run_again(toy_recipe, trainer):
    found = sweep(toy_recipe, ["method.r=[2, 4, 8]"], num_trials=20, sampler="random")
    states = [row["state"] for row in found["rows"]]
    assert states.count("finished") == len(trainer.ran) == 3
    assert states.count("repeated") == len(states) - 3 > 0
    assert states[-1] == "finished", "nothing is drawn when every combination ran"


def test_a_trial_below_the_median_is_pruned_and_leaves_nothing(toy_recipe, trainer):
    trainer.evaluations = 2
    trainer.score = lambda run: 0.1 if len(trainer.ran) == 7 else 0.5 + len(trainer.ran) / 100
    found = sweep(toy_recipe, RANGES, num_trials=8)
    row = found["rows"][6]
    assert (row["state"], row["reason"]) == ("pruned", "pruned at step 10")
    assert make_columns(found)["note"][6] == "pruned at step 10"
    run = trainer.ran[6]
    assert not run.folder.exists()
    assert not name_run_folder(run).exists()
    assert [other["state"] for other in found["rows"]].count("finished") == 7
    assert sweep(toy_recipe, RANGES, num_trials=8) == found, "and is not run again"
    assert len(trainer.ran) == 8


def test_a_grid_is_run_whole(toy_recipe, trainer):
    trainer.evaluations = 1
    trainer.score = lambda run: 1.0 / run.method.r
    found = sweep(toy_recipe, ["method.r=[1, 2, 3, 4, 5, 6, 7, 8]"])
    assert {row["state"] for row in found["rows"]} == {"finished"}


def test_a_sweep_with_a_budget_ends_when_every_combination_ran(toy_recipe, trainer):
    found = sweep(toy_recipe, ["method.r=[2, 4]"], budget=600)
    assert len(trainer.ran) == 2
    assert found["rows"][-1]["state"] == "finished"


def test_a_range_of_few_integers_ends_when_every_combination_ran(toy_recipe, trainer):
    found = sweep(toy_recipe, ["method.r=int(2, 4)"], budget=600)
    assert sorted(run.method.r for run in trainer.ran) == [2, 3, 4]
    assert found["rows"][-1]["state"] == "finished"


def test_a_grid_runs_what_another_sampler_left(toy_recipe, trainer):
    sweep(toy_recipe, ["method.r=[2, 4, 8]"], sampler="random", num_trials=3)
    found = sweep(toy_recipe, ["method.r=[2, 4, 8]"], sampler="grid")
    assert sorted(run.method.r for run in trainer.ran) == [2, 4, 8]
    assert {row["values"]["method.r"] for row in found["rows"]} == {2, 4, 8}


def test_trials_on_other_validation_rows_are_refused(toy_recipe, trainer):
    for _ in range(2):
        with pytest.raises(
            RecipeError, match="the validation rows are not those of earlier trials"
        ):
            sweep(toy_recipe, ["data.split_seed=[0, 1]"])
    assert len(trainer.ran) == 2


def test_a_sweep_does_not_go_on_with_other_training_rows(toy_recipe, trainer):
    assignments = ["method.r=[2, 4, 8]"]
    sweep(toy_recipe, assignments, num_trials=2)
    trainer.train_rows = "b"
    with pytest.raises(RecipeError, match="the train rows are not those of earlier trials"):
        sweep(toy_recipe, assignments, num_trials=3)


def test_a_finished_sweep_of_other_rows_is_refused_as_it_would_compare_with_its_seeds(
    toy_recipe, trainer
):
    sweep(toy_recipe, ["method.r=[2, 4]"])
    trainer.train_rows = "b"
    for options in ({}, {"num_seeds": 2}):
        with pytest.raises(RecipeError, match="the train rows are not those of earlier trials"):
            sweep(toy_recipe, ["method.r=[2, 4]"], **options)


def test_an_axis_may_choose_the_training_rows(toy_recipe, trainer):
    found = sweep(toy_recipe, ["data.max_train_rows=[20, 40]"])
    assert [row["state"] for row in found["rows"]] == ["finished", "finished"]


@pytest.mark.parametrize("name", ["a #1", "- a", "a: 2", "[a]"])
def test_the_seeds_of_the_best_stand_beside_it_whatever_the_folder_is_called(
    toy_recipe, trainer, name
):
    folder = toy_recipe.parent / name
    found = sweep(
        toy_recipe, ["method.r=[2, 4]", f"output.dir={json.dumps(str(folder))}"], num_seeds=2
    )
    assert len(found["seeds"]) == 2
    best, other = found["seeds"]
    assert Path(other["folder"]).parent == Path(best["folder"]).parent == Path(f"{folder}.sweep")


@pytest.mark.parametrize(
    ("name", "message"),
    [("pipe", "or no file"), ("toy.yaml", "the recipe itself"), ("x" * 300, "cannot be written")],
)
def test_the_best_recipe_replaces_no_device_and_not_the_recipe(toy_recipe, trainer, name, message):
    os.mkfifo(toy_recipe.parent / "pipe")
    path = toy_recipe if name == "toy.yaml" else toy_recipe.parent / name
    before = toy_recipe.read_bytes()
    with pytest.raises(RecipeError, match=message):
        sweep(toy_recipe, ["method.r=[2, 4]"], write=path)
    assert toy_recipe.read_bytes() == before
    assert (toy_recipe.parent / "pipe").is_fifo()


def test_training_reports_each_evaluation_and_a_pruned_one_leaves_no_adapter(toy_recipe):
    seen = []

    def stop(evaluations):
        seen.append([point.step for point in evaluations])
        if len(evaluations) == 2:
            raise optuna.TrialPruned

    recipe = Recipe.load(toy_recipe, ["train.max_steps=3", "train.eval_steps=1"])
    with pytest.raises(optuna.TrialPruned):
        train_module.train(recipe, on_evaluation=stop)
    assert seen == [[1], [1, 2]]
    assert not recipe.folder.exists()


# Trials that fail


def test_a_run_that_diverges_is_a_row_and_is_not_run_again(toy_recipe, monkeypatch):
    grid = ["train.learning_rate=[1e30, 1e-2]", "train.max_steps=4"]
    found = sweep(toy_recipe, grid)
    diverged, finished = found["rows"]
    assert diverged["state"] == "diverged"
    assert "step " in diverged["reason"]
    assert found["best"] == finished
    assert make_columns(found)["note"] == [diverged["reason"], ""]
    monkeypatch.setattr(train_module, "train", None)
    assert sweep(toy_recipe, grid) == found


@pytest.mark.parametrize(
    ("error", "state", "reason"),
    [
        (DivergedError("step 3: nan"), "diverged", "diverged: step 3: nan"),
        (ModelError("no such\nbase"), "failed", "failed: no such base"),
    ],
)
def test_an_error_of_a_run_is_a_row_with_its_reason(toy_recipe, trainer, error, state, reason):
    def score(run):
        if run.method.r == 2:
            raise error
        return 0.5

    trainer.score = score
    found = sweep(toy_recipe, ["method.r=[1, 2, 3]"])
    assert [row["state"] for row in found["rows"]] == ["finished", state, "finished"]
    assert found["rows"][1]["reason"] == reason


def test_what_failed_runs_again_when_its_cause_is_mended(toy_recipe, trainer):
    def fail(run):
        raise DataError("row 7: text is empty")

    grid = ["method.r=[1, 2, 3]", "train.learning_rate=[1e-3, 1e-4]"]
    trainer.score = fail
    for _ in range(2):
        with pytest.raises(TrainingError, match="the first 3 trials failed"):
            sweep(toy_recipe, grid)
    trainer.score = lambda run: run.method.r
    trainer.ran.clear()
    found = sweep(toy_recipe, grid)
    assert [row["state"] for row in found["rows"]] == ["finished"] * 6
    assert len({str(row["values"]) for row in found["rows"]}) == len(trainer.ran) == 6
    assert found["best"]["values"]["method.r"] == 3
    assert sweep(toy_recipe, grid) == found


def test_more_seeds_can_be_asked_for_and_one_that_fails_is_left_out(toy_recipe, trainer):
    def score(run):
        if run.train.seed == 44:
            raise ModelError("memory ran out")
        return run.train.seed / 100

    trainer.score = score
    for num_seeds in (2, 4):
        found = sweep(toy_recipe, ["method.r=[2]"], num_seeds=num_seeds)
    states = [row["state"] for row in found["seeds"]]
    assert states == ["finished", "finished", "failed", "finished"]
    assert [run.train.seed for run in trainer.ran] == [42, 43, 44, 45]
    assert "the best with 3 seeds: accuracy 0.4333 on average" in " ".join(make_notes(found))


def test_memory_that_ran_out_is_a_row(toy_recipe, monkeypatch):
    def train(recipe, **_):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 B")

    monkeypatch.setattr(train_module, "train", train)
    found = sweep(toy_recipe, ["method.r=[2, 4]"])
    assert [row["state"] for row in found["rows"]] == ["failed", "failed"]
    assert found["rows"][0]["reason"].startswith("failed: memory ran out: DefaultCPUAllocator")
    assert (found["best"], found["command"]) == (None, "")


def test_an_undefined_metric_is_a_failure(toy_recipe, trainer):
    trainer.score = lambda run: None
    found = sweep(toy_recipe, ["method.r=[1, 2]"])
    assert found["rows"][0]["reason"] == "failed: accuracy is undefined on validation"


def test_a_mistake_that_is_in_all_trials_stops_the_sweep(toy_recipe, trainer):
    def score(run):
        raise DataError("row 7: no label")

    trainer.score = score
    with pytest.raises(TrainingError, match="the first 3 trials failed: row 7: no label"):
        sweep(toy_recipe, RANGES, num_trials=30)
    assert len(trainer.ran) == 3
    trainer.score = lambda run: 0.5
    assert len(sweep(toy_recipe, RANGES, num_trials=5)["rows"]) == 5


@pytest.mark.parametrize("left", ["nothing", "half a report"])
def test_a_folder_of_something_else_is_a_row(toy_recipe, trainer, left):
    run = runs_of(toy_recipe, "method.r=[2, 4]")[1]
    run.folder.mkdir(parents=True)
    if left != "nothing":
        (run.folder / "recipe.yaml").write_text(resolve_recipe(run).to_yaml(), encoding="utf-8")
        (run.folder / "report.json").write_text('{"valid', encoding="utf-8")
    found = sweep(toy_recipe, ["method.r=[2, 4]"])
    told = "holds something else than this run" if left == "nothing" else "cannot be read"
    assert told in found["rows"][1]["reason"]


# Stopped sweeps


@pytest.mark.parametrize(
    ("assignments", "options", "killed_at"),
    [
        (GRID, {}, 3),
        (RANGES, {"num_trials": 4}, 3),
        (RANGES, {"num_trials": 2, "sampler": "random"}, 1),
    ],
)
def test_a_killed_sweep_goes_on_with_the_same_trials(
    toy_recipe, trainer, assignments, options, killed_at
):
    def score(run):
        if len(trainer.ran) == killed_at:
            raise KeyboardInterrupt
        return 1.0 / run.method.r

    whole = sweep(toy_recipe, [*assignments, f"output.dir={toy_recipe.parent}/whole"], **options)
    trainer.ran.clear()
    trainer.score = score
    with pytest.raises(KeyboardInterrupt):
        sweep(toy_recipe, assignments, **options)
    found = sweep(toy_recipe, assignments, **options)

    def sort(rows):
        return sorted(rows, key=lambda values: str(values))

    assert sort(values_of(found)) == sort(values_of(whole))
    folders = [run.folder for run in trainer.ran]
    assert folders[killed_at - 1] in folders[killed_at:]
    assert len(folders) == len(set(folders)) + 1 == len(found["rows"]) + 1


def test_a_sweep_that_was_killed_while_it_drew_draws_the_same(toy_recipe, trainer, monkeypatch):
    whole = sweep(toy_recipe, [*RANGES, f"output.dir={toy_recipe.parent}/whole"], num_trials=4)
    suggest, calls = optuna.Trial._suggest, []

    def stop(*arguments):
        calls.append(arguments)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return suggest(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(optuna.Trial, "_suggest", stop)
        with pytest.raises(KeyboardInterrupt):
            sweep(toy_recipe, RANGES, num_trials=4)
    assert values_of(sweep(toy_recipe, RANGES, num_trials=4)) == values_of(whole)


def test_a_trial_is_enqueued_once_though_that_was_killed_too(toy_recipe, trainer, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(sweep_module, "train_run", stop)
        with pytest.raises(KeyboardInterrupt):
            sweep(toy_recipe, RANGES, num_trials=4)
    with monkeypatch.context() as patch:
        patch.setattr(optuna.Study, "tell", stop)
        with pytest.raises(KeyboardInterrupt):
            sweep(toy_recipe, RANGES, num_trials=4)
    found = sweep(toy_recipe, RANGES, num_trials=4)
    assert [row["state"] for row in found["rows"]] == ["finished"] * 4


def test_a_trial_that_was_killed_before_it_was_told_is_not_run_again(
    toy_recipe, trainer, monkeypatch
):
    def tell(*_, **__):
        raise KeyboardInterrupt

    trainer.evaluations = 2
    with monkeypatch.context() as patch:
        patch.setattr(optuna.Study, "tell", tell)
        with pytest.raises(KeyboardInterrupt):
            sweep(toy_recipe, GRID)
    found = sweep(toy_recipe, GRID)
    assert len(trainer.ran) == 4
    assert [row["state"] for row in found["rows"]].count("finished") == 4
    storage = f"sqlite:///{toy_recipe.parent}/adapter.sweep/study.db"
    study = optuna.load_study(study_name="sweep", storage=storage)
    kept = [trial for trial in study.get_trials() if trial.state.name == "COMPLETE"]
    assert [len(trial.intermediate_values) for trial in kept] == [2, 2, 2, 2]


def test_a_run_stopped_before_its_last_rename_is_run_again(toy_recipe):
    grid = ["method.r=[2, 4]", "train.max_steps=1", "offline=bundled"]
    found = sweep(toy_recipe, grid)
    folder = Path(found["rows"][1]["folder"])
    left = folder.with_name(folder.name + ".run")
    folder.rename(left / "adapter")
    (folder.parent / "study.db").unlink()
    again = sweep(toy_recipe, grid)
    assert [row["validation"] for row in again["rows"]] == [
        row["validation"] for row in found["rows"]
    ]
    assert not (left / "adapter").exists()


@pytest.mark.slow
def test_a_sweep_survives_sigkill(toy_recipe):
    """Killed in each of three trials, each run ends as in an unbroken sweep."""
    options = ["train.max_steps=20", "train.save_steps=2", "train.eval_steps=2", "--trials", "6"]
    folder = toy_recipe.parent / "adapter.sweep"
    verb = [sys.executable, "-m", "lora_sentiment", "sweep", str(toy_recipe), *RANGES, *options]
    for number in (1, 3, 4):
        process = subprocess.Popen(verb, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        while len(list(folder.glob("run-*.run/checkpoints/step-*[02468]"))) == 0 or (
            len(list(folder.glob("run-*/report.json"))) < number
        ):
            assert process.poll() is None, process.communicate()
            time.sleep(0.05)
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
    broken = json.loads(subprocess.check_output([*verb, "--json"]))
    whole = sweep(
        toy_recipe, [*RANGES, *options[:3], f"output.dir={toy_recipe.parent}/whole"], num_trials=6
    )
    for row, expected in zip(broken["rows"], whole["rows"], strict=True):
        assert (row["values"], row["state"]) == (expected["values"], expected["state"])
        assert row.get("validation") == expected.get("validation")


# The plots


def test_optunas_plots_are_drawn(toy_recipe, trainer):
    folder = toy_recipe.parent / "plots"
    sweep(toy_recipe, [*RANGES, "method.kind=[lora]"], num_trials=4, plots=folder)
    assert sorted(path.name for path in folder.iterdir()) == [
        "optimization_history.png", "parallel_coordinate.png", "param_importances.png", "slice.png",
    ]  # fmt: skip


def test_a_plot_that_cannot_be_drawn_is_a_warning(toy_recipe, trainer, caplog, monkeypatch):
    def draw(study, target_name):
        raise RuntimeError("no font")

    monkeypatch.setattr("optuna.visualization.matplotlib.plot_param_importances", draw)
    folder = toy_recipe.parent / "plots"
    found = sweep(toy_recipe, RANGES, num_trials=1, plots=folder)
    assert found["best"]
    assert "param_importances.png cannot be drawn: no font" in caplog.text
    assert (folder / "optimization_history.png").is_file()
