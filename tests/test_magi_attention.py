"""MagiAttention's flex_flash_attn_func on flexsparse."""

import inspect

import pytest
import torch
from dense_attention import assert_same, attend_densely, gradients

from flexsparse import MaskError
from flexsparse.compat import magi_attention as theirs
from flexsparse.compat.magi_attention import flex_flash_attn_func

FULL, CAUSAL, INVERSE, BOTH = range(4)
SIGNATURE = (
    "q, k, v, q_ranges=None, k_ranges=None, attn_type_map=None, *, index_sparse_indices=None, "
    "q_block_size=1, sparse_k_block_size=1, sink=None, sink_layout='sh', softmax_scale=None, "
    "softcap=0.0, deterministic=False, sm_margin=0, disable_fwd_atomic_reduction=False, "
    "disable_bwd_dkv_atomic_reduction=False, disable_bwd_dq_atomic_reduction=False, "
    "ref_block_size=None, max_seqlen_q=None, range_merge=False, swap_ab=False, pack_gqa=False, "
    "cat_gqa=False, block_sparse=False, index_sparse=False, swap_bwd_qk_loop=None, "
    "return_max_logits=False"
)


def test_names_order_and_defaults_are_theirs():
    parameters = inspect.signature(flex_flash_attn_func).parameters.values()
    plain = [x.replace(annotation=inspect.Parameter.empty) for x in parameters]
    assert str(inspect.Signature(plain)) == f"({SIGNATURE})"


def kept_of(slices, total_q, total_k):
    """What the pictures of their docstring show, pair by pair: [total_q, total_k]."""
    kept = torch.zeros(total_q, total_k, dtype=torch.bool)
    for (q_first, q_end), (k_first, k_end), kind in slices:
        for row in range(q_first, q_end):
            for key in range(k_first, k_end):
                # the last row sees the last key, and the first row the first key
                causal = k_end - key >= q_end - row
                inverse = key - k_first >= row - q_first
                seen = {FULL: True, CAUSAL: causal, INVERSE: inverse, BOTH: causal and inverse}
                kept[row, key] |= seen[kind]
    return kept


# (slices, total_q, total_k)
CASES = {
    "packed causal documents": (
        [((0, 70), (0, 70), CAUSAL), ((70, 75), (70, 75), CAUSAL), ((75, 200), (75, 200), CAUSAL)],
        200,
        200,
    ),
    "packed full documents": ([((0, 90), (0, 90), FULL), ((90, 150), (90, 150), FULL)], 150, 150),
    "rows in several slices, and in none": (
        [
            ((10, 60), (0, 20), FULL),
            ((10, 60), (20, 60), CAUSAL),
            ((30, 80), (60, 90), INVERSE),
            ((80, 100), (10, 95), BOTH),
            ((100, 110), (7, 7), FULL),
        ],
        130,
        97,
    ),
    "fewer queries than keys": ([((0, 20), (0, 100), CAUSAL), ((20, 33), (5, 77), BOTH)], 33, 140),
    "more queries than keys": (
        [((0, 90), (0, 40), CAUSAL), ((90, 140), (3, 40), INVERSE)],
        140,
        40,
    ),
    "one causal slice": ([((0, 131), (0, 131), CAUSAL)], 131, 131),
    "no slice": ([], 9, 12),
}


def tensors_of(slices):
    q_ranges = torch.tensor([x for x, _, _ in slices], dtype=torch.int32).view(-1, 2)
    k_ranges = torch.tensor([x for _, x, _ in slices], dtype=torch.int32).view(-1, 2)
    return q_ranges, k_ranges, torch.tensor([x for *_, x in slices], dtype=torch.int32)


def inputs(total_q, total_k, n_heads=2, n_kv_heads=1, dim=16, dim_v=8):
    shapes = ((total_q, n_heads, dim), (total_k, n_kv_heads, dim), (total_k, n_kv_heads, dim_v))
    return [torch.randn(shape, requires_grad=True) for shape in shapes]


def expected(q, k, v, kept, **options):
    heads_first = (x.transpose(0, 1) for x in (q, k, v))
    out, lse = attend_densely(*heads_first, kept.expand(q.shape[1], -1, -1), **options)
    return out.transpose(0, 1), lse.T


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("options", [{}, {"softmax_scale": 0.4, "softcap": 1.5}], ids=str)
def test_slices_are_attended_to(name, options):
    slices, total_q, total_k = CASES[name]
    given = inputs(total_q, total_k)
    out, meta = flex_flash_attn_func(*given, *tensors_of(slices), **options)
    named = {{"softmax_scale": "scale"}.get(x, x): y for x, y in options.items()}
    wanted = expected(*given, kept_of(slices, total_q, total_k), **named)
    assert (meta.max_logits, meta.lse.dtype) == (None, torch.float32)
    assert out.is_contiguous()
    assert meta.lse.is_contiguous()
    assert_same(out, wanted[0])
    assert_same(meta.lse, wanted[1])
    for mine, true in zip(gradients((out, meta.lse), given), gradients(wanted, given), strict=True):
        assert_same(mine, true)


def test_without_types_slices_are_whole():
    slices, total_q, total_k = CASES["packed full documents"]
    given = inputs(total_q, total_k)
    out, _ = flex_flash_attn_func(*given, *tensors_of(slices)[:2])
    assert torch.equal(out, flex_flash_attn_func(*given, *tensors_of(slices))[0])


@pytest.mark.parametrize("layout", ["sh", "ssh"])
@pytest.mark.parametrize("n_sinks", [1, 3])
@pytest.mark.parametrize("softcap", [0.0, 1.0])
def test_sinks_are_scores_without_a_value(layout, n_sinks, softcap):
    slices, total_q, total_k = CASES["rows in several slices, and in none"]
    given = inputs(total_q, total_k, n_heads=4, n_kv_heads=2)
    shape = (n_sinks, 4) if layout == "sh" else (total_q, n_sinks, 4)
    sink = torch.randn(shape, requires_grad=True)
    options = {"sink": sink, "sink_layout": layout, "softcap": softcap}
    out, meta = flex_flash_attn_func(*given, *tensors_of(slices), **options)
    of_rows = sink.permute(-1, *range(sink.dim() - 1))
    of_rows = of_rows[:, None].expand(-1, total_q, -1) if layout == "sh" else of_rows
    kept = kept_of(slices, total_q, total_k)
    wanted = expected(*given, kept, sink=of_rows, softcap=softcap)
    assert not kept[0].any()
    assert not out[0].any()
    assert_same(out, wanted[0])
    assert_same(meta.lse, wanted[1])
    mine = gradients((out, meta.lse), [*given, sink])
    for x, y in zip(mine, gradients(wanted, [*given, sink]), strict=True):
        assert_same(x, y)


def test_a_sink_of_minus_infinity_is_none():
    slices, total_q, total_k = CASES["rows in several slices, and in none"]
    given = inputs(total_q, total_k)
    sink = torch.full((1, 2), -torch.inf)
    out, meta = flex_flash_attn_func(*given, *tensors_of(slices), sink=sink)
    plain, plain_meta = flex_flash_attn_func(*given, *tensors_of(slices))
    assert torch.equal(out, plain)
    assert torch.equal(meta.lse, plain_meta.lse)
    mine, true = (gradients(x, given) for x in ((out, meta.lse), (plain, plain_meta.lse)))
    assert all(map(torch.equal, mine, true))


def test_what_tunes_their_kernels_changes_nothing():
    slices, *totals = CASES["fewer queries than keys"]
    given = inputs(*totals)
    tuned = {
        "deterministic": True,
        "sm_margin": 4,
        "disable_fwd_atomic_reduction": True,
        "ref_block_size": (64, 64),
        "max_seqlen_q": 20,
        "range_merge": True,
        "pack_gqa": True,
        "block_sparse": True,
        "swap_bwd_qk_loop": True,
    }
    plain = flex_flash_attn_func(*given, *tensors_of(slices))
    mine = flex_flash_attn_func(*given, *tensors_of(slices), **tuned)
    assert torch.equal(plain[0], mine[0])
    assert torch.equal(plain[1].lse, mine[1].lse)


def test_the_plan_of_equal_ranges_is_kept_and_that_of_others_is_not_taken():
    slices, total_q, total_k = CASES["packed causal documents"]
    given, (q_ranges, k_ranges, types) = inputs(total_q, total_k), tensors_of(slices)
    theirs._plan.cache_clear()
    out, _ = flex_flash_attn_func(*given, q_ranges, k_ranges, types)
    again, _ = flex_flash_attn_func(*given, q_ranges.clone(), k_ranges.clone(), types.clone())
    assert torch.equal(out, again)
    assert theirs._plan.cache_info()[:2] == (1, 1)
    types[1:] = FULL  # into the same tensor
    changed, _ = flex_flash_attn_func(*given, q_ranges, k_ranges, types)
    assert theirs._plan.cache_info()[:2] == (1, 2)
    slices = [(x, y, int(kind)) for (x, y, _), kind in zip(slices, types, strict=True)]
    assert_same(changed, expected(*given, kept_of(slices, total_q, total_k))[0])


@pytest.mark.parametrize("totals", [(0, 5), (5, 0)])
def test_no_queries_and_no_keys(totals):
    given = inputs(*totals)
    out, meta = flex_flash_attn_func(*given, *tensors_of([]))
    assert (out.shape, meta.lse.shape) == ((totals[0], 2, 8), (totals[0], 2))
    assert not out.any()
    assert (meta.lse == -torch.inf).all()


def test_a_compiler_above_calls_it():
    slices, *totals = CASES["packed causal documents"]
    given, ranges = inputs(*totals), tensors_of(slices)
    compiled = torch.compile(lambda *x: flex_flash_attn_func(*x)[0] * 2, backend="eager")
    assert torch.equal(compiled(*given, *ranges), flex_flash_attn_func(*given, *ranges)[0] * 2)


Q_RANGES, K_RANGES, TYPES = tensors_of([((0, 10), (0, 10), CAUSAL), ((10, 20), (0, 20), CAUSAL)])
SHARING = torch.tensor([[0, 10], [9, 20]])
WRONG = {
    "no ranges": ({"q_ranges": None}, r"q_ranges = NoneType.*\[slices, 2\]"),
    "a list": ({"k_ranges": [[0, 10]]}, r"k_ranges = list.*torch.as_tensor"),
    "float ranges": ({"q_ranges": Q_RANGES.float()}, r"torch.float32 .*integer tensor"),
    "fewer": ({"q_ranges": Q_RANGES[:1]}, "1 q_ranges, 2 k_ranges and 2 types"),
    "fewer types": ({"attn_type_map": TYPES[:1]}, "2 q_ranges, 2 k_ranges and 1 types"),
    "a type": ({"attn_type_map": TYPES + 3}, "slice of type 4"),
    "backwards": ({"q_ranges": Q_RANGES.flip(1)}, r"q_ranges with \[10, 0\]"),
    "past the queries": ({"q_ranges": Q_RANGES + 1}, "q_ranges end at 21 and q has 20 tokens"),
    "past the keys": ({"k_ranges": K_RANGES + 5}, "k_ranges end at 25 and k has 20 tokens"),
    "shared": ({"q_ranges": SHARING}, "keep the same key for row 9"),
    "one shared": ({"k_ranges": torch.tensor([[5, 8], [7, 18]]), "q_ranges": SHARING}, "row 9"),
    "on meta": ({"q_ranges": Q_RANGES.to("meta")}, "q_ranges is on meta"),
    "types on meta": ({"attn_type_map": TYPES.to("meta")}, "attn_type_map is on meta"),
    "indices": ({"index_sparse_indices": TYPES}, r"names keys one by one.*block_sparse"),
    "index_sparse": ({"index_sparse": True}, "names keys one by one"),
    "max_logits": ({"return_max_logits": True}, "no kernel here keeps the largest score"),
    "softcap": ({"softcap": -1.0}, "softcap=-1.0; it must be a positive number"),
    "softcap of a tensor": ({"softcap": torch.ones(1)}, "it must be a positive number"),
    "scale": ({"softmax_scale": "a"}, "scale='a'; it must be a finite number"),
    "sink": ({"sink": torch.ones(2)}, r"sink is torch.float32 \(2,\).*\[n, n_heads=2\]"),
    "heads": ({"sink": torch.ones(1, 3)}, r"sink is torch.float32 \(1, 3\)"),
    "whole numbers": ({"sink": torch.ones(1, 2).int()}, "sink is torch.int32"),
    "not a tensor": ({"sink": 1.0}, "sink is float"),
    "rows": (
        {"sink": torch.ones(19, 1, 2), "sink_layout": "ssh"},
        r"\[total_q, n, n_heads=2\]",
    ),
    "layout": ({"sink": torch.ones(1, 2), "sink_layout": "shd"}, "must be one of 'sh', 'ssh'"),
    "a batch": ({"q": torch.randn(1, 20, 2, 16)}, r"q is \(1, 20, 2, 16\)"),
    "v": ({"v": torch.randn(19, 1, 16)}, "v has 19 tokens and k has 20"),
    "kv heads": ({"q": torch.randn(20, 3, 16), "k": torch.randn(20, 2, 16)}, "heads"),
}


@pytest.mark.parametrize("name", WRONG)
def test_bad_input_is_refused_in_a_sentence(name):
    changes, message = WRONG[name]
    q, k, v = inputs(20, 20, dim_v=16)
    given = {"q": q, "k": k, "v": v, "q_ranges": Q_RANGES, "k_ranges": K_RANGES}
    given |= {"attn_type_map": TYPES} | changes
    with pytest.raises(MaskError, match=message):
        flex_flash_attn_func(**given)


def test_rows_of_many_whole_slices():
    """A mask of blocks as ranges: 40 blocks of 3 keys for each of 5 blocks of 7 queries."""
    blocks = torch.rand(5, 60) < 2 / 3
    slices = [((7 * i, 7 * i + 7), (3 * j, 3 * j + 3), FULL) for i, j in blocks.nonzero().tolist()]
    given = inputs(40, 190)
    out, _ = flex_flash_attn_func(*given, *tensors_of(slices), block_sparse=True)
    assert_same(out, expected(*given, kept_of(slices, 40, 190))[0])
    more = [*slices, ((10, 11), slices[0][1], FULL), ((10, 11), slices[0][1], FULL)]
    with pytest.raises(MaskError, match="the same key for row 10"):
        flex_flash_attn_func(*given, *tensors_of(more))


def test_slices_that_touch_share_nothing():
    """Their rows and keys meet, and no pair is in two of them."""
    slices = [((0, 10), (0, 10), CAUSAL), ((0, 10), (10, 15), FULL), ((5, 10), (15, 15), FULL)]
    slices += [((0, 5), (15, 20), INVERSE), ((5, 10), (15, 20), CAUSAL)]
    given = inputs(10, 20)
    out, _ = flex_flash_attn_func(*given, *tensors_of(slices))
    assert_same(out, expected(*given, kept_of(slices, 10, 20))[0])
