"""Adapter folders that anyone may have altered: each loads to the same logits, or is refused in one
line."""

import contextlib
import copy
import dataclasses
import json
import os
import random
import shutil
import signal
import struct
import sys
import tracemalloc
import warnings

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lora_sentiment.adapter import folder as folder_module
from lora_sentiment.adapter.folder import load
from lora_sentiment.errors import AdapterError, ModelError
from lora_sentiment.models.load import load_base
from lora_sentiment.recipe.method import (
    AdaloraMethod,
    HeadMethod,
    Ia3Method,
    LoraMethod,
    UnfreezeMethod,
    VeraMethod,
)
from lora_sentiment.recipe.model import ModelConfig
from tests.random_adapters import reseal, save_random

LABELS = ("no", "yes", "maybe")
# As many texts as it takes to reach every unit: a card vouches for what its probe asks.
IDS = [[2, *range(first, first + 12), 3] for first in range(5, 65, 12)]
METHODS = {
    "lora": LoraMethod(r=4, rank_pattern={"q_lin": 2}),
    "dora": LoraMethod(r=4, target_modules="all-linear", use_dora=True),
    "adalora": AdaloraMethod(kind="adalora", init_r=4, target_r=2),
    "ia3": Ia3Method(kind="ia3"),
    "vera": VeraMethod(kind="vera", r=4),
    "unfreeze": UnfreezeMethod(kind="unfreeze", last_layers=1),
    "head": HeadMethod(kind="head"),
}
WEIGHTS = ("adapter_model.safetensors", "changed.safetensors")


@pytest.fixture(scope="module")
def originals(tmp_path_factory, tiny_base):
    """One saved folder of each method."""
    found = {}
    for name, method in METHODS.items():
        found[name] = tmp_path_factory.mktemp("originals") / name
        save_random(found[name], tiny_base, method, labels=LABELS, probe=IDS)
    return found


@pytest.fixture(scope="module")
def base(tiny_base):
    return load_base(
        ModelConfig(name=str(tiny_base), max_length=16, dtype="float32"), labels=LABELS
    )


@pytest.fixture
def cached_base(base, monkeypatch):
    """What `load` gets instead of reading the base each time; another one cannot be loaded."""

    def load_cached(config, *, labels, problem_type=None, device=None):
        if (config.name, config.revision, config.quantize) != (
            base.name,
            None,
            "none",
        ) or config.max_length > 64:
            raise ModelError("another base")
        model = copy.deepcopy(base.model)
        if len(labels) != len(LABELS):
            model.classifier = torch.nn.Linear(model.config.dim, len(labels))
        return dataclasses.replace(base, model=model)

    monkeypatch.setattr(folder_module, "load_base", load_cached)


NESTED = []
for _ in range(40):
    NESTED = [NESTED]
STRANGE = [
    None, True, False, -1, 0, 1, 2, 3, 9, 1000, 2**31, 2**63, 10**30, 1.5, -0.25, 1e308, float("nan"), float("inf"),
    "", "a", "../../etc/passwd", "/etc/passwd", "os", "x" * 9000, "\ud800", "\0", [], {}, [[]], [0], [-1], ["q_lin"],
    {"a": 1}, {"../x": 1}, "all-linear", "(a+)+$", "(.+)+x", "(.|.)" * 30 + "x", ".*" * 20 + "x", "(" * 200, "[",
    NESTED,
]  # fmt: skip
OPTIONS = {
    "auto_mapping": {"base_model_class": "Popen", "parent_library": "subprocess"},
    "megatron_config": {"a": 1},
    "megatron_core": "antigravity",
    "base_model_name_or_path": "someone/else",
    "corda_config": {"cache_file": "/etc/passwd", "covariance_file": "/etc/passwd"},
    "layer_replication": [[0, 2], [0, 2]],
    "init_lora_weights": "loftq",
    "loftq_config": {"loftq_bits": 4},
    "eva_config": {"rho": 2.0},
    "modules_to_save": ["distilbert"],
    "trainable_token_indices": [0, 1],
    "target_parameters": ["weight"],
    "runtime_config": {"ephemeral_gpu_offload": True},
    "task_type": "CAUSAL_LM",
    "peft_type": "XLORA",
    "r": 2**16,
    "init_r": 2**16,
    "bias": "all",
    "save_projection": False,
    "something_new": {"x": "y"},
}
CARD = {
    "schema": 2,
    "max_length": 10**9,
    "labels": ["a"],
    "files": {},
    "base": {
        "name": "someone/else",
        "revision": None,
        "base_sha256": "0",
        "quantize": "none",
        "double_quant": True,
    },
    "method": {"kind": "full"},
    "probe": {"input_ids": [[10**6]], "logits": [[0.0, 0.0, 0.0]]},
}


def places(value, path=()):
    """Every place within nested JSON, as the keys that lead there."""
    if path:
        yield path
    for key, inner in (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    ):
        yield from places(inner, (*path, key))


def change_json(rng, values, options):
    """Change one place of nested JSON; return its text, which may not be valid any more."""
    kind = rng.choice(
        ["strange", "strange", "remove", "rename", "move", "add", "option", "double", "deep"]
    )
    path = rng.choice(list(places(values)))
    parent = values
    for key in path[:-1]:
        parent = parent[key]
    key = path[-1]
    if kind == "strange":
        parent[key] = rng.choice(STRANGE)
    elif kind == "remove":
        del parent[key]
    elif kind == "move":
        other = values
        for step in rng.choice(list(places(values))):
            other = other[step]
        parent[key] = copy.deepcopy(other)
    elif kind == "option" and options:
        name = rng.choice(sorted(options))
        values[name] = options[name]
    elif kind in ("rename", "add") and isinstance(parent, dict):
        name = rng.choice([f"{key}x", "../x", "", "card.json", "\0", "a" * 300])
        parent[name] = parent.pop(key) if kind == "rename" else copy.deepcopy(parent[key])
    elif isinstance(parent, list):
        parent.insert(key, copy.deepcopy(parent[key]))
    text = json.dumps(values)
    if kind == "double" and isinstance(parent, dict):
        member = f"{json.dumps(key)}: {json.dumps(parent[key])}"
        text = text.replace(
            member, f"{member}, {json.dumps(key)}: {json.dumps(rng.choice(STRANGE))}", 1
        )
    if kind == "deep":
        text = text.replace(
            json.dumps(parent[key]), rng.choice(["[", '{"a":']) * rng.choice([100, 20_000]), 1
        )
    return text.encode()


def change_bytes(rng, data):
    """Flip, cut, insert or overwrite somewhere; the header of a safetensors file more often than
    its tensors."""
    place = rng.randrange(min(len(data), rng.choice([8, 200, 2000, len(data)])))
    run = rng.choice([1, 2, 8, 100])
    match rng.choice(["flip", "flip", "truncate", "insert", "cut", "repeat", "number", "grow"]):
        case "flip":
            return data[:place] + bytes([data[place] ^ 1 << rng.randrange(8)]) + data[place + 1 :]
        case "truncate":
            return data[:place]
        case "insert":
            return data[:place] + rng.randbytes(run) + data[place:]
        case "cut":
            return data[:place] + data[place + run :]
        case "repeat":
            return data[: place + run] + data[place:]
        case "number":
            return (
                data[:place]
                + rng.choice([b"9" * 30, b"9" * 5000, b"-1", b"1e999"])
                + data[place + 1 :]
            )
        case "grow":
            return struct.pack("<Q", rng.choice([0, 2**20 + 1, 2**31, 2**62, 2**64 - 1])) + data[8:]


def change_header(rng, data):
    """Change a safetensors file's header as JSON, its stated length kept right."""
    (length,) = struct.unpack("<Q", data[:8])
    header = change_json(
        rng, json.loads(data[8 : 8 + length]), {"x": {"dtype": "F32", "shape": [2**62, 4]}}
    )
    return struct.pack("<Q", len(header)) + header + data[8 + length :]


def change_value(rng, data):
    """Put a value that is not finite, or is large, into a tensor."""
    (length,) = struct.unpack("<Q", data[:8])
    place = 8 + length + 4 * rng.randrange((len(data) - 8 - length) // 4)
    value = rng.choice([float("nan"), float("inf"), -float("inf"), 3e38, 1e4])
    return data[:place] + struct.pack("<f", value) + data[place + 4 :]


def change_kind(rng, path, outside):
    """Put a link, a folder, a pipe or nothing where a file was."""
    kind = rng.choice(["link", "link inside", "circle", "folder", "gone", "pipe"])
    data = path.read_bytes()
    path.unlink()
    if kind == "link":
        path.symlink_to(outside)
    elif kind == "link inside":
        path.with_name("other").write_bytes(data)
        path.symlink_to("other")
    elif kind == "circle":
        path.symlink_to(path.name)
    elif kind == "folder":
        path.mkdir()
    elif kind == "pipe" and hasattr(os, "mkfifo"):
        os.mkfifo(path)


def mutate(rng, folder, outside):
    """Change one file of a folder; three times in four, make card.json agree, as someone would who
    takes care."""
    shares = {"card.json": 3, "adapter_config.json": 5, "tokenizer.json": 1} | dict.fromkeys(
        WEIGHTS, 3
    )
    names = [
        name for name, share in shares.items() for _ in range(share) if (folder / name).exists()
    ]
    path = folder / rng.choice(names)
    data = path.read_bytes()
    if rng.random() < 0.04:
        change_kind(rng, path, outside)
        return
    if path.name in WEIGHTS:
        data = rng.choice([change_bytes, change_header, change_header, change_value])(rng, data)
    elif rng.random() < 0.25:
        data = change_bytes(rng, data)
    else:
        options = {"card.json": CARD, "adapter_config.json": OPTIONS}.get(path.name, {})
        data = change_json(rng, json.loads(data), options)
    path.write_bytes(data)
    if path.name != "card.json" and rng.random() < 0.75:
        reseal(folder)


class Largest(TorchDispatchMode):
    """Remembers the bytes of the largest tensor that torch made room for."""

    bytes = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        made = function(*arguments, **(options or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor) and not tensor.is_meta:
                self.bytes = max(self.bytes, tensor.untyped_storage().nbytes())
        return made


class Watch:
    """Notes what is opened, started or imported while `inside` names the folders that may be
    read."""

    def __init__(self):
        self.inside, self.found = (), []
        sys.addaudithook(self.see)  # for good: Python takes no hook back

    def see(self, event, arguments):
        if not self.inside:
            return
        if event in (
            "socket.connect",
            "subprocess.Popen",
            "os.system",
            "os.exec",
            "os.posix_spawn",
            "pickle.find_class",
        ):
            self.found.append((event, str(arguments)))
        if event in (
            "open",
            "os.rename",
            "os.remove",
            "os.mkdir",
            "os.rmdir",
            "os.link",
            "os.symlink",
            "os.truncate",
        ):
            path = arguments[0]
            code = isinstance(path, str) and path.endswith(
                (".py", ".pyc")
            )  # Python itself shows lines of code
            if (
                isinstance(path, str | bytes)
                and not code
                and not os.fsdecode(path).startswith(self.inside)
            ):
                self.found.append((event, os.fsdecode(path)))

    @contextlib.contextmanager
    def over(self, *folders):
        before = {name.partition(".")[0] for name in sys.modules}
        self.found, self.inside = [], tuple(map(str, folders))
        try:
            yield
        finally:
            self.inside = ()
            self.found += [
                ("import", name) for name in {n.partition(".")[0] for n in sys.modules} - before
            ]


WATCH = Watch()


@contextlib.contextmanager
def at_most_seconds(seconds):
    def stop(*_):
        raise TimeoutError(f"took more than {seconds} s")

    if not hasattr(signal, "SIGALRM"):
        yield
        return
    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def attempt(folder, *, traced):
    """Load a folder and ask it; return the logits or the refusal, torch's largest tensor and
    Python's peak in bytes.

    Tracing makes this five times slower.
    """
    if traced:
        tracemalloc.start()
    with Largest() as largest, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with at_most_seconds(60):
                model = load(folder).model
                answer = model(input_ids=torch.tensor(IDS)).logits.detach()
        except (AdapterError, ModelError) as error:
            answer = error
    python_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return answer, largest.bytes, python_bytes


def find_problem(folder, original, tiny_base, *, traced):
    """Return what a mutated folder does that it should not, or None, and what it answered."""
    expected, torch_bytes, python_bytes = original
    room = 2 * sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    before = sorted(folder.rglob("*"))
    with WATCH.over(folder, tiny_base):
        answer, torch_now, python_now = attempt(folder, traced=traced)
    if isinstance(answer, torch.Tensor) and not torch.allclose(answer, expected, atol=1e-3):
        return "answers otherwise", answer
    if isinstance(answer, AdapterError) and (str(folder) not in str(answer) or "\n" in str(answer)):
        return f"says {answer}", answer
    if torch_now > max(torch_bytes, room) or python_now > python_bytes + room:
        return (
            f"took {torch_now:,} and {python_now:,} bytes; the folder has {room // 2:,}: {answer}",
            answer,
        )
    if WATCH.found or sorted(folder.rglob("*")) != before:
        return f"touched {WATCH.found}", answer
    return None, answer


@pytest.mark.parametrize(
    "seeds",
    [range(60), pytest.param(range(1000, 3000), marks=pytest.mark.slow)],
    ids=["60", "2000"],
)
def test_a_mutated_folder_answers_the_same_or_is_refused(
    originals, cached_base, tiny_base, tmp_path, seeds
):
    outside = tmp_path / "outside"
    outside.write_bytes(b"{}")
    for folder in originals.values():
        load(folder)  # what PEFT imports on first use
    intact = {name: attempt(folder, traced=len(seeds) > 60) for name, folder in originals.items()}
    problems, refusals = [], []
    for seed in seeds:
        rng = random.Random(seed)
        name = rng.choice(list(METHODS))
        folder = tmp_path / "folder"
        shutil.copytree(originals[name], folder)
        mutate(rng, folder, outside)
        try:
            traced = len(seeds) > 60 and seed % 5 == 0
            problem, answer = find_problem(folder, intact[name], tiny_base, traced=traced)
        except Exception as error:
            problem, answer = f"raised {error!r}", error
        if problem:
            problems.append((seed, name, problem[:300]))
        refusals += [str(answer)] if isinstance(answer, Exception) else []
        shutil.rmtree(folder)
        assert sorted(tmp_path.iterdir()) == [outside]
        assert outside.read_bytes() == b"{}"
    assert problems == []
    # Else the hashes alone would have been tested.
    altered = sum("was altered after it was saved" in refusal for refusal in refusals)
    assert len(seeds) * 0.5 < len(refusals) < len(seeds) * 0.98
    assert altered < len(refusals) * 0.3
