"""A whole run that is stopped and goes on, and who may write into its folder."""

import errno
import json
import os
import re
import shutil
import signal
from functools import partial

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from lora_sentiment import cli
from lora_sentiment.commands import sweep as sweep_module
from lora_sentiment.errors import RecipeError, StoppedError, TrainingError
from lora_sentiment.files import hash_file, lock_file
from lora_sentiment.recipe.recipe import Recipe
from lora_sentiment.train import train
from lora_sentiment.training import loop, run_folder
from tests.training.stopped_runs import read_metrics, signal_at


def run(recipe, *overrides, **options):
    return train(Recipe.load(recipe, overrides), **options)


def weights(folder):
    return hash_file(folder / "adapter_model.safetensors")


@pytest.fixture
def stopped(toy_recipe, monkeypatch):
    """The folder of a run that was stopped in its third of seven steps."""
    with monkeypatch.context() as patch:
        patch.setattr(loop._Loop, "_backward", loop._Loop._backward)
        signal_at(3, signal.SIGTERM)
        with pytest.raises(StoppedError):
            run(toy_recipe)
    return toy_recipe.parent / "adapter.run"


def test_a_stopped_command_ends_with_75_and_resume_goes_on_to_the_same_adapter(
    toy_recipe, monkeypatch, capsys
):
    whole = run(toy_recipe, f"output.dir={toy_recipe.parent}/whole").adapter
    before = signal.getsignal(signal.SIGTERM)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(loop._Loop, "_backward", loop._Loop._backward)
            signal_at(3, signal.SIGTERM)
            with pytest.raises(SystemExit) as caught:
                cli.main(["train", str(toy_recipe)])
        assert caught.value.code == 75
        told = capsys.readouterr().err.strip().splitlines()[-1]
        assert told.startswith("stopped by SIGTERM after step 3 of 7, saved in ")
        assert not (toy_recipe.parent / "adapter").exists()
        with pytest.raises(SystemExit) as caught:
            cli.main(["train", str(toy_recipe), "--resume"])
        assert caught.value.code == 0
    finally:
        signal.signal(signal.SIGTERM, before)
    assert weights(toy_recipe.parent / "adapter") == weights(whole)
    left = toy_recipe.parent / "adapter.run"
    assert sorted(path.name for path in left.iterdir()) == ["metrics.csv"]
    assert read_metrics(left) == read_metrics(toy_recipe.parent / "whole.run")


def test_a_run_stopped_before_its_last_rename_writes_its_adapter_again(toy_recipe, monkeypatch):
    whole = run(toy_recipe, f"output.dir={toy_recipe.parent}/whole").adapter

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("lora_sentiment.train.publish", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run(toy_recipe)
    assert (toy_recipe.parent / "adapter.run/adapter/card.json").exists()
    monkeypatch.setattr(loop._Loop, "_step", None)  # nothing is trained again
    assert weights(run(toy_recipe).adapter) == weights(whole)


def test_a_changed_recipe_is_refused_by_name_allowed_or_starts_anew(toy_recipe, stopped):
    changed = "train.learning_rate=1e-3"
    with pytest.raises(TrainingError, match=r"train\.learning_rate: was 0\.01, is 0\.001"):
        run(toy_recipe, changed)
    with pytest.raises(
        TrainingError, match=r"method\.r: was 4, is 2 \(cannot be changed in a resumed run\)"
    ):
        run(toy_recipe, "method.r=2", allow_changes=True)
    found = run(toy_recipe, changed, allow_changes=True)
    assert found.history.resumed == [3]
    assert found.history.steps[2].learning_rate > 5e-3
    assert found.history.steps[3].learning_rate < 1e-3
    fresh = run(toy_recipe, changed, "train.resume=never", "output.overwrite=true")
    assert fresh.history.resumed == []


@pytest.fixture
def own_base(toy_recipe, tiny_base):
    """The toy recipe's base, as a copy that may be changed."""
    base = shutil.copytree(tiny_base, toy_recipe.parent / "base")
    toy_recipe.write_text(toy_recipe.read_text().replace(str(tiny_base), str(base)))
    return base


def change_base(base):
    tensors = load_file(base / "model.safetensors")
    tensors["embeddings.word_embeddings.weight"][7] += 1
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})


def change_tokenizer(base):
    path = base / "tokenizer.json"
    values = json.loads(path.read_text())
    vocab = values["model"]["vocab"]
    vocab["good"], vocab["bad"] = vocab["bad"], vocab["good"]
    path.write_text(json.dumps(values))


def change_config(base, **values):
    path = base / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def change_rows(base):
    path = base.parent / "train.csv"
    path.write_text(path.read_text().replace(" and ", " or "))


CHANGES = {
    "train.weight_decay": (["train.weight_decay=0.5"], None, None),
    "train_sha256": ([], change_rows, None),
    "base_sha256": ([], change_base, None),
    "base.n_heads": ([], partial(change_config, n_heads=2), None),
    "base.activation": ([], partial(change_config, activation="relu"), None),
    "base.dropout": ([], partial(change_config, dropout=0.5), None),
    "base.attention_dropout": ([], partial(change_config, attention_dropout=0.5), None),
    "base.seq_classif_dropout": ([], partial(change_config, seq_classif_dropout=0.5), None),
    "tokenizer_sha256": ([], change_tokenizer, None),
    "versions.torch": ([], None, (run_folder, "version", lambda name: f"{name} 9")),
    "versions.lora_sentiment": ([], None, (run_folder, "__version__", "9")),
    "machine.threads": ([], None, (os, "sched_getaffinity", lambda _: set(range(5)))),
    "machine.instructions": ([], None, (torch.backends.cpu, "get_cpu_capability", lambda: "SSE")),
}


def test_each_thing_that_fixes_the_bytes_is_named_when_it_changed(
    own_base, toy_recipe, stopped, monkeypatch
):
    """The world size is changed in test_stopped_launches.py."""
    kept = {
        path: path.read_bytes() for path in [*own_base.iterdir(), toy_recipe.parent / "train.csv"]
    }
    for name, (overrides, change, patched) in CHANGES.items():
        with monkeypatch.context() as patch:
            if patched:
                patch.setattr(*patched)
            if change:
                change(own_base)
            with pytest.raises(
                TrainingError, match=rf"(?m)^  {re.escape(name)}: was .*, is .*$"
            ) as caught:
                run(toy_recipe, *overrides)
        fixed = (
            "base_sha256",
            "base.n_heads",
            "base.activation",
            "tokenizer_sha256",
            "train_sha256",
        )
        assert ("--allow-changes" in str(caught.value)) == (name not in fixed), name
        for path, content in kept.items():
            path.write_bytes(content)
    assert run(toy_recipe).history.resumed == [3]


def full(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


def full_in_rust(*_, **__):
    raise SafetensorError(
        "Error while serializing: I/O error: No space left on device (os error 28)"
    )


@pytest.mark.parametrize(
    ("place", "fails"),
    [
        ("lora_sentiment.adapter.folder.save", full_in_rust),
        ("lora_sentiment.train.publish", full),
    ],
)
def test_a_disk_too_full_for_the_adapter_costs_no_training(toy_recipe, monkeypatch, place, fails):
    with monkeypatch.context() as patch:
        patch.setattr(place, fails)
        told = (
            r"disk is full: .*No space left.* bytes are free in .*; make room, then the same "
            "command with train.resume=auto resumes from .*-00000007"
        )
        with pytest.raises(TrainingError, match=told):
            run(toy_recipe)
    monkeypatch.setattr(loop._Loop, "_step", None)  # nothing is trained again
    assert run(toy_recipe, "train.resume=always").history.resumed == [7]


def test_the_report_says_that_a_run_went_on_and_what_was_allowed(toy_recipe, stopped):
    found = run(toy_recipe, "train.weight_decay=0.5", allow_changes=True).report["train"]
    assert found["resumed"] == [3]
    assert found["changes"] == ["step 3: train.weight_decay: was 0.0, is 0.5"]
    assert found["cuts"] == []


def test_changed_rows_are_refused_and_never_starts_anew(toy_recipe, stopped):
    rows = (toy_recipe.parent / "train.csv").read_text().splitlines()
    (toy_recipe.parent / "train.csv").write_text("\n".join([*rows, "a warm film,positive"]))
    with pytest.raises(TrainingError, match="train_sha256: was "):
        run(toy_recipe)
    assert run(toy_recipe, "train.resume=never").history.resumed == []
    assert [row["step"] for row in read_metrics(stopped)] == [
        "1",
        "2",
        "3",
        "4",
        "5",
        "6",
        "7",
        "7",
    ]


def test_always_refuses_to_start_anew(toy_recipe):
    with pytest.raises(TrainingError, match="holds no checkpoint to resume from"):
        run(toy_recipe, "train.resume=always")


def test_two_runs_on_one_folder_refuse_each_other_and_the_first_goes_on(toy_recipe, stopped):
    refusal = r"adapter\.run: another run is at work here; wait, or set another output"
    with lock_file(stopped / "lock"), pytest.raises(RecipeError, match=refusal):
        run(toy_recipe)
    assert run(toy_recipe).history.resumed == [3]


def test_what_is_no_folder_in_the_place_of_the_adapter_is_told_before_training(toy_recipe, stopped):
    for put in (lambda path: path.write_text("x"), lambda path: path.symlink_to(stopped)):
        put(stopped / "adapter")
        with pytest.raises(
            RecipeError,
            match=r"adapter\.run/adapter: is no folder, and the adapter is written there",
        ):
            run(toy_recipe)
        (stopped / "adapter").unlink()
    assert run(toy_recipe).history.resumed == [3]


@pytest.mark.parametrize(
    ("folder", "message"),
    [
        (
            "/".join(["long" * 40] * 40),
            "output.dir: 'longlong.*' cannot be looked at: File name too long; set another",
        ),
        (
            "~no such user/mine",
            "output.dir: found '~no such user/mine'; this machine has no home folder of that user",
        ),
    ],
)
def test_a_folder_that_cannot_be_is_told_before_training(toy_recipe, folder, message):
    with pytest.raises(RecipeError, match=message):
        run(toy_recipe, f"output.dir={folder}")


def test_changes_are_not_allowed_of_a_run_that_starts_anew(toy_recipe, capsys):
    with pytest.raises(SystemExit):
        cli.main(["train", str(toy_recipe), "train.resume=never", "--allow-changes"])
    assert "--allow-changes needs a resumed run, but train.resume=never" in capsys.readouterr().err


def test_a_sweep_is_stopped_with_its_run_and_goes_on_in_it(toy_recipe, monkeypatch):
    grid = ["method.r=[2, 4]", "train.max_steps=4"]
    with monkeypatch.context() as patch:
        patch.setattr(loop._Loop, "_backward", loop._Loop._backward)
        signal_at(3, signal.SIGINT)
        with pytest.raises(StoppedError):
            sweep_module.sweep(toy_recipe, grid)
    (first,) = (toy_recipe.parent / "adapter.sweep").glob("*.run")
    assert (first / "checkpoints/step-00000003").is_dir()
    states = [row["state"] for row in sweep_module.sweep(toy_recipe, grid)["rows"]]
    assert states == ["finished", "finished"]
    assert len(read_metrics(first)) == 5
