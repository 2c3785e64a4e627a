"""A two-layer DistilBERT, a toy data set and the local Hub: everything offline."""

import csv
import itertools
import logging
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import settings

# Nothing in the tests may leave the machine; a test that uses the local Hub sets its own address.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
# A busy machine is slow, which is no fault of ours, and a fault shows in every run or in none.
settings.register_profile("house", deadline=None, derandomize=True, database=None)
settings.load_profile("house")

# All cores that the tests may use; `pin_to_a_core` leaves a process of xdist one of them.
CORES = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else [0]
SHARED = Path(__file__).resolve().parents[2] / "shared"
GOOD = ("good", "great", "lovely", "fine", "superb", "warm")
BAD = ("bad", "awful", "dull", "poor", "weak", "cold")
FILLERS = (
    "film",
    "book",
    "meal",
    "app",
    "place",
    "plot",
    "the",
    "a",
    "was",
    "and",
    "so",
    "it",
    "really",
    "quite",
)


def pytest_configure(config: pytest.Config) -> None:
    """Hide GPUs, so that the tests are those of CI everywhere; `-m gpu` asks for the others. Hide caches as well.

    Processes that a test starts inherit the variable. With a card visible, tests without the marker would train on it.
    """
    pin_to_a_core()
    if not shows_card(config):
        os.environ["CUDA_VISIBLE_DEVICES"] = "-1"
        # Triton reads it when it is imported: its kernels then run on CPU tensors.
        os.environ["TRITON_INTERPRET"] = "1"
    cache = tempfile.mkdtemp(prefix="lora_sentiment-tests-")
    os.environ["HF_HOME"] = cache
    config.add_cleanup(lambda: shutil.rmtree(cache, ignore_errors=True))


def pin_to_a_core() -> None:
    """Give each process of xdist a core of its own.

    Torch would start a thread for each core in each of them, and the threads would wait for each other.
    """
    worker = os.environ.get("PYTEST_XDIST_WORKER", "")
    if worker and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {CORES[int(worker.removeprefix("gw")) % len(CORES)]})


def shows_card(config: pytest.Config) -> bool:
    """Whether -m asks for tests with the marker gpu, which the expression `not gpu` does not."""
    asked = config.option.markexpr
    return re.search(r"\bgpu\b", asked) is not None and re.search(r"\bnot\s+gpu\b", asked) is None


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Refuse to run tests of the CPU where the card is visible. pytest has chosen by -m before this."""
    others = [item.nodeid for item in items if not item.get_closest_marker("gpu")]
    if shows_card(config) and others:
        raise pytest.UsageError(
            f"-m {config.option.markexpr!r} chose {len(others)} tests without the marker gpu, such as {others[0]}; "
            "they are tests of the CPU and hide the card: run -m gpu by itself, and the others without it"
        )


@pytest.fixture
def gpu():
    """A CUDA device; a test that takes it needs the marker too."""
    import torch

    if not torch.cuda.is_available():
        pytest.skip("no CUDA device here, or torch is built without CUDA")
    return torch.device("cuda")


@pytest.fixture(autouse=True)
def signals_of_a_terminal():
    """Python's own handlers: in the background of a shell SIGINT is ignored, and what is ignored stays so in a run."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(autouse=True)
def loggers_of_a_library():
    """The logger's own level and handlers: the command line sets both, in the test's process too."""
    logger = logging.getLogger("lora_sentiment")
    level, handlers = logger.level, logger.handlers[:]
    yield
    logger.setLevel(level)
    logger.handlers[:] = handlers


@pytest.fixture(scope="session", autouse=True)
def no_pictures():
    """Let training leave empty files for its pictures, which would take a third of a toy run."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("plot_training", "plot_confusion"):
            patch.setattr(
                f"lora_sentiment.evaluation.plots.{name}", lambda given, path, **_: path.touch()
            )
        yield


@pytest.fixture
def one_thread():
    """Threads that wait for each other at every tiny operation take most of the time on a busy machine."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def save_tiny_base(folder: Path) -> Path:
    """Write a random two-layer encoder, saved as DistilBertModel, and its tokenizer into a new folder."""
    import torch
    from transformers import DistilBertConfig, DistilBertModel, DistilBertTokenizerFast

    words = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        *GOOD,
        *BAD,
        *FILLERS,
        *"abcdefghijklmnopqrstuvwxyz.,!",
    ]
    words += [f"##{letter}" for letter in "abcdefghijklmnopqrstuvwxyz"]
    vocab = {word: i for i, word in enumerate(dict.fromkeys(words))}
    torch.manual_seed(0)
    config = DistilBertConfig(
        vocab_size=len(vocab),
        dim=32,
        hidden_dim=64,
        n_layers=2,
        n_heads=4,
        max_position_embeddings=64,
        initializer_range=0.3,
    )
    DistilBertModel(config).save_pretrained(folder)
    DistilBertTokenizerFast(vocab=vocab, do_lower_case=True, model_max_length=64).save_pretrained(
        folder
    )
    return folder


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random two-layer encoder and its tokenizer."""
    return save_tiny_base(tmp_path_factory.mktemp("base") / "tiny")


def toy_rows(num_rows: int) -> list[tuple[str, str]]:
    """Texts whose label a bag of words can tell: `positive` with good words, `negative` with bad ones."""
    rows = []
    fillers = itertools.cycle(itertools.permutations(FILLERS, 3))
    for i in range(num_rows):
        words = list(next(fillers)) + ["so"] * (i % 5)
        words.insert(i % len(words), (GOOD, BAD)[i % 2][(i // 2) % len(GOOD)])
        rows.append(
            (
                " ".join(words) + f" {'abcdefghijklmnopqrstuvwxyz'[i % 26]}.",
                ("positive", "negative")[i % 2],
            )
        )
    return rows


def free_port() -> int:
    """A port that is free now, and is given to nobody who asks for any: those lie higher."""
    while True:
        port = random.randrange(15_000, 32_000)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def write_csv(
    path: Path, rows: list[tuple[str, str]], header: tuple[str, str] = ("text", "label")
) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows([header, *rows])
    return path


def write_toy(folder: Path) -> Path:
    """Write train.csv (120 rows) and test.csv (41 rows) into a folder."""
    rows = toy_rows(161)
    write_csv(folder / "train.csv", rows[:120])
    write_csv(folder / "test.csv", rows[120:])
    return folder


def write_toy_recipe(toy: Path, tiny_base: Path) -> Path:
    """Write a recipe that trains the tiny base on the toy data for seven steps."""
    path = toy / "toy.yaml"
    path.write_text(
        f"""\
data:
  source: {{train: {toy}/train.csv, test: {toy}/test.csv}}
model: {{name: {tiny_base}, max_length: 16, dtype: float32}}
method: {{r: 4, lora_alpha: 8}}
train: {{num_train_epochs: 1, batch_size: 16, learning_rate: 1e-2, max_tokens_per_micro_batch: 100}}
output: {{dir: {toy}/adapter}}
""",
        encoding="utf-8",
    )
    return path


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    """A folder with train.csv (120 rows) and test.csv (41 rows)."""
    return write_toy(tmp_path)


@pytest.fixture
def toy_recipe(toy: Path, tiny_base: Path) -> Path:
    """A recipe that trains the tiny base on the toy data for seven steps."""
    return write_toy_recipe(toy, tiny_base)


@pytest.fixture(scope="session")
def toy_adapter(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Path:
    """An adapter that tells the toy's good words from its bad ones, at most 16 tokens a text; do not change it."""
    from lora_sentiment.recipe.recipe import Recipe
    from lora_sentiment.train import train

    folder = tmp_path_factory.mktemp("toy_adapter")
    write_csv(folder / "train.csv", toy_rows(80))
    (folder / "toy.yaml").write_text(
        f"data: {{source: {folder}/train.csv}}\nmodel: {{name: {tiny_base}, max_length: 16, dtype: float32}}\n"
        f"train: {{num_train_epochs: 2, learning_rate: 1e-2}}\noutput: {{dir: {folder}/adapter}}\n",
        encoding="utf-8",
    )
    return train(Recipe.load(folder / "toy.yaml")).adapter


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with real data and a real base beside the repository; absent on a user's machine."""
    if not SHARED.is_dir():
        pytest.skip("../shared is absent: no real data or base here")
    return SHARED


@pytest.fixture(scope="session")
def hub(shared: Path, tmp_path_factory: pytest.TempPathFactory):
    """Environment variables that point the real Hub clients at the local Hub."""
    server = subprocess.Popen(
        [sys.executable, str(shared / "hub/serve.py"), "--port", "0"],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert server.stdout is not None
    address = server.stdout.readline().strip()
    online = {"HF_HUB_OFFLINE": "0", "HF_DATASETS_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    yield {
        **os.environ,
        **online,
        "HF_ENDPOINT": address,
        "HF_HOME": str(tmp_path_factory.mktemp("hf")),
    }
    server.terminate()
    server.wait()
