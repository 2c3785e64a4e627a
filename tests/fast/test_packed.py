"""The forward pass over packed rows gives the numbers of the stock encoder over padded ones."""

import numpy as np
import pytest
import torch
from accelerate import PartialState
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

from lora_sentiment.data.batches import Encoded, pad
from lora_sentiment.data.packing import pack_rows
from lora_sentiment.fast.encoder import (
    takes_packed_rows,
    use_fast_encoder,
    use_stock_encoder,
)
from lora_sentiment.fast.kernels import Adapter, Linear, cast_adapters, linear
from lora_sentiment.fast.transfer import round_size
from lora_sentiment.models import inference
from lora_sentiment.models.inference import (
    compute_packed,
    make_engine,
    packs_rows,
    predict_logits,
)
from lora_sentiment.models.load import load_base
from lora_sentiment.models.wrap import checkpoint_activations
from lora_sentiment.recipe.model import ModelConfig
from lora_sentiment.training.processes import make_accelerator
from tests.fast.test_encoder import (
    ALL_LINEARS,
    find_encoder,
    largest_grad_distance,
    logits_and_grads,
    make_batch,
    make_classifier,
    make_lora,
    train,
)

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")


def packed_logits(model, input_ids, attention_mask):
    """Logits of the rows of a padded batch, packed with an absent row and padding."""
    lengths = attention_mask.sum(dim=1).tolist()
    ids = input_ids.cpu().numpy().astype(np.int32)
    rows = [row[:length] for row, length in zip(ids, lengths, strict=True)]
    longest = max(lengths)
    packed = pack_rows(
        rows,
        size=sum(lengths) + 1 + longest + 1,
        num_rows=len(rows) + 1,
        num_spare=4,
        max_length=longest,
        pad_token_id=0,
    )
    device = input_ids.device
    arrays = (packed.input_ids, packed.position_ids, packed.cu_seq_lens)
    flat, positions, ends = (torch.from_numpy(each).to(device) for each in arrays)
    assert ends[-1] == ends[-2]
    logits = model(
        input_ids=flat[None],
        position_ids=positions[None],
        cu_seq_lens_q=ends,
        max_length_q=longest,
    ).logits
    assert len(logits) == len(rows) + 5
    return logits[: len(rows)]


def packed_logits_and_grads(model, input_ids, attention_mask):
    model.zero_grad()
    logits = packed_logits(model, input_ids, attention_mask)
    labels = torch.ones(len(input_ids), dtype=torch.int64, device=input_ids.device)
    functional.cross_entropy(logits.float(), labels).backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return logits.detach(), grads


def assert_exact(model, input_ids, attention_mask, *, bound=1e-5):
    use_stock_encoder(model)
    logits, grads = logits_and_grads(model, input_ids, attention_mask)
    assert use_fast_encoder(model, compute_dtype=torch.float32) is None
    found, found_grads = packed_logits_and_grads(model, input_ids, attention_mask)
    torch.testing.assert_close(found, logits, rtol=0, atol=bound)
    assert largest_grad_distance(grads, found_grads) <= 10 * bound


@pytest.mark.parametrize("length", [1, 7, 33, 200])
@pytest.mark.parametrize(
    "target_modules", [["q_lin", "v_lin"], ["q_lin"], ["k_lin", "out_lin"], ALL_LINEARS]
)
def test_logits_and_gradients_are_those_of_the_stock_encoder(target_modules, length):
    assert_exact(make_lora(target_modules), *make_batch(length))


@pytest.mark.parametrize(
    "changes",
    [
        {"use_rslora": True},
        {"rank_pattern": {"layer.1.attention.q_lin": 7}},
        {"layers_to_transform": [1]},
        {"lora_alpha": 7, "r": 3},
    ],
    ids=str,
)
def test_every_kind_of_plain_lora_is_exact(changes):
    assert_exact(make_lora(ALL_LINEARS, **changes), *make_batch(9))


def test_a_model_without_adapters_is_exact():
    model = make_classifier()
    find_encoder(model).requires_grad_(False)
    assert_exact(model, *make_batch(9))


@pytest.mark.parametrize(
    "names",
    [
        [""],
        ["layer.1.", "layer.2."],
        ["layer.2.", "layer.0.attention.q_lin.bias"],
        ["layer.0."],
        ["bias"],
        ["norm.", "LayerNorm."],
        ["embeddings."],
        ["q_lin.weight"],
        ["v_lin", "lin1.weight"],
        ["layer.1.ffn.lin2.bias"],
    ],
    ids=str,
)
def test_trained_base_tensors_get_the_gradients_of_the_stock_encoder(names):
    assert_exact(train(make_classifier(), *names, only=True), *make_batch(33))


def test_the_padding_token_is_embedded_and_not_trained():
    model = train(make_classifier(), "word_embeddings")
    input_ids, attention_mask = make_batch(9)
    padding = find_encoder(model).embeddings.word_embeddings.padding_idx
    input_ids[:, 4:6] = padding
    assert_exact(model, input_ids, attention_mask)
    gradient = find_encoder(model).embeddings.word_embeddings.weight.grad
    assert not gradient[padding].any()
    assert gradient[input_ids[0, 1]].any()


@pytest.mark.parametrize("target_modules", [["q_lin", "v_lin"], ALL_LINEARS])
@pytest.mark.parametrize("names", [[""], ["norm.", "embeddings."]], ids=str)
def test_lora_and_trained_base_tensors_mix(names, target_modules):
    assert_exact(train(make_lora(target_modules), *names), *make_batch(9))


@pytest.mark.gpu
@pytest.mark.parametrize("length", [1, 7, 33, 200])
def test_a_gpu_gives_the_numbers_of_the_stock_encoder_there(gpu, length):
    batch = (each.to(gpu) for each in make_batch(length))
    # What is promised on a GPU in fp32.
    assert_exact(make_lora(ALL_LINEARS).to(gpu), *batch, bound=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize(
    "make",
    [
        lambda p: make_lora(p=p),
        lambda p: make_lora(ALL_LINEARS, p=p, lora_dropout=p),
        lambda p: train(make_classifier(p=p), ""),
    ],
    ids=["q_lin and v_lin", "all linears", "full"],
)
def test_checkpointing_gives_the_same_bits(make, p, dtype):
    model = make(p)
    assert use_fast_encoder(model, compute_dtype=dtype) is None
    torch.manual_seed(3)
    logits, grads = packed_logits_and_grads(model, *make_batch(33))
    checkpoint_activations(model)
    assert use_fast_encoder(model, compute_dtype=dtype) is None
    torch.manual_seed(3)
    logits_again, grads_again = packed_logits_and_grads(model, *make_batch(33))
    assert torch.equal(logits_again, logits)
    assert grads_again.keys() == grads.keys()
    assert all(torch.equal(grads_again[name], grads[name]) for name in grads)


def check_short(make, device="cpu"):
    model = make().to(device)
    batch = [each.to(device) for each in make_batch(33)]
    _, exact = logits_and_grads(model, *batch)
    with torch.autocast(batch[0].device.type, dtype=torch.bfloat16):
        stock_logits, _ = logits_and_grads(model, *batch)
    assert use_fast_encoder(model, compute_dtype=torch.bfloat16) is None
    logits, grads = packed_logits_and_grads(model, *batch)
    assert all(grad.dtype == torch.float32 for grad in grads.values())
    assert grads.keys() == exact.keys()
    assert (logits - stock_logits).norm() <= 0.04 * stock_logits.norm()
    difference = torch.cat([(grads[name] - grad).flatten() for name, grad in exact.items()])
    assert difference.norm() <= 0.2 * torch.cat([g.flatten() for g in exact.values()]).norm()


MODELS = {
    "lora": make_lora,
    "lora everywhere": lambda: make_lora(ALL_LINEARS),
    "scale of 7/3": lambda: make_lora(ALL_LINEARS, r=3, lora_alpha=7),
    "several scales": lambda: make_lora(
        ALL_LINEARS,
        rank_pattern={"layer.1.attention.q_lin": 7},
        alpha_pattern={"layer.1.ffn.lin1": 13},
    ),
    "full": lambda: make_classifier().train(),
}


@pytest.mark.parametrize("name", MODELS)
def test_bf16_is_close_to_stock_bf16_and_its_gradients_are_fp32(name):
    check_short(MODELS[name])


@pytest.mark.gpu
@pytest.mark.parametrize("name", MODELS)
def test_on_a_gpu_bf16_is_close_to_stock_bf16(gpu, name):
    check_short(MODELS[name], gpu)


def make_linear(*adapters, outputs=9):
    """A frozen linear of zeros, so that its output is that of the adapters alone."""
    return Linear(torch.zeros(outputs, 8), torch.zeros(outputs), adapters)


@pytest.mark.parametrize("scale", [1.0, 2.0, 7 / 3])
def test_adapters_are_cast_with_their_scale_and_masters_get_fp32_gradients(scale):
    torch.manual_seed(0)
    A, B = torch.randn(3, 8, requires_grad=True), torch.randn(5, 3, requires_grad=True)
    other = torch.randn(2, 8, requires_grad=True), torch.randn(4, 2, requires_grad=True)
    plain = make_linear()
    layer = make_linear(Adapter(A, B, scale, 0, 5), Adapter(*other, 1.0, 5, 9))
    first, found = cast_adapters([plain, layer], torch.bfloat16)
    assert first is plain
    assert torch.equal(found.stack, torch.cat([A, other[0]]).bfloat16())
    assert torch.equal(found.adapters[0].A, A.bfloat16())
    assert torch.equal(found.adapters[0].B, (B * scale).bfloat16())
    assert [(each.scale, each.start, each.stop) for each in found.adapters] == [
        (1.0, 0, 5),
        (1.0, 5, 9),
    ]
    direction = torch.randn(5, 8).bfloat16()
    up = torch.randn(5, 3).bfloat16()
    outputs = [found.stack, *(each.B for each in found.adapters)]
    torch.autograd.backward(outputs, [direction, up, torch.zeros(4, 2).bfloat16()])
    assert A.grad.dtype == B.grad.dtype == torch.float32
    assert torch.equal(A.grad, direction[:3].float())
    assert torch.equal(other[0].grad, direction[3:].float())
    torch.testing.assert_close(B.grad, up.float() * scale, rtol=1e-6, atol=0)
    assert not other[1].grad.any()


@pytest.mark.parametrize("scale", [2.0, 7 / 3])
def test_the_scale_of_bf16_adapters_counts_once(scale):
    torch.manual_seed(0)
    A, B, x = torch.randn(3, 8), torch.randn(5, 3), torch.randn(4, 8)
    (found,) = cast_adapters([make_linear(Adapter(A, B, scale, 0, 5), outputs=5)], torch.bfloat16)
    found = found._replace(weight=found.weight.bfloat16(), bias=found.bias.bfloat16())
    y = linear(x.bfloat16(), found).float()
    expected = scale * x @ A.t() @ B.t()
    assert (y - expected).norm() <= 0.02 * expected.norm()


def test_the_stacked_product_gives_the_values_and_gradients_of_the_adapters_one_by_one():
    torch.manual_seed(0)
    tensors = [torch.randn(size).requires_grad_() for size in [(3, 8), (4, 3), (5, 8), (3, 5)]]
    A1, B1, A2, B2 = tensors
    weight, bias = torch.randn(9, 8), torch.randn(9)
    layer = Linear(weight, bias, (Adapter(A1, B1, 1.7, 0, 4), Adapter(A2, B2, 0.3, 6, 9)))
    x = torch.randn(7, 8, requires_grad=True)
    expected = linear(x, layer)
    direction = torch.randn_like(expected)
    gradients = torch.autograd.grad(expected, [x, *tensors], direction)
    (stacked,) = cast_adapters([layer], torch.float32)
    assert stacked.stack is not None
    found = linear(x, stacked)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    own = torch.autograd.grad(found, [x, *tensors], direction)
    for gradient, other in zip(own, gradients, strict=True):
        assert (gradient - other).norm() <= 1e-5 * other.norm()
    frozen_input = linear(x.detach(), cast_adapters([layer], torch.float32)[0])
    torch.autograd.backward(frozen_input, direction)
    assert (A1.grad - gradients[1]).norm() <= 1e-5 * gradients[1].norm()


@pytest.mark.parametrize("case", ["dropout", "trained weight", "trained bias"])
def test_adapters_that_drop_and_trained_bases_are_not_stacked(case):
    weight, bias = torch.zeros(9, 8), torch.zeros(9)
    weight.requires_grad_(case == "trained weight")
    bias.requires_grad_(case == "trained bias")
    p = 0.1 if case == "dropout" else 0.0
    layer = Linear(
        weight, bias, (Adapter(torch.ones(3, 8), torch.ones(9, 3), 2.0, 0, 9, dropout=p),)
    )
    (found,) = cast_adapters([layer], torch.bfloat16)
    assert found.stack is None
    assert found.adapters[0].dropout == p
    assert found.adapters[0].scale == 1.0


def test_heads_of_a_width_that_a_gpu_does_not_take_are_not_packed():
    model = make_classifier()
    assert not takes_packed_rows(model)  # the stock forward pass
    use_fast_encoder(model, compute_dtype=torch.float32)
    assert takes_packed_rows(model)
    assert packs_rows(model, torch.device("cuda"))
    assert not packs_rows(model, CPU)
    find_encoder(model).config.n_heads = 8  # of 4 values each
    assert not takes_packed_rows(model)


@pytest.fixture
def toy(tiny_base):
    base = load_base(ModelConfig(name=str(tiny_base), max_length=64), labels=("no", "yes"))
    lengths = np.array([13, 3, 16, 4, 50, 8, 2])
    ids = np.random.default_rng(0).integers(5, 60, lengths.sum(), dtype=np.int32)
    labels = np.zeros(len(lengths), dtype=np.int64)
    encoded = Encoded(ids, np.concatenate([[0], lengths.cumsum()]), labels, 0, 0)
    assert use_fast_encoder(base.model, compute_dtype=torch.float32) is None
    return base.model.eval(), encoded


def test_logits_of_packed_rows_are_those_of_padded_ones(toy, monkeypatch):
    model, encoded = toy
    accelerator = make_accelerator(PartialState(), "float32")
    padded = predict_logits(model, encoded, accelerator=accelerator)
    rows = np.split(encoded.input_ids, encoded.offsets[1:-1])
    with torch.inference_mode():
        found = compute_packed(model, rows, device=CPU, pad_token_id=0)
    np.testing.assert_allclose(found.numpy(), padded, rtol=0, atol=1e-5)
    monkeypatch.setattr(inference, "packs_rows", lambda *_: True)
    monkeypatch.setattr(inference, "inference_tokens", lambda _: 40)
    calls = []
    plain = inference.compute_packed

    def spy(model, rows, **given):
        calls.append(sum(map(len, rows)))
        return plain(model, rows, **given)

    monkeypatch.setattr(inference, "compute_packed", spy)
    packed = predict_logits(model, encoded, accelerator=accelerator)
    np.testing.assert_allclose(packed, padded, rtol=0, atol=1e-5)
    assert sum(calls) == len(encoded.input_ids)
    assert sorted(calls)[-2] <= 40 < max(calls)  # one row is longer than that
    engine = make_engine(model)
    given = pad(encoded, np.arange(len(encoded)))
    np.testing.assert_allclose(engine.compute(*given), padded, rtol=0, atol=1e-5)
    alone = pad(encoded, np.array([2]))
    assert alone[1] is None
    np.testing.assert_allclose(engine.compute(*alone), padded[2:3], rtol=0, atol=1e-5)
    assert len(calls) > 2


@given(st.integers(1, 10**6))
def test_sizes_are_rounded_up_by_an_eighth_at_most(num_tokens):
    size = round_size(num_tokens)
    assert size % 8 == 0
    assert num_tokens <= size < max(num_tokens * 1.125, num_tokens + 8)
    assert round_size(size) == size


def test_rounded_sizes_are_few():
    assert len({round_size(num_tokens) for num_tokens in range(1, 32_769)}) <= 90


def list_dropouts(model):
    """The dropouts that a packed step draws, by name: what each drops changes the answer."""
    encoder = find_encoder(model)
    first, *_, last = encoder.transformer.layer
    return {
        "embeddings": encoder.embeddings.dropout,
        "attention of a block": first.attention.dropout,
        "feed-forward of a block": first.ffn.dropout,
        "attention of the last block": last.attention.dropout,
        "feed-forward of the last block": last.ffn.dropout,
    }


@pytest.mark.parametrize("name", list_dropouts(make_classifier()))
def test_every_dropout_of_the_model_drops_in_training_and_not_in_answers(name):
    model = make_classifier().train()
    assert use_fast_encoder(model, compute_dtype=torch.float32) is None
    rows = [np.arange(5, 25, dtype=np.int32)] * 3

    def compute():
        return inference.compute_packed(model, rows, device=CPU, pad_token_id=0).detach()

    plain = compute()
    list_dropouts(model)[name].p = 0.5
    assert (compute() - plain).abs().max() > 1e-3
    model.eval()
    torch.testing.assert_close(compute(), plain, rtol=0, atol=1e-6)
