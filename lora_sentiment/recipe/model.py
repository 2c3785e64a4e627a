"""The recipe's `model` section."""

import os
from typing import Literal, Self

from pydantic import Field, model_validator

from lora_sentiment import bundled
from lora_sentiment.recipe.section import Section

DEFAULT_HEAD_R = 8
"""Rank of a low-rank head's update if the recipe gives none."""


class ModelConfig(Section):
    """Which base, in which precision, and how a long text is truncated."""

    name: str = Field(min_length=1)
    """Base checkpoint: a Hub name, a folder, or `bundled`, the small base that ships."""
    adapter: str | None = None
    """Adapter folder that the training goes on from, on new rows. Its labels may get new ones after
    them. `method`, `max_length`, `truncation` and `quantize` are its own if left out."""
    revision: str | None = None
    """Revision of the Hub checkpoint. The commit that was used is recorded."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Compute dtype; auto: bfloat16 where faster, else float16 on CUDA, else float32. Trained
    tensors stay float32."""
    max_length: int = Field(512, ge=8)
    """Longest input in tokens, [CLS] and [SEP] included."""
    truncation: Literal["head", "head_tail"] = "head"
    """Which tokens of a longer text are kept: the first, or the first quarter and the last three
    quarters."""
    dropout: float | None = Field(None, ge=0, lt=1)
    """Dropout of the encoder's hidden states during training; by default that of the checkpoint. On
    a CPU the fast engine rounds this and attention_dropout to 256ths (0.1 becomes 26/256) and
    scales by the rounded value."""
    attention_dropout: float | None = Field(None, ge=0, lt=1)
    """Dropout of the attention probabilities during training; by default that of the checkpoint."""
    seq_classif_dropout: float | None = Field(None, ge=0, lt=1)
    """Dropout before the last layer of the head during training; by default that of the
    checkpoint."""
    quantize: Literal["none", "int8", "nf4", "fp4"] = "none"
    """Precision of the frozen linear layers, by bitsandbytes. The head is never quantised."""
    double_quant: bool = False
    """Quantise the 4-bit scales too (Dettmers et al. 2023)."""
    head: Literal["full", "classifier", "low_rank"] = "full"
    """Which part of the head is trained: both layers, only the classifier, or the classifier and a
    low-rank update of the other layer."""
    head_r: int | None = Field(None, ge=1)
    """Rank of the low-rank update; 8 by default."""

    @property
    def place(self) -> str:
        """Folder or Hub name of the base: `name` with `~` expanded, or the folder of `bundled`."""
        if self.name == bundled.NAME:
            return str(bundled.BASE)
        return os.path.expanduser(self.name)  # noqa: PTH111 - Path's raises for an unknown user

    @model_validator(mode="after")
    def _options_are_honoured(self) -> Self:
        if self.double_quant and self.quantize not in ("nf4", "fp4"):
            raise ValueError(
                f"double_quant does nothing with quantize {self.quantize}; set model.quantize=nf4 "
                "or fp4"
            )
        if self.head_r is not None and self.head != "low_rank":
            raise ValueError(f"head_r does nothing with head {self.head}; set model.head=low_rank")
        return self
