"""A sequence over several processes: each has the queries of two chunks, and the keys they see.

    python examples/context_parallel.py --world 2                      # processes on this machine
    torchrun --nproc-per-node 8 examples/context_parallel.py --tokens 131072

Rank r has chunks r and 2 * world - 1 - r, so that causal work is shared out evenly. A mask compiled
with blocks as large as a chunk says which chunks of keys a chunk of queries sees: only those are
sent. Then each rank compiles the mask of its own queries, in milliseconds. The last lines compare
output and gradients with a run over all tokens, and say how evenly the work was shared.

torch's own context parallelism takes `attend.block_mask` as it is; it sends all keys.
"""

import argparse
import os
import socket

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.nn.functional import all_to_all_single

import flexsparse as fs
from flexsparse.masks import causal, sink, window


def exchanged(chunks, wanted, rank, world):
    """What `rank` wants of every chunk: {chunk: tensor}; gradients go back to where it came from.

    chunks: {chunk: tensor} of this rank, all of one shape
    wanted: the chunks that each rank wants
    """
    shape, size = (x := next(iter(chunks.values()))).shape, x.numel()
    sent = [[j for j in chunks if j in wanted[to]] for to in range(world)]
    received = [
        [j for j in chunks_of(source, world) if j in wanted[rank]] for source in range(world)
    ]
    outgoing = torch.cat([chunks[j].flatten() for to in sent for j in to] or [x.new_zeros(0)])
    sizes = [[size * len(part) for part in parts] for parts in (received, sent)]
    incoming = all_to_all_single(outgoing.new_empty(sum(sizes[0])), outgoing, *sizes)
    places = [j for part in received for j in part]
    return dict(zip(places, (part.view(shape) for part in incoming.split(size)), strict=True))


def chunks_of(rank, world):
    """The chunks of a rank: one from the front, one from the back."""
    return rank, 2 * world - 1 - rank


def attend_in_parallel(rank, world, options):
    """One process: the same random tokens everywhere, of which it keeps its own chunks."""
    device = torch.device("cuda", rank % torch.cuda.device_count()) if options.cuda else "cpu"
    if options.cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if options.cuda else "gloo", rank=rank, world_size=world)
    torch.manual_seed(0)
    tokens, rows = options.tokens, options.tokens // (2 * world)
    q, k, v = (torch.randn(1, n, tokens, 64, device=device, requires_grad=True) for n in (8, 4, 4))
    # as DuoAttention: some heads see all before them, the others a sink and a window
    heads = [causal] * options.causal_heads
    heads += [causal & (sink(64) | window(256))] * (8 - len(heads))
    mask = fs.per_head(heads)

    # 1. Which chunks of keys the queries of a chunk see, proved in one small analysis
    by_chunk = fs.compile_mask(mask, tokens, tokens, block_size=rows, device="cpu").block_mask
    sees = by_chunk.to_dense().bool().flatten(0, 1).any(0)  # [chunks of queries, chunks of keys]
    wanted = [
        sorted({j for i in chunks_of(r, world) for j in sees[i].nonzero().flatten().tolist()})
        for r in range(world)
    ]

    # 2. Those keys and values are sent; the others are zeros that nothing reads
    mine = chunks_of(rank, world)
    part = {j: slice(j * rows, (j + 1) * rows) for j in range(2 * world)}
    keys, values = (
        exchanged({j: x[:, :, part[j]] for j in mine}, wanted, rank, world) for x in (k, v)
    )
    nothing = torch.zeros_like(k[:, :, part[0]])
    all_keys, all_values = (
        torch.cat([given.get(j, nothing) for j in part], 2) for given in (keys, values)
    )

    # 3. Each chunk of queries has its own rows of the mask
    plans = [fs.compile_mask(mask, rows, tokens, q_offset=i * rows, device=device) for i in mine]
    outs = [
        attend(q[:, :, part[i]], all_keys, all_values)
        for i, attend in zip(mine, plans, strict=True)
    ]

    # 4. The same as in one run, gradients too
    whole = fs.compile_mask(mask, tokens, tokens, device=device)(q, k, v)
    for i, out in zip(mine, outs, strict=True):
        torch.testing.assert_close(out, whole[:, :, part[i]])
    found = torch.autograd.grad(sum(out.sin().sum() for out in outs), (k, v), retain_graph=True)
    expected = torch.autograd.grad(whole.sin().sum(), (k, v))
    for gradient, true in zip(found, expected, strict=True):
        for i in mine:
            torch.testing.assert_close(gradient[:, :, part[i]], true[:, :, part[i]])

    blocks = torch.tensor([sum(attend.cost().blocks for attend in plans)], device=device)
    shared = [torch.empty_like(blocks) for _ in range(world)]
    dist.all_gather(shared, blocks)
    if rank == 0:
        moved = sum(len(set(wanted[r]) - set(chunks_of(r, world))) for r in range(world))
        everything = world * (2 * world - 2)
        print(f"blocks of each rank: {[int(x) for x in shared]}")
        print(f"chunks of keys sent: {moved} of the {everything} of an all-gather")
        print("output and gradients are those of one run over all tokens")
    dist.destroy_process_group()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--world", type=int, default=2, help="processes, unless torchrun counts them"
    )
    parser.add_argument("--tokens", type=int, default=4096, help="a multiple of 2 * world")
    parser.add_argument(
        "--causal-heads", type=int, default=0, help="of 8, that see all before them"
    )
    options = parser.parse_args()
    options.cuda = torch.cuda.is_available()
    if "RANK" in os.environ:
        attend_in_parallel(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), options)
    else:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
        mp.spawn(attend_in_parallel, (options.world, options), nprocs=options.world)
