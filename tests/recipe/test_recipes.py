"""Every recipe that ships: it validates, says only what it must, and runs."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from lora_sentiment.adapter.folder import load
from lora_sentiment.models.families import DISTILBERT, find_public, resolve_targets
from lora_sentiment.recipe.recipe import Recipe
from lora_sentiment.tasks import find_task
from lora_sentiment.train import train
from tests.conftest import BAD, FILLERS, GOOD
from tests.tiny_families import save_family_base

FOLDER = Path(__file__).parents[2] / "recipes"
RECIPES = sorted(FOLDER.rglob("*.yaml"))
HUB = ("train", "test")
SOURCES = {
    "bundled": ("text", "label", ("negative", "positive"), (*HUB, "validation")),
    "bundled stars": ("text", "stars", (1, 2, 3, 4, 5), (*HUB, "validation")),
    "bundled-emotions": ("text", "emotions", ("anger", "fear", "joy"), (*HUB, "validation")),
    "IMDB Dataset.csv": ("review", "sentiment", ("positive", "negative"), ()),
    "recipes/my_data.csv": ("message", "kind", ("complaint", "praise", "question"), ()),
    "stanfordnlp/imdb": ("text", "label", (0, 1), HUB),
    "stanfordnlp/sst2": ("sentence", "label", (0, 1), (*HUB, "validation")),
    "SetFit/sst5": ("text", "label", (0, 1, 2, 3, 4), (*HUB, "validation")),
    "clapAI/MultiLingualSentiment": (
        "text",
        "label",
        ("negative", "neutral", "positive"),
        (*HUB, "validation"),
    ),
    "fancyzhx/ag_news": ("text", "label", (0, 1, 2, 3), HUB),
}
"""What each source really holds: its two columns, the values of its labels, its labelled splits."""
NOT_HERE = {"clapAI/MultiLingualSentiment"}
"""Sources that the local Hub does not have."""
every_recipe = pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)


@pytest.fixture(scope="session")
def bases(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Six tiny blocks, as many as the recipes' bases have: without a head, and with one for two labels."""
    from transformers import AutoTokenizer, DistilBertConfig, DistilBertForSequenceClassification

    torch.manual_seed(0)
    config = DistilBertConfig.from_pretrained(tiny_base, n_layers=6, num_labels=2)
    model = DistilBertForSequenceClassification(config)
    folders = {name: tmp_path_factory.mktemp("six") / name for name in ("headless", "sst2")}
    model.distilbert.save_pretrained(folders["headless"])
    model.save_pretrained(folders["sst2"])
    for folder in folders.values():
        AutoTokenizer.from_pretrained(tiny_base).save_pretrained(folder)
    for model_type in ("bert", "roberta", "xlm-roberta", "modernbert"):
        folders[model_type] = tmp_path_factory.mktemp("other") / model_type
        save_family_base(folders[model_type], model_type)
    return folders


def name_source(recipe: Recipe) -> str:
    """Return the key of a recipe's source."""
    source = str(recipe.data.source)
    return "bundled stars" if recipe.data.label_column == "stars" else source


def base_of(recipe: Recipe, bases: dict[str, Path]) -> Path:
    """Return the tiny base that stands for a recipe's own."""
    public = find_public(recipe.model.name)
    model_type = public[0].model_type if public else "distilbert"
    if model_type != "distilbert":
        return bases[model_type]
    return bases["sst2" if "sst-2" in recipe.model.name else "headless"]


def write_rows(path: Path, source: str, *, num_rows: int, first: int) -> str:
    """Write texts whose label stands in them, as a source has its columns and labels; return the path."""
    text_column, label_column, values, _ = SOURCES[source]
    words = [*GOOD, *BAD]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow([text_column, label_column])
        for i in range(first, first + num_rows):
            fillers = [FILLERS[(i * step) % len(FILLERS)] for step in (1, 3, 5)]
            label = i % len(values)
            text = [*fillers, words[label], "abcdefghijklmnopqrstuvwxyz"[i % 26], *"aeiou"[: i % 6]]
            writer.writerow([" ".join(text), values[label]])
    return str(path)


def roles_of(recipe: Recipe) -> dict[str, str]:
    """Return role to split of the recipe's source; a lone file has one."""
    splits = SOURCES[name_source(recipe)][3]
    return recipe.data.splits or {split: split for split in splits} or {"train": "train"}


def toy_source(recipe: Recipe, folder: Path) -> list[str]:
    """Return the overrides that put toy files in place of a recipe's source, split for split."""
    source = name_source(recipe)
    files = {
        role: write_rows(
            folder / f"{split}.csv", source, num_rows=100 if role == "train" else 21, first=1000 * i
        )
        for i, (role, split) in enumerate(roles_of(recipe).items())
    }
    # A lone file stays one: the recipe carves it.
    toy = files if len(files) > 1 else files["train"]
    return [f"data.source={json.dumps(toy)}", "data.splits=null"]


def tiny(recipe: Recipe, bases: dict[str, Path], folder: Path) -> list[str]:
    """Return the overrides that make a recipe run in seconds, and leave what it is about."""
    return [
        *toy_source(recipe, folder),
        f"model.name={base_of(recipe, bases)}",
        "model.dtype=float32",
        "model.max_length=12",
        "train.batch_size=8",
        "train.max_tokens_per_micro_batch=64",
        f"output.dir={folder}/adapter",
    ]


def stated(values: dict, *, above: str = "") -> dict[str, object]:
    """Return the dotted keys that a recipe file states outside `method`, with their values."""
    found: dict[str, object] = {}
    for key, value in values.items():
        if above or key != "method":
            found |= (
                stated(value, above=f"{above}{key}.")
                if isinstance(value, dict)
                else {above + key: value}
            )
    return found


def test_there_is_one_for_every_experiment():
    assert len(RECIPES) > 10
    assert len({path.stem for path in RECIPES}) == len(RECIPES)


@every_recipe
def test_a_recipe_opens_with_its_schema_and_one_sentence(path):
    schema, sentence = path.read_text(encoding="utf-8").splitlines()[:2]
    assert schema == "# yaml-language-server: $schema=schema.json"
    assert sentence.startswith("# ")
    assert sentence.endswith(".")


@every_recipe
def test_a_recipe_is_named_after_its_file_and_writes_there(path):
    recipe = Recipe.load(path)
    assert recipe.name == path.stem
    assert recipe.folder == Path("adapters") / path.stem


@every_recipe
def test_a_recipe_states_only_what_differs_from_the_defaults(path, tmp_path):
    minimal = tmp_path / "x.yaml"
    minimal.write_text("data: {source: a/b}\nmodel: {name: a/b}\n", encoding="utf-8")
    defaults = Recipe.load(minimal).model_dump(mode="json")
    ours = Recipe.load(path).model_dump(mode="json")
    for key in stated(yaml.safe_load(path.read_text(encoding="utf-8"))):
        section, _, field = key.partition(".")
        field = field.partition(".")[0]
        own, default = (
            values[section][field] if field else values[section] for values in (ours, defaults)
        )
        assert own != default, f"{key} states the default"


@every_recipe
def test_a_recipe_runs(path, bases, tmp_path):
    recipe = Recipe.load(path)
    small = Recipe.load(path, [*tiny(recipe, bases, tmp_path), "train.max_steps=2"])
    assert small.method == recipe.method
    assert (small.model.quantize, small.model.head) == (recipe.model.quantize, recipe.model.head)
    run = train(small)
    report = json.loads((run.adapter / "report.json").read_text(encoding="utf-8"))
    assert report["train"]["steps"] == 2
    judged = {"validation", "test", *roles_of(recipe)} - {"train"}
    task = find_task(recipe.data.task)
    assert all(0 <= report[role][task.shown[0]]["value"] <= 5 for role in judged)
    assert ("quantisation" in report) == (recipe.model.quantize != "none")
    card = load(run.adapter).card
    num_labels = 1 if task.name == "regression" else len(SOURCES[name_source(recipe)][2])
    assert len(card.labels) == num_labels
    assert recipe.data.labels in (None, tuple(card.labels))


@every_recipe
def test_a_recipe_uses_every_labelled_split_of_its_source(path):
    recipe = Recipe.load(path)
    *_, splits = SOURCES[name_source(recipe)]
    assert set(roles_of(recipe).values()) - {"train"} == set(splits) - {"train"}
    # SST-2's dev is for judging: what is chosen on is carved from train.
    assert roles_of(recipe).get("dev") == (
        "validation" if recipe.data.source == "stanfordnlp/sst2" else None
    )


def test_the_unfrozen_sst2_keeps_the_head_its_base_was_published_with(bases, tmp_path, caplog):
    path = FOLDER / "sst2_unfreeze.yaml"
    recipe = Recipe.load(path)
    with caplog.at_level("INFO", logger="lora_sentiment"):
        train(
            Recipe.load(
                path,
                [*tiny(recipe, bases, tmp_path), "train.max_steps=1", "train.learning_rate=1e-12"],
            )
        )
    assert "its own head" in caplog.text
    before = load_file(bases["sst2"] / "model.safetensors")
    after = load_file(tmp_path / "adapter" / "changed.safetensors")
    changed = {name.rpartition("distilbert.")[2] for name in after}
    torch.testing.assert_close(after["classifier.weight"], before["classifier.weight"])
    assert all(
        any(f"layer.{i}.{part}" in name for name in changed)
        for i in range(6)
        for part in ("attention", "ffn")
    )
    assert not [name for name in changed if "embeddings" in name]


def test_the_quantised_recipes_differ_from_imdb_lora_in_nothing_else():
    wanted = Recipe.load(FOLDER / "imdb_lora.yaml")
    for name in ("imdb_lora_8bit", "imdb_qlora", "imdb_lora_small"):
        found = Recipe.load(FOLDER / f"{name}.yaml")
        assert (found.data, found.train) == (wanted.data, wanted.train)
        assert resolve_targets(found.method, DISTILBERT) == wanted.method
        keep = {"quantize", "double_quant", "head", "head_r"}
        assert found.model.model_dump(exclude=keep) == wanted.model.model_dump(exclude=keep)
        assert found.model != wanted.model


FIVE_STEPS = """
import json, sys
from lora_sentiment.models.families import find_public
from lora_sentiment.recipe.recipe import Recipe
from lora_sentiment.tasks import find_task
from lora_sentiment.train import train
for path, *overrides in json.load(sys.stdin):
    recipe = Recipe.load(path, overrides)
    run = train(recipe)
    roles = [role for role in run.report["data"] if role not in ("train", "validation")]
    judged = [f"{role} {run.report['data'][role]['rows']}" for role in roles]
    labels = json.loads((run.adapter / "card.json").read_text(encoding="utf-8"))["labels"]
    print(recipe.data.source, "/".join(labels), run.report["train"]["steps"], *judged, sep=", ")
"""


@pytest.mark.slow
@pytest.mark.shared
def test_the_hub_has_what_the_recipes_read(hub, bases, tmp_path):
    """Columns, splits and label names, by the real clients; data.max_*_rows only keep it short."""
    read = {path: Recipe.load(path).data for path in RECIPES}
    named = {(str(data.source), data.task): path for path, data in read.items()}
    few = [
        "data.max_train_rows=400",
        "data.max_test_rows=50",
        "train.max_steps=5",
        "model.max_length=16",
    ]
    wanted = [
        [
            str(path),
            *few,
            f"model.name={base_of(Recipe.load(path), bases)}",
            f"output.dir={tmp_path}/{path.stem}",
        ]
        for (source, _), path in named.items()
        if "/" in source and not source.startswith("recipes/") and source not in NOT_HERE
    ]
    command = [sys.executable, "-c", FIVE_STEPS]
    done = subprocess.run(
        command,
        input=json.dumps(wanted),
        env=hub,
        capture_output=True,
        text=True,
        check=False,
        cwd=FOLDER.parent,
    )
    assert done.returncode == 0, done.stderr
    assert set(done.stdout.splitlines()) == {
        "stanfordnlp/imdb, neg/pos, 5, test 50",
        "stanfordnlp/sst2, negative/positive, 5, dev 50, test 50",
        "SetFit/sst5, very negative/negative/neutral/positive/very positive, 5, test 50",
        "SetFit/sst5, label, 5, test 50",
        "fancyzhx/ag_news, World/Sports/Business/Sci/Tech, 5, test 50",
    }
