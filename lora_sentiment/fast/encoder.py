"""The fast forward of DistilBERT: exact, for plain linears with or without LoRA, and for the [CLS] token only.

`use_fast_encoder` replaces the forward of one DistilBertModel instance and nothing else. It owns no parameter and no
weight format: adapters and trainable weights are read from the modules in every forward, and prepared copies of frozen
weights are rebuilt when their sources change.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar, cast

import torch
from peft import PeftModel
from peft.tuners import lora
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.distilbert.modeling_distilbert import (
    DistilBertForSequenceClassification,
    DistilBertModel,
    DistilBertSelfAttention,
    TransformerBlock,
)

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

FAST_DEVICES = ("cpu", "cuda")
"""Kinds of devices on which the fast forward pass was tested."""


def why_not_on(device: torch.device) -> str | None:
    """Return why the fast forward pass does not run on a device, or None where it does."""
    if device.type in FAST_DEVICES:
        return None
    return f"the device is {device.type}, and the fast forward pass was tested on {' and '.join(FAST_DEVICES)} only"


@dataclass(frozen=True)
class LowRank:
    """One linear as y = x W^T + b + scale * dropout(x) A^T B^T, by reference to the tensors of its module.

    weight: (out_features, in_features), A: (r, in_features), B: (out_features, r); A and B are None without adapter.
    """

    weight: Tensor
    bias: Tensor
    A: Tensor | None = None
    B: Tensor | None = None
    scale: float = 1.0
    dropout: float = 0.0


def low_rank(module: nn.Module) -> LowRank | str:
    """Reads one linear of the encoder as a weight plus at most one low-rank pair, or says why it is not one."""
    base = module.get_base_layer() if type(module) is lora.Linear else module
    if type(base) is not nn.Linear:
        return f"{type(base).__name__} is neither a torch.nn.Linear nor PEFT's LoRA of one"
    if not base.weight.is_floating_point():
        return f"its base weight is quantised ({base.weight.dtype})"
    if base.bias is None:
        return "it has no bias"
    if type(module) is not lora.Linear:
        return LowRank(base.weight, base.bias)
    if module.merged:
        return f"the adapters {module.merged_adapters} are merged into its base weight"
    active = (
        []
        if module.disable_adapters
        else [name for name in module.active_adapters if name in module.lora_A]
    )
    if not active:
        return LowRank(base.weight, base.bias)
    if len(active) > 1:
        return f"several adapters are active: {active}"
    return _low_rank_pair(module, active[0], base)


def _low_rank_pair(module: lora.Linear, name: str, base: nn.Linear) -> LowRank | str:
    if name in module.lora_variant:
        return f"its adapter is a {type(module.lora_variant[name]).__name__}, not plain LoRA"
    if module.lora_bias.get(name):
        return "its adapter has a bias (lora_bias)"
    down, up, drop = module.lora_A[name], module.lora_B[name], module.lora_dropout[name]
    if type(down) is not nn.Linear or type(up) is not nn.Linear:
        return f"its adapter is made of {type(down).__name__} and {type(up).__name__}"
    if type(drop) not in (nn.Identity, nn.Dropout):
        return f"its adapter drops through {type(drop).__name__}"
    p = float(drop.p) if isinstance(drop, nn.Dropout) and drop.training else 0.0
    return LowRank(base.weight, base.bias, down.weight, up.weight, float(module.scaling[name]), p)


def use_fast_encoder(model: nn.Module, *, compute_dtype: torch.dtype) -> str | None:
    """Gives the DistilBertModel inside `model` the fast forward, or leaves it alone.

    Args:
        model: A DistilBertForSequenceClassification, or a PeftModel around one.
        compute_dtype: Dtype of the encoder's arithmetic. Its output is fp32 whatever this is.

    Returns:
        None where the fast forward is in place, else the reason why it cannot be, naming the module.
    """
    if isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning:
        return f"{type(model.active_peft_config).__name__} feeds embeddings, not input_ids"
    classifiers = [
        part for part in model.modules() if type(part) is DistilBertForSequenceClassification
    ]
    if len(classifiers) != 1 or type(classifiers[0].distilbert) is not DistilBertModel:
        return f"{type(model).__name__} holds no DistilBertForSequenceClassification over a plain DistilBertModel"
    encoder = classifiers[0].distilbert
    use_stock_encoder(model)
    reason = why_not_on(next(encoder.parameters()).device) or _why_not(encoder)
    if reason is None:
        encoder.forward = FastForward(encoder, compute_dtype).forward
    return reason


def use_stock_encoder(model: nn.Module) -> None:
    """Gives the DistilBertModel inside `model` its own forward back; does nothing where it has it."""
    for part in model.modules():
        if isinstance(part, DistilBertModel) and _is_fast(part):
            del part.forward


def takes_packed_rows(model: nn.Module) -> bool:
    """Return whether the forward pass of `model` takes rows without padding, as `FastForward.encode_packed` does."""
    for part in model.modules():
        if isinstance(part, DistilBertModel) and _is_fast(part):
            return has_packable_heads(part)
    return False


def has_packable_heads(encoder: DistilBertModel) -> bool:
    """Return whether a GPU's attention kernels take the encoder's heads: whole groups of eight values."""
    return (encoder.config.dim // encoder.config.n_heads) % 8 == 0


def checkpoint_activations(model: nn.Module) -> None:
    """Has each block keep its input alone and compute the rest again in the backward pass, with either forward."""
    model.activation_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
    # Only reentrant checkpoints need the gradient of embeddings that nobody trains, for which PEFT's models get a hook.
    model.disable_input_require_grads()  # type: ignore[operator]


def _is_fast(module: nn.Module) -> bool:
    return isinstance(getattr(module.__dict__.get("forward"), "__self__", None), FastForward)


def _why_not(encoder: DistilBertModel) -> str | None:
    config = encoder.config
    if config.activation != "gelu":
        return f"ffn.activation: {config.activation!r} is not 'gelu'"
    if config.output_hidden_states or config.output_attentions:
        return "config: output_hidden_states and output_attentions need every token of every layer"
    for name, module in encoder.named_modules():
        where = name or "distilbert"
        if "forward" in module.__dict__:
            return f"{where}: its forward was replaced, for instance by an accelerate hook"
        if _has_foreign_hook(module):
            return f"{where}: it has a forward hook that the fast forward would skip"
    return _unfit_embedding_or_norm(encoder) or _unfit_linear(encoder)


def _has_foreign_hook(module: nn.Module) -> bool:
    # transformers' own capturing hooks act only when hidden states or attentions are asked for, which is refused.
    hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    return any(
        getattr(hook, "__module__", "") != "transformers.utils.output_capturing" for hook in hooks
    )


def _unfit_embedding_or_norm(encoder: DistilBertModel) -> str | None:
    kinds = {
        "word_embeddings": nn.Embedding,
        "position_embeddings": nn.Embedding,
        "layer_norm": nn.LayerNorm,
    }
    for name, module in encoder.named_modules():
        for suffix, kind in {**kinds, "embeddings.LayerNorm": nn.LayerNorm}.items():
            if name.endswith(suffix) and type(module) is not kind:
                return f"{name}: {type(module).__name__} is not a plain {kind.__name__}"
    return None


def named_linears(block: TransformerBlock) -> tuple[tuple[str, nn.Module], ...]:
    """The six linears of a layer with their names, in the order of its forward."""
    # Looked up in every forward, because PEFT replaces modules; get_submodule takes several times as long.
    inner, ffn = block.attention, block.ffn
    return (
        ("attention.q_lin", inner.q_lin),
        ("attention.k_lin", inner.k_lin),
        ("attention.v_lin", inner.v_lin),
        ("attention.out_lin", inner.out_lin),
        ("ffn.lin1", ffn.lin1),
        ("ffn.lin2", ffn.lin2),
    )


def _unfit_linear(encoder: DistilBertModel) -> str | None:
    for index, block in enumerate(encoder.transformer.layer):
        for name, module in named_linears(cast(TransformerBlock, block)):
            answer = low_rank(module)
            if isinstance(answer, str):
                return f"transformer.layer.{index}.{name}: {answer}"
    return None


class Linears(NamedTuple):
    """The linears of one layer; qkv: (3 * dim, dim) is q_lin, k_lin and v_lin one below the other."""

    qkv: Linear
    out_lin: Linear
    lin1: Linear
    lin2: Linear


Pair = TypeVar("Pair", Adapter, Segment)
LinearsOfLayer = Callable[[int, TransformerBlock], Linears]


class _Prepared(NamedTuple):
    """Frozen tensors one below the other in the compute dtype, and what they were made from.

    The sources are held, so that no other tensor can come to lie at the address in the stamp.
    """

    sources: tuple[Tensor, ...]
    stamp: tuple[tuple[int, int], ...]
    stacked: Tensor


def _stamp(sources: tuple[Tensor, ...]) -> tuple[tuple[int, int], ...]:
    return tuple(
        (tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version) for tensor in sources
    )


def _stack(sources: tuple[Tensor, ...], dtype: torch.dtype) -> Tensor:
    tensors = [tensor.to(dtype) for tensor in sources]
    return torch.cat(tensors) if len(tensors) > 1 else tensors[0]


def _prepare(sources: tuple[Tensor, ...], dtype: torch.dtype) -> _Prepared:
    # What is made under inference_mode cannot be kept for a later backward pass.
    with torch.inference_mode(False), torch.no_grad():
        frozen = tuple(
            tensor.clone() if tensor.is_inference() else tensor.detach() for tensor in sources
        )
        return _Prepared(sources, _stamp(sources), _stack(frozen, dtype))


class FastForward:
    """The forward that replaces DistilBertModel's; `forward` has the stock signature."""

    def __init__(self, encoder: DistilBertModel, compute_dtype: torch.dtype) -> None:
        self.encoder = encoder
        self.dtype = compute_dtype
        self.prepared: dict[tuple[int, int, str], _Prepared] = {}

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        position_ids: Tensor | None = None,
        cu_seq_lens_q: Tensor | None = None,
        max_length_q: int | None = None,
        **kwargs: Any,
    ) -> BaseModelOutput:
        """Encodes input_ids: (batch, length) and returns last_hidden_state: (batch, 1, dim), that of [CLS], in fp32.

        attention_mask: (batch, length) of 0 and 1, or None where every token counts, which is faster than a mask of
        ones: whether one is that is not looked at, for a GPU would have to be waited for.

        With cu_seq_lens_q the sequences lie one after another without padding, as `encode_packed` describes:
        input_ids and position_ids are (1, num_tokens), and last_hidden_state is (num_sequences, 1, dim).

        Raises:
            ModelError: Where something is asked for that only the stock forward gives, or an adapter was changed
                into something that it cannot compute.
        """
        if (
            cu_seq_lens_q is not None
            and input_ids is not None
            and position_ids is not None
            and max_length_q
        ):
            with torch.autocast(input_ids.device.type, enabled=False):
                first = self.encode_packed(
                    input_ids[0], position_ids[0], cu_seq_lens_q, max_length_q
                )
            return BaseModelOutput(last_hidden_state=first.float()[:, None])
        given = {
            "inputs_embeds": inputs_embeds,
            "position_ids": position_ids,
            "cu_seq_lens_q": cu_seq_lens_q,
        }
        asked = [name for name, value in given.items() if value is not None]
        asked += [
            name for name in ("output_hidden_states", "output_attentions") if kwargs.get(name)
        ]
        if input_ids is None or asked:
            what = ", ".join(asked) or "no input_ids"
            raise ModelError(
                f"the fast encoder was given {what}; it takes input_ids and attention_mask only: use the stock encoder"
            )
        if attention_mask is not None and attention_mask.shape != input_ids.shape:
            raise ModelError(
                f"the fast encoder was given an attention_mask of shape {tuple(attention_mask.shape)} for input_ids of "
                f"shape {tuple(input_ids.shape)}; the shapes must agree: use the stock encoder for other masks"
            )
        with torch.autocast(input_ids.device.type, enabled=False):
            return BaseModelOutput(
                last_hidden_state=self.encode(input_ids, attention_mask, self.linears).float()
            )

    def encode(
        self, input_ids: Tensor, attention_mask: Tensor | None, linears: LinearsOfLayer
    ) -> Tensor:
        """Encodes as `forward`, with the linears that `linears` gives for each layer, and returns the compute dtype."""
        mask = self._additive_mask(attention_mask)
        x = self._embed(input_ids)
        blocks = cast(list[TransformerBlock], list(self.encoder.transformer.layer))
        for index, block in enumerate(blocks):
            if block.gradient_checkpointing and block.training:
                # The linears too are read again on the way back: stacked or folded weights are not kept meanwhile.
                x = checkpoint(
                    self._encode_block, index, block, x, mask, linears, use_reentrant=False
                )
            else:
                x = self._encode_block(index, block, x, mask, linears)
        return x

    def encode_packed(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        cu_seq_lens: Tensor,
        max_length: int,
        *,
        layers: Sequence[Linears] | None = None,
        first_tokens: Linears | None = None,
    ) -> Tensor:
        """Encodes sequences that lie one after another.

        Args:
            input_ids: Token ids, shape (num_tokens,).
            position_ids: Place of each token in its sequence, shape (num_tokens,).
            cu_seq_lens: Where each sequence starts, and the end of the last one, int32, shape (num_sequences + 1,).
                A sequence may be empty.
            max_length: Most tokens of a sequence.
            layers: The linears of each layer, their segments counted in tokens; by default those of the modules.
            first_tokens: The linears of the last layer for what only the first token of each sequence passes, their
                segments counted in sequences; by default those of `layers`.

        Returns:
            The first token of each sequence in the compute dtype, shape (num_sequences, dim).
        """
        x = self._embed_packed(input_ids, position_ids)
        blocks = cast(list[TransformerBlock], list(self.encoder.transformer.layer))
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
            done = iter(cast_adapters([each for own in split for each in own], self.dtype))
            split = [[next(done) for _ in own] for own in split]
        for own, block in zip(split[:-1], blocks[:-1], strict=True):
            if block.gradient_checkpointing and block.training:
                x = checkpoint(
                    self._encode_packed_block,
                    block,
                    own,
                    x,
                    cu_seq_lens,
                    max_length,
                    use_reentrant=False,
                )
            else:
                x = self._encode_packed_block(block, own, x, cu_seq_lens, max_length)
        return self._encode_first_tokens(blocks[-1], split[-1], x, cu_seq_lens, max_length)

    def _embed_packed(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        parts = self.encoder.embeddings
        words = functional.embedding(
            input_ids, parts.word_embeddings.weight, parts.word_embeddings.padding_idx
        )
        positions = functional.embedding(position_ids, parts.position_embeddings.weight)
        dtype = torch.promote_types(words.dtype, positions.dtype)  # of the two, one may be trained
        x = self._add_norm(parts.LayerNorm, positions.to(dtype), words.to(dtype)).to(self.dtype)
        return dropout(x, self._p(parts.dropout))

    def _encode_packed_block(
        self,
        block: TransformerBlock,
        own: list[Linear],
        x: Tensor,
        cu_seq_lens: Tensor,
        max_length: int,
    ) -> Tensor:
        num_heads = block.attention.n_heads
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
            dropout_p=self._p(block.attention.dropout),
        )
        return self._after_attention(block, others, x, mixed)

    def _encode_first_tokens(
        self,
        block: TransformerBlock,
        own: list[Linear],
        x: Tensor,
        cu_seq_lens: Tensor,
        max_length: int,
    ) -> Tensor:
        """The last block: only the first token of each sequence reaches the head."""
        num_heads = block.attention.n_heads
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
            dropout_p=self._p(block.attention.dropout),
        )
        return self._after_attention(block, others, first, mixed)

    def _after_attention(
        self, block: TransformerBlock, own: list[Linear], x: Tensor, mixed: Tensor
    ) -> Tensor:
        """What follows attention in a block of packed tokens; own: out_lin, lin1 and lin2.

        x: (num_tokens, dim), mixed: (num_tokens, num_heads, head_dim).
        """
        out_lin, lin1, lin2 = own
        projected = linear(mixed.reshape(x.shape), out_lin)
        x = self._add_norm(block.sa_layer_norm, projected, x)
        inner = feed_forward(x, lin1, lin2)
        return self._add_norm(block.output_layer_norm, inner, x, p=self._p(block.ffn.dropout))

    def _add_norm(
        self, module: nn.LayerNorm, x: Tensor, residual: Tensor, *, p: float = 0.0
    ) -> Tensor:
        return dropout_add_norm(x, residual, module.weight, module.bias, p=p, eps=module.eps)

    def _encode_block(
        self,
        index: int,
        block: TransformerBlock,
        x: Tensor,
        mask: Tensor | None,
        linears: LinearsOfLayer,
    ) -> Tensor:
        own = linears(index, block)
        attend = (
            self._all_attend
            if index < len(self.encoder.transformer.layer) - 1
            else self._first_token_attends
        )
        residual, mixed = attend(x, mask, own.qkv, block.attention)
        x = self._norm(block.sa_layer_norm, linear(mixed, own.out_lin) + residual)
        inner = feed_forward(x, own.lin1, own.lin2)
        return self._norm(block.output_layer_norm, dropout(inner, self._p(block.ffn.dropout)) + x)

    def _additive_mask(self, attention_mask: Tensor | None) -> Tensor | None:
        if attention_mask is None:
            return None
        mask = torch.zeros(attention_mask.shape, dtype=self.dtype, device=attention_mask.device)
        return mask.masked_fill_(attention_mask == 0, torch.finfo(self.dtype).min)[:, None, None, :]

    def _embed(self, input_ids: Tensor) -> Tensor:
        parts = self.encoder.embeddings
        words = functional.embedding(
            input_ids, parts.word_embeddings.weight, parts.word_embeddings.padding_idx
        )
        x = words + parts.position_embeddings.weight[: input_ids.shape[1]]
        return dropout(self._norm(parts.LayerNorm, x).to(self.dtype), self._p(parts.dropout))

    def _p(self, module: nn.Dropout) -> float:
        return float(module.p) if self.encoder.training else 0.0

    def linears(self, index: int, block: TransformerBlock) -> Linears:
        """The linears of one layer as they are now."""
        parts = []
        for name, module in named_linears(block):
            answer = low_rank(module)
            if isinstance(answer, str):
                where = f"transformer.layer.{index}.{name}"
                raise ModelError(
                    f"{where}: {answer}; the fast encoder cannot compute that: use the stock encoder"
                )
            parts.append(answer)
        stacks = (parts[:3], parts[3:4], parts[4:5], parts[5:6])
        return Linears(
            *(self._linear(index, position, stack) for position, stack in enumerate(stacks))
        )

    def _linear(self, index: int, position: int, parts: list[LowRank]) -> Linear:
        weight = self._stacked((index, position, "weight"), tuple(part.weight for part in parts))
        bias = self._stacked((index, position, "bias"), tuple(part.bias for part in parts))
        return Linear(weight, bias, _adapters(parts))

    def _stacked(self, key: tuple[int, int, str], sources: tuple[Tensor, ...]) -> Tensor:
        if any(tensor.requires_grad for tensor in sources):
            # Never kept: an optimizer that writes to `.data` leaves the stamp as it was.
            self.prepared.pop(key, None)
            return _stack(sources, self.dtype)
        ready = self.prepared.get(key)
        if ready is None or ready.stamp != _stamp(sources):
            ready = self.prepared[key] = _prepare(sources, self.dtype)
        return ready.stacked

    def _all_attend(
        self, x: Tensor, mask: Tensor | None, qkv: Linear, module: DistilBertSelfAttention
    ) -> tuple[Tensor, Tensor]:
        p = self._p(module.dropout)
        return x, attention(linear(x, qkv), mask, num_heads=module.n_heads, dropout_p=p)

    def _first_token_attends(
        self, x: Tensor, mask: Tensor | None, qkv: Linear, module: DistilBertSelfAttention
    ) -> tuple[Tensor, Tensor]:
        # Only [CLS] of the last layer reaches the head: it needs keys and values of all tokens, and no more of them.
        first, p = x[:, :1], self._p(module.dropout)
        query, keys_values = _split_query(qkv)
        q, kv = linear(first, query), linear(x, keys_values)
        return first, first_token_attention(q, kv, mask, num_heads=module.n_heads, dropout_p=p)

    def _norm(self, module: nn.LayerNorm, x: Tensor) -> Tensor:
        # Where one of them is trained and the other is not, they differ in dtype.
        weight, bias = module.weight.to(x.dtype), module.bias.to(x.dtype)
        return functional.layer_norm(x, module.normalized_shape, weight, bias, module.eps)


def _adapters(parts: list[LowRank]) -> tuple[Adapter, ...]:
    """The adapters of linears that are stacked in this order; all of them have equally many rows."""
    rows = len(parts[0].weight)
    return tuple(
        Adapter(part.A, part.B, part.scale, position * rows, (position + 1) * rows, part.dropout)
        for position, part in enumerate(parts)
        if part.A is not None and part.B is not None
    )


def _split_query(qkv: Linear) -> tuple[Linear, Linear]:
    dim = len(qkv.weight) // 3
    # The gradient of a split is one concatenation; each slice would add a whole one, mostly of zeros.
    weights, biases = (
        qkv.weight.split_with_sizes((dim, 2 * dim)),
        qkv.bias.split_with_sizes((dim, 2 * dim)),
    )
    query, others = (
        Linear(
            weight,
            bias,
            _within(qkv.adapters, start=start, rows=len(weight)),
            _within(qkv.segments, start=start, rows=len(weight)),
        )
        for weight, bias, start in zip(weights, biases, (0, dim), strict=True)
    )
    return query, others


def _within(pairs: tuple[Pair, ...], *, start: int, rows: int) -> tuple[Pair, ...]:
    """The pairs that add to these output rows, counted from the first of them."""
    return tuple(
        pair._replace(start=pair.start - start, stop=pair.stop - start)
        for pair in pairs
        if start <= pair.start and pair.stop <= start + rows
    )
