"""What a GPU's kernels hold, shown without a GPU: tensors of no bytes, and kernels that allocate alike."""

import contextlib
import weakref
from unittest.mock import patch

import torch
from torch import Tensor
from torch.autograd import Function
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DistilBertConfig, DistilBertForSequenceClassification

from lora_sentiment.fast import encoder
from lora_sentiment.fast.encoder import use_fast_encoder
from lora_sentiment.models.families import Shape
from lora_sentiment.models.load import Base
from lora_sentiment.models.wrap import make_trainable
from lora_sentiment.recipe.method import LINEARS

META = torch.device("meta")


def make_model(shape, method, model, *, dtype, fast):
    """A model whose tensors have shapes and no bytes."""
    sizes = {name: getattr(shape, name) for name in Shape.__dataclass_fields__}
    with META:
        plain = DistilBertForSequenceClassification(DistilBertConfig(**sizes))
    base = Base(plain, None, "meta", None, "", shape, False)
    trained = make_trainable(base, method, model, dtype=dtype)
    if fast:
        with patch.object(encoder, "FAST_DEVICES", ("meta",)):
            assert use_fast_encoder(trained, compute_dtype=dtype) is None
    return trained.train()


class Held(TorchDispatchMode):
    """Adds up the bytes of all tensors that are made inside and still live.

    Attributes:
        now: Bytes that live.
        peak: The most that lived at once.
    """

    def __init__(self, *, own):
        super().__init__()
        self.now = self.peak = 0
        self.seen = {}
        for tensor in own:
            self._add(tensor, counts=False)

    def _add(self, tensor, *, counts=True):
        storage = tensor.untyped_storage()
        if storage._cdata in self.seen:
            return
        size = storage.nbytes() if counts else 0
        self.now += size
        self.peak = max(self.peak, self.now)
        self.seen[storage._cdata] = size
        weakref.finalize(storage, self._drop, storage._cdata)

    def _drop(self, key):
        self.now -= self.seen.pop(key)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        for each in found if isinstance(found, tuple | list) else [found]:
            if isinstance(each, Tensor):
                self._add(each)
        return found


class _Flash(Function):
    """Attention that keeps no weights: flash, and the memory-efficient kernel."""

    @staticmethod
    def forward(ctx, q, k, v):
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:-1], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx, grad):
        q, k, v, *_ = ctx.saved_tensors
        sums = q.new_empty(q.shape, dtype=torch.float32)
        grads = tuple(
            torch.empty(each.shape, dtype=each.dtype, device=each.device) for each in (q, k, v)
        )
        del sums
        return grads


class _DropoutAddNorm(Function):
    """What `fast/fused.py` keeps and allocates where its kernels run."""

    @staticmethod
    def forward(ctx, x, residual, weight, bias, p):
        z = torch.empty_like(x)
        ctx.save_for_backward(
            weight, z, *(x.new_empty(len(x), dtype=torch.float32) for _ in range(2))
        )
        ctx.p = p
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx, grad):
        weight, z, *_ = ctx.saved_tensors
        _, _, needs_weight, needs_bias, _ = ctx.needs_input_grad
        grad_residual = torch.empty_like(z)
        grad_x = torch.empty_like(z) if ctx.p else grad_residual
        sums = (torch.empty_like(weight) if needs else None for needs in (needs_weight, needs_bias))
        return grad_x, grad_residual, *sums, None


def packed_attention(q, k, v, **options):
    return _Flash.apply(q, k, v)


def dropout_add_norm(x, residual, weight, bias, *, p, eps):
    if torch.is_grad_enabled() and any(each.requires_grad for each in (x, residual, weight, bias)):
        return _DropoutAddNorm.apply(x, residual, weight, bias, p)
    return torch.empty_like(x)


class _Int8(Function):
    """bitsandbytes' MatMul8bitLt on a GPU, without outliers; the weight stands for its 8 bits."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        rows = x.reshape(-1, x.shape[-1])
        half = rows.to(torch.float16)
        magnitudes = half.abs()
        outliers = magnitudes >= 6.0
        del magnitudes
        codes = torch.empty_like(half, dtype=torch.int8)
        del half, outliers
        products = codes.new_empty(len(rows), len(weight), dtype=torch.int32)
        out = torch.empty_like(products, dtype=torch.float16)
        del products
        ctx.weight = weight
        ctx.rows = rows if x.requires_grad else None
        return out.to(x.dtype).view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx, grad):
        weight = torch.empty_like(ctx.weight, dtype=grad.dtype)
        return grad @ weight, None, None


class _FourBit(Function):
    """bitsandbytes' MatMul4Bit on a GPU for more rows than its own kernel takes."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.weight = weight
        return x @ torch.empty_like(weight, dtype=x.dtype).t() + 0 * bias.to(x.dtype)[0]

    @staticmethod
    def backward(ctx, grad):
        return grad @ torch.empty_like(ctx.weight, dtype=grad.dtype), None, None


class Autocast(TorchFunctionMode):
    """CUDA's autocast, for what DistilBERT's stock forward calls; quantised products for frozen linears."""

    def __init__(self, dtype, quantize, linears):
        super().__init__()
        self.dtype, self.quantize, self.linears, self.casts = dtype, quantize, linears, {}

    def _cast(self, tensor):
        if tensor is None or self.dtype in (None, tensor.dtype):
            return tensor
        if tensor.is_leaf and tensor.requires_grad and torch.is_grad_enabled():
            if id(tensor) not in self.casts:
                self.casts[id(tensor)] = tensor.to(self.dtype)
            return self.casts[id(tensor)]
        return tensor.to(self.dtype)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        functional = torch.nn.functional
        if func is functional.linear:
            x, weight, bias = (*args, *kwargs.values(), None)[:3]
            if self.quantize == "int8" and id(weight) in self.linears:
                return _Int8.apply(x, weight, bias)
            if self.quantize == "nf4" and id(weight) in self.linears:
                return _FourBit.apply(x.to(self.dtype), weight, bias).to(x.dtype)
            return func(self._cast(x), self._cast(weight), self._cast(bias))
        if func is functional.layer_norm and self.dtype is not None:
            x, shape, weight, bias, eps = (*args, *kwargs.values())[:5]
            x, weight, bias = (each.to(torch.float32) for each in (x, weight, bias))
            return func(x, shape, weight, bias, eps)
        if func is functional.scaled_dot_product_attention:
            q, k, v = (self._cast(each) for each in args[:3])
            # Their layout is (batch, length, heads, ...) in memory, as the kernel's own output.
            return _Flash.apply(*(each.transpose(1, 2) for each in (q, k, v))).transpose(1, 2)
        if func is functional.dropout:
            x, p, training = (
                (*args, *kwargs.values())[:3] if len(args) + len(kwargs) > 2 else (*args, True)
            )
            return torch.native_dropout(x, p, training)[0] if training and p else x
        return func(*args, **kwargs)


def prepared(model):
    forwards = (getattr(vars(part).get("forward"), "__self__", None) for part in model.modules())
    return [
        ready.stacked
        for forward in forwards
        if forward is not None
        for ready in forward.prepared.values()
    ]


def run(model, monkeypatch, *, fast, rows, length, dtype, quantize="none", backward=True):
    """Bytes beyond the model that a forward pass leaves behind for backward, and the peak of both passes."""
    monkeypatch.setattr("lora_sentiment.fast.encoder.packed_attention", packed_attention)
    monkeypatch.setattr("lora_sentiment.fast.encoder.dropout_add_norm", dropout_add_norm)
    # The device of no bytes has no autocast; `Autocast` stands for it.
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: contextlib.nullcontext())
    if dtype != torch.float32:
        monkeypatch.setattr(torch, "is_autocast_enabled", lambda *args: not fast)
    num_tokens = rows * length
    with META:
        if fast:
            inputs = {
                "input_ids": torch.zeros(1, num_tokens, dtype=torch.int32),
                "position_ids": torch.zeros(1, num_tokens, dtype=torch.int32),
                "cu_seq_lens_q": torch.zeros(rows + 1, dtype=torch.int32),
                "max_length_q": length,
            }
        else:
            inputs = {
                "input_ids": torch.zeros(rows, length, dtype=torch.int64),
                "attention_mask": None,
            }
    linears = {
        id(parameter)
        for name, parameter in model.named_parameters()
        if any(f".{each}." in name for each in LINEARS)
        and not parameter.requires_grad
        and parameter.ndim == 2
    }
    grad = contextlib.nullcontext() if backward else torch.no_grad()
    if fast:
        with torch.no_grad():
            model(**{**inputs})  # prepares what it keeps
    own = [*model.parameters(), *model.buffers(), *prepared(model)]
    with Held(own=own) as held, grad, Autocast(None if fast else dtype, quantize, linears) as cast:
        logits = model(**inputs).logits
        cast.casts.clear()  # at the end of autocast's context
        saved = held.now
        if backward:
            logits.float().sum().backward()
    for parameter in model.parameters():
        parameter.grad = None
    return saved, held.peak
