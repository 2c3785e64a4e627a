"""The fast encoder gives the numbers of the stock one, or says why it cannot."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.models.distilbert.modeling_distilbert import DistilBertModel

from lora_sentiment.errors import ModelError
from lora_sentiment.fast.encoder import (
    low_rank,
    use_fast_encoder,
    use_stock_encoder,
)
from lora_sentiment.models.wrap import checkpoint_activations
from tests.fast.toy_encoder import (
    ALL_LINEARS,
    DIM,
    HIDDEN_DIM,
    NUM_LAYERS,
    assert_exact,
    find_encoder,
    logits_and_grads,
    make_batch,
    make_classifier,
    make_lora,
    train,
)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(params=["padded", "packed"])
def packed(request) -> bool:
    """Whether rows are packed; both forward passes give the same numbers."""
    return request.param == "packed"


@pytest.mark.parametrize("length", [1, 7, 33, 200])
@pytest.mark.parametrize(
    "target_modules", [["q_lin", "v_lin"], ["q_lin"], ["k_lin", "out_lin"], ALL_LINEARS]
)
def test_fp32_logits_and_gradients_are_those_of_the_stock_encoder(
    target_modules: list[str], length: int, packed: bool
) -> None:
    assert_exact(make_lora(target_modules), *make_batch(length), packed=packed)


@pytest.mark.parametrize("length", [7, 200])
def test_rows_without_padding_are_exact(length: int) -> None:
    assert_exact(make_lora(ALL_LINEARS), *make_batch(length, padded=False))


@pytest.mark.gpu
@pytest.mark.parametrize("length", [1, 7, 33, 200])
def test_a_gpu_gives_the_numbers_of_the_stock_encoder_there(
    gpu: torch.device, length: int, packed: bool
) -> None:
    batch = [each.to(gpu) for each in make_batch(length)]
    # Packed rows: the promise for fp32 on a GPU.
    bound = 1e-4 if packed else 1e-5
    assert_exact(make_lora(ALL_LINEARS).to(gpu), *batch, packed=packed, bound=bound)


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
def test_every_kind_of_plain_lora_is_exact(changes: dict[str, Any], packed: bool) -> None:
    assert_exact(make_lora(ALL_LINEARS, **changes), *make_batch(9), packed=packed)


def test_a_model_without_adapters_is_exact(packed: bool) -> None:
    model = make_classifier()
    find_encoder(model).requires_grad_(False)
    assert_exact(model, *make_batch(9), packed=packed)


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
@pytest.mark.parametrize("length", [9, 200])
def test_trained_base_tensors_get_the_gradients_of_the_stock_encoder(
    names: list[str], length: int, packed: bool
) -> None:
    model = train(make_classifier(), *names, only=True)
    assert_exact(model, *make_batch(length), packed=packed)


@pytest.mark.parametrize("target_modules", [["q_lin", "v_lin"], ALL_LINEARS])
@pytest.mark.parametrize(
    "names", [[""], ["bias"], ["norm.", "embeddings."], ["k_lin", "lin1", "layer.2."]], ids=str
)
def test_lora_and_trained_base_tensors_mix(
    names: list[str], target_modules: list[str], packed: bool
) -> None:
    assert_exact(train(make_lora(target_modules), *names), *make_batch(9), packed=packed)


def test_the_padding_token_is_embedded_and_not_trained(packed: bool) -> None:
    model = train(make_classifier(), "word_embeddings")
    input_ids, attention_mask = make_batch(9)
    padding = find_encoder(model).embeddings.word_embeddings.padding_idx
    input_ids[:, 4:6] = padding
    assert_exact(model, input_ids, attention_mask, packed=packed)
    grad = find_encoder(model).embeddings.word_embeddings.weight.grad
    assert not grad[padding].any()
    assert grad[input_ids[0, 1]].any()


@pytest.mark.parametrize("length", [9, 200])
def test_inference_gives_the_logits_of_training_without_dropout(length: int) -> None:
    model = make_lora(ALL_LINEARS, p=0.1, lora_dropout=0.3).eval()
    input_ids, attention_mask = make_batch(length)
    expected = model(input_ids=input_ids, attention_mask=attention_mask).logits
    assert use_fast_encoder(model, compute_dtype=torch.float32) is None
    for context in (torch.no_grad, torch.inference_mode, torch.enable_grad):
        with context():
            logits = model(input_ids=input_ids, attention_mask=attention_mask).logits
        assert torch.allclose(logits, expected, rtol=0, atol=1e-5)


def test_training_works_after_a_first_forward_in_inference_mode() -> None:
    model = make_lora()
    input_ids, attention_mask = make_batch(9)
    use_fast_encoder(model, compute_dtype=torch.bfloat16)
    with torch.inference_mode():
        model(input_ids=input_ids, attention_mask=attention_mask)
    _, grads = logits_and_grads(model, input_ids, attention_mask)
    assert all(torch.isfinite(grad).all() for grad in grads.values())


@pytest.mark.parametrize("length", [9, 200])
def test_no_attention_mask_means_that_every_token_counts(length: int) -> None:
    model = make_lora()
    input_ids, attention_mask = make_batch(length, padded=False)
    use_fast_encoder(model, compute_dtype=torch.float32)
    torch.testing.assert_close(
        model(input_ids=input_ids).logits,
        model(input_ids, attention_mask).logits,
        atol=1e-6,
        rtol=0,
    )


def test_autocast_around_it_does_not_change_its_dtype() -> None:
    model = make_lora()
    use_fast_encoder(model, compute_dtype=torch.float32)
    encoder, batch = find_encoder(model), make_batch(9)
    expected = encoder(*batch).last_hidden_state
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(encoder(*batch).last_hidden_state, expected)


def test_only_the_first_token_comes_out_and_the_stock_encoder_comes_back() -> None:
    model = make_lora()
    input_ids, attention_mask = make_batch(9)
    use_fast_encoder(model, compute_dtype=torch.float32)
    assert find_encoder(model)(input_ids, attention_mask).last_hidden_state.shape == (5, 1, DIM)
    use_stock_encoder(model)
    assert find_encoder(model)(input_ids, attention_mask).last_hidden_state.shape == (5, 9, DIM)


def check_bf16(model: nn.Module, packed: bool, device: str | torch.device = "cpu") -> None:
    model = model.to(device)
    batch = [each.to(device) for each in make_batch(33)]
    _, exact = logits_and_grads(model, *batch)
    with torch.autocast(batch[0].device.type, dtype=torch.bfloat16):
        stock_logits, _ = logits_and_grads(model, *batch)
    assert use_fast_encoder(model, compute_dtype=torch.bfloat16) is None
    logits, grads = logits_and_grads(model, *batch, packed=packed)
    assert grads.keys() == exact.keys()
    assert all(grad.dtype == torch.float32 for grad in grads.values())
    assert (logits - stock_logits).norm() <= 0.04 * stock_logits.norm()
    # In bf16 single tensors move by tens of percent, stock or not: a unit of the head's ReLU flips.
    difference = torch.cat([(grads[name] - grad).flatten() for name, grad in exact.items()])
    assert difference.norm() <= 0.2 * torch.cat([grad.flatten() for grad in exact.values()]).norm()


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
    "lora and linears": lambda: train(make_lora(), "lin"),
}


@pytest.mark.parametrize("name", MODELS)
def test_bf16_is_close_to_stock_bf16_and_its_gradients_are_fp32(name: str, packed: bool) -> None:
    check_bf16(MODELS[name](), packed)


@pytest.mark.gpu
@pytest.mark.parametrize("name", MODELS)
def test_on_a_gpu_bf16_is_close_to_stock_bf16(name: str, gpu: torch.device) -> None:
    check_bf16(MODELS[name](), True, gpu)


@pytest.mark.parametrize("changes", [{"p": 0.1}, {"lora_dropout": 0.3}])
def test_dropout_repeats_with_the_seed_and_differs_without_it(changes: dict[str, float]) -> None:
    model = make_lora(ALL_LINEARS, **changes)
    input_ids, attention_mask = make_batch(9)
    use_fast_encoder(model, compute_dtype=torch.float32)
    torch.manual_seed(5)
    first = logits_and_grads(model, input_ids, attention_mask)
    other = logits_and_grads(model, input_ids, attention_mask)
    torch.manual_seed(5)
    again = logits_and_grads(model, input_ids, attention_mask)
    assert torch.equal(first[0], again[0])
    assert not torch.equal(first[0], other[0])
    assert all(torch.equal(grad, again[1][name]) for name, grad in first[1].items())


@pytest.mark.parametrize("changes", [{"p": 0.1}, {"lora_dropout": 0.3}])
def test_dropout_has_the_strength_of_the_stock_encoder(changes: dict[str, float]) -> None:
    model = make_lora(["q_lin", "v_lin", "lin1"], **changes)
    input_ids, attention_mask = make_batch(9)

    def draw() -> Tensor:
        with torch.no_grad():
            return torch.stack(
                [
                    model(input_ids=input_ids, attention_mask=attention_mask).logits
                    for _ in range(40)
                ]
            )

    stock = draw()
    use_fast_encoder(model, compute_dtype=torch.float32)
    fast = draw()
    standard_error = ((stock.var(0) + fast.var(0)) / 40).sqrt()
    assert ((stock.mean(0) - fast.mean(0)).abs() < 5 * standard_error).all()
    assert 0.7 < float(fast.std(0).mean() / stock.std(0).mean()) < 1.4


def test_changed_weights_are_noticed() -> None:
    model = make_lora(ALL_LINEARS)
    batch = make_batch(9)
    assert_exact(model, *batch)
    block = find_encoder(model).transformer.layer[0]
    changes = {
        "in place": lambda: block.attention.k_lin.base_layer.weight.mul_(1.5),
        "new data": lambda: setattr(
            block.ffn.lin1.base_layer.weight, "data", torch.randn(HIDDEN_DIM, DIM) * 0.2
        ),
        "new parameter": lambda: setattr(
            block.attention.v_lin.base_layer,
            "bias",
            nn.Parameter(torch.randn(DIM), requires_grad=False),
        ),
        "adapter": lambda: block.attention.q_lin.lora_B["default"].weight.data.mul_(2),
    }
    for change in changes.values():
        before, _ = logits_and_grads(model, *batch)
        with torch.no_grad():
            change()
        after, _ = logits_and_grads(model, *batch)
        assert not torch.allclose(before, after, atol=1e-4)
        use_stock_encoder(model)
        assert torch.allclose(logits_and_grads(model, *batch)[0], after, atol=1e-5)
        use_fast_encoder(model, compute_dtype=torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "name", ["attention.q_lin.weight", "attention.v_lin.bias", "ffn.lin1.weight", "ffn.lin2.bias"]
)
def test_trained_tensors_are_never_stale(name: str, dtype: torch.dtype) -> None:
    model, batch = make_classifier().eval(), make_batch(9)
    parameter = find_encoder(model).transformer.layer[1].get_parameter(name)

    def assert_noticed(change: Callable[[], object]) -> None:
        change()
        with torch.no_grad():
            found = model(*batch).logits
            use_fast_encoder(model, compute_dtype=dtype)
            assert torch.equal(found, model(*batch).logits)

    use_fast_encoder(model, compute_dtype=dtype)
    assert_noticed(lambda: None)
    assert_noticed(lambda: parameter.data.mul_(3))
    assert_noticed(lambda: setattr(parameter, "data", torch.randn_like(parameter)))
    parameter.requires_grad_(False)
    assert_noticed(lambda: None)
    parameter.requires_grad_(True)
    model(*batch)
    parameter.data.mul_(3)
    parameter.requires_grad_(False)
    assert_noticed(lambda: None)


def test_disabled_adapters_give_the_base_model() -> None:
    model = make_lora()
    batch = make_batch(9)
    with torch.no_grad(), model.disable_adapter():
        expected = model(*batch).logits
        use_fast_encoder(model, compute_dtype=torch.float32)
        assert torch.allclose(model(*batch).logits, expected, atol=1e-5)


def quantise(model: nn.Module) -> nn.Module:
    linear = find_encoder(model).transformer.layer[1].ffn.lin1
    linear.weight = nn.Parameter(
        torch.zeros(HIDDEN_DIM, DIM, dtype=torch.int8), requires_grad=False
    )
    return model


def merge(model: PeftModel) -> PeftModel:
    model.merge_adapter()
    return model


def hook(model: nn.Module) -> nn.Module:
    find_encoder(model).transformer.layer[2].ffn.register_forward_hook(lambda *_: None)
    return model


def add_second(model: PeftModel) -> PeftModel:
    config = LoraConfig(task_type="SEQ_CLS", target_modules=["q_lin"])
    model.add_adapter("second", config)
    find_encoder(model).transformer.layer[0].attention.q_lin.set_adapter(["default", "second"])
    return model


def frozen_classifier() -> nn.Module:
    return make_classifier().requires_grad_(False)


REFUSED = {
    "DoRA": (lambda: make_lora(use_dora=True), "layer.0.attention.q_lin", "Dora"),
    "IA3": (
        lambda: get_peft_model(
            make_classifier(),
            IA3Config(task_type="SEQ_CLS", target_modules=["k_lin"], feedforward_modules=[]),
        ),
        "layer.0.attention.k_lin",
        "nor PEFT's LoRA",
    ),
    "quantised": (lambda: quantise(frozen_classifier()), "layer.1.ffn.lin1", "quantised"),
    "merged": (lambda: merge(make_lora()), "layer.0.attention.q_lin", "merged"),
    "two adapters": (
        lambda: add_second(make_lora()),
        "layer.0.attention.q_lin",
        "several adapters",
    ),
    "bias": (lambda: make_lora(lora_bias=True), "layer.0.attention.q_lin", "lora_bias"),
    "activation": (lambda: make_lora(activation="relu"), "config", "relu"),
    "hook": (lambda: hook(make_lora()), "layer.2.ffn", "hook"),
    "prompt": (
        lambda: get_peft_model(
            make_classifier(),
            PromptTuningConfig(
                task_type="SEQ_CLS",
                num_virtual_tokens=2,
                token_dim=DIM,
                num_layers=NUM_LAYERS,
                num_attention_heads=4,
            ),
        ),
        "PromptTuningConfig",
        "embeddings",
    ),
    "no classifier": (lambda: nn.Linear(2, 2), "Linear", "no sequence classifier"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_computed_is_refused_by_name(case: str) -> None:
    make, where, why = REFUSED[case]
    model = make()
    reason = use_fast_encoder(model, compute_dtype=torch.float32)
    assert reason is not None
    assert where in reason
    assert why in reason
    assert all(
        "forward" not in module.__dict__
        for module in model.modules()
        if isinstance(module, DistilBertModel)
    )


def test_an_adapter_merged_later_is_an_error_and_not_a_wrong_answer() -> None:
    model = make_lora()
    use_fast_encoder(model, compute_dtype=torch.float32)
    model.merge_adapter()
    with pytest.raises(ModelError, match=r"layer.0.attention.q_lin: .*merged"):
        model(*make_batch(9))


@pytest.mark.parametrize(
    "changes",
    [
        {"input_ids": None, "inputs_embeds": torch.zeros(5, 9, DIM)},
        {"position_ids": torch.zeros(5, 9, dtype=torch.long)},
        {"output_hidden_states": True},
        {"output_attentions": True},
        {"attention_mask": torch.ones(5, 1, 9, 9)},
    ],
    ids=lambda changes: next(reversed(changes)),
)
def test_arguments_it_cannot_honour_are_refused(changes: dict[str, Any]) -> None:
    model = make_lora()
    use_fast_encoder(model, compute_dtype=torch.float32)
    input_ids, attention_mask = make_batch(9)
    arguments = {"input_ids": input_ids, "attention_mask": attention_mask, **changes}
    with pytest.raises(ModelError, match=next(reversed(changes))):
        find_encoder(model)(**arguments)


def test_low_rank_reads_one_linear_by_reference() -> None:
    attention_module = find_encoder(make_lora(use_rslora=True)).transformer.layer[0].attention
    answer = low_rank(attention_module.q_lin, "q_lin")
    assert answer.A is attention_module.q_lin.lora_A["default"].weight
    assert answer.scale == 8 / 4**0.5
    plain = low_rank(attention_module.k_lin, "k_lin")
    assert plain.weight is attention_module.k_lin.weight
    assert plain.A is None


class CountProducts(TorchDispatchMode):
    """Counts matrix products by the shape (rows, inner, columns)."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: Counter[tuple[int, int, int]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        factors = {
            torch.ops.aten.mm.default: args[:2],
            torch.ops.aten.addmm.default: args[1:3],
        }.get(func)
        if factors is not None:
            self.shapes[(*factors[0].shape, factors[1].shape[1])] += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def counted() -> Iterator[Counter[tuple[int, int, int]]]:
    with CountProducts() as mode:
        yield mode.shapes


def count_kept(model: nn.Module) -> int:
    """Elements kept for backward, parameters aside; what several operations share counts once."""
    kept: dict[int, Tensor] = {}
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    use_fast_encoder(model, compute_dtype=torch.float32)
    with saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(*make_batch(9)).logits.sum()
    assert loss.requires_grad
    return sum(
        tensor.untyped_storage().nbytes() // 4
        for address, tensor in kept.items()
        if address not in parameters
    )


@pytest.mark.parametrize("p", [0.0, 0.1])
def test_blocks_before_the_first_trained_one_keep_nothing(p: float) -> None:
    shallow = train(make_classifier(p=p, n_layers=1), "layer.0.", only=True)
    deep = train(make_classifier(p=p), "layer.2.", only=True)
    assert count_kept(deep) == count_kept(shallow)


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
def test_checkpointing_gives_the_same_bits(
    make: Callable[[float], nn.Module], p: float, dtype: torch.dtype, packed: bool
) -> None:
    model = make(p)
    assert use_fast_encoder(model, compute_dtype=dtype) is None
    torch.manual_seed(3)
    logits, grads = logits_and_grads(model, *make_batch(33), packed=packed)
    drawn = torch.rand(1)
    checkpoint_activations(model)
    assert use_fast_encoder(model, compute_dtype=dtype) is None
    torch.manual_seed(3)
    logits_again, grads_again = logits_and_grads(model, *make_batch(33), packed=packed)
    assert torch.equal(logits_again, logits)
    assert torch.equal(torch.rand(1), drawn)
    assert grads_again.keys() == grads.keys()
    assert all(torch.equal(grads_again[name], grads[name]) for name in grads)


def test_checkpointing_keeps_the_input_of_a_block_and_computes_it_once_more() -> None:
    kept, products = [], []
    for n_layers in (1, NUM_LAYERS):
        model = train(make_classifier(n_layers=n_layers), "layer.", only=True)
        checkpoint_activations(model)
        kept.append(count_kept(model))
        with counted() as shapes:
            logits_and_grads(model, *make_batch(9))
        products.append(shapes[5 * 9, DIM, 3 * DIM])
    assert kept[1] - kept[0] == (NUM_LAYERS - 1) * 5 * 9 * DIM
    assert products[1] == 2 * (NUM_LAYERS - 1)
