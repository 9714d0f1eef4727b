"""Triton kernels of chunk attention: the forward pass, and the pieces that it shares with the backward.

A program takes a block of tokens of one head. A token's own term starts the softmax (maximum q_t . k_t, sum 1,
weighted values v_t), so no row is ever empty; the ends of earlier chunks then come in tiles. Where rows hold one
document, a tile that every row of the block sees needs no mask, and only the last tiles compare.
"""

# ruff: noqa: N803
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import triton
import triton.language as tl


@triton.jit
def offsets(index, stride, ALIGN: tl.constexpr):
    """index * stride in int64; a multiple of ALIGN, which the host has checked for every stride it hands over.

    The compiler cannot know: strides that depend on the number of tokens are kept out of its specialisation.
    """
    return tl.multiple_of(tl.cast(index, tl.int64) * stride, ALIGN)


@triton.jit
def columns(WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """The columns of a head in a tile that is BLOCK wide, and which of them exist: each half is padded by itself."""
    index = tl.arange(0, BLOCK)
    left: tl.constexpr = (WIDTH + 1) // 2
    column = index - index // (BLOCK // 2) * (BLOCK // 2 - left)
    return column, (index % (BLOCK // 2) < left) & (column < WIDTH)


@triton.jit
def load_rows(pointer, rows, inside, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """A tile of heads that begin at pointer + rows; zeros where a row is not `inside` and in the padding."""
    column, exists = columns(WIDTH, BLOCK)
    mask = inside[:, None]
    if WIDTH != BLOCK:
        mask = mask & exists[None, :]
    return tl.load(pointer + rows[:, None] + column[None, :], mask=mask, other=0.0)


@triton.jit
def store_rows(pointer, rows, inside, tile, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """The counterpart of `load_rows`; rounds to the pointer's type."""
    column, exists = columns(WIDTH, BLOCK)
    mask = inside[:, None]
    if WIDTH != BLOCK:
        mask = mask & exists[None, :]
    tl.store(pointer + rows[:, None] + column[None, :], tile.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def load_angles(cos, sin, position, inside, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Rows `position` of the tables (positions, WIDTH / 2), padded to BLOCK / 2 columns."""
    column = tl.arange(0, BLOCK // 2)
    mask = inside[:, None]
    if WIDTH != BLOCK:
        mask = mask & (column < WIDTH // 2)[None, :]
    at = position[:, None] * (WIDTH // 2) + column[None, :]
    return tl.load(cos + at, mask=mask, other=0.0), tl.load(sin + at, mask=mask, other=0.0)


@triton.jit
def turn(x, cos, sin, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Rotary embedding of an fp32 tile; the first half of a head is paired with the second."""
    first, second = tl.split(tl.permute(tl.reshape(x, (ROWS, 2, BLOCK // 2)), (0, 2, 1)))
    turned = tl.join(first * cos - second * sin, second * cos + first * sin)
    return tl.reshape(tl.permute(turned, (0, 2, 1)), (ROWS, BLOCK))


@triton.jit
def load_spans(spans, batches, batch, tokens, length, nothing):
    """(chunk, first, last) of tokens from the int32 (3, B, T) table; outside the row a token sees nothing."""
    at = batch.to(tl.int64) * length + tokens
    plane = batches.to(tl.int64) * length
    inside = tokens < length
    chunk = tl.load(spans + at, mask=inside, other=0)
    first = tl.load(spans + plane + at, mask=inside, other=nothing)
    last = tl.load(spans + 2 * plane + at, mask=inside, other=0)
    return chunk, first, last


@triton.jit(do_not_specialize=["batches", "ends", "heads", "x_batch", "x_end", "x_head", "out_batch", "out_end",
                               "out_head"])  # fmt: skip
def turn_ends(
    x, cos, sin, out,
    batches, ends, heads, x_batch, x_end, x_head, out_batch, out_end, out_head,
    ALIGN: tl.constexpr, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Turn the key at the end of each chunk by the chunk's number, (B, E, H, d)."""
    program = tl.program_id(0)
    head = program % heads
    batch = program // heads % batches
    slots = program // (heads * batches) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = slots < ends
    source = x + offsets(batch, x_batch, ALIGN) + offsets(head, x_head, ALIGN)
    tile = load_rows(source, offsets(slots, x_end, ALIGN), inside, WIDTH, BLOCK_D).to(tl.float32)
    cos_tile, sin_tile = load_angles(cos, sin, slots, inside, WIDTH, BLOCK_D)
    target = out + offsets(batch, out_batch, ALIGN) + offsets(head, out_head, ALIGN)
    rows = offsets(slots, out_end, ALIGN)
    store_rows(target, rows, inside, turn(tile, cos_tile, sin_tile, BLOCK_N, BLOCK_D), WIDTH, BLOCK_D)


@triton.jit
def attend(
    acc, top, total, q, keys, values, key_stride, value_stride, start, stop, first, last, scale,
    MASKED: tl.constexpr, SPANS: tl.constexpr, ALIGN: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Take the ends from `start` to `stop` into the softmax; logits are in base 2."""
    for begin in tl.range(start, stop, BLOCK_N, disable_licm=True):
        slots = begin + tl.arange(0, BLOCK_N)
        inside = slots < stop
        key = load_rows(keys, offsets(slots, key_stride, ALIGN), inside, WIDTH, BLOCK_D)
        logits = tl.dot(q, tl.trans(key), input_precision=PRECISION)
        if MASKED:
            seen = slots[None, :] < last[:, None]
            if SPANS:
                seen = seen & (slots[None, :] >= first[:, None])
            logits = tl.where(seen, logits, float("-inf"))
        higher = tl.maximum(top, tl.max(logits, 1) * scale)
        p = tl.exp2(logits * scale - higher[:, None])
        shrink = tl.exp2(top - higher)
        total = total * shrink + tl.sum(p, 1)
        value = load_rows(values, offsets(slots, value_stride, ALIGN), inside, WIDTH, BLOCK_D)
        acc = tl.dot(p.to(value.dtype), value, acc * shrink[:, None], input_precision=PRECISION)
        top = higher
    return acc, top, total


@triton.jit(do_not_specialize=["batches", "length", "heads", "groups", "chunk_size", "q_batch", "q_token", "q_head",
                               "k_batch", "k_token", "k_head", "v_batch", "v_token", "v_head", "key_batch",
                               "key_head", "key_end", "value_batch", "value_head", "value_end"])  # fmt: skip
def forward(
    q, k, v, end_keys, end_values, cos, sin, spans, out, lse,
    batches, length, heads, groups, chunk_size, scale,
    q_batch, q_token, q_head, k_batch, k_token, k_head, v_batch, v_token, v_head,
    key_batch, key_end, key_head, value_batch, value_end, value_head,
    SPANS: tl.constexpr, ROTARY: tl.constexpr, ALIGN: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out (B, T, H, d) and the base-2 log-sum-exp (B, H, T); `scale` is log2(e) / sqrt(d)."""
    program = tl.program_id(0)
    head = program % heads
    batch = program // heads % batches
    # the longest rows first: what starts last should be short
    start = (tl.cdiv(length, BLOCK_M) - 1 - program // (heads * batches)) * BLOCK_M
    tokens = start + tl.arange(0, BLOCK_M)
    inside = tokens < length

    own = k + offsets(batch, k_batch, ALIGN) + offsets(head, k_head, ALIGN)
    own = load_rows(own, offsets(tokens, k_token, ALIGN), inside, WIDTH, BLOCK_D)
    query = q + offsets(batch, q_batch, ALIGN) + offsets(head % groups, q_head, ALIGN)
    query = load_rows(query, offsets(tokens, q_token, ALIGN), inside, WIDTH, BLOCK_D)
    # both stand at the same position, so that no rotation changes this product
    top = tl.sum(query.to(tl.float32) * own.to(tl.float32), 1) * scale
    total = tl.full((BLOCK_M,), 1.0, tl.float32)
    acc = v + offsets(batch, v_batch, ALIGN) + offsets(head, v_head, ALIGN)
    acc = load_rows(acc, offsets(tokens, v_token, ALIGN), inside, WIDTH, BLOCK_D).to(tl.float32)

    if SPANS:
        chunk, first, last = load_spans(spans, batches, batch, tokens, length, 0x7FFFFFFF)
        low, full, high = tl.min(first), tl.min(first), tl.max(last)
    else:
        chunk = tokens // chunk_size
        first, last = chunk, chunk
        low, full = 0, start // chunk_size // BLOCK_N * BLOCK_N
        high = (tl.minimum(start + BLOCK_M, length) - 1) // chunk_size
    if ROTARY:
        cos_tile, sin_tile = load_angles(cos, sin, chunk, inside, WIDTH, BLOCK_D)
        query = turn(query.to(tl.float32), cos_tile, sin_tile, BLOCK_M, BLOCK_D).to(query.dtype)
    keys = end_keys + offsets(batch, key_batch, ALIGN) + offsets(head, key_head, ALIGN)
    values = end_values + offsets(batch, value_batch, ALIGN) + offsets(head, value_head, ALIGN)
    if not SPANS:
        acc, top, total = attend(acc, top, total, query, keys, values, key_end, value_end, low, full, first, last,
                                 scale, False, SPANS, ALIGN, WIDTH, BLOCK_D, BLOCK_N, PRECISION)  # fmt: skip
    acc, top, total = attend(acc, top, total, query, keys, values, key_end, value_end, full, high, first, last,
                             scale, True, SPANS, ALIGN, WIDTH, BLOCK_D, BLOCK_N, PRECISION)  # fmt: skip

    target = out + batch.to(tl.int64) * length * heads * WIDTH + head * WIDTH
    rows = offsets(tokens, heads * WIDTH, ALIGN)
    store_rows(target, rows, inside, acc / total[:, None], WIDTH, BLOCK_D)
    at = (batch.to(tl.int64) * heads + head) * length + tokens
    tl.store(lse + at, top + tl.log2(total), mask=inside)
