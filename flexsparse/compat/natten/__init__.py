"""NATTEN's functions and modules: change the import and keep the script.

    from natten import na2d                       # before
    from flexsparse.compat.natten import na2d     # after

Names, order and defaults of the arguments are theirs, of natten and of natten.functional, and so is
the rule of who sees whom. Added are kernel_size 1, gradients and the LSE on CPU, any head_dim and
float dtype on any device, and sentences for what is wrong.

Arguments that choose NATTEN's kernels and their tiles are accepted and change nothing: backend,
q_tile_shape, kv_tile_shape, the four that begin with backward_, run_persistent_kernel,
kernel_schedule, torch_compile, and what attention_kwargs holds. Tokens are stored tile by tile
where that computes fewer blocks, which is counted; the plan is kept, so that calls with the same
shape and numbers analyse nothing, inside torch.compile neither.

Source: github.com/SHI-Labs/NATTEN, src/natten/functional.py and modules.py, of release 0.21.7.
"""

from flexsparse.compat.natten.functions import na1d, na2d, na3d, neighborhood_attention_generic
from flexsparse.compat.natten.modules import (
    NeighborhoodAttention1D,
    NeighborhoodAttention2D,
    NeighborhoodAttention3D,
)

__all__ = [
    "NeighborhoodAttention1D",
    "NeighborhoodAttention2D",
    "NeighborhoodAttention3D",
    "na1d",
    "na2d",
    "na3d",
    "neighborhood_attention_generic",
]
