"""Every pattern of flexsparse.masks: its picture, rule, block lists, text and errors."""

import ast
import inspect
import re
from pathlib import Path

import pattern_rules
import pytest
import torch
from oracles import assert_same_lists
from pattern_errors import ERRORS
from pattern_pictures import PICTURES
from pattern_rules import CASES, Case, dense, heads_of
from torch.nn.attention.flex_attention import create_block_mask

import flexsparse
import flexsparse.masks as library
from flexsparse import Mask, MaskError, PerHead, compile_mask, parse, per_head

BOOLEAN = ("block_sparse", "kept_keys", "qk_sparse")
INTEGER = (
    "attention_slices",
    "clusters",
    "flashmask",
    "hash_sparse",
    "packed",
    "padding",
    "same_document",
    "shared_prefix",
    "token_tree",
    "vertical_slash",
    "vertical_slash_blocks",
)


def taking_lists(name):
    """A pattern that takes lists where it takes tensors."""
    dtype = {**dict.fromkeys(BOOLEAN, torch.bool), **dict.fromkeys(INTEGER, torch.int32)}.get(name)
    build = getattr(library, name)
    if name == "block_sparse_attention":
        return lambda types, info, table, *rest: build(
            types, info, torch.tensor(table, dtype=torch.bool), *rest
        )
    if dtype is None:
        return build
    return lambda *args: build(
        *[torch.tensor(a, dtype=dtype) if isinstance(a, list) else a for a in args]
    )


def draw(caption):
    """The picture of 'call, rows x columns[ blocks of n]', heads side by side."""
    call, rows, columns, step = re.fullmatch(
        r"(.*), (\d+) x (\d+)(?: blocks of (\d+))?", caption
    ).groups()
    rows, columns, step = int(rows), int(columns), int(step or 1)
    masks = eval(call, {name: taking_lists(name) for name in library.__all__})
    pictures = []
    for mask in heads_of(masks):
        kept = dense(mask, Case(None, None, None, rows * step, columns * step))[0, 0]
        kept = kept.unflatten(1, (columns, step)).unflatten(0, (rows, step)).any(3).any(1)
        pictures.append(["".join(".#"[x] for x in row) for row in kept.int().tolist()])
    return "\n".join(" ".join(row) for row in zip(*pictures, strict=True))


@pytest.mark.parametrize("caption", PICTURES)
def test_a_pattern_looks_like_its_picture(caption):
    assert draw(caption) == inspect.cleandoc(PICTURES[caption])


PATTERNS = [n for n in library.__all__ if not isinstance(getattr(library, n), Mask)]


@pytest.mark.parametrize("name", PATTERNS)
def test_the_docstring_shows_the_picture(name):
    caption, picture = shown_picture(inspect.getdoc(getattr(library, name)))
    assert picture == inspect.cleandoc(PICTURES[caption])


def shown_picture(doc):
    """The caption of a docstring and the picture that begins on its line or below it."""
    caption = r"(?:^|\s{3,})(\S(?:(?!\s{3}).)*?, (\d+) x \d+(?: blocks of \d+)?):(\s+[#.][#. ]*)?$"
    lines = doc.splitlines()
    line, found = next(
        (i, re.search(caption, x)) for i, x in enumerate(lines) if re.search(caption, x)
    )
    first = line if found[3] else line + 1
    rows = [
        re.search(r"(?:^|\s{2,})([#.][#. ]*)$", x) for x in lines[first : first + int(found[2])]
    ]
    return found[1], "\n".join(row[1] if row else "?" for row in rows)


def test_every_pattern_has_a_picture():
    text = " ".join(PICTURES)
    assert [name for name in library.__all__ if not re.search(rf"\b{name}\b", text)] == []


@pytest.mark.parametrize("at", CASES, ids=lambda c: f"{c.name}-{c.q_len}x{c.kv_len}+{c.q_offset}")
def test_a_pattern_follows_its_rule(at):
    kept = dense(at.mask, at).tolist()
    expected = [
        [
            [
                [bool(at.rule(b, h, q + at.q_offset, k)) for k in range(at.kv_len)]
                for q in range(at.q_len)
            ]
            for h in range(at.n_heads)
        ]
        for b in range(at.batch)
    ]
    assert kept == expected


def test_every_pattern_has_a_rule():
    source = inspect.getsource(pattern_rules)
    assert [n for n in library.__all__ if not re.search(rf"case\(\s*(\S.*\W)?{n}\b", source)] == []


ONE_OF_EACH = {at.name: at for at in CASES}.values()


@pytest.mark.parametrize("at", ONE_OF_EACH, ids=lambda c: c.name)
def test_block_lists_are_torch_s(at):
    # a ragged shape, blocks small enough for all three classes to occur
    q_len, kv_len, block = 70, 93, 16
    masks = per_head(at.mask) if isinstance(at.mask, list) else at.mask
    together = masks.mask(torch.device("cpu")) if isinstance(masks, PerHead) else masks
    n_heads = at.n_heads if "h" in together.variables else None
    batch = at.batch if "b" in together.variables else None
    compiled = compile_mask(
        masks, q_len, kv_len, batch=batch, n_heads=n_heads, q_offset=at.q_offset, block_size=block
    )

    def mask_mod(b, h, q, kv):
        return together(b, h, q + at.q_offset, kv)

    theirs = create_block_mask(
        mask_mod, batch, n_heads, q_len, kv_len, device="cpu", BLOCK_SIZE=block
    )
    assert_same_lists(compiled.block_mask, theirs)


def attention_of(at: Case):
    """A case compiled at 70 x 93, and random q, k and v that fit it."""
    masks = per_head(at.mask) if isinstance(at.mask, list) else at.mask
    reads = set().union(*(mask.variables for mask in heads_of(at.mask)))
    batch = at.batch if "b" in reads else None
    n_heads = at.n_heads if isinstance(masks, Mask) and "h" in reads else None
    attend = compile_mask(
        masks, 70, 93, batch=batch, n_heads=n_heads, q_offset=at.q_offset, block_size=16
    )
    q = torch.randn(batch or 1, at.n_heads, 70, 16)
    k, v = torch.randn(2, batch or 1, at.n_heads, 93, 16)
    return attend, (q, k, v)


@pytest.mark.parametrize("at", ONE_OF_EACH, ids=lambda c: c.name)
def test_blockwise_gives_what_the_reference_gives(at: Case):
    attend, inputs = attention_of(at)
    out, lse = attend(*inputs, return_lse=True, executor="blockwise")
    expected, expected_lse = attend(*inputs, return_lse=True, executor="reference")
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(lse, expected_lse)


# one case of each pattern, because a kernel takes seconds to compile
ONE_OF_A_PATTERN = {at.name.split("(")[0]: at for at in ONE_OF_EACH}.values()


@pytest.mark.slow
@pytest.mark.parametrize("at", ONE_OF_A_PATTERN, ids=lambda c: c.name)
def test_flex_gives_what_the_reference_gives(at: Case):
    attend, inputs = attention_of(at)
    expected = attend(*inputs, executor="reference")
    torch.testing.assert_close(attend(*inputs, executor="flex"), expected)


WITHOUT_TENSORS = {mask.name: mask for at in CASES for mask in heads_of(at.mask) if not mask.tables}


@pytest.mark.parametrize("mask", WITHOUT_TENSORS.values(), ids=WITHOUT_TENSORS)
def test_text_reads_back(mask):
    assert parse(str(mask)) == mask
    assert parse(mask.name, vars(library)) == mask


@pytest.mark.parametrize(("build", "message"), ERRORS, ids=[message for _, message in ERRORS])
def test_a_bad_argument_says_what_to_write(build, message):
    with pytest.raises(MaskError, match=message):
        build()


def test_packed_sequences_are_given_as_lists_too():
    tensors = torch.tensor([0, 50, 100]), torch.tensor([0, 0])
    assert library.packed([0, 50, 100]) == library.packed(tensors[0])
    assert library.shared_prefix([0, 50, 100], (0, 0)) == library.shared_prefix(*tensors)
    assert parse("packed([0, 50])", vars(library)) == library.packed(torch.tensor([0, 50]))


def test_masks_import_only_public_names():
    public = set(flexsparse.__all__)
    for path in Path(library.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                assert not [a for a in node.names if a.name.startswith("flexsparse")], path
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("flexsparse"):
                assert node.module.startswith("flexsparse.masks") or node.module == "flexsparse", (
                    path
                )
                if node.module == "flexsparse":
                    assert {a.name for a in node.names} <= public, path
            if isinstance(node, ast.ImportFrom):
                assert node.level == 0, path


def test_the_namespace_lists_every_pattern():
    public = {name for name, value in vars(library).items() if not name.startswith("_")}
    modules = {name for name in public if inspect.ismodule(getattr(library, name))}
    assert public - modules == set(library.__all__)


def of_tables(tokens):
    """Masks of integer tables of 6 tokens, which may have heads, and batch rows before them."""
    kept = tokens > 0
    of_heads = [1] * (3 - tokens.dim()) + list(tokens.shape)
    return [
        library.block_sparse(kept.unsqueeze(-2), (6, 1)),
        library.kept_keys(kept),
        library.clusters(tokens),
        library.hash_sparse(tokens, tokens),
        library.qk_sparse(kept, kept),
        library.vertical_slash(tokens, kept),
        library.flashmask(tokens.view(*of_heads, 1), True, group_size=2),
    ]


def test_one_head_or_one_batch_row_of_a_table_stands_for_all():
    ids = torch.arange(6) // 2
    shared = of_tables(ids)
    assert of_tables(ids[None]) == of_tables(ids[None, None]) == shared
    two = torch.stack([ids, ids.flip(0)])
    for mask, of_rows, of_heads in zip(
        shared, of_tables(two[:, None]), of_tables(two), strict=True
    ):
        assert of_rows.variables == mask.variables | {"b"}
        assert of_heads.variables == mask.variables | {"h"}
    assert of_tables(two[None]) == of_tables(two)
    assert library.same_document(ids[None]) == library.same_document(ids)
    for pattern in (library.padding, library.prefix):
        assert "b" not in pattern(torch.tensor([3])).variables
