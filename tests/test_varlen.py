"""varlen: each packed sequence gets what it would get alone."""

import math
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import dense_classes, masks, painted

import flexsparse as fs
from flexsparse import ExecutorError, MaskError, b, kv_idx, lookup, per_head, q_idx
from flexsparse.executors.streaming import Positions
from flexsparse.masks import block_sparse, causal, prefix, sink, window
from flexsparse.packed.varlen import PLANS_KEPT, plan_varlen, varlen

Q_LENS, KV_LENS = [50, 0, 300, 129, 7], [70, 5, 300, 100, 0]


def ends(lens):
    return torch.tensor([0, *lens]).cumsum(0).int()


def kept_in(mask, sequence, q_len, kv_len, offset, head=0):
    """Bool [q_len, kv_len] of one sequence, element by element."""
    q = torch.arange(q_len)[:, None] + offset
    kept = mask(torch.tensor(sequence), torch.tensor(head), q, torch.arange(kv_len))
    return kept.expand(q_len, kv_len)


def attend_alone(q, k, v, kept, score=lambda s: s):
    """Dense attention of one sequence, tensors [tokens, heads, D]: (out, lse [heads, tokens])."""
    group = q.shape[1] // k.shape[1]
    q, k, v = (x.transpose(0, 1) for x in (q, *(x.repeat_interleave(group, 1) for x in (k, v))))
    scores = score(q @ k.mT / math.sqrt(q.shape[2])).masked_fill(~kept, -math.inf)
    lse = scores.logsumexp(-1) if k.shape[1] else scores.new_full(scores.shape[:2], -math.inf)
    weights = (scores - lse.masked_fill(lse == -math.inf, 0)[..., None]).exp()
    return (weights @ v).transpose(0, 1), lse


def attend_each(q, k, v, q_lens, kv_lens, mask_of_head, score=lambda sequence, s: s):
    """What varlen shall give, one sequence after another; mask_of_head: one mask for each head."""
    parts = zip(*(x.split(n) for x, n in ((q, q_lens), (k, kv_lens), (v, kv_lens))), strict=True)
    outs, lses = [], []
    for i, (q_i, k_i, v_i) in enumerate(parts):
        sizes = (len(q_i), len(k_i), len(k_i) - len(q_i))
        kept = torch.stack([kept_in(m, i, *sizes, h) for h, m in enumerate(mask_of_head)])
        out, lse = attend_alone(q_i, k_i, v_i, kept, lambda s, i=i: score(i, s))
        outs.append(out)
        lses.append(lse)
    return torch.cat(outs), torch.cat(lses, 1)


def inputs(q_lens=Q_LENS, kv_lens=KV_LENS, n_heads=4, n_kv_heads=2, d=16, grad=False):
    sizes = ((q_lens, n_heads), (kv_lens, n_kv_heads), (kv_lens, n_kv_heads))
    return [torch.randn(sum(n), heads, d, requires_grad=grad) for n, heads in sizes]


def assert_right(q, k, v, q_lens, kv_lens, mask, score=lambda sequence, s: s, **options):
    mask_of_head = [mask] * q.shape[1] if isinstance(mask, fs.Mask) else list(mask)
    out, lse = varlen(q, k, v, ends(q_lens), ends(kv_lens), mask, return_lse=True, **options)
    expected, expected_lse = attend_each(q, k, v, q_lens, kv_lens, mask_of_head, score)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(lse, expected_lse)
    assert out.is_contiguous()
    return out, expected


MASKS = {
    "everything": fs.everything,
    "causal": causal,
    "streaming": causal & (sink(3) | window(20)),
    "a prefix for each": prefix(torch.tensor([3, 1, 40, 60, 1])),
    "a table for each": block_sparse(torch.rand(5, 4, 10, 8) < 0.4, 64, q_offset=-300),
    "heads of their own": per_head([causal, causal & window(9), causal, fs.everything]),
}


@pytest.mark.parametrize("own_blocks", [False, True])
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_each_sequence_gets_what_it_would_get_alone(mask, own_blocks):
    heads = [mask] * 4 if isinstance(mask, fs.Mask) else [mask[h] for h in range(4)]
    q, k, v = inputs(grad=True)
    options = {"return_lse": True, "own_blocks": own_blocks}
    out, lse = varlen(q, k, v, ends(Q_LENS), ends(KV_LENS), mask, **options)
    expected, expected_lse = attend_each(q, k, v, Q_LENS, KV_LENS, heads)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(lse, expected_lse)
    weights = torch.randn_like(out)
    grads, wanted = (torch.autograd.grad(x, (q, k, v), weights) for x in (out, expected))
    torch.testing.assert_close(grads, wanted)


def test_flex_runs_the_same_masks():
    q, k, v = inputs([40, 200, 60], [40, 200, 60])
    mask = causal & window(50)
    out = varlen(q, k, v, ends([40, 200, 60]), mask=mask, executor="flex")
    expected, _ = attend_each(q, k, v, [40, 200, 60], [40, 200, 60], [mask] * 4)
    torch.testing.assert_close(out, expected)


def with_padding(kept, steps):
    q_pad, kv_pad = (-n % step for n, step in zip(kept.shape, steps, strict=True))
    return torch.nn.functional.pad(kept, (0, kv_pad, 0, q_pad))


@settings(max_examples=60)
@given(
    mask=masks,
    lens=st.lists(st.tuples(st.integers(0, 200), st.integers(0, 200)), min_size=1, max_size=5),
    offset=st.sampled_from([None, None, 0, 11]),
    block_size=st.sampled_from([64, (32, 16)]),
    own_blocks=st.booleans(),
    is_self=st.booleans(),
)
def test_blocks_are_those_of_the_sequences_put_together(
    mask, lens, offset, block_size, own_blocks, is_self
):
    lens = [(n, n) for n, _ in lens] if is_self else lens
    q_lens, kv_lens = zip(*lens, strict=True)
    if not sum(q_lens) or not sum(kv_lens):
        return
    plan = plan_varlen(
        mask,
        ends(q_lens),
        ends(kv_lens),
        n_heads=2,
        q_offset=offset,
        block_size=block_size,
        own_blocks=own_blocks,
    )
    each = [  # of each head, of each sequence
        [
            kept_in(mask, i, n, m, m - n if offset is None else offset, head)
            for i, (n, m) in enumerate(lens)
        ]
        for head in range(2)
    ]
    classes = plan.compiled._all_heads()
    if plan.is_batch:
        kept = torch.stack([torch.stack(kept) for kept in each], 1)
    else:
        steps = classes.grid.block_size if own_blocks else (1, 1)
        each = [[with_padding(x, steps) for x in kept] for kept in each]
        kept = torch.stack([torch.block_diag(*kept).bool() for kept in each])[None]
    expected = dense_classes(kept, classes.grid.block_size)
    assert torch.equal(painted(classes).expand_as(expected), expected)


def test_sequences_of_one_length_are_a_batch_and_causal_ones_take_sdpa():
    plan = plan_varlen(causal, ends([96, 96, 96]), n_heads=4)
    assert plan.is_batch
    assert plan.compiled.launches[0].usual_executor == "sdpa"
    mask = prefix(torch.tensor([5, 50, 96]))
    q, k, v = inputs([96] * 3, [96] * 3)
    out = varlen(q, k, v, ends([96] * 3), mask=mask, executor="blockwise")
    torch.testing.assert_close(out, attend_each(q, k, v, [96] * 3, [96] * 3, [mask] * 4)[0])


@pytest.mark.parametrize("lens", [[96, 96, 96], [40, 70, 96]])
@pytest.mark.parametrize("own_blocks", [False, True])
def test_dropout_drops_what_its_pattern_says(lens, own_blocks):
    q, k, v = inputs(lens, lens)
    cu_seqlens, mask = ends(lens), causal & window(50)
    options = {"dropout_p": 0.3, "dropout_seed": 7, "own_blocks": own_blocks}
    out = varlen(q, k, v, cu_seqlens, mask=mask, executor="blockwise", **options)
    plan = plan_varlen(mask, cu_seqlens, n_heads=4, own_blocks=own_blocks)
    for i, (q_i, k_i, v_i, out_i) in enumerate(
        zip(*(x.split(lens) for x in (q, k, v, out)), strict=True)
    ):
        n = lens[i]
        kept = plan.dropout_pattern(i, 4, 0.3, 7)
        assert 0.6 < kept.float().mean() < 0.8
        seen = kept_in(mask, i, n, n, 0)
        k_i, v_i = (x.repeat_interleave(2, 1) for x in (k_i, v_i))
        scores = torch.einsum("qhd,khd->hqk", q_i, k_i) / 4
        weights = scores.masked_fill(~seen, -math.inf).softmax(-1) * kept / 0.7
        torch.testing.assert_close(out_i, torch.einsum("hqk,khd->qhd", weights, v_i))


def test_windows_of_packed_documents_are_what_flash_attention_takes():
    plan = plan_varlen(causal & window(50), ends([300, 70, 129]), n_heads=4)
    band = plan.compiled.launches[0].band
    assert (band.left, band.right) == (49, 0)
    assert torch.equal(band.cu_seqlens, ends([300, 70, 129]))


def test_streams_of_packed_sequences_are_of_all_of_them_alone():
    ends_q, ends_kv = ends([30, 20]), ends([40, 20])
    plan = plan_varlen(causal & (sink(3) | window(9)), ends_q, ends_kv, n_heads=2)
    compiled = pickle.loads(pickle.dumps(plan.compiled))
    (launch,) = compiled.launches
    assert launch.streams == ((3, 9),)
    assert {
        name: x.tolist() for name, x in launch.positions._asdict().items() if x is not None
    } == {
        "cu_seqlens_q": [0, 30, 50],
        "cu_seqlens_k": [0, 40, 60],
        "q_offset": [10, 0],
    }
    for part in (compiled.at(20, 60, 0), compiled.row(3)):
        assert part.launches[0].streams is None
        assert part.launches[0].positions == Positions(q_offset=part.q_offset)


def test_no_block_where_sequences_meet_is_evaluated_element_by_element():
    mask = causal & (sink(3) | window(20))
    plan = plan_varlen(mask, ends([8000, 700, 5123, 60, 9000]), n_heads=1)
    assert plan.compiled.launches[0].classes.evaluated == 0


def test_the_first_query_may_stand_elsewhere():
    q, k, v = inputs([3, 4], [30, 40])
    options = {"q_offset": torch.tensor([0, 20]), "executor": "blockwise"}
    out = varlen(q, k, v, ends([3, 4]), ends([30, 40]), causal, **options)
    for rows, keys, offset in ((slice(0, 3), slice(0, 30), 0), (slice(3, 7), slice(30, 70), 20)):
        kept = kept_in(causal, 0, len(q[rows]), len(k[keys]), offset)
        expected, _ = attend_alone(q[rows], k[keys], v[keys], kept)
        torch.testing.assert_close(out[rows], expected)


@pytest.mark.parametrize("own_blocks", [False, True])
def test_a_score_mod_is_given_sequences_and_positions_and_gets_gradients(own_blocks):
    q, k, v = inputs(grad=True)
    bias = torch.randn(5, 400, requires_grad=True)

    def score_mod(score, b, h, q_idx, kv_idx):
        return score + bias[b, (q_idx - kv_idx).abs()]

    def score(sequence, s):
        q_len, kv_len = s.shape[1:]
        q_place = torch.arange(q_len)[:, None] + kv_len - q_len
        return s + bias[sequence, (q_place - torch.arange(kv_len)).abs()]

    options = {"score_mod": score_mod, "own_blocks": own_blocks}
    out = varlen(q, k, v, ends(Q_LENS), ends(KV_LENS), causal, **options)
    expected, _ = attend_each(q, k, v, Q_LENS, KV_LENS, [causal] * 4, score)
    torch.testing.assert_close(out, expected)
    weights = torch.randn_like(out)
    grads, wanted = (torch.autograd.grad(x, (q, k, v, bias), weights) for x in (out, expected))
    torch.testing.assert_close(grads, wanted)


@pytest.mark.parametrize(("q_lens", "kv_lens"), [([0, 0], [3, 4]), ([5, 2], [0, 0]), ([], [])])
def test_no_queries_or_no_keys_is_no_error(q_lens, kv_lens):
    q, k, v = inputs(q_lens, kv_lens, grad=True)
    out, lse = varlen(q, k, v, ends(q_lens), ends(kv_lens), causal, return_lse=True)
    assert out.shape == q.shape
    assert not out.any()
    assert (lse == -math.inf).all()
    assert lse.shape == (4, len(q))
    assert all(not x.any() for x in torch.autograd.grad(out.sum(), (q, k, v)))


@pytest.fixture
def analyses(monkeypatch):
    """Counts calls of the analysis."""
    from flexsparse.analysis import classify

    made = []
    reading = classify.interval_reading
    monkeypatch.setattr(classify, "interval_reading", lambda *a: made.append(a) or reading(*a))
    return made


@pytest.mark.parametrize("lens", [[50, 31, 70], [64, 64]])
def test_a_second_call_with_the_same_lengths_analyses_nothing(analyses, lens):
    q, k, v = inputs(lens, lens)

    def call(width):
        table = torch.arange(4)  # a new tensor with the same content
        mask = causal & window(width) & (lookup(table, b) < 4)
        return varlen(q, k, v, ends(lens), mask=mask, executor="blockwise")

    first = call(7)
    n_analyses = len(analyses)
    assert n_analyses > 0
    assert torch.equal(call(7), first)
    assert len(analyses) == n_analyses
    call(8)
    assert len(analyses) > n_analyses


def test_a_plan_whose_table_was_written_to_is_made_again():
    q, k, v = inputs([40, 30], [40, 30])
    table = torch.zeros(40, dtype=torch.bool)
    for column in (3, 5):
        table[column] = True
        mask = causal & lookup(table, kv_idx)
        assert_right(q, k, v, [40, 30], [40, 30], mask)


def test_few_plans_are_kept():
    from flexsparse.packed.varlen import _plans

    for n in range(1, PLANS_KEPT + 9):
        plan_varlen(causal, ends([n, 3]), n_heads=1)
    assert len(_plans) == PLANS_KEPT
    assert plan_varlen(causal, ends([n, 3]), n_heads=1) is plan_varlen(
        causal, ends([n, 3]), n_heads=1
    )


def test_print_says_what_was_decided():
    shown = str(plan_varlen(causal & window(9), ends([300, 200]), n_heads=2))
    assert "2 sequences, 500 queries and 500 keys, run as one packed sequence" in shown
    assert "causal & window(9) in 2 sequences" in shown
    assert "run as a batch" in str(plan_varlen(causal, ends([30, 30]), n_heads=2))
    assert "0 queries" in str(plan_varlen(causal, ends([0, 0]), n_heads=2))


def plain(**changes):
    q, k, v = inputs([4, 5], [4, 5])
    cu_seqlens_q = ends([4, 5])
    return {"q": q, "k": k, "v": v, "cu_seqlens_q": cu_seqlens_q, "mask": causal} | changes


BAD = [
    ({"cu_seqlens_q": torch.tensor([1, 4, 9])}, "cu_seqlens_q starts at 1; it must start at 0"),
    ({"cu_seqlens_q": torch.tensor([0, 6, 4, 9])}, "decreases from 6 to 4 at entry 2"),
    ({"cu_seqlens_q": torch.tensor([0, 4, 8])}, "cu_seqlens_q ends at 8 and q has 9 tokens"),
    ({"cu_seqlens_k": torch.tensor([0, 4, 8])}, "cu_seqlens_k ends at 8 and k has 9 tokens"),
    ({"cu_seqlens_k": torch.tensor([0, 9])}, "3 entries and cu_seqlens_k has 2"),
    ({"cu_seqlens_q": torch.tensor([0.0, 9.0])}, "float32 .* must be an int32 or int64 tensor"),
    ({"cu_seqlens_q": [0, 4, 9]}, "cu_seqlens_q is list"),
    ({"cu_seqlens_q": torch.tensor([[0, 9]])}, r"\(1, 2\); it must be"),
    ({"q": torch.zeros(1, 9, 4, 16)}, r"q is \(1, 9, 4, 16\); it must be a tensor \[tokens"),
    ({"v": torch.zeros(8, 2, 16)}, "ends at 9 and v has 8 tokens"),
    ({"k": torch.zeros(9, 3, 16)}, "heads"),
    ({"mask": [causal, causal]}, r"varlen takes a Mask or per_head.*, not list. Wrap the list"),
    ({"mask": lambda b, h, q, kv: q >= kv}, "from_mask_mod"),
    ({"mask": per_head([causal] * 3)}, "per_head got 3 masks but n_heads=4"),
    ({"q_offset": [1, 2, 3]}, "one for each of 2 sequences"),
    ({"q_offset": 1.5}, "q_offset=1.5"),
    ({"q_offset": 2**70}, "positions must be within"),
    ({"q_offset": torch.zeros(2, dtype=torch.int64, device="meta")}, "q_offset is on meta"),
    ({"cu_seqlens_q": ends([4, 5]).to("meta")}, "cu_seqlens_q is on meta, where tensors have no"),
    ({"own_blocks": True, "block_size": 0}, "block_size=0; it must be an int of 1 to"),
    ({"own_blocks": True, "block_size": 1.5}, "block_size=1.5"),
    ({"mask": lookup(torch.ones(4, dtype=torch.bool), q_idx)}, "read out of range"),
]


@pytest.mark.parametrize(("changes", "message"), BAD)
def test_a_mistake_is_named(changes, message):
    with pytest.raises(MaskError, match=message):
        varlen(**plain(**changes))


def test_a_device_that_is_none_is_refused():
    with pytest.raises(MaskError, match="device='nowhere' cannot be used here"):
        plan_varlen(causal, ends([4, 5]), n_heads=2, device="nowhere")


def test_options_are_looked_at_where_there_is_nothing_to_compute():
    q, k, v = inputs([0, 0], [4, 5])
    arguments = (q, k, v, ends([0, 0]), ends([4, 5]))
    with pytest.raises(MaskError, match="dropout_p=7"):
        varlen(*arguments, dropout_p=7)
    with pytest.raises(ExecutorError, match="There is no executor 'cudnn'; there are sdpa, flash"):
        varlen(*arguments, executor="cudnn")
    assert varlen(*arguments, dropout_p=0.1, executor="reference").shape == (0, 4, 16)
