import pytest
import torch
from transformers import DistilBertConfig, DistilBertForSequenceClassification

from lora_sentiment.errors import ModelError
from lora_sentiment.models.targets import find_targets, find_unfrozen, resolve_pattern
from lora_sentiment.recipe.method import Ia3Method, LoraMethod, UnfreezeMethod, VeraMethod

with torch.device("meta"):
    MODEL = DistilBertForSequenceClassification(
        DistilBertConfig(n_layers=2, dim=32, hidden_dim=64, n_heads=2)
    )


def short(method):
    names = find_targets(MODEL, method)
    return [name.removeprefix("distilbert.transformer.layer.") for name in names]


def test_names_mean_every_block():
    assert short(LoraMethod()) == [
        "0.attention.q_lin", "0.attention.v_lin", "1.attention.q_lin", "1.attention.v_lin"
    ]  # fmt: skip


def test_layers_keep_to_their_blocks():
    method = LoraMethod(target_modules="all-linear", layers_to_transform=(1,))
    assert [name[0] for name in short(method)] == ["1"] * 6


def test_a_regular_expression_is_matched_to_the_full_name():
    method = VeraMethod(kind="vera", target_modules=r".*layer\.0\..*lin[12]")
    assert short(method) == ["0.ffn.lin1", "0.ffn.lin2"]


def test_the_first_pattern_that_matches_counts():
    patterns = {"layer.1.attention.q_lin": 3, "q_lin": 5}
    names = ["layer.0.attention.q_lin", "layer.0.attention.v_lin", "layer.1.attention.q_lin"]
    values = resolve_pattern(patterns, "rank_pattern", names)
    assert values == {names[0]: 5, names[2]: 3}


@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern"])
def test_a_pattern_that_matches_nothing_is_refused(field):
    with pytest.raises(ModelError, match=f"{field}: 'lin1' matches no adapted linear"):
        resolve_pattern({"lin1": 4}, field, ["layer.0.attention.q_lin"])


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (LoraMethod(target_modules=".*nope.*"), r"target_modules '\.\*nope\.\*' matches no linear"),
        (
            LoraMethod(target_modules=".*(q_lin|classifier)"),
            "matches pre_classifier, which is a layer of the head",
        ),
        (LoraMethod(layers_to_transform=(0, 2)), "found layer 2; the base has 2 layers, 0 to 1"),
        (LoraMethod(layers_to_transform=(7, 9)), "found layer 9; the base has 2 layers, 0 to 1"),
        (Ia3Method(kind="ia3", target_modules="x.*"), "matches no linear"),
    ],
)
def test_targets_that_match_nothing_are_refused(method, message):
    with pytest.raises(ModelError, match=message):
        find_targets(MODEL, method)


def test_the_last_layers_and_patterns_name_tensors_in_the_models_order():
    last = find_unfrozen(MODEL, UnfreezeMethod(kind="unfreeze", last_layers=1))
    assert len(last) == 16
    assert all(name.startswith("transformer.layer.1.") for name in last)
    patterns = ("*.output_layer_norm.bias", "embeddings.*")
    names = find_unfrozen(MODEL, UnfreezeMethod(kind="unfreeze", patterns=patterns))
    assert [name.split(".")[0] for name in names] == ["embeddings"] * 4 + ["transformer"] * 2


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"last_layers": 3}, "last_layers: found 3; allowed: 1 to 2"),
        ({"patterns": ("*.bias", "classifier.*")}, "'classifier.*' matches no tensor"),
    ],
)
def test_unfrozen_tensors_that_do_not_exist_are_refused(choice, message):
    with pytest.raises(ModelError, match=message):
        find_unfrozen(MODEL, UnfreezeMethod(kind="unfreeze", **choice))
