import pytest
from pydantic import ValidationError

from lora_sentiment.recipe.train import TrainConfig


@pytest.mark.parametrize("weights", [None, "balanced", [1, 2.5], (0.1, 1.0, 3.0)])
def test_class_weights_are_balanced_or_positive_numbers(weights):
    found = TrainConfig(class_weights=weights).class_weights
    assert found == (tuple(weights) if isinstance(weights, list) else weights)


@pytest.mark.parametrize(
    "weights",
    ["balancd", [], [1], [0, 1], [-1, 1], [1, "2"], [True, 1], [1, float("inf")], 3, True],
)
def test_other_class_weights_are_refused_in_one_message(weights):
    with pytest.raises(
        ValidationError,
        match="allowed: balanced, or a list of positive numbers, one for each label",
    ) as raised:
        TrainConfig(class_weights=weights)
    assert raised.value.error_count() == 1
