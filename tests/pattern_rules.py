"""The rule of each pattern of flexsparse.masks in plain Python, one element at a time.

They are written from the papers and the released code, and share nothing with the expressions.
"""

import inspect
from math import ceil, prod
from typing import NamedTuple

import torch

from flexsparse import PerHead, h, kv_idx, lookup, q_idx
from flexsparse.masks import (
    a_shape,
    attention_slices,
    attention_tile,
    axial,
    bifurcated,
    bigbird,
    block_diffusion,
    block_sparse,
    block_sparse_attention,
    block_streaming,
    causal,
    chunked,
    clusters,
    combiner_fixed,
    dflash,
    diagonal,
    dilated,
    duo_attention,
    duo_streaming,
    flashmask,
    frame_causal,
    full,
    global_tokens,
    hash_sparse,
    kept_keys,
    local_stride,
    longformer,
    longgen,
    lserve,
    mminference_grid,
    moa,
    multi_diagonal,
    neighborhood,
    orion_msp,
    packed,
    padding,
    phi3_small,
    prefix,
    qk_sparse,
    radial_attention,
    relative_stride,
    s2_attention,
    same_document,
    shared_prefix,
    sink,
    sliding_tile,
    sparse_transformer_fixed,
    sparse_transformer_strided,
    spatial_head,
    star_attention,
    streaming_llm,
    strided,
    temporal_head,
    token_streaming,
    token_tree,
    tri_shape,
    vertical_slash,
    vertical_slash_blocks,
    vertical_stripe,
    window,
)


def heads_of(masks):
    if isinstance(masks, PerHead):
        return [masks[head] for head in range(masks.n_heads)]
    return masks if isinstance(masks, list) else [masks]


class Case(NamedTuple):
    name: str
    mask: object
    rule: object  # of (h, q, k), or of (b, h, q, k) where batch > 1; q is the position
    q_len: int
    kv_len: int
    q_offset: int = 0
    batch: int = 1
    n_heads: int = 1


CASES = []
LENGTHS = [(1, 1, 0), (24, 24, 0), (7, 23, 16), (23, 31, 3)]


def case(mask, rule, lengths=LENGTHS, batch=1, n_heads=None, name=None):
    """Compare a mask, or masks of heads, with a rule of (q, k), (h, q, k) or (b, h, q, k)."""
    count = len(inspect.signature(rule).parameters)
    full_rule = {
        2: lambda b, h, q, k: rule(q, k),
        3: lambda b, h, q, k: rule(h, q, k),
        4: rule,
    }[count]
    heads = heads_of(mask)
    name = name or ", ".join(dict.fromkeys(m.name for m in heads))
    for q_len, kv_len, q_offset in lengths:
        if len(heads) > 1 or isinstance(mask, PerHead):
            CASES.append(Case(name, heads, full_rule, q_len, kv_len, q_offset, batch, len(heads)))
        else:
            CASES.append(
                Case(name, heads[0], full_rule, q_len, kv_len, q_offset, batch, n_heads or 1)
            )


def dense(mask, at):
    """A mask, or one for each head, element by element: bool [B, H, q_len, kv_len]."""
    masks = mask if isinstance(mask, list) else [mask] * at.n_heads
    b = torch.arange(at.batch)[:, None, None]
    q = torch.arange(at.q_len)[:, None] + at.q_offset
    shape = (at.batch, at.q_len, at.kv_len)
    return torch.stack(
        [
            m(b, torch.tensor(h), q, torch.arange(at.kv_len)).expand(shape)
            for h, m in enumerate(masks)
        ],
        1,
    )


# positions
case(full, lambda q, k: True, name="full")
case(causal, lambda q, k: k <= q, name="causal")
case(window(5), lambda q, k: q - k < 5)
case(sink(3), lambda q, k: k < 3)
case(sink(0), lambda q, k: False)
case(prefix(4), lambda q, k: k < 4 or k <= q)
case(
    prefix(torch.tensor([2, 9])),
    lambda b, h, q, k: k < (2, 9)[b] or k <= q,
    batch=2,
)
case(dilated(3, 4), lambda q, k: q - k < 12 and (q - k) % 4 == 0)
case(strided(5), lambda q, k: (q - k) % 5 == 0)
case(chunked(6), lambda q, k: q // 6 == k // 6)
case(global_tokens(2), lambda q, k: q < 2 or k < 2)
GLOBAL = torch.arange(400) % 11 == 4
case(global_tokens(GLOBAL), lambda q, k: q % 11 == 4 or k % 11 == 4)

# documents
IDS = torch.arange(400) // 7 % 3
case(same_document(IDS), lambda q, k: q // 7 % 3 == k // 7 % 3)
case(
    same_document(torch.stack([IDS, torch.arange(400) // 50])),
    lambda b, h, q, k: (q // 7 % 3 == k // 7 % 3) if b == 0 else q // 50 == k // 50,
    batch=2,
    name="same_document of a batch",
)
ENDS = [0, 3, 3, 10, 24, 100, 400]


def document(place):
    return next(i for i in range(len(ENDS)) if place < ENDS[i + 1])


case(
    packed(torch.tensor(ENDS)),
    lambda q, k: document(q) == document(k) and k <= q,
)
KV_ENDS = [0, 5, 9, 10, 31, 220, 400]


def packed_rule(q, k):
    mine = document(q)
    start, end = KV_ENDS[mine : mine + 2]
    ahead = (end - start) - (ENDS[mine + 1] - ENDS[mine])
    return start <= k < end and 0 <= (q - ENDS[mine] + ahead) - (k - start) < 4


case(
    packed(torch.tensor(ENDS), torch.tensor(KV_ENDS), causal & window(4)),
    packed_rule,
    [(24, 31, 0), (1, 1, 0)],
)


def prefix_rule(prefix_of):
    """The documents that a query sees are those on the way from its own to one without a prefix."""

    def rule(q, k):
        mine, its = document(q), document(k)
        while its != mine and prefix_of[mine] != mine:
            mine = prefix_of[mine]
        return its == mine and (mine != document(q) or k <= q)

    return rule


for prefix_of in ([0, 0, 0, 3, 3, 5], [0, 0, 0, 2, 3, 5], [3, 0, 2, 3, 0, 4]):
    case(shared_prefix(ENDS, prefix_of), prefix_rule(prefix_of), name=f"shared_prefix, {prefix_of}")
FIRST = [-1, 0, 0, 1, 2, 2, 5, -1]
TREES = [FIRST + list(range(7, 399)), [3, 0, -1, 2, -1, 4, 4, 6] + [6] * 392]


def token_tree_rule(tree, context_len, q, k):
    if q < context_len or k < context_len:
        return k <= q
    node = q - context_len
    while node not in (-1, k - context_len):
        node = tree[node]
    return node != -1


case(
    token_tree(TREES[0], 15),
    lambda q, k: token_tree_rule(TREES[0], 15, q, k),
    [(8, 23, 15), (23, 23, 0), (2, 23, 15)],
    name="token_tree",
)
case(
    token_tree(torch.tensor(TREES)),
    lambda b, h, q, k: token_tree_rule(TREES[b], 0, q, k),
    [(12, 12, 0)],
    batch=2,
    name="token_tree of a batch",
)


def bifurcated_rule(q, k):
    """Token q of [5 | 4 | 4 | ...]: the context, and its own sample, up to itself."""
    if q < 5 or k < 5:
        return k <= q
    return (q - 5) // 4 == (k - 5) // 4 and (k - 5) % 4 <= (q - 5) % 4


case(bifurcated(5, 4), bifurcated_rule)
case(
    bifurcated(5, 4).at(q_idx=5 + q_idx * 4 + 2),
    lambda q, k: k < 5 or ((k - 5) // 4 == q and (k - 5) % 4 <= 2),
    [(4, 21, 0)],
    name="bifurcated, a decoding step",
)
case(padding(torch.tensor([5, 20])), lambda b, h, q, k: k < (5, 20)[b], batch=2)
REAL = torch.stack([torch.arange(400) > 3, torch.arange(400) % 5 < 3])
case(
    padding(REAL),
    lambda b, h, q, k: k > 3 if b == 0 else k % 5 < 3,
    batch=2,
    name="padding anywhere",
)


# block diffusion
def block_diff_mask(n, block):
    """As block_diff_mask of BD3-LMs computes it, over [noised | clean]."""

    def rule(q, k):
        q_clean, k_clean = q >= n, k >= n
        q_block = (q - n) // block if q_clean else q // block
        k_block = (k - n) // block if k_clean else k // block
        diagonal = q_block == k_block and q_clean == k_clean
        offset_causal = q_block > k_block and k_clean and not q_clean
        causal = q_block >= k_block and k_clean and q_clean
        return diagonal or offset_causal or causal

    return rule


def teacher_forcing(n, block):
    """As Self Forcing's teacher forcing computes it, over [clean | noised]."""

    def rule(q, k):
        if q < n:
            return k < (q // block + 1) * block
        number = (q - n) // block
        start = n + number * block
        return start <= k < start + block or k < number * block

    return rule


case(block_diffusion(12, 4), block_diff_mask(12, 4), [(24, 24, 0)])
case(block_diffusion(11, 4), block_diff_mask(11, 4), [(22, 22, 0), (7, 22, 15)])
case(block_diffusion(12, 3, True), teacher_forcing(12, 3), [(24, 24, 0)])
ANCHORS = torch.tensor([[3, 9, -1, 20, 0, *range(40)], [7, 1, 1, -1, 60, *range(40)]])


def dflash_rule(context, block, causal_inside=False):
    def rule(b, h, q, k):
        anchor, is_kept = ANCHORS[b, q // block], ANCHORS[b, q // block] >= 0
        own = k >= context and q // block == (k - context) // block
        if causal_inside:
            own = own and (k - context) % block <= q % block
        return is_kept and ((k < context and k < anchor) or own)

    return rule


case(dflash(ANCHORS[0], 14, 3), lambda q, k: dflash_rule(14, 3)(0, 0, q, k))
case(dflash(ANCHORS, 14, 3), dflash_rule(14, 3), batch=2, name="dflash of a batch")
case(dflash(ANCHORS, 5, 4, True), dflash_rule(5, 4, True), batch=2, name="dflash, JetSpec")


# grids
def coordinates(index, shape, tile=None):
    """Where token `index` stands: counted through the grid, or through its tiles one by one."""
    if tile is not None:
        which = coordinates(index // prod(tile), [n // t for n, t in zip(shape, tile, strict=True)])
        inside = coordinates(index % prod(tile), tile)
        return [w * t + i for w, t, i in zip(which, tile, inside, strict=True)]
    found = []
    for n in reversed(shape):
        found.append(index % n)
        index //= n
    return found[::-1]


def natten_axis(q, k, n, w, s, d, is_causal):
    if q % d != k % d:
        return False
    n, q, k = ceil((n - q % d) / d), q // d, k // d
    if is_causal:
        leader = min((q // s) * s + s - 1, n - 1)
        return k <= q and leader - k < w
    leader = min((q // s) * s + s // 2, n - 1)
    center = max(w // 2, min(leader, n - 1 - (w // 2 + w % 2 - 1)))
    return center - w // 2 <= k <= center + w // 2 + (w % 2 - 1)


def natten(shape, w, s, d, is_causal, tile=None):
    def rule(q, k):
        axes = zip(
            coordinates(q, shape, tile),
            coordinates(k, shape, tile),
            shape,
            w,
            s,
            d,
            is_causal,
            strict=True,
        )
        return all(natten_axis(*axis) for axis in axes)

    return rule


def whole(*shape):
    return [(prod(shape), prod(shape), 0)]


case(neighborhood(24, 7), natten([24], [7], [1], [1], [False]), whole(24))
case(neighborhood(24, 6, 4), natten([24], [6], [4], [1], [False]), whole(24))
case(neighborhood(23, 4, 4, 5), natten([23], [4], [4], [5], [False]), whole(23))
case(neighborhood(23, 5, 3, 2, True), natten([23], [5], [3], [2], [True]), whole(23))
case(neighborhood(24, 1), natten([24], [1], [1], [1], [False]), whole(24))
case(
    neighborhood((5, 7), (3, 4)),
    natten([5, 7], [3, 4], [1, 1], [1, 1], [False, False]),
    whole(5, 7),
)
case(
    neighborhood((8, 6), (4, 3), (2, 3), (2, 1), (True, False)),
    natten([8, 6], [4, 3], [2, 3], [2, 1], [True, False]),
    whole(8, 6),
)
case(
    neighborhood((3, 5, 4), (2, 3, 3), (2, 1, 2), 1, (True, False, False)),
    natten([3, 5, 4], [2, 3, 3], [2, 1, 2], [1] * 3, [True, False, False]),
    whole(3, 5, 4),
)
case(
    neighborhood((6, 8), 3, tile=(3, 4)),
    natten([6, 8], [3, 3], [1, 1], [1, 1], [False, False], [3, 4]),
    whole(6, 8),
)


def sta(canvas, kernel, tile, text):
    video = prod(canvas)

    def rule(q, k):
        if k >= video + text:
            return False
        if q >= video or k >= video:
            return True
        n = [c // t for c, t in zip(canvas, tile, strict=True)]
        w = [c // t for c, t in zip(kernel, tile, strict=True)]
        q_tile, k_tile = (coordinates(x // prod(tile), n) for x in (q, k))
        one, off = [1] * len(n), [False] * len(n)
        return all(
            natten_axis(*axis) for axis in zip(q_tile, k_tile, n, w, one, one, off, strict=True)
        )

    return rule


case(sliding_tile((4, 6), (2, 6), (1, 2)), sta([4, 6], [2, 6], [1, 2], 0), whole(4, 6))
case(
    sliding_tile((4, 4, 4), (2, 4, 2), (2, 2, 1), 3),
    sta([4, 4, 4], [2, 4, 2], [2, 2, 1], 3),
    [(70, 70, 0)],
)


def axial_rule(shape, axis):
    def rule(q, k):
        pairs = enumerate(zip(coordinates(q, shape), coordinates(k, shape), strict=True))
        return all(a == b for i, (a, b) in pairs if i != axis)

    return rule


for axial_axis in range(3):
    case(axial((3, 4, 2), axial_axis), axial_rule([3, 4, 2], axial_axis), whole(3, 4, 2))
case(axial(9, 0), lambda q, k: True, whole(9))

# video
case(
    attention_tile(5, [0, 2, 3]),
    lambda q, k: q // 5 == k // 5 or q // 5 in (0, 2, 3) or k // 5 in (0, 2, 3),
)
case(attention_tile(5), lambda q, k: q // 5 == k // 5)
case(frame_causal(5), lambda q, k: k // 5 <= q // 5)


def spatial(prompt, tokens, width, sink, rounding):
    band = int(width * tokens / rounding) * rounding
    columns = prompt + tokens if sink else prompt
    return lambda q, k: abs(q - k) < band or k < columns or q < prompt


case(spatial_head(3, 5, 2, round_width=4), spatial(3, 5, 2, False, 4))
case(spatial_head(2, 5, 1, True, 1), spatial(2, 5, 1, True, 1))


def temporal(prompt, frames, tokens, width):
    def rule(q, k):
        if q < prompt or k < prompt:
            return True
        return abs((q - prompt) % tokens - (k - prompt) % tokens) < width * tokens // frames

    return rule


case(temporal_head(3, 4, 7, 2), temporal(3, 4, 7, 2))


def radial(frames, tokens, text, decay, model, size):
    """The mask of each pair of frames, element by element, then shrunk to blocks."""
    n_blocks = ceil((frames * tokens + text) / size)
    border = frames * tokens // size
    kept = torch.zeros(n_blocks, n_blocks, dtype=torch.bool)
    kept[border:] = kept[:, border:] = True
    ahead = (torch.arange(tokens)[None] - torch.arange(tokens)[:, None]).abs()
    for i in range(frames):
        for j in range(frames):
            gap = abs(i - j)
            length = 2 ** tokens.bit_length() / 2 ** gap.bit_length()
            if j == 0 or gap == 0 or (gap == 1 and model == "hunyuan"):
                band = ahead <= tokens
            else:
                band = ahead <= (tokens // 2 if gap == 1 else max(length * decay, size))
            if j > 0 and length < size and gap % int(size / length):
                band = band & False
            n = ceil(tokens / size)
            top, left = i * tokens % size, j * tokens % size
            padded = torch.zeros(top + n * size, left + n * size, dtype=torch.bool)
            padded[top : top + tokens, left : left + tokens] = band
            share = padded[: n * size, : n * size].view(n, size, n, size).sum(1) / size
            blocks = (share > 1 / 3).sum(-1) / ((share > 0).sum(-1) + 1e-9) > 0.6
            row, column = i * tokens // size, j * tokens // size
            kept[row : row + n, column : column + n] |= blocks
    return lambda q, k: kept[q // size, k // size]


for radial_case in [
    (9, 10, 12, 1.0, "wan", 4),
    (9, 10, 12, 0.5, "hunyuan", 4),
    (5, 37, 20, 0.3, "wan", 8),
    (20, 6, 12, 1.0, "hunyuan", 8),
]:
    f, t, text, *others = radial_case
    whole_video = (f * t + text) // others[-1] * others[-1]
    case(
        radial_attention(f, t, *others),
        radial(*radial_case),
        [(whole_video, whole_video, 0)],
    )
case(diagonal(3), lambda q, k: abs(q - k) <= 3)
case(
    multi_diagonal(7, 2),
    lambda q, k: min(abs(q - k) % 7, 7 - abs(q - k) % 7) <= 2,
)
case(multi_diagonal(3, 1), lambda q, k: True)
case(vertical_stripe([0, 3, 4, 9]), lambda q, k: k in (0, 3, 4, 9))
case(vertical_stripe(GLOBAL), lambda q, k: k % 11 == 4)


def grid(stride, shift, rows, columns, slash, local, start):
    def rule(q, k):
        x, y = q - start, k - start
        kept = x - y <= local
        kept = kept or (rows and x % stride == shift) or (columns and y % stride == shift)
        return k <= q and (kept or (slash and (x - y + shift) % stride == 0))

    return rule


case(mminference_grid(5, 2, n_local=3), grid(5, 2, True, True, False, 3, 0))
case(
    mminference_grid(6, 1, False, True, True, 0, 4),
    grid(6, 1, False, True, True, 0, 4),
)

# sinks and windows
case(token_streaming(2, 5), lambda q, k: k <= q and (k < 2 or k >= q - (5 - 1)))


def block_streaming_rule(sink, local, block, q_len, kv_len):
    """As fwdStreaming counts: rows from 0, the diagonal from kv_len - q_len."""
    off = kv_len - q_len
    skipped = max((q_len - kv_len) // block, 0)

    def rule(q, k):
        row, column = (q - off) // block, k // block
        last = ceil(max(off, 0) / block) + 1 + row - skipped
        near = last - local <= column < last
        return row >= skipped and k <= q and (column < sink or near)

    return rule


def last_blocks_rule(sink, local, block, kv_len):
    n_blocks = ceil(kv_len / block)
    return lambda q, k: k // block < sink or k // block >= n_blocks - local


for q_len, kv_len in [(24, 24), (7, 23), (16, 24), (23, 31), (31, 23), (25, 8), (24, 1)]:
    case(
        block_streaming(1, 2, 4, q_offset=kv_len - q_len),
        block_streaming_rule(1, 2, 4, q_len, kv_len),
        [(q_len, kv_len, kv_len - q_len)],
    )
    case(
        block_streaming(0, 1, 4, q_offset=kv_len - q_len),
        block_streaming_rule(0, 1, 4, q_len, kv_len),
        [(q_len, kv_len, kv_len - q_len)],
    )
    case(
        block_streaming(1, 2, 4, is_causal=False, kv_len=kv_len),
        last_blocks_rule(1, 2, 4, kv_len),
        [(q_len, kv_len, kv_len - q_len)],
    )
case(streaming_llm(2, 5), lambda q, k: k <= q and (k < 2 or q - k <= 5))
case(streaming_llm(2, 5, True), lambda q, k: k <= q and (k < 2 or q - k < 5))
case(duo_streaming(2, 5, "training"), lambda q, k: k <= q and (k < 2 or q - k <= 5 - 1))
case(duo_streaming(2, 5, "decoding"), lambda q, k: k <= q and (k < 2 or q - k <= 5))
case(
    duo_streaming(128, 256, "training_blocks"),
    lambda q, k: k <= q and (k // 128 < 1 or q // 128 - 2 < k // 128),
    [(300, 300, 0)],
)
case(
    duo_streaming(2, 5, "prefill", 6),
    lambda q, k: k <= q and (k < 2 or k >= q - q % 6 - 5),
)
case(a_shape(2, 5), lambda q, k: k <= q and (q - k < 5 or k < 2))
case(
    tri_shape(24, 2, 5, 4),
    lambda q, k: k <= q and (q - k < 5 or k < 2 or q >= 24 - 4),
    [(24, 24, 0), (7, 24, 17)],
)


def star_rule(context, block, anchor):
    """A token of the context runs in [anchor | its block], one after it on the whole cache."""

    def rule(q, k):
        if q >= context:
            return k <= q
        start = q // block * block
        return (start > 0 and k < anchor) or start <= k <= q

    return rule


case(star_attention(17, 4), star_rule(17, 4, 4))
case(star_attention(17, 5, 2), star_rule(17, 5, 2))
case(star_attention(17, 5, 0), star_rule(17, 5, 0))

# models
case(
    sparse_transformer_fixed(5, 2),
    lambda q, k: k <= q and (q // 5 == k // 5 or (k // 5 < q // 5 and k % 5 >= 5 - 2)),
)
# the paper's window has one key more, which the stride keeps as well
case(
    sparse_transformer_strided(5),
    lambda q, k: max(0, q - 5) <= k <= q or (k <= q and (q - k) % 5 == 0),
)
case(longformer(6), lambda q, k: abs(q - k) <= 3)
case(longformer(6, 2), lambda q, k: abs(q - k) <= 3 or q < 2 or k < 2)
case(
    longformer(4, GLOBAL, 3),
    lambda q, k: (abs(q - k) <= 6 and abs(q - k) % 3 == 0) or q % 11 == 4 or k % 11 == 4,
)
RANDOM_BLOCKS = torch.randint(0, 99, (99, 2), generator=torch.Generator().manual_seed(4)) % 6


def bigbird_rule(q, k):
    row, column = q // 4, k // 4
    near = abs(row - column) <= 1
    return near or row in (0, 98) or column in (0, 98) or column in RANDOM_BLOCKS[row]


case(bigbird(99, 4, random_blocks=RANDOM_BLOCKS), bigbird_rule)
case(
    bigbird(6, 4, 5),
    lambda q, k: abs(q // 4 - k // 4) <= 2 or q // 4 in (0, 5) or k // 4 in (0, 5),
    [(24, 24, 0)],
)


def combiner(is_causal):
    def rule(q, k):
        if k >= 22:
            return (k - 22) < q // 5 if is_causal else True
        return k // 5 == q // 5 and (k <= q or not is_causal)

    return rule


case(combiner_fixed(22, 5), combiner(True), [(22, 27, 0)])
case(combiner_fixed(22, 5, False), combiner(False), [(22, 27, 0)])
case(orion_msp(2, 1, 3), lambda q, k: q < 3 or k < 3 or abs(q - k) <= 3)
case(orion_msp(2, 1, 3, True), lambda q, k: q < 3 or k < 3 or q == k)

# systems


def bsa(types, info, table, causal, exact, q_len, kv_len):
    table = table.tolist()

    def rule(b, h, q, k):
        if causal and k > q:
            return False
        if types[h] == 0:
            return True
        if types[h] > 0:
            place = types[:h].count(1)
            return table[b % len(table)][place][(q - (kv_len - q_len)) // 128][k // 128]
        sink, local = info[2 * h : 2 * h + 2]
        if exact:
            return k < sink or k >= q - (local - 1)
        if causal:
            return block_streaming_rule(sink, local, 128, q_len, kv_len)(q, k)
        return k // 128 < sink or k // 128 >= ceil(kv_len / 128) - local

    return rule


BLOCKMASK = torch.rand(2, 2, 4, 4, generator=torch.Generator().manual_seed(0)) < 0.5
for is_causal, exact in [(True, False), (True, True), (False, False)]:
    for q_len, kv_len in [(140, 260), (130, 130)]:
        bsa_types, bsa_info = [1, 0, -1, 1], [0, 0, 0, 0, 1, 1, 0, 0]
        case(
            block_sparse_attention(
                bsa_types, bsa_info, BLOCKMASK, is_causal, exact, kv_len - q_len, kv_len
            ),
            bsa(bsa_types, bsa_info, BLOCKMASK, is_causal, exact, q_len, kv_len),
            [(q_len, kv_len, kv_len - q_len)],
            batch=2,
            name=f"block_sparse_attention causal={is_causal} exact={exact}",
        )
case(
    block_sparse_attention([1, 1], None, BLOCKMASK[:1], True),
    lambda h, q, k: k <= q and BLOCKMASK[0, h, q // 128, k // 128],
    [(140, 140, 0)],
    name="block_sparse_attention of one table",
)
case(
    duo_attention([0.1, 0.9], 2, 5, 2),
    lambda h, q, k: k <= q and (h >= 2 or k < 2 or q - k <= 5),
)
case(lserve([0.5, 0.4], 2, 5), lambda h, q, k: k <= q and (h == 0 or k < 2 or q - k < 5))


def s2(num_heads, kv_heads, local, stride, block, dense_heads=0, step=None, offset=0):
    step = max(1, int(stride / num_heads)) if step is None else step

    def rule(h, q, k):
        kv_head = h // (num_heads // kv_heads)
        row, column = q // block, k // block
        stripe = (column + kv_head * step + offset) % stride == 0
        return k <= q and (kv_head >= kv_heads - dense_heads or row - column < local or stripe)

    return rule


case(local_stride(2, 3, 2, 4), lambda q, k: s2(1, 1, 2, 3, 2, offset=4)(0, q, k))
case(s2_attention(4, 2, 4, 2), s2(4, 4, 2, 4, 2))
case(s2_attention(8, 1, 4, 2, 4, 1), s2(8, 4, 1, 4, 2, 1))
case(s2_attention(2, 1, 8, 2), s2(2, 2, 1, 8, 2))
case(
    s2_attention(2, 1, 8, 2, head_sliding_step=3, head_sliding_offset=2),
    s2(2, 2, 1, 8, 2, 0, 3, 2),
)
case(
    s2_attention(2, 2, 3, 2, homo_head=True),
    lambda h, q, k: s2(1, 1, 2, 3, 2)(0, q, k),
)


def relative(left, right, stride, block):
    def rule(h, q, k):
        row, column = q // block, k // block
        past = max(0, row - column - left + 1) + max(0, column - row - right + 1)
        return past % stride == 0

    return rule


case(relative_stride(2, 3, 3, 2), lambda q, k: relative(2, 3, 3, 2)(0, q, k))
case(s2_attention(2, (1, 2), 3, 2, causal=False), relative(1, 2, 3, 2))
case(
    s2_attention(2, (2, 2), 3, 2, 2, 1, causal=False),
    lambda h, q, k: h or relative(2, 2, 3, 2)(h, q, k),
)
case(
    phi3_small(2, 4, 2, 3, 4),
    lambda h, q, k: k <= q and (q // 2 - k // 2 < 3 or (k // 2 + h + 1) % 4 == 0),
)
case(phi3_small(3, 4, 2, 3, 4), lambda h, q, k: k <= q)
case(
    phi3_small(2, 2, 2, 3, 4, True),
    lambda h, q, k: k <= q and (q // 2 - k // 2 < 3 or (k // 2 + 1) % 4 == 0),
)


def moa_rule(alphas, betas, length, decoding):
    def rule(h, q, k):
        span = min(int(alphas[h] + betas[h] * length), length)
        span = ceil(max(span, 128) / 64) * 64
        sink = min(span, 64)
        local = span - sink
        if decoding:
            return k <= q and (k < sink or q - k < local)
        row, column = q // 64, k // 64
        return k <= q and (column < sink // 64 or row - local // 64 < column <= row)

    return rule


for moa_phase in ("prefill", "decoding"):
    case(
        moa([-100, 0, 200], [0.5, 0.9, 0.0], 300, 100, phase=moa_phase),
        moa_rule([-100, 0, 200], [0.5, 0.9, 0.0], 400, moa_phase == "decoding"),
        [(300, 300, 0)],
    )
case(
    longgen(6, block_streaming(1, 1, 2)),
    lambda h, q, k: k <= q and (h in (2, 3) or k // 2 < 1 or k // 2 == q // 2),
)

# tables
BLOCKS = torch.rand(2, 3, 40, 40, generator=torch.Generator().manual_seed(1)) < 0.4
case(block_sparse(BLOCKS[0, 0], 10), lambda q, k: BLOCKS[0, 0, q // 10, k // 10])
case(
    block_sparse(BLOCKS[0], 10),
    lambda h, q, k: BLOCKS[0, h, q // 10, k // 10],
    n_heads=3,
    name="block_sparse of heads",
)
case(
    block_sparse(BLOCKS, (20, 10)),
    lambda b, h, q, k: BLOCKS[b, h, q // 20, k // 10],
    batch=2,
    n_heads=3,
    name="block_sparse of a batch",
)
case(
    block_sparse(BLOCKS[0, 0], 10, q_offset=16),
    lambda q, k: BLOCKS[0, 0, (q - 16) // 10, k // 10],
    [(7, 23, 16)],
)
KEYS = torch.rand(2, 3, 400, generator=torch.Generator().manual_seed(2)) < 0.3
case(kept_keys(KEYS[0, 0]), lambda q, k: KEYS[0, 0, k])
case(
    kept_keys(KEYS, 3),
    lambda b, h, q, k: KEYS[b, h, k // 3],
    batch=2,
    n_heads=3,
    name="kept_keys of a batch",
)
case(
    vertical_slash(torch.tensor([0, 9, 4]), torch.tensor([0, 1, 13])),
    lambda q, k: k <= q and (k in (0, 4, 9) or q - k in (0, 1, 13)),
)
case(
    vertical_slash(torch.tensor([[0, 9], [3, -1]]), torch.tensor([[0, 1], [5, -1]])),
    lambda h, q, k: k <= q and (k in [(0, 9), (3,)][h] or q - k in [(0, 1), (5,)][h]),
    n_heads=2,
    name="vertical_slash of heads",
)
case(
    vertical_slash(KEYS[0, 0], KEYS[0, 1]),
    lambda q, k: k <= q and (KEYS[0, 0, k] or KEYS[0, 1, q - k]),
    name="vertical_slash of booleans",
)
case(
    vertical_slash(torch.tensor([0, 3]), torch.tensor([0, 2]), 4),
    lambda q, k: k <= q and (k // 4 in (0, 3) or q // 4 - k // 4 in (0, 2)),
)


def mtraining(columns, diagonals, grain):
    def rule(q, k):
        d = q // grain - k // grain
        block = any((d - 1) * grain < s < (d + 1) * grain for s in diagonals)
        return k <= q and (block or k in columns)

    return rule


case(
    vertical_slash_blocks(torch.tensor([1, 6]), torch.tensor([9, 2, -1]), 4),
    mtraining((1, 6), (9, 2), 4),
)
case(
    vertical_slash_blocks(torch.tensor([1]), torch.arange(40) == 8, 4),
    mtraining((1,), (8,), 4),
    [(24, 24, 0)],
    name="vertical_slash_blocks on the grid",
)
case(
    qk_sparse(KEYS[0, 0], KEYS[0, 1]),
    lambda q, k: KEYS[0, 0, q] and KEYS[0, 1, k] and k <= q,
)
HASHES = torch.randint(0, 3, (2, 2, 400), generator=torch.Generator().manual_seed(3))
case(
    hash_sparse(HASHES[0], HASHES[1]),
    lambda h, q, k: HASHES[0, h, q] == HASHES[1, h, k] and k < q,
    n_heads=2,
)
case(
    clusters(HASHES - 1),
    lambda b, h, q, k: HASHES[b, h, q] == HASHES[b, h, k] != 0,
    batch=2,
    n_heads=2,
)
case(
    clusters(HASHES[0, 0], HASHES[0, 1], True),
    lambda q, k: HASHES[0, 0, q] == HASHES[0, 1, k] and k <= q,
)


# ranges
def hidden_rows(numbers, causal, q_len):
    """FlashMask's mask of one key, as its reference writes -inf: whether each row is hidden."""

    def hide(start, end):
        hidden[start:end] = True

    hidden = torch.zeros(q_len, dtype=torch.bool)
    has_end = len(numbers) == (2 if causal else 4)
    hide(numbers[0], numbers[1] if has_end else q_len)
    if not causal:
        hide(*((numbers[2], numbers[3]) if has_end else (0, numbers[1])))
    return hidden


def flashmask_case(causal, n_numbers, q_len, kv_len, batch, n_heads, group_size):
    generator = torch.Generator().manual_seed(n_numbers)
    shape = (batch, n_heads, 400, n_numbers)
    table = torch.randint(0, q_len + 1, shape, generator=generator)
    offset = kv_len - q_len

    def rule(b, h, q, k):
        head = h // group_size if n_heads > 1 else 0
        hidden = hidden_rows(table[b % batch, head, k].tolist(), causal, q_len)
        return not hidden[q - offset] and (k <= q or not causal)

    case(
        flashmask(table, causal, offset, group_size),
        rule,
        [(q_len, kv_len, offset)],
        batch=2,
        n_heads=max(n_heads * group_size, 2),
        name=f"flashmask, {causal=}, {n_numbers} numbers",
    )


flashmask_case(True, 1, 20, 20, 1, 1, 1)
flashmask_case(True, 2, 7, 20, 2, 1, 1)
flashmask_case(False, 2, 20, 7, 1, 2, 2)
flashmask_case(False, 4, 9, 20, 2, 2, 1)
SLICES = [
    ([0, 5], [0, 5], 1),
    ([5, 9], [0, 2], 0),
    ([5, 9], [2, 9], 1),
    ([5, 9], [9, 12], 2),
    ([9, 11], [3, 8], 3),
    ([11, 16], [0, 2], 1),  # more rows than keys
    ([11, 16], [9, 11], 2),
    ([11, 16], [4, 6], 3),
    ([17, 20], [0, 23], 0),  # row 16 and those from 20 on see nothing
    ([18, 19], [4, 6], 0),  # inside another
    ([18, 19], [9, 9], 0),  # empty
]


def in_slice(row, k, q_range, k_range, kind):
    """Whether MagiAttention's reference fills the element [row, k] for a slice."""
    if not (q_range[0] <= row < q_range[1] and k_range[0] <= k < k_range[1]):
        return False
    is_causal, is_inverse = kind in (1, 3), kind in (2, 3)
    below = k <= row + k_range[1] - q_range[1]
    above = k >= row + k_range[0] - q_range[0]
    return (below or not is_causal) and (above or not is_inverse)


def attention_slices_case(slices, name, q_len=23):
    q_ranges, k_ranges, kinds = zip(*slices, strict=True)
    case(
        attention_slices(*map(torch.tensor, (q_ranges, k_ranges, kinds)), 23 - q_len),
        lambda q, k: any(in_slice(q - 23 + q_len, k, *each) for each in slices),
        [(q_len, 23, 23 - q_len)],
        name=f"attention_slices, {name}",
    )


attention_slices_case(SLICES, "all types")
attention_slices_case(SLICES[::-1], "fewer queries than keys", 20)
for i, one in enumerate(SLICES):
    attention_slices_case([one], f"slice {i}")
case(
    attention_slices(torch.tensor([[2, 4]]), torch.tensor([[1, 3]])),
    lambda q, k: q in (2, 3) and k in (1, 2),
    name="attention_slices, no types",
)
MANY = [([i % 7, i % 7 + i % 4], [i % 19, i % 19 + i % 5], 0) for i in range(300)]
attention_slices_case(MANY, "hundreds, all whole")
attention_slices_case(MANY, "hundreds, fewer queries than keys", 12)
NO_SLICE = torch.empty(0, 2, dtype=torch.int32)
case(attention_slices(NO_SLICE, NO_SLICE), lambda q, k: False, name="attention_slices, none")

# systems that are expressions: each as docs/systems.md writes it
case(
    frame_causal(6) & (q_idx // 6 - kv_idx // 6 <= 2),
    lambda q, k: max((q // 6 - 2) * 6, 0) <= k < (q // 6 + 1) * 6,
    name="WeNet's left chunks",
)
case(
    frame_causal(6) & (kv_idx >= (q_idx // 6 + 1) * 6 - 9),
    lambda q, k: (q // 6 + 1) * 6 - 9 <= k < (q // 6 + 1) * 6,
    name="Self Forcing's window",
)


def longlora_rule(q, k):
    """Sequences that start half a group late, the first and the last of half a group."""
    starts = [0, *range(4, 400, 8)]
    start = max(s for s in starts if s <= q)
    return start <= k <= q


case(
    causal & ((q_idx + 8 // 2) // 8).equals((kv_idx + 8 // 2) // 8),
    longlora_rule,
    name="LongLoRA's shifted heads",
)


def gist_rule(q, k):
    """As make_gist_mask, with gist tokens at 7, 8 and 9, times causal."""
    after_first, up_to_last = k >= 7, k < 10
    return k <= q and (up_to_last if q < 10 else after_first)


case(causal & ((kv_idx >= 7) | (q_idx < 10)), gist_rule, name="gist tokens")
IMAGES = [(2, 6), (6, 11), (15, 17)]
ENDS_OF_IMAGES = torch.tensor(
    [next((end for start, end in IMAGES if start <= t < end), 0) for t in range(400)]
)
case(
    causal | (kv_idx < lookup(ENDS_OF_IMAGES, q_idx)),
    lambda q, k: k <= q or any(q >= start and k < end for start, end in IMAGES),
    name="Transfusion",
)
DROPPED = torch.randint(0, 40, (2, 400), generator=torch.Generator().manual_seed(5))


def eviction_rule(h, q, k):
    """A cache that takes in the key of each query, and then drops those whose time has come."""
    cache = set()
    for step in range(q + 1):
        cache.add(step)
        cache = {key for key in cache if DROPPED[h, key] > step}
    return k in cache


case(
    causal & (q_idx < lookup(DROPPED, h, kv_idx)),
    eviction_rule,
    n_heads=2,
    name="H2O",
)
CLUSTER_MAP = torch.rand(2, 3, 5, generator=torch.Generator().manual_seed(6)) < 0.5
Q_CLUSTER = torch.randint(0, 3, (2, 400), generator=torch.Generator().manual_seed(7))
KV_CLUSTER = torch.randint(0, 5, (2, 400), generator=torch.Generator().manual_seed(8))
case(
    lookup(CLUSTER_MAP, h, lookup(Q_CLUSTER, h, q_idx), lookup(KV_CLUSTER, h, kv_idx)),
    lambda h, q, k: CLUSTER_MAP[h, Q_CLUSTER[h, q], KV_CLUSTER[h, k]],
    n_heads=2,
    name="Sparse VideoGen 2",
)


def compressed_rule(q, k):
    """Keys are 24 tokens and then an entry for each 5 of them; a window of 6 keys."""
    if k < 24:
        return q - 6 < k <= q
    return not k - 24 >= (q + 1) // 5


case(
    (causal & window(6) & (kv_idx < 24)) | ((kv_idx >= 24) & (kv_idx - 24 < (q_idx + 1) // 5)),
    compressed_rule,
    [(24, 28, 0)],
    name="DeepSeek-V4",
)
