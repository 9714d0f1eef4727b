"""Triton kernels of chunk attention, backward; none needs an atomic, so that gradients are the same in every run.

All form the probabilities anew from the log-sum-exp. `backward_own` reads and writes what every token has for itself:
its row's delta = grad . out and the own terms. `backward_queries` takes a block of tokens and all heads of one query
group, so that a query's sum over those heads stays in registers. `backward_ends` takes a tile of ends of one head and
a share of the tokens that see them: L tokens have one end, so that there may be fewer tiles than a GPU has processors.
`bring_home` adds the shares' fp32 sums in a fixed order, turns the keys back and adds both to the tokens' gradients.
"""

# ruff: noqa: N803
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import triton
import triton.language as tl

from rat.ops.chunk_attention.kernels import load_angles, load_rows, load_spans, offsets, store_rows, turn


@triton.jit
def query_gradient(
    acc, query, grad, lse, delta, keys, values, key_stride, value_stride, start, stop, first, last, scale,
    MASKED: tl.constexpr, SPANS: tl.constexpr, ALIGN: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add what the ends from `start` to `stop` do to the gradient of the turned queries (not scaled yet)."""
    for begin in tl.range(start, stop, BLOCK_N, disable_licm=True):
        slots = begin + tl.arange(0, BLOCK_N)
        inside = slots < stop
        key = load_rows(keys, offsets(slots, key_stride, ALIGN), inside, WIDTH, BLOCK_D)
        value = load_rows(values, offsets(slots, value_stride, ALIGN), inside, WIDTH, BLOCK_D)
        logits = tl.dot(query, tl.trans(key), input_precision=PRECISION)
        if MASKED:
            seen = slots[None, :] < last[:, None]
            if SPANS:
                seen = seen & (slots[None, :] >= first[:, None])
            logits = tl.where(seen, logits, float("-inf"))
        p = tl.exp2(logits * scale - lse[:, None])
        grad_p = tl.dot(grad, tl.trans(value), input_precision=PRECISION)
        grad_s = p * (grad_p - delta[:, None])
        acc = tl.dot(grad_s.to(key.dtype), key, acc, input_precision=PRECISION)
    return acc


@triton.jit(do_not_specialize=["batches", "length", "heads", "groups", "chunk_size", "q_batch", "q_token", "q_head",
                               "k_batch", "k_token", "k_head", "v_batch", "v_token", "v_head", "grad_batch",
                               "grad_token", "grad_head"])  # fmt: skip
def backward_own(
    q, k, v, cos, sin, spans, out, lse, grad, turned, delta, grad_q, grad_k, grad_v,
    batches, length, heads, groups, chunk_size, scale, scale2,
    q_batch, q_token, q_head, k_batch, k_token, k_head, v_batch, v_token, v_head, grad_batch, grad_token, grad_head,
    SPANS: tl.constexpr, ROTARY: tl.constexpr, ALIGN: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Turned queries, delta (B, H, T) and the own terms of grad_q, grad_k and grad_v."""
    program = tl.program_id(0)
    group = program % groups
    batch = program // groups % batches
    tokens = program // (groups * batches) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = tokens < length
    rows = offsets(tokens, q_token, ALIGN)
    query = q + offsets(batch, q_batch, ALIGN) + offsets(group, q_head, ALIGN)
    query = load_rows(query, rows, inside, WIDTH, BLOCK_D).to(tl.float32)
    home = batch.to(tl.int64) * length * groups * WIDTH + group * WIDTH
    rows_q = offsets(tokens, groups * WIDTH, ALIGN)
    if ROTARY:
        chunk = tokens // chunk_size
        if SPANS:
            chunk, _, _ = load_spans(spans, batches, batch, tokens, length, 0)
        cos_tile, sin_tile = load_angles(cos, sin, chunk, inside, WIDTH, BLOCK_D)
        store_rows(turned + home, rows_q, inside, turn(query, cos_tile, sin_tile, BLOCK_M, BLOCK_D), WIDTH, BLOCK_D)

    sum_q = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for head in tl.range(group, heads, groups, disable_licm=True):
        rows = offsets(tokens, heads * WIDTH, ALIGN)
        place = batch.to(tl.int64) * length * heads * WIDTH + head * WIDTH
        at = (batch.to(tl.int64) * heads + head) * length + tokens
        down = grad + offsets(batch, grad_batch, ALIGN) + offsets(head, grad_head, ALIGN)
        down = load_rows(down, offsets(tokens, grad_token, ALIGN), inside, WIDTH, BLOCK_D).to(tl.float32)
        delta_row = tl.sum(down * load_rows(out + place, rows, inside, WIDTH, BLOCK_D).to(tl.float32), 1)
        tl.store(delta + at, delta_row, mask=inside)
        value = v + offsets(batch, v_batch, ALIGN) + offsets(head, v_head, ALIGN)
        value = load_rows(value, offsets(tokens, v_token, ALIGN), inside, WIDTH, BLOCK_D).to(tl.float32)
        key = k + offsets(batch, k_batch, ALIGN) + offsets(head, k_head, ALIGN)
        key = load_rows(key, offsets(tokens, k_token, ALIGN), inside, WIDTH, BLOCK_D).to(tl.float32)
        p = tl.exp2(tl.sum(query * key, 1) * scale2 - tl.load(lse + at, mask=inside, other=float("inf")))
        grad_s = p * (tl.sum(down * value, 1) - delta_row) * scale
        sum_q += grad_s[:, None] * key
        store_rows(grad_k + place, rows, inside, grad_s[:, None] * query, WIDTH, BLOCK_D)
        store_rows(grad_v + place, rows, inside, p[:, None] * down, WIDTH, BLOCK_D)
    store_rows(grad_q + home, rows_q, inside, sum_q, WIDTH, BLOCK_D)


@triton.jit(do_not_specialize=["batches", "length", "heads", "groups", "chunk_size", "turned_batch", "turned_token",
                               "turned_head", "grad_batch", "grad_token", "grad_head", "key_batch", "key_head",
                               "key_end", "value_batch", "value_head", "value_end"])  # fmt: skip
def backward_queries(
    turned, end_keys, end_values, cos, sin, spans, lse, grad, delta, grad_q,
    batches, length, heads, groups, chunk_size, scale, scale2,
    turned_batch, turned_token, turned_head, grad_batch, grad_token, grad_head,
    key_batch, key_end, key_head, value_batch, value_end, value_head,
    SPANS: tl.constexpr, ROTARY: tl.constexpr, ALIGN: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add what the ends do to grad_q (B, T, G, d), which holds the own terms."""
    program = tl.program_id(0)
    group = program % groups
    batch = program // groups % batches
    start = (tl.cdiv(length, BLOCK_M) - 1 - program // (groups * batches)) * BLOCK_M
    tokens = start + tl.arange(0, BLOCK_M)
    inside = tokens < length
    if SPANS:
        chunk, first, last = load_spans(spans, batches, batch, tokens, length, 0x7FFFFFFF)
        low, full, high = tl.min(first), tl.min(first), tl.max(last)
    else:
        chunk = tokens // chunk_size
        first, last = chunk, chunk
        low, full = 0, start // chunk_size // BLOCK_N * BLOCK_N
        high = (tl.minimum(start + BLOCK_M, length) - 1) // chunk_size
    query = turned + offsets(batch, turned_batch, ALIGN) + offsets(group, turned_head, ALIGN)
    query = load_rows(query, offsets(tokens, turned_token, ALIGN), inside, WIDTH, BLOCK_D)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for head in tl.range(group, heads, groups, disable_licm=True):
        at = (batch.to(tl.int64) * heads + head) * length + tokens
        lse_row = tl.load(lse + at, mask=inside, other=float("inf"))
        delta_row = tl.load(delta + at, mask=inside, other=0.0)
        down = grad + offsets(batch, grad_batch, ALIGN) + offsets(head, grad_head, ALIGN)
        down = load_rows(down, offsets(tokens, grad_token, ALIGN), inside, WIDTH, BLOCK_D)
        keys = end_keys + offsets(batch, key_batch, ALIGN) + offsets(head, key_head, ALIGN)
        values = end_values + offsets(batch, value_batch, ALIGN) + offsets(head, value_head, ALIGN)
        if not SPANS:
            acc = query_gradient(acc, query, down, lse_row, delta_row, keys, values, key_end, value_end, low, full,
                                 first, last, scale2, False, SPANS, ALIGN, WIDTH, BLOCK_D, BLOCK_N,
                                 PRECISION)  # fmt: skip
        acc = query_gradient(acc, query, down, lse_row, delta_row, keys, values, key_end, value_end, full, high,
                             first, last, scale2, True, SPANS, ALIGN, WIDTH, BLOCK_D, BLOCK_N, PRECISION)  # fmt: skip
    if ROTARY:
        cos_tile, sin_tile = load_angles(cos, sin, chunk, inside, WIDTH, BLOCK_D)
        acc = turn(acc, cos_tile, -sin_tile, BLOCK_M, BLOCK_D)
    target = grad_q + batch.to(tl.int64) * length * groups * WIDTH + group * WIDTH
    rows = offsets(tokens, groups * WIDTH, ALIGN)
    acc = acc * scale + load_rows(target, rows, inside, WIDTH, BLOCK_D).to(tl.float32)
    store_rows(target, rows, inside, acc, WIDTH, BLOCK_D)


@triton.jit
def ends_gradient(
    acc_k, acc_v, key, value, slots, queries, grads, lse, delta, spans,
    batches, batch, length, chunk_size, query_stride, grad_stride, start, stop, scale,
    MASKED: tl.constexpr, SPANS: tl.constexpr, ALIGN: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add what the tokens from `start` to `stop` do to the gradients of a tile of ends (keys: not scaled yet)."""
    for begin in tl.range(start, stop, BLOCK_M, disable_licm=True):
        tokens = begin + tl.arange(0, BLOCK_M)
        inside = tokens < stop
        query = load_rows(queries, offsets(tokens, query_stride, ALIGN), inside, WIDTH, BLOCK_D)
        grad = load_rows(grads, offsets(tokens, grad_stride, ALIGN), inside, WIDTH, BLOCK_D)
        lse_row = tl.load(lse + tokens, mask=inside, other=float("inf"))
        delta_row = tl.load(delta + tokens, mask=inside, other=0.0)
        logits = tl.dot(key, tl.trans(query), input_precision=PRECISION)
        if SPANS:
            _, first, last = load_spans(spans, batches, batch, tokens, length, 0x7FFFFFFF)
            seen = (slots[:, None] >= first[None, :]) & (slots[:, None] < last[None, :])
            logits = tl.where(seen, logits, float("-inf"))
        elif MASKED:
            logits = tl.where(slots[:, None] < (tokens // chunk_size)[None, :], logits, float("-inf"))
        p = tl.exp2(logits * scale - lse_row[None, :])
        acc_v = tl.dot(p.to(grad.dtype), grad, acc_v, input_precision=PRECISION)
        grad_p = tl.dot(value, tl.trans(grad), input_precision=PRECISION)
        grad_s = p * (grad_p - delta_row[None, :])
        acc_k = tl.dot(grad_s.to(query.dtype), query, acc_k, input_precision=PRECISION)
    return acc_k, acc_v


@triton.jit(do_not_specialize=["batches", "length", "heads", "groups", "chunk_size", "ends", "shares", "turned_batch",
                               "turned_token", "turned_head", "grad_batch", "grad_token", "grad_head", "key_batch",
                               "key_head", "key_end", "value_batch", "value_head", "value_end"])  # fmt: skip
def backward_ends(
    turned, end_keys, end_values, spans, ranges, lse, grad, delta, sums,
    batches, length, heads, groups, chunk_size, ends, shares, scale,
    turned_batch, turned_token, turned_head, grad_batch, grad_token, grad_head,
    key_batch, key_end, key_head, value_batch, value_end, value_head,
    SPANS: tl.constexpr, ALIGN: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """sums (2, shares, B, H, E, d): what each share of the tokens does to the ends' keys (turned) and values."""
    program = tl.program_id(0)
    head = program % heads
    batch = program // heads % batches
    part = program // (heads * batches) % shares
    tile = program // (heads * batches * shares)
    slots = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = slots < ends
    # tokens low ... high see an end of the tile, those from `full` on all of them
    if SPANS:
        tiles = tl.cdiv(ends, BLOCK_N)
        low = tl.load(ranges + batch * tiles + tile)
        high = tl.load(ranges + (batches + batch) * tiles + tile)
        full = high
    else:
        low = (tile * BLOCK_N + 1) * chunk_size
        full = (tile + 1) * BLOCK_N * chunk_size
        high = length
    share = tl.cdiv(tl.cdiv(high - low, BLOCK_M), shares) * BLOCK_M
    start = low + part * share
    stop = tl.minimum(start + share, high)
    edge = tl.minimum(tl.maximum(full, start), stop)

    key = end_keys + offsets(batch, key_batch, ALIGN) + offsets(head, key_head, ALIGN)
    key = load_rows(key, offsets(slots, key_end, ALIGN), inside, WIDTH, BLOCK_D)
    value = end_values + offsets(batch, value_batch, ALIGN) + offsets(head, value_head, ALIGN)
    value = load_rows(value, offsets(slots, value_end, ALIGN), inside, WIDTH, BLOCK_D)
    queries = turned + offsets(batch, turned_batch, ALIGN) + offsets(head % groups, turned_head, ALIGN)
    grads = grad + offsets(batch, grad_batch, ALIGN) + offsets(head, grad_head, ALIGN)
    at = (batch.to(tl.int64) * heads + head) * length
    acc_k = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    acc_v = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    acc_k, acc_v = ends_gradient(
        acc_k, acc_v, key, value, slots, queries, grads, lse + at, delta + at, spans,
        batches, batch, length, chunk_size, turned_token, grad_token, start, edge, scale,
        True, SPANS, ALIGN, WIDTH, BLOCK_D, BLOCK_M, PRECISION,
    )  # fmt: skip
    if not SPANS:
        acc_k, acc_v = ends_gradient(
            acc_k, acc_v, key, value, slots, queries, grads, lse + at, delta + at, spans,
            batches, batch, length, chunk_size, turned_token, grad_token, edge, stop, scale,
            False, SPANS, ALIGN, WIDTH, BLOCK_D, BLOCK_M, PRECISION,
        )  # fmt: skip

    plane = (batches * heads).to(tl.int64) * ends * WIDTH
    target = sums + part * plane + (batch * heads + head).to(tl.int64) * ends * WIDTH
    rows = offsets(slots, WIDTH, ALIGN)
    store_rows(target, rows, inside, acc_k, WIDTH, BLOCK_D)
    store_rows(target + shares * plane, rows, inside, acc_v, WIDTH, BLOCK_D)


@triton.jit(do_not_specialize=["batches", "heads", "ends", "shares", "batch_stride",
                               "end_stride"])  # fmt: skip
def bring_home(
    sums, cos, sin, grad_k, grad_v,
    batches, heads, ends, shares, scale, batch_stride, end_stride,
    ADD: tl.constexpr, ROTARY: tl.constexpr, ALIGN: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Sum over the shares: add to the token that was the end, keys turned back, or write given ends' gradients."""
    program = tl.program_id(0)
    head = program % heads
    batch = program // heads % batches
    slots = program // (heads * batches) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = slots < ends
    plane = (batches * heads).to(tl.int64) * ends * WIDTH
    source = sums + (batch * heads + head).to(tl.int64) * ends * WIDTH
    rows = offsets(slots, WIDTH, ALIGN)
    sum_k = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    sum_v = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for part in range(shares):
        sum_k += load_rows(source + part * plane, rows, inside, WIDTH, BLOCK_D)
        sum_v += load_rows(source + (shares + part) * plane, rows, inside, WIDTH, BLOCK_D)
    sum_k *= scale
    if ROTARY:
        cos_tile, sin_tile = load_angles(cos, sin, slots, inside, WIDTH, BLOCK_D)
        sum_k = turn(sum_k, cos_tile, -sin_tile, BLOCK_N, BLOCK_D)
    rows = offsets(slots, end_stride, ALIGN)
    home = offsets(batch, batch_stride, ALIGN) + head * WIDTH
    if ADD:
        sum_k += load_rows(grad_k + home, rows, inside, WIDTH, BLOCK_D).to(tl.float32)
        sum_v += load_rows(grad_v + home, rows, inside, WIDTH, BLOCK_D).to(tl.float32)
    store_rows(grad_k + home, rows, inside, sum_k, WIDTH, BLOCK_D)
    store_rows(grad_v + home, rows, inside, sum_v, WIDTH, BLOCK_D)
