"""NATTEN's functions and modules against dense attention whose pairs are decided one by one.

Inputs require gradients wherever the kernel does not matter: they run without compiling anything.
"""

import functools
import inspect
import itertools
import math
from math import prod

import pytest
import torch

from flexsparse import MaskError
from flexsparse.compat import natten
from flexsparse.compat.natten import (
    NeighborhoodAttention1D,
    NeighborhoodAttention2D,
    NeighborhoodAttention3D,
    na1d,
    na2d,
    na3d,
    neighborhood_attention_generic,
)
from flexsparse.compat.natten import call as natten_call
from flexsparse.compat.natten import plan as natten_plan
from flexsparse.compat.natten.axes import Axis

FUNCTIONS = {1: na1d, 2: na2d, 3: na3d}


# NATTEN's rule, with the names of csrc/include/natten/cuda/reference/mask.hpp
def get_win_start(index, window_left, window_right, stride, length, is_causal):
    if is_causal:
        leader = min(index // stride * stride + stride - 1, length - 1)
        return max(leader - window_left - window_right, 0)
    leader = min(index // stride * stride + stride // 2, length - 1)
    start = max(leader - window_left, 0)
    if leader + window_right >= length:
        start += length - window_right - leader - 1
    return start


def get_win_end(index, start, window_size, length, is_causal):
    return min(index + 1, length) if is_causal else start + window_size


def qkv_fix_dilation(length, dilation, group):
    return length // dilation + 1 - (group + dilation - length % dilation) // dilation


def is_neighbor(q, kv, length, window_size, stride, dilation, is_causal):
    if q % dilation != kv % dilation:
        return False
    length = qkv_fix_dilation(length, dilation, q % dilation)
    q, kv = q // dilation, kv // dilation
    left, right = window_size // 2, window_size // 2 + window_size % 2 - 1
    start = get_win_start(q, left, right, stride, length, is_causal)
    return start <= kv < get_win_end(q, start, window_size, length, is_causal)


@functools.cache
def kept_along(*axis):
    """bool [tokens, tokens] of an axis."""
    tokens = range(axis[0])
    return torch.tensor([[is_neighbor(q, kv, *axis) for kv in tokens] for q in tokens])


def kept_densely(shape, kernel_size, stride, dilation, is_causal, n_additional=0):
    """bool [tokens, tokens + n_additional], row-major: neighbors along each axis."""
    n = prod(shape)
    kept = torch.ones(n, n, dtype=torch.bool)
    for i, axis in enumerate(zip(shape, kernel_size, stride, dilation, is_causal, strict=True)):
        place = torch.tensor([x[i] for x in itertools.product(*map(range, shape))])
        kept &= kept_along(*axis)[place[:, None], place]
    return torch.cat([kept, torch.ones(n, n_additional, dtype=torch.bool)], 1)


def attend_densely(q, k, v, kept, scale=None):
    """(out, lse) in the layout of NATTEN, of q [B, *shape, heads, D] and k, v [B, keys, ...]."""
    shape = q.shape[1:-2]
    q = q.flatten(1, len(shape)).transpose(1, 2)
    k, v = (x.transpose(1, 2).repeat_interleave(q.shape[1] // x.shape[2], 1) for x in (k, v))
    scores = (q @ k.mT * (scale or q.shape[-1] ** -0.5)).masked_fill(~kept, -math.inf)
    out, lse = scores.softmax(-1) @ v, scores.logsumexp(-1)
    return tuple(x.transpose(1, 2).unflatten(1, shape) for x in (out, lse))


def inputs(shape, n_heads=2, n_kv_heads=2, dim=8, v_dim=8, n_additional=0, batch=1, **kind):
    """query, key, value, and additional_keys and additional_values if there are any."""
    sizes = [(*shape, n_heads, dim), (*shape, n_kv_heads, dim), (*shape, n_kv_heads, v_dim)]
    if n_additional:
        sizes += [(n_additional, n_kv_heads, dim), (n_additional, n_kv_heads, v_dim)]
    return [torch.randn(batch, *size, requires_grad=True, **kind) for size in sizes]


def gradients(results, tensors):
    total = sum((x * torch.arange(x.numel()).view_as(x).sin()).sum() for x in results)
    return torch.autograd.grad(total, tensors)


def check(shape, kernel_size, stride, dilation, is_causal, n_additional=0, scale=None, **given):
    """Output, LSE and gradients of a neighborhood are those of dense attention."""
    rank = len(shape)
    given = inputs(shape, n_additional=n_additional, **given)
    results = FUNCTIONS[rank](
        *given[:3],
        kernel_size,
        stride,
        dilation,
        is_causal,
        scale,
        *given[3:],
        return_lse=True,
    )
    kept = kept_densely(shape, kernel_size, stride, dilation, is_causal, n_additional)
    keys, values = (
        torch.cat([x.flatten(1, rank), *more], 1)
        for x, *more in ((given[1], *given[3:4]), (given[2], *given[4:5]))
    )
    expected = attend_densely(given[0], keys, values, kept, scale)
    for found, wanted in zip(results, expected, strict=True):
        assert found.is_contiguous()
        torch.testing.assert_close(found, wanted)
    for found, wanted in zip(gradients(results, given), gradients(expected, given), strict=True):
        torch.testing.assert_close(found, wanted)


@pytest.fixture(params=["row-major", "tiles"])
def order(request, monkeypatch):
    """Both orders of tokens, whichever computes fewer blocks."""
    blocks = 0 if request.param == "row-major" else math.inf
    monkeypatch.setattr(natten_plan, "_row_major_blocks", lambda *_: blocks)
    monkeypatch.setattr(natten_call, "_kept", natten_call._Kept())
    return request.param


OFF = (False, False, False)
NEIGHBORHOODS = [
    ((150,), (7,), (1,), (1,), OFF[:1]),
    ((150,), (8,), (5,), (1,), OFF[:1]),
    ((150,), (9,), (4,), (1,), (True,)),
    ((150,), (10,), (3,), (4,), OFF[:1]),
    ((151,), (12,), (12,), (7,), (True,)),
    ((140,), (140,), (3,), (1,), OFF[:1]),
    ((140,), (140,), (3,), (1,), (True,)),
    ((14, 19), (5, 6), (1, 1), (1, 1), OFF[:2]),
    ((14, 19), (4, 7), (3, 2), (1, 1), (False, True)),
    ((15, 16), (3, 4), (2, 4), (4, 3), (True, False)),
    ((15, 16), (15, 3), (1, 1), (1, 5), OFF[:2]),
    ((12, 11), (12, 11), (1, 1), (1, 1), OFF[:2]),
    ((12, 11), (1, 1), (1, 1), (1, 1), OFF[:2]),
    ((5, 6, 7), (3, 4, 5), (1, 1, 1), (1, 1, 1), OFF),
    ((5, 6, 7), (2, 3, 3), (2, 1, 3), (2, 1, 2), (True, False, False)),
    ((4, 7, 6), (4, 5, 2), (1, 5, 2), (1, 1, 3), (True, False, True)),
]


@pytest.mark.parametrize("numbers", NEIGHBORHOODS, ids=str)
@pytest.mark.parametrize("n_additional", [0, 3, 133])
def test_neighbors_are_those_of_natten(numbers, n_additional, order):
    check(*numbers, n_additional)


@pytest.mark.parametrize(
    "given",
    [
        {"n_heads": 6, "n_kv_heads": 2},
        {"n_heads": 3, "n_kv_heads": 1, "v_dim": 5},
        {"v_dim": 12, "batch": 3, "n_additional": 4},
        {"scale": 0.7},
        {"scale": -0.2, "n_additional": 2},
        {"scale": 0},  # the default, as there
    ],
    ids=str,
)
def test_heads_head_dims_and_scale_are_those_of_natten(given, order):
    check((9, 14), (3, 4), (1, 2), (2, 1), (False, True), **given)


def test_one_number_stands_for_all_axes_and_none_for_the_default():
    given = inputs((9, 10))
    out = na2d(*given, 3, 2, 3, True)
    assert torch.equal(out, na2d(*given, [3, 3], (2, 2), (3, 3), (True, True)))
    assert torch.equal(na2d(*given, 3, None, None, None), na2d(*given, 3))
    assert torch.equal(neighborhood_attention_generic(*given, 3, 2, 3, True), out)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_every_float_dtype_is_taken(dtype, order):
    given = [x.detach().to(dtype).requires_grad_() for x in inputs((9, 14), n_additional=3)]
    out, lse = na2d(
        *given[:3], 5, additional_keys=given[3], additional_values=given[4], return_lse=True
    )
    exact = [x.detach().double() for x in given]
    kept = kept_densely((9, 14), (5, 5), (1, 1), (1, 1), OFF[:2], 3)
    keys, values = (torch.cat([exact[i].flatten(1, 2), exact[i + 2]], 1) for i in (1, 2))
    expected, expected_lse = attend_densely(exact[0], keys, values, kept)
    assert (out.dtype, lse.dtype) == (dtype, torch.float32)
    torch.testing.assert_close(out.double(), expected, **TOLERANCE[dtype])
    torch.testing.assert_close(lse.double(), expected_lse, **TOLERANCE[dtype])


TOLERANCE = {
    torch.float16: {"rtol": 1e-2, "atol": 1e-2},
    torch.bfloat16: {"rtol": 3e-2, "atol": 3e-2},
    torch.float64: {"rtol": 1e-5, "atol": 1e-5},  # the LSE is float32
}


ARGUMENTS = (
    "query, key, value, kernel_size, stride=1, dilation=1, is_causal=False, scale=None, "
    "additional_keys=None, additional_values=None, attention_kwargs=None, backend=None, "
    "q_tile_shape=None, kv_tile_shape=None, backward_q_tile_shape=None, "
    "backward_kv_tile_shape=None, backward_kv_splits=None, backward_use_pt_reduction=False, "
    "run_persistent_kernel=True, kernel_schedule=None, torch_compile=False, return_lse=False"
)


@pytest.mark.parametrize("name", ["na1d", "na2d", "na3d", "neighborhood_attention_generic"])
def test_names_order_and_defaults_are_theirs(name):
    parameters = inspect.signature(getattr(natten, name)).parameters.values()
    plain = [x.replace(annotation=inspect.Parameter.empty) for x in parameters]
    assert str(inspect.Signature(plain)) == f"({ARGUMENTS})"


def test_what_chooses_their_kernels_changes_nothing():
    given = inputs((9, 10))
    chosen = {
        "attention_kwargs": {"backend": "flex-fmha", "torch_compile": True},
        "backend": "cutlass-fna",
        "q_tile_shape": (8, 8),
        "kv_tile_shape": (8, 16),
        "backward_q_tile_shape": (4, 16),
        "backward_kv_tile_shape": (4, 16),
        "backward_kv_splits": (1, 2),
        "backward_use_pt_reduction": True,
        "run_persistent_kernel": False,
        "kernel_schedule": "pp",
        "torch_compile": True,
    }
    assert torch.equal(na2d(*given, 3, **chosen), na2d(*given, 3))


# the order of tokens
AXES = [
    Axis(64, 13, 1, 1, False),
    Axis(37, 9, 4, 1, True),
    Axis(50, 5, 5, 7, False),
    Axis(41, 6, 1, 5, True),
    Axis(16, 16, 1, 1, False),
]


@pytest.mark.parametrize("axis", AXES, ids=str)
@pytest.mark.parametrize("tile", [1, 4, 16, 64])
def test_pairs_of_tiles_are_those_that_hold_a_pair_of_places(axis, tile):
    first, end = axis.windows(axis.room(tile))
    n = len(first) // tile
    seen = {
        (q // tile, kv // tile)
        for q, (start, stop) in enumerate(zip(first.tolist(), end.tolist(), strict=True))
        for kv in range(start, stop)
    }
    assert all(pair < (n, n) for pair in seen)
    assert axis.pairs(tile) == len(seen)


@pytest.mark.parametrize("axes", [*itertools.combinations(AXES, 2)], ids=str)
def test_the_blocks_of_tiles_are_counted_without_an_analysis(axes, monkeypatch):
    monkeypatch.setattr(natten_plan, "_row_major_blocks", lambda *_: math.inf)
    monkeypatch.setattr(natten_plan, "COST_OF_TILES", 0)
    tiles, blocks = natten_plan._best_tiles(axes)
    compiled, chosen = natten_plan.plan(*zip(*axes, strict=True), 0, torch.device("cpu"))
    assert chosen == tiles
    assert compiled.cost().blocks == blocks


@pytest.mark.parametrize("n_rows", [1, 5, 1000])
def test_the_blocks_of_row_major_order_are_estimated_from_some_rows(n_rows, monkeypatch):
    monkeypatch.setattr(natten_plan, "ROWS_COUNTED", n_rows)
    axes = [Axis(40, 9, 1, 1, False), Axis(50, 11, 1, 1, False)]
    mask = natten_plan._row_major(axes, 0)
    whole = natten_plan.compile_mask(mask, 2000, 2000, device="cpu").cost().blocks
    estimate = natten_plan._row_major_blocks(mask, 2000, 0)
    assert estimate == whole if n_rows == 1000 else estimate == pytest.approx(whole, rel=0.5)


def plan_of(shape, kernel_size, dilation=1):
    numbers = [(x,) * len(shape) if isinstance(x, int) else x for x in (1, dilation, False)]
    return natten_plan.plan(shape, kernel_size, *numbers, 0, torch.device("cpu"))


def test_tokens_are_stored_in_tiles_where_that_computes_fewer_blocks():
    large, in_tiles = plan_of((128, 128), (13, 13))
    assert in_tiles is not None
    row_major = natten_plan._row_major([Axis(128, 13, 1, 1, False)] * 2, 0)
    n = 128 * 128
    blocks = natten_plan.compile_mask(row_major, n, n, device="cpu").cost().blocks
    assert large.cost().blocks < 0.8 * blocks
    assert plan_of((20, 8), (7, 7)).tiles is None  # two blocks
    assert plan_of((96, 128), (3, 128)).tiles is None  # whole rows, which are blocks
    assert plan_of((4096,), (64,)).tiles is None
    grouped, in_tiles = plan_of((4096,), (64,), 8)
    assert in_tiles == natten_plan.Tiles((4096,), (8,), (128,))
    assert grouped.cost().blocks == 8 * 10  # of each group of 4 blocks, the diagonal and its sides


@pytest.mark.parametrize(
    ("shape", "dilation", "tile"),
    [((9, 14), (1, 1), (8, 16)), ((10, 13, 5), (3, 1, 2), (2, 16, 4)), ((40,), (3,), (128,))],
)
def test_what_is_stored_stands_at_its_place_and_is_restored(shape, dilation, tile):
    tiles = natten_plan.Tiles(shape, dilation, tile)
    x = torch.randn(2, *shape, 3, 4)
    stored = tiles.store(x)
    assert torch.equal(tiles.restore(stored), x)
    rooms = [n // gap for n, gap in zip(tiles.padded, dilation, strict=True)]
    for slot, place in enumerate(zip(*(p.tolist() for p in tiles.places()), strict=True)):
        token = [
            p % room * gap + p // room for p, room, gap in zip(place, rooms, dilation, strict=True)
        ]
        inside = all(c < n for c, n in zip(token, shape, strict=True))
        expected = x[(slice(None), *token)] if inside else torch.zeros(2, 3, 4)
        assert torch.equal(stored[:, :, slot], expected)


def test_what_sees_everything_is_dense():
    dense = {plan_of((30, 20), (30, 20)), plan_of((600,), (600,))}
    causal = natten_plan.plan((600,), (600,), (7,), (1,), (True,), 0, torch.device("cpu"))
    for compiled, tiles in (*dense, causal):
        assert tiles is None
        assert compiled.launches[0].usual_executor == "sdpa"


# plans
@pytest.fixture
def plans_made(monkeypatch):
    made = []
    monkeypatch.setattr(natten_call, "_kept", natten_call._Kept())
    monkeypatch.setattr(natten_call, "plan", lambda *x: made.append(x) or natten_plan.plan(*x))
    return made


def test_a_second_call_plans_nothing(plans_made):
    first = na2d(*inputs((9, 10)), 3)
    for given in (
        inputs((9, 10)),
        inputs((9, 10), n_heads=4, dim=16, batch=3, dtype=torch.float64),
    ):
        na2d(*given, (3, 3), 1, 1, (False, False))
    assert len(plans_made) == 1
    na2d(*inputs((9, 10)), 5)
    na2d(*inputs((9, 11)), 3)
    more = inputs((9, 10), n_additional=2)
    na2d(*more[:3], 3, additional_keys=more[3], additional_values=more[4])
    assert len(plans_made) == 4
    assert first.shape == (1, 9, 10, 2, 8)


def test_the_latest_plans_are_kept(plans_made, monkeypatch):
    monkeypatch.setattr(natten_call, "PLANS_KEPT", 2)
    for kernel_size in (3, 4, 3, 5, 3):
        na1d(*inputs((20,)), kernel_size)
    assert [x[1] for x in plans_made] == [(3,), (4,), (5,)]
    na1d(*inputs((20,)), 4)
    assert len(plans_made) == 4
    assert len([x for x in vars(natten_call._kept) if x.startswith("plan_")]) == 2


def test_a_plan_made_in_inference_mode_has_gradients(order):
    given = inputs((9, 14))
    with torch.inference_mode():
        expected, _ = na2d(*given, 3, return_lse=True)
    out = na2d(*given, 3)
    torch.testing.assert_close(out, expected)
    assert gradients((out,), given)[0].any()


@pytest.mark.slow
def test_it_runs_inside_a_compiled_model(order):
    torch._dynamo.reset()

    def model(q, k, v, kernel_size):
        return 2 * na2d(q + 1, k, v, kernel_size, dilation=(1, 2)) + 1

    compiled = torch.compile(model, fullgraph=True)
    with torch.no_grad():
        # lengths and numbers that change are held for variable
        for shape, kernel_size in (((9, 14), 3), ((20, 14), 3), ((20, 14), 5)):
            given = [x.detach() for x in inputs(shape)]
            found, expected = compiled(*given, kernel_size), model(*given, kernel_size)
            torch.testing.assert_close(found, expected)


def test_gradients_pass_through_a_compiled_model(order):
    torch._dynamo.reset()
    compiled = torch.compile(lambda *x: 2 * na2d(*x, 3) + 1, backend="eager")
    given = inputs((9, 14))
    found, expected = (
        gradients((f(*given),), given) for f in (compiled, lambda *x: 2 * na2d(*x, 3))
    )
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y)


# modules
@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (NeighborhoodAttention1D, (20,)),
        (NeighborhoodAttention2D, (9, 10)),
        (NeighborhoodAttention3D, (4, 5, 6)),
    ],
)
@pytest.mark.parametrize("scale", [0.3, None])
def test_modules_project_attend_and_project(module, shape, scale):
    rank = len(shape)
    layer = module(12, 3, 3, 2, (1,) * rank, (True, *OFF[1:rank]), qk_scale=scale)
    shapes = {name: tuple(x.shape) for name, x in layer.state_dict().items()}
    assert shapes == {
        "qkv.weight": (36, 12),
        "qkv.bias": (36,),
        "proj.weight": (12, 12),
        "proj.bias": (12,),
    }
    x = torch.randn(2, *shape, 12)
    q, k, v = (x @ layer.qkv.weight.T + layer.qkv.bias).view(2, *shape, 3, 3, 4).unbind(-3)
    numbers = ((3,) * rank, (2,) * rank, (1,) * rank, (True, *OFF[1:rank]))
    keys, values = (y.flatten(1, rank) for y in (k, v))
    out, _ = attend_densely(q, keys, values, kept_densely(shape, *numbers), scale)
    expected = out.reshape(2, *shape, 12) @ layer.proj.weight.T + layer.proj.bias
    torch.testing.assert_close(layer(x), expected)
    assert f"head_dim=4, num_heads=3, kernel_size={numbers[0]}, stride={numbers[1]}" in str(layer)


def test_a_module_drops_what_it_gives_while_it_trains():
    layer = NeighborhoodAttention2D(8, 2, 3, qkv_bias=False, proj_drop=1.0)
    assert layer.qkv.bias is None
    x = torch.randn(1, 5, 6, 8)
    assert not layer(x).any()
    assert layer.eval()(x).any()


# what is wrong
def tensors(**changes):
    q = torch.randn(1, 9, 10, 4, 8)
    return {"query": q, "key": q[..., :2, :], "value": q[..., :2, :], "kernel_size": 3} | changes


MORE = torch.randn(1, 5, 2, 8)
WRONG = [
    ({"kernel_size": (3,)}, "na2d.*kernel_size has 1 axes and the tokens have 2"),
    ({"kernel_size": 3.0}, "kernel_size must be an int of 1 or more"),
    ({"kernel_size": 10}, "10 tokens 1 apart do not fit in an axis of 9"),
    ({"dilation": 4}, "3 tokens 4 apart do not fit in an axis of 9"),
    ({"dilation": 0}, "dilation must be an int of 1 or more"),
    ({"stride": 4}, "a stride of 4 leaves out tokens between windows of 3"),
    ({"is_causal": (True,)}, "is_causal must be True or False, or one for each of 2 axes"),
    ({"is_causal": 1}, "is_causal must be True or False"),
    (
        {"query": MORE},
        r"query is torch.float32 \(1, 5, 2, 8\); it must be a tensor \[batch, height",
    ),
    ({"value": None}, "value is NoneType; it must be a tensor"),
    ({"query": torch.randn(1, 9, 10, 4, 8).to_sparse()}, "query is nested or sparse"),
    ({"key": torch.randn(1, 9, 9, 2, 8)}, "must have the same batch and the same tokens"),
    ({"key": torch.randn(1, 9, 10, 3, 8)}, "k has 3 heads and v has 2"),
    ({"key": torch.randn(1, 9, 10, 2, 7)}, "q has head_dim 8 and k has 7"),
    ({"key": torch.randn(1, 9, 10, 2, 8).double()}, "k is torch.float64 and q is torch.float32"),
    ({"additional_keys": MORE}, "additional_values is NoneType; .* must both be None, or tensors"),
    (
        {"additional_keys": MORE, "additional_values": MORE[:, :4]},
        "additional_keys has 5 tokens and additional_values 4",
    ),
    (
        {"additional_keys": MORE[..., :1, :], "additional_values": MORE},
        "same batch, heads, head_dim, dtype and device",
    ),
    (
        {"additional_keys": MORE, "additional_values": MORE.double()},
        r"additional_values is torch.float64 .* and value torch.float32",
    ),
    ({"attention_kwargs": {"is_causal": True}}, "attention_kwargs has 'is_causal'; it chooses"),
    ({"attention_kwargs": "flex"}, "attention_kwargs has 'flex'"),
    ({"scale": "large"}, "scale='large'; it must be a finite number"),
]


@pytest.mark.parametrize(("changes", "message"), WRONG, ids=[x[1] for x in WRONG])
def test_a_mistake_is_named(changes, message):
    with pytest.raises(MaskError, match=message):
        na2d(**tensors(**changes))


def test_each_function_is_of_its_rank_and_the_generic_one_of_any():
    for rank, function in FUNCTIONS.items():
        given = inputs((4,) * rank)
        assert torch.equal(function(*given, 3), neighborhood_attention_generic(*given, 3))
        for other in {1, 2, 3} - {rank}:
            with pytest.raises(MaskError, match=f"na{rank}d: query is"):
                function(*inputs((4,) * other), 3)
    with pytest.raises(MaskError, match=r"or .batch, height, width, heads, head_dim. or"):
        neighborhood_attention_generic(*inputs((4, 4, 4, 4)), 3)


def test_a_wrong_module_is_refused():
    with pytest.raises(MaskError, match="num_heads must divide embed_dim"):
        NeighborhoodAttention2D(10, 4, 3)
    with pytest.raises(MaskError, match=r"NeighborhoodAttention2D.*kernel_size has 3 axes"):
        NeighborhoodAttention2D(8, 4, (3, 3, 3))
    for wrong in (torch.randn(1, 5, 8), torch.randn(1, 5, 5, 7)):
        with pytest.raises(MaskError, match=r"x is .*; it must be a tensor \[batch.*embed_dim=8"):
            NeighborhoodAttention2D(8, 4, 3)(wrong)
