"""A sequence over several processes: torch's context parallelism, and the example's own."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import flexsparse as fs
from flexsparse.masks import causal, sink, window

WORLD, N = 2, 512  # torch shards by blocks of 128
EXAMPLE = Path(__file__).parent.parent / "examples" / "context_parallel.py"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not dist.is_available() or not dist.is_gloo_available(), reason="needs torch's gloo"
    ),
]


def attend_in_parallel(rank, folder):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.experimental import _attention as attention
    from torch.distributed.tensor.parallel import parallelize_module
    from torch.nn.attention.flex_attention import flex_attention

    class Attention(torch.nn.Module):
        def forward(self, q, k, v, block_mask):
            return flex_attention(q, k, v, block_mask=block_mask)

    dist.init_process_group(
        "gloo", rank=rank, world_size=WORLD, init_method=f"file://{folder}/rendezvous"
    )
    mesh = init_device_mesh("cpu", (WORLD,))
    torch.manual_seed(0)
    tensors = list(torch.randn(3, 1, 2, N, 16))
    heads = [causal & window(100), causal & (sink(4) | window(64))]
    attend = fs.compile_mask(fs.per_head(heads), N, N)
    style = attention._ContextParallel(2, attention._ContextParallel.AttentionType.FLEX)
    for balancer in (None, attention._HeadTailLoadBalancer(N, WORLD, "cpu")):
        *parts, block_mask = attention._context_parallel_shard(
            mesh, [*tensors, attend.block_mask], [2] * 4, load_balancer=balancer
        )
        out = parallelize_module(Attention(), mesh, style)(*parts, block_mask)
        (out,) = attention.context_parallel_unshard(mesh, [out], [2], load_balancer=balancer)
        torch.testing.assert_close(out, attend(*tensors, executor="reference"))
    dist.destroy_process_group()


def test_torch_shards_attend_block_mask(tmp_path):
    pytest.importorskip("torch.distributed.tensor.experimental._attention")
    mp.spawn(attend_in_parallel, (tmp_path,), nprocs=WORLD)


@pytest.mark.parametrize(("causal_heads", "sent"), [(0, 2), (1, 3)])
def test_only_keys_that_are_seen_are_sent(causal_heads, sent):
    command = [sys.executable, EXAMPLE, "--world", "2", "--tokens", "2048"]
    done = subprocess.run(
        [*command, "--causal-heads", str(causal_heads)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "output and gradients are those of one run" in done.stdout
    assert f"chunks of keys sent: {sent} of the 4 of an all-gather" in done.stdout
