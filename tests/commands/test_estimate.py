import json

import pytest
import torch

from lora_sentiment import cli
from lora_sentiment.commands.estimate import (
    BASELINE_BYTES,
    cut_rows,
    estimate,
    find_base,
    make_columns,
    make_notes,
    parse_bytes,
    plan_recipe,
)
from lora_sentiment.errors import ModelError, RecipeError
from lora_sentiment.models.memory import estimate_memory
from lora_sentiment.models.token_limits import micro_batch_tokens
from lora_sentiment.recipe.model import ModelConfig
from lora_sentiment.recipe.recipe import Recipe
from tests.models.cuda_stand_ins import cuda_stand_ins

PUBLIC = "distilbert/distilbert-base-uncased"


@pytest.fixture(autouse=True)
def one_length(request, monkeypatch):
    """Measure the recipe's longest length alone, which takes a quarter of the time."""
    if "lengths" not in request.node.name:
        monkeypatch.setattr("lora_sentiment.commands.estimate.LENGTHS", ())


@pytest.fixture
def load(tmp_path):
    def load(*overrides, name=PUBLIC):
        path = tmp_path / "mine.yaml"
        path.write_text(
            f"data: {{source: x, labels: [a, b]}}\nmodel: {{name: {name}, dtype: float32}}\n",
            encoding="utf-8",
        )
        return Recipe.load(path, overrides)

    return load


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with cuda_stand_ins(monkeypatch):
        yield


@pytest.mark.parametrize(
    ("text", "count"),
    [("4GiB", 4 * 2**30), ("3.5 GB", 3_500_000_000), ("800MiB", 800 * 2**20), ("17B", 17)],
)
def test_a_budget_is_a_number_and_a_unit(text, count):
    assert parse_bytes(text) == count


@pytest.mark.parametrize("text", ["4", "GiB", "4Gib", "four GiB", "", "nan GiB", "-1GiB", "inf GB"])
def test_a_budget_that_is_none_is_refused(text):
    with pytest.raises(RecipeError, match="budget: found"):
        parse_bytes(text)


def test_a_base_in_a_folder_is_read_from_its_config(tiny_base):
    config, assumed = find_base(ModelConfig(name=str(tiny_base), max_length=16, dropout=0.3), 3)
    assert (config.dim, config.n_layers, config.num_labels, config.dropout) == (32, 2, 3, 0.3)
    assert assumed == []


def test_a_plan_is_of_the_machine_or_of_a_plain_cpu(load, tiny_base, gpu):
    recipe = load("model.dtype=auto", "model.max_length=16", name=tiny_base)
    plans = [plan_recipe(recipe, this_machine=own)[0] for own in (True, False)]
    assert [plan.device for plan in plans] == ["cuda", "cpu"]
    assert [plan.dtype for plan in plans] == [torch.bfloat16, torch.float32]


def test_a_base_in_the_hub_cache_is_read_from_there(tmp_path, monkeypatch):
    commit = "0" * 40
    snapshot = tmp_path / "models--a--b" / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs/main").write_text(commit)
    config = {"model_type": "distilbert", "dim": 48, "id2label": dict(enumerate("abcd"))}
    (snapshot / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    config, assumed = find_base(ModelConfig(name="a/b"), None)
    assert (config.dim, config.num_labels) == (48, 4)
    assert assumed == ["4 labels are assumed: as many as the base's head has"]


def test_a_public_base_that_is_not_here_is_assumed_and_said_so(load):
    _, assumed = plan_recipe(load())
    assert assumed == (
        f"{PUBLIC} is not on this machine: its shape is assumed from its public name",
    )


def test_labels_are_assumed_to_be_two_and_said_so(tiny_base):
    config, assumed = find_base(ModelConfig(name=str(tiny_base), max_length=16), None)
    assert config.num_labels == 2
    assert "data.labels" in assumed[0]


@pytest.mark.parametrize("name", ["no/such-base", "./nowhere", "/nowhere/at/all"])
def test_a_base_that_is_nowhere_says_what_to_do(name):
    with pytest.raises(ModelError, match="no such folder"):
        find_base(ModelConfig(name=name), 2)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ('{"model_type": "electra"}', "is a electra model"),
        ("[]", "names no model_type"),
        ("[" * 100_000, "is no JSON"),
    ],
)
def test_a_base_of_another_architecture_is_refused(tmp_path, config, message):
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(ModelError, match=message):
        find_base(ModelConfig(name=str(tmp_path)), 2)


def test_the_micro_batch_is_the_recipes_own_cut(load):
    recipe = load()
    plan, _ = plan_recipe(recipe)
    tokens = micro_batch_tokens(plan.config, max_length=512, element_bytes=4)
    assert cut_rows(plan, recipe, length=512) == tokens // 512
    assert cut_rows(plan, load("train.max_tokens_per_micro_batch=1024"), length=128) == 8
    assert cut_rows(plan, load("train.batch_size=2"), length=128) == 2


def test_the_largest_micro_batch_fits_and_one_more_row_does_not(load):
    recipe, budget = load(), parse_bytes("2GiB")
    plan, _ = plan_recipe(recipe)
    cut = estimate(recipe, budget=budget).cuts[-1]
    fitting, more = (
        BASELINE_BYTES + estimate_memory(plan, rows=rows, length=512, batch_size=2 * rows).resident
        for rows in (cut.fitting_rows, cut.fitting_rows + 1)
    )
    assert fitting <= budget < more


def test_the_recipes_own_cut_is_held_against_the_budget(load):
    assert estimate(load(), budget=parse_bytes("4GiB")).fits is True
    found = estimate(load("method={kind: full}"), budget=parse_bytes("1GiB"))
    assert found.fits is False
    assert "no single row of 512 tokens does" in make_notes(found)[0]
    assert estimate(load()).fits is None


def test_the_suggested_cut_fits(load):
    budget = parse_bytes("1.5GiB")
    found = estimate(load(), budget=budget)
    note = make_notes(found)[0]
    assert note.startswith("does not fit")
    tokens = int(note.rpartition("=")[2])
    assert estimate(load(f"train.max_tokens_per_micro_batch={tokens}"), budget=budget).fits


def test_lengths_end_with_the_recipes_own(load):
    columns = make_columns(estimate(load("model.max_length=300")))
    assert columns["length"] == ["64", "128", "256", "300"]
    assert "rows that fit" not in columns


def test_methods_that_train_less_hold_less(load):
    sizes = [estimate(load(f"method={{kind: {kind}}}")).peak for kind in ("full", "lora", "head")]
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(sizes)) == 3


def test_a_gpu_takes_a_whole_step_at_all_lengths_and_no_host_memory_is_added(load, gpu):
    recipe = load("model.dtype=bfloat16")
    plan, _ = plan_recipe(recipe)
    assert (plan.device, plan.cuda_graphs) == ("cuda", True)
    found = estimate(recipe)
    assert [cut.rows for cut in found.cuts] == [32] * 4
    assert found.peak == max(cut.memory.peak for cut in found.cuts)
    columns = make_columns(found)
    assert "reserved" in columns
    assert "with freed" not in columns
    assert not any("interpreter" in note for note in make_notes(found))


def test_a_gpu_of_little_memory_takes_as_many_rows_as_fit(load, gpu):
    budget = parse_bytes("4GB")
    recipe = load("model.dtype=bfloat16")
    plan, _ = plan_recipe(recipe)
    rows = cut_rows(plan, recipe, length=512, budget=budget)
    assert 8 <= rows < 32
    found = estimate(recipe, budget=budget)
    assert found.fits
    assert make_notes(found)[0].endswith(f"in micro-batches of {rows} rows of 512 tokens")
    assert (
        estimate(load("model.dtype=bfloat16", "train.cuda_graphs=off"), budget=budget).cuts[-1].rows
        > rows
    )


def test_a_gpu_of_too_little_memory_is_said_so(load, gpu):
    found = estimate(load("model.dtype=bfloat16", "method={kind: full}"), budget=parse_bytes("1GB"))
    assert found.fits is False
    assert "no single row of 512 tokens does" in make_notes(found)[0]
    found = estimate(
        load("model.dtype=bfloat16", "train.max_tokens_per_micro_batch=32768"),
        budget=parse_bytes("3GB"),
    )
    assert found.fits is False
    assert "leave out train.max_tokens_per_micro_batch" in make_notes(found)[0]


@pytest.mark.parametrize(
    "override", ["train.engine=stock", "train.gradient_checkpointing=true", "train.cuda_graphs=off"]
)
def test_a_step_that_cannot_be_replayed_is_not_counted_twice(load, gpu, override):
    found = estimate(load("model.dtype=bfloat16", "model.max_length=32", override))
    assert found.cuts[0].memory.pool == 0


def test_a_method_that_training_refuses_is_refused(load):
    dora = load("method={kind: lora, use_dora: true}", "model.quantize=int8")
    with pytest.raises(ModelError, match="loses the scales of int8 weights"):
        estimate(dora)
    assert plan_recipe(dora, this_machine=False)  # a GPU takes it


def test_the_verb_judges_the_budget(toy_recipe, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["estimate", str(toy_recipe), "--budget", "4GiB"])
    shown = capsys.readouterr()
    assert ended.value.code == 0
    assert "fits: " in shown.out
    assert shown.err == ""
