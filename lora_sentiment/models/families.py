"""Facts about the encoder architectures, from shapes alone: no weights and no heavy imports."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lora_sentiment.recipe.method import LINEARS

HEAD = ("pre_classifier", "classifier")
"""The two head layers, trained and saved by every method."""

FP32 = 4
"""Bytes of a trained or saved value."""


@dataclass(frozen=True)
class Shape:
    """The numbers that fix every tensor of a DistilBERT encoder; the defaults are distilbert-base-uncased's."""

    vocab_size: int = 30522
    max_position_embeddings: int = 512
    n_layers: int = 6
    n_heads: int = 12
    dim: int = 768
    hidden_dim: int = 3072

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "Shape":
        """Read the shape from a checkpoint's `config.json`, the missing keys at DistilBertConfig's defaults."""
        return cls(
            **{name: int(config[name]) for name in cls.__dataclass_fields__ if name in config}
        )

    def linear(self, name: str) -> tuple[int, int]:
        """Return (in_features, out_features) of one of LINEARS."""
        if name == "lin1":
            return self.dim, self.hidden_dim
        if name == "lin2":
            return self.hidden_dim, self.dim
        return self.dim, self.dim

    def tensors(self) -> dict[str, int]:
        """Return every tensor of the encoder by the checkpoint's own name, with its number of values."""
        sizes = {
            "embeddings.word_embeddings.weight": self.vocab_size * self.dim,
            "embeddings.position_embeddings.weight": self.max_position_embeddings * self.dim,
            "embeddings.LayerNorm.weight": self.dim,
            "embeddings.LayerNorm.bias": self.dim,
        }
        for i in range(self.n_layers):
            block = f"transformer.layer.{i}"
            for name in LINEARS:
                linear = f"{block}.{'ffn' if name in ('lin1', 'lin2') else 'attention'}.{name}"
                num_in, num_out = self.linear(name)
                sizes |= {f"{linear}.weight": num_in * num_out, f"{linear}.bias": num_out}
            for norm in ("sa_layer_norm", "output_layer_norm"):
                sizes |= {f"{block}.{norm}.{part}": self.dim for part in ("weight", "bias")}
        return sizes

    @property
    def num_encoder(self) -> int:
        """Parameters of the encoder."""
        return sum(self.tensors().values())

    def num_head(self, num_labels: int) -> int:
        """Parameters of pre_classifier and classifier."""
        return (self.dim + 1) * self.dim + (self.dim + 1) * num_labels
