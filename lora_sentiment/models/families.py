"""What is known of each encoder family by name. Everything else is read from the model itself.

This module imports no torch.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from lora_sentiment.errors import ModelError, did_you_mean
from lora_sentiment.recipe.method import Ia3Method, Method, PeftMethod

FP32 = 4
"""Bytes of a trained or saved value."""


@dataclass(frozen=True)
class Family:
    """The names of one encoder family.

    Attributes:
        model_type: `model_type` in a checkpoint's `config.json`.
        name: Its name for a reader.
        encoder: The encoder inside the sequence classifier.
        blocks: The list of blocks inside the encoder.
        linears: The linears of a block by their path in it, in the order of its forward pass. The
            last one is the second linear of the feed-forward network.
        query_value: Names of the linears that LoRA adapts by default.
        ia3: Names of the linears that IA3 adapts by default.
        feed_forward: Paths of the linears of the feed-forward network.
        head: The layers of the head by full name, the classifier last. Every method saves them.
        saved_modules: The modules that hold the head, as PEFT's `modules_to_save`.
        dropouts: The recipe's keys of dropout, and the config's keys for each.
        functions: Config keys that change answers and no tensor.
        shape: Config keys that fix the shapes of tensors.
        width: The config key of the feed-forward network's width.
        aliases: transformers' usual config keys, and the family's own keys for them.
        skips_positions: Whether the first positions, up to that of the padding token, are not used.
        token_types: Whether tokens have types, for the first and the second text of a pair.
        adapters: The PEFT methods that were tested on the family.
        fast: Whether the fast forward pass computes it.
        public: Public checkpoints, and the config keys in which each differs from the family's
            default config.
    """

    model_type: str
    name: str
    encoder: str
    blocks: str
    linears: tuple[str, ...]
    query_value: tuple[str, ...]
    ia3: tuple[str, ...]
    feed_forward: tuple[str, ...]
    head: tuple[str, ...]
    saved_modules: tuple[str, ...]
    dropouts: Mapping[str, tuple[str, ...]]
    functions: tuple[str, ...]
    shape: tuple[str, ...]
    width: str = "intermediate_size"
    aliases: Mapping[str, str] = field(default_factory=dict)
    skips_positions: bool = False
    token_types: bool = False
    adapters: tuple[str, ...] = ("lora",)
    fast: bool = False
    public: Mapping[str, Mapping[str, int]] = field(default_factory=dict)

    @property
    def linear_names(self) -> list[str]:
        """Names for `target_modules`: the last part of each path, each once."""
        return list(dict.fromkeys(path.rpartition(".")[2] for path in self.linears))

    def has_linear(self, name: str) -> bool:
        """Return whether a name, or the end of a path, is that of a linear. PEFT reads it alike."""
        return any(f".{path}".endswith(f".{name}") for path in self.linears)

    @property
    def dropout_keys(self) -> list[str]:
        """The config's keys of dropout."""
        keys: list[str] = []
        for own in self.dropouts.values():
            keys += own
        return keys

    def num_positions(self, config: Mapping[str, Any]) -> int:
        """Return the longest input in tokens.

        Args:
            config: The values of the config by key.
        """
        positions: int = config["max_position_embeddings"]
        if self.skips_positions:
            positions -= config["pad_token_id"] + 1
        return positions


_BERT_LINEARS = (
    "attention.self.query",
    "attention.self.key",
    "attention.self.value",
    "attention.output.dense",
    "intermediate.dense",
    "output.dense",
)
_BERT_SHAPE = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "vocab_size",
    "max_position_embeddings",
    "type_vocab_size",
)
_BERT_FUNCTIONS = ("hidden_act", "layer_norm_eps", "num_attention_heads")
_BERT_DROPOUTS = {
    "dropout": ("hidden_dropout_prob",),
    "attention_dropout": ("attention_probs_dropout_prob",),
    "seq_classif_dropout": ("classifier_dropout",),
}

DISTILBERT = Family(
    model_type="distilbert",
    name="DistilBERT",
    encoder="distilbert",
    blocks="transformer.layer",
    linears=(
        "attention.q_lin",
        "attention.k_lin",
        "attention.v_lin",
        "attention.out_lin",
        "ffn.lin1",
        "ffn.lin2",
    ),
    query_value=("q_lin", "v_lin"),
    ia3=("k_lin", "v_lin", "lin2"),
    feed_forward=("ffn.lin1", "ffn.lin2"),
    head=("pre_classifier", "classifier"),
    saved_modules=("pre_classifier", "classifier"),
    dropouts={
        "dropout": ("dropout",),
        "attention_dropout": ("attention_dropout",),
        "seq_classif_dropout": ("seq_classif_dropout",),
    },
    functions=("activation", "n_heads"),
    shape=("dim", "hidden_dim", "n_layers", "vocab_size", "max_position_embeddings"),
    width="hidden_dim",
    aliases={
        "hidden_size": "dim",
        "num_hidden_layers": "n_layers",
        "num_attention_heads": "n_heads",
    },
    adapters=("lora", "adalora", "ia3", "vera"),
    fast=True,
    public={
        "distilbert/distilbert-base-uncased": {},
        "distilbert/distilbert-base-uncased-finetuned-sst-2-english": {},
        "distilbert/distilbert-base-cased": {"vocab_size": 28996},
        "distilbert/distilbert-base-german-cased": {"vocab_size": 31102},
        "distilbert/distilbert-base-multilingual-cased": {"vocab_size": 119547},
    },
)
BERT = Family(
    model_type="bert",
    name="BERT",
    encoder="bert",
    blocks="encoder.layer",
    linears=_BERT_LINEARS,
    query_value=("query", "value"),
    ia3=("key", "value", "output.dense"),
    feed_forward=("intermediate.dense", "output.dense"),
    head=("bert.pooler.dense", "classifier"),
    # PEFT cannot merge IA3 and VeRA where a saved module holds a linear and is none itself.
    saved_modules=("bert.pooler.dense", "classifier"),
    dropouts=_BERT_DROPOUTS,
    functions=_BERT_FUNCTIONS,
    shape=_BERT_SHAPE,
    token_types=True,
    adapters=("lora", "adalora", "ia3", "vera"),
    fast=True,
    public={
        "google-bert/bert-base-uncased": {},
        "google-bert/bert-base-cased": {"vocab_size": 28996},
        "google-bert/bert-base-multilingual-cased": {"vocab_size": 119547},
    },
)
ROBERTA = Family(
    model_type="roberta",
    name="RoBERTa",
    encoder="roberta",
    blocks="encoder.layer",
    linears=_BERT_LINEARS,
    query_value=("query", "value"),
    ia3=("key", "value", "output.dense"),
    feed_forward=("intermediate.dense", "output.dense"),
    head=("classifier.dense", "classifier.out_proj"),
    saved_modules=("classifier",),
    dropouts=_BERT_DROPOUTS,
    functions=(*_BERT_FUNCTIONS, "pad_token_id"),
    shape=_BERT_SHAPE,
    skips_positions=True,
    fast=True,
    public={
        "FacebookAI/roberta-base": {"max_position_embeddings": 514, "type_vocab_size": 1},
    },
)
XLM_ROBERTA = replace(
    ROBERTA,
    model_type="xlm-roberta",
    name="XLM-RoBERTa",
    public={
        "FacebookAI/xlm-roberta-base": {
            "vocab_size": 250002,
            "max_position_embeddings": 514,
            "type_vocab_size": 1,
        },
    },
)
DEBERTA_V2 = Family(
    model_type="deberta-v2",
    name="DeBERTa-v2",
    encoder="deberta",
    blocks="encoder.layer",
    linears=(
        "attention.self.query_proj",
        "attention.self.key_proj",
        "attention.self.value_proj",
        "attention.output.dense",
        "intermediate.dense",
        "output.dense",
    ),
    query_value=("query_proj", "value_proj"),
    ia3=("key_proj", "value_proj", "output.dense"),
    feed_forward=("intermediate.dense", "output.dense"),
    head=("pooler.dense", "classifier"),
    saved_modules=("pooler", "classifier"),
    dropouts={
        "dropout": ("hidden_dropout_prob",),
        "attention_dropout": ("attention_probs_dropout_prob",),
        "seq_classif_dropout": ("pooler_dropout", "cls_dropout"),
    },
    functions=(
        *_BERT_FUNCTIONS,
        "max_relative_positions",
        "norm_rel_ebd",
        "pooler_hidden_act",
        "pos_att_type",
        "position_biased_input",
        "position_buckets",
        "relative_attention",
        "share_att_key",
    ),
    shape=_BERT_SHAPE,
)
MODERNBERT = Family(
    model_type="modernbert",
    name="ModernBERT",
    encoder="model",
    blocks="layers",
    linears=("attn.Wqkv", "attn.Wo", "mlp.Wi", "mlp.Wo"),
    query_value=("Wqkv",),
    ia3=("Wqkv", "mlp.Wo"),
    feed_forward=("mlp.Wi", "mlp.Wo"),
    head=("head.dense", "head.norm", "classifier"),
    saved_modules=("head", "classifier"),
    dropouts={
        "dropout": ("embedding_dropout", "mlp_dropout"),
        "attention_dropout": ("attention_dropout",),
        "seq_classif_dropout": ("classifier_dropout",),
    },
    functions=(
        "classifier_activation",
        "classifier_pooling",
        "hidden_activation",
        "layer_types",
        "local_attention",
        "norm_eps",
        "num_attention_heads",
        "rope_parameters",
    ),
    shape=(
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "vocab_size",
        "max_position_embeddings",
    ),
    public={"answerdotai/ModernBERT-base": {}},
)
FAMILIES = {
    family.model_type: family
    for family in (DISTILBERT, BERT, ROBERTA, XLM_ROBERTA, DEBERTA_V2, MODERNBERT)
}
"""The families by `model_type`."""


def family_of(config: Any) -> Family:
    """Return the family of a base by its transformers config."""
    return FAMILIES[config.model_type]


def num_positions(config: Any) -> int:
    """Return the longest input in tokens of a base by its transformers config."""
    return family_of(config).num_positions(vars(config))


def find_public(name: str) -> tuple[Family, Mapping[str, int]] | None:
    """Find a public checkpoint by its name on the Hub, with or without its owner.

    Returns:
        Its family, and how its config differs from the family's default; None if it is not known.
    """
    for family in FAMILIES.values():
        for known, changes in family.public.items():
            if name in (known, known.partition("/")[2]):
                return family, changes
    return None


def refuse_unknown_linears(method: Method) -> None:
    """Refuse a name in `target_modules` that no family has, where the base is not known yet.

    Raises:
        ModelError: With the names of all families.
    """
    names = method.target_modules if isinstance(method, PeftMethod) else None
    if not isinstance(names, tuple):
        return
    for name in names:
        if any(family.has_linear(name) for family in FAMILIES.values()):
            continue
        allowed: list[str] = []
        for family in FAMILIES.values():
            allowed += [own for own in family.linear_names if own not in allowed]
        raise ModelError(
            f"{name!r} is no linear layer of any family; they have {', '.join(allowed)}"
            f"{did_you_mean(name, allowed)}",
            key="method.target_modules",
        )


def resolve_targets(method: Method, family: Family) -> Method:
    """Return a method with the linears that it adapts in a family, by name.

    Raises:
        ModelError: As `choose_targets`.
    """
    if not isinstance(method, PeftMethod):
        return method
    return method.model_copy(update={"target_modules": choose_targets(method, family)})


def choose_targets(method: PeftMethod, family: Family) -> tuple[str, ...] | str:
    """Return the `target_modules` of a method, by default those of the family.

    Raises:
        ModelError: If the method was not tested on the family, or a name is no linear of it.
    """
    if method.kind not in family.adapters:
        raise ModelError(
            f"found {method.kind}, which was not tested on {family.name}; allowed: "
            f"{', '.join(family.adapters)}, unfreeze, head, full",
            key="method.kind",
        )
    names = method.target_modules
    if names is None:
        return family.ia3 if isinstance(method, Ia3Method) else family.query_value
    if isinstance(names, str):
        return names
    for name in names:
        if not family.has_linear(name):
            allowed = family.linear_names
            raise ModelError(
                f"{name!r} is no linear layer of {family.model_type}; choose from "
                f"{', '.join(allowed)}, or all-linear{did_you_mean(name, allowed)}",
                key="method.target_modules",
            )
    return names
