"""What a training run holds in memory, measured on the real model without values.

The model is made of fake tensors: they have a shape, a dtype and a device, and no bytes. PyTorch
runs every operation on them but the arithmetic. So one real forward and backward pass shows the
size and lifetime of each tensor.

The backward pass of a GPU cannot run on fake tensors where torch was built for CPUs. Its buffers
are the one formula here, `_cuda_workspace`.
"""

import re
import warnings
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from lora_sentiment.fast import (
    attention_backends,
    takes_packed_rows,
    use_fast_encoder,
    why_not_fused,
)
from lora_sentiment.models.families import FP32, family_of
from lora_sentiment.models.sizes import (
    count_parameters,
    is_quantised_dora,
    make_meta_model,
    weight_tensors,
)
from lora_sentiment.models.token_limits import inference_tokens
from lora_sentiment.models.wrap import checkpoint_activations
from lora_sentiment.recipe.method import Method, PeftMethod
from lora_sentiment.recipe.model import ModelConfig

QUANTISED_BLOCK = 64
"""Weights that share a 4-bit scale in bitsandbytes."""
SCALE_BLOCK = 256
"""Scales that share a scale of their own, where 4-bit scales are quantised too."""
GLIBC_KEEPS = 0.6
"""Most of the activations' size that glibc 2.36 was seen to keep in freed buffers of 32 MiB or
less, on a CPU."""
CUBLAS_BYTES = 32 * 2**20
"""cuBLAS' workspace on Hopper, for each stream of each thread. Older cards take 8 MiB."""
CUDA_SHARE = 0.92
"""Share of a GPU's memory that a run plans with."""
_FAKE = FakeTensorMode()


@dataclass(frozen=True, eq=False)
class Plan:
    """What fixes the memory of a run, but for its micro-batch.

    Attributes:
        config: The base's config, with the run's dropout and number of labels.
        method: The recipe's `method` section.
        model: The recipe's `model` section.
        engine: The recipe's `train.engine`.
        dtype: Compute dtype.
        checkpointing: Whether activations are recomputed in the backward pass.
        device: What the run is on.
        cuda_graphs: Whether the fast engine replays steps as CUDA graphs.
    """

    config: Any
    method: Method
    model: ModelConfig
    engine: str = "auto"
    dtype: torch.dtype = torch.float32
    checkpointing: bool = False
    device: Literal["cpu", "cuda"] = "cpu"
    cuda_graphs: bool = False


@dataclass(frozen=True)
class Memory:
    """Bytes held by a run. On a CPU the interpreter and its imports are not counted.

    Attributes:
        weights: Every parameter once loaded, and what the fast engine prepares from frozen ones.
        kept: The copy of the best trained tensors.
        gradients: Of the trained tensors, in fp32.
        optimizer: AdamW's two moments, in fp32.
        activations: Held between the forward and the backward pass of one micro-batch.
        workspace: The most that the passes hold beside the activations at once.
        loading: Peak while the base is loaded, hashed and wrapped.
        evaluating: Peak of an evaluation between steps.
        second: Size of a step's second micro-batch, as a share of the first. It is 0 if a step has
            one micro-batch. It is 1 with CUDA graphs, which keep their gradients between steps.
        fixed: What libraries hold for as long as a run lasts.
        pool: Memory of CUDA graphs, which nothing else can use. None of it is allocated, all of it
            is reserved.
        device: What the run is on.
    """

    weights: int
    kept: int
    gradients: int
    optimizer: int
    activations: int
    workspace: int
    loading: int
    evaluating: int
    second: float
    fixed: int = 0
    pool: int = 0
    device: Literal["cpu", "cuda"] = "cpu"

    @property
    def step(self) -> int:
        """Peak of an optimizer step. The first step takes less: it begins without moments."""
        # In a step's first micro-batch the gradients appear while the activations go.
        first = self.activations + self.workspace
        held = self.weights + self.kept + self.optimizer + self.fixed
        return held + max(first, self.gradients + int(self.second * first))

    @property
    def peak(self) -> int:
        """Peak of loading, stepping and evaluating."""
        return max(self.loading, self.step, self.evaluating)

    @property
    def resident(self) -> int:
        """The peak with the buffers that are kept beside it.

        On a CPU glibc keeps freed buffers. On a GPU torch's allocator keeps the buffers of a step
        and of an evaluation, and CUDA graphs their pool.
        """
        if self.device == "cuda":
            return max(self.loading, self.evaluating + self.kept_free)
        return max(self.loading, self.step + self.kept_free, self.evaluating)

    @property
    def kept_free(self) -> int:
        """Buffers kept for later: by glibc beside a step, on a GPU beside an evaluation."""
        if self.device == "cuda":
            return self.activations + self.workspace + self.pool
        return int(GLIBC_KEEPS * (self.activations + self.workspace))

    def as_dict(self) -> dict[str, float]:
        """Return the parts and sums for JSON."""
        return {
            **asdict(self),
            "step": self.step,
            "peak": self.peak,
            "kept_free": self.kept_free,
            "resident": self.resident,
        }


def estimate_memory(plan: Plan, *, rows: int, length: int, batch_size: int) -> Memory:
    """Estimate what a run holds.

    Args:
        plan: What fixes it but for the micro-batch.
        rows: Texts of a micro-batch.
        length: Tokens of each text.
        batch_size: Texts of an optimizer step.

    Raises:
        ModelError: If the method does not fit the base.
    """
    activations, workspace = measure_step(plan, rows=rows, length=length)
    return make_memory(
        plan,
        rows=rows,
        batch_size=batch_size,
        activations=activations,
        workspace=workspace,
    )


def make_memory(
    plan: Plan, *, rows: int, batch_size: int, activations: int, workspace: int
) -> Memory:
    """Return what a run holds, given the figures of `measure_step` for its micro-batch."""
    run = _make_run(plan)
    trained = FP32 * run.num_trained
    graphs = plan.cuda_graphs and plan.device == "cuda" and run.fast and not plan.checkpointing
    fixed = 0
    if plan.device == "cuda":
        # Forward and backward run on a thread each. Graphs are captured on a stream of their own.
        fixed = CUBLAS_BYTES * (4 if graphs else 2)
    between = run.weights + 3 * trained + fixed  # two moments and the best tensors
    if graphs:
        between += trained  # gradients
    return Memory(
        weights=run.weights,
        kept=trained,
        gradients=trained,
        optimizer=2 * trained,
        activations=activations,
        workspace=workspace,
        loading=run.loading,
        evaluating=between + max(trained, run.evaluation),
        second=1.0 if graphs else min(rows, max(0, batch_size - rows)) / rows,
        fixed=fixed,
        pool=activations + workspace if graphs else 0,
        device=plan.device,
    )


def runs_fast(plan: Plan) -> bool:
    """Return whether the fast engine takes a run."""
    return _make_run(plan).fast


@lru_cache(maxsize=64)
def measure_step(plan: Plan, *, rows: int, length: int) -> tuple[int, int]:
    """Measure the memory of one micro-batch.

    Returns:
        (activations, workspace): the bytes held between the forward and the backward pass, and the
        most that is held beside them during the passes. Gradients are part of the workspace.
    """
    run = _make_run(plan)
    run.model.train()
    with _watch(plan, run.own) as live:
        logits = run.model(**_make_inputs(plan, run.model, rows=rows, length=length)).logits
        held, peak = live.now, live.peak
        if plan.device == "cpu":
            logits.float().sum().backward()
            peak = live.peak
    for parameter in run.model.parameters():
        parameter.grad = None
    if plan.device == "cuda" and logits.requires_grad:
        if plan.checkpointing:
            # Each block keeps its input, and one at a time is computed again.
            plain = replace(plan, checkpointing=False)
            held += (
                measure_step(plain, rows=rows, length=length)[0] // plan.config.num_hidden_layers
            )
        peak = max(peak, held + _cuda_workspace(plan, run, rows * length))
    return held, peak - held


class _Run(NamedTuple):
    """A run's model of fake tensors, and what does not depend on a micro-batch.

    Attributes:
        model: The wrapped model.
        fast: Whether its forward pass is the fast one.
        own: The tensors that it holds between steps.
        num_trained: Trained parameters.
        weights: Bytes of `own`.
        loading: Peak while the base is loaded, hashed and wrapped.
        evaluation: Most bytes that a forward pass of an evaluation holds, at the recipe's longest
            length.
    """

    model: nn.Module
    fast: bool
    own: list[Tensor]
    num_trained: int
    weights: int
    loading: int
    evaluation: int


@lru_cache(maxsize=2)
def _make_run(plan: Plan) -> _Run:
    if is_quantised_dora(plan.method, plan.model):
        return _make_dora_run(plan)
    model = make_meta_model(plan.config, plan.method, plan.model, dtype=plan.dtype)
    counts = count_parameters(model)
    if plan.device == "cuda":
        why_not_fused()  # tries the kernels on the card, once: they cannot run on fake tensors
    with _FAKE:
        _make_fake(model, plan)
    if plan.checkpointing:
        checkpoint_activations(model)
    fast = plan.engine != "stock" and use_fast_encoder(model, compute_dtype=plan.dtype) is None
    model.eval()
    own = [*weight_tensors(model), *model.buffers()]
    with _watch(plan, own), torch.no_grad():
        # The fast engine prepares what it keeps in its first forward pass.
        model(**_make_inputs(plan, model, rows=1, length=8))
    own += _prepared_tensors(model)
    length = plan.model.max_length
    rows = max(1, inference_tokens(plan.device) // length)
    with _watch(plan, own) as live, torch.no_grad():
        model(**_make_inputs(plan, model, rows=rows, length=length))
    weights = sum(_storages(own).values())
    loading = _loading(plan, model, weights, counts.base)
    return _Run(model, fast, own, counts.trainable, weights, loading, live.peak)


def _make_dora_run(plan: Plan) -> _Run:
    """Return a run of DoRA on a quantised base, whose packed weights no fake tensor stands for.

    Its passes are those of the unpacked base. Its weights and loading are those of LoRA on the
    quantised base, and the magnitudes.
    """
    unpacked = {"quantize": "none", "double_quant": False}
    run = _make_run(replace(plan, model=plan.model.model_copy(update=unpacked)))
    lora = _make_run(replace(plan, method=plan.method.model_copy(update={"use_dora": False})))
    magnitudes = 4 * (run.num_trained - lora.num_trained)
    return run._replace(weights=lora.weights + magnitudes, loading=lora.loading + magnitudes)


def _loading(plan: Plan, model: nn.Module, weights: int, num_base: int) -> int:
    """Return the peak while the base is loaded, hashed and wrapped."""
    if plan.device == "cuda":
        # A base is hashed on the host. A quantised one comes to the card with all but its linears
        # in fp32.
        quantised = [p for p in model.parameters() if p.dtype in (torch.int8, torch.uint8)]
        if not quantised:
            return weights
        rest = [p for p in model.parameters() if not p.requires_grad and p.is_floating_point()]
        return weights + FP32 * sum(parameter.numel() for parameter in rest)
    # A frozen tensor is hashed in fp32: its bytes are copied, in a shorter dtype after one more
    # copy.
    frozen = [p for p in model.parameters() if not p.requires_grad]
    largest = FP32 * max((parameter.numel() for parameter in frozen), default=0)
    hashing = weights + largest * (1 if plan.dtype == torch.float32 else 2)
    # A quantised base is loaded beside the plain one, whose hash names it.
    beside = weights if plan.model.quantize != "none" else 0
    return max(hashing, FP32 * num_base + beside)


def _cuda_workspace(plan: Plan, run: _Run, num_tokens: int) -> int:
    """Return the most that one operation of a GPU's backward pass needs beside all that is saved.

    It is in the feed-forward network: buffers of its width, counted on the real code with stand-ins
    for kernels.
    """
    names = [name for name, p in run.model.named_parameters() if p.requires_grad]
    family = family_of(plan.config)
    last = re.compile(rf"\.\d+\.{re.escape(family.linears[-1])}\.")
    trains_last = any(map(last.search, names))
    adapts_last = trains_last and isinstance(plan.method, PeftMethod)
    hidden_bytes: int = num_tokens * getattr(plan.config, family.width)
    if plan.model.quantize != "none":
        return int(hidden_bytes * (10 if adapts_last else 8.5))
    if run.fast:
        return hidden_bytes * plan.dtype.itemsize * (3 if trains_last else 2)
    return int(hidden_bytes * plan.dtype.itemsize * (4.5 if adapts_last else 2.25))


class _LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up the bytes of all tensors that are made inside and still live.

    Attributes:
        now: Bytes that live.
        peak: The most that lived at once.
    """

    def __init__(self, own: Iterable[Tensor]) -> None:
        """Start at 0; the bytes of `own` do not count."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._sizes = dict.fromkeys(_storages(own), 0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for each in result if isinstance(result, tuple | list) else [result]:
            if isinstance(each, Tensor):
                self._add(each.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._sizes:
            return
        self._sizes[key] = storage.nbytes()
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._drop, key)

    def _drop(self, key: int) -> None:
        self.now -= self._sizes.pop(key)


def _storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    """Return the sizes of the storages behind tensors. Several tensors may share one."""
    storages = [tensor.untyped_storage() for tensor in tensors]
    return {storage._cdata: storage.nbytes() for storage in storages}


@contextmanager
def _watch(plan: Plan, own: list[Tensor]) -> Iterator[_LiveBytes]:
    """Run what is inside on fake tensors in the run's dtype, and count the bytes of new tensors."""
    autocast = torch.autocast(plan.device, dtype=plan.dtype, enabled=plan.dtype != torch.float32)
    backends = attention_backends(torch.device(plan.device))
    with warnings.catch_warnings(), _FAKE, _LiveBytes(own) as live, autocast, backends:
        # The fast engine tells frozen weights by their address, which is 0 for all fake tensors.
        warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")
        yield live


def _make_inputs(plan: Plan, model: nn.Module, *, rows: int, length: int) -> dict[str, Any]:
    """Return the inputs of rows that are equally long, as training gives them to the model."""
    if plan.device == "cuda" and takes_packed_rows(model):
        size = rows * length
        return {
            "input_ids": torch.zeros(1, size, dtype=torch.int32, device="cuda"),
            "position_ids": torch.zeros(1, size, dtype=torch.int32, device="cuda"),
            "cu_seq_lens_q": torch.zeros(rows + 1, dtype=torch.int32, device="cuda"),
            "max_length_q": length,
        }
    return {"input_ids": torch.zeros(rows, length, dtype=torch.int64, device=plan.device)}


def _prepared_tensors(model: nn.Module) -> list[Tensor]:
    """Return the copies of frozen weights that the fast forward pass keeps."""
    forwards = [
        getattr(vars(module).get("forward"), "__self__", None) for module in model.modules()
    ]
    return [
        ready.stacked
        for forward in forwards
        if forward is not None
        for ready in forward.prepared.values()
    ]


def _make_fake(model: nn.Module, plan: Plan) -> None:
    """Put fake tensors on the run's device in the place of a model's meta tensors."""
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            values = torch.empty(parameter.shape, dtype=parameter.dtype, device=plan.device)
            module._parameters[name] = nn.Parameter(values, parameter.requires_grad)
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = torch.empty(
                buffer.shape, dtype=buffer.dtype, device=plan.device
            )
    if plan.model.quantize != "none":
        _quantise(model, plan)


def _quantise(model: nn.Module, plan: Plan) -> None:
    """Give bitsandbytes' linears fake weights and scales."""
    # bitsandbytes is not on every system, and takes time to import.
    from bitsandbytes.nn.modules import Linear4bit, Linear8bitLt

    for module in model.modules():
        if isinstance(module, Linear8bitLt):
            _quantise_8bit(module, plan.device)
        elif isinstance(module, Linear4bit):
            _quantise_4bit(module, plan)


def _quantise_8bit(linear: Any, device: str) -> None:
    shape = (linear.out_features, linear.in_features)
    values = torch.empty(shape, dtype=torch.int8, device=device)
    weight: Any = nn.Parameter(values, requires_grad=False)
    weight.CB = weight.data
    weight.SCB = torch.empty(linear.out_features, device=device)
    linear.weight = weight
    linear.state.threshold = 0.0  # how many columns are outliers depends on values


def _quantise_4bit(linear: Any, plan: Plan) -> None:
    from bitsandbytes.functional import QuantState  # late: as in `_quantise`

    num_values = linear.out_features * linear.in_features
    num_scales = -(-num_values // QUANTISED_BLOCK)
    double = plan.model.double_quant
    scales = torch.empty(
        num_scales, dtype=torch.uint8 if double else torch.float32, device=plan.device
    )
    scales_of_scales = None
    if double:
        scales_of_scales = QuantState(  # type: ignore[no-untyped-call]
            absmax=torch.empty(-(-num_scales // SCALE_BLOCK), device=plan.device),
            code=torch.empty(256, device=plan.device),
            blocksize=SCALE_BLOCK,
            dtype=torch.float32,
        )
    packed = torch.empty((num_values + 1) // 2, 1, dtype=torch.uint8, device=plan.device)
    weight: Any = nn.Parameter(packed, requires_grad=False)
    weight.quant_state = QuantState(  # type: ignore[no-untyped-call]
        absmax=scales,
        shape=torch.Size((linear.out_features, linear.in_features)),
        code=torch.empty(16, device=plan.device),
        blocksize=QUANTISED_BLOCK,
        quant_type=plan.model.quantize,
        dtype=plan.dtype,
        offset=torch.empty((), device=plan.device) if double else None,
        state2=scales_of_scales,
    )
    linear.weight = weight
    linear.support_avx512bf16_for_cpu = False  # as `load_base` sets it
