"""Triton kernels of the gated recurrence s_t = g_t s_{t-1} + (1 - g_t) y_t, for one or two streams under one gate.

A program walks a span of tokens, one after the other, for a tile (tiles, channels): its rows are the parts of the gate
that a narrow stream meets one after the other (channel j of the gate reads channel j mod WIDTH), so that the narrow
stream is read once for all of them and its gradient is a sum inside the program. Loads run ahead of the walk.

Tensors are (tokens, channels), the rows of a batch one below the other; D = TILES * WIDTH channels in the gate, the
states and the gradients of the states, D or WIDTH in the streams. States and sums are fp32 (fp64 for fp64 logits).

The constants: WIDTH channels of the narrow stream; TILES of them in the gate; STREAMS 1 or 2 (of one, the second names
are never read); NARROW_0, NARROW_1 whether a stream has WIDTH channels; SPAN tokens in a span; CHUNK tokens after which
the state starts from zero, in whole numbers in a span (0: never); BIAS and FLAGS whether those are given; ROWS and
BLOCK the sides of a tile, powers of two; STAGES how many tokens are in flight.
"""

# ruff: noqa: N803, N806
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import triton
import triton.language as tl

# What `flags` (tokens,) says of a token, other than 0: it empties the state before it; it leaves the state as it is.
EMPTIES = tl.constexpr(1)
SKIPS = tl.constexpr(2)


@triton.jit
def _place(spans, WIDTH: tl.constexpr, TILES: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """This program's row of the batch and span, and its channels in the gate and in a narrow stream, with masks."""
    columns = tl.cdiv(WIDTH, BLOCK)
    span = tl.program_id(0) // columns
    narrow = tl.program_id(0) % columns * BLOCK + tl.arange(0, BLOCK)[None, :]
    tile = tl.arange(0, ROWS)[:, None]
    inside = narrow < WIDTH
    return (span // spans).to(tl.int64), span % spans, tile * WIDTH + narrow, (tile < TILES) & inside, narrow, inside


@triton.jit
def _gate(x):
    """sigmoid(x) and 1 - sigmoid(x), each to full relative precision."""
    small = tl.exp(-tl.abs(x))
    large = 1.0 / (1.0 + small)
    small *= large
    return tl.where(x >= 0, large, small), tl.where(x >= 0, small, large)


@triton.jit
def _marks(flags, token, step, CHUNK: tl.constexpr, FLAGS: tl.constexpr):
    """Whether a token empties the state before it, and whether it leaves that state as it is."""
    fresh, skipped = False, False
    if CHUNK > 0:
        fresh = step % CHUNK == 0
    elif FLAGS:
        flag = tl.load(flags + token)
        fresh, skipped = flag == EMPTIES, flag == SKIPS
    return fresh, skipped


@triton.jit
def _next(state, gate, inflow, y, fresh, skipped):
    """The state after a token, from the one before it."""
    after = gate * tl.where(fresh, 0.0, state) + inflow * y
    return tl.where(skipped, state, after)


@triton.jit
def _back(total, gate, fresh, skipped):
    """What a token hands to the one before it, of the whole gradient of its own state."""
    return tl.where(skipped, total, tl.where(fresh, 0.0, gate * total))


@triton.jit
def _pull(total, gate, inflow, before, y, fresh, skipped):
    """The gradients of a token's y and logit, from the whole gradient a of its state: a (1 - g), and that (s_t - y).

    The difference is taken as g (s_{t-1} - y): where the gate is nearly shut s_t is close to y, and an s_t that was
    rounded to the outputs' dtype would leave little of it.
    """
    grad_y = tl.where(skipped, 0.0, total * inflow)
    change = gate * (tl.where(fresh, 0.0, before) - y)
    return grad_y, tl.where(skipped, 0.0, grad_y * change)


@triton.jit
def _over_tiles(gradient, NARROW: tl.constexpr):
    """The gradient of a stream: for a narrow one, the sum over the tiles that read it."""
    if NARROW:
        gradient = tl.sum(gradient, axis=0, keep_dims=True)
    return gradient


@triton.jit(do_not_specialize=["length", "spans"])
def scan_forward(
    logits,
    bias,  # (D,)
    flags,
    stream_0,
    stream_1,
    entries,  # (batch, spans, STREAMS, D), the state that enters each span; not read where CHUNK > 0
    output_0,
    output_1,
    finals,  # (batch, STREAMS, D), the state after the last token
    length,
    spans,
    logits_stride,
    stride_0,
    stride_1,
    WIDTH: tl.constexpr,
    TILES: tl.constexpr,
    STREAMS: tl.constexpr,
    NARROW_0: tl.constexpr,
    NARROW_1: tl.constexpr,
    SPAN: tl.constexpr,
    CHUNK: tl.constexpr,
    BIAS: tl.constexpr,
    FLAGS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Walk a span and write the state after every token."""
    WIDE: tl.constexpr = finals.dtype.element_ty
    D: tl.constexpr = WIDTH * TILES
    row, span, wide, inside, narrow, narrow_inside = _place(spans, WIDTH, TILES, ROWS, BLOCK)
    where_0, inside_0 = (narrow, narrow_inside) if NARROW_0 else (wide, inside)
    where_1, inside_1 = (narrow, narrow_inside) if NARROW_1 else (wide, inside)
    state_0 = tl.zeros([ROWS, BLOCK], WIDE)
    state_1 = state_0
    added = state_0
    if BIAS:
        added = tl.load(bias + wide, inside, 0.0).to(WIDE)
    if CHUNK == 0:
        entry = (row * spans + span) * STREAMS * D + wide
        state_0 = tl.load(entries + entry, inside, 0.0)
        if STREAMS == 2:
            state_1 = tl.load(entries + entry + D, inside, 0.0)
    start = row * length + span * SPAN
    for step in tl.range(0, tl.minimum(SPAN, length - span * SPAN), num_stages=STAGES):
        token = start + step
        x = tl.load(logits + token * logits_stride + wide, inside, 0.0).to(WIDE) + added
        y_0 = tl.load(stream_0 + token * stride_0 + where_0, inside_0, 0.0).to(WIDE)
        if STREAMS == 2:
            y_1 = tl.load(stream_1 + token * stride_1 + where_1, inside_1, 0.0).to(WIDE)
        fresh, skipped = _marks(flags, token, step, CHUNK, FLAGS)
        gate, inflow = _gate(x)
        state_0 = _next(state_0, gate, inflow, y_0, fresh, skipped)
        tl.store(output_0 + token * D + wide, state_0, inside)
        if STREAMS == 2:
            state_1 = _next(state_1, gate, inflow, y_1, fresh, skipped)
            tl.store(output_1 + token * D + wide, state_1, inside)
    if span == spans - 1:
        last = row * STREAMS * D + wide
        tl.store(finals + last, state_0, inside)
        if STREAMS == 2:
            tl.store(finals + last + D, state_1, inside)


@triton.jit(do_not_specialize=["length", "spans"])
def scan_backward(
    logits,
    bias,
    flags,
    stream_0,
    stream_1,
    initial,  # (batch, STREAMS, D), the state before the first token; not read where CHUNK > 0
    output_0,
    output_1,
    gradient_0,  # of the outputs
    gradient_1,
    entering,  # (batch, spans, STREAMS, D), what reaches a span from its right; (batch, STREAMS, D) where CHUNK > 0
    grad_logits,
    grad_stream_0,
    grad_stream_1,
    grad_bias,  # (batch, spans, D), each span's part
    grad_initial,  # (batch, STREAMS, D); not written where CHUNK > 0
    length,
    spans,
    logits_stride,
    stride_0,
    stride_1,
    gradient_stride_0,
    gradient_stride_1,
    WIDTH: tl.constexpr,
    TILES: tl.constexpr,
    STREAMS: tl.constexpr,
    NARROW_0: tl.constexpr,
    NARROW_1: tl.constexpr,
    SPAN: tl.constexpr,
    CHUNK: tl.constexpr,
    BIAS: tl.constexpr,
    FLAGS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Walk a span backwards and write the gradients of logits, streams, bias and initial state."""
    WIDE: tl.constexpr = entering.dtype.element_ty
    D: tl.constexpr = WIDTH * TILES
    row, span, wide, inside, narrow, narrow_inside = _place(spans, WIDTH, TILES, ROWS, BLOCK)
    where_0, inside_0 = (narrow, narrow_inside) if NARROW_0 else (wide, inside)
    where_1, inside_1 = (narrow, narrow_inside) if NARROW_1 else (wide, inside)
    added = tl.zeros([ROWS, BLOCK], WIDE)
    bias_sum = added
    if BIAS:
        added = tl.load(bias + wide, inside, 0.0).to(WIDE)
    edge = row * STREAMS * D + wide
    if CHUNK > 0:
        right, reached = edge, inside & (span == spans - 1)
    else:
        right, reached = (row * spans + span) * STREAMS * D + wide, inside
    carry_0 = tl.load(entering + right, reached, 0.0)
    if STREAMS == 2:
        carry_1 = tl.load(entering + right + D, reached, 0.0)
    begin = span * SPAN
    count = tl.minimum(SPAN, length - begin)
    for back in tl.range(0, count, num_stages=STAGES):
        step = count - 1 - back
        token = row * length + begin + step
        fresh, skipped = _marks(flags, token, step, CHUNK, FLAGS)
        # The state before is zero at a chunk's first token, and the initial one at a row's.
        known = inside & (step % CHUNK > 0 if CHUNK > 0 else begin + step > 0)
        x = tl.load(logits + token * logits_stride + wide, inside, 0.0).to(WIDE) + added
        y_0 = tl.load(stream_0 + token * stride_0 + where_0, inside_0, 0.0).to(WIDE)
        before_0 = tl.load(output_0 + (token - 1) * D + wide, known, 0.0).to(WIDE)
        total_0 = tl.load(gradient_0 + token * gradient_stride_0 + wide, inside, 0.0).to(WIDE) + carry_0
        if CHUNK == 0:
            before_0 += tl.load(initial + edge, inside & (begin + step == 0), 0.0)
        if STREAMS == 2:
            y_1 = tl.load(stream_1 + token * stride_1 + where_1, inside_1, 0.0).to(WIDE)
            before_1 = tl.load(output_1 + (token - 1) * D + wide, known, 0.0).to(WIDE)
            total_1 = tl.load(gradient_1 + token * gradient_stride_1 + wide, inside, 0.0).to(WIDE) + carry_1
            if CHUNK == 0:
                before_1 += tl.load(initial + edge + D, inside & (begin + step == 0), 0.0)
        gate, inflow = _gate(x)
        grad_y, grad_x = _pull(total_0, gate, inflow, before_0, y_0, fresh, skipped)
        carry_0 = _back(total_0, gate, fresh, skipped)
        grad_y = _over_tiles(grad_y, NARROW_0)
        tl.store(grad_stream_0 + token * (WIDTH if NARROW_0 else D) + where_0, grad_y, inside_0)
        if STREAMS == 2:
            grad_y, more = _pull(total_1, gate, inflow, before_1, y_1, fresh, skipped)
            carry_1 = _back(total_1, gate, fresh, skipped)
            grad_x += more
            grad_y = _over_tiles(grad_y, NARROW_1)
            tl.store(grad_stream_1 + token * (WIDTH if NARROW_1 else D) + where_1, grad_y, inside_1)
        tl.store(grad_logits + token * D + wide, grad_x, inside)
        bias_sum += grad_x
    if BIAS:
        tl.store(grad_bias + (row * spans + span) * D + wide, bias_sum, inside)
    if CHUNK == 0 and span == 0:
        tl.store(grad_initial + edge, carry_0, inside)
        if STREAMS == 2:
            tl.store(grad_initial + edge + D, carry_1, inside)


@triton.jit(do_not_specialize=["length", "spans"])
def span_summary(
    logits,
    bias,
    flags,
    stream_0,  # the gradient of an output where REVERSE
    stream_1,
    increments,  # (batch, spans, STREAMS, D)
    products,  # (batch, spans, D)
    length,
    spans,
    logits_stride,
    stride_0,
    stride_1,
    WIDTH: tl.constexpr,
    TILES: tl.constexpr,
    STREAMS: tl.constexpr,
    NARROW_0: tl.constexpr,
    NARROW_1: tl.constexpr,
    SPAN: tl.constexpr,
    BIAS: tl.constexpr,
    FLAGS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
    REVERSE: tl.constexpr,
):
    """What a span does to the state that enters it: x leaves as increment + product x.

    Where REVERSE, x is the gradient that enters from the right and leaves to the left.
    """
    WIDE: tl.constexpr = increments.dtype.element_ty
    D: tl.constexpr = WIDTH * TILES
    row, span, wide, inside, narrow, narrow_inside = _place(spans, WIDTH, TILES, ROWS, BLOCK)
    where_0, inside_0 = (narrow, narrow_inside) if NARROW_0 else (wide, inside)
    where_1, inside_1 = (narrow, narrow_inside) if NARROW_1 else (wide, inside)
    state_0 = tl.zeros([ROWS, BLOCK], WIDE)
    state_1 = state_0
    added = state_0
    product = state_0 + 1.0
    if BIAS:
        added = tl.load(bias + wide, inside, 0.0).to(WIDE)
    count = tl.minimum(SPAN, length - span * SPAN)
    for step in tl.range(0, count, num_stages=STAGES):
        token = row * length + span * SPAN + (count - 1 - step if REVERSE else step)
        x = tl.load(logits + token * logits_stride + wide, inside, 0.0).to(WIDE) + added
        y_0 = tl.load(stream_0 + token * stride_0 + where_0, inside_0, 0.0).to(WIDE)
        if STREAMS == 2:
            y_1 = tl.load(stream_1 + token * stride_1 + where_1, inside_1, 0.0).to(WIDE)
        fresh, skipped = _marks(flags, token, step, 0, FLAGS)
        gate, inflow = _gate(x)
        product = _back(product, gate, fresh, skipped)
        if REVERSE:
            state_0 = _back(state_0 + y_0, gate, fresh, skipped)
            if STREAMS == 2:
                state_1 = _back(state_1 + y_1, gate, fresh, skipped)
        else:
            state_0 = _next(state_0, gate, inflow, y_0, fresh, skipped)
            if STREAMS == 2:
                state_1 = _next(state_1, gate, inflow, y_1, fresh, skipped)
    place = row * spans + span
    tl.store(products + place * D + wide, product, inside)
    tl.store(increments + place * STREAMS * D + wide, state_0, inside)
    if STREAMS == 2:
        tl.store(increments + place * STREAMS * D + D + wide, state_1, inside)


@triton.jit(do_not_specialize=["spans"])
def hand_over(
    first,  # (batch, STREAMS, D), what enters the first span, or the last one where REVERSE
    increments,
    products,
    entries,  # (batch, spans, STREAMS, D)
    spans,
    D: tl.constexpr,
    STREAMS: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
    REVERSE: tl.constexpr,
):
    """Hand the states of a row from span to span, and write what enters each."""
    columns = tl.cdiv(D, BLOCK)
    row = (tl.program_id(0) // columns).to(tl.int64)
    channel = tl.program_id(0) % columns * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside = channel < D
    each = tl.arange(0, STREAMS)[:, None] * D + channel
    state = tl.load(first + row * STREAMS * D + each, inside, 0.0)
    for step in tl.range(0, spans, num_stages=STAGES):
        place = row * spans + (spans - 1 - step if REVERSE else step)
        product = tl.load(products + place * D + channel, inside, 0.0)
        increment = tl.load(increments + place * STREAMS * D + each, inside, 0.0)
        tl.store(entries + place * STREAMS * D + each, state, inside)
        state = increment + product * state
