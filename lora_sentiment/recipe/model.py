"""The recipe's `model` section."""

import os
from typing import Literal, Self

from pydantic import Field, model_validator

from lora_sentiment import bundled
from lora_sentiment.recipe.section import Section

DEFAULT_HEAD_R = 8
"""Rank of a low-rank head's update where the recipe gives none."""


class ModelConfig(Section):
    """Which base, in which precision, and how a text is cut to fit it."""

    name: str = Field(min_length=1)
    """Base checkpoint: a Hub name, a folder, or `bundled`, the small base that ships."""
    revision: str | None = None
    """Revision of the Hub checkpoint; what was resolved is recorded."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Compute dtype; auto: bfloat16 where faster, else float16 on CUDA, else float32. Trained tensors stay float32."""
    max_length: int = Field(512, ge=8)
    """Longest input in tokens, [CLS] and [SEP] included."""
    truncation: Literal["head", "head_tail"] = "head"
    """Which tokens of a longer text stay: the first, or the first quarter and the last three quarters."""
    dropout: float | None = Field(None, ge=0, lt=1)
    """Dropout of the encoder's hidden states while training; by default as the checkpoint ships it. On a CPU the fast
    engine rounds this and attention_dropout to 256ths (0.1 becomes 26/256) and scales by what it realised."""
    attention_dropout: float | None = Field(None, ge=0, lt=1)
    """Dropout of the attention probabilities while training; by default as the checkpoint ships it."""
    seq_classif_dropout: float | None = Field(None, ge=0, lt=1)
    """Dropout between the two head layers while training; by default as the checkpoint ships it."""
    quantize: Literal["none", "int8", "nf4", "fp4"] = "none"
    """Precision of the frozen linears, by bitsandbytes; the head is never quantised."""
    double_quant: bool = False
    """Quantise the 4-bit scales too (Dettmers et al. 2023)."""
    head: Literal["full", "classifier", "low_rank"] = "full"
    """What of the head is trained: both layers, classifier alone, or classifier and a low-rank update of the other."""
    head_r: int | None = Field(None, ge=1)
    """Rank of that update; 8 by default."""

    @property
    def place(self) -> str:
        """Where the base is: the package's own folder for `bundled`, else what `name` says, with `~` written out."""
        if self.name == bundled.NAME:
            return str(bundled.BASE)
        return os.path.expanduser(self.name)  # noqa: PTH111 - Path's raises where there is no such user

    @model_validator(mode="after")
    def _options_are_honoured(self) -> Self:
        if self.double_quant and self.quantize not in ("nf4", "fp4"):
            raise ValueError(
                f"double_quant does nothing with quantize {self.quantize}; set model.quantize=nf4 or fp4"
            )
        if self.head_r is not None and self.head != "low_rank":
            raise ValueError(f"head_r does nothing with head {self.head}; set model.head=low_rank")
        return self
