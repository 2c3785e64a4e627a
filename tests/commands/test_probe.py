import json

import pytest

from lora_sentiment.commands.probe import probe, run_probe
from lora_sentiment.errors import ModelError
from lora_sentiment.recipe.recipe import Recipe


@pytest.mark.parametrize(
    "overrides",
    [[], ["method={kind: full}"], ["model.quantize=int8", "train.engine=stock"]],
    ids=str,
)
def test_the_walk_of_a_probe_ends_with_two_figures(toy_recipe, tmp_path, overrides):
    (tmp_path / "probe.yaml").write_text(
        Recipe.load(toy_recipe, overrides).to_yaml(), encoding="utf-8"
    )
    run_probe(str(tmp_path / "probe.yaml"), str(tmp_path / "found.json"), "2")
    found = json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))
    assert 0 < found["baseline"] <= found["peak"]


@pytest.mark.slow
def test_a_probe_measures_what_is_held_beyond_its_imports(toy_recipe):
    found = probe(Recipe.load(toy_recipe, ["data.labels=[negative, positive]"]))
    # A toy holds a megabyte: less than what libraries take while they run.
    assert 0 < found.measured < 64 * 2**20 < found.baseline
    assert (found.length, found.rows) == (16, 6)
    assert found.error == pytest.approx(found.estimated / found.measured - 1)


@pytest.mark.slow
def test_a_probe_that_cannot_run_says_why(toy_recipe, tiny_base, tmp_path):
    (tmp_path / "config.json").write_bytes((tiny_base / "config.json").read_bytes())
    with pytest.raises(ModelError, match=r"the probe of toy did not finish: .*has no tokenizer"):
        probe(Recipe.load(toy_recipe, [f"model.name={tmp_path}"]))
