"""The knapsack against every assignment there is, and searches on tiny random models."""

import itertools

import pytest
import torch
from letter_models import N_HEADS, VOCABULARY, Letters, tiny

from flexsparse import MaskError, h, kv_idx, q_idx
from flexsparse.commands import main
from flexsparse.executors import flex
from flexsparse.fidelity import Divergence, Replay, head_fidelity, layer_inputs, plan_density
from flexsparse.masks import block_streaming, causal
from flexsparse.plan import SparsePlan
from flexsparse.search import CRITERIA, assign, candidates_for, knapsack, search
from flexsparse.search.criteria import Measured, Slot, plan_of

LENGTH = 640  # 5 x 5 blocks
CANDIDATES = [causal, block_streaming(1, 2), block_streaming(1, 1), block_streaming(0, 1)]
BLOCKS = [15, 12, 9, 5]


@pytest.fixture(autouse=True)
def no_kernels(monkeypatch):
    """Plain PyTorch attention: a kernel takes seconds to compile, and is tested elsewhere."""
    monkeypatch.setattr(flex, "_MISSING_ON_CPU", "kernels are left out here")


@pytest.fixture
def ids():
    return torch.randint(0, VOCABULARY, (2, LENGTH))


def problem(seed, slots=5, candidates=4):
    """(losses, costs, budget): random, with ties, and a budget that something fits."""
    generator = torch.Generator().manual_seed(seed)
    losses = torch.randint(-9, 30, (slots, candidates), generator=generator) / 7
    costs = torch.randint(0, 15, (slots, candidates), generator=generator)
    cheapest, dearest = int(costs.min(1).values.sum()), int(costs.max(1).values.sum())
    budget = int(torch.randint(cheapest, dearest + 2, (), generator=generator))
    return losses, costs, budget


def every_assignment(losses, costs, budget):
    """(loss, choice) of every assignment within a budget, by brute force."""
    rows = range(len(losses))
    for choice in itertools.product(range(losses.shape[1]), repeat=len(losses)):
        if sum(int(costs[i, choice[i]]) for i in rows) <= budget:
            yield sum(float(losses[i, choice[i]]) for i in rows), choice


@pytest.mark.parametrize("seed", range(20))
def test_the_knapsack_is_exact(seed):
    losses, costs, budget = problem(seed)
    found = assign(losses, costs, budget)
    least = min(loss for loss, _ in every_assignment(losses, costs, budget))
    assert found.loss == pytest.approx(least, abs=1e-6)
    assert found.bound == found.loss
    assert found.cost == sum(int(costs[i, j]) for i, j in enumerate(found.choice)) <= budget


@pytest.mark.parametrize("seed", range(20))
def test_a_table_that_is_too_large_keeps_the_budget_and_says_what_it_may_miss(seed, monkeypatch):
    losses, costs, budget = problem(seed)
    least = min(loss for loss, _ in every_assignment(losses, costs, budget))
    monkeypatch.setattr(knapsack, "LARGEST_TABLE", 60)
    found = assign(losses, costs, budget)
    assert found.cost <= budget
    assert found.bound - 1e-6 <= least <= found.loss + 1e-6


def test_a_budget_below_the_cheapest_candidates_is_refused():
    with pytest.raises(MaskError, match="compute 3 blocks together, and the budget is 2"):
        assign(torch.zeros(3, 2), torch.tensor([[1, 5]] * 3), 2)


def test_default_candidates_are_distinct_and_fit_the_length():
    for length in (128, 300, 2048, 16384):
        found = candidates_for(length)
        assert found[0] == causal
        inputs = [str(mask) for mask in found]
        assert len(set(inputs)) == len(inputs)


@pytest.mark.parametrize("criterion", CRITERIA)
def test_a_found_plan_is_within_its_density(criterion, ids):
    model = tiny("gemma3")
    found = search(
        model, ids[:1], 0.5, criterion=criterion, candidates=CANDIDATES, every=32, rounds=1
    )
    config = model.config
    assert found.plan.problem(config) is None
    assert found.plan.layers[0] is None
    assert found.plan.layers[2] is None  # they have windows of their own
    assert set(found.plan.layers[1] + found.plan.layers[3]) <= set(CANDIDATES)
    assert plan_density(found.plan, config, LENGTH) == pytest.approx(found.density)
    assert found.density <= 0.5
    assert f"{found.assignment.cost} of 200 blocks" in str(found)
    assert model.config._attn_implementation == "sdpa"  # the model is as it was


def test_a_candidate_may_read_the_head(ids):
    blocky = kv_idx >= q_idx // 128 * 128
    masks = [causal, (h < 2) & causal | blocky]
    found = search(tiny("gemma3"), ids[:1], 0.6, criterion="mass", candidates=masks, layers=[1])
    assert plan_density(found.plan, tiny("gemma3").config, LENGTH) == pytest.approx(found.density)
    with pytest.raises(MaskError, match="keeps no block in head 1 of layer 1"):
        search(tiny("gemma3"), ids[:1], 0.6, candidates=[causal & (h < 1)])


def test_with_room_for_everything_nothing_is_lost(ids):
    found = search(tiny("llama"), ids, 0.6, criterion="mass", candidates=CANDIDATES)
    assert all(mask == causal for layer in found.plan.layers for mask in layer)
    assert found.assignment.loss == pytest.approx(0, abs=1e-5)


def test_mass_and_output_choose_what_the_heads_lose_least(ids):
    model = tiny("gemma3")
    for criterion in ("mass", "output"):
        tables = []
        for row in ids.split(1):
            inputs = layer_inputs(model, row, [1, 3])
            found = [head_fidelity(inputs[layer], CANDIDATES) for layer in (1, 3)]
            tables.append(
                torch.cat([1 - x.mass if criterion == "mass" else x.error for x in found])
            )
        costs = torch.tensor([BLOCKS] * 2 * N_HEADS)
        expected = assign(torch.stack(tables).mean(0), costs, 90)
        found = search(model, ids, 0.45, criterion=criterion, candidates=CANDIDATES)
        assert found.assignment.choice == expected.choice
        assert found.budget == 90
        assert found.assignment.cost == sum(BLOCKS[place] for place in expected.choice)


def test_moves_are_differences_of_measured_divergences(ids):
    model = tiny("gemma3")
    slots = [Slot(layer, head) for layer in (1, 3) for head in range(N_HEADS)]
    masks = [block_streaming(1, 1)] * len(slots)
    moves = Measured(model, ids, slots, every=8).moves(masks, CANDIDATES)
    assert (moves[:, 2] == 0).all()  # no move

    def divergence(masks):
        total = 0.0
        for row in ids.split(1):
            replay = Replay(model, row, every=8)
            dense = Divergence(replay)
            plan = plan_of(model.config, slots, masks)
            plan.apply(model)
            total += dense.of(replay, 0)
            plan.remove(model)
        return total / len(ids)

    base = divergence(masks)
    for slot, place in ((0, 0), (7, 3)):
        changed = list(masks)
        changed[slot] = CANDIDATES[place]
        assert float(moves[slot, place]) == pytest.approx(divergence(changed) - base, abs=1e-5)


def test_moves_that_are_not_worth_it_are_not_measured(ids):
    slots = [Slot(1, head) for head in range(N_HEADS)]
    worth = torch.zeros(N_HEADS, len(CANDIDATES), dtype=torch.bool)
    worth[2, 0] = True
    measured = Measured(tiny("gemma3"), ids[:1], slots, every=32)
    moves = measured.moves([block_streaming(1, 1)] * N_HEADS, CANDIDATES, worth)
    assert moves.isfinite().nonzero().tolist() == [[0, 2], [1, 2], [2, 0], [2, 2], [3, 2]]


def test_a_later_round_measures_what_nothing_cheaper_was_better_than(ids, monkeypatch):
    rounds = []
    values = iter((1.0, 0.9, 0.8))
    monkeypatch.setattr(Measured, "of", lambda self, masks: next(values))
    losses = torch.tensor([[-0.3, -0.1, 0.0, 0.2]] * 7 + [[0.1, 0.1, -0.1, 0.0]]).double()
    monkeypatch.setattr(Measured, "moves", lambda *args: rounds.append(args[-1]) or losses)
    search(tiny("gemma3"), ids, 0.5, candidates=CANDIDATES, every=8, rounds=2)
    assert rounds[0] is None
    # of the last head only the two cheapest
    assert rounds[1].tolist() == [[True] * 4] * 7 + [[False, False, True, True]]


def test_each_round_of_the_search_is_better_than_the_one_before(ids):
    found = search(tiny("gemma3"), ids[:1], 0.5, candidates=CANDIDATES, every=8, rounds=2)
    values = [value for _, value in found.history]
    assert len(values) > 1
    assert values == sorted(values, reverse=True)
    # the first is the best that all heads can have in common
    assert found.history[0][0] == 8 * 12
    assert found.history[-1][0] == found.assignment.cost


def test_a_search_stops_at_a_plan_that_no_change_improves(ids, monkeypatch):
    """Moves that promise much and keep nothing are tried, fewer and fewer, and then given up."""
    tried = []
    monkeypatch.setattr(Measured, "of", lambda self, masks: tried.append(masks) or 1.0)
    promises = torch.tensor([[-0.1, 0.0, 0.02, 0.1], [-0.8, 0.0, 0.03, 0.1]] * 4)
    monkeypatch.setattr(Measured, "moves", lambda *_: promises.double())
    found = search(tiny("gemma3"), ids, 0.5, candidates=CANDIDATES, every=8)
    start, *changed = tried
    # the best that all heads can have in common, which is kept
    assert set(start) == {block_streaming(1, 2)}
    assert found.plan.layers[1] + found.plan.layers[3] == tuple(start)
    assert len(found.history) == 1
    numbers = [sum(a != b for a, b in zip(start, masks, strict=True)) for masks in changed]
    assert numbers[0] == 8  # four heads get everything, and four pay for it
    assert numbers == sorted(numbers, reverse=True)
    assert numbers[-1] < 8


def test_a_search_goes_on_from_a_plan(ids):
    model = tiny("gemma3")
    options = {"candidates": CANDIDATES, "every": 8, "rounds": 1}
    first = search(model, ids[:1], 0.5, **options)
    on = search(model, ids[:1], 0.5, start=first.plan, **options)
    assert on.history[0] == pytest.approx(first.history[-1])
    # its masks are candidates, and heads that it leaves as they are see everything
    own = block_streaming(2, 1)
    start = SparsePlan([None, [own, *[block_streaming(1, 1)] * 3], None, None])
    on = search(model, ids[:1], 0.6, start=start, **options | {"candidates": CANDIDATES[2:]})
    assert on.history[0][0] == 12 + 3 * 9 + 4 * 15


def start_of(mask):
    return SparsePlan([None, [mask] * 4, None, [mask] * 4])


REFUSED = [
    ({"density": 0.5, "start": SparsePlan([None] * 5)}, "The plan has 5 layers and the model"),
    ({"density": 0.5, "start": start_of(causal)}, "computes 120 blocks, and the budget is 100"),
    (
        {"density": 0.5, "start": start_of(causal), "criterion": "mass"},
        "A search by mass starts from no plan",
    ),
    ({"density": 0.0}, "density=0.0; it is a part of all blocks"),
    ({"density": 1.5}, "density=1.5"),
    ({"density": 0.1}, "cheapest candidates of all heads compute 40 blocks"),
    ({"density": 0.5, "criterion": "luck"}, "criterion='luck'; it must be one of mass, output"),
    ({"density": 0.5, "candidates": []}, "no candidates"),
    ({"density": 0.5, "layers": [4]}, "Layer 4 does not exist; the model has layers 0 to 3"),
    (
        {"density": 0.5, "candidates": [causal, causal & (kv_idx < 0)]},
        "keeps no block in layer 1",
    ),
]


@pytest.mark.parametrize(("arguments", "message"), REFUSED, ids=lambda x: str(x)[:40])
def test_a_search_that_cannot_be_is_refused_before_the_model_runs(arguments, message, ids):
    model = tiny("gemma3")
    model.register_forward_pre_hook(lambda *_: pytest.fail("the model ran"))
    with pytest.raises(MaskError, match=message):
        search(model, ids, **{"candidates": CANDIDATES, **arguments})


def test_a_model_with_windows_everywhere_is_refused(ids):
    model = tiny("llama")
    model.config.layer_types = ["sliding_attention"] * 4
    model.config.sliding_window = 64
    with pytest.raises(MaskError, match="window of its own, so there is nothing to search"):
        search(model, ids, 0.5)


def test_text_longer_than_the_model_reads_is_refused():
    with pytest.raises(MaskError, match="reads at most 2,048 tokens"):
        search(tiny("llama"), torch.zeros(1, 4096, dtype=torch.int64), 0.5)


def test_the_command_searches_and_saves_a_plan(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("flexsparse.commands.search.load", lambda *_: (tiny("gemma3"), Letters()))
    text, plan = tmp_path / "text.txt", tmp_path / "plan.json"
    text.write_text("the quick brown fox jumps over the lazy dog " * 30)
    command = ["search", str(plan), "--text", str(text), "--len", "640", "--sequences", "2"]
    masks = ["--candidate", "causal", "--candidate", "block_streaming(1, 1)"]
    assert main([*command, *masks, "--density", "0.5", "--criterion", "output"]) == 0
    saved = SparsePlan.load(plan)
    assert str(saved) in capsys.readouterr().out
    assert plan_density(saved, tiny("gemma3").config, 640) <= 0.5
    # of 15 and 9 blocks, five heads have room for everything
    heads = [mask for layer in saved.layers if layer for mask in layer]
    assert heads.count(causal) == 4
    on = ["search", str(tmp_path / "on.json"), "--start", str(plan), *command[2:], *masks]
    assert main([*on, "--density", "0.5", "--every", "64", "--rounds", "1"]) == 0
    assert plan_density(SparsePlan.load(tmp_path / "on.json"), tiny("gemma3").config, 640) <= 0.5


@pytest.mark.parametrize(
    ("plan", "arguments", "message"),
    [
        ("plan.json", ["--density", "0"], "density=0.0; it is a part of all blocks"),
        ("plan.json", ["--density", "0.2"], "blocks together, and the budget is"),
        ("no/plan.json", ["--density", "0.5"], "cannot write"),
        ("plan.json", ["--density", "0.5", "--layers", "9"], "Layer 9 does not exist"),
        ("plan.json", ["--density", "0.5", "--sequences", "9"], "9 sequence"),
    ],
)
def test_the_command_refuses_in_one_sentence(
    plan, arguments, message, monkeypatch, capsys, tmp_path
):
    monkeypatch.setattr("flexsparse.commands.search.load", lambda *_: (tiny("gemma3"), Letters()))
    text = tmp_path / "text.txt"
    text.write_text("letters " * 200)
    command = ["search", str(tmp_path / plan), "--text", str(text), "--len", "640"]
    assert main([*command, "--sequences", "1", *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / plan).exists()
