"""The fast forward pass of BERT, RoBERTa and XLM-R gives the numbers of the stock one."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from lora_sentiment.errors import ModelError
from lora_sentiment.fast import (
    FastForward,
    compute_mixed,
    compute_mixed_packed,
    read_parts,
    takes_packed_rows,
    use_fast_encoder,
    use_stock_encoder,
)
from lora_sentiment.models.wrap import checkpoint_activations
from tests.fast.toy_encoder import (
    FAMILIES,
    add_lora,
    assert_exact,
    find_encoder,
    make_batch,
    make_classifier,
    make_family,
    packed_logits,
    train,
)

pytestmark = pytest.mark.usefixtures("one_thread")
HEADS = {"bert": ["bert.pooler", "classifier"]}
TARGETS = [["query", "value"], ["key"], ["output.dense"], "all-linear"]


@pytest.fixture(params=["padded", "packed"])
def packed(request) -> bool:
    """Whether rows are packed; both forward passes give the same numbers."""
    return request.param == "packed"


def family_head(family: str) -> list[str]:
    """The names of the two layers of the head."""
    if family == "bert":
        return ["pooler.modules_to_save.default.dense", "classifier.modules_to_save.default"]
    own = "classifier.modules_to_save.default"
    return [f"{own}.dense", f"{own}.out_proj"]


def find_last(model: nn.Module, name: str) -> nn.Module:
    return next(part for path, part in model.named_modules() if path.endswith(name))


def make_lora_of(family: str, target_modules: list[str] | str, **changes) -> nn.Module:
    heads = HEADS.get(family, ["classifier"])
    return add_lora(make_family(family), target_modules, heads=heads, **changes)


@pytest.mark.parametrize("length", [1, 33])
@pytest.mark.parametrize("target_modules", TARGETS, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_fp32_logits_and_gradients_are_those_of_the_stock_encoder(
    family, target_modules, length, packed
):
    # RoBERTa's padding token is among the ids: it has no place of its own in the row.
    assert_exact(make_lora_of(family, target_modules), *make_batch(length), packed=packed)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_whole_encoder_is_trained_as_by_the_stock_one(family, packed):
    model = train(make_family(family), "")
    assert_exact(model, *make_batch(9), packed=packed)


@pytest.mark.parametrize("family", FAMILIES)
def test_without_a_mask_every_token_counts(family):
    model = make_family(family).eval()
    ids, _ = make_batch(9)
    expected = model(input_ids=ids).logits
    assert use_fast_encoder(model, compute_dtype=torch.float32) is None
    assert takes_packed_rows(model)
    torch.testing.assert_close(model(input_ids=ids).logits, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_checkpointed_blocks_give_the_same(family, packed):
    model = make_lora_of(family, "all-linear")
    checkpoint_activations(model)
    assert_exact(model, *make_batch(9), packed=packed)


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_output_is_dropped_in_training(family, packed, monkeypatch):
    """The stock forward pass drops three times in a block; without one of them this would differ."""
    model = make_family(family, p=0.3).train()
    ids, mask = make_batch(33)
    use_fast_encoder(model, compute_dtype=torch.float32)
    seen = []
    plain = functional.dropout

    def note(x, p=0.5, training=True, inplace=False):
        seen.append(p)
        return plain(x, p, training, inplace)

    monkeypatch.setattr("lora_sentiment.fast.kernels.dropout", lambda x, p: note(x, p))
    monkeypatch.setattr("lora_sentiment.fast.encoder.dropout", lambda x, p: note(x, p))
    monkeypatch.setattr("torch.nn.functional.dropout", note)
    if packed:
        packed_logits(model, ids, mask)
    else:
        model(input_ids=ids, attention_mask=mask)
    num_layers = len(find_encoder(model).encoder.layer)
    assert seen.count(0.3) >= 1 + 2 * num_layers


@pytest.mark.parametrize("family", FAMILIES)
def test_two_adapters_of_one_base_answer_in_one_batch_as_each_alone(family, packed):
    ids, mask = make_batch(9)
    expected, parts = [], []
    for target_modules in (["query", "value"], "all-linear"):
        model = make_lora_of(family, target_modules).eval()
        use_stock_encoder(model)
        expected.append(model(input_ids=ids, attention_mask=mask).logits.detach())
        use_fast_encoder(model, compute_dtype=torch.float32)
        names = family_head(family)
        head = [find_last(model, name) for name in names]
        parts.append(read_parts(model, head=head, dtype=torch.float32, device=ids.device))
    base = FastForward(find_encoder(make_family(family).eval()), torch.float32)
    owners = [0, 1, 0, 1, 1]
    chosen = [parts[owner] for owner in owners]
    if packed:
        lengths = mask.sum(dim=1).tolist()
        rows = [row[:length] for row, length in zip(ids.int().numpy(), lengths, strict=True)]
        found = compute_mixed_packed(base, rows, chosen, pad_token_id=0)
    else:
        found = compute_mixed(base, ids, mask, chosen)
    for row, owner in enumerate(owners):
        assert found[row] == pytest.approx(expected[owner][row].numpy(), abs=1e-5)


@pytest.mark.parametrize("is_trained_whole", [False, True])
def test_token_types_give_the_numbers_of_the_stock_encoder(is_trained_whole, packed):
    model = make_lora_of("bert", "all-linear")
    if is_trained_whole:
        model = train(make_family("bert"), "")
    ids, mask = make_batch(9)
    types = (torch.arange(9) > 3).long().expand_as(ids)
    assert_exact(model, ids, mask, packed=packed, types=types)


def test_token_types_that_do_not_fit_are_refused():
    model = make_family("bert").eval()
    ids, _ = make_batch(9)
    assert use_fast_encoder(model, compute_dtype=torch.float32) is None
    with pytest.raises(ModelError, match="token_type_ids of shape"):
        model(input_ids=ids, token_type_ids=torch.ones_like(ids[:, :4]))
    encoder = make_classifier().distilbert
    with pytest.raises(ModelError, match="DistilBertModel has no types of tokens"):
        FastForward(encoder, torch.float32).forward(ids, token_type_ids=torch.ones_like(ids))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [({"hidden_act": "relu"}, "'relu' is not 'gelu'"), ({"is_decoder": True}, "is_decoder")],
)
def test_what_it_would_compute_wrongly_is_refused(changes, reason):
    model = make_family("bert", **changes)
    assert reason in use_fast_encoder(model, compute_dtype=torch.float32)
