"""The fast forward pass: exact, for plain linears with or without LoRA, and for [CLS] alone.

It computes DistilBERT, BERT, RoBERTa and XLM-R. `use_fast_encoder` replaces the forward pass of one
encoder and nothing else. It owns no parameter and no file format. Every forward pass reads adapters
and trained weights from the modules. Prepared copies of frozen weights are made again when their
sources change.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch
from peft import PeftModel
from peft.tuners import lora
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers.modeling_outputs import BaseModelOutputWithPooling

from lora_sentiment.errors import ModelError
from lora_sentiment.fast.attention import packed_attention
from lora_sentiment.fast.fused import dropout_add_norm
from lora_sentiment.fast.kernels import (
    Adapter,
    Linear,
    Segment,
    attention,
    cast_adapters,
    dropout,
    feed_forward,
    first_token_attention,
    linear,
)
from lora_sentiment.fast.layouts import (
    ENCODERS,
    Block,
    Embeddings,
    Encoder,
    find_encoder,
    read_blocks,
    read_embeddings,
)

FAST_DEVICES = ("cpu", "cuda")
"""Kinds of devices on which the fast forward pass was tested."""
PLAIN_PARTS = {
    "word_embeddings": nn.Embedding,
    "position_embeddings": nn.Embedding,
    "token_type_embeddings": nn.Embedding,
    "LayerNorm": nn.LayerNorm,
    "layer_norm": nn.LayerNorm,
}
"""The class that a module must have, by the end of its name."""

STOCK_ARGUMENTS = (
    "inputs_embeds",
    "position_ids",
    "encoder_hidden_states",
    "past_key_values",
    "cu_seq_lens_q",
    "output_hidden_states",
    "output_attentions",
)
"""Arguments that only the stock forward pass takes."""

Pair = TypeVar("Pair", Adapter, Segment)


class UnsupportedModelError(ModelError):
    """The fast forward pass cannot compute a model.

    Attributes:
        reason: The module, and why it is not supported.
    """

    def __init__(self, where: str, why: str) -> None:
        self.reason = f"{where}: {why}"
        super().__init__(
            f"{self.reason}; the fast forward pass cannot compute it: set train.engine=stock"
        )


def why_not_on(device: torch.device) -> str | None:
    """Return why the fast forward pass does not run on a device, or None if it does."""
    if device.type in FAST_DEVICES:
        return None
    tested = " and ".join(FAST_DEVICES)
    return f"the device is {device.type}, and the fast forward pass was tested on {tested} only"


@dataclass(frozen=True)
class LowRank:
    """One linear as y = x W^T + b + scale * dropout(x) A^T B^T, by reference to its tensors.

    weight: (out_features, in_features), A: (r, in_features), B: (out_features, r). Without an
    adapter, A and B are None.
    """

    weight: Tensor
    bias: Tensor
    A: Tensor | None = None
    B: Tensor | None = None
    scale: float = 1.0
    dropout: float = 0.0


def low_rank(module: Any, where: str) -> LowRank:
    """Read one linear of the encoder as a weight with at most one low-rank pair.

    Args:
        module: The linear, as PEFT left it.
        where: Its name in the encoder.

    Raises:
        UnsupportedModelError: If it is anything else.
    """
    is_lora = type(module) is lora.Linear
    base = module.get_base_layer() if is_lora else module
    active: list[str] = []
    if is_lora and not module.disable_adapters:
        active = [name for name in module.active_adapters if name in module.lora_A]
    why = ""
    if type(base) is not nn.Linear:
        why = f"{type(base).__name__} is neither a torch.nn.Linear nor PEFT's LoRA of one"
    elif not base.weight.is_floating_point():
        why = f"its base weight is quantised ({base.weight.dtype})"
    elif base.bias is None:
        why = "it has no bias"
    elif is_lora and module.merged:
        why = f"the adapters {module.merged_adapters} are merged into its base weight"
    elif len(active) > 1:
        why = f"several adapters are active: {active}"
    if why:
        raise UnsupportedModelError(where, why)
    if not active:
        return LowRank(base.weight, base.bias)
    return _read_pair(module, active[0], where)


def _read_pair(module: Any, name: str, where: str) -> LowRank:
    """Read a LoRA linear with one active adapter."""
    down, up, drop = module.lora_A[name], module.lora_B[name], module.lora_dropout[name]
    why = ""
    if name in module.lora_variant:
        why = f"its adapter is a {type(module.lora_variant[name]).__name__}, not plain LoRA"
    elif module.lora_bias.get(name):
        why = "its adapter has a bias (lora_bias)"
    elif type(down) is not nn.Linear or type(up) is not nn.Linear:
        why = f"its adapter is made of {type(down).__name__} and {type(up).__name__}"
    elif type(drop) not in (nn.Identity, nn.Dropout):
        why = f"its adapter drops through {type(drop).__name__}"
    if why:
        raise UnsupportedModelError(where, why)
    base = module.get_base_layer()
    p = float(drop.p) if isinstance(drop, nn.Dropout) and drop.training else 0.0
    scale = float(module.scaling[name])
    return LowRank(base.weight, base.bias, down.weight, up.weight, scale, p)


def use_fast_encoder(model: nn.Module, *, compute_dtype: torch.dtype) -> str | None:
    """Give the encoder inside `model` the fast forward pass, if that can compute it.

    Args:
        model: A sequence classifier, or a PeftModel around one.
        compute_dtype: Dtype of the encoder's arithmetic. Its output is always fp32.

    Returns:
        None if the fast forward pass is in place, else the reason why it is not.
    """
    try:
        encoder = _find_encoder(model)
        use_stock_encoder(model)
        check_modules(encoder)
    except UnsupportedModelError as error:
        return error.reason
    reason = why_not_on(next(encoder.parameters()).device)
    if reason is None:
        encoder.forward = FastForward(encoder, compute_dtype).forward
    return reason


def use_stock_encoder(model: nn.Module) -> None:
    """Give the encoder inside `model` its own forward pass back."""
    for part in model.modules():
        if _is_fast(part):
            del part.forward


def takes_packed_rows(model: nn.Module) -> bool:
    """Return whether the forward pass of `model` takes rows without padding between them."""
    for part in model.modules():
        if _is_fast(part):
            return has_packable_heads(part)
    return False


def has_packable_heads(encoder: nn.Module) -> bool:
    """Return whether a GPU's attention kernels take the heads: their width is a multiple of 8."""
    config: Any = encoder.config
    head_dim: int = config.hidden_size // config.num_attention_heads
    return head_dim % 8 == 0


def _is_fast(module: nn.Module) -> bool:
    return isinstance(getattr(module.__dict__.get("forward"), "__self__", None), FastForward)


def _find_encoder(model: nn.Module) -> Encoder:
    kind = type(model).__name__
    if isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning:
        config = type(model.active_peft_config).__name__
        raise UnsupportedModelError(kind, f"{config} feeds embeddings, not input_ids")
    encoder = find_encoder(model)
    if encoder is None:
        known = ", ".join(encoder_class.__name__ for encoder_class in ENCODERS.values())
        raise UnsupportedModelError(kind, f"holds no sequence classifier over a plain {known}")
    return encoder


def check_modules(encoder: Encoder) -> None:
    """Refuse an encoder with a module that the fast forward pass would compute wrongly.

    Raises:
        UnsupportedModelError: With the module and the reason.
    """
    config = encoder.config
    # DistilBERT has its own name for the activation, and cannot be a decoder.
    activation = getattr(config, "hidden_act", None) or config.activation
    if activation != "gelu":
        raise UnsupportedModelError("config", f"the activation {activation!r} is not 'gelu'")
    if getattr(config, "is_decoder", False):
        raise UnsupportedModelError("config", "is_decoder is set")
    if config.output_hidden_states or config.output_attentions:
        why = "output_hidden_states and output_attentions need every token of every layer"
        raise UnsupportedModelError("config", why)
    for name, module in encoder.named_modules():
        where = name or encoder.base_model_prefix
        if "forward" in module.__dict__:
            why = "its forward was replaced, for instance by an accelerate hook"
            raise UnsupportedModelError(where, why)
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values()):
            # transformers' capturing hooks act only for hidden states or attentions, refused above.
            if getattr(hook, "__module__", "") != "transformers.utils.output_capturing":
                raise UnsupportedModelError(
                    where, "the fast forward pass would skip its forward hook"
                )
        for suffix, expected in PLAIN_PARTS.items():
            if name.endswith(suffix) and type(module) is not expected:
                why = f"{type(module).__name__} is not a plain {expected.__name__}"
                raise UnsupportedModelError(where, why)
    for block in read_blocks(encoder):
        _read_linears(block)


def _read_linears(block: Block) -> list[LowRank]:
    """Read the six linears of a block, in the order of `Block.linears`."""
    return [low_rank(module, where) for where, module in block.linears.items()]


def read_adapters(model: nn.Module) -> list[list[LowRank]]:
    """Read the six linears of every block of a model, in the order of `Block.linears`.

    Raises:
        UnsupportedModelError: If one is not a linear with at most one low-rank pair.
    """
    return [_read_linears(block) for block in read_blocks(_find_encoder(model))]


class Linears(NamedTuple):
    """The linears of one layer; qkv: (3 * dim, dim) stacks query, key and value."""

    qkv: Linear
    out: Linear
    lin1: Linear
    lin2: Linear


LinearsOfLayer = Callable[[int, Block], Linears]


class _Prepared(NamedTuple):
    """Frozen tensors stacked in the compute dtype, with their sources.

    The sources are kept: otherwise another tensor could take an address in the stamp.
    """

    sources: tuple[Tensor, ...]
    stamp: tuple[tuple[int, int], ...]
    stacked: Tensor


def _stamp(sources: tuple[Tensor, ...]) -> tuple[tuple[int, int], ...]:
    """Return the address and version of each tensor; inference tensors have no version."""
    return tuple(
        (tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version) for tensor in sources
    )


def _stack(sources: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    tensors = [tensor.to(dtype) for tensor in sources]
    return torch.cat(tensors) if len(tensors) > 1 else tensors[0]


def _prepare(sources: tuple[Tensor, ...], dtype: torch.dtype) -> _Prepared:
    # A later backward pass cannot use tensors that were made under inference_mode.
    with torch.inference_mode(False), torch.no_grad():
        frozen = [
            tensor.clone() if tensor.is_inference() else tensor.detach() for tensor in sources
        ]
        return _Prepared(sources, _stamp(sources), _stack(frozen, dtype))


class FastForward:
    """The forward pass that replaces an encoder's; `forward` has the stock signature.

    Attributes:
        encoder: The model whose modules are read.
        dtype: Compute dtype.
        prepared: Stacked copies of frozen tensors by layer, position of the linear, and part.
    """

    def __init__(self, encoder: Encoder, compute_dtype: torch.dtype) -> None:
        self.encoder = encoder
        self.dtype = compute_dtype
        self.prepared: dict[tuple[int, int, str], _Prepared] = {}

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        cu_seq_lens_q: Tensor | None = None,
        max_length_q: int | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPooling:
        """Encode input_ids: (batch, length) into last_hidden_state: (batch, 1, dim), that of [CLS].

        last_hidden_state is fp32. attention_mask: (batch, length) of 0 and 1, or None if every
        token counts. None is faster than a mask of ones: finding out that all are ones would wait
        for a GPU. token_type_ids: as input_ids, or None if all are 0.

        With cu_seq_lens_q the sequences are packed, as `encode_packed` describes: input_ids and
        position_ids are (1, num_tokens), and last_hidden_state is (num_sequences, 1, dim).

        Raises:
            ModelError: If an argument needs the stock forward pass, or an adapter was changed into
                one that this pass cannot compute.
        """
        self._check_types(input_ids, token_type_ids)
        if (
            input_ids is not None
            and position_ids is not None
            and cu_seq_lens_q is not None
            and max_length_q is not None
        ):
            with torch.autocast(input_ids.device.type, enabled=False):
                first = self.encode_packed(
                    input_ids[0],
                    position_ids[0],
                    cu_seq_lens_q,
                    max_length_q,
                    token_type_ids=None if token_type_ids is None else token_type_ids[0],
                )
            return self._pool(first[:, None])
        kwargs.update(position_ids=position_ids, cu_seq_lens_q=cu_seq_lens_q)
        given = [name for name, value in kwargs.items() if value is not None and value is not False]
        unsupported = [name for name in STOCK_ARGUMENTS if name in given]
        if input_ids is None or unsupported:
            names = ", ".join(unsupported) or "no input_ids"
            raise ModelError(
                f"the fast forward pass was given {names}; it takes input_ids, attention_mask and "
                "token_type_ids only: use the stock forward pass"
            )
        if attention_mask is not None and attention_mask.shape != input_ids.shape:
            raise ModelError(
                "the fast forward pass was given an attention_mask of shape "
                f"{tuple(attention_mask.shape)} for input_ids of shape {tuple(input_ids.shape)}; "
                "the shapes must agree: use the stock forward pass for other masks"
            )
        with torch.autocast(input_ids.device.type, enabled=False):
            hidden = self.encode(input_ids, attention_mask, self.linears, token_type_ids)
        return self._pool(hidden)

    def _check_types(self, input_ids: Tensor | None, token_type_ids: Tensor | None) -> None:
        """Refuse types of another shape than the ids, or for an encoder without types."""
        if token_type_ids is None or input_ids is None:
            return
        if token_type_ids.shape != input_ids.shape:
            raise ModelError(
                "the fast forward pass was given token_type_ids of shape "
                f"{tuple(token_type_ids.shape)} for input_ids of shape {tuple(input_ids.shape)}"
            )
        if read_embeddings(self.encoder).token_types is None:
            raise ModelError(
                f"{type(self.encoder).__name__} has no types of tokens; leave out token_type_ids"
            )

    def _pool(self, hidden: Tensor) -> BaseModelOutputWithPooling:
        """Return [CLS], shape (batch, 1, dim), with the output of BERT's pooler for it."""
        hidden = hidden.float()
        pooler = getattr(self.encoder, "pooler", None)
        pooled = None if pooler is None else pooler(hidden)
        return BaseModelOutputWithPooling(last_hidden_state=hidden, pooler_output=pooled)

    def encode(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        linears: LinearsOfLayer,
        token_type_ids: Tensor | None = None,
    ) -> Tensor:
        """Encode padded rows as `forward` does, and return [CLS] in the compute dtype.

        Args:
            input_ids: Token ids, shape (batch, length).
            attention_mask: Shape (batch, length), or None if every token counts.
            linears: Returns the linears of a layer.
            token_type_ids: Shape (batch, length), or None if all are 0.
        """
        mask = self._additive_mask(attention_mask)
        x = self._embed(input_ids, token_type_ids)
        blocks = read_blocks(self.encoder)
        for index, block in enumerate(blocks):
            is_last = index == len(blocks) - 1
            if block.checkpoints:
                # The backward pass reads the linears again: stacked weights are not kept until
                # then.
                x = checkpoint(
                    self._encode_block, index, block, is_last, x, mask, linears, use_reentrant=False
                )
            else:
                x = self._encode_block(index, block, is_last, x, mask, linears)
        return x

    def _additive_mask(self, attention_mask: Tensor | None) -> Tensor | None:
        if attention_mask is None:
            return None
        mask = torch.zeros(attention_mask.shape, dtype=self.dtype, device=attention_mask.device)
        lowest = torch.finfo(self.dtype).min
        return mask.masked_fill_(attention_mask == 0, lowest)[:, None, None, :]

    def _embed(self, input_ids: Tensor, token_type_ids: Tensor | None) -> Tensor:
        parts = read_embeddings(self.encoder)
        if parts.position_offset is None:
            positions = parts.positions.weight[: input_ids.shape[1]]
        else:
            counts = input_ids != parts.position_offset
            places = counts.cumsum(1) * counts + parts.position_offset
            positions = _look_up(parts.positions, places)
        x = self._norm(parts.norm, _embed_words(parts, input_ids, token_type_ids) + positions)
        return dropout(x.to(self.dtype), self._p(parts.dropout))

    def _encode_block(
        self,
        index: int,
        block: Block,
        is_last: bool,
        x: Tensor,
        mask: Tensor | None,
        linears: LinearsOfLayer,
    ) -> Tensor:
        own = linears(index, block)
        attend = self._first_token_attends if is_last else self._all_attend
        residual, mixed = attend(x, mask, own.qkv, block)
        projected = dropout(linear(mixed, own.out), self._p(block.projection_dropout))
        x = self._norm(block.attention_norm, projected + residual)
        inner = dropout(feed_forward(x, own.lin1, own.lin2), self._p(block.output_dropout))
        return self._norm(block.output_norm, inner + x)

    def _all_attend(
        self, x: Tensor, mask: Tensor | None, qkv: Linear, block: Block
    ) -> tuple[Tensor, Tensor]:
        p = self._p(block.attention_dropout)
        return x, attention(linear(x, qkv), mask, num_heads=block.num_heads, dropout_p=p)

    def _first_token_attends(
        self, x: Tensor, mask: Tensor | None, qkv: Linear, block: Block
    ) -> tuple[Tensor, Tensor]:
        # Only [CLS] of the last layer reaches the head. It needs the keys and values of all tokens.
        first, p = x[:, :1], self._p(block.attention_dropout)
        query, keys_values = _split_query(qkv)
        q, kv = linear(first, query), linear(x, keys_values)
        return first, first_token_attention(q, kv, mask, num_heads=block.num_heads, dropout_p=p)

    def _norm(self, module: nn.LayerNorm, x: Tensor) -> Tensor:
        # Weight and bias differ in dtype if only one of them is trained.
        weight, bias = module.weight.to(x.dtype), module.bias.to(x.dtype)
        return functional.layer_norm(x, module.normalized_shape, weight, bias, module.eps)

    def _p(self, module: nn.Dropout | None) -> float:
        return float(module.p) if module is not None and self.encoder.training else 0.0

    def encode_packed(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        cu_seq_lens: Tensor,
        max_length: int,
        *,
        token_type_ids: Tensor | None = None,
        layers: Sequence[Linears] | None = None,
        first_tokens: Linears | None = None,
    ) -> Tensor:
        """Encode packed sequences: one after another, without padding.

        Args:
            input_ids: Token ids, shape (num_tokens,).
            position_ids: Place of each token in its sequence, shape (num_tokens,).
            cu_seq_lens: Where each sequence starts, and the end of the last one, int32, shape
                (num_sequences + 1,). A sequence may be empty.
            max_length: Most tokens of a sequence.
            token_type_ids: Type of each token, shape (num_tokens,), or None if all are 0.
            layers: The linears of each layer, their segments counted in tokens; by default those of
                the modules.
            first_tokens: The linears of the last layer for the first token of each sequence, their
                segments counted in sequences; by default those of `layers`.

        Returns:
            The first token of each sequence in the compute dtype, shape (num_sequences, dim).
        """
        x = self._embed_packed(input_ids, position_ids, token_type_ids)
        blocks = read_blocks(self.encoder)
        if layers is None:
            layers = [self.linears(index, block) for index, block in enumerate(blocks)]
        # The query of the last block is computed apart from its keys and values.
        query, keys_values = _split_query(layers[-1].qkv)
        others = layers[-1][1:]
        if first_tokens is not None:
            query, _ = _split_query(first_tokens.qkv)
            others = first_tokens[1:]
        split = [*map(list, layers[:-1]), [query, keys_values, *others]]
        if self.dtype != torch.float32:
            cast_linears = iter(cast_adapters(list(itertools.chain(*split)), self.dtype))
            split = [[next(cast_linears) for _ in own] for own in split]
        for own, block in zip(split[:-1], blocks[:-1], strict=True):
            arguments = (block, own, x, cu_seq_lens, max_length)
            if block.checkpoints:
                x = checkpoint(self._encode_packed_block, *arguments, use_reentrant=False)
            else:
                x = self._encode_packed_block(*arguments)
        return self._encode_first_tokens(blocks[-1], split[-1], x, cu_seq_lens, max_length)

    def _embed_packed(
        self, input_ids: Tensor, position_ids: Tensor, token_type_ids: Tensor | None
    ) -> Tensor:
        parts = read_embeddings(self.encoder)
        words = _embed_words(parts, input_ids, token_type_ids)
        places = position_ids
        if parts.position_offset is not None:
            # Count the tokens but for padding from the start of each sequence.
            counts = input_ids != parts.position_offset
            counted = counts.cumsum(0)
            starts = torch.arange(len(input_ids), device=input_ids.device) - position_ids
            before = (counted - counts.int())[starts]
            places = (counted - before) * counts + parts.position_offset
        positions = _look_up(parts.positions, places)
        # Only one of the two may be trained, in fp32.
        dtype = torch.promote_types(words.dtype, positions.dtype)
        x = self._add_norm(parts.norm, positions.to(dtype), words.to(dtype)).to(self.dtype)
        return dropout(x, self._p(parts.dropout))

    def _encode_packed_block(
        self,
        block: Block,
        own: list[Linear],
        x: Tensor,
        cu_seq_lens: Tensor,
        max_length: int,
    ) -> Tensor:
        num_heads = block.num_heads
        qkv, *others = own
        q, k, v = linear(x, qkv).view(len(x), 3, num_heads, -1).unbind(1)
        mixed = packed_attention(
            q,
            k,
            v,
            cu_seq_lens_q=cu_seq_lens,
            cu_seq_lens_k=cu_seq_lens,
            max_length_q=max_length,
            max_length_k=max_length,
            dropout_p=self._p(block.attention_dropout),
        )
        return self._after_attention(block, others, x, mixed)

    def _encode_first_tokens(
        self,
        block: Block,
        own: list[Linear],
        x: Tensor,
        cu_seq_lens: Tensor,
        max_length: int,
    ) -> Tensor:
        """Compute the last block for the first token of each sequence, which the head reads."""
        num_heads = block.num_heads
        # An empty sequence at the end starts behind the last token.
        first = x.index_select(0, cu_seq_lens[:-1].clamp(max=len(x) - 1))
        query, keys_values, *others = own
        q = linear(first, query).view(len(first), num_heads, -1)
        k, v = linear(x, keys_values).view(len(x), 2, num_heads, -1).unbind(1)
        mixed = packed_attention(
            q,
            k,
            v,
            cu_seq_lens_q=torch.arange(len(first) + 1, dtype=torch.int32, device=x.device),
            cu_seq_lens_k=cu_seq_lens,
            max_length_q=1,
            max_length_k=max_length,
            dropout_p=self._p(block.attention_dropout),
        )
        return self._after_attention(block, others, first, mixed)

    def _after_attention(self, block: Block, own: list[Linear], x: Tensor, mixed: Tensor) -> Tensor:
        """Compute the part of a packed block that follows attention.

        Args:
            block: The block.
            own: Its linears after the attention.
            x: Input of the block, shape (num_tokens, dim).
            mixed: Output of attention, shape (num_tokens, num_heads, head_dim).
        """
        out, lin1, lin2 = own
        projected = linear(mixed.reshape(x.shape), out)
        p = self._p(block.projection_dropout)
        x = self._add_norm(block.attention_norm, projected, x, p=p)
        inner = feed_forward(x, lin1, lin2)
        return self._add_norm(block.output_norm, inner, x, p=self._p(block.output_dropout))

    def _add_norm(
        self, module: nn.LayerNorm, x: Tensor, residual: Tensor, *, p: float = 0.0
    ) -> Tensor:
        return dropout_add_norm(x, residual, module.weight, module.bias, p=p, eps=module.eps)

    def linears(self, index: int, block: Block) -> Linears:
        """Read the linears of one layer as they are now.

        Raises:
            UnsupportedModelError: If the fast forward pass cannot compute one of them.
        """
        parts = _read_linears(block)
        return Linears(
            self._linear(index, 0, parts[:3]),
            self._linear(index, 1, parts[3:4]),
            self._linear(index, 2, parts[4:5]),
            self._linear(index, 3, parts[5:]),
        )

    def _linear(self, index: int, position: int, parts: list[LowRank]) -> Linear:
        """Stack linears with equally many rows, and their adapters."""
        weight = self._stacked((index, position, "weight"), tuple(part.weight for part in parts))
        bias = self._stacked((index, position, "bias"), tuple(part.bias for part in parts))
        rows = len(parts[0].weight)
        adapters = []
        for place, part in enumerate(parts):
            if part.A is not None and part.B is not None:
                start = place * rows
                adapters.append(
                    Adapter(part.A, part.B, part.scale, start, start + rows, part.dropout)
                )
        return Linear(weight, bias, tuple(adapters))

    def _stacked(self, key: tuple[int, int, str], sources: tuple[Tensor, ...]) -> Tensor:
        if any(tensor.requires_grad for tensor in sources):
            # Never kept: an optimizer that writes to `.data` does not change the stamp.
            self.prepared.pop(key, None)
            return _stack(sources, self.dtype)
        ready = self.prepared.get(key)
        if ready is None or ready.stamp != _stamp(sources):
            ready = self.prepared[key] = _prepare(sources, self.dtype)
        return ready.stacked


def _embed_words(parts: Embeddings, input_ids: Tensor, types: Tensor | None) -> Tensor:
    """Return the embeddings of tokens, with those of their types. Without types, all are 0."""
    x = _look_up(parts.words, input_ids)
    if parts.token_types is None:
        return x
    return x + (
        parts.token_types.weight[0] if types is None else _look_up(parts.token_types, types)
    )


def _look_up(table: nn.Embedding, places: Tensor) -> Tensor:
    return functional.embedding(places, table.weight, table.padding_idx)


def _split_query(qkv: Linear) -> tuple[Linear, Linear]:
    """Split a stacked linear into that of the queries, and that of the keys and values."""
    dim = len(qkv.weight) // 3
    # The gradient of one split is one concatenation. Each slice would add a whole gradient, mostly
    # of zeros.
    weights = qkv.weight.split_with_sizes((dim, 2 * dim))
    biases = qkv.bias.split_with_sizes((dim, 2 * dim))
    query = Linear(
        weights[0], biases[0], _within(qkv.adapters, 0, dim), _within(qkv.segments, 0, dim)
    )
    keys_values = Linear(
        weights[1],
        biases[1],
        _within(qkv.adapters, dim, 3 * dim),
        _within(qkv.segments, dim, 3 * dim),
    )
    return query, keys_values


def _within(pairs: tuple[Pair, ...], start: int, stop: int) -> tuple[Pair, ...]:
    """Return the pairs for the output rows `start` to `stop`, counted from `start`."""
    return tuple(
        pair._replace(start=pair.start - start, stop=pair.stop - start)
        for pair in pairs
        if start <= pair.start and pair.stop <= stop
    )
