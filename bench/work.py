"""The FLOPs and bytes that one call is said to need. Everything shown as a fraction of a roofline rests on these.

A multiply-add is two FLOPs. Only matrix products are counted: softmax, masks and normalisation are the
implementation's own business. Bytes are the fewest that must cross the memory bus: each operand read once, each
result written once; nothing that a fused kernel would keep on the chip. Padding and recomputation are not work.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Work:
    """Of one call."""

    flops: float
    bytes: float
    items: float
    unit: str


def window_attention(tokens: int, channels: int, slots: int, itemsize: int, *, backward: bool) -> Work:
    """T tokens of C channels in windows of N slots. Forward 4TNC FLOPs and 4TC numbers (q, k, v in; o out);
    backward 10TNC and 7TC more (q, k, v, do in; dq, dk, dv out). The bias (h N^2 numbers) is left out: it stays
    in the cache."""
    flops, numbers = 4 * tokens * slots * channels, 4 * tokens * channels
    if backward:
        flops, numbers = flops + 10 * tokens * slots * channels, numbers + 7 * tokens * channels
    return Work(flops, numbers * itemsize, tokens, "tokens")


def latent_attention(
    visible: int,
    queries: int,
    batch: int,
    heads: int,
    kv_heads: int,
    qk_dim: int,
    v_dim: int,
    itemsize: int,
    *,
    backward: bool,
) -> Work:
    """M queries per sample, `visible` keys over the whole batch. Forward 2hM(dqk + dv) FLOPs per key; backward
    2hM(3 dqk + 2 dv) more, the logits computed again. Numbers: q, k, v in and o out; backward q, k, v, do in and
    dq, dk, dv out."""
    flops = 2 * heads * queries * visible * (qk_dim + v_dim)
    keys = visible * kv_heads * (qk_dim + v_dim)
    q, o = batch * queries * heads * qk_dim, batch * queries * heads * v_dim
    numbers = keys + q + o
    if backward:
        flops += 2 * heads * queries * visible * (3 * qk_dim + 2 * v_dim)
        numbers += 2 * keys + 2 * q + o
    return Work(flops, numbers * itemsize, visible, "keys")


def contrastive_loss(pairs: int, width: int, itemsize: int, *, backward: bool) -> Work:
    """N pairs of D numbers. Forward 2N^2 D FLOPs and 2ND numbers (image, text in); backward twice that in FLOPs, and 2ND
    more numbers (both gradients out). Logits that are made again are no work."""
    flops, numbers = 2 * pairs**2 * width, 2 * pairs * width
    if backward:
        flops, numbers = 3 * flops, 2 * numbers
    return Work(flops, numbers * itemsize, pairs, "pairs")


def swin_block(tokens: int, channels: int, slots: int, hidden: int, itemsize: int, *, backward: bool) -> Work:
    """A whole Swin block: qkv, attention, output projection, two feed-forward products; backward twice the linear
    layers' forward. Bytes: input and output once (backward: both and both gradients), and the weights."""
    linear = 2 * tokens * channels * (4 * channels + 2 * hidden)
    weights = channels * (4 * channels + 2 * hidden)
    flops, numbers = linear + 4 * tokens * slots * channels, 2 * tokens * channels + weights
    if backward:
        flops += 2 * linear + 10 * tokens * slots * channels
        numbers += 3 * tokens * channels + 2 * weights
    return Work(flops, numbers * itemsize, tokens, "tokens")


def cross_attention_layer(
    keys: int,
    queries: int,
    batch: int,
    q_dim: int,
    kv_dim: int,
    inner: int,
    itemsize: int,
    *,
    backward: bool,
) -> Work:
    """Projections of q, k, v and out around attention over `keys` keys per sample (Perceiver's cross-attention)."""
    linear = 2 * batch * (queries * 2 * q_dim * inner + keys * 2 * kv_dim * inner)
    weights = 2 * (q_dim + kv_dim) * inner
    flops = linear + 4 * batch * queries * keys * inner
    numbers = batch * (2 * queries * q_dim + keys * kv_dim) + weights
    if backward:
        flops += 2 * linear + 10 * batch * queries * keys * inner
        numbers += batch * (3 * queries * q_dim + 2 * keys * kv_dim) + 2 * weights
    return Work(flops, numbers * itemsize, batch * keys, "keys")


def linear_cross_entropy(tokens: int, width: int, vocabulary: int, itemsize: int, *, backward: bool) -> Work:
    """M tokens of width H over a vocabulary V. Forward 2MHV FLOPs, hidden and weight in; backward 4MHV more, and both
    gradients out. The logits are left out: a fused kernel would keep them on the chip."""
    flops, numbers = 2 * tokens * width * vocabulary, (tokens + vocabulary) * width
    return Work(
        3 * flops if backward else flops, numbers * itemsize * (2 if backward else 1), tokens, "tokens"
    )


def optimizer_step(parameters: int, itemsize: int) -> Work:
    """AdamW with clipping: gradients read twice (their norm comes first), weights and both moments read and written."""
    return Work(0.0, 8 * parameters * itemsize, parameters, "parameters")
