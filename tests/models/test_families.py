"""What each family's record says is what its model has."""

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from lora_sentiment.adapter.safe_files import read_object
from lora_sentiment.errors import ModelError
from lora_sentiment.models.families import (
    FAMILIES,
    find_public,
    num_positions,
    refuse_unknown_linears,
    resolve_targets,
)
from lora_sentiment.models.load import load_base
from lora_sentiment.models.targets import encoder_linears, find_targets
from lora_sentiment.models.wrap import head_layers
from lora_sentiment.recipe.method import AdaloraMethod, Ia3Method, LoraMethod, VeraMethod
from lora_sentiment.recipe.model import ModelConfig
from tests.tiny_families import make_config, save_family_base

every_family = pytest.mark.parametrize("model_type", FAMILIES)


def make_model(model_type, **changes):
    with torch.device("meta"):
        return AutoModelForSequenceClassification.from_config(make_config(model_type, **changes))


@every_family
def test_a_record_names_what_the_model_has(model_type):
    family, model = FAMILIES[model_type], make_model(model_type)
    prefix = f"{family.encoder}.{family.blocks}."
    paths = [name.removeprefix(prefix).partition(".")[2] for name in encoder_linears(model)]
    assert sorted(paths) == sorted(family.linears * 2)
    others = set(model.state_dict()) - {f"{family.encoder}.{x}" for x in family_state(model)}
    pooler = {name for name in model.state_dict() if ".pooler." in name}
    held = {name.rpartition(".")[0] for name in others | pooler}
    assert held == set(family.head) == set(head_layers(model))
    assert list(family.head)[-1] == list(head_layers(model))[-1]
    for key in (*family.shape, family.width, *family.aliases.values()):
        assert hasattr(model.config, key), key
    types = [name for name in model.state_dict() if "token_type_embeddings" in name]
    assert bool(types) >= family.token_types


def family_state(model):
    return model.get_submodule(FAMILIES[model.config.model_type].encoder).state_dict()


@every_family
@pytest.mark.parametrize("key", ["dropout", "attention_dropout", "seq_classif_dropout"])
def test_a_recipes_dropout_reaches_the_model(model_type, key, tmp_path):
    folder = save_family_base(tmp_path / "b", model_type)
    config = ModelConfig(name=str(folder), max_length=16, **{key: 0.625})
    model = load_base(config, labels=("a", "b")).model
    own = FAMILIES[model_type].dropouts[key]
    assert all(getattr(model.config, name) == 0.625 for name in own)
    rates = [getattr(module, "p", None) for module in model.modules()]
    rates += [getattr(module, "attention_dropout", None) for module in model.modules()]
    rates += [getattr(module, "drop_prob", None) for module in model.modules()]
    assert 0.625 in rates


@every_family
def test_lora_adapts_query_and_value_by_default(model_type):
    names = find_targets(make_model(model_type), LoraMethod())
    wanted = {"modernbert": ("Wqkv",), "distilbert": ("q_lin", "v_lin")}
    wanted |= {"deberta-v2": ("query_proj", "value_proj")}
    assert {name.rpartition(".")[2] for name in names} == set(
        wanted.get(model_type, ("query", "value"))
    )


@every_family
def test_all_linear_is_every_linear_of_the_blocks_and_none_of_the_head(model_type):
    model = make_model(model_type)
    names = find_targets(model, LoraMethod(target_modules="all-linear"))
    assert list(names) == list(encoder_linears(model))


def test_a_name_of_another_family_is_refused():
    with pytest.raises(ModelError, match=r"'q_lin' is no linear layer of bert; choose from query,"):
        find_targets(make_model("bert"), LoraMethod(target_modules=("q_lin",)))
    with pytest.raises(
        ModelError, match=r"'nope' is no linear layer of distilbert; choose from q_l"
    ):
        resolve_targets(LoraMethod(target_modules=("q_lin", "nope")), FAMILIES["distilbert"])
    with pytest.raises(ModelError, match=r"choose from Wqkv, Wo, Wi, or all-linear; did you mean"):
        resolve_targets(LoraMethod(target_modules=("Wqvk",)), FAMILIES["modernbert"])


def test_a_name_that_no_family_has_is_refused_without_a_base():
    refuse_unknown_linears(LoraMethod(target_modules=("query", "q_lin", "Wqkv")))
    refuse_unknown_linears(LoraMethod(target_modules="all-linear"))
    with pytest.raises(ModelError, match=r"'q_linn' is no linear layer of any family.*'q_lin'\?"):
        refuse_unknown_linears(LoraMethod(target_modules=("q_linn",)))


def test_a_name_may_be_a_path_in_the_block():
    names = find_targets(make_model("bert"), LoraMethod(target_modules=("intermediate.dense",)))
    assert [name.rpartition("layer.")[2] for name in names] == [
        "0.intermediate.dense", "1.intermediate.dense"
    ]  # fmt: skip


@pytest.mark.parametrize(
    "method",
    [AdaloraMethod(kind="adalora"), Ia3Method(kind="ia3"), VeraMethod(kind="vera")],
    ids=lambda method: method.kind,
)
@pytest.mark.parametrize("model_type", ["roberta", "xlm-roberta", "deberta-v2", "modernbert"])
def test_a_method_that_nobody_tested_on_a_family_is_refused(model_type, method):
    name = FAMILIES[model_type].name
    with pytest.raises(
        ModelError,
        match=f"method.kind found {method.kind}, which was not tested on {name}; allowed: lora,",
    ):
        find_targets(make_model(model_type), method)


def test_roberta_has_fewer_positions_than_embeddings(tmp_path):
    assert num_positions(make_config("roberta")) == 64
    assert num_positions(make_config("bert")) == 64
    folder = save_family_base(tmp_path / "b", "roberta")
    assert read_object(folder / "config.json")["max_position_embeddings"] == 66
    with pytest.raises(ModelError, match="65 is more than the 64 positions"):
        load_base(ModelConfig(name=str(folder), max_length=65), labels=("a", "b"))
    base = load_base(ModelConfig(name=str(folder), max_length=64), labels=("a", "b"))
    ids = torch.full((1, 64), 7)
    assert base.model(input_ids=ids).logits.isfinite().all()


@pytest.mark.parametrize(
    ("name", "num_parameters"),
    [
        ("distilbert-base-uncased", 66_955_010),
        ("google-bert/bert-base-uncased", 109_483_778),
        ("FacebookAI/roberta-base", 124_647_170),
        ("FacebookAI/xlm-roberta-base", 278_045_186),
        ("answerdotai/ModernBERT-base", 149_606_402),
    ],
)
def test_a_public_name_has_the_shape_of_its_checkpoint(name, num_parameters):
    from transformers import AutoConfig

    family, changes = find_public(name)
    with torch.device("meta"):
        config = AutoConfig.for_model(family.model_type, **changes)
        model = AutoModelForSequenceClassification.from_config(config)
    assert sum(p.numel() for p in model.parameters()) == num_parameters


def test_a_name_that_only_ends_alike_is_not_public():
    assert find_public("someone/bert-base-uncased") is None
