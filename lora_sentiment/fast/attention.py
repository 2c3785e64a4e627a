"""The attention kernels of a GPU, and attention over packed rows."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

BACKENDS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
"""Backends of `scaled_dot_product_attention` on a GPU: all but cuDNN, which needs 0.1 to 1 s for
each new shape."""


def attention_backends(device: torch.device) -> AbstractContextManager[None]:
    """Return a context without cuDNN's attention on a GPU. On other devices it changes nothing."""
    if device.type != "cuda":
        return nullcontext()
    return sdpa_kernel(BACKENDS)


def packed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    cu_seq_lens_q: Tensor,
    cu_seq_lens_k: Tensor,
    max_length_q: int,
    max_length_k: int,
    dropout_p: float,
) -> Tensor:
    """Multi-head attention within each of several packed sequences.

    In a 16-bit dtype, a GPU of compute capability 8.0 or more runs flash attention (Dao 2023).
    Other GPUs and dtypes take the memory-efficient kernel. Other devices take a mask over all
    tokens, which is the definition that tests compare with.

    Args:
        q: Queries, shape (num_queries, num_heads, head_dim).
        k: Keys, shape (num_tokens, num_heads, head_dim).
        v: Values, same shape as k.
        cu_seq_lens_q: Where the queries of each sequence start, and the end, int32, shape
            (num_sequences + 1,).
        cu_seq_lens_k: The same for keys and values.
        max_length_q: Most queries of a sequence.
        max_length_k: Most keys of a sequence.
        dropout_p: Probability of dropping an attention weight.

    Returns:
        Shape of q. Queries of a sequence without keys give 0 and get a gradient of 0.
    """
    lengths = (max_length_q, max_length_k)
    if cu_seq_lens_q is cu_seq_lens_k:
        return _attend(q, k, v, cu_seq_lens_q, cu_seq_lens_k, *lengths, dropout_p)
    # The memory-efficient kernel leaves the output and the gradient of such queries unset.
    num_queries = cu_seq_lens_q.diff()
    without_keys = cu_seq_lens_k.diff() == 0
    without_keys = without_keys.repeat_interleave(num_queries, output_size=len(q))[:, None, None]
    q = q.masked_fill(without_keys, 0.0)
    mixed = _attend(q, k, v, cu_seq_lens_q, cu_seq_lens_k, *lengths, dropout_p)
    return mixed.masked_fill(without_keys, 0.0)


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seq_lens_q: Tensor,
    cu_seq_lens_k: Tensor,
    max_length_q: int,
    max_length_k: int,
    dropout_p: float,
) -> Tensor:
    """Choose the kernel of `packed_attention`."""
    if q.device.type != "cuda":
        return _masked_attention(q, k, v, cu_seq_lens_q, cu_seq_lens_k, dropout_p)
    if q.dtype != torch.float32 and torch.cuda.get_device_capability(q.device) >= (8, 0):
        y: Tensor = torch.ops.aten._flash_attention_forward(
            q,
            k,
            v,
            cu_seq_lens_q,
            cu_seq_lens_k,
            max_length_q,
            max_length_k,
            dropout_p,
            False,
            False,
        )[0]
        return y
    packed: Tensor = torch.ops.aten._efficient_attention_forward(
        q[None],
        k[None],
        v[None],
        None,
        cu_seq_lens_q,
        cu_seq_lens_k,
        max_length_q,
        max_length_k,
        dropout_p,
        0,
        torch.is_grad_enabled(),
    )[0]
    return packed[0]


def _masked_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seq_lens_q: Tensor, cu_seq_lens_k: Tensor, dropout_p: float
) -> Tensor:
    """Attention of all queries to all keys, with a mask for the keys of the same sequence."""
    sequence_of_q = _sequence_numbers(cu_seq_lens_q)
    sequence_of_k = _sequence_numbers(cu_seq_lens_k)
    mask = sequence_of_q[:, None] == sequence_of_k[None, :]
    q, k, v = (each.transpose(0, 1)[None] for each in (q, k, v))
    mixed = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout_p)
    return mixed[0].transpose(0, 1)


def _sequence_numbers(cu_seq_lens: Tensor) -> Tensor:
    lengths = cu_seq_lens.diff()
    return torch.arange(len(lengths), device=lengths.device).repeat_interleave(lengths)
