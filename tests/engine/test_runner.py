import pytest
import torch

from dovetail.catalog.precision import load_recipe
from dovetail.engine.steps.cache import contiguous_cache
from dovetail.engine.steps.rows import NONE, Chunk, Short
from dovetail.engine.steps.runner import Runner
from dovetail.model.attention.causal import attention_reference
from dovetail.model.precision import apply_recipe
from dovetail.numerics.formats import errors

E4M3_ROUNDOFF = 2.0**-4


def assert_close(spec, actual, expected):
    """Within the rounding of GEMMs that follow one another: 8 in a layer, the widest over 2 * hidden_size terms."""
    gemms = 8 * (spec.num_hidden_layers + spec.num_nextn_predict_layers)
    limit = gemms * errors.tolerance(torch.float32, terms=2 * spec.hidden_size)
    assert errors.normwise_error(actual, expected) <= limit


def tokens_of(spec, *shape):
    return torch.randint(0, spec.vocab_size, shape, generator=torch.Generator().manual_seed(5))


def runner_of(model, kind):
    """Kinds: "fused"; "reference"; and "together", the reference as it is on a GPU."""
    dtype = model.embed_tokens.weight.dtype
    runner = Runner(model, contiguous_cache(model.spec, slots=4, capacity=32, dtype=dtype), kind == "fused")
    runner.one_by_one = kind != "together"
    return runner


def prompt(runner, slot, tokens, start=0, **wanted):
    return runner.prompt([Chunk(slot, start, tokens.tolist())], **wanted)


@pytest.fixture(params=["reference", "together", "fused"])
def setup(engine_spec, engine_model, request):
    model = engine_model(engine_spec())
    return model.spec, model, runner_of(model, request.param)


@torch.no_grad()
def test_prefill_and_decode_equal_the_full_forward(setup):
    spec, model, runner = setup
    tokens = tokens_of(spec, 20)
    full = model(tokens[None]).hidden[0]
    parts = [prompt(runner, 2, tokens[:13])]
    for i in range(13, 20):
        parts.append(runner.step(tokens[i : i + 1], torch.tensor([2]), torch.tensor([i])))
    assert_close(spec, torch.cat(parts), full)
    wrong = runner.step(tokens[-1:], torch.tensor([2]), torch.tensor([18]))  # one position early
    with pytest.raises(AssertionError):
        assert_close(spec, wrong, full[-1:])


@torch.no_grad()
@pytest.mark.parametrize("scoring_func", ["sigmoid", "softmax"])
@pytest.mark.parametrize("topk_method", ["noaux_tc", "group_limited_greedy"])
def test_fused_gates_equal_the_reference(scoring_func, topk_method, engine_spec, engine_model):
    moe = {**engine_spec().moe.model_dump(), "scoring_func": scoring_func, "topk_method": topk_method}
    model = engine_model(engine_spec(moe=moe))
    for buffer in model.buffers():
        buffer.copy_(torch.linspace(-0.3, 0.3, 4))
    tokens, rows = tokens_of(model.spec, 6), (torch.full((6,), 1), torch.arange(6))
    fused, reference = (runner_of(model, each).step(tokens, *rows) for each in ("fused", "reference"))
    assert_close(model.spec, fused, reference)


def test_a_gate_that_the_kernels_lack_goes_to_the_reference(engine_spec, engine_model):
    """They would take it for softmax."""
    model = engine_model(engine_spec())
    assert runner_of(model, "fused").kernels is not None
    moe = model.spec.moe.model_copy(update={"scoring_func": "a new one"})
    model.spec = model.spec.model_copy(update={"moe": moe})
    assert runner_of(model, "fused").kernels is None


@pytest.fixture
def reference_attention(monkeypatch):
    """One rounding of attention for prompts and steps: FP8 makes a coarse step of the smallest difference."""
    monkeypatch.setattr("dovetail.model.attention.mla.causal_attention", attention_reference)


def absorbed_anyway(patch, model):
    for block in model.layers.values():
        block.self_attn.kv_b_proj.precision = None


def fused_anyway(patch, model):
    patch.setattr("dovetail.engine.steps.runner.takes", lambda model: True)


@torch.no_grad()
@pytest.mark.parametrize("recipe", ["deepseek-v3", "deepseek-v3.1"])
@pytest.mark.parametrize("wrong", [None, absorbed_anyway, fused_anyway])
def test_a_recipe_holds_for_prompts_and_steps(
    recipe, wrong, engine_spec, random_model, reference_attention, monkeypatch
):
    """Wrong variants are off by a rounding to E4M3 and more. All experts are chosen, so that none changes sides."""
    moe = {**engine_spec().moe.model_dump(), "num_experts_per_tok": 4, "n_group": 1, "topk_group": 1}
    model, tokens = random_model(engine_spec(moe=moe), torch.bfloat16), tokens_of(engine_spec(), 30)
    apply_recipe(model, load_recipe(recipe))
    full = model(tokens[None]).hidden[0, 13:].double()
    if wrong is not None:
        wrong(monkeypatch, model)
    runner = runner_of(model, "fused")
    prompt(runner, 0, tokens[:13])
    steps = [runner.step(tokens[i : i + 1], torch.tensor([0]), torch.tensor([i])) for i in range(13, 30)]
    difference = (torch.cat(steps).double() - full).norm() / full.norm()
    assert (difference < E4M3_ROUNDOFF) == (wrong is None)


@torch.no_grad()
def test_absorbed_equals_expanded(setup):
    spec, _, runner = setup
    tokens = tokens_of(spec, 9)
    expanded = prompt(runner, 0, tokens)
    absorbed = runner.step(tokens, torch.full((9,), 1), torch.arange(9))
    assert_close(spec, absorbed, expanded)
    assert_close(spec, runner.cache.data[:, 1], runner.cache.data[:, 0])


@torch.no_grad()
def test_rows_of_several_slots_with_different_counts(setup):
    """Slots 3, 0 and 1 bring 1, 3 and 1 rows; each sees its own history and its own earlier rows."""
    spec, model, runner = setup
    tokens = tokens_of(spec, 3, 12)
    lengths = {3: 4, 0: 7, 1: 9}  # before the step
    slots, positions, row_tokens, expected = [], [], [], []
    for row, (slot, length) in enumerate(lengths.items()):
        prompt(runner, slot, tokens[row, :length])
        count = 3 if slot == 0 else 1
        full = model(tokens[row : row + 1, : length + count]).hidden[0]
        for i in range(length, length + count):
            slots.append(slot)
            positions.append(i)
            row_tokens.append(int(tokens[row, i]))
            expected.append(full[i])
    hidden = runner.step(torch.tensor(row_tokens), torch.tensor(slots), torch.tensor(positions))
    assert_close(spec, hidden, torch.stack(expected))


@torch.no_grad()
def test_mtp_modules_over_a_cache_equal_them_without(setup):
    spec, model, runner = setup
    tokens = tokens_of(spec, 12)
    hidden = prompt(runner, 1, tokens)
    for k in range(2):
        count, split = 11 - k, 6
        chunk = Chunk(1, 0, tokens[:split].tolist())
        full = model.mtp_forward(k, hidden[None, :count], tokens[None, 1 + k :]).hidden[0]
        first = runner.draft(k, NONE, [chunk], hidden[:split], tokens[1 + k : 1 + k + split].tolist())
        short = Short(tokens[split:count].tolist(), [1] * (count - split), list(range(split, count)))
        rest = runner.draft(k, short, [], hidden[split:count], tokens[1 + k + split :].tolist())
        hidden = torch.cat((first, rest))
        assert_close(spec, hidden, full)


@torch.no_grad()
def test_stale_entries_after_the_last_position_are_not_seen(setup):
    spec, _, runner = setup
    tokens = tokens_of(spec, 10)
    prompt(runner, 0, tokens)  # as if the last four had been rejected drafts
    prompt(runner, 1, tokens[:6])
    new = tokens_of(spec, 3)
    hidden = [runner.step(new, torch.full((3,), slot), torch.arange(6, 9)) for slot in (0, 1)]
    assert_close(spec, hidden[0], hidden[1])


def test_rows_of_a_slot_must_be_adjacent(engine_spec, engine_model):
    spec = engine_spec()
    runner = runner_of(engine_model(spec), "together")
    with pytest.raises(AssertionError, match="adjacent"):
        runner.step(tokens_of(spec, 3), torch.tensor([0, 1, 0]), torch.tensor([0, 0, 1]))


def test_a_step_beyond_the_capacity_is_an_error(setup):
    spec, _, runner = setup
    with pytest.raises(ValueError, match=r"position 32 .* capacity >= 33"):
        runner.step(tokens_of(spec, 1), torch.tensor([0]), torch.tensor([32]))


@torch.no_grad()
def test_the_largest_position_is_looked_for_once_a_pass(engine_spec, engine_model, monkeypatch):
    """On a GPU each look waits for it."""
    runner, looks, largest = runner_of(engine_model(engine_spec()), "together"), [], torch.Tensor.max
    monkeypatch.setattr(torch.Tensor, "max", lambda self: looks.append(self) or largest(self))
    prompt(runner, 0, tokens_of(runner.model.spec, 5))
    runner.step(tokens_of(runner.model.spec, 2), torch.tensor([0, 0]), torch.tensor([5, 6]))
    assert len(looks) == 2


def test_no_gradients_are_kept(setup):
    spec, _, runner = setup
    hidden = prompt(runner, 0, tokens_of(spec, 4))
    assert not hidden.requires_grad
    assert not runner.logits(hidden).requires_grad
