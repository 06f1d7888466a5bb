"""Portable block-sparse prefill attention in plain PyTorch: batches of lists of similar length through SDPA.

Keys and values are copied once per layer into the order of each pass, so that a list gathers whole tiles. Lists are
sorted by length, cut into batches whose score matrices fit :data:`WORKSPACE_BYTES`, padded to the longest of their
batch, and each batch is one gather and one fused attention call. On the CPU that call is PyTorch's flash kernel, which
returns the LSE; elsewhere scores are materialised within the same bound. A batch has lists of one request, so that a
request's output does not depend on what else is in the forward, to the bit. A mask over all scores costs about what
attention does, so the full tiles of long lists are attended to by themselves, in batches of lists that are equally
long, and merged. Heads that list every causal tile of a request are attended to at once, without tiles, which takes
half the time per key.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .operands import Operands
from .tiles import ABSENT, Region, TileLists, TilePass

WORKSPACE_BYTES = 8 << 20
"""Bound on the mask (or score) matrix of one batch."""

LONG = 32
"""Key tiles from which on a list is long; two calls instead of one cost a short one more than its mask."""

_POSITION_SCALE = 2.0**80
"""Token positions below 2**24 times this are exact in fp32, and a difference of one is a mask of -1.2e24: it vanishes
in exp, yet stays finite, so that a row without keys stays finite too."""

_NO_KEY_LSE = -1e20
"""A row whose LSE is below this saw only masked keys."""


def attend(
    operands: Operands,
    tile_pass: TilePass,
    lists: TileLists,
    out: torch.Tensor,
    lse: torch.Tensor,
    *,
    merge: bool,
) -> None:
    """Attention of one pass; see :class:`.ops.Attend`."""
    query, heads, tiles = operands.query, operands.heads, tile_pass.num_tiles
    if not bool(lists.count.any()):
        if not merge:
            out[tile_pass.rows], lse[tile_pass.rows] = 0, float("-inf")
        return
    dtype = compute_dtype(query.dtype, query.device)
    keys, values = (
        operand.view(operand.shape[0], *tile_pass.keys.slots.shape, -1).flatten(2)
        for operand in operands.in_order(tile_pass.keys, dtype)[:2]
    )
    problem = _Problem(
        query=query[tile_pass.rows].transpose(0, 1).flatten(0, 1).to(dtype),
        keys=keys,
        values=values,
        tile_pass=tile_pass,
        lists=lists,
        group=operands.group,
        scale=operands.scale * operands.key_scale,
    )
    part = query.new_zeros(heads * tile_pass.rows.numel() + 1, operands.value_pool.shape[-1], dtype=dtype)
    part_lse = torch.full(part.shape[:1], float("-inf"), dtype=torch.float32, device=query.device)
    numbers = heads // tile_pass.sharing
    lane_counts = (tile_pass.indptr.diff().long() * tile_pass.sharing).repeat(numbers)
    requests = tile_pass.request.repeat(numbers)
    count = torch.where(_attend_dense(problem, part, part_lse), 0, lists.count)
    full = torch.where((count >= LONG) & (2 * lists.full >= count), lists.full, 0).long()
    for begin, lengths, whole in ((lists.begin.long(), full, True), (lists.begin + full, count - full, False)):
        work = torch.nonzero(lengths).squeeze(1)
        # Longest lists of a request first; among equal ones those with the same number of lanes stay together.
        size = lengths[work] * (tile_pass.lanes + 1) + lane_counts[work]
        work = work[torch.argsort(size, descending=True, stable=True)]
        work = work[torch.argsort(requests[work], stable=True)]
        for batch in _batches(work, requests, lengths, lane_counts, tile_pass.keys.tile_keys, alike=whole):
            entries = None if whole else full
            _attend_batch(problem, batch, tiles, begin[batch], lengths[batch], entries, part, part_lse)
    part, part_lse = part[:-1], part_lse[:-1]
    if operands.value_scale != 1:
        part *= operands.value_scale
    part = part.view(heads, -1, part.shape[1]).transpose(0, 1)
    part_lse = part_lse.view(heads, -1).transpose(0, 1)
    if merge:
        part, part_lse = _merged(out[tile_pass.rows], lse[tile_pass.rows], part, part_lse)
    out[tile_pass.rows] = part.to(out.dtype)
    lse[tile_pass.rows] = part_lse


def _merged(
    out: torch.Tensor, lse: torch.Tensor, part: torch.Tensor, part_lse: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over the keys of both, output [..., D] in the first one's dtype and LSE [...]; a row may see none."""
    total = torch.logaddexp(lse, part_lse)
    share = torch.exp(part_lse - total).nan_to_num_(0.0)[..., None]
    return torch.lerp(out.float(), part.float(), share).to(out.dtype), total


def compute_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype in which a device attends fastest to inputs of ``dtype``.

    On processors without matrix tiles (AMX) PyTorch's kernel needs 5 to 20 % less time in float32 than in bfloat16,
    also where they have bfloat16 dot products, and the parts that are merged are not rounded first.
    """
    half = dtype in {torch.bfloat16, torch.float16}
    if device.type == "cpu" and half and not torch.cpu._is_amx_tile_supported():
        return torch.float32
    return dtype


@dataclass(frozen=True)
class _Problem:
    """A pass with its operands gathered once, so that a list reads whole tiles.

    ``query`` [H * row slots, D]; ``keys``, ``values`` [KV heads, key tiles, tile_keys * D]; ``group``: GQA group.
    """

    query: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    tile_pass: TilePass
    lists: TileLists
    group: int
    scale: float


def _attend_dense(problem: _Problem, out: torch.Tensor, lse: torch.Tensor) -> torch.Tensor:
    """Attention of the heads that list every causal tile of a request; which lists that were, bool [G * T].

    ``out``, ``lse``: of all rows of all heads; the last row is spare.
    """
    tile_pass, lists = problem.tile_pass, problem.lists
    done = torch.zeros_like(lists.reach, dtype=torch.bool)
    apart = tile_pass.region is Region.NEAR and tile_pass.sharing == 1
    if not apart or out.device.type != "cpu" or problem.keys.shape != problem.values.shape:
        return done.flatten()
    causal = torch.div(tile_pass.max_pos, tile_pass.keys.tile_keys, rounding_mode="floor") + 1
    every = (lists.count.view_as(done) == causal) & (lists.reach > tile_pass.max_pos)
    slots = tile_pass.rows.numel()
    for request in sorted(set(tile_pass.request.tolist())):
        tiles = (tile_pass.request == request).nonzero()[:, 0]
        heads = every[:, tiles].all(1).nonzero()[:, 0]
        rows = slice(*tile_pass.indptr[[int(tiles[0]), int(tiles[-1]) + 1]].tolist())
        # Text rows lie before media rows here.
        positions, order = tile_pass.positions[rows].sort()
        first, end = int(positions[0]), int(positions[-1]) + 1
        if heads.numel() == 0 or not torch.equal(positions, torch.arange(first, end, dtype=positions.dtype)):
            continue
        order = order + rows.start
        key_tile = slice(*tile_pass.keys.tile_indptr[[request, request + 1]].tolist())
        k, v = (
            operand[heads // problem.group, key_tile].view(1, len(heads), -1, out.shape[1])[:, :, :end]
            for operand in (problem.keys, problem.values)
        )
        q = problem.query.view(-1, slots, out.shape[1])[heads[:, None], order][None]
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        part, part_lse = flash(q, k[:, :, first:], v[:, :, first:], 0.0, True, scale=problem.scale)
        if first:
            before, before_lse = flash(q, k[:, :, :first], v[:, :, :first], 0.0, False, scale=problem.scale)
            part, part_lse = _merged(before, before_lse, part, part_lse)
        out[:-1].view(-1, slots, out.shape[1])[heads[:, None], order] = part[0]
        lse[:-1].view(-1, slots)[heads[:, None], order] = part_lse[0]
        done[heads[:, None], tiles] = True
    return done.flatten()


def _batches(
    work: torch.Tensor,
    requests: torch.Tensor,
    lengths: torch.Tensor,
    lane_counts: torch.Tensor,
    tile_keys: int,
    *,
    alike: bool,
) -> list[torch.Tensor]:
    """Cuts the sorted work so that a batch is of one request, its padded score matrix fits and at most a third of it is
    padding.

    ``alike``: nothing is padding.
    """
    batches = []
    host_requests, host_lengths, host_lanes = (of_lists[work].tolist() for of_lists in (requests, lengths, lane_counts))
    start = 0
    while start < len(host_lengths):
        longest, lanes, end = host_lengths[start], host_lanes[start], start + 1
        while end < len(host_lengths) and host_requests[end] == host_requests[start]:
            lanes_with = max(lanes, host_lanes[end])
            if 4 * (end + 1 - start) * lanes_with * longest * tile_keys > WORKSPACE_BYTES:
                break
            if 3 * host_lengths[end] < 2 * longest or (alike and host_lengths[end] != longest):
                break
            lanes, end = lanes_with, end + 1
        batches.append(work[start:end])
        start = end
    return batches


def _attend_batch(
    problem: _Problem,
    work: torch.Tensor,
    tiles: int,
    first: torch.Tensor,
    count: torch.Tensor,
    before: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
) -> None:
    """Attention over a part of some lists, each ``g * tiles + query tile``.

    Args:
        first, count: the part's first entry and entries, int64 [B].
        before: entries of each list that ``out`` and ``lse`` already hold, int64 [lists]. None: no list holds any, and
            the parts are full tiles, as many for each.
        out, lse: of all rows of all heads; the last row is spare.
    """
    tile_pass, lists, keys = problem.tile_pass, problem.lists, problem.tile_pass.keys
    device = work.device
    number, tile, sharing = work // tiles, work % tiles, tile_pass.sharing

    # Lanes [B, M]: the heads that share by row; those past a short query tile repeat its first and are dropped at last.
    row_start = tile_pass.indptr[tile].long()
    row_count = tile_pass.indptr[tile + 1] - row_start
    row = torch.arange(int(row_count.max()), device=device).repeat_interleave(sharing)
    row_valid = row < row_count[:, None]
    row_slot = row_start[:, None] + torch.where(row_valid, row, 0)
    head = number[:, None] * sharing + torch.arange(sharing, device=device).repeat(row.numel() // sharing)
    row_index = head * tile_pass.rows.numel() + row_slot

    # Key tiles [B, L]; entries past a short list repeat its first tile and are masked.
    place = torch.arange(int(count.max()), device=device)
    listed = place < count[:, None]
    entry = first[:, None] + torch.where(listed, place, 0)
    key_tile = keys.tile_indptr[tile_pass.request[tile].long()][:, None].long() + lists.tiles[entry]

    mask = None
    if before is not None and not bool((lists.full[work] - before[work] == int(listed.shape[1])).all()):
        key_pos = torch.where(listed[..., None], keys.positions[key_tile], ABSENT).flatten(1)
        sink, reach = lists.sink[number, tile], lists.reach[number, tile]
        mask = _mask(tile_pass.region, tile_pass.positions[row_slot], key_pos, sink, reach)

    def gather(operand: torch.Tensor) -> torch.Tensor:
        index = (number * sharing // problem.group)[:, None] * operand.shape[1] + key_tile
        rows = operand.flatten(0, 1).index_select(0, index.flatten())
        return rows.view(len(work), 1, -1, operand.shape[2] // keys.tile_keys)

    q = problem.query.index_select(0, row_index.flatten()).view(len(work), 1, row_index.shape[1], -1)
    part, part_lse = _attention(q, gather(problem.keys), gather(problem.values), mask, problem.scale)
    part, part_lse = part[:, 0], part_lse[:, 0]
    if mask is not None:
        no_key = part_lse <= _NO_KEY_LSE
        part.masked_fill_(no_key[..., None], 0)
        part_lse.masked_fill_(no_key, float("-inf"))
    if before is not None and bool(before[work].any()):
        part, part_lse = _merged(out[row_index], lse[row_index], part, part_lse)
    # The last row of the outputs is nobody's; leaving rows out costs more than writing them there.
    target = torch.where(row_valid, row_index, out.shape[0] - 1).flatten()
    out.index_copy_(0, target, part.flatten(0, 1))
    lse.index_copy_(0, target, part_lse.flatten())


def _mask(
    region: Region,
    row_pos: torch.Tensor,
    key_pos: torch.Tensor,
    sink: torch.Tensor,
    reach: torch.Tensor,
) -> torch.Tensor:
    """Additive mask fp32 [B, 1, M, N]: 0 where the row sees the key, at most -1e24 elsewhere.

    Each bound on positions is one subtraction and one clamp over the matrix, a quarter of what boolean masks cost.
    """
    upper, key_upper = row_pos, key_pos
    beyond_sink = key_pos.masked_fill(key_pos < sink[:, None], ABSENT)
    if region is Region.FAR:
        upper, key_upper = row_pos - reach[:, None], beyond_sink
    mask = _bound(upper[:, None, :, None], key_upper[:, None, None, :])
    if region is Region.NEAR and bool((reach <= row_pos.amax(1)).any()):
        lower = row_pos - reach[:, None] + 1
        torch.minimum(mask, _bound(beyond_sink[:, None, None, :], lower[:, None, :, None]), out=mask)
    return mask


def _bound(larger: torch.Tensor, smaller: torch.Tensor) -> torch.Tensor:
    """0 where ``smaller <= larger``, hugely negative elsewhere."""
    return (larger.float() * _POSITION_SCALE - smaller.float() * _POSITION_SCALE).clamp_max_(0)


def _attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Batched attention [B, 1, M, D] with its natural-log LSE [B, 1, M] in fp32."""
    if q.device.type == "cpu" and q.shape[-1] == v.shape[-1]:
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        out, lse = flash(q, k, v, 0.0, False, attn_mask=mask, scale=scale)
        return out, lse
    scores = torch.matmul(q.float(), k.float().mT) * scale
    if mask is not None:
        scores += mask
    lse = torch.logsumexp(scores, dim=-1)
    weights = torch.exp(scores - lse[..., None])
    return torch.matmul(weights, v.float()).to(q.dtype), lse
