"""What a training run holds in memory, from shapes alone: no weights are loaded and nothing is timed.

Activations are counted as the two engines save them for backward, tensor by tensor; `tests/models/test_memory.py` holds
the counts against what autograd really saves, within 5 % in fp32; a run in a shorter dtype is an approximation.

A GPU is counted apart: rows are packed, attention keeps no weights, and the stock forward runs under autocast.
`tests/models/test_cuda_memory.py` holds these counts against the real code run with kernels that allocate alike.
"""

import math
from dataclasses import asdict, dataclass
from typing import Literal

from lora_sentiment.models.families import FP32, Shape
from lora_sentiment.models.file_size import shared_tensors
from lora_sentiment.models.parameters import ParameterCounts, count_parameters, unfrozen_names
from lora_sentiment.models.targets import Target, find_targets
from lora_sentiment.recipe.method import (
    LINEARS,
    AdaloraMethod,
    FullMethod,
    HeadMethod,
    Ia3Method,
    LoraMethod,
    Method,
    UnfreezeMethod,
    VeraMethod,
)
from lora_sentiment.recipe.model import ModelConfig

FUSED_FROM = 192
"""Length from which the fast engine attends without keeping the weights, where there is no dropout."""
CHUNK_ELEMENTS = 2**19
"""Attention weights that the fast engine computes at once."""
QUANTISED_BLOCK = 64
"""Weights that share a 4-bit scale in bitsandbytes."""
GLIBC_KEEPS = 0.6
"""Most of the activations' size that glibc 2.36 was seen to keep in freed buffers of 32 MiB or less, on a CPU."""
CUBLAS_BYTES = 32 * 2**20
"""cuBLAS' workspace on Hopper, for each stream of each thread. Older cards take 8 MiB."""
CUDA_SHARE = 0.92
"""Share of a GPU's memory that a run plans with."""
_FUSED = (("q_lin", "k_lin", "v_lin"), ("out_lin",), ("lin1",), ("lin2",))
"""Linears that share an input. The fast engine makes that of lin2 again."""


@dataclass(frozen=True)
class Plan:
    """What fixes the memory of a run, but for its micro-batch.

    Attributes:
        shape: The encoder's shape.
        method: The recipe's `method` section.
        model: The recipe's `model` section.
        num_labels: Labels of the head.
        evaluation_tokens: Padded tokens of a forward without gradients, by `inference_tokens` of the device.
        element_bytes: Bytes of the compute dtype.
        fast: Whether the fast engine runs.
        checkpointing: Whether activations are recomputed in the backward pass.
        dropout: Dropout of hidden states while training.
        attention_dropout: Dropout of attention probabilities while training.
        device: What the run is on.
        graphs: Whether steps are replayed as CUDA graphs.
    """

    shape: Shape
    method: Method
    model: ModelConfig
    num_labels: int
    evaluation_tokens: int
    element_bytes: int = FP32
    fast: bool = True
    checkpointing: bool = False
    dropout: float = 0.1
    attention_dropout: float = 0.1
    device: Literal["cpu", "cuda"] = "cpu"
    graphs: bool = False


@dataclass(frozen=True)
class Memory:
    """Bytes held by a run: on a CPU beyond the interpreter and its imports, on a GPU those of the card.

    Attributes:
        weights: Every parameter once loaded, and what the engine prepares from frozen ones.
        kept: The copy of the best trained tensors.
        gradients: Of the trained tensors, in fp32.
        optimizer: AdamW's two moments, in fp32.
        activations: Saved for the backward pass of one micro-batch.
        workspace: Most that one operation of forward or backward needs beside them.
        loading: Peak while the base is loaded, hashed and wrapped.
        evaluating: Peak of an evaluation between steps.
        second: Size of a step's second micro-batch over that of its first; 0 where there is one. 1 where CUDA graphs
            run: their gradients lie there all the time.
        fixed: What libraries hold for as long as a run lasts.
        pool: Memory of CUDA graphs, which nothing else can use. None of it is allocated, all of it is reserved.
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
        """Peak of an optimizer step, from the second on: in the first the optimizer holds nothing yet."""
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
        """The peak with what is kept beside it: on a CPU freed buffers.

        On a GPU torch's allocator keeps the buffers of a step and of an evaluation, and CUDA graphs their pool.
        """
        if self.device == "cuda":
            return max(self.loading, self.evaluating + self.kept_free)
        return max(self.loading, self.step + self.kept_free, self.evaluating)

    @property
    def kept_free(self) -> int:
        """Buffers that are kept for later: by glibc beside a step, on a GPU beside an evaluation."""
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
        ModelError: If a pattern of the method matches nothing.
    """
    if plan.device == "cuda":
        return _estimate_cuda(plan, rows=rows, length=length, batch_size=batch_size)
    shape, model = plan.shape, plan.model
    counts = count_parameters(shape, plan.method, model, num_labels=plan.num_labels)
    trained, words = FP32 * counts.trainable, FP32 * shape.vocab_size * shape.dim
    weights = _weights(plan, counts)
    count_saved = _saved_fast if plan.fast else _saved_stock
    blocks = _blocks(plan)
    saved = [count_saved(plan, block, rows=rows, length=length) for block in blocks]
    activations = sum(saved)
    if plan.checkpointing and saved:
        # Each block keeps its input, and one at a time is computed again.
        activations = max(saved) + plan.element_bytes * rows * length * shape.dim * len(saved)
    activations += _outside(plan, blocks, rows * length)
    workspace = (
        _workspace(plan, rows=rows, length=length) if blocks else _forward(plan, rows * length)
    )
    # A frozen embedding is hashed in fp32: its bytes are copied, in a shorter dtype after one more copy.
    hashed = 0 if "embeddings.word_embeddings.weight" in _trained_names(plan) else words
    hashed *= 1 if plan.element_bytes == FP32 else 2
    plain = FP32 * counts.base
    # A quantised base is loaded beside the plain one, whose hash names it.
    loading = max(weights + hashed, plain + (weights if model.quantize != "none" else 0))
    between = weights + 2 * trained + trained
    tokens = plan.evaluation_tokens // length * length or length
    return Memory(
        weights=weights,
        kept=trained,
        gradients=trained,
        optimizer=2 * trained,
        activations=activations,
        workspace=workspace,
        loading=loading,
        evaluating=max(between + _forward(plan, tokens), between + trained),
        second=min(rows, max(0, batch_size - rows)) / rows,
    )


def runs_fast(method: Method, model: ModelConfig, *, engine: str) -> bool:
    """Return whether the fast engine takes a run: plain linears with LoRA at most, as `encoder.py` decides it."""
    if engine == "stock" or model.quantize != "none":
        return False
    match method:
        case LoraMethod():
            return not method.use_dora
        case FullMethod() | UnfreezeMethod() | HeadMethod():
            return True
        case _:
            return False


@dataclass(frozen=True)
class _Block:
    """One block as its backward sees it.

    Attributes:
        adapters: The adapted linears by name.
        trained: The linears whose own weight is trained.
        first: Whether no gradient reaches its input.
        last: Whether it is the last block.
    """

    adapters: dict[str, Target]
    trained: frozenset[str]
    first: bool
    last: bool


def _trained_names(plan: Plan) -> frozenset[str]:
    """Return the encoder's own tensors that are trained."""
    match plan.method:
        case FullMethod():
            return frozenset(plan.shape.tensors())
        case UnfreezeMethod():
            return frozenset(unfrozen_names(plan.shape, plan.method))
        case _:
            return frozenset()


def _targets(plan: Plan) -> dict[str, Target]:
    """Return the adapted linears by full name; none where the model's own tensors are trained."""
    if isinstance(plan.method, FullMethod | UnfreezeMethod | HeadMethod):
        return {}
    return find_targets(plan.shape, plan.method)


def _blocks(plan: Plan) -> list[_Block]:
    """Return the blocks from the first that trains anything, or takes a gradient to what lies before it."""
    trained, targets = _trained_names(plan), _targets(plan)
    flows = any(name.startswith("embeddings.") for name in trained)
    blocks = []
    for i in range(plan.shape.n_layers):
        prefix = f"transformer.layer.{i}."
        ends = {
            f"{prefix}{'ffn' if name in ('lin1', 'lin2') else 'attention'}.{name}": name
            for name in LINEARS
        }
        inside = {full.removeprefix("distilbert."): target for full, target in targets.items()}
        block = _Block(
            adapters={name: inside[full] for full, name in ends.items() if full in inside},
            trained=frozenset(name for full, name in ends.items() if f"{full}.weight" in trained),
            first=not flows,
            last=i == plan.shape.n_layers - 1,
        )
        flows = flows or bool(block.adapters) or any(name.startswith(prefix) for name in trained)
        if flows:
            blocks.append(block)
    return blocks


def _saved_fast(plan: Plan, block: _Block, *, rows: int, length: int) -> int:
    """Count what `kernels.py` saves of one block.

    An adapted or trained linear saves its input, an adapted one the weight with its update; attention saves q, k, v and
    one probability for each pair of tokens; the FFN its pre-activation; dropout a byte a value; a norm its input.
    """
    shape, size, tokens = plan.shape, plan.element_bytes, rows * length
    words, masks, weights = _inputs_fast(plan, block)
    if block.last:
        per_row = 8 * shape.dim + shape.hidden_dim + 2 * shape.n_heads * length
        return size * (tokens * (words + 2 * shape.dim) + rows * per_row + weights) + tokens * masks
    fused = size == FP32 and length >= FUSED_FROM and not plan.attention_dropout
    words += 3 * shape.dim + (shape.dim + shape.n_heads if fused else shape.n_heads * length)
    words += shape.hidden_dim + 2 * (shape.dim + 2)
    masks += shape.dim if plan.dropout else 0
    return size * (tokens * words + weights) + tokens * masks


def _inputs_fast(plan: Plan, block: _Block) -> tuple[int, int, int]:
    """Return what the linears of a block save: words a token, bytes of masks a token, words of weights."""
    shape = plan.shape
    # Of the last block only keys and values are of every token.
    every = {name for name in LINEARS if not block.last or name in ("k_lin", "v_lin")}
    if isinstance(plan.method, LoraMethod) and plan.method.lora_dropout:
        targets = [target for name, target in block.adapters.items() if name in every]
        inputs = sum(target.in_features for target in targets)
        # A mask of what takes no gradient is not kept.
        return inputs + sum(target.rank for target in targets), 0 if block.first else inputs, 0
    keeping = block.trained | set(block.adapters)
    words = sum(shape.dim for group in _FUSED[:3] if keeping & set(group) & every)
    folded = (
        [group for group in _FUSED if set(group) & set(block.adapters)]
        if plan.element_bytes == FP32
        else []
    )
    # Trained weights of q, k and v are put side by side in every forward, and kept where the input takes a gradient.
    folded += [group for group in _FUSED[:1] if set(group) & block.trained and not block.first]
    return words, 0, sum(len(group) * math.prod(shape.linear(group[0])) for group in folded)


def _saved_stock(plan: Plan, block: _Block, *, rows: int, length: int) -> int:
    """Count what transformers' forward under PEFT saves of one block: dropout a value of the compute dtype each."""
    shape, tokens = plan.shape, rows * length
    # bitsandbytes' product on a CPU keeps every input.
    keeping = set(LINEARS) if plan.model.quantize == "int8" else set(block.trained)
    words = fixed = 0
    for name, target in block.adapters.items():
        extra, keeps, weights = _adapter_saves(plan.method, target, first=block.first)
        words, fixed, keeping = (
            words + extra,
            fixed + weights,
            keeping | ({name} if keeps else set()),
        )
    words += sum(shape.linear(group[0])[0] for group in _FUSED if keeping & set(group))
    pairs = 3 * shape.n_heads * length if plan.attention_dropout else shape.dim + shape.n_heads
    words += (
        3 * shape.dim
        + pairs
        + shape.hidden_dim
        + (shape.dim if plan.dropout else 0)
        + 2 * (shape.dim + 2)
    )
    return plan.element_bytes * tokens * words + FP32 * fixed


def _adapter_saves(method: Method, target: Target, *, first: bool) -> tuple[int, bool, int]:
    """Return what PEFT's own forward saves for one adapted linear.

    Returns:
        Words a token, whether the linear's own input is among what is kept, words of weights.
    """
    match method:
        case Ia3Method():
            return (target.in_features if target.feed_forward else target.out_features), False, 0
        case VeraMethod():
            return target.rank + target.out_features, False, 0
        case LoraMethod() | AdaloraMethod():
            dropped = (1 if first else 2) * target.in_features if method.lora_dropout else 0
            extra, weights = target.rank + dropped, 0
            if isinstance(method, LoraMethod) and method.use_dora:
                extra, weights = (
                    extra + 2 * target.out_features,
                    target.in_features * target.out_features,
                )
            return extra, not method.lora_dropout, weights
        case _:
            return 0, False, 0


def _outside(plan: Plan, blocks: list[_Block], tokens: int) -> int:
    """Count what is saved before and after the blocks: the embeddings' norm and dropout, and all of the last state."""
    dim = plan.shape.dim
    embeddings = bool(blocks) and not blocks[0].first
    if plan.fast:
        return tokens * (plan.element_bytes * (dim + 2) + dim) if embeddings else 0
    # The head's input is a view of every token's.
    return plan.element_bytes * tokens * ((2 * dim + 2 if embeddings else 0) + dim)


def _workspace(plan: Plan, *, rows: int, length: int) -> int:
    """Return the most that one operation of the way back needs beside all that is saved.

    It is the FFN's or the attention's of the last block that saves for every token: by then what came after is freed.
    """
    shape, size, tokens = plan.shape, plan.element_bytes, rows * length
    dim, hidden, pairs = shape.dim, shape.hidden_dim, shape.n_heads * length
    if plan.fast:
        remade = any("lin2" in block.adapters or "lin2" in block.trained for block in _blocks(plan))
        ffn = size * tokens * ((3 if remade else 2) * hidden - 2 * dim)
        # Attention goes back in chunks, five buffers of each at once; the FFN's pre-activation is freed by then.
        chunk = min(CHUNK_ELEMENTS, rows * length * pairs)
        return max(ffn, size * (5 * chunk + tokens * (3 * dim - hidden)))
    freed = 2 * hidden if isinstance(plan.method, FullMethod) else hidden
    ffn = 3 * hidden - freed
    attention = 2 * pairs - freed - 3 * dim if plan.attention_dropout else 0
    return size * tokens * max(ffn, attention)


def _forward(plan: Plan, tokens: int) -> int:
    """Return the peak of a forward that saves nothing: the FFN before and after its activation, and its input twice."""
    return plan.element_bytes * tokens * (2 * plan.shape.hidden_dim + 2 * plan.shape.dim)


def _weights(plan: Plan, counts: ParameterCounts) -> int:
    """Count every parameter once loaded, and the fast engine's copies of q_lin, k_lin and v_lin side by side."""
    shape, size = plan.shape, plan.element_bytes
    linears = shape.n_layers * sum(math.prod(shape.linear(name)) for name in LINEARS)
    frozen = shape.num_encoder - counts.encoder
    match plan.model.quantize:
        case "none":
            encoder = size * frozen
        case "int8":
            rows = shape.n_layers * sum(shape.linear(name)[1] for name in LINEARS)
            encoder = size * (frozen - linears) + linears + FP32 * rows
        case _:
            scales = linears // QUANTISED_BLOCK
            scale_bytes = (
                scales + FP32 * scales // 256 if plan.model.double_quant else FP32 * scales
            )
            encoder = size * (frozen - linears) + linears // 2 + scale_bytes
    head = FP32 * shape.num_head(plan.num_labels)
    own = isinstance(plan.method, FullMethod | UnfreezeMethod | HeadMethod)
    # PEFT keeps the head it was given beside the one it trains.
    head += 0 if own else size * shape.num_head(plan.num_labels)
    shared = sum(math.prod(sizes) for sizes in shared_tensors(shape, plan.method).values())
    adapters = FP32 * (counts.adapter + shared)
    trained = _trained_names(plan)
    stacked = sum(
        f"transformer.layer.{i}.attention.q_lin.weight" not in trained
        for i in range(shape.n_layers)
    )
    prepared = size * stacked * 3 * (shape.dim + 1) * shape.dim if plan.fast else 0
    return encoder + FP32 * counts.encoder + head + adapters + prepared


def _estimate_cuda(plan: Plan, *, rows: int, length: int, batch_size: int) -> Memory:
    """Estimate what a run holds on a GPU."""
    counts = count_parameters(plan.shape, plan.method, plan.model, num_labels=plan.num_labels)
    trained = FP32 * counts.trainable
    weights = _weights(plan, counts)
    # Forward and backward run on a thread each. Graphs are captured on a stream of their own.
    fixed = CUBLAS_BYTES * (4 if plan.graphs else 2)
    blocks = _blocks(plan)
    tokens = rows * length
    saved = [_saved_on_cuda(plan, block, rows=rows, length=length) for block in blocks]
    activations = sum(saved)
    if plan.checkpointing and saved:
        # Each block keeps its input, and one at a time is computed again.
        kept = plan.element_bytes if plan.fast else FP32
        activations = max(saved) + kept * tokens * plan.shape.dim * len(saved)
    activations += _outside_on_cuda(plan, blocks, tokens)
    workspace = _workspace_on_cuda(plan, blocks, tokens) if blocks else 0
    # Before the first block that saves anything, a forward holds what it holds without gradients.
    workspace = max(workspace, _forward_on_cuda(plan, tokens) - activations)
    # A base is hashed on the host. A quantised one comes to the card with all else in fp32.
    loading = weights
    if plan.model.quantize != "none":
        linears = plan.shape.n_layers * sum(math.prod(plan.shape.linear(name)) for name in LINEARS)
        loading += FP32 * (plan.shape.num_encoder - linears)
    between = weights + 2 * trained + trained + fixed
    if plan.graphs:
        between += trained  # gradients
    evaluation = plan.evaluation_tokens // length * length or length
    return Memory(
        weights=weights,
        kept=trained,
        gradients=trained,
        optimizer=2 * trained,
        activations=activations,
        workspace=workspace,
        loading=loading,
        evaluating=max(between + _forward_on_cuda(plan, evaluation), between + trained),
        second=1.0 if plan.graphs else min(rows, max(0, batch_size - rows)) / rows,
        fixed=fixed,
        pool=activations + workspace if plan.graphs else 0,
        device="cuda",
    )


def _saved_on_cuda(plan: Plan, block: _Block, *, rows: int, length: int) -> int:
    """Count what a GPU saves of one block."""
    if plan.fast:
        return _saved_packed(plan, block, rows=rows, tokens=rows * length)
    return _saved_autocast(plan, block, tokens=rows * length)


def _saved_packed(plan: Plan, block: _Block, *, rows: int, tokens: int) -> int:
    """Count what the forward of packed rows saves of one block.

    As `_saved_fast`, but attention saves its output and one fp32 sum for each head and token, and a norm the sum that
    it normalises and two fp32 numbers. Dropout before a norm saves nothing: its mask is drawn again.
    """
    shape, size = plan.shape, plan.element_bytes
    words, masks, weights = _inputs_fast(plan, block)
    before = {"q_lin", "k_lin", "v_lin"}  # their input takes no gradient in the first block
    if size < FP32:
        # Trained weights are cast in every forward, and kept where the input takes a gradient.
        weights = sum(
            math.prod(shape.linear(name))
            for name in block.trained - (before if block.first else set())
        )
    sums = FP32 * (shape.n_heads + 4)
    if block.last:
        per_row = size * (8 * shape.dim + shape.hidden_dim) + sums
        return size * (tokens * (words + 2 * shape.dim) + weights) + rows * per_row + tokens * masks
    if isinstance(plan.method, LoraMethod) and plan.method.lora_dropout:
        if block.first:
            masks = sum(
                target.in_features for name, target in block.adapters.items() if name not in before
            )
    elif "out_lin" in block.trained | set(block.adapters):
        words -= shape.dim  # the output of attention
    words += 3 * shape.dim + shape.dim + shape.hidden_dim + 2 * shape.dim
    return size * (tokens * words + weights) + tokens * (masks + sums)


def _saved_autocast(plan: Plan, block: _Block, *, tokens: int) -> int:
    """Count what transformers' forward under autocast and PEFT saves of one block.

    Norms compute in fp32, so hidden states are fp32 between the halves of a block. Every linear that keeps its input
    keeps a cast copy of its own. Quantised linears answer in the dtype that they are given.
    """
    shape, size, dim, hidden = plan.shape, plan.element_bytes, plan.shape.dim, plan.shape.hidden_dim
    quantised = plan.model.quantize != "none"
    kept = weights = 0
    for name, target in block.adapters.items():
        words, keeps, fixed = _adapter_saves(plan.method, target, first=block.first)
        weights += fixed
        kept += size * (words + (shape.linear(name)[0] if keeps else 0))
    for name in block.trained:
        weights += math.prod(shape.linear(name))
        # Attention keeps its output, which is the input of out_lin, anyway.
        kept += 0 if name == "out_lin" else size * shape.linear(name)[0]
    if plan.model.quantize == "int8":
        # bitsandbytes keeps every input that takes a gradient, once where linears share it.
        kept += FP32 * ((0 if block.first else dim) + dim + hidden)
    attention = size * 4 * dim + FP32 * shape.n_heads
    norms = 2 * FP32 * (dim + 2)
    activation = (FP32 if quantised else size) * hidden
    mask = dim if plan.dropout else 0
    return tokens * (kept + attention + norms + activation + mask) + size * weights


def _outside_on_cuda(plan: Plan, blocks: list[_Block], tokens: int) -> int:
    """Count what a GPU saves before the blocks: the embeddings' norm and dropout, where anything of them is trained."""
    if not blocks or blocks[0].first:
        return 0
    dim = plan.shape.dim
    return tokens * (FP32 * (dim + 2) + (dim if plan.dropout else 0))


def _workspace_on_cuda(plan: Plan, blocks: list[_Block], tokens: int) -> int:
    """Return the most that one operation of a GPU's way back needs beside all that is saved.

    It is the FFN's of the last block that saves for every token, or the attention's where the FFN is narrow. The sums
    were found by running the real code.
    """
    size, dim, hidden = plan.element_bytes, plan.shape.dim, plan.shape.hidden_dim
    full = blocks[:-1] if plan.fast else blocks
    adapted = bool(full) and "lin2" in full[-1].adapters
    trained = bool(full) and "lin2" in full[-1].trained
    if plan.fast:
        if isinstance(plan.method, LoraMethod) and plan.method.lora_dropout:
            adapted = False  # the input of lin2 is not made again
        freed = dim if _inputs_fast(plan, blocks[-1])[0] else 0  # by the last block
        ffn = (3 if adapted or trained else 2) * hidden - freed if full else 0
        # The gradients of a linear's weight, before they are added in fp32.
        weights = 2 * dim * hidden if trained else 0
        return size * (tokens * max(ffn, 3 * dim) + weights)
    if plan.model.quantize == "none":
        # As wide as 16 bits allow; fp32 alone needs no casts.
        ffn = (3 * hidden + 6 * dim) if adapted else (0 if trained else 2 * hidden - dim)
        return size * tokens * max(ffn, 9 * dim)
    ffn = (10 if adapted else 8) * hidden - dim
    if plan.model.quantize != "int8":
        ffn = max(ffn, 6 * hidden + 11 * dim)
    return tokens * max(ffn, 18 * dim)


def _forward_on_cuda(plan: Plan, tokens: int) -> int:
    """Return the peak of a forward on a GPU that saves nothing: in the FFN, with all that its callers still hold."""
    size, dim, hidden = plan.element_bytes, plan.shape.dim, plan.shape.hidden_dim
    names = _trained_names(plan)
    if plan.fast:
        # Weights are cast for all blocks at once.
        endings = tuple(f".{name}.weight" for name in LINEARS)
        trained = [
            count
            for name, count in plan.shape.tensors().items()
            if name in names and name.endswith(endings)
        ]
        casts = sum(trained) if size < FP32 else 0
        return size * (casts + tokens * (7 * dim + 2 * hidden))
    adapted = any("lin2" in block.adapters for block in _blocks(plan))
    if plan.model.quantize == "none":
        return (
            tokens
            * size
            * (4 * hidden + 7 * dim if adapted else max(2 * hidden + 6 * dim, 11 * dim))
        )
    wide = 10 if adapted else (9 if plan.model.quantize == "int8" else 8)
    return tokens * max(wide * hidden + 12 * dim, 30 * dim)
