"""S2-Attention's modules against dense attention whose blocks are decided one by one by the rule.

Inputs require gradients wherever the kernel does not matter: they run without compiling anything.
"""

import copy
import math
import pickle
import runpy
from functools import partial
from pathlib import Path

import pytest
import torch

import flexsparse
from flexsparse import MaskError
from flexsparse.compat.dkernel import (
    LocalStrideSparseAttention,
    SparseAttention,
    combine_attn_partitions,
    get_sparse_attn_mask,
)
from flexsparse.compat.dkernel import call as dkernel_call


def keeps_block(head, q_block, kv_block, *, heads, local, stride, causal=True, **rest):
    """The rule of S2-Attention for a block, in plain Python."""
    kv_heads = rest.get("num_kv_heads") or heads
    kv_head = head // (heads // kv_heads)
    step = rest.get("head_sliding_step")
    step = max(1, stride // heads) if step is None else step
    if kv_head >= kv_heads - rest.get("num_dense_heads", 0):
        return not causal or kv_block <= q_block
    if not causal:
        left, right = (local, local) if isinstance(local, int) else local
        outside = max(0, q_block - kv_block - left + 1) + max(0, kv_block - q_block - right + 1)
        return outside % stride == 0
    shift = 0 if rest.get("homo_head") else kv_head * step
    on_stripe = (kv_block + shift + rest.get("head_sliding_offset", 0)) % stride == 0
    return 0 <= q_block - kv_block < local or (kv_block <= q_block and on_stripe)


def dense_mask(keeps, n_heads, block_size, q_len, kv_len, causal):
    """bool [n_heads, q_len, kv_len], token by token; the last query stands at the last key."""
    kept = torch.zeros(n_heads, q_len, kv_len, dtype=torch.bool)
    for head in range(n_heads):
        for row in range(q_len):
            q = kv_len - q_len + row
            for kv_block in range(-(-kv_len // block_size)):
                if keeps(head, q // block_size, kv_block):
                    end = min((kv_block + 1) * block_size, q + 1 if causal else kv_len)
                    kept[head, row, kv_block * block_size : max(end, 0)] = True
    return kept


def attend_densely(q, k, v, kept, scale=None):
    """(out, lse) of one sequence: q [n_heads, q_len, D], k and v [n_kv_heads, kv_len, D]."""
    k, v = (x.repeat_interleave(len(q) // len(x), 0) for x in (k, v))
    scores = q @ k.mT * (scale or q.shape[-1] ** -0.5)
    scores = scores.masked_fill(~kept, -math.inf)
    lse = scores.logsumexp(-1)
    weights = (scores - lse.masked_fill(lse == -math.inf, 0)[..., None]).exp()
    return weights @ v, lse


def inputs(batch, q_len, kv_len, n_heads, n_kv_heads, dim=8, seq_dim=1):
    shapes = [(batch, n_heads, q_len, dim)] + 2 * [(batch, n_kv_heads, kv_len, dim)]
    made = [torch.randn(shape) for shape in shapes]
    if seq_dim == 1:
        made = [x.transpose(1, 2).contiguous() for x in made]
    return [x.requires_grad_() for x in made]


def gradients(out, inputs):
    weights = torch.arange(out.numel(), dtype=out.dtype).view_as(out).sin()
    return torch.autograd.grad((out * weights).sum(), inputs)


BLOCK = 16
#      heads  kv heads  local  stride  further arguments
PATTERNS = {
    "as vLLM's test": (4, 4, 2, 3, {}),
    "more strides than heads": (2, 2, 1, 5, {}),
    "homogeneous": (4, 2, 2, 3, {"homo_head": True}),
    "dense heads": (4, 4, 1, 4, {"num_dense_heads": 2}),
    "GQA": (8, 2, 1, 3, {"num_kv_heads": 2}),
    "GQA with a dense head": (6, 3, 2, 4, {"num_kv_heads": 3, "num_dense_heads": 1}),
    "a pattern for each query head": (4, 2, 1, 3, {}),
    "an offset": (3, 3, 1, 4, {"head_sliding_offset": 2}),
    "a step": (3, 3, 1, 5, {"head_sliding_step": 2, "head_sliding_offset": 1}),
    "equal heads by a step of 0": (2, 1, 1, 3, {"head_sliding_step": 0}),
    "relative": (2, 2, 2, 3, {"causal": False}),
    "relative, two sides": (4, 2, (1, 3), 2, {"causal": False, "num_dense_heads": 1}),
    "dense": (2, 1, 1, 1, {}),
}


def module_and_rule(name, max_seq_len=256, **options):
    heads, _, local, stride, rest = PATTERNS[name]
    module = LocalStrideSparseAttention(heads, max_seq_len, BLOCK, local, stride, **rest, **options)
    return module, partial(keeps_block, heads=heads, local=local, stride=stride, **rest)


def expected(name, rule, q, k, v, scale=None):
    """(out, lse) of batches [B, heads, tokens, D], each row by itself."""
    causal = PATTERNS[name][4].get("causal", True)
    kept = dense_mask(rule, q.shape[1], BLOCK, q.shape[2], k.shape[2], causal)
    results = [attend_densely(*row, kept, scale) for row in zip(q, k, v, strict=True)]
    return [torch.stack(x) for x in zip(*results, strict=True)]


@pytest.mark.parametrize("seq_dim", [1, 2])
@pytest.mark.parametrize("name", PATTERNS)
def test_out_lse_and_gradients_agree_with_the_rule(name, seq_dim):
    heads, kv_heads = PATTERNS[name][:2]
    module, rule = module_and_rule(name, seq_dim=seq_dim)
    given = inputs(2, 150, 150, heads, kv_heads, seq_dim=seq_dim)
    out, lse = module(*given, sm_scale=0.3, return_lse=True)
    by_head = [x.transpose(1, 2) if seq_dim == 1 else x for x in given]
    wanted, wanted_lse = expected(name, rule, *by_head, scale=0.3)
    wanted = wanted.transpose(1, 2) if seq_dim == 1 else wanted
    assert out.is_contiguous()
    torch.testing.assert_close(out, wanted)
    torch.testing.assert_close(lse, wanted_lse)
    torch.testing.assert_close(gradients(out, given), gradients(wanted, given))


@pytest.mark.parametrize("name", ["GQA with a dense head", "an offset", "relative, two sides"])
@pytest.mark.parametrize(("q_len", "kv_len"), [(1, 1), (1, 77), (40, 133), (129, 130)])
def test_chunks_and_steps_stand_at_the_last_keys(name, q_len, kv_len):
    heads, kv_heads = PATTERNS[name][:2]
    module, rule = module_and_rule(name, seq_dim=2)
    given = inputs(2, q_len, kv_len, heads, kv_heads, seq_dim=2)
    out = module(*given)
    wanted, _ = expected(name, rule, *given)
    torch.testing.assert_close(out, wanted)
    torch.testing.assert_close(gradients(out, given), gradients(wanted, given))


def in_rows(lengths, starts, q_len, kv_len):
    """Of each sequence, its query rows and its key rows in a padded batch."""
    for start, length in zip(starts, lengths, strict=True):
        if q_len == kv_len:
            yield slice(start, start + length), slice(start, start + length)
        else:
            yield slice(max(q_len - length, 0), q_len), slice(start, start + length)


def expected_of_sequences(name, rule, given, rows):
    """The output of each sequence by itself, put where it was; 0 elsewhere."""
    q, k, v = (x.transpose(1, 2) for x in given)
    causal = PATTERNS[name][4].get("causal", True)
    wanted = torch.zeros_like(q)
    for b, (q_rows, kv_rows) in enumerate(rows):
        one = q[b, :, q_rows], k[b, :, kv_rows], v[b, :, kv_rows]
        lengths = one[0].shape[1], one[1].shape[1]
        out, _ = attend_densely(*one, dense_mask(rule, q.shape[1], BLOCK, *lengths, causal))
        wanted[b, :, q_rows] = out
    return wanted.transpose(1, 2)


PADDINGS = {
    "left": ([0, 7, 90], None),
    "right": (None, [100, 1, 64]),
    "both": ([5, 0, 40], [60, 33, 0]),
}


@pytest.mark.parametrize("q_len", [100, 30, 1])
@pytest.mark.parametrize("side", PADDINGS)
@pytest.mark.parametrize("name", ["GQA with a dense head", "relative, two sides"])
def test_padding_is_as_if_it_were_not_there(name, side, q_len):
    module, rule = module_and_rule(name)
    given = inputs(3, q_len, 100, *PATTERNS[name][:2])
    left, lengths = PADDINGS[side]
    starts = left or [0, 0, 0]
    lengths_or_rest = lengths or [100 - x for x in starts]
    out = module(
        *given,
        left_paddings=left and torch.tensor(left),
        seqlens=lengths and torch.tensor(lengths, dtype=torch.int32),
    )
    rows = in_rows(lengths_or_rest, starts, q_len, 100)
    wanted = expected_of_sequences(name, rule, given, rows)
    torch.testing.assert_close(out, wanted)
    torch.testing.assert_close(gradients(out, given), gradients(wanted, given))


def ends(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).int()


@pytest.mark.parametrize("q_lens", [[70, 3, 100], [1, 1, 1], [20, 1, 100], [33, 33, 33]], ids=str)
@pytest.mark.parametrize("name", ["GQA with a dense head", "relative"])
def test_packed_sequences_are_as_each_by_itself(name, q_lens):
    module, rule = module_and_rule(name)
    heads, kv_heads = PATTERNS[name][:2]
    kv_lens = q_lens if q_lens[0] in (33, 70) else [70, 3, 100]
    given = [
        x[0].detach().requires_grad_()
        for x in inputs(1, sum(q_lens), sum(kv_lens), heads, kv_heads)
    ]
    cu_q, cu_k = ends(q_lens), ends(kv_lens)
    # theirs, too, need not be told of whole prompts or single steps
    told = {"cu_seqlen_q": cu_q} if q_lens[0] == 20 else {}
    out, lse = module(*given, cu_seqlen_k=cu_k, return_lse=True, **told)
    q, k, v = (x.transpose(0, 1) for x in given)
    causal = PATTERNS[name][4].get("causal", True)
    wanted, wanted_lse = [], []
    for i, lengths in enumerate(zip(q_lens, kv_lens, strict=True)):
        q_rows, kv_rows = slice(*cu_q[i : i + 2]), slice(*cu_k[i : i + 2])
        kept = dense_mask(rule, heads, BLOCK, *lengths, causal)
        one, one_lse = attend_densely(q[:, q_rows], k[:, kv_rows], v[:, kv_rows], kept)
        wanted.append(one.transpose(0, 1))
        wanted_lse.append(one_lse)
    wanted = torch.cat(wanted)
    torch.testing.assert_close(out, wanted)
    torch.testing.assert_close(lse, torch.cat(wanted_lse, 1))
    torch.testing.assert_close(gradients(out, given), gradients(wanted, given))


def random_pattern(*shape):
    """Blocks kept by chance, the second row of blocks empty."""
    pattern = torch.rand(shape) < 0.4
    pattern[..., 1, :] = False
    return pattern


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("n_patterns", [None, 4, 2])
@pytest.mark.parametrize(("q_len", "kv_len"), [(120, 120), (1, 121), (50, 90)])
def test_a_table_of_blocks_is_looked_up(causal, n_patterns, q_len, kv_len):
    pattern = random_pattern(*((n_patterns,) if n_patterns else ()), 8, 8)
    module = SparseAttention(BLOCK, pattern.to(torch.uint8), causal=causal)
    given = inputs(2, q_len, kv_len, 4, 2)
    out, lse = module(*given, return_lse=True)
    table = pattern.expand(n_patterns or 4, 8, 8).repeat_interleave(4 // (n_patterns or 4), 0)
    kept = dense_mask(lambda *at: table[at], 4, BLOCK, q_len, kv_len, causal)
    q, k, v = (x.transpose(1, 2) for x in given)
    results = [attend_densely(*row, kept) for row in zip(q, k, v, strict=True)]
    wanted = torch.stack([x for x, _ in results]).transpose(1, 2)
    torch.testing.assert_close(out, wanted)
    torch.testing.assert_close(lse, torch.stack([x for _, x in results]))
    torch.testing.assert_close(gradients(out, given), gradients(wanted, given))


def test_a_table_takes_padding_and_packed_sequences():
    pattern = random_pattern(4, 8, 8)
    module = SparseAttention(BLOCK, pattern)
    given = inputs(2, 100, 100, 4, 2)
    padded = module(*given, left_paddings=torch.tensor([30, 0]), seqlens=torch.tensor([70, 45]))
    real = [torch.cat([x[0, 30:], x[1, :45]]) for x in given]
    packed = module(*real, cu_seqlen_k=ends([70, 45]))
    kept = [dense_mask(lambda *at: pattern[at], 4, BLOCK, n, n, True) for n in (70, 45)]
    for out, rows, mask in (
        (packed[:70], slice(0, 70), kept[0]),
        (packed[70:], slice(70, 115), kept[1]),
    ):
        q, k, v = (x[rows].transpose(0, 1) for x in real)
        torch.testing.assert_close(out, attend_densely(q, k, v, mask)[0].transpose(0, 1))
    torch.testing.assert_close(padded[0, 30:], packed[:70])
    torch.testing.assert_close(padded[1, :45], packed[70:])
    assert (padded[0, :30] == 0).all()
    assert (padded[1, 45:] == 0).all()


@pytest.mark.parametrize("parts", [[4, 4, 4], [3, 4, 5], [12]], ids=str)
def test_parts_of_the_keys_combine_to_the_whole(parts):
    """A sequence split over devices: the last 64 queries, and the keys in parts of whole blocks."""
    options = {"block_size": BLOCK, "local_blocks": 2, "vert_stride": 3}
    given = inputs(1, 192, 192, 4, 4, seq_dim=2)
    whole = SparseAttention(BLOCK, get_sparse_attn_mask(4, 192, **options)[1], seq_dim=2)
    wanted = whole(*given)[:, :, 128:]
    q, k, v = given
    results, start = [], 0
    for part in parts:
        end = start + part * BLOCK
        _, pattern, _ = get_sparse_attn_mask(
            4, 64, q_start_position=128, kv_start_position=start, kv_seqlen=end - start, **options
        )
        module = SparseAttention(BLOCK, pattern, seq_dim=2, causal=end == 192)
        keys = slice(start, end)
        rows = q[:, :, 128:]
        results.append(module(rows, k[:, :, keys], v[:, :, keys], return_lse=True))
        start = end
    out = combine_attn_partitions(*results) if len(results) > 1 else results[0][0]
    torch.testing.assert_close(out, wanted)
    torch.testing.assert_close(gradients(out, given), gradients(wanted, given))


# dkernel's own tests of get_sparse_attn_mask: 16 tokens, blocks of 2, local 2, stride 3
THEIR_TABLES = {
    True: "#....... ##...... ###..... #.##.... #..##... #..###.. #..#.##. #..#..##",
    False: "##..#..# ###..#.. .###..#. ..###..# #..###.. .#..###. ..#..### #..#..##",
}


@pytest.mark.parametrize("causal", [True, False])
def test_the_tables_of_their_tests(causal):
    (starts, columns), blocks, tokens = get_sparse_attn_mask(
        2, 16, 2, 2, 3, homo_head=True, causal=causal, return_dense=True
    )
    table = torch.tensor([[x == "#" for x in row] for row in THEIR_TABLES[causal].split()])
    assert blocks.dtype == torch.bfloat16
    assert torch.equal(blocks.bool(), table[None])
    assert torch.equal(
        tokens.bool()[0], dense_mask(lambda h, *at: table[at], 1, 2, 16, 16, causal)[0]
    )
    for row in range(8):
        row_columns = columns[0, starts[0, row] : starts[0, row + 1]]
        assert row_columns.tolist() == table[row].nonzero().flatten().tolist()


@pytest.mark.parametrize("name", PATTERNS)
def test_the_tensor_of_a_pattern_is_its_module(name):
    heads, kv_heads, local, stride, rest = PATTERNS[name]
    module, _ = module_and_rule(name)
    causal = rest.get("causal", True)
    pattern = get_sparse_attn_mask(heads, 150, BLOCK, local, stride, **rest)[1]
    given = inputs(1, 150, 150, heads, kv_heads)
    by_table = SparseAttention(BLOCK, pattern, causal=causal)
    torch.testing.assert_close(module(*given), by_table(*given))


def test_the_other_positions_of_stripes():
    blocks = get_sparse_attn_mask(1, 8, 1, 2, 3, vert_position_type="relative")[1][0]
    assert torch.equal(blocks.bool(), (blocks_of(False) == 1).tril())
    blocks = get_sparse_attn_mask(1, 8, 1, 2, 3, vert_position_type="absolute", causal=False)[1][0]
    band = (torch.arange(8)[:, None] - torch.arange(8)).abs() < 2
    assert torch.equal(blocks.bool(), band | (torch.arange(8) % 3 == 0))


def blocks_of(causal):
    return torch.tensor([[x == "#" for x in row] for row in THEIR_TABLES[causal].split()]).int()


def test_past_len_leaves_rows_out():
    whole, part = (get_sparse_attn_mask(2, 100, 16, past_len=n, return_dense=True) for n in (0, 40))
    assert torch.equal(part[1], whole[1][:, 3:])
    assert torch.equal(part[2], whole[2][:, 40:])


def test_heads_of_a_partition():
    whole, _ = module_and_rule("as vLLM's test")
    given = inputs(1, 100, 100, 4, 4)
    part = LocalStrideSparseAttention(4, 256, BLOCK, 2, 3, active_head_range=(1, 3))
    torch.testing.assert_close(part(*(x[:, :, 1:3] for x in given)), whole(*given)[:, :, 1:3])


def test_packed_tensors_are_taken_apart():
    module, _ = module_and_rule("as vLLM's test")
    qkv = torch.randn(2, 100, 12, 8, requires_grad=True)
    q, k, v = qkv.chunk(3, 2)
    wanted = module(q, k, v)
    kv_apart = module(q, torch.cat([k, v], 2), split_qkv=lambda x: x.chunk(2, 2))
    torch.testing.assert_close(kv_apart, wanted)
    out = module(qkv, split_qkv=lambda x: x.chunk(3, 2))
    torch.testing.assert_close(gradients(out, [qkv]), gradients(wanted, [qkv]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_is_as_exact_as_dense_attention_in_it(dtype):
    module, rule = module_and_rule("GQA")
    given = [x.detach().to(dtype).requires_grad_() for x in inputs(1, 150, 150, 8, 2, dim=32)]
    by_head = [x.transpose(1, 2) for x in given]
    kept = dense_mask(rule, 8, BLOCK, 150, 150, True)
    exact = attend_densely(*(x[0].double() for x in by_head), kept)[0]
    theirs = (attend_densely(*(x[0] for x in by_head), kept)[0] - exact).norm()
    assert (module(*given)[0].transpose(0, 1) - exact).norm() <= 2 * theirs


@pytest.mark.parametrize("kind", [LocalStrideSparseAttention, SparseAttention])
def test_a_module_can_be_copied_pickled_and_moved(kind):
    if kind is SparseAttention:
        module = SparseAttention(BLOCK, random_pattern(8, 8, 8))
        assert copy.deepcopy(module).to("meta").sparse_pattern.is_meta
    else:
        module, _ = module_and_rule("GQA")
    given = inputs(1, 99, 99, 8, 2)
    wanted = module(*given)
    moved = copy.deepcopy(module).to("cpu", torch.bfloat16)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), moved):
        torch.testing.assert_close(other(*given), wanted)
    assert module.state_dict() == {}
    assert not list(module.parameters())
    module.load_state_dict(module.state_dict())


def test_lengths_already_seen_are_not_analysed_again(monkeypatch):
    compiled = []
    compile_mask = dkernel_call.compile_mask
    monkeypatch.setattr(
        dkernel_call, "compile_mask", lambda *a, **b: compiled.append(a) or compile_mask(*a, **b)
    )
    layers = [LocalStrideSparseAttention(2, 512, 32, 1, 3) for _ in range(2)]
    layers += [SparseAttention(32, random_pattern(16, 16)) for _ in range(2)]
    pads = torch.tensor([3])
    for _ in range(2):
        for length in (211, 223):
            for layer in layers:
                layer(*inputs(1, length, length, 2, 2))
        layers[0](*inputs(1, 211, 211, 2, 2), left_paddings=pads)
    # equal layers share; tables differ; padding is a plan of its own
    assert len(compiled) == 2 + 2 * 2 + 1
    assert dkernel_call._plan.cache_info().maxsize == dkernel_call.PLANS_KEPT


def test_in_a_compiled_model_the_analysis_is_not_traced():
    module, given = SparseAttention(BLOCK, random_pattern(8, 8)), inputs(1, 100, 100, 2, 2)
    wanted = module(*given)
    misses = dkernel_call._plan.cache_info().misses
    torch.testing.assert_close(torch.compile(module)(*given), wanted)
    assert dkernel_call._plan.cache_info().misses == misses


def test_a_pattern_made_in_inference_mode_may_be_written_to():
    with torch.inference_mode():
        module = SparseAttention(16, torch.ones(4, 4).tril().bool())
        q, k, v = torch.randn(3, 1, 64, 2, 16)
        module(q, k, v)
        module.sparse_pattern[3, 0] = False
        out = module(q, k, v)
        again = SparseAttention(16, module.sparse_pattern.clone())
        assert torch.equal(out, again(q, k, v))


def test_a_pattern_may_be_written_to():
    module, given = SparseAttention(BLOCK, random_pattern(8, 8)), inputs(1, 100, 100, 2, 2)
    module(*given)
    module.sparse_pattern[:] = True
    causal = SparseAttention(BLOCK, torch.ones(8, 8))
    torch.testing.assert_close(module(*given), causal(*given))


def test_lengths_and_numbers_share_a_kernel():
    """Through flex, which is compiled: here nothing requires a gradient."""
    for step, (length, local, stride) in enumerate([(300, 2, 3), (401, 1, 3), (256, 3, 3)]):
        module = LocalStrideSparseAttention(3, 512, BLOCK, local, stride)
        given = [x.detach() for x in inputs(2, length, length, 3, 3, dim=16)]
        out = module(*given)
        if step == 0:
            torch._dynamo.utils.counters.clear()
        rule = partial(keeps_block, heads=3, local=local, stride=stride)
        kept = dense_mask(rule, 3, BLOCK, length, length, True)
        for row in range(2):
            q, k, v = (x[row].transpose(0, 1) for x in given)
            wanted = attend_densely(q, k, v, kept)[0].transpose(0, 1)
            torch.testing.assert_close(out[row], wanted)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 0


def test_padding_through_a_kernel():
    module, rule = module_and_rule("as vLLM's test")
    given = [x.detach() for x in inputs(3, 100, 100, 4, 4, dim=16)]
    out = module(*given, left_paddings=torch.tensor([0, 7, 90]))
    rows = in_rows([100, 93, 10], [0, 7, 90], 100, 100)
    torch.testing.assert_close(out, expected_of_sequences("as vLLM's test", rule, given, rows))


def local_stride(**changes):
    arguments = {
        "num_heads": 4,
        "max_seq_len": 256,
        "block_size": 16,
        "local_blocks": 2,
        "vert_stride": 3,
    }
    return LocalStrideSparseAttention(**{**arguments, **changes})


WRONG_MODULES = [
    ({"vert_stride": 0}, r"vert_stride=0\): vert_stride must be an int of 1 or more"),
    ({"local_blocks": 0}, r"local_blocks"),
    (
        {"local_blocks": (1, 2)},
        r"local_blocks=\(1, 2\), causal=True\): local_blocks must be an int",
    ),
    ({"block_size": 0}, r"block_size=0\): block_size must be an int of 1 or more"),
    ({"max_seq_len": 10.0}, r"max_seq_len=10.0\): max_seq_len must be an int"),
    ({"num_heads": -4}, r"num_heads=-4\): num_heads must be an int of 1 or more"),
    ({"num_kv_heads": 3}, r"num_kv_heads must divide num_heads"),
    ({"num_dense_heads": 5}, r"at least num_dense_heads"),
    ({"homo_head": True, "num_dense_heads": 1}, r"heads cannot be alike and some of them dense"),
    ({"head_sliding_step": -1}, r"head_sliding_step must be an int of 0 or more"),
    ({"active_head_range": (2, 5)}, r"active_head_range=\(2, 5\); it must be \(start, end\)"),
    ({"active_head_range": [0, 2]}, r"active_head_range=\[0, 2\]; it must be"),
    ({"seq_dim": 3}, r"seq_dim=3; it must be 1, 2, or None"),
    ({"block_m": "x"}, r"LocalStrideSparseAttention\(block_m='x'\): block_m must be an int"),
    ({"strides": 3}, r"LocalStrideSparseAttention got strides; besides its arguments it takes"),
    ({"out": torch.zeros(1)}, r"out=.* take what it returns"),
]


@pytest.mark.parametrize(("changes", "text"), WRONG_MODULES, ids=[str(x[0]) for x in WRONG_MODULES])
def test_a_wrong_module_is_refused(changes, text):
    with pytest.raises(MaskError, match=text):
        local_stride(**changes)


WRONG_PATTERNS = [
    ([[1]], "sparse_pattern is list; it must be a tensor"),
    (torch.ones(4), r"sparse_pattern is \(4,\); it must be a tensor \[blocks, blocks\] or"),
    (torch.ones(0, 0), r"sparse_pattern is \(0, 0\)"),
    (torch.tensor([[1, 2], [0, 1]]), "sparse_pattern holds 2; it must hold 0 and 1"),
    (torch.tensor([[1, 0.5], [0, 1]]), "sparse_pattern holds 0.5"),
    (torch.tensor([[1, -1], [0, 1]]), "sparse_pattern holds -1"),
]


@pytest.mark.parametrize(("pattern", "text"), WRONG_PATTERNS, ids=[x[1] for x in WRONG_PATTERNS])
def test_a_wrong_pattern_is_refused(pattern, text):
    with pytest.raises(MaskError, match=text):
        SparseAttention(16, pattern)


def ones(*shape):
    return torch.ones(shape)


STRAIGHT = (ones(2, 50, 4, 8), ones(2, 50, 4, 8), ones(2, 50, 4, 8))
PACKED = (ones(50, 4, 8), ones(50, 4, 8), ones(50, 4, 8))
INT = torch.tensor
WRONG_CALLS = [
    ((ones(2, 50, 4), *PACKED[1:]), {}, r"give cu_seqlen_k"),
    ((ones(2, 50), *STRAIGHT[1:]), {}, r"q is \(2, 50\); q, k and v must all be"),
    ((STRAIGHT[0], PACKED[1], PACKED[2]), {}, r"k is \(50, 4, 8\)"),
    ((STRAIGHT[0], None, STRAIGHT[2]), {}, "k is None and v is not"),
    ((STRAIGHT[0],), {}, "v is None; give split_qkv"),
    ((PACKED[0],), {"split_qkv": lambda qkv: (qkv, qkv)}, "split_qkv returned 2 tensors; it must"),
    ((ones(2, 50, 6, 8), *STRAIGHT[1:]), {}, "q has 6 heads, not a multiple of the 4 of k"),
    ((ones(2, 50, 8, 8), ones(2, 50, 2, 8), ones(2, 50, 2, 8)), {}, "the pattern 4; it must have"),
    (tuple(ones(1, 257, 4, 8) for _ in "qkv"), {}, "257 keys and this module is for 256 at most"),
    ((ones(2, 51, 4, 8), *STRAIGHT[1:]), {}, "51 queries and 50 keys"),
    ((*STRAIGHT[:2], ones(2, 50, 4, 8).long()), {}, "v is torch.int64 and q is torch.float32"),
    (STRAIGHT, {"cu_seqlen_k": INT([0, 50])}, "cu_seqlen_k was given, and q is not packed"),
    (PACKED, {"cu_seqlen_k": INT([0, 50]), "seqlens": INT([50])}, "seqlens was given, and q is"),
    (PACKED, {"cu_seqlen_k": INT([0.0, 50.0])}, r"cu_seqlen_k is torch.float32 \(2,\)"),
    (PACKED, {"cu_seqlen_k": INT([0, 40])}, "ends at 40"),
    (PACKED, {"cu_seqlen_k": INT([1, 50])}, "starts at 1; it must start at 0"),
    (PACKED, {"cu_seqlen_k": INT([0, 50]), "cu_seqlen_q": INT([0, 9, 50])}, "cu_seqlen_q is"),
    ((ones(20, 4, 8), *PACKED[1:]), {"cu_seqlen_k": INT([0, 9, 50])}, "give cu_seqlen_q"),
    (STRAIGHT, {"left_paddings": INT([0])}, r"left_paddings is torch.int64 \(1,\).*\[2\]"),
    (STRAIGHT, {"left_paddings": INT([0, 51])}, "row 1 has 51 tokens of padding in front and -1"),
    (STRAIGHT, {"left_paddings": INT([-1, 0])}, "row 0 has -1 tokens of padding"),
    (STRAIGHT, {"seqlens": INT([50, 51])}, "row 1 has 0 tokens of padding in front and 51 real"),
    (STRAIGHT, {"seqlens": [50, 50]}, "seqlens is list"),
]


@pytest.mark.parametrize(("given", "options", "text"), WRONG_CALLS, ids=[x[2] for x in WRONG_CALLS])
def test_a_wrong_call_is_refused(given, options, text):
    with pytest.raises(MaskError, match=text):
        local_stride()(*given, **options)


def test_a_chunk_of_a_pattern_takes_what_it_is_for():
    module = SparseAttention(16, torch.ones(2, 6), causal=True)
    with pytest.raises(MaskError, match="not square, so its rows are those of one chunk"):
        module(*PACKED, cu_seqlen_k=INT([0, 20, 50]))
    with pytest.raises(MaskError, match="one of 32 x 96 tokens; it takes no more"):
        module(ones(1, 33, 4, 8), ones(1, 96, 4, 8), ones(1, 96, 4, 8))


WRONG_TENSORS = [
    ({"q_start_position": 10}, "q_start_position=10.* multiple of block_size=64"),
    ({"vert_position_type": "abs"}, "vert_position_type must be one of 'absolute', 'relative'"),
    ({"num_kv_heads": 3}, "num_kv_heads must divide num_heads"),
    ({"homo_head": True, "num_dense_heads": 1}, "or none with homo_head"),
    ({"local_blocks": 0}, "local_blocks must be an int of 1 or more"),
    (
        {"local_blocks": (1,)},
        r"local_blocks=\(1,\)\): local_blocks must be an int of 1 or more, or",
    ),
]


@pytest.mark.parametrize(("changes", "text"), WRONG_TENSORS, ids=[x[1] for x in WRONG_TENSORS])
def test_a_wrong_tensor_is_refused(changes, text):
    with pytest.raises(MaskError, match=text):
        get_sparse_attn_mask(4, 256, **changes)


def test_parts_to_combine_are_pairs():
    with pytest.raises(MaskError, match="got 1 parts and hdim=1"):
        combine_attn_partitions((ones(1), ones(1)))
    part, longer = [(ones(1, 2, n, 8), ones(1, 2, n)) for n in (5, 6)]
    for wrong, options in (
        ((part, longer), {}),
        ((part, part), {"hdim": 2}),
        ((part, part[:1]), {}),
    ):
        with pytest.raises(MaskError, match=r"part \d has the shapes .*; each part must be"):
            combine_attn_partitions(*wrong, **options)


def test_the_example_runs(monkeypatch, capsys):
    example = Path(flexsparse.__file__).parent.parent / "examples" / "s2_attention.py"
    monkeypatch.setattr("sys.argv", [str(example), "--tokens", "512", "--heads", "2"])
    runpy.run_path(str(example), run_name="__main__")
    printed = capsys.readouterr().out
    assert "prefill in 2 chunks: error" in printed
    assert float(printed.split("error ")[1].split()[0]) < 1e-5
