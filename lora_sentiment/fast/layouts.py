"""Where each encoder family keeps the modules that the fast forward pass reads.

DistilBERT, BERT, RoBERTa and XLM-R have the same blocks: attention, then a feed-forward network,
each followed by LayerNorm of its output plus its input. They differ in names, in the embeddings,
and in one dropout.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from transformers import (
    BertForSequenceClassification,
    BertModel,
    DistilBertForSequenceClassification,
    DistilBertModel,
    PreTrainedModel,
    RobertaForSequenceClassification,
    RobertaModel,
)
from transformers.models.xlm_roberta.modeling_xlm_roberta import (
    XLMRobertaForSequenceClassification,
    XLMRobertaModel,
)

Encoder = PreTrainedModel
"""One of ENCODERS."""
ENCODERS: dict[type[nn.Module], type[nn.Module]] = {
    DistilBertForSequenceClassification: DistilBertModel,
    BertForSequenceClassification: BertModel,
    RobertaForSequenceClassification: RobertaModel,
    XLMRobertaForSequenceClassification: XLMRobertaModel,
}
"""Sequence classifier to the class of its encoder."""


class Block(NamedTuple):
    """The modules of one block. Every forward pass reads them again, because PEFT replaces modules.

    Attributes:
        linears: Path in the encoder to module, in this order: query, key, value, output of the
            attention, and the two of the feed-forward network.
        attention_norm: LayerNorm after the attention.
        output_norm: LayerNorm after the feed-forward network.
        num_heads: Attention heads.
        attention_dropout: Dropout of the attention weights.
        projection_dropout: Dropout of the attention's output. DistilBERT has none.
        output_dropout: Dropout of the feed-forward network's output.
        checkpoints: Whether the block is computed again in the backward pass.
    """

    linears: dict[str, nn.Module]
    attention_norm: nn.LayerNorm
    output_norm: nn.LayerNorm
    num_heads: int
    attention_dropout: nn.Dropout
    projection_dropout: nn.Dropout | None
    output_dropout: nn.Dropout
    checkpoints: bool


class Embeddings(NamedTuple):
    """The modules of the embeddings.

    Attributes:
        words: Embeddings of tokens.
        positions: Embeddings of positions.
        token_types: Embeddings of the types of tokens. DistilBERT has none.
        norm: LayerNorm of their sum.
        dropout: Dropout after it.
        position_offset: RoBERTa's id of the padding token, p: the tokens but for padding are
            counted from p + 1, and padding has position p. None counts all tokens from 0.
    """

    words: nn.Embedding
    positions: nn.Embedding
    token_types: nn.Embedding | None
    norm: nn.LayerNorm
    dropout: nn.Dropout
    position_offset: int | None


def find_encoder(model: nn.Module) -> Encoder | None:
    """Return the encoder of the one sequence classifier in a model, or None."""
    classifiers = [part for part in model.modules() if type(part) in ENCODERS]
    if len(classifiers) != 1:
        return None
    classifier: Any = classifiers[0]
    encoder: Encoder = getattr(classifier, classifier.base_model_prefix)
    return encoder if type(encoder) is ENCODERS[type(classifier)] else None


def head_activation(encoder: Encoder) -> Callable[[Tensor], Tensor]:
    """Return the function between the two layers of the head."""
    return torch.relu if isinstance(encoder, DistilBertModel) else torch.tanh


def read_embeddings(encoder: Encoder) -> Embeddings:
    """Read the embeddings of an encoder."""
    parts: Any = encoder.embeddings
    return Embeddings(
        words=parts.word_embeddings,
        positions=parts.position_embeddings,
        token_types=getattr(parts, "token_type_embeddings", None),
        norm=parts.LayerNorm,
        dropout=parts.dropout,
        position_offset=getattr(parts, "padding_idx", None),
    )


def read_blocks(encoder: Encoder) -> list[Block]:
    """Read all blocks of an encoder."""
    parts: Any = encoder
    read: Callable[[int, Any], Block]
    if isinstance(encoder, DistilBertModel):
        read, layers = _read_distilbert_block, parts.transformer.layer
    else:
        read, layers = _read_bert_block, parts.encoder.layer
    return [read(index, layer) for index, layer in enumerate(layers)]


def _read_distilbert_block(index: int, layer: Any) -> Block:
    # `get_submodule` takes several times as long.
    attention, ffn = layer.attention, layer.ffn
    where = f"transformer.layer.{index}"
    linears = {
        f"{where}.attention.q_lin": attention.q_lin,
        f"{where}.attention.k_lin": attention.k_lin,
        f"{where}.attention.v_lin": attention.v_lin,
        f"{where}.attention.out_lin": attention.out_lin,
        f"{where}.ffn.lin1": ffn.lin1,
        f"{where}.ffn.lin2": ffn.lin2,
    }
    return Block(
        linears=cast(dict[str, nn.Module], linears),
        attention_norm=layer.sa_layer_norm,
        output_norm=layer.output_layer_norm,
        num_heads=attention.n_heads,
        attention_dropout=attention.dropout,
        projection_dropout=None,
        output_dropout=ffn.dropout,
        checkpoints=layer.gradient_checkpointing and layer.training,
    )


def _read_bert_block(index: int, layer: Any) -> Block:
    attention, projection = layer.attention.self, layer.attention.output
    where = f"encoder.layer.{index}"
    linears = {
        f"{where}.attention.self.query": attention.query,
        f"{where}.attention.self.key": attention.key,
        f"{where}.attention.self.value": attention.value,
        f"{where}.attention.output.dense": projection.dense,
        f"{where}.intermediate.dense": layer.intermediate.dense,
        f"{where}.output.dense": layer.output.dense,
    }
    return Block(
        linears=linears,
        attention_norm=projection.LayerNorm,
        output_norm=layer.output.LayerNorm,
        num_heads=attention.num_attention_heads,
        attention_dropout=attention.dropout,
        projection_dropout=projection.dropout,
        output_dropout=layer.output.dropout,
        checkpoints=layer.gradient_checkpointing and layer.training,
    )
