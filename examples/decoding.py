"""Prefill and decoding with one mask and a cache of fixed size, on a GPU or a CPU.

    python examples/decoding.py --tokens 16384 --steps 100

The mask is compiled once, for every position. The prompt runs in chunks (`attend.at`), each new
token as one query (`attend.row`); the last lines compare with a run over all tokens, and with dense
attention.
"""

import argparse
import time

import torch
from torch.nn.functional import scaled_dot_product_attention

import flexsparse as fs
from flexsparse.masks import causal, sink, window

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--tokens", type=int, default=16384, help="prompt and new tokens")
parser.add_argument("--steps", type=int, default=100, help="new tokens")
parser.add_argument("--chunk", type=int, default=2048, help="of the prompt")
parser.add_argument("--heads", type=int, default=8)
parser.add_argument("--kv-heads", type=int, default=4)
parser.add_argument("--head-dim", type=int, default=64)
options = parser.parse_args()
device = "cuda" if torch.cuda.is_available() else "cpu"
dtype = torch.bfloat16 if device == "cuda" else torch.float32
tokens, prompt = options.tokens, options.tokens - options.steps

# a quarter of the heads see everything before them, the others a sink and a window
heads = [causal] * (options.heads // 4)
heads += [causal & (sink(64) | window(256))] * (options.heads - len(heads))
attend = fs.compile_mask(fs.per_head(heads), tokens, tokens, device=device)
print(attend.row(prompt))


def of_heads(n: int) -> torch.Tensor:
    """Stands for a model's projections of all its tokens."""
    return torch.randn(1, n, tokens, options.head_dim, device=device, dtype=dtype)


q, k, v = of_heads(options.heads), of_heads(options.kv_heads), of_heads(options.kv_heads)
k_cache, v_cache = torch.zeros_like(k), torch.zeros_like(v)
outs = []

# 1. The prompt, in chunks: the keys so far
for start in range(0, prompt, options.chunk):
    stop = min(start + options.chunk, prompt)
    k_cache[:, :, start:stop], v_cache[:, :, start:stop] = k[:, :, start:stop], v[:, :, start:stop]
    chunk = attend.at(stop - start, stop)
    outs.append(chunk(q[:, :, start:stop], k_cache[:, :, :stop], v_cache[:, :, :stop]))

# 2. One token after the other: all of the cache, of which the mask hides what is not written yet
times, dense_times = [], []
for position in range(prompt, tokens):
    one = slice(position, position + 1)
    k_cache[:, :, one], v_cache[:, :, one] = k[:, :, one], v[:, :, one]
    started = time.perf_counter()
    outs.append(attend.row(position)(q[:, :, one], k_cache, v_cache))
    times.append(time.perf_counter() - started)
    started = time.perf_counter()
    so_far = k_cache[:, :, : position + 1], v_cache[:, :, : position + 1]
    scaled_dot_product_attention(q[:, :, one], *so_far, enable_gqa=True)
    dense_times.append(time.perf_counter() - started)

# 3. The same as in one run
difference = (torch.cat(outs, 2) - attend(q, k, v)).abs().max()
print(f"largest difference from one run over {tokens:,} tokens: {difference:.2g}")
if device == "cpu":  # a GPU works on after a call has returned
    for name, taken in (("sparse", times), ("dense", dense_times)):
        print(f"a step of decoding, {name}: {sorted(taken)[len(taken) // 2] * 1e3:.2f} ms")
