"""Write a BERT encoder in DistilBERT's architecture, with equal outputs.

The figures named `minilm-l6-distilbert` are of all-MiniLM-L6-v2, written so:

    python scripts/bert_to_distilbert.py sentence-transformers/all-MiniLM-L6-v2 local/minilm-l6-distilbert

DistilBERT has no token types. BERT adds the row of the first type at each position, so the position embeddings can hold
it. BERT's pooler is left out: DistilBERT has none. The tensors are written in float16.
"""

import argparse
import re
from pathlib import Path

import torch
from transformers import AutoTokenizer, BertModel, DistilBertConfig, DistilBertModel

from lora_sentiment.models.load import hash_tensors

NAMES = {
    "attention.self.query": "attention.q_lin",
    "attention.self.key": "attention.k_lin",
    "attention.self.value": "attention.v_lin",
    "attention.output.dense": "attention.out_lin",
    "attention.output.LayerNorm": "sa_layer_norm",
    "intermediate.dense": "ffn.lin1",
    "output.dense": "ffn.lin2",
    "output.LayerNorm": "output_layer_norm",
}
"""Modules of a layer: BERT's name to DistilBERT's."""


def convert(bert: BertModel) -> DistilBertModel:
    """Return a DistilBERT with the outputs of a BERT without pooler, where all tokens are of the first type.

    Raises:
        ValueError: If the BERT has something that DistilBERT has not.
    """
    old = bert.config
    if old.is_decoder or old.layer_norm_eps != 1e-12:
        raise ValueError("is a decoder, or layer_norm_eps is not DistilBERT's 1e-12")
    config = DistilBertConfig(
        vocab_size=old.vocab_size,
        dim=old.hidden_size,
        hidden_dim=old.intermediate_size,
        n_layers=old.num_hidden_layers,
        n_heads=old.num_attention_heads,
        max_position_embeddings=old.max_position_embeddings,
        activation=old.hidden_act,
        dropout=old.hidden_dropout_prob,
        attention_dropout=old.attention_probs_dropout_prob,
        initializer_range=old.initializer_range,
        pad_token_id=old.pad_token_id,
    )
    tensors = {}
    for name, tensor in bert.state_dict().items():
        layer = re.fullmatch(r"encoder\.layer\.(\d+)\.(.+)\.(weight|bias)", name)
        if layer:
            name = f"transformer.layer.{layer[1]}.{NAMES[layer[2]]}.{layer[3]}"
        tensors[name] = tensor.clone()
    token_types = tensors.pop("embeddings.token_type_embeddings.weight")
    tensors["embeddings.position_embeddings.weight"] += token_types[0]
    model = DistilBertModel(config)
    model.load_state_dict(tensors)
    return model.eval()


def main() -> None:
    """Convert one model, and print its hash, which each adapter's card.json has too."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="a BERT of the Hub, or its folder")
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    bert = BertModel.from_pretrained(
        arguments.model, add_pooling_layer=False, dtype=torch.float32, use_safetensors=True
    )
    model = convert(bert).half()
    model.save_pretrained(arguments.out)
    AutoTokenizer.from_pretrained(arguments.model).save_pretrained(arguments.out)
    print(f"{arguments.out}: base_sha256 {hash_tensors(model.named_parameters())}")


if __name__ == "__main__":
    main()
