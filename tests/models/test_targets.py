import pytest

from lora_sentiment.errors import ModelError
from lora_sentiment.models.families import Shape
from lora_sentiment.models.targets import find_targets
from lora_sentiment.recipe.method import AdaloraMethod, Ia3Method, LoraMethod, VeraMethod

SHAPE = Shape(n_layers=2, dim=32, hidden_dim=64)


def short(targets):
    return [name.removeprefix("distilbert.transformer.layer.") for name in targets]


def test_names_mean_every_block():
    assert short(find_targets(SHAPE, LoraMethod())) == [
        "0.attention.q_lin", "0.attention.v_lin", "1.attention.q_lin", "1.attention.v_lin"
    ]  # fmt: skip


def test_layers_keep_to_their_blocks():
    method = LoraMethod(target_modules="all-linear", layers_to_transform=(1,))
    assert {name[0] for name in short(find_targets(SHAPE, method))} == {"1"}


def test_a_regular_expression_is_matched_to_the_full_name():
    method = VeraMethod(kind="vera", target_modules=r".*layer\.0\..*lin[12]")
    assert short(find_targets(SHAPE, method)) == ["0.ffn.lin1", "0.ffn.lin2"]


def test_the_first_pattern_that_matches_counts():
    method = LoraMethod(
        rank_pattern={"layer.1.attention.q_lin": 3, "q_lin": 5}, alpha_pattern={"v_lin": 7}
    )
    found = {
        name: (target.rank, target.alpha) for name, target in find_targets(SHAPE, method).items()
    }
    assert list(found.values()) == [(5, 8), (8, 7), (3, 8), (8, 7)]


def test_a_target_knows_its_shape_and_rank():
    found = find_targets(SHAPE, AdaloraMethod(kind="adalora", target_modules=("lin1",)))
    assert [(t.in_features, t.out_features, t.rank, t.feed_forward) for t in found.values()] == [
        (32, 64, 12, True)
    ] * 2


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (LoraMethod(target_modules=".*nope.*"), r"target_modules '\.\*nope\.\*' matches no linear"),
        (
            LoraMethod(target_modules=".*(q_lin|classifier)"),
            "matches pre_classifier; the head gets no adapter",
        ),
        (LoraMethod(layers_to_transform=(0, 2)), "found layer 2; the base has 2 layers, 0 to 1"),
        (LoraMethod(layers_to_transform=(7, 9)), "found layer 9; the base has 2 layers, 0 to 1"),
        (
            LoraMethod(rank_pattern={"lin1": 4}),
            "rank_pattern: 'lin1' matches none of the adapted linears",
        ),
        (LoraMethod(alpha_pattern={"x": 4}), "alpha_pattern: 'x' matches none"),
        (Ia3Method(kind="ia3", target_modules="x.*"), "matches no linear"),
    ],
)
def test_what_matches_nothing_is_refused(method, message):
    with pytest.raises(ModelError, match=message):
        find_targets(SHAPE, method)
