"""The whole walk on a toy: what leaves it, and that it repeats."""

import csv
import json
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from peft import AutoPeftModelForSequenceClassification
from transformers import AutoModel

import lora_sentiment
from lora_sentiment import load as load_classifier
from lora_sentiment.adapter.folder import compute_probe, load
from lora_sentiment.commands.evaluate import evaluate
from lora_sentiment.commands.push import push
from lora_sentiment.errors import DataError, ModelError, RecipeError
from lora_sentiment.models.load import load_base
from lora_sentiment.recipe.data import REPORT_BLOCKS
from lora_sentiment.recipe.model import ModelConfig
from lora_sentiment.recipe.recipe import Recipe
from lora_sentiment.tasks.metrics import score
from lora_sentiment.train import _choose_engine, _draw, train
from lora_sentiment.training.history import History
from tests.conftest import CORES, toy_rows, write_csv, write_toy, write_toy_recipe

FILES = {
    "README.md",
    "adapter_config.json",
    "adapter_model.safetensors",
    "card.json",
    "confusion.png",
    "predictions.safetensors",
    "recipe.yaml",
    "report.html",
    "report.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "training.png",
}


CARD_TEMPLATE = Path(lora_sentiment.__file__).parent / "adapter/templates/adapter.md"


def run(recipe: Path, *overrides: str):
    return train(Recipe.load(recipe, overrides))


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_base):
    """A finished run of the toy recipe, with TensorBoard; do not change its files."""
    recipe = write_toy_recipe(write_toy(tmp_path_factory.mktemp("finished")), tiny_base)
    return run(recipe, "train.report_to=[tensorboard]")


def test_a_python_user_sees_no_warning_about_the_libraries_future(toy_recipe):
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        load(run(toy_recipe, "train.max_steps=1").adapter)


def test_a_run_writes_the_adapter_folder_and_nothing_of_the_base(finished):
    found = finished
    assert {path.name for path in found.adapter.iterdir()} == FILES
    assert (found.adapter / "adapter_model.safetensors").stat().st_size < 60_000
    report = json.loads((found.adapter / "report.json").read_text())
    assert report == found.report
    plain = {"accuracy", "macro_f1", "mcc", "log_loss", "auroc", "ece"}
    assert set(report["test"]) == plain | {"calibrated_log_loss", "calibrated_ece"}
    assert (
        report["test"]["accuracy"]["low"]
        <= report["test"]["accuracy"]["value"]
        <= report["test"]["accuracy"]["high"]
    )
    assert report["data"]["test"]["kept"] == 41
    assert (
        report["parameters"]["trainable"]
        == report["parameters"]["adapter"] + report["parameters"]["head"]
    )
    assert report["train"]["engine"] == "fast"


@pytest.mark.gpu
@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_gpu_learns_the_toy_and_answers_as_a_cpu_does(toy_recipe, dtype):
    found = run(toy_recipe, "train.num_train_epochs=4", f"model.dtype={dtype}")
    assert found.history.steps[-1].loss < found.history.steps[0].loss
    texts = ["a good film", "a dull book, and a bad plot"]
    here = load_classifier(found.adapter, dtype="float32").probabilities(texts)
    call = "import json, sys, lora_sentiment as l; f, *t = sys.argv[1:]; print(json.dumps(l.load(f, dtype='float32')"
    there = subprocess.run(
        [sys.executable, "-c", f"{call}.probabilities(t).tolist()))", str(found.adapter), *texts],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "-1"}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    np.testing.assert_allclose(here, json.loads(there.stdout), atol=1e-5)


def test_stock_peft_loads_the_folder_and_agrees(finished, tiny_base):
    found = finished
    stock = AutoPeftModelForSequenceClassification.from_pretrained(
        found.adapter, num_labels=2, dtype=torch.float32
    )
    ours = load(found.adapter).model
    ids = torch.tensor([[2, 5, 9, 12, 20, 3]])
    torch.testing.assert_close(
        stock.eval()(input_ids=ids).logits, ours(input_ids=ids).logits, atol=1e-5, rtol=0
    )
    base = AutoModel.from_pretrained(tiny_base, dtype=torch.float32).state_dict()
    held = stock.base_model.model.distilbert.state_dict()
    for name, tensor in held.items():
        if "lora_" not in name:
            assert torch.equal(tensor, base[name.replace(".base_layer.", ".")]), name


def train_both(recipe, folder):
    for kind in ("lora", "full"):
        own = [f"method={{kind: {kind}}}", f"output.dir={folder}/{kind}", "name=same"]
        run(recipe, *own, "train.max_steps=3")


def test_the_same_recipe_twice_gives_the_same_bytes(toy_recipe):
    """Here, and in a process with another hash seed, so that sets have another order."""
    first, second = toy_recipe.parent / "first", toy_recipe.parent / "second"
    train_both(toy_recipe, first)
    code = "import sys; from tests.test_train import train_both; train_both(*sys.argv[1:])"
    command = [sys.executable, "-c", code, str(toy_recipe), str(second)]
    environment = {**os.environ, "PYTHONHASHSEED": "1"}
    subprocess.run(command, env=environment, cwd=Path(__file__).parents[1], check=True)
    # The others hold seconds and the name of the folder; of the pictures see test_plots.py.
    varying = {"report.json", "README.md", "recipe.yaml"}
    names = FILES - varying - {"confusion.png", "training.png", "report.html"}
    weights = {"adapter_model.safetensors", "adapter_config.json"}
    for name in names:
        assert (first / "lora" / name).read_bytes() == (second / "lora" / name).read_bytes(), name
    for name in names - weights | {"changed.safetensors"}:
        assert (first / "full" / name).read_bytes() == (second / "full" / name).read_bytes(), name


def test_another_seed_trains_other_tensors_on_the_same_rows(toy_recipe):
    cards = []
    for seed in (1, 2):
        folder = f"output.dir={toy_recipe.parent}/s{seed}"
        found = run(toy_recipe, f"train.seed={seed}", folder, "train.max_steps=1")
        cards.append(load(found.adapter).card)
    assert cards[0].data == cards[1].data
    assert (
        cards[0].files["adapter_model.safetensors"] != cards[1].files["adapter_model.safetensors"]
    )


def test_on_another_device_the_stock_engine_runs_and_the_fast_one_is_refused(tiny_base):
    # A device that this machine does not have is stood for by one without values.
    model = load_base(
        ModelConfig(name=str(tiny_base), max_length=16), labels=("no", "yes")
    ).model.to("meta")
    reason = "the device is meta, and the fast forward pass was tested on cpu and cuda only"
    assert _choose_engine(model, "auto", torch.float32) == f"stock ({reason})"
    assert "forward" not in model.distilbert.__dict__
    with pytest.raises(ModelError, match=r"train\.engine=fast cannot run here: the device is meta"):
        _choose_engine(model, "fast", torch.float32)


def test_the_fast_engine_says_where_it_cannot_run(toy_recipe, monkeypatch):
    monkeypatch.setattr(
        "lora_sentiment.train.use_fast_encoder", lambda model, compute_dtype: "q_lin: is odd"
    )
    with pytest.raises(ModelError, match=r"train\.engine=fast cannot run here: q_lin: is odd"):
        run(toy_recipe, "train.engine=fast")
    monkeypatch.undo()
    found = run(toy_recipe, "method={kind: ia3}", "output.overwrite=true")
    assert found.report["train"]["engine"].startswith("stock (")


@pytest.mark.parametrize("engine", ["fast", "stock"])
def test_bfloat16_walks_with_both_engines(toy_recipe, engine):
    found = run(toy_recipe, "model.dtype=bfloat16", f"train.engine={engine}", "train.max_steps=2")
    assert load(found.adapter).card.machine["dtype"] == "bfloat16"


def test_gradient_checkpointing_gives_the_same_losses_with_the_fast_engine(toy_recipe):
    plain = run(toy_recipe, "train.max_steps=2")
    folder = f"output.dir={toy_recipe.parent}/again"
    again = run(
        toy_recipe,
        "train.gradient_checkpointing=true",
        "train.engine=fast",
        "train.max_steps=2",
        folder,
    )
    assert again.report["train"]["engine"] == "fast"
    expected = [point.loss for point in plain.history.steps]
    assert [point.loss for point in again.history.steps] == expected


def test_a_taken_folder_is_refused_before_anything_is_loaded(toy_recipe):
    (toy_recipe.parent / "adapter").mkdir()
    with pytest.raises(RecipeError, match=r"exists; set output\.overwrite=true"):
        run(toy_recipe, "data.source=nowhere.csv")


def test_only_an_adapter_folder_is_ever_replaced(toy_recipe):
    (toy_recipe.parent / "adapter").mkdir()
    with pytest.raises(RecipeError, match="is no adapter folder, so it is not replaced"):
        run(toy_recipe, "output.overwrite=true")


def test_nothing_is_left_in_place_of_an_adapter_when_a_run_fails(toy_recipe):
    with pytest.raises(ModelError):
        run(toy_recipe, "model.max_length=500")
    assert not (toy_recipe.parent / "adapter").exists()


def test_a_bad_test_row_costs_the_test_figures_and_not_the_run(toy_recipe):
    (toy_recipe.parent / "test.csv").write_text("text,label\nfine,positive\nfine,nobody\n")
    with pytest.raises(
        DataError, match=r"(?s)row 2: label 'nobody'.*the adapter is saved in .*validation only"
    ):
        run(toy_recipe)
    assert load(toy_recipe.parent / "adapter").card.labels == ["negative", "positive"]
    report = json.loads((toy_recipe.parent / "adapter/report.json").read_text())
    assert "validation" in report
    assert "test" not in report


@pytest.fixture
def three_roles(toy_recipe):
    """Overrides that name a dev file beside the test one."""
    folder = toy_recipe.parent
    lines = (folder / "test.csv").read_text().splitlines(keepends=True)
    (folder / "dev.csv").write_text("".join(lines[:22]))
    return (
        f"data.source={{train: {folder}/train.csv, test: {folder}/test.csv, dev: {folder}/dev.csv}}"
    )


@pytest.fixture
def drawn(monkeypatch):
    """The titles of the confusion matrices that are drawn."""
    titles = []

    def note(matrix, path, *, title, **_):
        titles.append(title)
        path.touch()

    monkeypatch.setattr("lora_sentiment.evaluation.plots.plot_confusion", note)
    return titles


def test_every_role_is_judged_with_figures_of_its_own(toy_recipe, three_roles, drawn):
    found = run(toy_recipe, three_roles)
    report = json.loads((found.adapter / "report.json").read_text())
    assert {"validation", "dev", "test"} <= set(report)
    # No other key may stand where a role could have its name.
    assert {*report, *report["data"]} <= {*REPORT_BLOCKS, "validation", "dev", "test"}
    assert [report["data"][role]["rows"] for role in ("validation", "dev", "test")] == [12, 21, 41]
    assert report["data"]["dev"]["kept"] == 21
    assert [report["data"][role]["seen"]["rows"] for role in ("validation", "dev", "test")] == [
        0,
        0,
        0,
    ]
    table = (found.adapter / "README.md").read_text()
    assert "| metric | validation | test | dev |" in table
    assert drawn == ["toy: test"]


def test_hidden_labels_are_said_and_the_rest_is_judged(toy_recipe, three_roles, drawn, caplog):
    (toy_recipe.parent / "test.csv").write_text("text,label\nfine,-1\npoor,-1\n")
    found = run(toy_recipe, three_roles)
    assert "test: 2 rows without labels (all are -1): not evaluated" in caplog.text
    assert "test" not in found.report
    assert found.report["data"]["test"]["unlabelled"] == 2
    assert "dev" in found.report
    assert drawn == ["toy: dev"]


def test_a_bad_row_in_one_role_costs_that_role_only(toy_recipe, three_roles):
    (toy_recipe.parent / "dev.csv").write_text("text,label\nfine,nobody\n")
    with pytest.raises(
        DataError, match=r"(?s)label 'nobody'.*is saved in .*judged on validation, test only"
    ):
        run(toy_recipe, three_roles)
    report = json.loads((toy_recipe.parent / "adapter/report.json").read_text())
    assert "test" in report
    assert "dev" not in report


def test_the_temperature_is_fitted_on_validation_and_kept_in_the_card(toy_recipe, monkeypatch):
    fitted = []

    def fit(logits, labels):
        fitted.append((logits, labels))
        return 2.5

    monkeypatch.setattr("lora_sentiment.tasks.single_label.fit_temperature", fit)
    found = run(toy_recipe)
    ((logits, labels),) = fitted
    assert load(found.adapter).card.calibration == {"temperature": 2.5}
    assert "temperature 2.500" in (found.adapter / "README.md").read_text()
    by_hand = score(logits, labels, temperature=2.5)
    validation = found.report["validation"]
    assert validation["calibrated_log_loss"] == by_hand["log_loss"].as_dict()
    assert validation["calibrated_ece"] == by_hand["ece"].as_dict()
    assert validation["log_loss"] == score(logits, labels)["log_loss"].as_dict()


def test_the_temperature_lowers_the_log_loss_of_validation(finished):
    validation = finished.report["validation"]
    assert validation["calibrated_log_loss"]["value"] < validation["log_loss"]["value"]


@pytest.fixture
def no_base(monkeypatch):
    """A run that loads its base fails."""
    monkeypatch.setattr(
        "lora_sentiment.train._load_model", lambda *_: pytest.fail("the base is loaded")
    )


@pytest.mark.usefixtures("no_base")
def test_a_wrong_number_of_class_weights_is_refused_before_the_base_is_loaded(toy_recipe):
    with pytest.raises(RecipeError, match=r"found 3 weights; .* in this order: negative, positive"):
        run(toy_recipe, "train.class_weights=[1, 2, 3]")


@pytest.mark.usefixtures("no_base")
@pytest.mark.parametrize("setting", ["metric_for_best_model=auroc", "metric_for_best_model=mcc"])
@pytest.mark.parametrize("patience", ["null", "2"])
def test_a_metric_that_validation_cannot_serve_is_refused_before_the_base_is_loaded(
    toy_recipe, setting, patience
):
    toy = toy_recipe.parent
    rows = [(text, label) for text, label in toy_rows(20) if label == "positive"]
    write_csv(toy / "one.csv", rows)
    roles = f"data.source={{train: {toy}/train.csv, validation: {toy}/one.csv}}"
    stopping = f"train.early_stopping_patience={patience}"
    with pytest.raises(DataError, match=r"validation: all 10 rows .* none has 'negative'"):
        run(toy_recipe, roles, f"train.{setting}", stopping)


def test_training_warns_of_unknown_tokens_and_of_labels_that_may_be_one(toy_recipe, caplog):
    toy = toy_recipe.parent
    rows = [("好评 差评", label) for label in ("positive", "Positive", "negative")]
    write_csv(toy / "validation.csv", rows)
    write_csv(toy / "train.csv", [*toy_rows(20), ("a film", "Positive")])
    roles = f"data.source={{train: {toy}/train.csv, validation: {toy}/validation.csv}}"
    run(toy_recipe, roles, "train.max_steps=1")
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert "validation: 100.0% of the tokens are [UNK]" in warnings[1]
    assert "'Positive' (1 rows), 'positive' (10 rows)" in warnings[0]


def test_class_weights_are_logged_by_name_and_trained_with(toy_recipe, caplog):
    caplog.set_level("INFO", "lora_sentiment")
    plain = run(toy_recipe, "train.max_steps=1", "train.class_weights=balanced")
    assert "class weights: negative 1, positive 1" in caplog.text
    weighted = run(
        toy_recipe, "train.max_steps=1", "train.class_weights=[1, 9]", "output.overwrite=true"
    )
    assert weighted.history.steps[0].loss != plain.history.steps[0].loss


def test_an_adapter_that_an_earlier_run_left_is_not_deleted(toy_recipe):
    left = toy_recipe.parent / "adapter.run/adapter"
    left.mkdir(parents=True)
    (left / "card.json").write_text("{}")
    with pytest.raises(RecipeError, match="holds an adapter of an earlier run"):
        run(toy_recipe)


def test_test_texts_that_were_trained_on_are_counted(toy_recipe):
    lines = (toy_recipe.parent / "train.csv").read_text().splitlines()
    (toy_recipe.parent / "test.csv").write_text("\n".join([*lines[:4], "unseen,positive"]))
    assert run(toy_recipe).report["data"]["test"]["seen"] == {"rows": 3, "first": [1, 2, 3]}


def test_an_output_that_cannot_be_made_is_one_message(toy_recipe):
    with pytest.raises(RecipeError, match="cannot be made"):
        run(toy_recipe, f"output.dir={toy_recipe}/inside/a/file")


def test_a_tracker_that_is_not_installed_is_refused(toy_recipe, monkeypatch):
    monkeypatch.setattr("lora_sentiment.training.processes.get_available_trackers", lambda: [])
    with pytest.raises(RecipeError, match="tensorboard is not installed"):
        run(toy_recipe, "train.report_to=[tensorboard]")


def test_no_text_of_the_data_leaves(finished):
    parent = finished.adapter.parent
    lines = (parent / "train.csv").read_text().splitlines()[1:]
    texts = [line.split(",")[0] for line in lines]
    for folder in (finished.adapter, parent / "adapter.run"):
        for path in folder.rglob("*"):
            if path.is_file():
                content = path.read_bytes()
                assert not [text for text in texts if text.encode() in content], path


def test_metrics_csv_always_and_tensorboard_when_asked(finished):
    logs = finished.adapter.parent / "adapter.run"
    with (logs / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["1", "2", "3", "4", "5", "6", "7", "7"]
    assert list(logs.rglob("events.out.tfevents*"))


def test_the_model_card_is_valid_hub_metadata(finished):
    from huggingface_hub import ModelCard

    card = ModelCard.load(finished.adapter / "README.md")
    assert card.data.pipeline_tag == "text-classification"
    assert {result.metric_type for result in card.data.eval_results} == {
        "accuracy", "f1", "matthews_correlation", "roc_auc",
    }  # fmt: skip
    assert "## Limits" in card.text


def launched(
    recipe: Path,
    *overrides: str,
    with_command=("accelerate.commands.launch", "--num_processes", "1"),
):
    command = [
        sys.executable,
        "-m",
        *with_command,
        "-m",
        "lora_sentiment.train",
        str(recipe),
        *overrides,
    ]
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[1],
        check=False,
        timeout=300,
        preexec_fn=lambda: os.sched_setaffinity(0, CORES),
    )


def test_both_threads_are_used_under_the_launcher(toy_recipe):
    done = launched(toy_recipe, "train.max_steps=1")
    assert done.returncode == 0, done.stderr
    cores = len(CORES)
    assert load(toy_recipe.parent / "adapter").card.machine["threads"] == cores
    assert "adapter + " in done.stdout


@pytest.mark.slow
def test_a_launch_setting_that_disagrees_is_refused_by_name(toy_recipe):
    done = launched(
        toy_recipe,
        with_command=(
            "accelerate.commands.launch",
            "--num_processes",
            "1",
            "--mixed_precision",
            "fp16",
        ),
    )
    assert done.returncode != 0
    assert "--mixed_precision fp16" in done.stderr
    assert "lora_sentiment/train.py" not in done.stderr


@pytest.mark.slow
@pytest.mark.shared
def test_the_main_command_walks_the_hub(hub, tmp_path):
    command = [
        sys.executable, "-m", "accelerate.commands.launch", "-m", "lora_sentiment.train", "recipes/imdb_lora.yaml",
        "model.name=local/minilm-l6-distilbert", "model.max_length=32", "data.max_train_rows=64",
        "data.max_test_rows=32", "train.max_steps=2", f"output.dir={tmp_path}/imdb",
    ]  # fmt: skip
    done = subprocess.run(
        command, capture_output=True, text=True, env=hub, cwd=Path(__file__).parents[1], check=False
    )
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "imdb/report.json").read_text())
    assert report["data"]["train"]["read"] == 25_000
    assert report["data"]["test"]["rows"] == 32
    card = json.loads((tmp_path / "imdb/card.json").read_text())
    assert card["labels"] == ["neg", "pos"]
    assert re.fullmatch(r"[0-9a-f]{40}", card["base"]["revision"])


def test_a_quantised_run_says_what_it_saved_and_its_card_opens_it(toy_recipe, monkeypatch):
    # A stock model would round its scales where a CPU has avx512_bf16, and fail on weights as narrow as the toy's.
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: False)
    overrides = [
        "model.quantize=nf4",
        "model.double_quant=true",
        "train.max_steps=3",
        "model.dtype=float32",
    ]
    quantised = run(toy_recipe, *overrides)
    found = quantised.report["quantisation"]
    assert found["base_bytes"] < found["unquantised_bytes"]
    assert "nf4 made the encoder's weights" in found["verdict"]
    text = (quantised.adapter / "README.md").read_text(encoding="utf-8")
    assert found["verdict"] in text
    snippet = (
        text.split("```python\n")[1].split("```")[0].replace('"toy"', f'"{quantised.adapter}"')
    )
    names = {}
    exec(snippet, names)  # the card's own example, as a person would paste it
    stock = names["model"].eval()
    ours = load(quantised.adapter)
    np.testing.assert_allclose(
        compute_probe(stock, ours.card.probe.input_ids).logits, ours.card.probe.logits, atol=1e-5
    )
    assert ours.card.base.quantize == "nf4"


def fake_results(labels):
    """Results of a run that predicted the first label for every row."""
    logits = np.tile(-np.arange(len(labels), dtype=np.float32), (9, 1))
    rows = SimpleNamespace(labels=np.arange(9) % len(labels))
    return SimpleNamespace(logits={"validation": logits}, encoded={"validation": rows})


FAULTS = [
    ValueError("no mathematics"),
    MemoryError(),
    OSError("No space left on device"),
    RuntimeError("FT_Load_Glyph"),
    OverflowError("cannot convert float infinity"),
    ImportError("no matplotlib"),
]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: type(fault).__name__)
def test_a_picture_that_fails_is_a_warning(toy_recipe, tmp_path, monkeypatch, caplog, fault):
    recipe = Recipe.load(toy_recipe)
    recipe.folder.mkdir()
    model_card = recipe.folder / "README.md"
    template = CARD_TEMPLATE.read_text(encoding="utf-8")
    model_card.write_text(template.replace("$picture_file", "confusion.png"), encoding="utf-8")

    def fail(history, path, **_):
        path.write_bytes(b"half a picture")
        raise fault

    monkeypatch.setattr("lora_sentiment.evaluation.plots.plot_training", fail)
    card = SimpleNamespace(labels=("good", "bad"), calibration=None)
    _draw(recipe, card, History(), fake_results(card.labels), tmp_path)
    assert {path.name for path in recipe.folder.iterdir()} == {"README.md", "confusion.png"}
    assert model_card.read_text().count("confusion.png") == 1
    assert not list(tmp_path.glob(".*.png"))
    for name in ("training.png", "report.html"):  # of the page, the fake rows lack everything
        assert f"{name} cannot be drawn" in caplog.text
        assert name not in model_card.read_text()


def test_a_run_that_is_stopped_while_it_draws_leaves_a_whole_adapter(toy_recipe, monkeypatch):
    def stop(*_, **__):
        raise SystemExit(143)

    monkeypatch.setattr("lora_sentiment.evaluation.plots.plot_training", stop)
    with pytest.raises(SystemExit):
        run(toy_recipe)
    folder = Recipe.load(toy_recipe).folder
    assert {"README.md", "report.json", "predictions.safetensors"} <= {
        path.name for path in folder.iterdir()
    }
    assert not list(folder.glob("*.png"))
    assert push(folder, "a/b", dry_run=True).files
    assert evaluate(folder).num_rows == 41
