import json
import shutil

import pytest
import torch
from peft import AutoPeftModelForSequenceClassification
from pydantic import TypeAdapter
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from lora_sentiment.adapter import weights as weights_module
from lora_sentiment.adapter.folder import load, load_card
from lora_sentiment.errors import AdapterError
from lora_sentiment.models import load as base_module
from lora_sentiment.models.load import encoder_tensors, hash_tensors, load_base
from lora_sentiment.recipe.method import FullMethod, LoraMethod, Method
from tests.random_adapters import alter_tensors, reseal, save_random

LABELS = ("no", "yes", "maybe")
IDS = [[2, 5, 6, 3], [2, 9, 3]]
PARTS = {"labels": LABELS, "probe": IDS}

METHODS = [
    LoraMethod(r=4, lora_alpha=8),
    LoraMethod(r=4, target_modules="all-linear", use_rslora=True),
    FullMethod(kind="full"),
]


@pytest.fixture(params=METHODS, ids=["lora", "all-linear", "full"])
def method(request):
    return request.param


@pytest.fixture
def saved(tmp_path, tiny_base):
    save_random(tmp_path / "a", tiny_base, LoraMethod(r=4, lora_alpha=8), **PARTS)
    return tmp_path / "a"


def test_a_reloaded_model_answers_as_the_trained_one(tmp_path, tiny_base, method):
    model, _ = save_random(tmp_path / "a", tiny_base, method, **PARTS)
    loaded = load(tmp_path / "a")
    ids = torch.tensor([[2, 7, 8, 9, 3]])
    assert torch.equal(loaded.model(input_ids=ids).logits, model(input_ids=ids).logits)
    assert loaded.card.labels == list(LABELS)
    assert not loaded.model.training


def test_stock_peft_gives_our_logits(saved):
    stock = AutoPeftModelForSequenceClassification.from_pretrained(
        saved, num_labels=3, dtype=torch.float32
    ).eval()
    ids = torch.tensor([[2, 7, 8, 9, 3]])
    torch.testing.assert_close(
        stock(input_ids=ids).logits, load(saved).model(input_ids=ids).logits, atol=1e-5, rtol=0
    )


@pytest.mark.parametrize(
    ("method", "kept"),
    [
        ({"kind": "lora"}, {"r", "lora_alpha"}),
        ({"kind": "lora", "use_dora": True}, {"r", "lora_alpha", "use_dora"}),
        ({"kind": "lora", "rank_pattern": {"v_lin": 2}}, {"r", "lora_alpha", "rank_pattern"}),
        ({"kind": "lora", "init_lora_weights": "pissa"}, {"r", "lora_alpha"}),
        ({"kind": "ia3"}, {"feedforward_modules"}),
        ({"kind": "vera", "r": 8}, {"r"}),
    ],
)
def test_an_older_peft_knows_every_option_of_a_folder(method, kept, tiny_base, tmp_path):
    """PEFT 0.13.2 opened folders with these, and answered alike."""
    method = TypeAdapter(Method).validate_python(method)
    save_random(tmp_path / "a", tiny_base, method, **PARTS)
    options = json.loads((tmp_path / "a/adapter_config.json").read_text())
    common = {"peft_type", "task_type", "base_model_name_or_path", "inference_mode"}
    assert options.keys() == common | {"target_modules", "modules_to_save"} | kept
    assert load(tmp_path / "a").card.method.kind == method.kind


def test_the_head_is_in_the_folder_and_the_base_is_not(saved):
    names = load_file(saved / "adapter_model.safetensors").keys()
    assert {n for n in names if "lora_" not in n} == {
        f"base_model.model.{layer}.{kind}"
        for layer in ("pre_classifier", "classifier")
        for kind in ("weight", "bias")
    }


def test_full_saves_every_tensor_under_stock_names(tmp_path, tiny_base):
    model, _ = save_random(tmp_path / "a", tiny_base, FullMethod(kind="full"), **PARTS)
    tensors = load_file(tmp_path / "a/changed.safetensors")
    assert tensors.keys() == dict(model.named_parameters()).keys()
    assert not (tmp_path / "a/adapter_config.json").exists()


def test_saving_twice_gives_the_same_bytes(tmp_path, tiny_base, method):
    for name in ("a", "b"):
        save_random(tmp_path / name, tiny_base, method, **PARTS)
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes(), path.name


def test_the_saved_tokenizer_cuts_and_pads_nothing(tmp_path, tiny_base, method, monkeypatch):
    original = load_base

    def load_used_base(*arguments, **values):
        base = original(*arguments, **values)
        base.tokenizer(["a"], truncation=True, max_length=4, padding=True)
        return base

    monkeypatch.setattr(base_module, "load_base", load_used_base)
    save_random(tmp_path / "a", tiny_base, method, **PARTS)
    saved = json.loads((tmp_path / "a/tokenizer.json").read_text())
    assert saved["truncation"] is None
    assert saved["padding"] is None


def test_saving_leaves_the_base_bit_identical(tmp_path, tiny_base):
    model, base = save_random(tmp_path / "a", tiny_base, LoraMethod(r=4), **PARTS)
    assert hash_tensors(encoder_tensors(model)) == base.sha256


def test_a_save_that_answers_otherwise_is_refused(tmp_path, tiny_base, monkeypatch):
    load_tensors = weights_module._load_tensors

    def load_wrongly(*arguments):
        load_tensors(*arguments)
        model = arguments[0]
        with torch.no_grad():
            next(p for name, p in model.named_parameters() if "lora_B" in name).add_(1)

    monkeypatch.setattr(weights_module, "_load_tensors", load_wrongly)
    with pytest.raises(AdapterError, match="answers differently from the trained model"):
        save_random(tmp_path / "a", tiny_base, LoraMethod(r=4), **PARTS)


@pytest.mark.parametrize(
    "change",
    [
        {"max_length": 99},
        {"truncation": "head_tail"},
        {"files": {}},
        {"base": {"base_sha256": "0" * 64}},
        {"base": {"quantize": "nf4"}},
    ],
)
def test_the_hash_is_of_each_fact_that_decides_an_answer(saved, change):
    card = load_card(saved)
    if "base" in change:
        change = {"base": card.base.model_copy(update=change["base"])}
    assert card.model_copy(update=change).sha256 != card.sha256
    assert card.model_copy(update={"machine": {}}).sha256 == card.sha256


def test_another_base_is_refused(saved, tiny_base, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(tiny_base, other)
    tensors = load_file(other / "model.safetensors")
    tensors["embeddings.LayerNorm.bias"][0] += 1e-3
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(AdapterError, match="name the right base with --base"):
        load(saved, base=str(other))


def swap_two_words(folder):
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    first, second = [word for word in vocabulary if word.isalpha()][:2]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    path.write_text(json.dumps(tokenizer))


def keep_case(folder):
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps({**settings, "do_lower_case": False}))


@pytest.mark.parametrize("change", [swap_two_words, keep_case])
def test_a_base_with_another_tokenizer_is_refused(saved, tiny_base, tmp_path, change):
    other = tmp_path / "other"
    shutil.copytree(tiny_base, other)
    change(other)
    with pytest.raises(AdapterError, match="was trained with another tokenizer"):
        load(saved, base=str(other))


def test_the_tokenizer_of_an_adapter_cuts_where_training_did(saved, tiny_base):
    """Stock PEFT users load it with `truncation=True`, under transformers 4 too."""
    tokenizer = AutoTokenizer.from_pretrained(saved)
    assert tokenizer.model_max_length == load(saved).card.max_length < 64
    assert tokenizer.model_input_names == ["input_ids", "attention_mask"]
    text = "Good, a LOVELY film " * 40
    expected = AutoTokenizer.from_pretrained(tiny_base)(
        text, truncation=True, max_length=tokenizer.model_max_length
    )
    assert tokenizer(text, truncation=True)["input_ids"] == expected["input_ids"]
    assert (saved / "tokenizer.json").read_bytes() == (tiny_base / "tokenizer.json").read_bytes()


def test_a_moved_base_is_found_where_one_says(saved, tiny_base, tmp_path):
    shutil.copytree(tiny_base, tmp_path / "moved")
    assert load(saved, base=str(tmp_path / "moved")).card.labels == list(LABELS)


HEAD = "base_model.model.classifier.bias"
HEAD_WEIGHT = "base_model.model.classifier.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(HEAD), r"tensor .*classifier\.bias is missing"),
        (lambda t: t.update(extra=torch.zeros(1)), "tensor extra is unknown"),
        (lambda t: t.update({HEAD: torch.zeros(5)}), r"has shape \(5,\), expected \(3,\)"),
        (lambda t: t[HEAD].fill_(float("nan")), "not finite"),
        (lambda t: t[HEAD].add_(1), "answers its probe differently"),
        # Each value is finite, and the logits are not.
        (lambda t: t[HEAD_WEIGHT].fill_(3e38), "answers its probe differently"),
    ],
)
def test_altered_tensors_are_refused(saved, change, message):
    alter_tensors(saved, change)
    with pytest.raises(AdapterError, match=message):
        load(saved)


def test_an_altered_file_is_refused_by_its_hash(saved):
    path = saved / "adapter_config.json"
    path.write_text(path.read_text().replace('"lora_alpha": 8', '"lora_alpha": 9'))
    with pytest.raises(AdapterError, match=r"adapter_config\.json: was altered"):
        load(saved)


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "tokenizer.json", "card.json"])
def test_a_pointer_of_git_lfs_is_named_as_one(saved, name):
    (saved / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(AdapterError, match=f"{name}: is a Git LFS pointer, .* git lfs pull"):
        load(saved)


def test_a_truncated_file_is_refused(saved):
    path = saved / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    reseal(saved)
    with pytest.raises(AdapterError, match="cannot be read"):
        load(saved)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "is not a JSON object"),
        ("{}", "Field required"),
        ('{"schema": 2}', "schema is 2; this version reads up to 1"),
    ],
)
def test_a_malformed_card_is_refused(saved, text, message):
    (saved / "card.json").write_text(text)
    with pytest.raises(AdapterError, match=message):
        load_card(saved)


def test_no_card_is_refused(tmp_path):
    with pytest.raises(AdapterError, match="is not an adapter folder"):
        load(tmp_path)
    (tmp_path / "config.json").touch()
    with pytest.raises(AdapterError, match="whole model: name the adapter that it was made from"):
        load(tmp_path)
