"""torch's context parallelism shards attend.block_mask as it shards its own BlockMasks."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import flexsparse as fs
from flexsparse.masks import causal, sink, window

attention = pytest.importorskip("torch.distributed.tensor.experimental._attention")
WORLD, N = 2, 512  # torch shards by blocks of 128


def attend_in_parallel(rank, folder):
    from torch.distributed.device_mesh import init_device_mesh
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


@pytest.mark.slow
@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")
def test_a_sharded_mask_is_the_mask(tmp_path):
    mp.spawn(attend_in_parallel, (tmp_path,), nprocs=WORLD)
