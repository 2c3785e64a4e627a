"""One slice of benchmarks/peers.py: a few optimizer steps, or a few texts, measured in a process of its own."""

import ctypes
import math
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from unittest.mock import patch

import numpy as np
import psutil
import torch
from numpy.typing import NDArray
from peers_levers import COUNTED, CUDA_LEVERS, LEVERS
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    pipeline,
)

from lora_sentiment.classifier import load
from lora_sentiment.data import packing
from lora_sentiment.data.batches import Encoded, cut
from lora_sentiment.fast.encoder import use_fast_encoder, use_stock_encoder
from lora_sentiment.models.dtype import resolve_dtype
from lora_sentiment.models.families import family_of
from lora_sentiment.models.load import load_base
from lora_sentiment.models.token_limits import micro_batch_tokens
from lora_sentiment.models.wrap import make_trainable
from lora_sentiment.recipe.method import LoraMethod
from lora_sentiment.recipe.model import ModelConfig
from lora_sentiment.recipe.train import TrainConfig
from lora_sentiment.tasks import SINGLE_LABEL
from lora_sentiment.training import loop
from lora_sentiment.training.micro_batch import choose_max_tokens
from lora_sentiment.training.processes import join_launch, make_accelerator
from lora_sentiment.training.report import peak_memory, reset_peak_memory

RANK, ALPHA, RATE = 8, 16, 5e-4
GEMM_TOKENS, GEMM_PASSES = 2048, 15
WARM_UP_TEXTS = 4
FOUR_GB = 4 * 10**9
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h


@dataclass(frozen=True)
class Variant:
    """One way to train, or to answer.

    Attributes:
        engine: `Trainer` or `ours`; `pipeline` or `ours` where texts are answered.
        order: Which rows share a step: `random`, `grouped` by transformers' length sampler, or our `buckets`.
        dropout: Whether the model's own dropout is as shipped; else it is off.
        lora_dropout: Dropout of the adapters' input.
        tuned: bf16 or fp16 where it is faster, and fused AdamW.
        compiled: torch.compile, by the Trainer's own flag.
        parts: Micro-batches of a Trainer's step, by its own flag.
        dtype: Of ours, and of a tuned Trainer.
        lever: The one of LEVERS that is off; none by default.
        batch_size: Texts of a pipeline's batch.
        bytes_limit: Most GPU memory that the process may take; None for all.
        keeps_freed: Tell glibc to keep freed buffers however large.
        huge_pages: Let torch ask the kernel for huge pages, in a process that imports anew.
        cuda_graphs: `train.cuda_graphs` of ours; None for the recipe's default.
    """

    engine: str
    order: str = "buckets"
    dropout: bool = True
    lora_dropout: float = 0.0
    tuned: bool = True
    compiled: bool = False
    parts: int = 1
    dtype: Literal["auto", "bfloat16", "float16"] = "auto"
    lever: str | None = None
    batch_size: int = 1
    bytes_limit: int | None = None
    keeps_freed: bool = False
    huge_pages: bool = False
    cuda_graphs: str | None = None


@dataclass(frozen=True)
class Job:
    """What a slice measures.

    Attributes:
        variant: How.
        base: Hub name or folder; of a whole classifier where texts are answered.
        labels: Label names.
        length: Most tokens of a text.
        rows: The pool of tokenised rows.
        batches: Positions in the pool, one array an optimizer step; the first few warm up and are not timed.
        warm_ups: How many those are.
        texts: To be answered; the first few warm up and are not timed.
        counts: Whether the products of the variant are counted after its steps.
    """

    variant: Variant
    base: str
    labels: tuple[str, ...]
    length: int
    rows: Encoded
    batches: tuple[NDArray[np.int64], ...] = ()
    warm_ups: int = 1
    texts: tuple[str, ...] = ()
    counts: bool = True


@dataclass(frozen=True)
class Walk:
    """A few steps that were taken.

    Attributes:
        model: As it was left.
        executed: From (rows, length) to the arithmetic that the variant takes for them; None where the job counts none.
        dtype: Of the encoder's arithmetic.
        seconds: Of the timed steps.
        loss: Mean of all steps.
        micro_batches: Rows of each micro-batch of the timed steps.
    """

    model: nn.Module
    executed: Callable[[int, int], float] | None
    dtype: torch.dtype
    seconds: float
    loss: float
    micro_batches: list[NDArray[np.int64]]


class Stopwatch:
    """The time of the steps after the warm-up, and of those before. A device is waited for at their ends alone.

    Attributes:
        taken: Steps so far.
        warm_up_seconds: Time of the warm-up, once its steps have been taken.
        seconds: Time of the steps after it, once all have been taken or the limit has passed.
    """

    def __init__(self, job: Job, device: torch.device, *, limit: float = math.inf) -> None:
        self.first, self.last, self.device, self.limit = (
            job.warm_ups,
            len(job.batches),
            device,
            limit,
        )
        self.taken, self.began, self.warm_up_seconds, self.seconds = 0, 0.0, 0.0, 0.0
        self.stops_at = math.inf

    def begin_step(self) -> None:
        """Note that a step is about to be taken."""
        if self.taken == 0:
            self.began = now(self.device)
            self.stops_at = time.perf_counter() + self.limit

    def end_step(self) -> bool:
        """Note that a step was taken, or given to the device; return whether the limit in seconds has passed."""
        self.taken += 1
        is_late = time.perf_counter() > self.stops_at
        if self.taken == self.first:
            warm = now(self.device)
            self.warm_up_seconds, self.began = warm - self.began, warm
        elif self.taken > self.first and (self.taken == self.last or is_late):
            self.seconds = now(self.device) - self.began
        return is_late


def measure_steps(job: Job) -> dict[str, Any]:
    """Take the steps of a job in this process, which must be fresh, and return what they cost."""
    device = find_device()
    if job.variant.keeps_freed:
        keep_freed_buffers()
    limit = job.variant.bytes_limit
    if limit:
        torch.cuda.set_per_process_memory_fraction(
            limit / torch.cuda.get_device_properties(device).total_memory
        )
    baseline = measure_baseline(device)
    walk = (walk_ours if job.variant.engine == "ours" else walk_trainer)(job, device)
    assert walk.executed is not None
    peak = peak_memory(device) - baseline
    frozen = sum(
        p.numel() * p.element_size() for p in walk.model.parameters() if not p.requires_grad
    )
    lengths, steps = job.rows.lengths, job.batches[job.warm_ups :]
    padded = [(len(part), int(lengths[part].max())) for part in walk.micro_batches]
    real = lengths[np.concatenate(steps)]
    use_stock_encoder(walk.model)
    # As it is always computed with dropout on, whatever this variant attends by.
    with sdpa_kernel(SDPBackend.MATH):
        stock = count_products(walk.model, walk.dtype)
    config: Any = walk.model.config
    return {
        "seconds": walk.seconds,
        "steps": len(steps),
        "rows": len(real),
        "tokens": int(real.sum()),
        "padded_tokens": sum(rows * length for rows, length in padded),
        "micro_batches": len(padded),
        "loss": walk.loss,
        "baseline_bytes": baseline,
        "peak_bytes": peak,
        "frozen_bytes": frozen,
        "executed_flops": sum(walk.executed(rows, length) for rows, length in padded),
        "stock_flops": sum(stock(1, int(length)) for length in real),
        "gemm_flops_per_second": measure_gemm(
            config.hidden_size, getattr(config, family_of(config).width), walk.dtype, device
        ),
        "dtype": str(walk.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
    }


def measure_texts(job: Job) -> dict[str, Any]:
    """Answer the texts of a job in this process, which must be fresh, and return what that cost."""
    device = find_device()
    baseline = measure_baseline(device)
    answer: Callable[[list[str]], object]
    if job.variant.engine == "ours":
        join_launch()
        answer = load(Path(job.base)).probabilities
    else:
        stock: Any = pipeline("text-classification", model=job.base, device=device)

        def answer(texts: list[str]) -> object:
            return stock(
                texts, truncation=True, max_length=job.length, batch_size=job.variant.batch_size
            )

    answer(list(job.texts[:WARM_UP_TEXTS]))
    timed = slice(WARM_UP_TEXTS, None)
    began = time.perf_counter()
    answer(list(job.texts[timed]))
    return {
        "seconds": time.perf_counter() - began,
        "rows": len(job.texts[timed]),
        "tokens": int(job.rows.lengths[timed].sum()),
        "baseline_bytes": baseline,
        "peak_bytes": peak_memory(device) - baseline,
        "threads": torch.get_num_threads(),
    }


def find_device() -> torch.device:
    """Return the CUDA device where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def measure_baseline(device: torch.device) -> int:
    """Take one step of a toy model, so that what libraries load on first use counts as imported, and return its bytes.

    On CUDA only what tensors allocate is measured, and nothing is allocated by imports.
    """
    toy: Any = DistilBertForSequenceClassification(
        DistilBertConfig(vocab_size=10, dim=16, hidden_dim=16, n_heads=2)
    )
    optimizer = torch.optim.AdamW(toy.to(device).parameters(), fused=True)
    ids = torch.ones(2, 8, dtype=torch.int64, device=device)
    toy(input_ids=ids, labels=torch.zeros(2, dtype=torch.int64, device=device)).loss.backward()
    optimizer.step()
    del toy, optimizer
    return 0 if device.type == "cuda" else int(psutil.Process().memory_info().rss)


def keep_freed_buffers() -> None:
    """Tell glibc to take buffers of up to 1 GiB from its heap, and not to give that back: no page is cleared twice."""
    libc = ctypes.CDLL(None)
    for parameter in (M_MMAP_THRESHOLD, M_TRIM_THRESHOLD):
        if not libc.mallopt(parameter, 2**30):
            raise OSError(f"mallopt({parameter}) was refused; it is glibc's own")


def now(device: torch.device) -> float:
    """Return the time at which the device has done all it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def walk_trainer(job: Job, device: torch.device, watch: Stopwatch | None = None) -> Walk:
    """Train with transformers' Trainer and PEFT on their own forward."""
    torch.manual_seed(0)
    variant, watch = job.variant, watch or Stopwatch(job, device)
    family = family_of(AutoConfig.from_pretrained(job.base))
    names = [name for keys in family.dropouts.values() for name in keys]
    off: dict[str, Any] = {} if variant.dropout else dict.fromkeys(names, 0.0)
    plain: Any = AutoModelForSequenceClassification.from_pretrained(
        job.base, num_labels=len(job.labels), dtype=torch.float32, **off
    )
    settings = LoraConfig(
        task_type="SEQ_CLS",
        r=RANK,
        lora_alpha=ALPHA,
        lora_dropout=variant.lora_dropout,
        target_modules=list(family.query_value),
        modules_to_save=list(family.saved_modules),
    )
    model = get_peft_model(plain, settings)
    dtype = resolve_dtype(variant.dtype, device) if variant.tuned else torch.float32
    reset_peak_memory(device)

    class Watch(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            watch.begin_step()

        def on_step_end(self, _: Any, __: Any, control: Any, **___: Any) -> None:
            if watch.end_step():
                control.should_training_stop = True

    flags: dict[str, Any] = {"optim": "adamw_torch_fused"} if variant.tuned else {}
    # Otherwise the Trainer waits for a GPU at every step, to see whether the loss is a number.
    flags |= (
        {"logging_nan_inf_filter": False, "accelerator_config": {"non_blocking": True}}
        if variant.tuned
        else {}
    )
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=len(job.batches[0]) // variant.parts,
            gradient_accumulation_steps=variant.parts,
            max_steps=len(job.batches),
            learning_rate=RATE,
            # The batches were drawn by the sampler that the variant names.
            train_sampling_strategy="sequential",
            bf16=dtype == torch.bfloat16,
            fp16=dtype == torch.float16,
            torch_compile=variant.compiled,
            use_cpu=device.type == "cpu",
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            **flags,
        )
        trainer = Trainer(
            model=model,
            args=arguments,
            train_dataset=as_features(job.rows, np.concatenate(job.batches)),
            data_collator=DataCollatorWithPadding(AutoTokenizer.from_pretrained(job.base)),
            callbacks=[Watch()],
        )
        loss = float(trainer.train().training_loss)
    parts = [
        part for step in job.batches[job.warm_ups :] for part in np.array_split(step, variant.parts)
    ]
    return Walk(
        model,
        count_products(model, dtype) if job.counts else None,
        dtype,
        watch.seconds,
        loss,
        parts,
    )


def as_features(rows: Encoded, index: NDArray[np.int64]) -> Any:
    """Return rows as a Trainer's collator takes them."""
    bounds = [(rows.offsets[i], rows.offsets[i + 1]) for i in index]
    ids = [rows.input_ids[start:stop].tolist() for start, stop in bounds]
    labels = rows.labels[index].tolist()
    return [
        {"input_ids": own, "attention_mask": [1] * len(own), "labels": label}
        for own, label in zip(ids, labels, strict=True)
    ]


def walk_ours(job: Job, device: torch.device, watch: Stopwatch | None = None) -> Walk:
    """Train with this package, one lever off if the variant says so."""
    torch.manual_seed(0)
    variant, watch = job.variant, watch or Stopwatch(job, device)
    accelerator = make_accelerator(join_launch(), variant.dtype)
    dtype = resolve_dtype(variant.dtype, device)
    off = None if variant.dropout else 0.0
    config = ModelConfig(
        name=job.base,
        max_length=job.length,
        dtype=variant.dtype,
        dropout=off,
        attention_dropout=off,
        seq_classif_dropout=off,
    )
    base = load_base(config, labels=job.labels)
    method = LoraMethod(
        r=RANK,
        lora_alpha=ALPHA,
        lora_dropout=variant.lora_dropout,
        target_modules=family_of(base.config).query_value,
    )
    steps = len(job.batches)
    model = make_trainable(base, method, config, dtype=dtype, num_steps=steps).to(device)
    max_tokens = micro_batch_tokens(
        base.config, max_length=job.length, element_bytes=dtype.itemsize
    )
    if variant.lever == "micro-batches":
        max_tokens = 2**62
    if variant.lever != "the fast encoder":
        reason = use_fast_encoder(model, compute_dtype=dtype)
        assert reason is None, reason
    if device.type == "cuda":
        # As a run decides it there.
        max_tokens = choose_max_tokens(
            model,
            accelerator=accelerator,
            max_length=job.length,
            batch_size=len(job.batches[0]),
            graphs=variant.cuda_graphs != "off",
        )
    reset_peak_memory(device)
    more: dict[str, Any] = {"cuda_graphs": variant.cuda_graphs} if variant.cuda_graphs else {}

    take_step = loop._Loop._step

    def stamped(self: loop._Loop, *given: Any) -> None:
        watch.begin_step()
        take_step(self, *given)
        if watch.end_step():
            self._read()
            self.history.stopped_early = True

    with ExitStack() as patches:
        for module, name, value in (
            {**LEVERS, **CUDA_LEVERS}[variant.lever] if variant.lever else ()
        ):
            patches.enter_context(patch.object(module, name, value))
        # The batches were planned by it, in the main process.
        for module in (loop, packing):
            patches.enter_context(
                patch.object(module, "plan_epoch", lambda *_, **__: list(job.batches))
            )
        patches.enter_context(patch.object(loop._Loop, "_step", stamped))
        history = loop.fit(
            model,
            train=job.rows,
            validation=take(job.rows, job.batches[0][-2:]),
            task=SINGLE_LABEL,
            numbers=np.arange(len(job.rows)),
            config=TrainConfig(
                batch_size=len(job.batches[0]), max_steps=steps, learning_rate=RATE, **more
            ),
            method=method,
            accelerator=accelerator,
            max_tokens=max_tokens,
        )
        # While what the lever turns off is off.
        executed = count_products(model, dtype) if job.counts else None
    loss = float(np.mean([point.loss for point in history.steps]))
    timed, most = job.batches[job.warm_ups :], history.max_tokens
    parts = [part for step in timed for part in cut(step, job.rows.lengths, max_tokens=most)]
    return Walk(model, executed, dtype, watch.seconds, loss, parts)


def take(rows: Encoded, index: NDArray[np.int64]) -> Encoded:
    """Return some of the rows."""
    ids = [rows.input_ids[rows.offsets[i] : rows.offsets[i + 1]] for i in index]
    offsets = np.cumsum([0, *map(len, ids)], dtype=np.int64)
    return Encoded(np.concatenate(ids), offsets, rows.labels[index], 0, rows.pad_token_id)


def count_products(model: nn.Module, dtype: torch.dtype) -> Callable[[int, int], float]:
    """Return what matrix products cost a forward and backward of (rows, length), in floating-point operations.

    The forward runs under autocast in the compute dtype: the stock one cannot join a bf16 base and fp32 adapters.

    The cost is a * rows * length + b * rows * length**2 + c * rows + d: counted by torch at four small sizes, it is
    known at all. Backward passes of fused attention compute the scores once more, which is not counted.
    """
    sizes = [(1, 4), (1, 8), (1, 12), (2, 4)]
    device = next(model.parameters()).device
    counts = []
    for rows, length in sizes:
        ids = torch.ones(rows, length, dtype=torch.int64, device=device)
        autocast = torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)
        with FlopCounterMode(display=False, custom_mapping=COUNTED) as counter:
            with autocast:
                logits = model(input_ids=ids).logits
            logits.float().sum().backward()
        counts.append(counter.get_total_flops())
    model.zero_grad()
    terms = np.array([[n * length, n * length**2, n, 1] for n, length in sizes], dtype=np.float64)
    a, b, c, d = np.linalg.solve(terms, np.array(counts, dtype=np.float64)).round().tolist()
    return lambda rows, length: a * rows * length + b * rows * length**2 + c * rows + d


def measure_gemm(dim: int, hidden_dim: int, dtype: torch.dtype, device: torch.device) -> float:
    """Return the machine's rate at the encoder's three products, in floating-point operations a second: the best pass.

    The best, so that a share of it is not too large where the machine's speed wanders.
    """
    cases: list[tuple[Tensor, Tensor, Tensor]] = []
    for inner, outer in ((dim, dim), (dim, hidden_dim), (hidden_dim, dim)):
        x, weight = (torch.randn(n, inner, device=device).to(dtype) for n in (GEMM_TOKENS, outer))
        cases.append((x, weight.t(), torch.empty(GEMM_TOKENS, outer, dtype=dtype, device=device)))
    flops = sum(2 * x.shape[0] * weight.numel() for x, weight, _ in cases)
    rates = []
    with torch.no_grad():
        for _ in range(GEMM_PASSES + 1):
            began = now(device)
            for x, weight, out in cases:
                torch.mm(x, weight, out=out)
            rates.append(flops / (now(device) - began))
    return float(max(rates[1:]))


def save_classifier(base: str, folder: Path, labels: Sequence[str]) -> None:
    """Write a base with a new head as a stock classifier, for the texts to be answered by."""
    torch.manual_seed(0)
    names = dict(enumerate(labels))
    model = AutoModelForSequenceClassification.from_pretrained(
        base,
        num_labels=len(labels),
        id2label=names,
        label2id={v: k for k, v in names.items()},
        dtype=torch.float32,
    )
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
