"""NATTEN's modules: neighborhood attention of one tensor of tokens, with its projections."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from flexsparse import MaskError
from flexsparse.compat.natten.call import attend, numbers_of_axes
from flexsparse.masks.arguments import at_least


class NeighborhoodAttention(nn.Module):
    """Attention of each token to its neighbors, between the projections of a layer.

    The state_dict is that of NATTEN: qkv.weight, qkv.bias, proj.weight and proj.bias.

    Args:
        embed_dim: of x, a multiple of num_heads.
        num_heads: heads, each with a head_dim of embed_dim // num_heads.
        kernel_size: tokens seen along each axis; kernel_size * dilation <= tokens.
        stride: neighbors that share one window, 1 to kernel_size.
        dilation: tokens from one key to the next.
        is_causal: whether an axis looks back only. These four take one value or one for each axis.
        qkv_bias: whether the projection to q, k and v has a bias.
        qk_scale: of the scores; 1 / sqrt(head_dim) by default, and for 0.
        proj_drop: the chance to drop an element of the output while training.

    Raises:
        MaskError: an argument is not as above.
    """

    na_dim: int

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] = 1,
        dilation: int | Sequence[int] = 1,
        is_causal: bool | Sequence[bool] = False,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        proj_drop: float = 0.0,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        at_least(name, 1, embed_dim=embed_dim, num_heads=num_heads)
        if embed_dim % num_heads:
            raise MaskError(
                f"{name}(embed_dim={embed_dim}, num_heads={num_heads}): num_heads must divide "
                "embed_dim."
            )
        self.embed_dim, self.num_heads = embed_dim, num_heads
        self.head_dim = embed_dim // num_heads
        self.scale = qk_scale or self.head_dim**-0.5
        numbers = numbers_of_axes(name, self.na_dim, kernel_size, stride, dilation, is_causal)
        self.kernel_size, self.stride, self.dilation, self.is_causal = numbers
        self.qkv = nn.Linear(embed_dim, embed_dim * 3, bias=qkv_bias)
        self.proj = nn.Linear(embed_dim, embed_dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, *tokens along each axis, embed_dim] -> the same shape."""
        name = type(self).__name__
        if x.dim() != self.na_dim + 2 or x.shape[-1] != self.embed_dim:
            raise MaskError(
                f"{name}: x is {tuple(x.shape)}; it must be a tensor [batch, tokens along each of "
                f"{self.na_dim} axes, embed_dim={self.embed_dim}]."
            )
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim)).unbind(-3)
        out: Tensor = attend(
            name,
            q,
            k,
            v,
            (self.kernel_size, self.stride, self.dilation, self.is_causal),
            rank=self.na_dim,
            scale=self.scale,
        )
        projected: Tensor = self.proj_drop(self.proj(out.flatten(-2)))
        return projected

    def extra_repr(self) -> str:
        """What print shows."""
        return (
            f"head_dim={self.head_dim}, num_heads={self.num_heads}, "
            f"kernel_size={self.kernel_size}, stride={self.stride}, dilation={self.dilation}, "
            f"is_causal={self.is_causal}"
        )


class NeighborhoodAttention1D(NeighborhoodAttention):
    """NeighborhoodAttention of a sequence: x is [batch, tokens, embed_dim]."""

    na_dim = 1


class NeighborhoodAttention2D(NeighborhoodAttention):
    """NeighborhoodAttention of an image: x is [batch, height, width, embed_dim]."""

    na_dim = 2


class NeighborhoodAttention3D(NeighborhoodAttention):
    """NeighborhoodAttention of a video: x is [batch, time, height, width, embed_dim]."""

    na_dim = 3
