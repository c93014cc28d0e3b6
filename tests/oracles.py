"""What results are compared with: dense masks, torch's BlockMask, random expressions."""

import operator

import torch
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import BlockMask

from flexsparse import (
    Mask,
    b,
    bit_and,
    bit_or,
    bit_xor,
    h,
    kv_idx,
    lookup,
    maximum,
    minimum,
    q_idx,
    where,
)
from flexsparse.analysis.cells import Grid
from flexsparse.analysis.classify import BlockClasses
from flexsparse.expr import Index
from flexsparse.tensors import Opaque

LISTS = (
    ("kv_num_blocks", "kv_indices"),
    ("full_kv_num_blocks", "full_kv_indices"),
    ("q_num_blocks", "q_indices"),
    ("full_q_num_blocks", "full_q_indices"),
)


def everywhere(grid: Grid) -> tuple[torch.Tensor, ...]:
    """b, h, q_idx and kv_idx of every element of a grid, which broadcast."""
    return (
        torch.arange(grid.batch).view(-1, 1, 1, 1),
        torch.tensor(grid.heads).view(1, -1, 1, 1),
        torch.arange(grid.q_len).view(1, 1, -1, 1) + grid.q_offset,
        torch.arange(grid.kv_len),
    )


def dense(mask: Mask, grid: Grid) -> torch.Tensor:
    """The mask element by element: bool [B, H, q_len, kv_len]."""
    return mask(*everywhere(grid)).expand(grid.batch, len(grid.heads), grid.q_len, grid.kv_len)


def dense_classes(kept: torch.Tensor, block_size: tuple[int, int]) -> torch.Tensor:
    """0, 1 or 2 (EMPTY, PARTIAL, FULL) of each block, by looking at every element."""
    q_block, kv_block = block_size
    q_pad, kv_pad = -kept.shape[-2] % q_block, -kept.shape[-1] % kv_block
    padded = torch.nn.functional.pad(kept, (0, kv_pad, 0, q_pad))
    blocks = padded.unflatten(-1, (-1, kv_block)).unflatten(-3, (-1, q_block)).transpose(-2, -3)
    return blocks.flatten(-2).any(-1).int() + blocks.flatten(-2).all(-1).int()


def painted(classes: BlockClasses) -> torch.Tensor:
    """0, 1 or 2 of each block as the rectangles say; fails where two rectangles overlap."""
    grid = classes.grid
    picture = torch.zeros(grid.planes, grid.rows, grid.columns, dtype=torch.int32)
    for value, rectangles in ((1, classes.partial), (2, classes.full)):
        for plane, row0, row1, column0, column1 in zip(
            *(x.tolist() for x in rectangles), strict=True
        ):
            part = picture[plane, row0:row1, column0:column1]
            assert (part == 0).all()
            part.fill_(value)
    return picture.view(grid.batch, len(grid.heads), grid.rows, grid.columns)


def assert_same_lists(ours: BlockMask, theirs: BlockMask) -> None:
    """Counts are equal, and indices up to the count, for keys and queries, partial and full."""
    assert ours.seq_lengths == theirs.seq_lengths
    assert ours.BLOCK_SIZE == theirs.BLOCK_SIZE
    for count_name, index_name in LISTS:
        count, their_count = getattr(ours, count_name), getattr(theirs, count_name)
        assert count.dtype == their_count.dtype
        assert torch.equal(count, their_count), count_name
        index, their_index = getattr(ours, index_name), getattr(theirs, index_name)
        assert index.shape[-1] >= int(count.max())
        n = min(index.shape[-1], their_index.shape[-1])
        used = torch.arange(n) < count[..., None]
        assert torch.equal(index[..., :n][used], their_index[..., :n][used]), index_name
        assert int(index.min()) >= 0
        assert int(index.max()) < max(their_index.shape[-1], 1)


def _table(*shape: int, boolean: bool = False, low: int = -3, high: int = 9):
    seeds = st.integers(0, 1000)

    def build(seed: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        if boolean:
            return torch.rand(shape, generator=generator) < 0.6
        dtype = (torch.int64, torch.int32, torch.int8)[seed % 3]
        return torch.randint(low, high, shape, generator=generator).to(dtype)

    return seeds.map(build)


def _within(index, size: int):
    return index % size


def unknown(index):
    """An index as the result of an operator that the analysis has no rule for."""
    same = Opaque("aten.same", torch.int64, "same", (), True, lambda x: torch.as_tensor(x) + 0)
    return Index("opaque", (index,), same)


def _wrapped(index):
    """An index as a narrow integer, which traced mask_mods hold."""
    return Index("narrow", (index,), torch.int8)


# numbers of a head or batch row: the analysis knows them exactly, within bounds, or not at all
_numbers_of_heads = st.recursive(
    st.sampled_from([h, b, h + b]),
    lambda number: st.one_of(
        st.tuples(number, st.integers(-200, 200)).map(lambda p: p[0] * p[1]),
        st.tuples(st.integers(0, 255), number).map(lambda p: bit_and(*p)),
        st.tuples(st.integers(0, 255), number).map(lambda p: bit_xor(*p)),
        st.tuples(number, st.sampled_from([3, 5, 8, -7])).map(lambda p: operator.mod(*p)),
        number.map(unknown),
        number.map(_wrapped),
    ),
    max_leaves=3,
)
per_head = st.tuples(_table(40, low=-300, high=300), _numbers_of_heads).map(
    lambda p: lookup(p[0], _within(p[1], 40))
)
variables = st.sampled_from([q_idx, kv_idx, q_idx, kv_idx, h, b])
constants = st.one_of(st.integers(-5, 5), st.integers(-600, 600))
divisors = st.sampled_from([1, 2, 3, 7, 64, 100, 128, -1, -3, -64])


def _grow(index):
    pairs = st.tuples(index, st.one_of(index, constants))
    return st.one_of(
        pairs.map(lambda p: p[0] + p[1]),
        pairs.map(lambda p: p[0] - p[1]),
        pairs.map(lambda p: p[0] * p[1]),
        st.tuples(index, divisors).map(lambda p: p[0] // p[1]),
        st.tuples(index, divisors).map(lambda p: p[0] % p[1]),
        st.tuples(index, index).map(lambda p: p[0] // (p[1] % 5 + 1)),
        st.tuples(index, index).map(lambda p: p[0] % (p[1] % 5 - 7)),
        index.map(abs),
        st.tuples(index, index).map(lambda p: where(p[0] < p[1], p[0], p[1] + 3)),
        pairs.map(lambda p: bit_and(*p)),
        pairs.map(lambda p: bit_or(*p)),
        pairs.map(lambda p: bit_xor(*p)),
        pairs.map(lambda p: minimum(*p)),
        pairs.map(lambda p: maximum(*p)),
        st.tuples(_table(), st.just(None)).map(lambda p: lookup(p[0])),
        st.tuples(_table(40), index).map(lambda p: lookup(p[0], _within(p[1], 40))),
        per_head,
        st.tuples(_table(5, 9), index, index).map(
            lambda p: lookup(p[0], _within(p[1] // 64, 5), _within(p[2] // 50, 9))
        ),
        st.tuples(_table(2, 3, 4, 5), index).map(
            lambda p: lookup(p[0], b % 2, h % 3, _within(p[1], 4), _within(p[1] // 9, 5))
        ),
    )


indices = st.recursive(variables, _grow, max_leaves=4)
comparisons = st.one_of(
    st.tuples(indices, st.one_of(indices, constants)).map(lambda p: p[0] <= p[1]),
    st.tuples(indices, st.one_of(indices, constants)).map(lambda p: p[0] < p[1]),
    st.tuples(indices, st.one_of(indices, constants)).map(lambda p: p[0].equals(p[1])),
    per_head.map(lambda number: kv_idx <= q_idx - number),
    st.tuples(_table(6, 7, boolean=True), indices, indices).map(
        lambda p: lookup(p[0], (p[1] // 128) % 6, (p[2] // 128) % 7)
    ),
)
masks = st.recursive(
    comparisons,
    lambda mask: st.one_of(
        st.tuples(mask, mask).map(lambda p: p[0] & p[1]),
        st.tuples(mask, mask).map(lambda p: p[0] | p[1]),
        st.tuples(mask, mask).map(lambda p: p[0] ^ p[1]),
        mask.map(lambda m: ~m),
    ),
    max_leaves=4,
)
lengths = st.one_of(st.integers(1, 300), st.sampled_from([1, 127, 128, 129, 256, 512]))
grids = st.builds(
    lambda q_len, kv_len, offset, block, batch, heads: Grid(
        q_len, kv_len, kv_len - q_len if offset is None else offset, block, batch, heads
    ),
    lengths,
    lengths,
    st.sampled_from([None, None, 0, 17, -30]),
    st.sampled_from([(128, 128), (64, 64), (64, 32), (16, 48)]),
    st.sampled_from([1, 1, 2]),
    st.sampled_from([(0,), (0, 1, 2), (3, 1)]),
)
