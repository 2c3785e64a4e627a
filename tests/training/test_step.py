"""A step of the fast encoder: exact for every choice of linears and every shape of batch, and no dearer than it was."""

import csv
import itertools
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DistilBertConfig

from lora_sentiment.data.batches import cut, plan_epoch, shard
from lora_sentiment.fast.encoder import use_fast_encoder, use_stock_encoder
from lora_sentiment.models.token_limits import micro_batch_tokens
from lora_sentiment.recipe.recipe import Recipe
from lora_sentiment.train import train
from tests.fast.toy_encoder import (
    ALL_LINEARS,
    DIM,
    HIDDEN_DIM,
    NUM_LAYERS,
    assert_exact,
    largest_grad_distance,
    logits_and_grads,
    make_batch,
    make_lora,
)

pytestmark = pytest.mark.usefixtures("one_thread")
ROWS, LENGTH = 5, 9
TOKENS = ROWS * LENGTH


@pytest.mark.parametrize("num_chosen", range(1, 7))
def test_every_choice_of_linears_is_exact(num_chosen: int) -> None:
    batch = make_batch(LENGTH)
    for chosen in itertools.combinations(ALL_LINEARS, num_chosen):
        assert_exact(make_lora(list(chosen)), *batch)


def draw_rows() -> tuple[list[Tensor], np.ndarray]:
    """Rows of many lengths, as sentences and cut reviews have them."""
    generator = np.random.default_rng(0)
    lengths = np.minimum(generator.lognormal(3.6, 1.0, 60).astype(np.int64) + 2, 200)
    return [torch.from_numpy(generator.integers(1, 100, length)) for length in lengths], lengths


def pad_rows(rows: list[Tensor], index: np.ndarray) -> tuple[Tensor, Tensor]:
    chosen = [rows[i] for i in index]
    input_ids = nn.utils.rnn.pad_sequence(chosen, batch_first=True)
    lengths = torch.tensor([len(row) for row in chosen])
    return input_ids, (torch.arange(input_ids.shape[1]) < lengths[:, None]).long()


def test_every_micro_batch_of_an_epoch_is_exact() -> None:
    rows, lengths = draw_rows()
    model = make_lora(ALL_LINEARS)
    shapes = set()
    for step in plan_epoch(lengths, batch_size=12, seed=0, epoch=0):
        for part in cut(step, lengths, max_tokens=300):
            batch = pad_rows(rows, part)
            assert_exact(model, *batch)
            shapes.add(tuple(batch[0].shape))
    assert len(shapes) >= 8
    # Among them some that the fused attention takes, some that explicit products take, and some of one row.
    assert {length >= 192 for _, length in shapes} == {True, False}
    assert {count == 1 for count, _ in shapes} == {True, False}


def step_gradients(
    model: nn.Module, rows: list[Tensor], parts: list[np.ndarray], labels: Tensor
) -> dict[str, Tensor]:
    """The gradients of the mean loss over all rows of the parts."""
    model.zero_grad()
    for part in parts:
        input_ids, attention_mask = pad_rows(rows, part)
        logits = model(input_ids=input_ids, attention_mask=attention_mask).logits
        loss = functional.cross_entropy(logits, labels[torch.from_numpy(part)], reduction="sum")
        (loss / sum(map(len, parts))).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("num_processes", [1, 2, 3])
def test_the_shards_of_a_step_add_up_to_the_stock_encoders_gradients(num_processes: int) -> None:
    rows, lengths = draw_rows()
    labels = torch.arange(len(rows)) % 2
    model = make_lora(ALL_LINEARS)
    step = plan_epoch(lengths, batch_size=13, seed=1, epoch=0)[0]
    use_stock_encoder(model)
    expected = step_gradients(model, rows, [step], labels)
    use_fast_encoder(model, compute_dtype=torch.float32)
    parts = [
        part
        for rank in range(num_processes)
        for part in cut(
            shard(step, lengths, rank=rank, num_processes=num_processes), lengths, max_tokens=300
        )
    ]
    assert len(parts) > num_processes
    assert largest_grad_distance(expected, step_gradients(model, rows, parts, labels)) <= 1e-4


class CountCalls(TorchDispatchMode):
    """Counts the calls of matrix products, and of what puts tensors side by side, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._overloadpacket.__name__
        if name in ("mm", "addmm", "addmm_", "bmm", "baddbmm", "cat"):
            self.calls[name] += 1
        return func(*args, **(kwargs or {}))


def fast_lora(
    dtype: torch.dtype,
    linears: tuple[str, ...] = ("q_lin", "v_lin"),
    *,
    p: float = 0.0,
    layers: tuple[int, ...] = tuple(range(NUM_LAYERS)),
) -> nn.Module:
    model = make_lora(list(linears), p=p, layers_to_transform=list(layers))
    assert use_fast_encoder(model, compute_dtype=dtype) is None
    return model


DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


@DTYPES
@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("linears", [("q_lin", "v_lin"), tuple(ALL_LINEARS)])
def test_a_step_takes_no_more_products_than_it_did(
    dtype: torch.dtype, linears: tuple[str, ...], p: float
) -> None:
    model, earlier = fast_lora(dtype, linears, p=p), NUM_LAYERS - 1
    logits_and_grads(
        model, *make_batch(LENGTH, padded=False)
    )  # what is frozen is put side by side and cast
    with CountCalls() as counted:
        logits_and_grads(model, *make_batch(LENGTH, padded=False))
    adapters = len(linears) * NUM_LAYERS
    # In bf16 an adapter is not added to its weight but applied to x: one product more, and one for the gradient of x,
    # which nobody wants of the first q, k and v.
    applied = adapters if dtype == torch.bfloat16 else 0
    wanted = applied and adapters - sum(name in ("q_lin", "k_lin", "v_lin") for name in linears)
    assert counted.calls == {
        # q, k and v in one, out_lin, lin1, lin2; of the last layer q alone, k and v; the head's two.
        "addmm": 4 * earlier + 5 + 2,
        # Each adapter added to its weight, or to the output.
        "addmm_": adapters + wanted,
        # Scores forward, and the gradients of q and k.
        "baddbmm": 3 * earlier,
        # Mixing forward, the gradients of v and of the weights; all six of the last layer's.
        "bmm": 3 * earlier + 6,
        # The head's four, inputs of out_lin, lin1 and lin2, of q, k and v but in the first layer, four an adapter.
        "mm": 4 + 3 * NUM_LAYERS + (earlier - 1) + 2 + 4 * adapters + applied,
    }  # And nothing is put side by side: frozen weights lie so since the first step.


@DTYPES
@pytest.mark.parametrize(("p", "mask_bytes"), [(0.0, 0), (0.1, DIM)])
def test_a_lora_block_keeps_for_a_token_what_backward_needs(
    dtype: torch.dtype, p: float, mask_bytes: int
) -> None:
    def kept(*layers: int) -> int:
        model, batch = fast_lora(dtype, p=p, layers=layers), make_batch(LENGTH, padded=False)
        own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        held: dict[int, Tensor] = {}

        def keep(tensor: Tensor) -> Tensor:
            held.setdefault(tensor.untyped_storage().data_ptr(), tensor)
            return tensor

        with saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = model(*batch).logits.sum()
        assert loss.requires_grad
        return sum(
            tensor.untyped_storage().nbytes()
            for address, tensor in held.items()
            if address not in own
        )

    # The first block's adapters are alone before those of the last: without them the first two keep less.
    norms = 2 * (DIM + 2)  # the input of each with its mean and deviation
    words = (
        norms + DIM + 3 * DIM + HIDDEN_DIM
    )  # what q and v take; q, k and v; the FFN before its activation
    pairs = 4 * ROWS * LENGTH**2  # attention's weights, whose signs are its mask
    weights = 3 * DIM * DIM  # q's, k's and v's with the adapters in it
    if dtype == torch.bfloat16:  # those of the block and its norms, cast once for all steps
        weights = 4 * DIM * DIM + 2 * DIM * HIDDEN_DIM + 4 * DIM
    assert (
        kept(0, 1, 2) - kept(1, 2)
        == dtype.itemsize * (TOKENS * words + pairs + weights) + TOKENS * mask_bytes
    )


@pytest.mark.parametrize(
    ("name", "mean", "deviation", "longest", "batch_size", "micro_batches", "padded", "real"),
    [
        ("like IMDB", 5.4, 0.6, 512, 16, 1470, 2_023_752, 2_016_280),
        ("like AG News", 4.0, 0.25, 128, 32, 260, 467_006, 462_775),
        ("like SST-2", 2.3, 0.7, 128, 32, 253, 118_985, 114_009),
    ],
)
def test_an_epoch_is_padded_by_so_many_tokens(
    name: str,
    mean: float,
    deviation: float,
    longest: int,
    batch_size: int,
    micro_batches: int,
    padded: int,
    real: int,
) -> None:
    drawn = np.random.default_rng(0).lognormal(mean, deviation, 8000)
    lengths = np.minimum(drawn.astype(np.int64) + 2, longest)
    parts = [
        part
        for step in plan_epoch(lengths, batch_size=batch_size, seed=0, epoch=0)
        for part in cut(
            step,
            lengths,
            max_tokens=micro_batch_tokens(DistilBertConfig(), max_length=longest, element_bytes=4),
        )
    ]
    found = sum(len(part) * int(lengths[part].max()) for part in parts)
    assert (len(parts), found, int(lengths.sum())) == (micro_batches, padded, real)


OFF = ("model.dropout=0", "model.attention_dropout=0", "model.seq_classif_dropout=0")


@pytest.mark.slow
def test_two_processes_in_bf16_train_as_one(toy_recipe: Path) -> None:
    # The toy's weights are ten times as large as a real base's, and so is what rounding does to it at a usual rate.
    own = (*OFF, "model.dtype=bfloat16", "train.max_steps=20", "train.learning_rate=2e-4")
    one = train(Recipe.load(toy_recipe, own))
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
    ]
    command += ["-m", "lora_sentiment.train", str(toy_recipe), *own]
    folder = toy_recipe.parent / "two"
    subprocess.run(
        [*command, f"output.dir={json.dumps(str(folder))}"], check=True, capture_output=True
    )
    with Path(f"{folder}.run/metrics.csv").open(newline="") as file:
        losses = [float(row["loss"]) for row in csv.DictReader(file) if row["loss"]]
    assert len(losses) == 20
    assert losses == pytest.approx([point.loss for point in one.history.steps], abs=5e-3)


@pytest.mark.slow
def test_200_steps_in_bf16_lie_within_the_spread_of_stock_fp32_seeds(toy_recipe: Path) -> None:
    """In means of 40 steps: five in the mean within the spread, and each as near to its twin as the seeds are apart."""

    def curve(seed: int, *overrides: str) -> np.ndarray:
        own = (
            "train.max_steps=200",
            "train.eval_steps=200",
            "train.save_steps=200",
            "train.learning_rate=5e-3",
        )
        own += (*OFF, f"train.seed={seed}", "output.overwrite=true")
        steps = train(Recipe.load(toy_recipe, (*own, *overrides))).history.steps
        return np.array([point.loss for point in steps]).reshape(5, 40).mean(axis=1)

    stock = np.stack(
        [curve(seed, "train.engine=stock", "model.dtype=float32") for seed in range(1, 6)]
    )
    fast = np.stack(
        [curve(seed, "train.engine=fast", "model.dtype=bfloat16") for seed in range(1, 6)]
    )
    low, high = stock.min(axis=0), stock.max(axis=0)
    # They have learned, so that a run which does not would lie outside.
    assert high[-1] < 0.7 * low[0]
    assert (low <= fast.mean(axis=0)).all()
    assert (fast.mean(axis=0) <= high).all()
    assert (abs(fast - stock) <= high - low).all()
    # One alone too: that of the seed in the middle, for the outer ones' twins lie on the edge itself.
    middle = int(np.argsort(stock.mean(axis=1))[2])
    assert (low <= fast[middle]).all()
    assert (fast[middle] <= high).all()
