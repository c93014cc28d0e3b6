"""What torch puts around a call: graphs, exports, torch.func, modes, and tensors of other kinds."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils.flop_counter import FlopCounterMode

import flexsparse as fs
from flexsparse import ExecutorError, MaskError, compile_mask
from flexsparse.masks import causal, sink, window

MASK = causal & (sink(4) | window(20))
N, HEADS, DIM = 64, 2, 16


@pytest.fixture
def attend():
    return compile_mask(MASK, N, N, device="cpu")


@pytest.fixture
def qkv():
    return torch.randn(3, 1, HEADS, N, DIM).unbind(0)


@pytest.mark.slow
@pytest.mark.parametrize(
    "make",
    [
        lambda x: x @ torch.eye(DIM),  # a view of a product of two dimensions
        lambda x: torch.stack([x, 2 * x])[1],  # a view with an offset
        lambda x: (2 * x).transpose(1, 2).contiguous().transpose(1, 2),
    ],
)
def test_what_a_compiled_model_makes_is_read_as_it_is(attend, qkv, make):
    torch._dynamo.reset()

    def model(qkv):
        return attend(*map(make, qkv))

    with torch.no_grad():
        out = torch.compile(model, fullgraph=True)(qkv)
        torch.testing.assert_close(out, model(qkv))


@pytest.mark.parametrize("which", [0, 1, 2])
def test_numbers_in_one_place_in_memory_are_as_many_as_they_are_said_to_be(attend, qkv, which):
    same = torch.randn(1, HEADS, N, 1).expand(1, HEADS, N, DIM)
    qkv = [same if i == which else x for i, x in enumerate(qkv)]
    torch.testing.assert_close(attend(*qkv), attend(*qkv, executor="reference"))


def test_a_negative_view_is_taken(attend, qkv):
    q = torch.randn(1, HEADS, N, DIM, dtype=torch.complex64).conj().imag
    assert q.is_neg()
    out = attend(q, *qkv[1:])
    torch.testing.assert_close(out, attend(q, *qkv[1:], executor="reference"))


def test_a_model_can_be_exported_without_gradients(attend, qkv):
    class Model(torch.nn.Module):
        def forward(self, q, k, v, **options):
            return attend(2 * q, k, v, **options)

    q, k, v = qkv
    exported = torch.export.export(Model(), qkv).module()
    torch.testing.assert_close(exported(q + 1, k, v), attend(2 * (q + 1), k, v))
    gradients = (q.clone().requires_grad_(), k, v)
    with pytest.raises(ExecutorError, match=r"export cannot record.*under torch\.no_grad\(\)"):
        torch.export.export(Model(), gradients)
    with pytest.raises(ExecutorError, match=r"export cannot record.*under torch\.no_grad\(\)"):
        torch.export.export(Model(), qkv, {"return_lse": True})
    with pytest.raises(MaskError, match="Give dropout_seed"):
        torch.export.export(Model(), qkv, {"dropout_p": 0.5})


REFUSED = [
    (
        lambda run, q: torch.vmap(torch.func.grad(lambda q: run(q).sum()))(q[None]),
        "torch.func.vmap",
    ),
    (lambda run, q: torch.func.hessian(lambda q: run(q).sum())(q), "carries a tangent"),
    (lambda run, q: torch.func.functionalize(run)(q), "torch.func.functionalize"),
    (lambda run, q: make_fx(run)(q), "make_fx is on"),
    (lambda run, q: torch.jit.trace(run, q), r"torch\.jit\.trace"),
    (lambda run, q: run(TwoTensor(q, q)), "q is a TwoTensor, and kernels take plain tensors"),
    (
        lambda run, q: _with_mode(FakeTensorMode(allow_non_fake_inputs=True), run, q),
        "FakeTensorMode",
    ),
]


def _with_mode(mode, run, q):
    with mode:
        run(q)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("executor", [None, "flex", "blockwise"])
@pytest.mark.parametrize(("around", "message"), REFUSED)
def test_what_kernels_would_lose_is_refused(attend, qkv, around, message, executor):
    q, k, v = qkv
    with pytest.raises(ExecutorError, match=rf"{message}.*executor=\"reference\" can"):
        around(lambda q: attend(q, k, v, executor=executor), q)


@pytest.mark.parametrize(
    "build",
    [
        lambda: compile_mask(MASK, N, N),
        lambda: fs.create_block_mask(MASK, 1, 1, N, N, "cpu"),
        lambda: MASK.check(N, N),
    ],
)
def test_a_mask_is_not_looked_at_without_values(build):
    with FakeTensorMode(), pytest.raises(MaskError, match=r"FakeTensorMode.*outside of it"):
        build()


def test_a_batch_of_gradients_is_refused(attend, qkv):
    q = qkv[0].clone().requires_grad_()
    out = attend(q, *qkv[1:])
    with pytest.raises(ExecutorError, match=r"is_grads_batched.*executor=\"reference\" does"):
        torch.autograd.grad(out, q, torch.randn(2, *out.shape), is_grads_batched=True)


def test_a_mode_that_watches_operators_sees_those_of_the_kept_blocks(qkv):
    attend = compile_mask(causal & window(16), N, N, device="cpu", block_size=16)
    with FlopCounterMode(display=False) as counter:
        out = attend(*qkv)
    torch.testing.assert_close(out, attend(*qkv))
    assert counter.get_total_flops() == HEADS * 7 * 2 * (2 * 16 * 16 * DIM)
