"""A run that is stopped anywhere goes on bit for bit, and a checkpoint that is not what was written is not used."""

import errno
import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import time
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from safetensors.torch import save as pack_tensors

from lora_sentiment.errors import StoppedError, TrainingError
from lora_sentiment.recipe.method import AdaloraMethod, FullMethod
from lora_sentiment.tasks import SINGLE_LABEL
from lora_sentiment.training import checkpoint, loop
from lora_sentiment.training.checkpoint import (
    MANIFEST,
    SCHEMA,
    STATE,
    TENSORS,
    Progress,
    Store,
    list_checkpoints,
    load_checkpoint,
    save_checkpoint,
)
from lora_sentiment.training.history import EvalPoint, History, TrainPoint
from tests.training.stopped_runs import (
    SETTINGS,
    fit_toy,
    make_toy,
    outcome,
    read_metrics,
    run_scenarios,
    signal_at,
)

LIKE = {
    "trained.a": torch.randn(3, 4, generator=torch.Generator().manual_seed(0)),
    "steps.a": torch.tensor(5.0),
    "rng.cpu": torch.arange(12, dtype=torch.uint8).reshape(2, 6),
}


def make_store(folder: Path, **values) -> Store:
    folder.mkdir(exist_ok=True)
    return Store(folder, SETTINGS, **values)


def make_progress(step: int) -> Progress:
    steps = [
        TrainPoint(number, 0.5, 0.1, 1e-3, float("inf"), 90, 1.5) for number in range(1, step + 1)
    ]
    history = History(
        steps, [EvalPoint(1, 0.1, {"accuracy": 0.5, "log_loss": 0.7}, 0.5, True, 90, 1.5)], 1
    )
    history.cuts.append((1, 50))
    history.max_tokens = 50
    return Progress(
        step,
        history,
        schedule=step,
        best_metric=0.1 + 0.2,
        loss_scale=(1024.0, 3),
        ranks={"x": [True]},
    )


def make_state(number: int, **values) -> bytes:
    return json.dumps(asdict(make_progress(number)) | values).encode()


def save(store: Store, *steps: int) -> list[Path]:
    return [save_checkpoint(store, make_progress(step), LIKE) for step in steps]


def refuse_at(monkeypatch, number: int) -> None:
    """Let the disk be full at a write of a save, half of the file written."""
    write, left = checkpoint._write, iter(range(number, -1, -1))

    def full(path: Path, content: bytes) -> None:
        if next(left):
            return write(path, content)
        path.write_bytes(content[: len(content) // 2])
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(checkpoint, "_write", full)


def test_what_is_loaded_is_what_was_saved(tmp_path):
    store = make_store(tmp_path)
    place = save(store, 7)[0]
    assert place.name == "step-00000007"
    assert {path.name for path in place.iterdir()} == {TENSORS, STATE, MANIFEST}
    found = load_checkpoint(
        store, {name: torch.zeros_like(tensor) for name, tensor in LIKE.items()}
    )
    assert found.progress == make_progress(7)
    assert found.tensors.keys() == LIKE.keys()
    assert all(torch.equal(tensor, LIKE[name]) for name, tensor in found.tensors.items())
    assert [path.name for path in store.folder.iterdir()] == [place.name]


def test_only_the_newest_stay(tmp_path):
    save(make_store(tmp_path, limit=2), 3, 6, 9, 12)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000012", "step-00000009"]
    save(
        make_store(tmp_path, limit=1), 10
    )  # of a run that went on from an older one: 12 is of a future given up
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000010"]


def test_where_none_is_a_run_starts_anew_unless_it_must_not(tmp_path):
    assert load_checkpoint(make_store(tmp_path), LIKE) is None
    with pytest.raises(
        TrainingError, match=r"holds no checkpoint to resume from; train\.resume=auto starts anew"
    ):
        load_checkpoint(make_store(tmp_path, resume="always"), LIKE)
    save(make_store(tmp_path), 3)
    assert load_checkpoint(make_store(tmp_path, resume="never"), LIKE) is None


def test_a_full_disk_before_the_first_one_is_told(tmp_path, monkeypatch):
    refuse_at(monkeypatch, 1)
    with pytest.raises(
        TrainingError, match="make room, then start again: there is no checkpoint yet"
    ):
        save(make_store(tmp_path), 3)


def refuse_call(monkeypatch, number: int) -> list[str]:
    """Let the disk be full at one of the calls that change it; return a list that is to name that call."""
    left, refused = iter(range(number, -1, -1)), []
    calls = [
        (os, "fsync"),
        (Path, "mkdir"),
        (Path, "replace"),
        (checkpoint, "_write"),
        (checkpoint.shutil, "rmtree"),
    ]

    def watch(name: str, call):
        def watched(*arguments, **named):
            if next(left, -1) == 0 and not named.get("ignore_errors"):
                refused.append(name)
                raise OSError(errno.ENOSPC, "No space left on device")
            return call(*arguments, **named)

        return watched

    for place, name in calls:
        monkeypatch.setattr(place, name, watch(name, getattr(place, name)))
    return refused


def test_whichever_call_of_a_save_finds_the_disk_full_a_whole_one_stays(
    tmp_path, monkeypatch, caplog
):
    found = []
    for number in itertools.count():
        store = make_store(tmp_path / str(number), limit=1)
        save(store, 3)
        with monkeypatch.context() as patch:
            refused = refuse_call(patch, number)
            caplog.clear()
            try:
                save(store, 6)
                told = caplog.text  # an old one that cannot be removed is no reason to stop
            except TrainingError as error:
                told = str(error)
        found += refused
        if not refused:
            break
        assert "disk is full" in told or "cannot be removed: No space left" in told, refused
        assert load_checkpoint(store, LIKE).progress.step in (3, 6)
        save(store, 6)
        assert [path.name for path in store.folder.iterdir()] == ["step-00000006"]
    assert found == [
        "mkdir",
        *["_write"] * 3,
        *["fsync"] * 4,
        "replace",
        "fsync",
        "rmtree",
    ]


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 128 KiB, in memory."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", str(disk)]
    if (
        not shutil.which("mount")
        or subprocess.run(command, capture_output=True, check=False).returncode
    ):
        pytest.skip("this machine does not let the test mount a tmpfs")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_real_disk_that_is_full_at_any_page_leaves_the_last_one(small_disk):
    like = LIKE | {"trained.a": torch.randn(4096)}  # four pages
    store = make_store(small_disk, limit=1)
    save_checkpoint(store, make_progress(3), like)
    for room in itertools.count():  # pages of 4 KiB
        filler = small_disk / "filler"
        with filler.open("wb") as file:
            file.truncate(0)
            os.posix_fallocate(file.fileno(), 0, shutil.disk_usage(small_disk).free - 4096 * room)
        try:
            save_checkpoint(store, make_progress(6), like)
            break
        except TrainingError as error:
            told = str(error)
        assert re.search("the disk is full; .*resume=auto resumes from .*step-00000003", told)
        assert load_checkpoint(store, like).progress.step == 3
    assert room >= 6
    assert load_checkpoint(store, like).progress.step == 6


def test_a_rename_that_fails_leaves_the_last_one(tmp_path, monkeypatch):
    store = make_store(tmp_path)
    save(store, 3)

    def fail(aside, place):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(checkpoint, "replace_atomically", fail)
    with pytest.raises(
        TrainingError, match="step-00000006: the checkpoint cannot be written: Input/output error"
    ):
        save(store, 6)
    assert [path.name for path in store.folder.iterdir()] == ["step-00000003"]


def check_older_is_used(store: Store, caplog, path: Path, content: bytes) -> None:
    path.write_bytes(content)
    caplog.clear()
    messages = []
    try:
        assert load_checkpoint(store, LIKE).progress.step == 3
    except TrainingError as error:
        messages.append(str(error))
    # A changed bit of the manifest may name another setting or schema, which is refused.
    assert not messages or path.name == MANIFEST
    messages += [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert len(messages) == 1
    assert str(path.parent) in messages[0]


@pytest.mark.parametrize(
    "num_trials", [pytest.param(20, id="20"), pytest.param(200, id="200", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("name", [TENSORS, STATE, MANIFEST])
def test_a_truncated_or_flipped_file_is_told_and_the_older_one_used(
    tmp_path, caplog, name, num_trials
):
    store = make_store(tmp_path)
    path = save(store, 3, 6)[1] / name
    whole, generator = path.read_bytes(), random.Random(name)
    for _ in range(num_trials):
        check_older_is_used(store, caplog, path, whole[: generator.randrange(len(whole))])
        flipped = bytearray(whole)
        flipped[generator.randrange(len(whole))] ^= 1 << generator.randrange(8)
        check_older_is_used(store, caplog, path, bytes(flipped))
    check_older_is_used(store, caplog, path, whole + b"x")
    path.unlink()
    assert load_checkpoint(store, LIKE).progress.step == 3
    path.write_bytes(whole)
    assert load_checkpoint(store, LIKE).progress.step == 6


def test_where_all_are_broken_nothing_starts_anew_by_itself(tmp_path):
    store = make_store(tmp_path)
    for place in save(store, 3, 6):
        (place / STATE).write_bytes(b"")
    with pytest.raises(
        TrainingError,
        match=r"(?s)step-00000006.*step-00000003.*is whole; train.resume=never starts",
    ):
        load_checkpoint(store, LIKE)


def test_a_broken_one_of_the_same_step_is_replaced(tmp_path):
    store = make_store(tmp_path, limit=1)
    place = save(store, 6)[0]
    (place / STATE).write_bytes(b"")
    save(store, 6)
    assert load_checkpoint(store, LIKE).progress.step == 6


def test_a_link_is_refused_by_name_when_it_is_found(tmp_path):
    store = make_store(tmp_path, limit=1)
    place = save(store, 3)[0]
    (store.folder / "step-00000006").symlink_to(place.rename(tmp_path / "elsewhere"))
    with pytest.raises(
        TrainingError, match="step-00000006: is a link; remove it, or replace it by the folder"
    ):
        load_checkpoint(store, LIKE)


@pytest.mark.parametrize("name", ["unfinished", "step-00000006"])
def test_a_file_or_link_of_a_name_of_ours_does_not_stop_a_save(tmp_path, name):
    for number, put in enumerate((Path.touch, lambda path: path.symlink_to("nowhere"))):
        store = make_store(tmp_path / str(number), limit=1)
        save(store, 3)
        put(store.folder / name)
        save(store, 6)
        assert [path.name for path in store.folder.iterdir()] == ["step-00000006"]


def forge(place: Path, *, tensors=None, state=None, schema=SCHEMA) -> None:
    """Rewrite a checkpoint with a manifest that fits."""
    if tensors is not None:
        (place / TENSORS).write_bytes(pack_tensors(tensors))
    if state is not None:
        (place / STATE).write_bytes(state)
    files = {name: (place / name).read_bytes() for name in (TENSORS, STATE)}
    manifest = json.loads(checkpoint._make_manifest(SETTINGS, files)) | {"schema": schema}
    (place / MANIFEST).write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"tensors": {**LIKE, "more": torch.zeros(1)}}, "more is unknown"),
        (
            {"tensors": {"trained.a": LIKE["trained.a"], "rng.cpu": LIKE["rng.cpu"]}},
            "steps.a is missing",
        ),
        (
            {"tensors": {**LIKE, "steps.a": torch.zeros(2)}},
            r"steps.a is torch.float32 \(2,\), expected",
        ),
        ({"tensors": {**LIKE, "steps.a": torch.tensor(1)}}, "steps.a is torch.int64"),
        (
            {"tensors": {**LIKE, "steps.a": torch.tensor(float("nan"))}},
            "steps.a holds a value that is not finite",
        ),
        ({"state": b'{"step": 6}'}, "is not as it was written"),
        ({"state": make_state(6, schedule=-1)}, "schedule\n.*greater than or equal to 0"),
        ({"state": make_state(6, best_metric=float("nan"))}, "best_metric\n.*finite"),
        ({"state": b"[" * 100_000}, "is not as it was written"),
        ({"state": b"\xff"}, "is not as it was written"),
    ],
)
def test_what_does_not_fit_is_not_used_even_with_a_manifest_that_fits(
    tmp_path, caplog, change, told
):
    store = make_store(tmp_path)
    place = save(store, 3, 6)[1]
    forge(place, **change)
    assert load_checkpoint(store, LIKE).progress.step == 3
    assert caplog.records[0].levelname == "WARNING"
    assert re.search(told, caplog.text)


@pytest.mark.parametrize("schema", [1, 9])
def test_another_schema_is_refused_by_its_number(tmp_path, schema):
    store = make_store(tmp_path)
    forge(save(store, 3)[0], schema=schema)
    with pytest.raises(
        TrainingError, match=f"has schema {schema}, and this version reads schema 3; finish the run"
    ):
        load_checkpoint(store, LIKE)


def test_a_link_is_not_followed(tmp_path):
    store = make_store(tmp_path)
    path = save(store, 3, 6)[1] / TENSORS
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    assert load_checkpoint(store, LIKE).progress.step == 3


def test_what_differs_is_refused_field_by_field_and_allowed_where_it_can_be(tmp_path):
    save(make_store(tmp_path), 3)
    others = SETTINGS | {"train.learning_rate": 0.1, "machine.threads": 2, "versions.torch": "3"}
    with pytest.raises(TrainingError) as caught:
        load_checkpoint(Store(tmp_path, others), LIKE)
    told = [
        "  machine.threads: was 1, is 2",
        "  train.learning_rate: was 0.01, is 0.1",
        "  versions.torch: was <absent>, is 3",
    ]
    assert str(caught.value).splitlines()[1:-1] == told
    assert "train.resume=never" in str(caught.value)
    assert "--allow-changes" in str(caught.value)
    found = load_checkpoint(Store(tmp_path, others, allow_changes=True), LIKE)
    assert found.changes == [line.strip() for line in told]
    fixed = others | {"method.r": 8}
    with pytest.raises(
        TrainingError, match=r"method.r: was 4, is 8 \(cannot be changed in a resumed run\)"
    ) as caught:
        load_checkpoint(Store(tmp_path, fixed, allow_changes=True), LIKE)
    assert "--allow-changes" not in str(caught.value)


@pytest.fixture(scope="module")
def base(tiny_base):
    return tiny_base


@pytest.fixture
def fit_here(base, tmp_path):
    """Run the toy in this process; every run has a base of its own."""

    def fit_here(name: str, **values):
        return fit_toy(tmp_path / name, make_toy(base), **values)

    return fit_here


def stop_and_go_on(
    fit_here, monkeypatch, name: str, step: int, number: int = signal.SIGTERM, **values
) -> History:
    with monkeypatch.context() as patch:
        patch.setattr(loop._Loop, "_backward", loop._Loop._backward)
        signal_at(step, number)
        with pytest.raises(
            StoppedError,
            match=rf"after step {step} of .*the same command with train.resume=auto resumes",
        ):
            fit_here(name, **values)
    return fit_here(name, **values)


NINE_STEPS = {"num_train_epochs": 1.5, "save_steps": 100}


@pytest.fixture(scope="module")
def nine_steps(base, tmp_path_factory):
    """The folder and the history of an unbroken run."""
    folder = tmp_path_factory.mktemp("nine_steps")
    return folder, fit_toy(folder, make_toy(base), **NINE_STEPS)


@pytest.mark.parametrize("step", [1, 4, 6, 9])
def test_a_resumed_run_is_bit_identical_to_an_unbroken_one(
    fit_here, nine_steps, monkeypatch, tmp_path, step
):
    """Dropout on; six steps an epoch, every fourth evaluated."""
    folder, whole = nine_steps
    history = stop_and_go_on(fit_here, monkeypatch, "stopped", step, **NINE_STEPS)
    assert outcome(tmp_path / "stopped", folder) == [True, True]
    assert history.steps == whole.steps
    assert history.evaluations == whole.evaluations
    assert (history.resumed, whole.resumed) == ([step], [])


@pytest.mark.parametrize(
    "method",
    [
        FullMethod(kind="full"),
        AdaloraMethod(kind="adalora", init_r=6, target_r=2, tinit=2, tfinal=3, deltaT=2),
    ],
)
def test_methods_that_keep_more_go_on_bit_for_bit_too(fit_here, monkeypatch, tmp_path, method):
    values = {"max_steps": 10, "method": method}
    monkeypatch.setattr("tests.training.stopped_runs.save_weights", save_trained)
    fit_here("whole", **values)
    for step in (5, 8) if isinstance(method, AdaloraMethod) else (5,):
        stop_and_go_on(fit_here, monkeypatch, f"stopped {step}", step, **values)
        assert outcome(tmp_path / f"stopped {step}", tmp_path / "whole") == [True, True]


def save_trained(folder: Path, model: torch.nn.Module) -> None:
    trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    (folder / "adapter_model.safetensors").write_bytes(pack_tensors(trained))


def test_the_loss_scaler_goes_on_where_it_was(fit_here, monkeypatch, tmp_path):
    """Fp16 as on a GPU: a scale that is too high at first, so steps are skipped, and that grows again."""
    Accelerator(cpu=True)

    def start(name: str):
        monkeypatch.setitem(
            AcceleratorState._shared_state, "_mixed_precision", "no"
        )  # kept for a process's life
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24, growth_interval=3)
        return fit_here(name, max_steps=14, scaler=scaler), scaler.state_dict()

    whole, scale = start("whole")
    skipped = [point.step for point in whole.steps if not math.isfinite(point.grad_norm)]
    assert len(skipped) > 2
    # The schedule stands still where a step is skipped, and nowhere else.
    rates = [point.learning_rate for point in whole.steps]
    assert [i + 1 for i in range(13) if rates[i] == rates[i + 1]] == skipped
    with monkeypatch.context() as patch:
        patch.setattr(loop._Loop, "_backward", loop._Loop._backward)
        signal_at(skipped[1], signal.SIGTERM)
        with pytest.raises(StoppedError):
            start("stopped")
    history, again = start("stopped")
    assert history.resumed == [skipped[1]]
    assert again == scale
    assert outcome(tmp_path / "stopped", tmp_path / "whole") == [True, True]


def test_a_signal_between_two_readings_loses_no_step(fit_here, monkeypatch, tmp_path):
    fit_here("whole", max_steps=10)
    resume = loop._Loop._resume

    def seldom(self):
        self.read_steps = 4  # as on a GPU; saved or evaluated, and so read, after 4, 6 and 8
        resume(self)

    monkeypatch.setattr(loop._Loop, "_resume", seldom)
    with monkeypatch.context() as patch:
        patch.setattr(loop._Loop, "_backward", loop._Loop._backward)
        signal_at(7, signal.SIGTERM)
        with pytest.raises(StoppedError):
            fit_here("stopped", max_steps=10)
    assert fit_here("stopped", max_steps=10).resumed == [7]
    assert outcome(tmp_path / "stopped", tmp_path / "whole") == [True, True]


def test_the_best_before_the_stop_stays_the_best_after_it(fit_here, monkeypatch, tmp_path):
    def give_scores():
        scores = iter([0.9, 0.5, 0.4])
        monkeypatch.setattr(
            SINGLE_LABEL, "quick_score", lambda *given: next(scores) if given[2] == "mcc" else 0.5
        )

    values = {"metric_for_best_model": "mcc", "max_steps": 9}  # evaluated after 4, 8 and 9
    give_scores()
    fit_here("whole", **values)
    give_scores()
    assert stop_and_go_on(fit_here, monkeypatch, "stopped", 5, **values).best_step == 4
    assert outcome(tmp_path / "stopped", tmp_path / "whole") == [True, True]


def test_early_stopping_goes_on_as_it_would_have(fit_here, monkeypatch, tmp_path):
    monkeypatch.setattr(SINGLE_LABEL, "quick_score", lambda *_: 0.5)
    values = {"early_stopping_patience": 2, "eval_steps": 1, "save_steps": 1}
    whole = fit_here("whole", **values)
    assert len(whole.steps) == 3
    stop_and_go_on(fit_here, monkeypatch, "stopped", 2, **values)
    assert outcome(tmp_path / "stopped", tmp_path / "whole") == [True, True]
    again = fit_here("stopped", **values)  # it had ended: its last evaluation is done again
    assert again.steps == whole.steps


def test_a_signal_in_the_last_evaluation_is_obeyed_and_nothing_is_trained_again(
    fit_here, monkeypatch, tmp_path
):
    fit_here("whole", max_steps=4)
    evaluate = loop._Loop._evaluate

    def signalled(self, step):
        evaluate(self, step)
        signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(loop._Loop, "_evaluate", signalled)
        with pytest.raises(StoppedError, match="stopped by SIGINT after step 4 of 4"):
            fit_here("stopped", max_steps=4)
    monkeypatch.setattr(loop._Loop, "_step", None)
    fit_here("stopped", max_steps=4)
    assert outcome(tmp_path / "stopped", tmp_path / "whole") == [True, True]


def test_handlers_are_put_back_and_a_second_signal_stops_at_once(fit_here, monkeypatch):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]

    def twice(self, *_):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)  # the same Ctrl-C, passed on by a launcher
        now = time.monotonic()
        monkeypatch.setattr("lora_sentiment.training.signals.time.monotonic", lambda: now + 2)
        signal.raise_signal(signal.SIGINT)
        raise AssertionError("it went on")

    with monkeypatch.context() as patch:
        patch.setattr(loop._Loop, "_backward", twice)
        with pytest.raises(KeyboardInterrupt):
            fit_here("run")
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_without_a_store_signals_are_left_alone(base):
    with loop.StopSignals() as signals:
        assert signal.getsignal(signal.SIGTERM) == signals._note
    assert signal.getsignal(signal.SIGTERM) != signals._note


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("not enough memory: x")]
)
def test_where_memory_runs_out_the_cut_is_halved_and_the_step_done_again(
    fit_here, monkeypatch, tmp_path, caplog, error
):
    backward, seen = loop._Loop._backward, []

    def small(self, index, parts):
        seen.append((self.done + 1, torch.get_rng_state().sum().item()))
        loss = backward(
            self, index, parts
        )  # dropout is drawn, gradients are there, when it runs out
        if self.done >= 2 and max(len(part) * self.lengths[part].max() for part in parts) > 60:
            raise error
        return loss

    monkeypatch.setattr(loop._Loop, "_backward", small)
    history = fit_here("small", max_steps=4)
    assert history.cuts == [(3, history.max_tokens)]
    assert history.max_tokens <= 50
    assert "step 3: out of memory on a micro-batch of" in caplog.text
    tries = [state for step, state in seen if step == 3]
    assert len(tries) == 2
    assert tries[0] == tries[1]
    monkeypatch.setattr(loop._Loop, "_backward", backward)
    assert fit_here("small", max_steps=4).cuts == history.cuts  # a run that goes on keeps the cut
    assert [row["step"] for row in read_metrics(tmp_path / "small")] == ["1", "2", "3", "4", "4"]


def test_one_row_that_does_not_fit_is_one_error(fit_here, monkeypatch):
    def none_fits(*_):
        raise RuntimeError(
            "[enforce fail at alloc_cpu.cpp:1] . DefaultCPUAllocator: can't allocate memory: you tried"
        )

    monkeypatch.setattr(loop._Loop, "_backward", none_fits)
    with pytest.raises(
        TrainingError,
        match=r"step 1: out of memory on a micro-batch of one row, \d+ tokens long; lower",
    ):
        fit_here("none")


def test_another_error_of_torch_is_no_lack_of_memory(fit_here, monkeypatch):
    def wrong(*_):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(loop._Loop, "_backward", wrong)
    with pytest.raises(RuntimeError, match="mat1"):
        fit_here("wrong")


def test_a_full_disk_stops_a_run_which_then_goes_on(fit_here, monkeypatch, tmp_path):
    fit_here("whole", max_steps=5, save_steps=2)
    with monkeypatch.context() as patch:
        refuse_at(patch, 4)
        with pytest.raises(
            TrainingError,
            match=r"step-00000004: .* the disk is full; .*resume=auto resumes from .*step-00000002",
        ):
            fit_here("full", max_steps=5, save_steps=2)
    assert fit_here("full", max_steps=5, save_steps=2).resumed == [2]
    assert outcome(tmp_path / "full", tmp_path / "whole") == [True, True]


@pytest.fixture(scope="module")
def forked(base, tmp_path_factory):
    return run_scenarios(base, tmp_path_factory.mktemp("forked"), points={})


def test_killed_at_every_write_of_a_save_a_run_goes_on_bit_for_bit(forked):
    found = forked["points"]["points"]
    names = [name for name, _, _ in found]
    for name in (TENSORS, STATE, MANIFEST):
        assert {f"before {name}", f"half of {name}"} <= set(names)
    assert {"before the rename", "after the rename", "half removed", "end"} <= set(names)
    assert [point for point in found if point[1:] != [[-signal.SIGKILL, 0], [True, True]]] == []
