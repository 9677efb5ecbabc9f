"""Routing: the published rules, each beside the variant that others got wrong; kernel and reference choose alike."""

import dataclasses
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dovetail.catalog.presets import load_model
from dovetail.model.experts import gate_numba
from dovetail.model.experts.gate import Gate, Routing, balance_loss, bias_update, max_violation, route, select_reference
from dovetail.numerics.formats.errors import normwise_error, tolerance
from dovetail.spec.model import Moe

Draw = Callable[..., Tensor]
V3_MOE = load_model("deepseek-v3").moe
V2_MOE = load_model("deepseek-v2").moe
LITE_MOE = load_model("deepseek-v2-lite").moe
assert V3_MOE
assert V2_MOE
assert LITE_MOE
PUBLISHED = {"V3": V3_MOE, "V2": V2_MOE, "V2-Lite": LITE_MOE}
GATES = {**PUBLISHED, "V3 with softmax": V3_MOE.model_copy(update={"scoring_func": "softmax"})}


def small(**changes: object) -> Moe:
    """8 experts in 4 groups of 2; two groups, two experts."""
    table = {"n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "n_group": 4, "topk_group": 2}
    return Moe.model_validate({**table, **changes})


def chosen(scores: list[float], moe: Moe) -> set[int]:
    biased = torch.tensor([scores])
    ids = select_reference(biased, moe)
    assert torch.equal(gate_numba.select(biased, moe), ids)
    return set(ids[0].tolist())


# ---- Selection ----


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("tokens", [0, 1, 67])
def test_kernel_and_reference_choose_alike(name: str, tokens: int, draw: Draw) -> None:
    moe = PUBLISHED[name]
    scores = draw(tokens, moe.n_routed_experts)
    assert torch.equal(gate_numba.select(scores, moe), select_reference(scores, moe))
    ties = (scores * 2).round() / 2
    assert torch.equal(gate_numba.select(ties, moe), select_reference(ties, moe))
    strided = ties.t().contiguous().t()
    assert torch.equal(gate_numba.select(strided, moe), select_reference(ties, moe))


@pytest.mark.parametrize("name", GATES)
def test_gates(name: str, draw: Draw) -> None:
    moe = GATES[name]
    bias = draw(moe.n_routed_experts, scale=0.1) if moe.has_bias else None
    routing = route(draw(50, moe.n_routed_experts), bias, moe)
    ids = routing.expert_ids.sort(dim=1).values
    assert ids.shape == (50, moe.num_experts_per_tok)
    assert (ids.diff(dim=1) > 0).all()
    groups = ids // (moe.n_routed_experts // moe.n_group)
    assert max(len(set(row)) for row in groups.tolist()) == min(moe.topk_group, moe.n_group)
    assert routing.counts.sum() == 50 * moe.num_experts_per_tok
    assert routing.weights.dtype == routing.scores.dtype == torch.float32


def test_v3_weights_sum_to_the_scaling_factor_and_hold_no_bias(draw: Draw) -> None:
    assert V3_MOE is not None
    logits, bias = draw(50, 256), draw(256, scale=0.3)
    routing = route(logits, bias, V3_MOE)
    bound = tolerance(torch.float32, terms=10)
    assert normwise_error(routing.weights.sum(1), torch.full((50,), 2.5)) < bound
    picked = logits.double().sigmoid().gather(1, routing.expert_ids)
    assert normwise_error(routing.weights, 2.5 * picked / picked.sum(1, keepdim=True)) < bound
    biased = (logits.double().sigmoid() + bias).gather(1, routing.expert_ids)
    assert normwise_error(routing.weights, 2.5 * biased / biased.sum(1, keepdim=True)) > 1e4 * bound
    assert not torch.equal(routing.expert_ids, route(logits, torch.zeros(256), V3_MOE).expert_ids)


def test_v2_weights_are_the_scaled_probabilities(draw: Draw) -> None:
    assert V2_MOE is not None
    logits = draw(20, 160)
    routing = route(logits, None, V2_MOE)
    truth = 16.0 * logits.double().softmax(-1).gather(1, routing.expert_ids)
    assert normwise_error(routing.weights, truth) < tolerance(torch.float32, terms=160)


def test_softmax_in_place_of_sigmoid_changes_the_scores_alone(draw: Draw) -> None:
    """The bias still chooses, by groups' two best, and stays out of the weights, which still sum to the factor."""
    logits, bias, moe = draw(50, 256), draw(256, scale=0.01), GATES["V3 with softmax"]
    routing = route(logits, bias, moe)
    scores = logits.double().softmax(-1)
    picked = scores.gather(1, routing.expert_ids)
    bound = tolerance(torch.float32, terms=256)
    assert normwise_error(routing.scores, scores) < bound
    assert normwise_error(routing.weights, 2.5 * picked / picked.sum(1, keepdim=True)) < bound
    assert torch.equal(routing.expert_ids, select_reference(routing.scores + bias, moe))
    assert not torch.equal(routing.expert_ids, select_reference(routing.scores, moe))


def test_experts_outside_the_kept_groups_stay_out_even_when_scores_are_negative() -> None:
    """Masking with 0.0 instead of -inf lets them in; older public implementations do."""
    scores = [-0.1, -0.2, -0.3, -0.4, -9.0, -9.0, -9.0, -9.0]
    moe = small(num_experts_per_tok=4)
    assert chosen(scores, moe) == {0, 1, 2, 3}
    masked_with_zero = torch.tensor([*scores[:4], 0.0, 0.0, 0.0, 0.0])
    assert set(masked_with_zero.topk(4).indices.tolist()) == {4, 5, 6, 7}


def test_a_group_is_worth_its_two_best_in_v3_and_its_best_in_v2() -> None:
    scores = [0.9, 0.0, 0.5, 0.5, 0.8, 0.05, 0.6, 0.4]
    assert chosen(scores, small()) == {2, 6}  # groups 1 (0.5 + 0.5) and 3 (0.6 + 0.4)
    v2 = {"scoring_func": "softmax", "topk_method": "group_limited_greedy"}
    assert chosen(scores, small(**v2)) == {0, 4}  # groups 0 (0.9) and 2 (0.8)


def test_the_bias_moves_the_choice_of_groups_too() -> None:
    logits, moe = torch.zeros(1, 8), small()
    bias = torch.tensor([0, 0, 0, 0, 0.3, 0, 0, 0.4])
    assert set(route(logits, bias, moe).expert_ids[0].tolist()) == {4, 7}
    assert set(route(logits, None, moe).expert_ids[0].tolist()) == {0, 1}


def test_ties_go_to_the_lower_number() -> None:
    assert chosen([0.5] * 8, small()) == {0, 1}
    assert chosen([0.1, 0.2, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5], small(num_experts_per_tok=3)) == {2, 3, 4}


@pytest.mark.parametrize("poison", [float("nan"), -float("nan"), float("inf"), -float("inf")])
def test_choices_stay_experts_whatever_the_scores(poison: float, draw: Draw) -> None:
    logits = draw(6, 8)
    logits[1, 3] = poison
    logits[2] = poison
    routing = route(logits, torch.zeros(8), small())
    assert ((routing.expert_ids >= 0) & (routing.expert_ids < 8)).all()
    assert routing.counts.sum() == 12
    assert routing.weights[[0, 3, 4, 5]].isfinite().all()
    if math.isnan(poison):
        assert not routing.weights[2].isfinite().any()


def test_large_and_tiny_logits() -> None:
    moe = small(n_group=1, topk_group=1)
    routing = route(torch.tensor([[1e4, -1e4, 50, -50, 0, 0, 0, 0], [-200.0] * 8]), None, moe)
    assert routing.weights.isfinite().all()
    assert set(routing.expert_ids[0].tolist()) == {0, 2}
    assert (routing.weights[1] == 0).all()  # all scores underflow: the 1e-20 keeps 0/0 away


def test_another_dtype_goes_to_the_reference(draw: Draw) -> None:
    logits = draw(5, 8, dtype=torch.bfloat16)
    routing = route(logits, None, small())
    assert torch.equal(routing.expert_ids, select_reference(logits.sigmoid(), small()))


# ---- The router and its gradient ----


def test_router_computes_in_fp32(draw: Draw) -> None:
    gate = Gate(64, small())
    gate.weight.data = draw(8, 64)
    x = draw(10, 64, dtype=torch.bfloat16)
    assert torch.equal(gate(x).scores, (x.float() @ gate.weight.t()).sigmoid())
    assert not torch.equal(gate(x).scores, (x @ gate.weight.bfloat16().t()).float().sigmoid())
    assert Gate(4, small(scoring_func="softmax", topk_method="group_limited_greedy")).e_score_correction_bias is None


@pytest.mark.parametrize("norm_topk_prob", [True, False])
def test_gradient_of_weights_and_scores(norm_topk_prob: bool, draw: Draw) -> None:
    moe = small(norm_topk_prob=norm_topk_prob, routed_scaling_factor=2.5)
    logits = draw(4, 8).double().requires_grad_()

    def run(logits: Tensor) -> tuple[Tensor, Tensor]:
        routing = route(logits, None, moe)
        return routing.weights, routing.scores

    assert torch.autograd.gradcheck(run, logits)


# ---- Balance ----


def routing_of(expert_ids: list[list[int]], scores: Tensor) -> Routing:
    ids = torch.tensor(expert_ids)
    counts = torch.bincount(ids.flatten(), minlength=scores.shape[1])
    return Routing(expert_ids=ids, weights=torch.ones(ids.shape), scores=scores, counts=counts)


def test_balance_loss_is_one_when_balanced_and_the_number_of_experts_over_k_at_worst() -> None:
    moe = small()
    balanced = routing_of([[0, 1], [2, 3], [4, 5], [6, 7]], torch.full((4, 8), 0.3))
    assert math.isclose(balance_loss(balanced, 1, moe), 1.0, rel_tol=tolerance(torch.float32, terms=8))
    worst = routing_of([[0, 1]] * 4, torch.tensor([[1.0, 1.0] + [0.0] * 6] * 4))
    assert math.isclose(balance_loss(worst, 1, moe), 4.0, rel_tol=tolerance(torch.float32, terms=8))


def test_balance_loss_by_the_formula_per_sequence(draw: Draw) -> None:
    """sum_i f_i P_i with f_i = E / (K T) sum_t 1[i chosen], P_i = mean_t s_i / sum_j s_j [V3 eqs 17-20]."""
    moe, batch, length = small(), 3, 5
    routing = route(draw(batch * length, 8), draw(8, scale=0.2), moe)
    total = 0.0
    for b in range(batch):
        rows = slice(b * length, (b + 1) * length)
        scores, ids = routing.scores[rows].double(), routing.expert_ids[rows]
        for i in range(8):
            f = 8 / (2 * length) * float((ids == i).sum())
            total += f * float((scores[:, i] / scores.sum(1)).mean())
    bound = tolerance(torch.float32, terms=batch * length * 8)
    assert math.isclose(balance_loss(routing, batch, moe), total / batch, rel_tol=bound)
    over_the_batch = float(balance_loss(routing, 1, moe))
    assert not math.isclose(over_the_batch, total / batch, rel_tol=100 * bound)  # a loss per batch is another one


def test_balance_loss_pulls_the_scores_of_loaded_experts_down(draw: Draw) -> None:
    logits = draw(16, 8, scale=0.01)
    logits[:, 3] += 2.0
    logits.requires_grad_()
    balance_loss(route(logits, None, small()), 1, small()).backward()
    assert logits.grad is not None
    assert (logits.grad[:, 3] > 0).all()


def test_bias_update_by_sign() -> None:
    bias = torch.tensor([0.5, 0.0, -0.5, 0.0])
    bias_update(bias, torch.tensor([10, 2, 4, 0]), 0.001)  # the mean is 4
    step = torch.tensor(0.001)
    assert torch.equal(bias, torch.stack((0.5 - step, step, torch.tensor(-0.5), step)))
    balanced = torch.zeros(4)
    bias_update(balanced, torch.tensor([7, 7, 7, 7]), 0.001)
    assert torch.equal(balanced, torch.zeros(4))


def test_bias_update_balances_a_skewed_gate(draw: Draw) -> None:
    moe, bias = small(n_group=1, topk_group=1), torch.zeros(8)
    logits = draw(400, 8) + torch.linspace(-1, 1, 8)
    before = max_violation(route(logits, bias, moe).counts)
    for _ in range(300):
        bias_update(bias, route(logits, bias, moe).counts, 0.001)
    assert max_violation(route(logits, bias, moe).counts) < before / 3
    for _ in range(300):
        bias_update(bias, -route(logits, bias, moe).counts, 0.001)  # the wrong sign collapses it
    assert max_violation(route(logits, bias, moe).counts) > before / 3


def test_max_violation() -> None:
    assert max_violation(torch.tensor([4, 4, 4])) == 0
    assert max_violation(torch.tensor([12, 0, 0])) == 2
    assert max_violation(torch.zeros(3)) == -1


def test_routing_is_frozen() -> None:
    routing = routing_of([[0, 1]], torch.ones(1, 8))
    with pytest.raises(dataclasses.FrozenInstanceError):
        routing.counts = torch.zeros(8)  # type: ignore[misc]
