"""Small models with the fast forward pass, and their comparison with the stock one."""

from typing import Any

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
    XLMRobertaConfig,
    XLMRobertaForSequenceClassification,
)

from lora_sentiment.data.batches import SECOND_TYPE
from lora_sentiment.data.packing import pack_rows
from lora_sentiment.fast import use_fast_encoder, use_stock_encoder
from lora_sentiment.fast.layouts import ENCODERS
from lora_sentiment.models.inference import compute_padded, name_ids

ALL_LINEARS = ["q_lin", "k_lin", "v_lin", "out_lin", "lin1", "lin2"]
DIM, HIDDEN_DIM, NUM_LAYERS = 32, 80, 3


def make_classifier(
    *, p: float = 0.0, n_layers: int = NUM_LAYERS, **changes: Any
) -> DistilBertForSequenceClassification:
    torch.manual_seed(0)
    config = DistilBertConfig(
        vocab_size=100,
        dim=DIM,
        hidden_dim=HIDDEN_DIM,
        n_layers=n_layers,
        n_heads=4,
        max_position_embeddings=200,
        initializer_range=0.2,
        dropout=p,
        attention_dropout=p,
        seq_classif_dropout=0.0,
        **changes,
    )
    return DistilBertForSequenceClassification(config)


FAMILIES = {
    "bert": (BertConfig, BertForSequenceClassification),
    "roberta": (RobertaConfig, RobertaForSequenceClassification),
    "xlm-roberta": (XLMRobertaConfig, XLMRobertaForSequenceClassification),
}
"""The other families that the fast forward pass computes."""


def make_family(family: str, *, p: float = 0.0, **changes: Any) -> nn.Module:
    torch.manual_seed(0)
    make_config, make_model = FAMILIES[family]
    config = make_config(
        vocab_size=100,
        hidden_size=DIM,
        intermediate_size=HIDDEN_DIM,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=4,
        max_position_embeddings=202,
        type_vocab_size=2,
        initializer_range=0.2,
        hidden_dropout_prob=p,
        attention_probs_dropout_prob=p,
        classifier_dropout=0.0,
        **changes,
    )
    return make_model(config)


def make_lora(
    target_modules: list[str] | None = None,
    *,
    p: float = 0.0,
    activation: str = "gelu",
    **changes: Any,
) -> PeftModel:
    """A LoRA model in training mode whose B are drawn at random: B = 0 would hide most mistakes."""
    model = make_classifier(p=p, activation=activation)
    heads = ["pre_classifier", "classifier"]
    return add_lora(model, target_modules or ["q_lin", "v_lin"], heads=heads, **changes)


def add_lora(
    model: nn.Module, target_modules: list[str] | str, *, heads: list[str], **changes: Any
) -> PeftModel:
    settings = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.0, "task_type": "SEQ_CLS", **changes}
    config = LoraConfig(target_modules=target_modules, modules_to_save=heads, **settings)
    model = get_peft_model(model, config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.2)
    return model.train()


def make_batch(length: int, *, padded: bool = True) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    input_ids = torch.randint(1, 100, (5, length))
    attention_mask = torch.ones_like(input_ids)
    if padded:
        attention_mask[1, 1 + length // 2 :] = 0
        attention_mask[3, 1:] = 0
    return input_ids, attention_mask


def logits_and_grads(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor,
    *,
    packed: bool = False,
    types: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    if packed:
        logits = packed_logits(model, input_ids, attention_mask, types)
    else:
        logits = compute_padded(model, input_ids, attention_mask, types)
    # Of one label: with two, rows cancel in the gradient of the classifier's bias.
    functional.cross_entropy(logits.float(), torch.ones_like(input_ids[:, 0])).backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return logits.detach(), grads


def find_encoder(model: nn.Module) -> nn.Module:
    kinds = tuple(ENCODERS.values())
    return next(module for module in model.modules() if isinstance(module, kinds))


def largest_grad_distance(expected: dict[str, Tensor], found: dict[str, Tensor]) -> float:
    assert expected.keys() == found.keys()
    # Softmax has no gradient for k's bias, and none at all with a single token: only rounding.
    k_biases = [
        name for name in expected if ("k_lin" in name or ".key." in name) and name.endswith("bias")
    ]
    assert all(max(expected[name].norm(), found[name].norm()) < 1e-6 for name in k_biases)
    big = [name for name, grad in expected.items() if grad.norm() > 1e-6]
    assert all(found[name].norm() < 1e-5 for name in expected.keys() - set(big))
    return max(
        (float((expected[name] - found[name]).norm() / expected[name].norm()) for name in big),
        default=0.0,
    )


def train(model: nn.Module, *names: str, only: bool = False) -> nn.Module:
    """Train the encoder's base tensors with one of `names` in their names; with `only`, no others."""
    for name, parameter in find_encoder(model).named_parameters():
        chosen = any(part in name for part in names) and "lora_" not in name
        parameter.requires_grad_(chosen or (parameter.requires_grad and not only))
    return model.train()


def packed_logits(
    model: nn.Module, input_ids: Tensor, attention_mask: Tensor, types: Tensor | None = None
) -> Tensor:
    """Logits of the rows of a padded batch, packed with an absent row and padding."""
    lengths = attention_mask.sum(dim=1).tolist()
    if types is not None:
        input_ids = input_ids + SECOND_TYPE * types
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
    arrays = (packed.input_ids, packed.position_ids, packed.cu_seq_lens)
    flat, positions, ends = (torch.from_numpy(each).to(input_ids.device) for each in arrays)
    assert ends[-1] == ends[-2]
    logits = model(
        **name_ids(flat[None], has_types=types is not None),
        position_ids=positions[None],
        cu_seq_lens_q=ends,
        max_length_q=longest,
    ).logits
    assert len(logits) == len(rows) + 5
    return logits[: len(rows)]


def assert_exact(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor,
    *,
    packed: bool = False,
    types: Tensor | None = None,
    bound: float = 1e-5,
) -> None:
    use_stock_encoder(model)
    logits, grads = logits_and_grads(model, input_ids, attention_mask, types=types)
    assert use_fast_encoder(model, compute_dtype=torch.float32) is None
    found, found_grads = logits_and_grads(
        model, input_ids, attention_mask, packed=packed, types=types
    )
    torch.testing.assert_close(found, logits, rtol=0, atol=bound)
    assert largest_grad_distance(grads, found_grads) <= 10 * bound
