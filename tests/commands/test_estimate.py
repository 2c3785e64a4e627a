import json
import subprocess
import sys

import pytest

import lora_sentiment.commands.estimate as estimate_module
from lora_sentiment.commands.estimate import (
    BASELINE_BYTES,
    cut_rows,
    estimate,
    look_up,
    make_columns,
    make_notes,
    parse_bytes,
    plan_recipe,
)
from lora_sentiment.errors import ModelError, RecipeError
from lora_sentiment.models.families import Shape
from lora_sentiment.models.memory import estimate_memory
from lora_sentiment.models.parameters import inference_tokens, micro_batch_tokens
from lora_sentiment.recipe.model import ModelConfig
from lora_sentiment.recipe.recipe import Recipe

PUBLIC = "distilbert/distilbert-base-uncased"


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
    facts = look_up(ModelConfig(name=str(tiny_base), dtype="float32"), 3)
    assert (facts.shape.dim, facts.shape.n_layers, facts.num_labels, facts.assumed) == (
        32,
        2,
        3,
        (),
    )


@pytest.mark.parametrize(
    ("visible", "expected"),
    [(None, True), ("0", True), ("1,-1", True), ("", False), ("-1", False), ("-1,0", False)],
)
def test_a_gpu_that_is_hidden_is_none(visible, expected, monkeypatch):
    monkeypatch.setattr(
        "lora_sentiment.commands.estimate.Path.exists", lambda path: str(path) == "/dev/nvidia0"
    )
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert estimate_module._has_gpu() is expected


def test_an_evaluation_is_that_of_the_machine_or_of_a_plain_cpu(tiny_base, monkeypatch):
    monkeypatch.setattr("lora_sentiment.commands.estimate._has_gpu", lambda: True)
    model = ModelConfig(name=str(tiny_base))
    facts = [look_up(model, 2, this_machine=own) for own in (True, False)]
    assert [each.evaluation_tokens for each in facts] == [
        inference_tokens("cuda"),
        inference_tokens("cpu"),
    ]
    assert [each.element_bytes for each in facts] == [2, 4]


def test_a_base_in_the_hub_cache_is_read_from_there(tmp_path, monkeypatch):
    commit = "0" * 40
    snapshot = tmp_path / "models--a--b" / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs/main").write_text(commit)
    config = {"model_type": "distilbert", "dim": 48, "id2label": dict.fromkeys("abcd")}
    (snapshot / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    facts = look_up(ModelConfig(name="a/b", dtype="float32"), None)
    assert (facts.shape.dim, facts.num_labels) == (48, 4)
    assert facts.assumed == ("4 labels are assumed: as many as the base's head has",)


def test_a_public_base_that_is_not_here_is_assumed_and_said_so(load):
    _, assumed = plan_recipe(load())
    assert assumed == (
        f"{PUBLIC} is not on this machine: its shape is assumed from its public name",
    )


def test_labels_are_assumed_to_be_two_and_said_so(tiny_base):
    facts = look_up(ModelConfig(name=str(tiny_base), dtype="float32"), None)
    assert facts.num_labels == 2
    assert "data.labels" in facts.assumed[0]


@pytest.mark.parametrize("name", ["no/such-base", "./nowhere", "/nowhere/at/all"])
def test_a_base_that_is_nowhere_says_what_to_do(name):
    with pytest.raises(ModelError, match="no such folder"):
        look_up(ModelConfig(name=name), 2)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ('{"model_type": "bert"}', "is a bert model"),
        ("[]", "is no JSON object"),
        ("[" * 100_000, "cannot be read"),
    ],
)
def test_a_base_of_another_architecture_is_refused(tmp_path, config, message):
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(ModelError, match=message):
        look_up(ModelConfig(name=str(tmp_path)), 2)


def test_the_micro_batch_is_the_recipes_own_cut(load):
    recipe = load()
    plan, _ = plan_recipe(recipe)
    tokens = micro_batch_tokens(Shape(), max_length=512, element_bytes=4)
    assert cut_rows(plan, recipe, length=512) == tokens // 512
    assert cut_rows(plan, load("train.max_tokens_per_micro_batch=1024"), length=128) == 8
    assert cut_rows(plan, load("train.batch_size=2"), length=128) == 2


def test_the_largest_micro_batch_fits_and_one_more_row_does_not(load):
    recipe, budget = load(), parse_bytes("2GiB")
    plan, _ = plan_recipe(recipe)
    for cut in estimate(recipe, budget=budget).cuts:
        held = [
            BASELINE_BYTES
            + estimate_memory(plan, rows=rows, length=cut.length, batch_size=2 * rows).resident
            for rows in (cut.fitting_rows, cut.fitting_rows + 1)
        ]
        assert held[0] <= budget < held[1]


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


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.setattr(estimate_module, "_has_gpu", lambda: True)


def test_a_gpu_takes_a_whole_step_and_no_host_memory_is_added(load, gpu):
    recipe = load("model.dtype=bfloat16")
    plan, _ = plan_recipe(recipe)
    assert (plan.device, plan.graphs) == ("cuda", True)
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
def test_what_cannot_be_replayed_is_not_counted_twice(load, gpu, override):
    plan, _ = plan_recipe(load(override))
    assert not plan.graphs


def test_estimate_imports_nothing_heavy(toy_recipe):
    code = (
        "import sys\nfrom lora_sentiment.cli import main\n"
        f"try:\n    main(['estimate', {str(toy_recipe)!r}, '--budget', '4GiB'])\nexcept SystemExit:\n    pass\n"
        "sys.stderr.write(str([m for m in ('torch', 'transformers', 'peft', 'numpy') if m in sys.modules]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == "[]"
    assert "fits: " in done.stdout
