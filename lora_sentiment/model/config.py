"""The recipe's `model` and `method` sections."""

from typing import Annotated, Literal

from pydantic import Field, field_validator

from lora_sentiment.model.architecture import LINEARS
from lora_sentiment.section import Names, Section, did_you_mean


class ModelConfig(Section):
    """Which base, in which precision, and how a text is cut to fit it."""

    name: str = Field(min_length=1)
    """Base checkpoint: a Hub name or a folder."""
    revision: str | None = None
    """Revision of the Hub checkpoint; what was resolved is recorded."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Compute dtype; auto: bfloat16 where native, else float16 on CUDA, else float32. Trained tensors stay float32."""
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


class LoraMethod(Section):
    """LoRA (Hu et al. 2021): low-rank updates of frozen linears; field names and defaults are PEFT's own."""

    kind: Literal["lora"] = "lora"
    """Low-rank adapters on frozen weights."""
    r: int = Field(8, ge=1)
    """Rank of each update."""
    lora_alpha: int = Field(8, ge=1)
    """The update is scaled by lora_alpha / r (lora_alpha / sqrt(r) with use_rslora)."""
    lora_dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout of the adapter's input while training."""
    target_modules: Names | Literal["all-linear"] = ("q_lin", "v_lin")
    """Linears that get an adapter: names from q_lin, k_lin, v_lin, out_lin, lin1, lin2, or all-linear."""
    use_rslora: bool = False
    """Rank-stabilised scaling (Kalajdzievski 2023)."""

    @field_validator("target_modules")
    @classmethod
    def _targets_exist(cls, targets: tuple[str, ...] | str) -> tuple[str, ...] | str:
        if isinstance(targets, str):
            return targets
        for name in targets:
            if name not in LINEARS:
                allowed = ", ".join(LINEARS)
                hint = did_you_mean(name, list(LINEARS))
                raise ValueError(
                    f"{name!r} is no linear layer of distilbert; choose from {allowed}, or all-linear{hint}"
                )
        if not targets or len(set(targets)) != len(targets):
            raise ValueError(f"found {list(targets)}; allowed: one or more of {', '.join(LINEARS)}, each once")
        return targets

    @property
    def linears(self) -> tuple[str, ...]:
        """The adapted linears by name, in the block's order."""
        return tuple(name for name in LINEARS if self.target_modules == "all-linear" or name in self.target_modules)


class FullMethod(Section):
    """Full fine-tuning: every parameter is trained."""

    kind: Literal["full"]
    """Train every parameter of encoder and head."""


Method = Annotated[LoraMethod | FullMethod, Field(discriminator="kind")]
