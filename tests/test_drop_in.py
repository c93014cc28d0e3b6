import inspect

import attn_gym.masks as gym
import mask_mods
import pytest
import torch
from mask_mods import DOCUMENTS, IDIOMS, OFFSETS, OPAQUE, PUBLISHED, Case, causal
from oracles import assert_same_lists
from torch.nn.attention.flex_attention import create_block_mask as by_torch
from torch.nn.attention.flex_attention import flex_attention

from flexsparse import MaskError, kv_idx, q_idx
from flexsparse.drop_in import create_block_mask
from flexsparse.masks import window

packed_documents = gym.generate_packed_causal_doc_mask_mod(OFFSETS)
NAMES = ("kv_num_blocks", "kv_indices", "q_num_blocks", "q_indices")
FULL_NAMES = tuple("full_" + name for name in NAMES)


def assert_equal_to_torch(case, block_size, **options):
    where = (case.batch, case.heads, case.q_len, case.kv_len, "cpu", block_size)
    ours = create_block_mask(case.mask_mod, *where, **options)
    theirs = by_torch(case.mask_mod, *where, **options)
    assert_same_lists(ours, theirs)
    for name in (*NAMES, *FULL_NAMES):
        assert getattr(ours, name).shape == getattr(theirs, name).shape
    assert ours.shape == theirs.shape


@pytest.mark.parametrize("block_size", [128, 64, (256, 128)], ids=str)
@pytest.mark.parametrize("case", PUBLISHED, ids=lambda case: case.name)
def test_a_published_mask_mod_gives_the_lists_of_torch(case, block_size):
    assert_equal_to_torch(case, block_size)


@pytest.mark.parametrize("name", IDIOMS)
def test_an_idiom_gives_the_lists_of_torch(name):
    assert_equal_to_torch(Case(name, IDIOMS[name], batch=1, heads=3), 64)


@pytest.mark.parametrize("name", OPAQUE)
def test_an_opaque_mask_gives_the_lists_of_torch(name):
    assert_equal_to_torch(Case(name, OPAQUE[name][0], 300, 200), 64)


@pytest.mark.parametrize(
    ("q_len", "kv_len"), [(1, 1), (1, 600), (127, 129), (128, 128), (129, 600), (600, 130)]
)
@pytest.mark.parametrize("block_size", [128, (64, 256)], ids=str)
def test_ragged_and_rectangular_lengths_give_the_lists_of_torch(q_len, kv_len, block_size):
    def mask_mod(b, h, q_idx, kv_idx):
        return (DOCUMENTS[q_idx] == DOCUMENTS[kv_idx]) & (q_idx + 20 * h >= kv_idx - 9 * b)

    assert_equal_to_torch(Case("", mask_mod, q_len, kv_len, 2, 3), block_size)


@pytest.mark.parametrize(("batch", "heads"), [(3, 2), (3, None), (None, 4), (1, 1)])
def test_a_mask_that_is_the_same_everywhere_fills_the_batch_and_the_heads(batch, heads):
    assert_equal_to_torch(Case("", causal, 300, 300, batch, heads), 128)


def needs(argument):
    """Skip where torch's create_block_mask is older than one of its arguments."""
    known = inspect.signature(by_torch).parameters
    return pytest.mark.skipif(argument not in known, reason=f"this torch has no {argument}")


def test_the_signature_begins_like_that_of_torch():
    ours = inspect.signature(create_block_mask).parameters
    theirs = inspect.signature(by_torch).parameters
    assert [x for x in theirs if x in ours] == list(theirs)
    assert list(ours)[: len(theirs)] == list(theirs)


@needs("separate_full_blocks")
def test_full_blocks_can_be_left_among_the_partial_ones():
    where = (2, None, 600, 500, "cpu", 128)
    ours = create_block_mask(causal, *where, separate_full_blocks=False)
    theirs = by_torch(causal, *where, separate_full_blocks=False)
    for name in FULL_NAMES:
        assert getattr(ours, name) is getattr(theirs, name) is None
    assert torch.equal(ours.kv_num_blocks, theirs.kv_num_blocks)
    assert torch.equal(ours.q_num_blocks, theirs.q_num_blocks)
    assert torch.equal(ours.to_dense(), theirs.to_dense())


@needs("compute_dq_write_order")
@pytest.mark.parametrize("ascending", [False, True])
def test_the_write_order_of_dq_is_that_of_torch(ascending):
    where = (None, None, 600, 500, "cpu", 128)
    options = {"compute_dq_write_order": True, "dq_kv_order": not ascending}
    ours, theirs = create_block_mask(causal, *where, **options), by_torch(causal, *where, **options)
    assert ours.dq_kv_order_spt == theirs.dq_kv_order_spt
    for end, start in (("", ""), ("_full", "full_")):
        order, expected = (getattr(x, "dq_write_order" + end) for x in (ours, theirs))
        counts = getattr(theirs, start + "q_num_blocks")
        used = torch.arange(expected.shape[-1]) < counts[..., None]
        assert torch.equal(order[used], expected[used])


def test_compile_is_accepted_and_ignored():
    ours = create_block_mask(causal, None, None, 300, 300, "cpu", 128, True)
    assert_same_lists(ours, by_torch(causal, None, None, 300, 300, "cpu"))


def test_torch_compile_runs_it_as_it_is():
    torch._dynamo.reset()
    compiled = torch.compile(create_block_mask)
    for length in (300, 400):
        ours = compiled(causal, None, None, length, length, "cpu")
        assert_same_lists(ours, by_torch(causal, None, None, length, length, "cpu"))


@pytest.mark.skipif(
    torch.__version__ < "2.12", reason="dynamo asks there whether a mask_mod is true"
)
def test_torch_compiles_its_own_with_a_mask_that_nobody_has_read_yet():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    mask = (kv_idx <= q_idx) & (q_idx - kv_idx < 90)
    theirs = torch.compile(by_torch)(mask, None, None, 300, 300, "cpu")
    assert not torch._dynamo.utils.counters["graph_break"]
    assert_same_lists(create_block_mask(mask, None, None, 300, 300, "cpu"), theirs)


def test_a_mask_is_taken_as_it_is():
    ours = create_block_mask(window(90), None, None, 300, 300, "cpu")
    assert_same_lists(ours, by_torch(lambda b, h, q, k: q - k < 90, None, None, 300, 300, "cpu"))


@pytest.mark.parametrize("name", [*IDIOMS, *OPAQUE])
def test_the_mask_mod_inside_is_exact_for_every_element(name):
    mask_mod = IDIOMS.get(name) or OPAQUE[name][0]
    ours = create_block_mask(mask_mod, 1, 3, 400, 300, "cpu")
    again = by_torch(ours.mask_mod, 1, 3, 400, 300, "cpu")
    assert_same_lists(ours, again)


@pytest.mark.slow
def test_flex_attention_gives_the_output_of_torchs_block_mask():
    torch._dynamo.reset()
    q, k, v = (torch.randn(2, 3, 600, 16) for _ in range(3))
    attend = torch.compile(flex_attention, dynamic=False)
    where = (2, 3, 600, 600, "cpu")
    ours = attend(q, k, v, block_mask=create_block_mask(packed_documents, *where))
    theirs = attend(q, k, v, block_mask=by_torch(packed_documents, *where))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.slow
def test_another_window_is_no_other_kernel():
    torch._dynamo.reset()
    q, k, v = (torch.randn(1, 2, 256, 16) for _ in range(3))
    attend = torch.compile(flex_attention, dynamic=False)
    for size in (10, 40, 77):
        with torch._dynamo.config.patch(error_on_recompile=size > 10):
            block_mask = create_block_mask(
                lambda b, h, q_idx, kv_idx, size=size: (q_idx >= kv_idx) & (q_idx - kv_idx < size),
                None, None, 256, 256, "cpu",
            )  # fmt: skip
            attend(q, k, v, block_mask=block_mask)


PER_HEAD = torch.tensor([10, 200, 400])
BAD = [
    ({"mask_mod": lambda b, h, q, k: q - k < PER_HEAD[h]}, r"reads h and H=None.*Give H=the"),
    ({"mask_mod": lambda b, h, q, k: q - k < PER_HEAD[b]}, r"reads b and B=None.*Give B=the"),
    ({"mask_mod": lambda b, h, q, k: q - k < PER_HEAD[h], "H": 4}, r"read out of range.*h=3"),
    ({"mask_mod": lambda b, h, q, k: q - k}, r"returned torch\.int64"),
    ({"mask_mod": 3}, r"got int: 3"),
    ({"Q_LEN": 0}, r"Q_LEN=0; it must be an int of 1 or more\."),
    ({"H": 2.0}, r"H=2\.0; it must be an int of 1 or more, or None"),
    ({"BLOCK_SIZE": (128, 0)}, r"BLOCK_SIZE=\(128, 0\)"),
    ({"device": "nowhere"}, r"device='nowhere' cannot be used here"),
    ({"device": 3.5}, r"device=3\.5 cannot be used here"),
    ({"KV_LEN": 2**31}, r"KV_LEN=2147483648; it must be at most"),
    ({"dq_kv_order": torch.arange(3)}, r"dq_kv_order=.*must be a bool"),
    ({"no_such": 1}, r"got no_such=1; torch .* knows no such argument\. It has mask_mod, B, H"),
]


@pytest.mark.parametrize(("arguments", "text"), BAD)
def test_bad_arguments_are_refused_with_the_reason(arguments, text):
    given = {"mask_mod": causal, "B": None, "H": None, "Q_LEN": 300, "KV_LEN": 300, "device": "cpu"}
    with pytest.raises(MaskError, match="(?s)" + text):
        create_block_mask(**{**given, **arguments})


def test_head_zero_is_not_taken_for_all_heads_unless_it_is_one():
    case = Case("", lambda b, h, q, k: q - k < mask_mods.PER_HEAD[h], 300, 300, None, 1)
    assert_equal_to_torch(case, 128)
