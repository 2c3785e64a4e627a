"""More training: an adapter goes on on new rows, with its labels or with new ones after them."""

import json

import numpy as np
import pytest
import torch

from lora_sentiment import train as train_module
from lora_sentiment.adapter.folder import load_card
from lora_sentiment.adapter.parent import resolve_parent
from lora_sentiment.classifier import load
from lora_sentiment.commands.evaluate import evaluate
from lora_sentiment.errors import LoraSentimentError
from lora_sentiment.models.wrap import head_layers
from lora_sentiment.recipe.recipe import Recipe
from lora_sentiment.train import train
from tests.tasks.test_every_task import COLUMNS, TEXTS, make_rows

NAMES = {"single_label": ["good", "rest"], "multi_label": ["bad", "good"]}
ROWS = make_rows(96)


def rows_of(task, *, with_new):
    """The rows of a task: with a label more, or without it."""
    rows = []
    for i, row in enumerate(ROWS):
        row = dict(row)
        if task == "single_label" and with_new and i % 5 == 0:
            row["label"] = "new"
        if task == "multi_label" and not with_new:
            row["labels"] = [label for label in row["labels"] if label != "odd"]
        rows.append(row)
    return rows


def make_recipe(folder, base, task, kind, *overrides):
    path = folder / "r.yaml"
    path.write_text(
        f"data: {{source: x/y, task: {task}, label_column: {COLUMNS[task]}}}\n"
        f"model: {{name: {base}, dtype: float32, dropout: 0.0}}\n"
        f"method: {{kind: {kind}}}\n"
        "train: {num_train_epochs: 2, batch_size: 24, learning_rate: 5e-3}\n",
        encoding="utf-8",
    )
    return Recipe.load(path, overrides)


def train_parent(folder, base, task, kind, *overrides):
    options = (f"output.dir={folder}/parent", "model.max_length=16", *overrides)
    recipe = make_recipe(folder, base, task, kind, *options)
    rows = rows_of(task, with_new=False)
    return train(recipe, data={"train": rows[:48], "test": rows[48:72]}).adapter


GOES_ON = {
    "single labels, and a new one": ("single_label", "lora", ["method.r=4"], "new"),
    "several labels, and a new one": ("multi_label", "head", [], "odd"),
    "a number": ("regression", "full", [], None),
}
ALSO = {
    "a low-rank head": ("single_label", "lora", ["model.head=low_rank"], None),
    "DoRA": ("single_label", "lora", ["method.use_dora=true"], None),
    "IA3": ("multi_label", "ia3", [], None),
    "VeRA": ("single_label", "vera", ["method.r=4"], None),
    "some tensors": ("regression", "unfreeze", ["method.last_layers=1"], None),
}


@pytest.mark.parametrize(
    ("task", "kind", "overrides", "new"),
    [
        *(pytest.param(*case, id=name) for name, case in GOES_ON.items()),
        *(pytest.param(*case, id=name, marks=pytest.mark.slow) for name, case in ALSO.items()),
    ],
)
def test_an_adapter_goes_on_from_its_answers(
    task, kind, overrides, new, tmp_path, tiny_base, monkeypatch
):
    parent = train_parent(tmp_path, tiny_base, task, kind, *overrides)
    old = load(parent)
    seen = {}
    fit = train_module.fit

    def note(model, **options):
        ids = torch.tensor([[2, 7, 9, 3], [2, 5, 20, 3]])
        objective = options["task"].make_objective(
            options["config"], labels=options["train"].labels, names=[], device=torch.device("cpu")
        )
        seen["logits"] = objective.to_units(model.eval()(input_ids=ids).logits.detach().numpy())
        seen["head"] = list(head_layers(model).values())[-1].weight.detach().clone()
        seen["expected"] = old.engine.compute(ids.numpy(), None)
        return fit(model, **options)

    monkeypatch.setattr(train_module, "fit", note)
    names = NAMES.get(task)
    labels = [] if new is None else [f"data.labels=[{', '.join([*names, new])}]"]
    head = [override for override in overrides if override.startswith("model.")]
    recipe = make_recipe(
        tmp_path, tiny_base, task, kind, f"model.adapter={parent}", f"output.dir={tmp_path}/child",
        *labels, *head, *(["method.last_layers=1"] if kind == "unfreeze" else []),
    )  # fmt: skip
    rows = rows_of(task, with_new=new is not None)
    done = train(recipe, data={"train": rows[48:], "test": rows[:48]})
    num_old = len(old.labels)
    np.testing.assert_allclose(seen["logits"][:, :num_old], seen["expected"], atol=1e-4)
    if task != "regression":
        weights = list(head_layers(old_model(parent)).values())[-1].weight
        assert torch.equal(seen["head"][:num_old], weights)
    card = load_card(done.adapter)
    assert card.parent_sha256 == load_card(parent).sha256
    assert card.labels[:num_old] == list(old.labels)
    assert card.labels[num_old:] == ([] if new is None else [new])
    assert load(done.adapter).predict(TEXTS)
    report = json.loads((done.adapter / "report.json").read_text(encoding="utf-8"))
    compared = report["parent"]
    assert compared["new_labels"] == card.labels[num_old:]
    assert set(compared) == {"sha256", "new_labels", "validation", "test"}
    if task == "single_label" and new:
        assert compared["test"]["rows"] == sum(row["label"] != new for row in rows[:48])
    else:
        assert compared["test"]["rows"] == 48
        kept = rows_of(task, with_new=False)[:48]
        again = evaluate(parent, data={"test": kept}).as_dict()
        assert compared["test"]["before"] == {
            name: again[name] for name in compared["test"]["before"]
        }
    if not new:
        assert compared["test"]["after"] == report["test"]
    assert compared["test"]["difference"]["metric"] == old.task.shown[0]
    assert f"SHA-256 `{card.parent_sha256}`" in (done.adapter / "README.md").read_text("utf-8")


def old_model(folder):
    from lora_sentiment.adapter.folder import load as load_folder

    return load_folder(folder).model


REFUSED = {
    "was trained with method.r=4, not 8; model.max_length=16, not 32; set": [
        "method.r=8", "model.max_length=32"],
    "was trained with method.kind=lora, not head": ["method={kind: head}"],
    "is an adapter of data.task=single_label": ["data.task=multi_label"],
    "the adapter reads single texts; leave out data.text_pair_column": ["data.text_pair_column=q"],
    "has the labels good, rest, and the recipe names rest, good, new": ["data.labels=[rest, good, new]"],
    "no card.json": ["model.adapter=nowhere"],
}  # fmt: skip


@pytest.fixture(scope="module")
def parent(tmp_path_factory, tiny_base):
    return train_parent(
        tmp_path_factory.mktemp("more"), tiny_base, "single_label", "lora", "method.r=4"
    )


@pytest.mark.parametrize("message", REFUSED)
def test_what_does_not_fit_the_adapter_is_refused_at_once(message, parent, tiny_base, tmp_path):
    recipe = make_recipe(
        tmp_path, tiny_base, "single_label", "lora", f"model.adapter={parent}",
        f"output.dir={tmp_path}/child", *REFUSED[message],
    )  # fmt: skip
    with pytest.raises(LoraSentimentError) as caught:
        train(recipe, data={"train": rows_of("single_label", with_new=False)})
    assert message in str(caught.value)
    assert not (tmp_path / "child").exists()


@pytest.mark.parametrize("kind", ["head", "full"])
def test_a_recipe_without_a_method_takes_that_of_its_adapter(kind, tiny_base, tmp_path):
    folder = train_parent(tmp_path, tiny_base, "single_label", kind)
    path = tmp_path / "more.yaml"
    path.write_text(f"data: {{source: x/y}}\nmodel: {{name: {tiny_base}, adapter: {folder}}}\n")
    assert resolve_parent(Recipe.load(path)).method.kind == kind
    with pytest.raises(LoraSentimentError, match=f"was trained with method.kind={kind}, not lora"):
        resolve_parent(Recipe.load(path, ["method.r=2"]))


def test_an_unknown_label_stays_a_broken_row(parent, tiny_base, tmp_path):
    recipe = make_recipe(
        tmp_path, tiny_base, "single_label", "lora", f"model.adapter={parent}", f"output.dir={tmp_path}/child"
    )  # fmt: skip
    with pytest.raises(LoraSentimentError, match="row 1: label 'new' is none of good, rest"):
        train(recipe, data={"train": rows_of("single_label", with_new=True)})
