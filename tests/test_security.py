"""What SECURITY.md promises: nothing that is loaded runs code, leads elsewhere, or takes what it
likes."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from lora_sentiment import classifier
from lora_sentiment.adapter.folder import load, load_card
from lora_sentiment.adapter.peft_file import read_config
from lora_sentiment.adapter.safe_files import MAX_JSON_BYTES, read_header, read_json
from lora_sentiment.errors import AdapterError, ModelError
from lora_sentiment.recipe.method import AdaloraMethod, Ia3Method, LoraMethod, VeraMethod
from tests.random_adapters import alter_json, alter_tensors, save_random
from tests.toy_hub import serve

ROOT = Path(__file__).parents[1]
LABELS, IDS = ("no", "yes"), [[2, 5, 6, 3]]
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
EXPRESSION = "(.+)+x"
METHODS = {
    "lora": LoraMethod(r=4, rank_pattern={"v_lin": 2}),
    "ia3": Ia3Method(kind="ia3"),
    "adalora": AdaloraMethod(kind="adalora", init_r=4, target_r=2),
    "vera": VeraMethod(kind="vera", r=4),
}


@pytest.fixture(scope="module")
def originals(tmp_path_factory, tiny_base):
    """A saved folder of each method."""
    root = tmp_path_factory.mktemp("originals")
    for name, method in METHODS.items():
        save_random(root / name, tiny_base, method, labels=LABELS, probe=IDS)
    return root


@pytest.fixture
def folder(originals, tmp_path):
    return Path(shutil.copytree(originals / "lora", tmp_path / "a"))


def test_every_test_that_the_page_names_is_there():
    named = re.findall(
        r"`(tests/[\w/]+\.py)::(\w+)`", (ROOT / "SECURITY.md").read_text(encoding="utf-8")
    )
    assert len(named) >= 10
    for path, name in named:
        functions = [
            n.name
            for n in ast.walk(ast.parse((ROOT / path).read_text()))
            if isinstance(n, ast.FunctionDef)
        ]
        assert name in functions, f"{path}::{name}"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("auto_mapping", {"base_model_class": "Popen", "parent_library": "subprocess"}),
        ("megatron_config", {"num_layers": 2}),
        ("megatron_core", "antigravity"),
        ("corda_config", {"cache_file": "x.pt", "covariance_file": "x.pt"}),
        ("lora_ga_config", {"direction": "ArB2r"}),
        ("layer_replication", [[0, 2], [0, 2]]),
        ("runtime_config", {"ephemeral_gpu_offload": True}),
        ("trainable_token_indices", [0]),
        ("something_newer", {"module": "antigravity"}),
        ("peft_type", "XLORA"),
        ("task_type", "CAUSAL_LM"),
        ("init_lora_weights", "loftq"),
        ("modules_to_save", ["distilbert"]),
        ("exclude_modules", EXPRESSION),
        ("layers_pattern", EXPRESSION),
        ("alpha_pattern", {EXPRESSION: 4}),
        ("r", 10**30),
        ("r", "4"),
    ],
)
def test_an_option_that_could_import_fetch_or_hang_is_refused_by_name(folder, name, value):
    alter_json(folder, CONFIG, **{name: value})
    with pytest.raises(AdapterError, match=rf"adapter_config\.json: .*{name}"):
        load(folder)
    with pytest.raises(AdapterError, match=rf"adapter_config\.json: .*{name}"):
        classifier.load(without_card(folder), labels=LABELS)
    assert "antigravity" not in sys.modules


def without_card(folder):
    """The same folder as stock PEFT would have left it."""
    (folder / "card.json").unlink()
    return folder


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("target_modules", EXPRESSION),
        ("target_modules", ["q_lin", EXPRESSION]),
        ("feedforward_modules", EXPRESSION),
        ("rank_pattern", {EXPRESSION: 4}),
    ],
)
def test_a_regular_expression_of_a_foreign_folder_is_refused(folder, name, value):
    alter_json(folder, CONFIG, **{name: value})
    with pytest.raises(AdapterError, match=rf"{name}.*is not a module name .*list the names"):
        classifier.load(without_card(folder), labels=LABELS)


@pytest.mark.parametrize("value", ["q_lin", ["q_lin", "layer.0.attention.v_lin"]])
def test_names_and_ends_of_names_are_read(folder, value):
    alter_json(folder, CONFIG, target_modules=value, rank_pattern={"q_lin": 4})
    found = read_config(folder).target_modules
    assert found == value or found == set(value)


@pytest.mark.parametrize("method", ["lora", "ia3"])
def test_expressions_of_an_early_adapter_become_the_names_of_its_tensors(
    originals, tmp_path, method
):
    """The expression would take years: the names come from the tensors alone."""
    folder = Path(shutil.copytree(originals / method, tmp_path / "a"))
    changes = {"target_modules": EXPRESSION}
    if method == "lora":
        changes["rank_pattern"] = {EXPRESSION: 2}
    else:
        # Early versions kept these as ends of names.
        changes["feedforward_modules"] = ["lin2"]
    alter_json(folder, CONFIG, **changes)
    ids = torch.tensor(IDS)
    expected = load(originals / method).model(input_ids=ids).logits
    assert torch.equal(load(folder).model(input_ids=ids).logits, expected)


def test_an_expression_for_lora_alpha_in_an_early_adapter_is_refused(folder):
    """The tensors do not hold lora_alpha, and no expression is run."""
    alter_json(folder, CONFIG, alpha_pattern={EXPRESSION: 4})
    with pytest.raises(AdapterError, match=r"alpha_pattern.*list the names of the modules"):
        load(folder)


@pytest.mark.parametrize("method", ["lora", "ia3", "adalora", "vera"])
def test_a_saved_configuration_holds_full_names_alone(originals, method):
    config = json.loads((originals / method / CONFIG).read_text())
    names = config["target_modules"] + [*(config.get("rank_pattern") or {})]
    names += config.get("feedforward_modules") or []
    assert len(config["target_modules"]) > 1
    if method == "adalora":
        assert all(name.endswith(".lora_E") for name in config["rank_pattern"])
    assert all(re.fullmatch(r"distilbert\.transformer\.layer\.[\w.]+", name) for name in names)


def test_the_base_that_pefts_file_names_is_never_looked_for(folder, originals):
    alter_json(folder, CONFIG, base_model_name_or_path="someone/else", revision="x")
    ids = torch.tensor(IDS)
    assert torch.equal(
        load(folder).model(input_ids=ids).logits,
        load(originals / "lora").model(input_ids=ids).logits,
    )


@pytest.mark.parametrize("name", ["card.json", CONFIG, WEIGHTS, "tokenizer.json"])
def test_a_link_out_of_the_folder_is_refused_and_one_to_the_folder_is_not(folder, tmp_path, name):
    (folder / name).rename(tmp_path / "elsewhere")
    (folder / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(AdapterError, match=rf"{re.escape(name)}: is a link out of its folder"):
        load(folder)
    (folder / name).unlink()
    (tmp_path / "elsewhere").rename(folder / name)
    (tmp_path / "link").symlink_to(folder)
    assert load(tmp_path / "link").card.labels == list(LABELS)


def test_the_links_of_the_hubs_own_cache_are_followed(folder, tmp_path):
    """`snapshot_download` answers with a folder of links to the blobs of the same repository."""
    snapshot, blobs = tmp_path / "models--a--b/snapshots/0123", tmp_path / "models--a--b/blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for path in folder.iterdir():
        path.rename(blobs / f"{path.name}-blob")
        (snapshot / path.name).symlink_to(f"../../blobs/{path.name}-blob")
    assert load(snapshot).card.labels == list(LABELS)
    (snapshot / WEIGHTS).unlink()
    (blobs / f"{WEIGHTS}-blob").rename(tmp_path / "elsewhere")
    (snapshot / WEIGHTS).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(AdapterError, match="is a link out of its folder"):
        load(snapshot)


@pytest.mark.parametrize(
    "name", ["../elsewhere", "/etc/passwd", "a/../../elsewhere", "..", "a\0", "a" * 300, ""]
)
def test_a_name_that_leads_out_of_the_folder_is_refused(folder, name):
    files = {**load_card(folder).files, name: "0"}
    path = folder / "card.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "files": files}))
    with pytest.raises(AdapterError, match="which is not in it"):
        load(folder)


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS, "tokenizer.json"])
def test_a_file_without_a_recorded_hash_is_refused(folder, name):
    path = folder / "card.json"
    card = json.loads(path.read_text())
    del card["files"][name]
    path.write_text(json.dumps(card))
    with pytest.raises(AdapterError, match=rf"{re.escape(name)}: no hash of this file is recorded"):
        load(folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 100_000, "nests lists or objects deeper than"),
        ('{"a":' * 40 + "1" + "}" * 40, "nests lists or objects deeper than"),
        ("1" * 5000, "is not JSON"),
        ("[" + " " * MAX_JSON_BYTES + "]", "is larger than 4,194,304 bytes"),
        ("\ud800", "is not JSON"),
    ],
    ids=["deep list", "deep object", "long number", "large", "no UTF-8"],
)
def test_json_is_bounded_before_it_is_used(tmp_path, text, message):
    path = tmp_path / "card.json"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(AdapterError, match=f"card.json: {message}"):
        read_json(path)


@pytest.mark.parametrize("length", [2**20 + 1, 2**40, 2**64 - 1])
def test_a_header_is_bounded_before_it_is_read(folder, length):
    path = folder / WEIGHTS
    path.write_bytes(length.to_bytes(8, "little") + path.read_bytes()[8:])
    with pytest.raises(AdapterError, match=r"header takes [\d,]+ bytes; allowed: 1,048,576"):
        read_header(path)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.int32])
def test_a_tensor_of_another_dtype_is_refused(folder, dtype):
    def change(tensors):
        name = min(tensors)
        tensors[name] = tensors[name].to(dtype)

    alter_tensors(folder, change)
    with pytest.raises(AdapterError, match=r"has dtype \w+; allowed: F32"):
        load(folder)


@pytest.mark.parametrize(("method", "name"), [("lora", "r"), ("adalora", "init_r"), ("vera", "r")])
def test_a_rank_that_no_tensor_has_takes_no_memory(originals, tmp_path, method, name):
    folder = Path(shutil.copytree(originals / method, tmp_path / "a"))
    alter_json(folder, CONFIG, **{name: 2**16})
    with (
        torch.autograd.profiler.profile(profile_memory=True) as profile,
        pytest.raises(AdapterError),
    ):
        load(folder)
    assert max((event.cpu_memory_usage for event in profile.function_events), default=0) < 2**20


@pytest.fixture
def whole(tmp_path, tiny_base):
    """A whole model as stock transformers saves it."""
    AutoModelForSequenceClassification.from_pretrained(tiny_base).save_pretrained(
        tmp_path / "whole"
    )
    AutoTokenizer.from_pretrained(tiny_base).save_pretrained(tmp_path / "whole")
    return tmp_path / "whole"


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("config.json", {"auto_map": {"AutoConfig": "x.Y"}}, "auto_map is"),
        (
            "config.json",
            {"quantization_config": {"quant_method": "torchao"}},
            "quantization_config is",
        ),
        ("config.json", {"attn_implementation": "someone/kernel"}, "attn_implementation is"),
        ("config.json", {"transformers_weights": "other.safetensors"}, "transformers_weights is"),
        ("config.json", {"vocab_size": 10**9}, "has shape"),
        ("config.json", {"n_layers": 10**9}, "n_layers is"),
        ("config.json", {"dim": "x"}, "field 'dim'"),
        ("tokenizer_config.json", {"tokenizer_file": "/etc/passwd"}, "tokenizer_file is"),
        ("tokenizer.json", {"model": 3}, "."),
    ],
)
def test_a_whole_model_that_redirects_or_does_not_fit_is_refused(whole, name, values, message):
    path = whole / name
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
    with pytest.raises((AdapterError, ModelError), match=message):
        classifier.load(whole)


def test_a_whole_model_with_a_value_that_is_not_finite_is_refused(whole):
    tensors = load_file(whole / "model.safetensors")
    tensors["classifier.weight"][0, 0] = float("nan")
    save_file(tensors, whole / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(AdapterError, match=r"classifier\.weight holds a value"):
        classifier.load(whole)


READ = """
from lora_sentiment.recipe.data import DataConfig
from lora_sentiment.data.rows import load_data
print(load_data(DataConfig(source="own/reviews")).train.fingerprint)
"""


@pytest.mark.slow
def test_two_runs_at_once_share_a_cache_and_a_half_written_one_is_rebuilt(tmp_path):
    rows = [json.dumps({"text": f"row {i}", "label": ("bad", "good")[i % 2]}) for i in range(3000)]
    files = {"train.jsonl": "\n".join(rows).encode()}
    cache = tmp_path / "hf"
    with serve(models={}, datasets={"own/reviews": files}, refusals={}) as address:
        online = {"HF_HUB_OFFLINE": "0", "HF_DATASETS_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
        environment = {**os.environ, **online, "HF_ENDPOINT": address, "HF_HOME": str(cache)}
        command = [sys.executable, "-c", READ]

        def start():
            pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
            return subprocess.Popen(command, env=environment, cwd=ROOT, text=True, **pipes)

        both = [process.communicate() for process in [start(), start()]]
        assert both[0][0] == both[1][0] != "", both
        # What a run that was killed leaves: parts under names that no reader takes.
        for path in cache.glob("datasets/own___reviews/*/*/*"):
            shutil.copytree(path, f"{path}.incomplete") if path.is_dir() else None
            shutil.rmtree(path) if path.is_dir() else None
        for path in cache.glob("hub/datasets--own--reviews/blobs/*"):
            path.with_name(f"{path.name}.incomplete").write_bytes(path.read_bytes()[:100])
            path.unlink()
        third = start().communicate()
        assert third[0] == both[0][0], third
