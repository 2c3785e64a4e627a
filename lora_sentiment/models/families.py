"""What is known of an encoder family by name: today DistilBERT alone."""

from collections.abc import Mapping
from dataclasses import dataclass

from lora_sentiment.recipe.method import LINEARS

FP32 = 4
"""Bytes of a trained or saved value."""


@dataclass(frozen=True)
class Family:
    """The names of one encoder family.

    Attributes:
        model_type: `model_type` in a checkpoint's `config.json`.
        encoder: The encoder inside the sequence classifier.
        blocks: The list of blocks inside the encoder.
        linears: The linears of a block, in the order of its forward pass.
        query_value: The linears that LoRA adapts by default.
        feed_forward: The linears of the feed-forward network.
        head: The layers of the head. Every method trains and saves them.
        dropouts: The config keys of dropout.
        num_positions: The config key of the longest input.
        public_vocab_sizes: Public checkpoints with the family's default shape, and their vocabulary
            sizes.
    """

    model_type: str
    encoder: str
    blocks: str
    linears: tuple[str, ...]
    query_value: tuple[str, ...]
    feed_forward: tuple[str, ...]
    head: tuple[str, ...]
    dropouts: tuple[str, ...]
    num_positions: str
    public_vocab_sizes: Mapping[str, int]


DISTILBERT = Family(
    model_type="distilbert",
    encoder="distilbert",
    blocks="transformer.layer",
    linears=LINEARS,
    query_value=("q_lin", "v_lin"),
    feed_forward=("lin1", "lin2"),
    head=("pre_classifier", "classifier"),
    dropouts=("dropout", "attention_dropout", "seq_classif_dropout"),
    num_positions="max_position_embeddings",
    public_vocab_sizes={
        "distilbert-base-uncased": 30522,
        "distilbert-base-uncased-finetuned-sst-2-english": 30522,
        "distilbert-base-cased": 28996,
        "distilbert-base-german-cased": 31102,
        "distilbert-base-multilingual-cased": 119547,
    },
)
HEAD = DISTILBERT.head
