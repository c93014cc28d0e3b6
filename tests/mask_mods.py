"""Published mask_mods, and one for each thing that a mask_mod may do.

attention-gym's are its own functions. Those of the FlexAttention blog, of transformers'
masking_utils and of torchtitan's attention module are written here anew, operator for operator.
"""

from typing import Any, NamedTuple

import attn_gym.masks as gym
import torch
from attn_gym.masks.vsa import generate_vsa_padding_mask_mod
from torch.nn.attention.flex_attention import and_masks, noop_mask, or_masks


class Case(NamedTuple):
    """A mask_mod with lengths at which it reads no table out of range.

    heads, batch: None where the mask_mod reads neither
    """

    name: str
    mask_mod: Any
    q_len: int = 600
    kv_len: int = 600
    batch: int | None = None
    heads: int | None = None


def causal(b, h, q_idx, kv_idx):
    return q_idx >= kv_idx


OFFSETS = torch.tensor([0, 130, 131, 300, 428, 600], dtype=torch.int32)
DOCUMENTS = torch.repeat_interleave(torch.arange(5), OFFSETS.diff())
GLOBAL = torch.zeros(600, dtype=torch.bool)
GLOBAL[[0, 200, 201]] = True
PARENTS = [-1] + [(node * 7) // 11 for node in range(39)]
TOPK = torch.rand(2, 3, 9, 9).argsort(-1)[..., :4].int()
TILE_SIZES = torch.tensor([64, 64, 30, 64, 64, 10, 64, 64, 64])

GYM = [
    Case("gym causal", gym.causal_mask, 600, 500),
    Case("gym batchify", gym.batchify_mask_mod(gym.causal_mask, 90), 600, 500),
    Case("gym block diffusion", gym.generate_block_diffusion_mask(300, 32)),
    Case("gym dilated window", gym.generate_dilated_sliding_window(100, 4), 300, 700),
    Case("gym documents", gym.generate_doc_mask_mod(gym.causal_mask, OFFSETS)),
    Case("gym packed causal documents", gym.generate_packed_causal_doc_mask_mod(OFFSETS)),
    Case(
        "gym flamingo",
        gym.generate_vision_cross_attention_mask_mod(
            torch.tensor([[0, 100], [100, 420], [130, 600]]), 200
        ),
    ),
    Case("gym global window", gym.generate_global_sliding_window(40, GLOBAL)),
    Case(
        "gym tree",
        gym.generate_jetspec_tree_causal_mask_mod(
            260, gym.build_tree_ancestor_matrix(PARENTS, "cpu")
        ),
        40,
        320,
    ),
    Case("gym tree training", gym.generate_jetspec_training_mask_mod(200, 50), 400, 600),
    Case("gym natten", gym.generate_natten(25, 24, 7, 7)),
    Case("gym tiled natten", gym.generate_tiled_natten(24, 24, 7, 7, 8, 8), 576, 576),
    Case("gym morton natten", gym.generate_morton_natten(32, 32, 9, 9), 1024, 1024),
    Case("gym prefix", gym.generate_prefix_lm_mask(170), 600, 500),
    Case(
        "gym shared prefix",
        gym.generate_shared_prefix_mask_mod(OFFSETS, torch.tensor([0, 0, 0, 3, 3])),
    ),
    Case("gym window", gym.generate_sliding_window(100), 700, 300),
    Case("gym sta 2d", gym.generate_sta_mask_mod_2d((24, 24), (8, 16), (4, 8), 24)),
    Case("gym sta 3d", gym.generate_sta_mask_mod_3d((6, 8, 12), (2, 4, 12), (2, 4, 6), 24)),
    Case("gym svg spatial", gym.generate_spatial_head_mask_mod(40, 5, 130, 2, True, 64), 690, 690),
    Case("gym svg temporal", gym.generate_temporal_head_mask_mod(40, 5, 130, 2), 690, 690),
    Case("gym vsa", gym.generate_vsa_mask_mod(TOPK, 64, TILE_SIZES), 576, 576, 2, 3),
    Case("gym vsa padding", generate_vsa_padding_mask_mod(TILE_SIZES, 64), 576, 576),
]


def _blog() -> list[Case]:
    window, prefix_lengths, width = 150, torch.tensor([100, 300]), 20
    document_id = DOCUMENTS

    def sliding_window(b, h, q_idx, kv_idx):
        return (q_idx >= kv_idx) & (q_idx - kv_idx <= window)

    def prefix(b, h, q_idx, kv_idx):
        return kv_idx <= prefix_lengths[b]

    def document(b, h, q_idx, kv_idx):
        return (q_idx >= kv_idx) & (document_id[q_idx] == document_id[kv_idx])

    def square(b, h, q_idx, kv_idx):
        near_x = (q_idx // width - kv_idx // width).abs() <= 3
        return near_x & ((q_idx % width - kv_idx % width).abs() <= 3)

    return [
        Case("blog no-op", noop_mask, 300, 500),
        Case("blog window", sliding_window, 300, 700),
        Case("blog prefix", or_masks(prefix, causal), 600, 500, batch=2),
        Case("blog documents", document),
        Case("blog square", square),
    ]


def _transformers() -> list[Case]:
    left_padding = torch.tensor([0, 37])
    padding = torch.arange(600) >= left_padding[:, None]
    packed = torch.stack([DOCUMENTS, (DOCUMENTS + 1) // 2])
    groups = torch.stack([DOCUMENTS, DOCUMENTS]) - 2

    def new_ones_and(*mask_functions):
        def and_mask(batch_idx, head_idx, q_idx, kv_idx):
            kept = q_idx.new_ones((), dtype=torch.bool)
            for function in mask_functions:
                kept = kept & function(batch_idx, head_idx, q_idx, kv_idx).to(kept.device)
            return kept

        return and_mask

    def new_zeros_or(*mask_functions):
        def or_mask(batch_idx, head_idx, q_idx, kv_idx):
            kept = q_idx.new_zeros((), dtype=torch.bool)
            for function in mask_functions:
                kept = kept | function(batch_idx, head_idx, q_idx, kv_idx).to(kept.device)
            return kept

        return or_mask

    def future_hidden(batch_idx, head_idx, q_idx, kv_idx):
        return kv_idx <= q_idx

    def bidirectional(batch_idx, head_idx, q_idx, kv_idx):
        return q_idx >= 0

    def window(batch_idx, head_idx, q_idx, kv_idx):
        return kv_idx > q_idx - 128

    def window_both_ways(batch_idx, head_idx, q_idx, kv_idx):
        return abs(q_idx - kv_idx) <= 100

    def chunk(batch_idx, head_idx, q_idx, kv_idx):
        skipped = left_padding[batch_idx]
        return (kv_idx - skipped) // 96 == (q_idx - skipped) // 96

    def real(batch_idx, head_idx, q_idx, kv_idx):
        return padding[batch_idx, kv_idx]

    def same_sequence(batch_idx, head_idx, q_idx, kv_idx):
        return packed[batch_idx, q_idx] == packed[batch_idx, kv_idx]

    def same_group(batch_idx, head_idx, q_idx, kv_idx):
        q_group, kv_group = groups[batch_idx, q_idx], groups[batch_idx, kv_idx]
        return (q_group == kv_group) & (q_group >= 0)

    def same_image(batch_idx, head_idx, q_idx, kv_idx):
        # a cache longer than the inputs: keys past their end belong to no image
        safe = torch.where(kv_idx < groups.shape[1], kv_idx, 0)
        kv_group = torch.where(kv_idx < groups.shape[1], groups[batch_idx, safe], -1)
        return (groups[batch_idx, q_idx] == kv_group) & (kv_group >= 0)

    def at_offsets(mask_function, q_offset, kv_offset):
        def inner_mask(batch_idx, head_idx, q_idx, kv_idx):
            return mask_function(batch_idx, head_idx, q_idx + q_offset, kv_idx + kv_offset)

        return inner_mask

    return [
        Case("transformers causal", future_hidden, 300, 500),
        Case("transformers bidirectional", bidirectional, 300, 500),
        Case("transformers window", new_ones_and(window, future_hidden), 600, 500),
        Case("transformers window both ways", new_ones_and(window_both_ways, bidirectional)),
        Case("transformers chunks", new_ones_and(chunk, future_hidden), batch=2),
        Case("transformers padding", new_ones_and(future_hidden, real), batch=2),
        Case("transformers packed", new_ones_and(same_sequence, future_hidden), batch=2),
        Case("transformers groups", new_zeros_or(future_hidden, same_group), batch=2),
        Case("transformers images", new_zeros_or(future_hidden, same_image), 600, 700, batch=2),
        Case("transformers offsets", at_offsets(new_ones_and(window, future_hidden), 200, 13), 90),
        Case("transformers offset padding", at_offsets(real, 500, 100), 100, 500, batch=2),
    ]


def _torchtitan() -> list[Case]:
    ends = torch.zeros(2, 600, dtype=torch.bool)
    ends[0, [129, 130, 400]] = True
    ends[:, -1] = True
    before = torch.cumsum(torch.where(ends, 1, 0), dim=1)
    sequence = torch.zeros_like(before, dtype=torch.int32)
    sequence[:, 1:] = before[:, :-1]

    def document(b, h, q_idx, kv_idx):
        return sequence[b, q_idx] == sequence[b, kv_idx]

    def fixed_block(b, h, q_idx, kv_idx):
        q_block, kv_block = q_idx // 96, kv_idx // 96
        return q_block == kv_block

    def window(b, h, q_idx, kv_idx):
        return (kv_idx <= q_idx) & (q_idx - kv_idx < 200)

    return [
        Case("torchtitan documents", and_masks(causal, document), batch=2),
        Case("torchtitan blocks", and_masks(causal, fixed_block), 600, 500),
        Case("torchtitan window", window, 300, 700),
    ]


PUBLISHED = [*GYM, *_blog(), *_transformers(), *_torchtitan()]

LIMITS = torch.tensor(130)
PER_HEAD = torch.tensor([10, 200, 400], dtype=torch.int16)
NARROW = torch.arange(600).mul(7).remainder(256).to(torch.uint8)
SIGNED = torch.arange(600).mul(11).remainder(200).sub(100).to(torch.int8)
SCORES = torch.randn(600)
SCORES[7], SCORES[8] = float("nan"), float("inf")
FINE = torch.linspace(-1, 1, 600, dtype=torch.float64)
PAIRS = torch.stack([torch.arange(600) // 2, torch.arange(600) // 2 + 90], 1)
BOOK = torch.arange(5 * 120).view(5, 120)
PAGES = torch.arange(4 * 10 * 20).view(4, 10, 20)


def _can_vmap(operator):
    try:
        torch.vmap(operator)(torch.zeros(2))
    except RuntimeError:
        return False
    return True


def _in_place(b, h, q_idx, kv_idx):
    kept = q_idx >= kv_idx
    kept &= q_idx - kv_idx < 99
    kept |= kv_idx < 5
    distance = q_idx - kv_idx
    distance *= 2
    distance += kv_idx.int()
    return kept | (distance == 700)


def _parts(b, h, q_idx, kv_idx):
    first, last = PAIRS[q_idx]
    return (kv_idx >= first) & (kv_idx < last)


# each stands for an operator or a way of writing: element for element what torch computes
IDIOMS = {
    "0-d tensor": lambda b, h, q, k: q - k < LIMITS,
    "per head": lambda b, h, q, k: (q - k < PER_HEAD[h]) & (q >= k),
    "where": lambda b, h, q, k: torch.where(q > k, q - k, (k - q) * 2) < 90,
    "where of masks": lambda b, h, q, k: torch.where(q % 3 == 0, q >= k, k < 100),
    "floor division": lambda b, h, q, k: (q - 300) // 7 >= (k - 200) // -9,
    "div floor": lambda b, h, q, k: torch.div(q - 300, 64, rounding_mode="floor") <= k // 64,
    "div trunc": lambda b, h, q, k: torch.div(q - k, 64, rounding_mode="trunc") == 0,
    "remainder": lambda b, h, q, k: (q - k) % 64 < (k - 300) % -5 + 20,
    "fmod": lambda b, h, q, k: torch.fmod(q - k, 64) < -3,
    "reversed": lambda b, h, q, k: (300 - q < k) & (5 // (q + 1) == 10 % (k + 3)),
    "bits": lambda b, h, q, k: ((q & 0x55) | (k ^ 12)) > (~q & k),
    "shifts": lambda b, h, q, k: (q >> 5) << 2 >= k >> 3,
    "masked bits": lambda b, h, q, k: (q & ~63) == (k & ~63),
    "logical": lambda b, h, q, k: torch.logical_and(
        torch.logical_or(q > k, k % 7), torch.logical_not(torch.logical_xor(q, k > 300))
    ),
    "min and max": lambda b, h, q, k: (
        torch.minimum(q, k + 9).clamp(30, 500) >= torch.maximum(k, q - 9)
    ),
    "clamp by tensors": lambda b, h, q, k: q.clamp(min=k - 20, max=k + 40) == q,
    "neg, abs, sign": lambda b, h, q, k: (-q).abs() * torch.sign(k - q) < 40,
    "casts": lambda b, h, q, k: (q >= k).int() + (k > 100).long() > (q % 2).bool().to(torch.int8),
    "int32": lambda b, h, q, k: (q.int() * 100_000) * 100_000 >= k.int(),
    "int8 wraps": lambda b, h, q, k: (q % 100).to(torch.int8) + (k % 100).to(torch.int8) < 0,
    "uint8 wraps": lambda b, h, q, k: NARROW[q] - NARROW[k] > 100,
    "int8 table": lambda b, h, q, k: SIGNED[q] * SIGNED[k] >= SIGNED[k].neg(),
    "negative index": lambda b, h, q, k: DOCUMENTS[q - 100] == DOCUMENTS[k // 2 - 300],
    "constant index": lambda b, h, q, k: q - k < OFFSETS[-2] - OFFSETS[1],
    "rows": lambda b, h, q, k: BOOK[q // 120][k // 5] > BOOK[:, 3][q // 120] + 40,
    "view": lambda b, h, q, k: DOCUMENTS.view(-1, 60)[q // 60, k % 60] == DOCUMENTS[k],
    "entry of every row": lambda b, h, q, k: (
        (BOOK.T[:, q // 120] > k).any() & (BOOK[..., k % 120] > q).any()
    ),
    "end of a row": lambda b, h, q, k: (
        (BOOK[q // 120, -1:] > k).all() | (BOOK[k // 120, None] < q).all()
    ),
    "middle of a row": lambda b, h, q, k: (PAGES[k // 150, 5:9:2, q % 20] > q).all(),
    "places and indices": lambda b, h, q, k: (
        PAGES[:, torch.arange(3), k % 20, None][q // 150, 2, 0] > k
    ),
    "unpacked row": _parts,
    "stacked": lambda b, h, q, k: (
        torch.stack([q, k, q - k]).amax() - torch.stack([q, k])[k % 2] < 90
    ),
    "concatenated": lambda b, h, q, k: torch.cat([BOOK[0], q.view(1)])[k % 121] < 80,
    "any": lambda b, h, q, k: (PAIRS[q] - k.unsqueeze(-1)).abs().lt(20).any(-1),
    "sum": lambda b, h, q, k: (q >= OFFSETS).sum() == (k >= OFFSETS).sum(),
    "arange": lambda b, h, q, k: (torch.arange(4) * 50 + k == q).any() | (q % 64 == k % 64),
    "isin": lambda b, h, q, k: torch.isin(k, OFFSETS) | (q == k),
    "index_select": lambda b, h, q, k: DOCUMENTS.index_select(0, q.view(1)).squeeze() > k // 200,
    "gather": lambda b, h, q, k: DOCUMENTS.gather(0, torch.stack([q, k])).amin() == 2,
    "masked_fill": lambda b, h, q, k: (q - k).masked_fill(q < k, 1000) < 200,
    "square": lambda b, h, q, k: (q // 25 - k // 25) ** 2 + (q % 25 - k % 25) ** 2 < 30,
    "constants": lambda b, h, q, k: torch.full_like(q, 200).sub(k).ge(q.new_zeros(())) | (b >= 0),
    "float compare": lambda b, h, q, k: (q < 299.5) & (k > 0.25 * q),
    "float divide": lambda b, h, q, k: q / (k + 1) > 1.3,
    "divide by zero": lambda b, h, q, k: (q - 50) / (k - 40) >= 1,
    "sqrt": lambda b, h, q, k: torch.sqrt(q - 100.0) <= (k.float() / 3).floor(),
    "float tables": lambda b, h, q, k: (SCORES[q] > SCORES[k]) | (SCORES[q].neg() != SCORES[q]),
    "double": lambda b, h, q, k: FINE[q] * 0.1 - k.double() / 7 >= SCORES[k].double() * -30,
    "float to int": lambda b, h, q, k: (k * 0.37).int() == (q / 2.7).long(),
    "round up": lambda b, h, q, k: (q / 64).ceil() * 64 > k,
    "in place": _in_place,
}
# exact as well, through operators that have no rule
BYTES = torch.arange(600).to(torch.uint8)
SHORTS = (torch.arange(600) * 50).to(torch.int16)
INTS = (torch.arange(600) * 3_500_000).to(torch.int32)
SHIFTS = torch.arange(600) % 3
OPAQUE = {
    "sin": (lambda b, h, q, k: (q * 0.1).sin() > (k * 0.1).cos(), {"aten.sin", "aten.cos"}),
    "hash": (lambda b, h, q, k: (q * 6364136223846793005 + k) >> 33 & 7 == 3, {"aten.mul"}),
    "power": (lambda b, h, q, k: 2.0 ** (q % 9) > k, {"aten.pow"}),
    "half": (lambda b, h, q, k: q.half() * 0.3 > k.half(), {"aten.mul"}),
    "cumsum": (lambda b, h, q, k: (BOOK[q // 120] * k).cumsum(0)[k % 99] > 9, {"aten.cumsum"}),
    "long sum": (lambda b, h, q, k: (DOCUMENTS * q).sum() % 1000 > k, {"aten.sum"}),
    "argmax": (lambda b, h, q, k: (PAIRS[k] - q).abs().argmax() == 0, {"aten.argmax"}),
    "bytes": (
        lambda b, h, q, k: (BYTES[q] >> SHIFTS.to(torch.uint8)[k]).long() * 9 + q > BYTES[k] * 4,
        {"aten.__rshift__"},
    ),
    "shorts": (lambda b, h, q, k: SHORTS[q].trunc().long() * 9 > k * 900, {"aten.trunc"}),
    "ints": (
        lambda b, h, q, k: (INTS[q] >> SHIFTS.int()[k]).long() * 9 > INTS[k],
        {"aten.__rshift__"},
    ),
    "place": (
        lambda b, h, q, k: SHIFTS[SHORTS[q].trunc().clamp(0, 99).long()] > k % 3,
        {"aten.trunc"},
    ),
    "sort": (lambda b, h, q, k: torch.stack([q, k]).half().sort()[0][0] > 90, {"aten.sort"}),
}
if _can_vmap(
    lambda x: x.view(torch.int32)
):  # torch 2.11 cannot, nor torch's create_block_mask there
    OPAQUE["bits of floats"] = (
        lambda b, h, q, k: q.float().view(torch.int32) >> 23 > k.float().view(torch.int32) >> 23,
        {"aten.view"},
    )
