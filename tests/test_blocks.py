import pickle

import pytest
import torch
from hypothesis import given, settings
from oracles import assert_same_lists, grids, masks
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from torch.utils import _pytree as pytree

from flexsparse import (
    MaskError,
    b,
    compile_mask,
    from_mask_mod,
    h,
    kv_idx,
    lookup,
    per_head,
    q_idx,
)
from flexsparse.analysis.cells import Grid
from flexsparse.analysis.classify import classify
from flexsparse.analysis.validate import needs_int64, problem
from flexsparse.blocks import block_mask, write_kept_blocks
from flexsparse.lower import lower
from flexsparse.masks import (
    block_sparse,
    causal,
    chunked,
    dilated,
    full,
    global_tokens,
    prefix,
    same_document,
    sink,
    strided,
    window,
)

CPU = torch.device("cpu")
IDS = torch.arange(4096) // 300
PATTERNS = [
    full,
    causal,
    causal & window(1),
    causal & window(200),
    causal & (sink(64) | window(256)),
    ~causal,
    prefix(130),
    causal & dilated(20, 3),
    causal & strided(128),
    chunked(100),
    global_tokens(5) | (abs(q_idx - kv_idx) < 64),
    same_document(IDS) & causal,
    block_sparse(torch.rand(40, 40, generator=torch.Generator().manual_seed(1)) < 0.3) & causal,
]
SHAPES = [
    (1, 1),
    (127, 127),
    (128, 128),
    (129, 129),
    (1000, 1000),
    (2048, 2048),
    (300, 1000),
    (1000, 300),
    (1, 2048),
]
BLOCK_SIZES = [64, 128, (256, 128)]


@pytest.mark.parametrize("block_size", BLOCK_SIZES, ids=str)
@pytest.mark.parametrize("mask", PATTERNS, ids=lambda m: m.name[:40])
def test_equal_to_torch(mask, block_size):
    for q_len, kv_len in SHAPES:
        ours = compile_mask(mask, q_len, kv_len, q_offset=0, block_size=block_size).block_mask
        theirs = create_block_mask(mask, None, None, q_len, kv_len, "cpu", BLOCK_SIZE=block_size)
        assert_same_lists(ours, theirs)


@pytest.mark.parametrize("mask", PATTERNS, ids=lambda m: m.name[:40])
def test_the_mask_mod_is_exact_by_itself(mask):
    """Context parallelism, vLLM and torchtitan rebuild the lists from mask_mod."""
    for q_len, kv_len in [(1000, 1000), (129, 700)]:
        ours = compile_mask(mask, q_len, kv_len).block_mask
        assert_same_lists(ours, create_block_mask(ours.mask_mod, None, None, q_len, kv_len, "cpu"))


@settings(max_examples=100)
@given(masks, grids)
def test_any_mask_is_equal_to_torch(mask, grid):
    grid = grid._replace(heads=tuple(range(len(grid.heads))))
    if problem(mask, grid, CPU) is not None:
        return
    mask_mod = lower(mask, CPU, grid.q_offset, wide=needs_int64(mask, grid))
    ours = block_mask(grid, write_kept_blocks(classify(mask, grid), CPU), mask_mod)
    theirs = create_block_mask(
        mask_mod, grid.batch, len(grid.heads), grid.q_len, grid.kv_len, "cpu", grid.block_size
    )
    assert_same_lists(ours, theirs)


@pytest.mark.parametrize("offset", [2**40, -(2**40), 2**31 - 2])
def test_positions_past_int32_are_not_those_of_int32(offset):
    mask = (q_idx - kv_idx < offset + 5) & (q_idx >= 0)
    attend = compile_mask(mask, 9, 9, q_offset=offset, device="cpu")
    rows, kv = torch.arange(9)[:, None], torch.arange(9)
    zero = torch.tensor(0)
    narrow = (x.int() for x in (zero, zero, rows, kv))
    assert attend.block_mask.mask_mod(*narrow).equal(mask(zero, zero, rows + offset, kv))


def test_heads_and_batch_rows_of_their_own():
    windows = torch.tensor([1, 50, 400])
    lengths = torch.tensor([700, 130])
    mask = causal & (q_idx - kv_idx < lookup(windows, h)) & (kv_idx < lookup(lengths, b))
    ours = compile_mask(mask, 700, 700, batch=2, n_heads=3).block_mask
    assert ours.shape == (2, 3, 700, 700)
    assert_same_lists(ours, create_block_mask(mask, 2, 3, 700, 700, "cpu"))


def test_per_head_masks_become_one_block_mask():
    heads = [causal, causal & window(100), full, causal]
    ours = compile_mask(per_head(heads), 700, 700).block_mask

    def mask_mod(b, h, q_idx, kv_idx):
        kept = [m(b, h, q_idx, kv_idx) for m in heads]
        return (
            ((h == 0) & kept[0])
            | ((h == 1) & kept[1])
            | ((h == 2) & kept[2])
            | ((h == 3) & kept[3])
        )

    assert_same_lists(ours, create_block_mask(mask_mod, None, 4, 700, 700, "cpu"))


def test_batch_rows_and_heads_are_put_together():
    rows = kv_idx < lookup(torch.tensor([700, 130]), b)
    compiled = compile_mask(per_head([causal, causal & rows]), 700, 700, batch=2)
    ours = compiled.block_mask
    theirs = create_block_mask(compiled.masks.mask(CPU), 2, 2, 700, 700, "cpu")
    assert_same_lists(ours, theirs)


def test_lists_are_as_wide_as_the_longest_row():
    grid = Grid(1 << 17, 1 << 17, 0, (128, 128), 1, (0,))
    kept = write_kept_blocks(classify(causal & window(512), grid), CPU)
    assert kept.kv.indices.shape[-1] == 2
    assert kept.full_kv.indices.shape[-1] == 3
    # 1,024 columns wide to torch, and no wider in memory than its rows are long
    wide = kept.full_kv.widened(grid.columns)
    assert wide.shape[-1] == 1024
    assert wide.untyped_storage().nbytes() < 4 * (1024 * 3 + 1024)


def test_torch_methods_work_on_a_compact_mask():
    mask = compile_mask(causal & window(200), 1000, 1000).block_mask
    theirs = create_block_mask(causal & window(200), None, None, 1000, 1000, "cpu")
    assert torch.equal(mask.to_dense(), theirs.to_dense())
    assert str(mask) == str(theirs)
    assert mask.sparsity() == theirs.sparsity()


def same_mask(mine, theirs):
    assert mine.shape == theirs.shape
    assert mine.seq_lengths == theirs.seq_lengths
    assert torch.equal(mine.to_dense(), theirs.to_dense())


@pytest.mark.parametrize("lengths", [(1000, 1000), (700, 900), (900, 700), (128, 128), (1, 1)])
def test_a_cropped_mask_is_that_of_the_corner(lengths):
    """torch 2.13's own crop counts wrong blocks where a row does not begin at block 0."""
    pattern = per_head([causal & window(200), (kv_idx - q_idx).equals(300)])
    whole = compile_mask(pattern, 1000, 1000, q_offset=0).block_mask
    crop = whole._adjust(*lengths)
    assert crop.shape == (1, 2, *lengths)
    kept = [x.to_dense()[..., : -(-lengths[0] // 128), : -(-lengths[1] // 128)] for x in (whole,)]
    assert torch.equal(crop.to_dense(), kept[0])
    of_keys = torch.zeros_like(crop.to_dense())
    for counts, lists in (
        (crop.q_num_blocks, crop.q_indices),
        (crop.full_q_num_blocks, crop.full_q_indices),
    ):
        for head, column in torch.cartesian_prod(torch.arange(2), torch.arange(counts.shape[2])):
            of_keys[0, head, lists[0, head, column, : counts[0, head, column]].long(), column] = 1
    assert torch.equal(of_keys, crop.to_dense())


@pytest.mark.parametrize(
    "index",
    [(slice(None), slice(None), slice(2, 4)), (0, 1), (0, slice(0, 2), torch.tensor([3, 0]))],
    ids=str,
)
def test_slicing_a_compact_mask_is_slicing_torchs(index):
    masks = per_head([causal, causal & window(200)])
    mine = compile_mask(masks, 1000, 1000).block_mask
    theirs = create_block_mask(mine.mask_mod, None, 2, 1000, 1000, "cpu")
    same_mask(mine[index], theirs[index])


@pytest.mark.parametrize(
    "index",
    [0, slice(1, 2), (slice(None), slice(0, 1)), (0, 0, slice(1, 4)), (0, 0, torch.tensor([2, 0]))],
    ids=str,
)
def test_a_slice_is_cropped_as_the_whole_is(index):
    mask = causal & window(130) & (kv_idx < lookup(torch.tensor([512, 400]), b))
    part = compile_mask(mask, 512, 512, batch=2).block_mask[index]
    crop = part._adjust(200, 300)
    assert crop.seq_lengths == (200, 300)
    assert torch.equal(crop.to_dense(), part.to_dense()[..., :2, :3])
    # and each block once
    assert torch.equal(crop.kv_num_blocks + crop.full_kv_num_blocks, crop.to_dense().sum(-1))
    same_mask(part.to("cpu"), part)


def test_a_compact_mask_moves_and_flattens():
    mask = compile_mask(causal & window(200), 1000, 1000).block_mask
    same_mask(mask.to("cpu"), mask)
    assert mask.to("meta").kv_indices.device.type == "meta"
    leaves, context = mask._flatten()
    same_mask(BlockMask._unflatten(leaves, context), mask)
    # a leaf as BlockMask is, until a user wants BlockMasks to be nodes of trees
    if BlockMask not in pytree.SUPPORTED_NODES:
        assert pytree.tree_leaves([mask]) == [mask]
        pytree.register_pytree_node(BlockMask, BlockMask._flatten, BlockMask._unflatten)
    mask = compile_mask(causal & window(200), 1000, 1000).block_mask
    assert len(pytree.tree_leaves([mask])) > 1
    again = pytree.tree_map(lambda x: x, {"mask": mask})["mask"]
    same_mask(again, mask)
    assert again.mask_mod is mask.mask_mod


def test_the_mask_mod_of_all_heads_needs_no_lists():
    ids = torch.arange(900) // 200
    attend = compile_mask(per_head([causal & window(200), causal & same_document(ids)]), 700, 900)
    rebuilt = create_block_mask(attend.mask_mod, None, 2, 700, 900, "cpu")
    assert attend._block_mask is None
    same_mask(attend.block_mask, rebuilt)
    assert attend.block_mask.mask_mod is attend.mask_mod


def test_masks_and_block_masks_are_pickled():
    ids = torch.arange(900) // 200
    masks = per_head([causal & window(200), causal & same_document(ids)])
    attend = compile_mask(masks, 700, 900)
    mask = pickle.loads(pickle.dumps(attend.block_mask))
    same_mask(mask, attend.block_mask)
    rebuilt = create_block_mask(mask.mask_mod, None, 2, 700, 900, "cpu")
    same_mask(mask, rebuilt)
    again = pickle.loads(pickle.dumps(attend))
    assert (again.masks, again.q_offset) == (attend.masks, 200)
    same_mask(again.block_mask, attend.block_mask)
    unknown = from_mask_mod(lambda b, h, q, k: torch.sin(q.float()) > k.float())
    with pytest.raises(MaskError, match=r"sin, which flexsparse has no rule for"):
        pickle.dumps(compile_mask(unknown, 64, 64))


def test_a_window_over_a_million_tokens_is_a_few_megabytes():
    mask = compile_mask(causal & window(1000), 1 << 20, 1 << 20).block_mask
    stored = {
        x.untyped_storage().data_ptr(): x.untyped_storage().nbytes()
        for x in vars(mask).values()
        if isinstance(x, torch.Tensor)
    }
    assert sum(stored.values()) < 3e6
    pickled = pickle.dumps(mask)
    assert len(pickled) < 3e6
    again = pickle.loads(pickled)
    assert again.kv_indices.shape == mask.kv_indices.shape == (1, 1, 8192, 8192)
    assert again.kv_indices.untyped_storage().nbytes() < 3e6
