# %% [markdown]
# # 5. Benchmark on your machine
#
# The figures that matter are those of your device, lengths and heads. The same harness is behind
# `flexsparse bench`: flexsparse, torch's dense kernels and torch's own flex_attention take turns in
# one process, and it checks that all of them agree.

# %%
import torch

from flexsparse.benchmark.figure import draw_rows
from flexsparse.benchmark.harness import device_name
from flexsparse.benchmark.measure import measure
from flexsparse.benchmark.table import table_text
from flexsparse.benchmark.workloads import Shape, swa

device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
usual = Shape.usual(device)
print(device_name(device), usual)

# %% [markdown]
# A sliding window at two lengths. The lengths here are short so that the notebook runs anywhere in
# a minute; sparse attention wins at long ones, so put your own in.

# %%
lengths, window = [1024, 2048], 256
shape = usual._replace(n_heads=2, n_kv_heads=2)
rows = []
for workload in swa(lengths, window):
    rows += measure(workload, shape, device, budget=1.0).rows
print(table_text(rows))

# %% [markdown]
# The time of each against the length, and the ideal: the part of blocks that is kept, times the
# time of dense attention.

# %%
draw_rows(rows)

# %% [markdown]
# The whole measurement, with more workloads and a file of results:
#
#     flexsparse bench --preset swa --len 4096 8192 16384 --save mine.jsonl
#     flexsparse bench --preset bsa          # random blocks, 0 to 95 % sparse
#     flexsparse bench --preset duo --quick  # half of the heads streaming
