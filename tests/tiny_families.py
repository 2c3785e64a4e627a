"""A random two-layer base of each family, with a tokenizer of its kind."""

from pathlib import Path

import torch
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import AutoConfig, AutoModel, PreTrainedTokenizerFast

from tests.conftest import BAD, FILLERS, GOOD

WORDS = [*GOOD, *BAD, *FILLERS]
CHANGES = {
    "distilbert": {"dim": 32, "hidden_dim": 64, "n_layers": 2, "n_heads": 4},
    "roberta": {"max_position_embeddings": 66, "type_vocab_size": 1},
    "xlm-roberta": {"max_position_embeddings": 66, "type_vocab_size": 1},
    # As DeBERTa-v3 has them.
    "deberta-v2": {
        "relative_attention": True,
        "position_buckets": 8,
        "norm_rel_ebd": "layer_norm",
        "share_att_key": True,
        "pos_att_type": ["p2c", "c2p"],
        "position_biased_input": False,
    },
    # One block with global attention and one with a window that is shorter than the texts.
    "modernbert": {
        "local_attention": 4,
        "layer_types": ["full_attention", "sliding_attention"],
        "intermediate_size": 48,
    },
}
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
}


def make_tokenizer(model_type: str) -> PreTrainedTokenizerFast:
    """Return byte-level BPE for RoBERTa and XLM-R, and WordPiece for the others."""
    if "roberta" in model_type:
        special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=400,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator([f" {word}" for word in WORDS], trainer)
        cls, pad, sep, unk, mask = special
    else:
        special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
        letters = "abcdefghijklmnopqrstuvwxyz.,!"
        words = dict.fromkeys([*special, *WORDS, *letters, *(f"##{x}" for x in letters)])
        vocab = {word: i for i, word in enumerate(words)}
        tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
        tokenizer.normalizer = normalizers.BertNormalizer()
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        pad, unk, cls, sep, mask = special
    ends = [(token, tokenizer.token_to_id(token)) for token in (cls, sep)]
    pair = f"{cls} $A {sep} $B:1 {sep}:1"
    if "roberta" in model_type:
        pair = f"{cls} $A {sep} {sep} $B {sep}"
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{cls} $A {sep}", pair=pair, special_tokens=ends
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        cls_token=cls,
        pad_token=pad,
        sep_token=sep,
        unk_token=unk,
        mask_token=mask,
        model_max_length=64,
    )


def make_config(model_type: str, **changes):
    """Return the config of a two-layer base, for the tokenizer of its family."""
    tokenizer = make_tokenizer(model_type)
    sizes = SIZES
    if model_type == "distilbert":
        sizes = {"max_position_embeddings": 64, "initializer_range": 0.3}
    special = {
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.cls_token_id,
        "eos_token_id": tokenizer.sep_token_id,
    }
    if model_type == "modernbert":
        special |= {
            "cls_token_id": special["bos_token_id"],
            "sep_token_id": special["eos_token_id"],
        }
    own = CHANGES.get(model_type, {})
    return AutoConfig.for_model(model_type, **{**sizes, **special, **own, **changes})


def save_family_base(folder: Path, model_type: str) -> Path:
    """Write a random encoder without a head, and its tokenizer, into a new folder."""
    torch.manual_seed(0)
    AutoModel.from_config(make_config(model_type)).save_pretrained(folder)
    make_tokenizer(model_type).save_pretrained(folder)
    return folder
