"""Inductor for flex_attention on CPU, with the product of queries and keys in register tiles.

Inductor's C++ kernel for flex_attention multiplies float32 queries and keys one row by four keys
at a time (torch 2.11 to 2.13), which takes about half of its time. `compile_graph` gives it another
function for that product: keys are transposed once for a block, and 8 rows by 32 keys are held in
registers. Everything else is inductor's, and so is this product wherever the tiles do not fit.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import torch

# How inductor writes the function, without its name; only a function like this one is replaced.
SIGNATURE = """(
    const float* __restrict__ A,
    const float* __restrict__ B,
    float* __restrict__ C,
    int64_t M,
    int64_t N,
    int64_t K,
    int64_t lda,
    int64_t ldb,
    int64_t ldc
)"""

# C = A B^T: A is [M, K] queries, B is [N, K] keys, C is [M, N] scores.
TILED = """
template <int64_t ROWS, int64_t COLS>
inline void {name}_tile(
    const float* A, const float* keys, float* C, int64_t K, int64_t lda, int64_t ldc) {
  using Vec = at::vec::Vectorized<float>;
  Vec sum[ROWS][COLS];
  for (int64_t r = 0; r < ROWS; r++)
    for (int64_t c = 0; c < COLS; c++) sum[r][c] = Vec(0.0f);
  for (int64_t k = 0; k < K; k++) {
    Vec key[COLS];
    for (int64_t c = 0; c < COLS; c++) key[c] = Vec::loadu(keys + (k * COLS + c) * Vec::size());
    for (int64_t r = 0; r < ROWS; r++) {
      Vec query(A[r * lda + k]);
      for (int64_t c = 0; c < COLS; c++) sum[r][c] = at::vec::fmadd(query, key[c], sum[r][c]);
    }
  }
  for (int64_t r = 0; r < ROWS; r++)
    for (int64_t c = 0; c < COLS; c++) sum[r][c].store(C + r * ldc + c * Vec::size());
}

template <bool accum, bool prefetch = false>
inline void {name}_kernel_micro_gemm_transpose_b{signature} {
  using Vec = at::vec::Vectorized<float>;
  constexpr int64_t VLEN = Vec::size();
  // sums, a row of keys and a query: they fill the 32 registers of AVX-512, or the 16 of AVX2
  constexpr int64_t ROWS = VLEN == 16 ? 8 : 6, COLS = 2, WIDTH = COLS * VLEN;
  constexpr int64_t MAX_K = 256;
  alignas(64) float keys[MAX_K * WIDTH];
  int64_t n = 0;
  if (!accum && M >= ROWS && K <= MAX_K && K % VLEN == 0) {
    for (; n + WIDTH <= N; n += WIDTH) {
      for (int64_t c = 0; c < COLS; c++) {
        for (int64_t k = 0; k < K; k += VLEN) {
          at::vec::VectorizedN<float, VLEN> block;
          c10::ForcedUnroll<VLEN>{}(
              [&](auto i) { block[i] = Vec::loadu(B + (n + c * VLEN + i) * ldb + k); });
          at::vec::transpose_block(block);
          c10::ForcedUnroll<VLEN>{}(
              [&](auto i) { block[i].store(keys + (k + i) * WIDTH + c * VLEN); });
        }
      }
      int64_t m = 0;
      for (; m + ROWS <= M; m += ROWS)
        {name}_tile<ROWS, COLS>(A + m * lda, keys, C + m * ldc + n, K, lda, ldc);
      for (; m < M; m++)
        {name}_tile<1, COLS>(A + m * lda, keys, C + m * ldc + n, K, lda, ldc);
    }
  }
  if (n < N)
    {name}_torch_kernel_micro_gemm_transpose_b<accum, prefetch>(
        A, B + n * ldb, C + n, M, N - n, K, lda, ldb, ldc);
}

template <bool accum, bool prefetch = false>
inline void {name}_kernel_micro_gemm{signature} {
  {name}_torch_kernel_micro_gemm<accum, prefetch>(A, B, C, M, N, K, lda, ldb, ldc);
}
"""

PRODUCT = hashlib.sha256(TILED.encode()).hexdigest()


def compile_graph(graph: torch.fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
    """Compile a graph as inductor does, flex_attention in it with our product: a backend."""
    from torch._inductor import config
    from torch._inductor.compile_fx import compile_fx

    # Inductor keeps compiled graphs on disk, by its settings among others. Ours hold our product,
    # and buffers for as many threads as there are now: with more, they overflow (torch 2.11, 2.12).
    key = {__name__: f"{PRODUCT}, {torch.get_num_threads()} threads"}
    settings = {**config.unsafe_marked_cacheable_functions, **key}
    with _tiled_product(), config.patch(unsafe_marked_cacheable_functions=settings):
        compiled: Any = compile_fx(graph, inputs)
    return compiled  # type: ignore[no-any-return]


def _tiled_product() -> contextlib.AbstractContextManager[Any]:
    """Make inductor write our product, as long as it would write the one we know."""
    try:
        from torch._inductor.kernel.flex import flex_cpu

        template: Any = flex_cpu.CppFlexAttentionTemplate  # type: ignore[attr-defined]
        define: Callable[[Any, str], str] = template.micro_gemm_define
    except (ImportError, AttributeError):
        return contextlib.nullcontext()  # another torch, with its own product

    def define_tiled(self: Any, name: str) -> str:
        theirs = define(self, f"{name}_torch")
        for function in ("micro_gemm", "micro_gemm_transpose_b"):
            if f"{name}_torch_kernel_{function}{SIGNATURE}" not in theirs:
                return define(self, name)  # of another dtype, or another torch
        return theirs + TILED.replace("{name}", name).replace("{signature}", SIGNATURE)

    return mock.patch.object(template, "micro_gemm_define", define_tiled)
