"""The pattern library: attention patterns by name, written in flexsparse's public names alone.

Each is a Mask or a function that returns one; combine them with & | ~ and per_head.
"""

from flexsparse.masks.documents import packed, padding, same_document
from flexsparse.masks.positions import (
    causal,
    chunked,
    dilated,
    full,
    global_tokens,
    prefix,
    sink,
    strided,
    window,
)
from flexsparse.masks.tables import block_sparse

__all__ = [
    "block_sparse",
    "causal",
    "chunked",
    "dilated",
    "full",
    "global_tokens",
    "packed",
    "padding",
    "prefix",
    "same_document",
    "sink",
    "strided",
    "window",
]
