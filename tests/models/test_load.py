import json
import shutil

import pytest
import torch
from transformers import AutoTokenizer, DistilBertForSequenceClassification

from lora_sentiment.errors import ModelError
from lora_sentiment.models import load as load_module
from lora_sentiment.models.load import (
    check_base,
    encoder_tensors,
    find_local_config,
    hash_tensors,
    hash_tokenizer,
    load_base,
    refuse_unquantisable,
)
from lora_sentiment.models.wrap import make_trainable
from lora_sentiment.recipe.method import LoraMethod
from lora_sentiment.recipe.model import ModelConfig

CONFIG = ModelConfig(name="any")

LABELS = ("no", "yes")


def config(folder, **values):
    return ModelConfig(name=str(folder), **{"max_length": 16, **values})


def test_a_base_is_loaded_in_fp32_with_a_new_head_and_the_labels(tiny_base):
    base = load_base(config(tiny_base), labels=LABELS)
    assert base.new_head
    assert {p.dtype for p in base.model.parameters()} == {torch.float32}
    assert base.model.config.id2label == {0: "no", 1: "yes"}
    assert base.config.dim == 32


def test_the_hash_is_of_values_not_of_storage(tiny_base, tmp_path):
    model = load_base(config(tiny_base), labels=LABELS).model
    half = model.half()
    half.save_pretrained(tmp_path / "half")
    half.float().save_pretrained(tmp_path / "float")
    for name in ("half", "float"):
        AutoTokenizer.from_pretrained(tiny_base).save_pretrained(tmp_path / name)
    hashes = [
        load_base(config(tmp_path / name), labels=LABELS).sha256 for name in ("half", "float")
    ]
    assert hashes[0] == hashes[1]
    assert hashes[0] != load_base(config(tiny_base), labels=LABELS).sha256


def test_the_hash_does_not_see_head_and_wrapping(tiny_base):
    base = load_base(config(tiny_base), labels=LABELS)
    wrapped = make_trainable(base, LoraMethod(), CONFIG, dtype=torch.float32)
    assert hash_tensors(encoder_tensors(wrapped)) == base.sha256
    assert load_base(config(tiny_base), labels=tuple("abc")).sha256 == base.sha256


def test_the_hash_sees_one_changed_value(tiny_base):
    base = load_base(config(tiny_base), labels=LABELS)
    with torch.no_grad():
        base.model.distilbert.transformer.layer[1].ffn.lin2.bias[3] += 1e-6
    assert hash_tensors(encoder_tensors(base.model)) != base.sha256


def test_the_tokenizer_hash_forgets_the_last_calls_settings(tiny_base):
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    before = hash_tokenizer(tokenizer)
    tokenizer(["a good film", "a"], truncation=True, max_length=4, padding=True)
    assert hash_tokenizer(tokenizer) == before


def test_dropout_is_the_checkpoints_unless_the_recipe_says_otherwise(tiny_base):
    shipped = load_base(config(tiny_base), labels=LABELS).model
    assert shipped.distilbert.embeddings.dropout.p == 0.1
    asked = load_base(config(tiny_base, dropout=0.0, attention_dropout=0.3), labels=LABELS).model
    assert asked.distilbert.embeddings.dropout.p == 0.0
    assert asked.distilbert.transformer.layer[0].attention.dropout.p == 0.3


def test_a_base_with_a_head_keeps_it_and_another_size_is_refused(tiny_base, tmp_path):
    base = load_base(config(tiny_base), labels=LABELS)
    base.model.save_pretrained(tmp_path)
    base.tokenizer.save_pretrained(tmp_path)
    again = load_base(config(tmp_path), labels=LABELS)
    assert not again.new_head
    assert torch.equal(again.model.classifier.weight, base.model.classifier.weight)
    with pytest.raises(ModelError, match="has a head for 2 labels and the data has 3"):
        load_base(config(tmp_path), labels=tuple("abc"))


WRONG_KINDS = {
    "a family that is not listed": ({"model_type": "electra"}, "is a electra model; this package"),
    "an encoder-decoder": (
        {"model_type": "t5", "is_encoder_decoder": True},
        "is a t5 encoder-decoder; this package adapts encoders of distilbert, bert, roberta,",
    ),
    "a decoder": (
        {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]},
        "is a gpt2 decoder; this package adapts encoders of",
    ),
    "an encoder as a decoder": (
        {"model_type": "bert", "is_decoder": True},
        "is a bert decoder; this package adapts encoders of",
    ),
    "cross-attention": (
        {"model_type": "bert", "add_cross_attention": True},
        "is a bert decoder; this package adapts encoders of",
    ),
    "relative positions": (
        {"model_type": "bert", "position_embedding_type": "relative_key_query"},
        "position_embedding_type 'relative_key_query', which transformers no longer computes",
    ),
    "an activation": (
        {"model_type": "bert", "hidden_act": "foo"},
        "has the hidden_act 'foo', which transformers does not know",
    ),
    "remote code": (
        {"model_type": "modernbert", "auto_map": {"AutoModel": "code.Model"}},
        "asks to run its own code",
    ),
    "no safetensors": ({}, "has no model.safetensors, and pickled weights are never loaded"),
}


@pytest.mark.parametrize("kind", WRONG_KINDS)
def test_a_wrong_checkpoint_is_refused_before_weights_are_read(
    kind, tiny_base, tmp_path, monkeypatch
):
    values, message = WRONG_KINDS[kind]
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_base / name, tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"a pickle")
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
    monkeypatch.setattr(
        "lora_sentiment.models.load.AutoModelForSequenceClassification.from_pretrained",
        lambda *_, **__: pytest.fail("weights were read"),
    )
    with pytest.raises(ModelError, match=message):
        load_base(config(tmp_path), labels=LABELS)


def test_the_hubs_own_conversion_is_the_way_out_of_a_pickle(monkeypatch):
    monkeypatch.setattr(load_module, "_has_file", lambda *_: False)
    with pytest.raises(ModelError, match=r"/some/one/discussions .* set model\.revision=refs/pr/N"):
        load_module._check_weights(config("some/one"), None)


def test_more_length_than_positions_is_refused(tiny_base):
    with pytest.raises(ModelError, match="max_length 65 is more than the 64 positions"):
        load_base(config(tiny_base, max_length=65), labels=LABELS)


def test_a_checkpoint_that_leaves_encoder_tensors_unfilled_is_refused(tiny_base, tmp_path):
    from safetensors.torch import load_file, save_file

    shutil.copytree(tiny_base, tmp_path / "b")
    tensors = load_file(tmp_path / "b/model.safetensors")
    tensors.pop("transformer.layer.1.attention.q_lin.weight")
    save_file(tensors, tmp_path / "b/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        ModelError, match=r"leaves 1 tensors unfilled, .*: distilbert.*q_lin\.weight; name a whole"
    ):
        load_base(config(tmp_path / "b"), labels=LABELS)


def test_a_checkpoint_with_half_a_head_is_refused(tiny_base, tmp_path):
    from safetensors.torch import load_file, save_file

    load_base(config(tiny_base), labels=LABELS).model.save_pretrained(tmp_path / "b")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_base / file, tmp_path / "b")
    tensors = load_file(tmp_path / "b/model.safetensors")
    tensors["pre_classifier.weight"] = tensors["pre_classifier.weight"][:8].contiguous()
    save_file(tensors, tmp_path / "b/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        ModelError, match=r"leaves 1 tensors unfilled, .*: pre_classifier\.weight; name a whole"
    ):
        load_base(config(tmp_path / "b"), labels=LABELS)


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
def test_a_pointer_of_git_lfs_is_named_as_one(tmp_path, tiny_base, name):
    shutil.copytree(tiny_base, tmp_path / "b")
    (tmp_path / "b" / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    with pytest.raises(ModelError, match=f"{name}: is a Git LFS pointer, .* git lfs pull"):
        load_base(config(tmp_path / "b"), labels=LABELS)


def test_a_name_that_is_nowhere_is_one_line(tmp_path):
    with pytest.raises(ModelError, match="no Hub answers") as raised:
        load_base(config("nothing/here"), labels=LABELS)
    assert "\n" not in str(raised.value)


def test_a_folder_that_is_not_there_or_has_no_revisions_says_so(tmp_path, tiny_base):
    with pytest.raises(ModelError, match="no such folder"):
        load_base(config(tmp_path / "nothing"), labels=LABELS)
    with pytest.raises(ModelError, match="is a folder, which has no revisions"):
        load_base(config(tiny_base, revision="abc"), labels=LABELS)


def test_a_relative_folder_is_recorded_whole(tiny_base, monkeypatch):
    monkeypatch.chdir(tiny_base.parent)
    assert load_base(config(tiny_base.name), labels=LABELS).name == str(tiny_base)


def test_a_base_in_ones_home_is_found(tiny_base, monkeypatch):
    monkeypatch.setenv("HOME", str(tiny_base.parent))
    assert load_base(config(f"~/{tiny_base.name}"), labels=LABELS).name == str(tiny_base)
    assert find_local_config(config(f"~/{tiny_base.name}")).dim == 32
    with pytest.raises(ModelError, match="'~/nothing': no such folder"):
        check_base(config("~/nothing"))


def test_a_base_is_not_quantised_where_bitsandbytes_may_run_fetched_code(tiny_base):
    quantised = config(tiny_base, quantize="nf4")
    for kind in ("cpu", "cuda", "xpu"):
        refuse_unquantisable(quantised, torch.device(kind))
    with pytest.raises(
        ModelError, match=r"quantize=nf4: the device is mps, .* cpu, cuda, xpu only; set .*=none"
    ):
        load_base(quantised, labels=LABELS, device=torch.device("mps"))
    refuse_unquantisable(config(tiny_base), torch.device("mps"))


def test_the_models_class_is_stock(tiny_base):
    assert (
        type(load_base(config(tiny_base), labels=LABELS).model)
        is DistilBertForSequenceClassification
    )


def test_a_head_whose_labels_stand_in_another_order_is_refused(tiny_base, tmp_path):
    base = load_base(config(tiny_base), labels=("NEGATIVE", "POSITIVE"))
    base.model.save_pretrained(tmp_path / "own")
    base.tokenizer.save_pretrained(tmp_path / "own")
    assert not load_base(config(tmp_path / "own"), labels=("negative", "positive")).new_head
    with pytest.raises(ModelError, match=r"set data\.labels=\[negative, positive\]"):
        load_base(config(tmp_path / "own"), labels=("positive", "negative"))


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        (
            {"_attn_implementation": "someone/kernel"},
            "asks to fetch and run the kernel 'someone/kernel'",
        ),
        ({"attn_implementation": "someone/kernel"}, "asks to fetch and run the kernel"),
        (
            {"quantization_config": {"quant_method": "bitsandbytes"}},
            "is quantised already; name the checkpoint",
        ),
    ],
)
def test_a_base_that_redirects_is_refused(tiny_base, tmp_path, facts, message):
    folder = tmp_path / "base"
    shutil.copytree(tiny_base, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **facts}))
    with pytest.raises(ModelError, match=message):
        load_base(ModelConfig(name=str(folder), max_length=16), labels=("a", "b"))
