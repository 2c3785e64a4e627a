"""What the base that ships promises: its size, that stock transformers loads it, its record, and where it is found."""

import json
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import torch
from transformers import AutoModel, AutoTokenizer

from lora_sentiment import bundled
from lora_sentiment.adapter.folder import load, load_card
from lora_sentiment.files import hash_file
from lora_sentiment.models.load import encoder_tensors, hash_tensors, load_base
from lora_sentiment.recipe.model import ModelConfig

ROOT = Path(__file__).parents[2]
SHIPPED = ROOT / "adapters/imdb_small"


def test_it_is_plain_and_small():
    assert sum(path.stat().st_size for path in bundled.BASE.iterdir()) <= 25_000_000
    names = {path.name for path in bundled.BASE.iterdir()}
    assert names == {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "PROVENANCE.md",
    }
    assert json.loads((bundled.BASE / "config.json").read_text())["architectures"] == [
        "DistilBertModel"
    ]


def test_stock_transformers_loads_every_tensor_and_reads_its_own_words():
    model, report = AutoModel.from_pretrained(
        bundled.BASE, dtype=torch.float32, output_loading_info=True
    )
    assert not report["missing_keys"] | report["unexpected_keys"] | report["mismatched_keys"]
    tokenizer = AutoTokenizer.from_pretrained(bundled.BASE)
    ids = tokenizer("A lovely film, not a dull one.", return_tensors="pt")["input_ids"]
    assert tokenizer.decode(ids[0]) == "[CLS] a lovely film, not a dull one. [SEP]"
    assert tokenizer.unk_token_id not in ids
    assert torch.isfinite(model(input_ids=ids).last_hidden_state).all()


def test_no_review_of_ours_has_an_unknown_word():
    tokenizer = AutoTokenizer.from_pretrained(bundled.BASE)
    for split in ("train", "validation", "test"):
        lines = (bundled.REVIEWS / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
        for ids in tokenizer([json.loads(line)["text"] for line in lines])["input_ids"]:
            assert tokenizer.unk_token_id not in ids


def test_the_record_names_the_files_by_their_hashes():
    record = (bundled.BASE / "PROVENANCE.md").read_text(encoding="utf-8")
    for name in ("model.safetensors", "tokenizer.json", "config.json"):
        assert hash_file(bundled.BASE / name) in record
    base = load_base(ModelConfig(name="bundled"), labels=("a", "b"))
    assert base.sha256 == hash_tensors(encoder_tensors(base.model))
    assert base.sha256 in record
    assert (base.name, base.revision) == ("bundled", None)


def test_a_folder_of_that_name_is_not_taken_for_it(tmp_path, monkeypatch):
    (tmp_path / "bundled").mkdir()
    monkeypatch.chdir(tmp_path)
    assert ModelConfig(name="bundled").place == str(bundled.BASE)
    assert ModelConfig(name="./bundled").place == "./bundled"


def test_the_wheel_takes_every_file_of_it():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    patterns = settings["tool"]["setuptools"]["package-data"]["lora_sentiment"]
    package = ROOT / "lora_sentiment"
    for path in (path for folder in (bundled.BASE, bundled.REVIEWS) for path in folder.iterdir()):
        name = path.relative_to(package).as_posix()
        assert any(fnmatch(name, pattern) for pattern in patterns), name


def test_the_adapter_that_ships_belongs_to_it_and_answers_as_it_did():
    """Loading checks every hash and the probe."""
    card = load_card(SHIPPED)
    assert card.base.name == "bundled"
    assert card.base.base_sha256 in (bundled.BASE / "PROVENANCE.md").read_text(encoding="utf-8")
    assert sum(path.stat().st_size for path in SHIPPED.glob("*.safetensors")) < 1_000_000
    assert load(SHIPPED).card == card


def test_the_readme_of_the_adapter_that_ships_opens_it_with_stock_peft(tmp_path, monkeypatch):
    text = (SHIPPED / "README.md").read_text(encoding="utf-8")
    code = text.split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(SHIPPED.parent)
    found: dict = {}
    exec(compile(code, "README.md", "exec"), found)
    card = load_card(SHIPPED)
    with torch.inference_mode():
        logits = found["model"](input_ids=torch.tensor([card.probe.input_ids[0]])).logits[0]
    torch.testing.assert_close(logits, torch.tensor(card.probe.logits[0]), atol=1e-4, rtol=0)
