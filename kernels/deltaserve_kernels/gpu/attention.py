"""Attention over packed rows in one launch: for each tile of queries, an online softmax over the keys its rows may see.

Milakov and Gimelshein, arXiv 1805.02867; Dao, arXiv 2307.08691; the split over keys, pytorch.org/blog/flash-decoding.
A row of a tile is one query at one head of a group, so that all heads of a group share what is read of keys and values.
"""

import torch
import triton
import triton.language as tl

from deltaserve_kernels.attention.paths import Attention, Pair
from deltaserve_kernels.gpu import cut, prefixes
from deltaserve_kernels.gpu.activations import LOG2E, tanh
from deltaserve_kernels.gpu.cut import Cut, Heads
from deltaserve_kernels.gpu.launch import TYPES, on_tensor_cores, power
from deltaserve_kernels.gpu.reads import PART, Reads

COLUMNS = tl.constexpr(cut.COLUMNS)
SLOT_COLUMNS = tl.constexpr(prefixes.COLUMNS)


@triton.jit(do_not_specialize=["heads", "group", "behind", "ahead", "prefixed", "furthest"])
def read(
    q, k, v, out, tiles, board, bias, partials, sums, q_row, q_head, k_row, k_head, v_row, v_head, heads, group,
    scale, softcap, behind, ahead, prefixed, furthest,
    WIDTH: tl.constexpr, D: tl.constexpr, C: tl.constexpr, M: tl.constexpr, N: tl.constexpr, PART: tl.constexpr,
    BIAS: tl.constexpr, HALF: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """out = softmax(softcap(q kᵀ · scale) + bias) v for one tile, one KV head and one part of the keys.

    Token j is at place j, row p of a prefix of n at p − n. A query of index i sees i − behind < place ≤ i + ahead.
    """
    tile, kv, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    here = tiles + tile * COLUMNS
    rows, keys, split = tl.load(here + 1) * group, tl.load(here + 4), tl.load(here + 7)
    begin, end = part * PART, keys
    if split >= 0:
        end = tl.minimum(begin + PART, keys)
    # Of a tile that is not split the first program reads all keys.
    if (rows == 0) | ((part > 0) & ((split < 0) | (begin >= keys))):
        return
    first, position, slot = tl.load(here + 6), tl.load(here + 2), tl.load(here + 5)
    flat = first + tl.arange(0, M)
    live = flat < rows
    query, head = flat // group, kv * group + flat % group
    index = (position + query)[:, None]
    lowest, highest = position + first // group, position + (tl.minimum(first + M, rows) - 1) // group
    at = (tl.load(here) + query).to(tl.int64)
    d, n = tl.arange(0, D), tl.arange(0, N)
    inside = (d < WIDTH)[None, :]
    shown = live[:, None] & inside
    q += (at * q_row + head * q_head)[:, None]
    given = tl.load(q + d[None, :], mask=shown, other=0.0)
    curve = bias + (tl.where(live, head, 0) * (2 * furthest + 1) + furthest)[:, None]

    origin = tl.load(here + 3).to(tl.int64)
    k += origin * k_row + kv * k_head
    v += origin * v_row + kv * v_head
    begin = tl.maximum(begin, lowest - behind + 1)
    end = tl.minimum(end, highest + ahead + 1)
    earlier, earlier_k, earlier_v, wide = 0, k, v, heads // group * WIDTH
    begin_earlier, shift_earlier, shift, biased = 0, 0, 0, 1
    if (slot >= 0) & (prefixed != 0):
        mine = board + slot.to(tl.int64) * SLOT_COLUMNS
        if tl.load(mine) != 0:
            shift, biased = tl.load(mine + 5).to(tl.int32), tl.load(mine + 6).to(tl.int32)
            if part == 0:
                count = tl.load(mine + 3).to(tl.int32)
                begin_earlier = tl.minimum(tl.maximum(-count, lowest - behind + 1), 0)
                earlier = (N - 1 - begin_earlier) // N
                shift_earlier = count + tl.load(mine + 4).to(tl.int32)
                # Place 0 is where the rows end.
                skipped = count.to(tl.int64) * wide + kv * WIDTH
                earlier_k = tl.load(mine + 1).to(tl.pointer_type(k.dtype.element_ty)) + skipped
                earlier_v = tl.load(mine + 2).to(tl.pointer_type(v.dtype.element_ty)) + skipped

    top = tl.full((M,), float("-inf"), tl.float32)
    total = tl.full((M,), 0.0, tl.float32)
    acc = tl.full((M, D), 0.0, tl.float32)
    for block in range(0, earlier + (tl.maximum(end - begin, 0) + N - 1) // N):
        # Blocks of the prefix come first.
        kept = block < earlier
        start = tl.where(kept, begin_earlier + block * N, begin + (block - earlier) * N)
        stop = tl.where(kept, 0, end)
        k_stride, v_stride = tl.where(kept, wide, k_row), tl.where(kept, wide, v_row)
        from_k = tl.where(kept, earlier_k, k) + start.to(tl.int64) * k_stride
        from_v = tl.where(kept, earlier_v, v) + start.to(tl.int64) * v_stride
        if ALIGNED:
            # What is known of k and v is lost where an address was a number.
            k_stride, v_stride = tl.multiple_of(k_stride, 8), tl.multiple_of(v_stride, 8)
            from_k, from_v = tl.multiple_of(from_k, 16), tl.multiple_of(from_v, 16)
        place = start + n
        there = (place < stop)[:, None]
        if HALF:
            read_k = tl.load(from_k + n[:, None] * k_stride + d[None, :], mask=there & inside, other=0.0)
            s = tl.dot(given, tl.trans(read_k))
        else:
            s = tl.full((M, N), 0.0, tl.float32)
            for c in range(0, D, C):
                some = c + tl.arange(0, C)
                few = (some < WIDTH)[None, :]
                left = tl.load(q + some[None, :], mask=live[:, None] & few, other=0.0).to(tl.float32)
                right = tl.load(from_k + n[:, None] * k_stride + some[None, :], mask=there & few, other=0.0)
                s = tl.dot(left, tl.trans(right.to(tl.float32)), s, input_precision="ieee")
        s *= scale
        if softcap > 0:
            s = softcap * tanh(s / softcap)
        seen = (place < stop)[None, :] & (place[None, :] > index - behind) & (place[None, :] <= index + ahead)
        if BIAS:
            distance = place[None, :] + tl.where(kept, shift_earlier, shift) - index
            distance = tl.minimum(tl.maximum(distance, -furthest), furthest)
            s += tl.load(curve + distance, mask=seen & (biased != 0), other=0.0)
        s = tl.where(seen, s * LOG2E, float("-inf"))
        new = tl.maximum(top, tl.max(s, 1))
        # A row that has seen nothing yet has no maximum.
        base = tl.where(new == float("-inf"), 0.0, new)
        p = tl.exp2(s - base[:, None])
        fading = tl.exp2(top - base)
        total = total * fading + tl.sum(p, 1)
        top = new
        read_v = tl.load(from_v + n[:, None] * v_stride + d[None, :], mask=there & inside, other=0.0)
        acc = acc * fading[:, None]
        if HALF:
            acc = tl.dot(p.to(read_v.dtype), read_v, acc)
        else:
            acc = tl.dot(p, read_v.to(tl.float32), acc, input_precision="ieee")
    if split < 0:
        acc = acc / tl.where(total > 0, total, 1.0)[:, None]
        tl.store(out + (at * heads + head)[:, None] * WIDTH + d[None, :], acc.to(out.dtype.element_ty), mask=shown)
    else:
        spot = (split + part * rows + flat).to(tl.int64) * (heads // group) + kv
        tl.store(partials + spot[:, None] * WIDTH + d[None, :], acc, mask=shown)
        tl.store(sums + spot * 2, top, mask=live)
        tl.store(sums + spot * 2 + 1, total, mask=live)


@triton.jit(do_not_specialize=["heads", "group"])
def join(
    out, tiles, partials, sums, heads, group, width, PART: tl.constexpr, D: tl.constexpr, P: tl.constexpr
):  # fmt: skip
    """The parts of one row of a split tile, in their order: out = Σ 2^(m − max) acc / Σ 2^(m − max) total."""
    tile, flat, kv = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    here = tiles + tile * COLUMNS
    rows, keys, place = tl.load(here + 1) * group, tl.load(here + 4), tl.load(here + 7)
    if flat >= rows:
        return
    parts = (keys + PART - 1) // PART
    d = tl.arange(0, D)
    inside = (d < width)[None, :]
    top, total, acc = float("-inf"), 0.0, tl.full((D,), 0.0, tl.float32)
    for start in range(0, parts, P):
        p = start + tl.arange(0, P)
        there = p < parts
        spot = (place + p * rows + flat).to(tl.int64) * (heads // group) + kv
        m = tl.load(sums + spot * 2, mask=there, other=float("-inf"))
        new = tl.maximum(top, tl.max(m, 0))
        base = tl.where(new == float("-inf"), 0.0, new)
        weight, fading = tl.exp2(m - base), tl.exp2(top - base)
        total = total * fading + tl.sum(weight * tl.load(sums + spot * 2 + 1, mask=there, other=0.0), 0)
        found = tl.load(partials + spot[:, None] * width + d[None, :], mask=there[:, None] & inside, other=0.0)
        acc = acc * fading + tl.sum(weight[:, None] * found, 0)
        top = new
    at = (tl.load(here) + flat // group).to(tl.int64) * heads + kv * group + flat % group
    acc = acc / tl.where(total > 0, total, 1.0)
    tl.store(out + at * width + d, acc.to(out.dtype.element_ty), mask=d < width)


WIDEST = 256
"""Of a head."""
FAR = 1 << 30
"""Further than any key is."""
JOINED = {"D": WIDEST, "P": 8}
"""Parts that are joined at a time."""
_ALIGNED = 8
"""Elements: strides that are multiples of them keep rows at 16 bytes."""


def launch(query: torch.Tensor, own: Pair, cache: Pair | None, attention: Attention) -> torch.Tensor:
    """softmax(softcap(q kᵀ · scale) + bias) v: one launch, and one that joins parts where a sequence has several.

    query [rows, heads, d]; own and cache: keys and values [tokens, kv_heads, d]. All of one dtype, d up to 256, the
    last dimension contiguous. Returns [rows, heads, d]; rows of no sequence are zero. Raises ValueError, before
    anything is launched, where that does not hold or a sequence names rows or a slot that are not there.
    """
    heads = _heads(query, own, cache)
    fp32, biased = query.dtype == torch.float32, attention.bias is not None
    cuts = cut.of(attention.sequences, heads, fp32, biased, query.device)
    reads = [(one, own if cache is None or not one.cached else cache) for one in cuts.all]
    for one, source in reads:
        one.check(query.shape[0], source[0].shape[0], attention.prefix.capacity)
    if attention.bias is not None and attention.bias.table.shape[1] != heads.queries:
        raise ValueError(f"bias: its table has {attention.bias.table.shape[1]} heads, queries have {heads.queries}")
    make = torch.empty if cuts.queries == query.shape[0] else torch.zeros
    out = make(query.shape, dtype=query.dtype, device=query.device)
    for one, source in reads:
        _read(out, query, source, one, cuts.reads, heads, attention)
    return out


def _heads(query: torch.Tensor, own: Pair, cache: Pair | None) -> Heads:
    """The heads of one call, once all of its rows are known to go together."""
    held = {"key": own[0], "value": own[1]}
    if cache is not None:
        held |= {"cache's keys": cache[0], "cache's values": cache[1]}
    for name, rows in {"query": query, **held}.items():
        if rows.dtype != query.dtype or rows.dtype not in TYPES:
            raise ValueError(f"{name}: dtype {rows.dtype}, query's is {query.dtype}; all have one of {list(TYPES)}")
        if rows.ndim != 3 or (rows.stride(2) != 1 and rows.shape[2] > 1):
            raise ValueError(f"{name}: strides {rows.stride()}; read are [rows, heads, d] with d contiguous")
    heads = Heads(query.shape[1], own[0].shape[1], query.shape[2])
    if heads.width > WIDEST or heads.queries % heads.keys:
        raise ValueError(f"query: {heads}; heads are {WIDEST} wide at most, and as many for each KV head")
    tokens = own[0].shape[0] if cache is None else cache[0].shape[0]
    for name, rows in held.items():
        count = tokens if name.startswith("cache") else own[0].shape[0]
        if rows.shape != (count, heads.keys, heads.width):
            raise ValueError(f"{name}: shape {tuple(rows.shape)}; {(count, heads.keys, heads.width)} goes with {heads}")
    return heads


def _read(
    out: torch.Tensor, query: torch.Tensor, source: Pair, tiles: Cut, reads: Reads, heads: Heads, attention: Attention
) -> None:
    keys, values = source
    shape = (max(1, tiles.places * heads.keys), heads.width)
    partials = torch.empty(shape, dtype=torch.float32, device=out.device)
    sums = torch.empty(shape[0], 2, dtype=torch.float32, device=out.device)
    bias, prefix = attention.bias, attention.prefix
    curve, furthest = (sums, 0) if bias is None else (bias.curve, bias.furthest)
    strides = (query.stride(0), query.stride(1), keys.stride(0), keys.stride(1), values.stride(0), values.stride(1))
    window = attention.window or FAR
    aligned = heads.width % _ALIGNED == 0 and all(
        t.data_ptr() % 16 == 0 and t.stride(0) % _ALIGNED == t.stride(1) % _ALIGNED == 0 for t in source
    )
    read[(len(tiles.tiles), heads.keys, tiles.parts)](
        query, keys, values, out, tiles.tiles, prefixes.board(prefix, keys.dtype, heads.keys, heads.width), curve,
        partials, sums, *strides, heads.queries, heads.group, attention.scale, attention.softcap or 0.0,
        window, 0 if attention.sequences.causal else window - 1, int(len(prefix) > 0), furthest,
        WIDTH=heads.width, D=power(heads.width), C=reads.c, M=reads.m, N=reads.n, PART=PART,
        BIAS=bias is not None, HALF=on_tensor_cores(query.dtype, keys.dtype), ALIGNED=aligned, num_warps=reads.warps,
    )  # fmt: skip
    if tiles.split is not None:
        join[(len(tiles.split), tiles.rows, heads.keys)](
            out, tiles.split, partials, sums, heads.queries, heads.group, heads.width, PART=PART, **JOINED
        )
