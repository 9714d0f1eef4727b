"""The Triton kernel of a decoding step: attention over a share of the chunk ends, and the token itself at the end.

A program takes one row, one head and a share of the ends that they see, tile by tile. Every line of the tile keeps a
softmax of its own; they are joined once, at the end, so that the loop waits for no other thread. The program that
comes last of a row and head joins the shares (each in scratch memory by then), adds the own term, and writes the
output, the states and the new end. No other program reads those, so nothing can be overwritten too early.
"""

# ruff: noqa: N803
# mypy: disable-error-code="no-untyped-def, untyped-decorator"
import triton
import triton.language as tl

# Below every logit, and finite: the difference of two of them is 0, not NaN.
NOTHING = tl.constexpr(-1e38)
# Shares that are joined at a time.
SHARES = tl.constexpr(16)


@triton.jit
def unit_circle(turns):
    """Cosine and sine of 2 pi turns, fp64 to fp32 within an ulp or two: Taylor's series within an eighth of a turn.

    The library's functions keep room on the stack for angles that do not occur here.
    """
    quarter = tl.floor(turns * 4 + 0.5)
    angle = ((turns - quarter * 0.25) * 6.283185307179586).to(tl.float32)
    x = angle * angle
    sine = angle + angle * x * (-1 / 6 + x * (1 / 120 + x * (-1 / 5040 + x * (1 / 362880))))
    cosine = 1 + x * (-0.5 + x * (1 / 24 + x * (-1 / 720 + x * (1 / 40320 - x * (1 / 3628800)))))
    corner = quarter.to(tl.int64) & 3
    across = (corner & 1) == 1
    turned_cosine = tl.where(across, sine, cosine)
    turned_sine = tl.where(across, cosine, sine)
    return (
        tl.where((corner == 1) | (corner == 2), -turned_cosine, turned_cosine),
        tl.where(corner >= 2, -turned_sine, turned_sine),
    )


@triton.jit
def signed_angles(chunk, columns, LOG2_BASE: tl.constexpr, HALF: tl.constexpr):
    """For rotary: x'[j] = x[j] cosine[j] + x[partner[j]] sine[j], where the first half of a head meets the second."""
    first = columns < HALF
    partner = tl.where(first, columns + HALF, columns - HALF)
    pair = tl.where(first, columns, columns - HALF).to(tl.float64)
    turns = chunk.to(tl.float64) * tl.exp2(pair * (-LOG2_BASE / HALF)) * 0.15915494309189535
    cosine, sine = unit_circle(turns)
    return partner, cosine, tl.where(first, -sine, sine)


@triton.jit
def recur(logits, bias, state, y, columns, begun, exists, BIAS: tl.constexpr):
    """g s + (1 - g) y in fp32, where s counts only in chunks that have `begun`."""
    logit = tl.load(logits + columns, mask=exists, other=0.0).to(tl.float32)
    if BIAS:
        logit += tl.load(bias + columns, mask=exists, other=0.0).to(tl.float32)
    gate = tl.sigmoid(logit)
    before = tl.load(state + columns, mask=begun, other=0.0)
    return gate * before + (1 - gate) * tl.load(y + columns, mask=exists, other=0.0).to(tl.float32)


@triton.jit
def attend(
    keys, values, key_slot, value_slot, query, start, stop, columns, exists, SLOTS: tl.constexpr, BLOCK_D: tl.constexpr
):
    """The softmax over slots `start` to `stop`, logits in base 2: its maximum, its sum and the weighted values."""
    top = tl.full([SLOTS], NOTHING, tl.float32)
    total = tl.zeros([SLOTS], tl.float32)
    mixed = tl.zeros([SLOTS, BLOCK_D], tl.float32)
    for begin in range(start, stop, SLOTS):
        slots = begin + tl.arange(0, SLOTS)
        seen = slots < stop
        mask = seen[:, None] & exists[None, :]
        at = slots.to(tl.int64)[:, None]
        key = tl.load(keys + at * key_slot + columns[None, :], mask=mask, other=0.0)
        value = tl.load(values + at * value_slot + columns[None, :], mask=mask, other=0.0)
        logits = tl.where(seen, tl.sum(key.to(tl.float32) * query[None, :], 1), float("-inf"))
        higher = tl.maximum(top, logits)
        weight, shrink = tl.exp2(logits - higher), tl.exp2(top - higher)
        total = total * shrink + weight
        mixed = mixed * shrink[:, None] + weight[:, None] * value.to(tl.float32)
        top = higher
    peak = tl.max(top, 0)
    shrink = tl.exp2(top - peak)
    return peak, tl.sum(total * shrink, 0), tl.sum(mixed * shrink[:, None], 0)


@triton.jit
def join_shares(own, value, tops, totals, mixtures, first, splits, columns, exists, WIDTH: tl.constexpr):
    """One softmax of the own term and of what the programs of this row and head have left in scratch memory."""
    peak, total, mixed = own, tl.full([], 1.0, tl.float32), value
    for begin in range(0, splits, SHARES):
        index = begin + tl.arange(0, SHARES)
        there = index < splits
        at = first.to(tl.int64) + index
        # past the caches of a multiprocessor: other ones have written this
        top = tl.load(tops + at, mask=there, other=NOTHING, cache_modifier=".cg")
        part = tl.load(totals + at, mask=there, other=0.0, cache_modifier=".cg")
        places = at[:, None] * WIDTH + columns[None, :]
        mixture = tl.load(mixtures + places, mask=there[:, None] & exists[None, :], other=0.0, cache_modifier=".cg")
        higher = tl.maximum(peak, tl.max(top, 0))
        shrink, shrinks = tl.exp2(peak - higher), tl.exp2(top - higher)
        total = total * shrink + tl.sum(part * shrinks, 0)
        mixed = mixed * shrink + tl.sum(mixture * shrinks[:, None], 0)
        peak = higher
    return total, mixed


@triton.jit(do_not_specialize=["heads", "groups", "splits", "chunk_size"])
def decode(
    gate_logits, q, k, v, gate_bias, value_state, key_state, end_keys, end_values, lengths, out,
    share_tops, share_totals, share_mixtures, tickets,
    heads, groups, splits, chunk_size, scale,
    gate_row, q_row, q_group, k_row, v_row, value_state_row, key_state_row,
    key_row, key_head, key_slot, value_row, value_head, value_slot,
    WIDTH: tl.constexpr, LOG2_BASE: tl.constexpr, BIAS: tl.constexpr, SPLIT: tl.constexpr,
    SLOTS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One token of one row and head; `scale` is log2(e) / sqrt(d), LOG2_BASE is None without rotary positions."""
    program = tl.program_id(0)
    task = program // splits
    head = task % heads
    group = head % groups
    row = (task // heads).to(tl.int64)
    length = tl.load(lengths + row)
    chunk = (length // chunk_size).to(tl.int32)
    columns = tl.arange(0, BLOCK_D)
    exists = columns < WIDTH

    queries = q + row * q_row + group * q_group
    query = tl.load(queries + columns, mask=exists, other=0.0).to(tl.float32)
    if LOG2_BASE is not None:
        partner, cosine, sine = signed_angles(chunk, columns, LOG2_BASE, WIDTH // 2)
        query = query * cosine + tl.load(queries + partner, mask=exists, other=0.0).to(tl.float32) * sine
    query *= scale

    keys = end_keys + row * key_row + head.to(tl.int64) * key_head
    values = end_values + row * value_row + head.to(tl.int64) * value_head
    share = tl.cdiv(tl.cdiv(chunk, splits), SLOTS) * SLOTS
    start = program % splits * share
    stop = tl.minimum(start + share, chunk)
    top, total, mixed = attend(keys, values, key_slot, value_slot, query, start, stop, columns, exists, SLOTS, BLOCK_D)
    ticket = splits - 1
    if SPLIT:
        tl.store(share_tops + program, top)
        tl.store(share_totals + program, total)
        tl.store(share_mixtures + program.to(tl.int64) * WIDTH + columns, mixed, mask=exists)
        tl.debug_barrier()  # the ticket says that all threads have written
        ticket = tl.atomic_add(tickets + task, 1, sem="acq_rel")

    if ticket == splits - 1:
        logits, bias = gate_logits + row * gate_row + head * WIDTH, gate_bias + head * WIDTH
        new_key, new_value = k + row * k_row + group * WIDTH, v + row * v_row + head * WIDTH
        old_key, old_value = (
            key_state + row * key_state_row + head * WIDTH, value_state + row * value_state_row + head * WIDTH
        )  # fmt: skip
        begun = exists & (length % chunk_size != 0)
        key = recur(logits, bias, old_key, new_key, columns, begun, exists, BIAS)
        value = recur(logits, bias, old_value, new_value, columns, begun, exists, BIAS)
        end = key
        if LOG2_BASE is not None:
            end = key * cosine + recur(logits, bias, old_key, new_key, partner, begun, exists, BIAS) * sine
        own = tl.sum(query * end, 0)
        if SPLIT:
            total, mixed = join_shares(
                own, value, share_tops, share_totals, share_mixtures, task * splits, splits, columns, exists, WIDTH
            )  # fmt: skip
        else:
            peak = tl.maximum(own, top)
            total = total * tl.exp2(top - peak) + tl.exp2(own - peak)
            mixed = mixed * tl.exp2(top - peak) + value * tl.exp2(own - peak)
        tl.debug_barrier()  # every thread has read the states, some of them for its partner
        tl.store(old_key + columns, key, mask=exists)
        tl.store(old_value + columns, value, mask=exists)
        place = chunk.to(tl.int64)
        tl.store(keys + place * key_slot + columns, end.to(end_keys.dtype.element_ty), mask=exists)
        tl.store(values + place * value_slot + columns, value.to(end_values.dtype.element_ty), mask=exists)
        tl.store(out + task.to(tl.int64) * WIDTH + columns, (mixed / total).to(out.dtype.element_ty), mask=exists)
