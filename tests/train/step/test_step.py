"""One optimizer step: the objective, accumulation, clipping, the bias update, and steps that must not happen."""

import copy
import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from dovetail.catalog.precision import load_recipe
from dovetail.model.precision import apply_recipe
from dovetail.model.transformer import Block, Transformer
from dovetail.numerics.formats.errors import network_terms, normwise_error, tolerance
from dovetail.spec.model import ModelSpec
from dovetail.text.corpus import Batch
from dovetail.train.step.ema import Ema
from dovetail.train.step.losses import compute_losses
from dovetail.train.step.optim import AdamW, AdamWConfig
from dovetail.train.step.schedule import Values
from dovetail.train.step.step import Objective, StepResult, microbatches, train_step

SpecFactory = Callable[..., ModelSpec]
ModelFactory = Callable[..., Transformer]
VALUES = Values(learning_rate=1e-3, batch_size=1, gamma=1e-3, mtp_weight=0.3)
OBJECTIVE = Objective()
# Of the clipped gradient, not of the direction: Adam's first step is a sign, which a rounding may turn.
EPS = AdamWConfig(eps=1.0, weight_decay=0.0)


def batch_of(spec: ModelSpec, rows: int, length: int = 16, seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, spec.vocab_size, (rows, length + 1), generator=generator)
    return Batch(tokens=tokens, document_ids=torch.zeros(tokens.shape, dtype=torch.int32))


def bordered(batch: Batch) -> Batch:
    """The same tokens, of documents that get longer from sample to sample."""
    rows, width = batch.tokens.shape
    ids = torch.stack([torch.arange(width) // (2 + 5 * row) for row in range(rows)])
    return Batch(tokens=batch.tokens, document_ids=ids.int())


def split(batch: Batch, parts: int) -> list[Batch]:
    pairs = zip(batch.tokens.chunk(parts), batch.document_ids.chunk(parts), strict=True)
    return [Batch(tokens=tokens, document_ids=ids) for tokens, ids in pairs]


def stepped(
    model: Transformer, batches: list[Batch], values: Values = VALUES, config: AdamWConfig = EPS
) -> tuple[Transformer, StepResult, AdamW]:
    """A copy of the model after one step."""
    model = copy.deepcopy(model)
    optimizer = AdamW(model.named_parameters(), config)
    return model, train_step(model, optimizer, batches, values, OBJECTIVE), optimizer


def biases(model: Transformer) -> dict[str, Tensor]:
    return {name: buffer.clone() for name, buffer in model.named_buffers()}


def bound_of(spec: ModelSpec) -> float:
    return 3 * tolerance(torch.float32, roundings=16, terms=network_terms(spec, 16))


# ---- The objective ----


@pytest.mark.parametrize("depths", [0, 1, 2])
def test_loss_is_the_weighted_sum(depths: int, tiny_spec: SpecFactory, random_model: ModelFactory) -> None:
    """token + lambda / D sum of MTP losses + alpha sum over layers of balance losses [V3 eqs 17-25]."""
    spec = tiny_spec(num_nextn_predict_layers=depths)
    model, batch = random_model(spec), batch_of(spec, 2)
    objective = Objective(balance_alpha=0.01)
    losses = compute_losses(model, batch, separate_documents=False)
    total = losses.token + 0.01 * losses.balance
    if depths:
        total = total + 0.3 / depths * sum(losses.mtp)
    total.backward()
    parameters = dict(model.named_parameters())
    norm = torch.cat([parameter.grad.double().flatten() for parameter in parameters.values()]).norm()
    for parameter in parameters.values():
        parameter.grad = None
    optimizer = AdamW(parameters.items(), EPS)
    result = train_step(model, optimizer, [batch], VALUES, objective)
    bound = bound_of(spec)
    assert math.isclose(result.loss, losses.token.detach(), rel_tol=bound)
    assert math.isclose(result.balance_loss, 0.01 * losses.balance.detach(), rel_tol=bound)
    assert math.isclose(result.grad_norm, norm, rel_tol=bound)
    if depths:
        assert math.isclose(result.mtp_loss, sum(losses.mtp).detach() / depths, rel_tol=bound)
        assert result.mtp_losses == [float(each.detach()) for each in losses.mtp]
    else:
        assert math.isnan(result.mtp_loss)
    assert result.mtp_losses == [each.item() for each in losses.mtp]
    assert result.is_finite
    assert len(result.max_vio) == 2 + depths
    assert all(parameter.grad is None for parameter in parameters.values())


def test_balance_counts_every_layer_and_the_mtp_module(tiny_spec: SpecFactory, random_model: ModelFactory) -> None:
    """Each is near 1 when routing is near balance: three layers, near three."""
    spec = tiny_spec(n_routed_experts=4, n_group=2, num_experts_per_tok=4)  # every expert of both groups
    model = random_model(spec)
    losses = compute_losses(model, batch_of(spec, 2), separate_documents=False)
    assert math.isclose(losses.balance.detach(), 3.0, rel_tol=bound_of(spec))


def test_the_mtp_weight_reaches_the_gradient(tiny_spec: SpecFactory, random_model: ModelFactory) -> None:
    spec = tiny_spec()
    model, batches = random_model(spec), [batch_of(spec, 2)]
    without, result, _ = stepped(model, batches, replace(VALUES, mtp_weight=0.0), AdamWConfig(weight_decay=0.0))
    assert math.isfinite(result.mtp_loss)
    for name, parameter in without.named_parameters():
        moved = not torch.equal(parameter, dict(model.named_parameters())[name])
        # the MTP module's router still has its balance loss; nothing reaches what comes after it
        after_router = ("mtp.0.norm", "mtp.0.block.mlp.experts", "mtp.0.block.mlp.shared_experts")
        assert moved == (not name.startswith(after_router)), name
    with_it, _, _ = stepped(model, batches)
    assert not torch.equal(with_it.mtp[0].norm.weight, model.mtp[0].norm.weight)
    assert not torch.equal(with_it.lm_head.weight, without.lm_head.weight)


# ---- Accumulation and clipping ----


@pytest.mark.parametrize("parts", [2, 4])
def test_microbatches_are_one_big_batch(parts: int, tiny_spec: SpecFactory, random_model: ModelFactory) -> None:
    spec = tiny_spec()
    model, batch = random_model(spec), batch_of(spec, 4)
    whole, one, _ = stepped(model, [batch])
    pieces, several, _ = stepped(model, split(batch, parts))
    for field in ("loss", "mtp_loss", "balance_loss", "grad_norm"):
        assert math.isclose(getattr(one, field), getattr(several, field), rel_tol=bound_of(spec)), field
    assert one.max_vio == several.max_vio
    before = dict(model.named_parameters())
    for (name, ours), right in zip(pieces.named_parameters(), whole.parameters(), strict=True):
        moved = (right - before[name]).abs().max()
        # a step of this size on a weight of that one: both round
        room = moved * bound_of(spec) + 4 * before[name].abs().max() * tolerance(torch.float32)
        assert moved > 0, name
        assert (ours - right).abs().max() <= room, name
    ours, theirs = biases(pieces), biases(whole)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_targets_count_the_same_in_every_microbatch(
    size: int, tiny_spec: SpecFactory, random_model: ModelFactory
) -> None:
    """Where documents are apart, samples have different numbers of targets; a mean of means is another loss."""
    spec = tiny_spec(num_nextn_predict_layers=2)
    model, batch = random_model(spec), bordered(batch_of(spec, 4))
    objective = replace(OBJECTIVE, separate_documents=True)
    whole, parts = copy.deepcopy(model), copy.deepcopy(model)
    optimizers = [AdamW(each.named_parameters(), EPS) for each in (whole, parts)]
    one = train_step(whole, optimizers[0], [batch], VALUES, objective)
    several = train_step(parts, optimizers[1], microbatches(batch, size), VALUES, objective)
    for field in ("loss", "mtp_loss", "balance_loss", "grad_norm"):
        assert math.isclose(getattr(one, field), getattr(several, field), rel_tol=bound_of(spec)), field
    for name, slot in optimizers[0].slots.items():
        other = optimizers[1].slots[name].moment1
        assert normwise_error(other, slot.moment1.double()) < tolerance(torch.bfloat16), name
    with torch.no_grad():
        losses = [compute_losses(model, each, separate_documents=True) for each in microbatches(batch, size)]
    of_means = sum(float(each.token) for each in losses) / len(losses)
    assert size == 4 or not math.isclose(one.loss, of_means, rel_tol=100 * bound_of(spec))


def test_microbatches_add_up_in_fp32(tiny_spec: SpecFactory, random_model: ModelFactory) -> None:
    """Eight times an eighth of a BF16 gradient is that gradient, bit for bit; a BF16 sum would round 3/8 of it."""
    spec = tiny_spec()
    model, batch = random_model(spec, torch.bfloat16), batch_of(spec, 2)
    config = AdamWConfig(eps=1.0, max_grad_norm=1e9)
    _, _, one = stepped(model, [batch], config=config)
    _, _, many = stepped(model, [batch] * 8, config=config)
    low = [name for name, slot in one.slots.items() if slot.parameter.dtype == torch.bfloat16]
    assert len(low) > 20
    for name in low:
        assert torch.equal(one.slots[name].moment1, many.slots[name].moment1), name


def test_clipping_scales_the_whole_gradient(tiny_spec: SpecFactory, random_model: ModelFactory) -> None:
    spec = tiny_spec()
    model, batches = random_model(spec), [batch_of(spec, 2)]
    _free, result, free_optimizer = stepped(model, batches, config=AdamWConfig(eps=1.0, max_grad_norm=1e9))
    limit = result.grad_norm / 7
    _clipped, again, optimizer = stepped(model, batches, config=AdamWConfig(eps=1.0, max_grad_norm=limit))
    assert again.grad_norm == result.grad_norm  # reported before clipping
    for name, slot in optimizer.slots.items():
        expected = free_optimizer.slots[name].moment1.float() / 7
        bound = tolerance(torch.bfloat16, roundings=2)
        assert normwise_error(slot.moment1, expected) < bound, name


# ---- The bias ----


def test_the_bias_moves_once_per_step_by_the_sign_of_the_whole_batch(
    tiny_spec: SpecFactory, random_model: ModelFactory
) -> None:
    """Loads are added over the microbatches first; a step per microbatch would move it further."""
    spec = tiny_spec(num_nextn_predict_layers=2)
    model, batches = random_model(spec), split(batch_of(spec, 4), 4)
    before = biases(model)
    with torch.no_grad():
        counts = [compute_losses(model, batch, separate_documents=False).counts for batch in batches]
    after, _, _ = stepped(model, batches)
    assert len(before) == 4  # two layers and both MTP modules
    per_microbatch = []
    for index, (name, bias) in enumerate(biases(after).items()):
        load = torch.stack([each[index] for each in counts]).sum(0).float()
        assert torch.equal(bias, before[name] + VALUES.gamma * torch.sign(load.mean() - load)), name
        signs = [torch.sign(each[index].float().mean() - each[index]) for each in counts]
        per_microbatch.append(torch.equal(bias, before[name] + VALUES.gamma * sum(signs)))
        assert (bias != before[name]).any()
    assert not any(per_microbatch)


def test_a_gamma_of_zero_leaves_the_bias(tiny_spec: SpecFactory, random_model: ModelFactory) -> None:
    spec = tiny_spec()
    model = random_model(spec)
    after, _, _ = stepped(model, [batch_of(spec, 2)], replace(VALUES, gamma=0.0))
    ours, before = biases(after), biases(model)
    assert all(torch.equal(ours[name], before[name]) for name in before)


def test_evaluation_and_forward_passes_leave_the_bias(tiny_spec: SpecFactory, random_model: ModelFactory) -> None:
    spec = tiny_spec()
    model, batch = random_model(spec), batch_of(spec, 2)
    before = biases(model)
    for _ in range(3):
        compute_losses(model, batch, separate_documents=False).token.backward()
        with torch.no_grad():
            model(batch.tokens)
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())


def test_recomputed_blocks_count_their_loads_once(
    tiny_spec: SpecFactory, random_model: ModelFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = tiny_spec()
    model, batches = random_model(spec), split(batch_of(spec, 4), 2)
    plain, expected, _ = stepped(model, batches)
    forward = Block.forward
    calls = []

    def recomputed(self: Block, *arguments: object) -> Tensor:
        def run(*inner: object) -> Tensor:
            calls.append(1)
            return forward(self, *inner)

        return checkpoint(run, *arguments, use_reentrant=False)

    monkeypatch.setattr(Block, "forward", recomputed)
    again, result, _ = stepped(model, batches)
    assert len(calls) == 2 * 4 * 2  # blocks, microbatches, and each twice
    assert result == expected
    pairs = zip(again.state_dict().items(), plain.state_dict().values(), strict=True)
    assert all(torch.equal(ours, theirs) for (_, ours), theirs in pairs)


def test_v2_gates_have_no_bias_to_move(tiny_spec: SpecFactory, random_model: ModelFactory) -> None:
    spec = tiny_spec(scoring_func="softmax", topk_method="group_limited_greedy", norm_topk_prob=False)
    model = random_model(spec)
    after, result, _ = stepped(model, [batch_of(spec, 2)])
    assert result.is_finite
    assert not biases(after)
    assert len(result.max_vio) == 3


def test_a_model_of_dense_layers_has_nothing_to_balance(tiny_spec: SpecFactory, random_model: ModelFactory) -> None:
    """Experts in the spec, but every layer dense and no MTP module."""
    spec = tiny_spec(first_k_dense_replace=3, num_nextn_predict_layers=None)
    _, result, _ = stepped(random_model(spec), [batch_of(spec, 2)])
    assert result.is_finite
    assert (result.balance_loss, result.max_vio) == (0.0, [])


# ---- Steps that must not happen ----


def everything(model: Transformer, optimizer: AdamW, ema: Ema) -> dict[str, Tensor]:
    ema.finish()
    state = {f"model {name}": tensor for name, tensor in model.state_dict().items()}
    for part, tensors in optimizer.state().items():
        state |= {f"{part} {name}": tensor for name, tensor in tensors.items()}
    state |= {f"average {name}": tensor for name, tensor in ema.average.items()}
    state["updates"], state["averaged"] = torch.tensor(optimizer.updates), ema.num_updates
    return {name: tensor.clone() for name, tensor in state.items()}


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "name",
    [
        "embed_tokens.weight",
        "layers.1.self_attn.q_b_proj.weight",
        "layers.1.mlp.gate.weight",
        "layers.2.mlp.experts.down_proj",
        "norm.weight",
        "lm_head.weight",
        "mtp.0.eh_proj.weight",
        "mtp.0.block.mlp.gate.weight",
    ],
)
def test_a_step_that_is_not_finite_changes_nothing(
    name: str, poison: float, tiny_spec: SpecFactory, random_model: ModelFactory
) -> None:
    spec = tiny_spec()
    model, batch = random_model(spec), batch_of(spec, 2)
    optimizer = AdamW(model.named_parameters(), AdamWConfig())
    ema = Ema(optimizer.state()["master"], decay=0.9, in_background=False)
    train_step(model, optimizer, [batch], VALUES, OBJECTIVE, ema)
    weight = dict(model.named_parameters())[name]
    with torch.no_grad():
        if weight.dim() == 3:
            weight[:, 0, 0] = poison  # of every expert
        elif name == "embed_tokens.weight":
            weight[batch.tokens[1, 5], 0] = poison
        else:
            weight.flatten()[0] = poison
    before = everything(model, optimizer, ema)
    result = train_step(model, optimizer, [batch, batch], VALUES, OBJECTIVE, ema)
    assert not result.is_finite
    after = everything(model, optimizer, ema)
    assert before.keys() == after.keys()
    for key in before:
        assert torch.equal(before[key].nan_to_num(7.0), after[key].nan_to_num(7.0)), key
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["layers.1.self_attn.o_proj.weight", "layers.2.mlp.experts.down_proj"])
def test_a_quantised_step_that_is_not_finite_changes_nothing(
    name: str, poison: float, tiny_spec: SpecFactory, random_model: ModelFactory
) -> None:
    """No scale makes a finite number of it: not in the forward pass, and not in the backward pass alone."""
    spec = tiny_spec()
    model, batch = random_model(spec, dtype=torch.bfloat16), batch_of(spec, 2)
    apply_recipe(model, load_recipe("deepseek-v3"))
    optimizer = AdamW(model.named_parameters(), AdamWConfig())
    weight = dict(model.named_parameters())[name]

    def skips() -> bool:
        before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
        result = train_step(model, optimizer, [batch], VALUES, OBJECTIVE)
        same = [torch.equal(before[key].nan_to_num(7), each.nan_to_num(7)) for key, each in model.state_dict().items()]
        assert all(same) != result.is_finite
        return not result.is_finite

    assert not skips()
    hook = model.norm.register_full_backward_hook(lambda module, grads, _: (grads[0] * poison,))
    assert skips()
    hook.remove()
    assert not skips()
    with torch.no_grad():
        weight.view(-1, *weight.shape[-2:])[:, 0, 0] = poison
    assert skips()


def test_training_goes_on_after_a_skipped_step(tiny_spec: SpecFactory, random_model: ModelFactory) -> None:
    spec = tiny_spec()
    skipping, straight = random_model(spec), random_model(spec)
    optimizers = [AdamW(model.named_parameters(), AdamWConfig()) for model in (skipping, straight)]
    batch = batch_of(spec, 2)
    with torch.no_grad():
        kept = skipping.norm.weight[0].clone()
        skipping.norm.weight[0] = float("nan")
    assert not train_step(skipping, optimizers[0], [batch], VALUES, OBJECTIVE).is_finite
    with torch.no_grad():
        skipping.norm.weight[0] = kept
    for model, optimizer in zip((skipping, straight), optimizers, strict=True):
        assert train_step(model, optimizer, [batch], VALUES, OBJECTIVE).is_finite
    pairs = zip(skipping.state_dict().values(), straight.state_dict().values(), strict=True)
    assert all(torch.equal(ours, theirs) for ours, theirs in pairs)


# ---- Learning ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_batch_is_learned_by_heart(dtype: torch.dtype, tiny_spec: SpecFactory, random_model: ModelFactory) -> None:
    spec = tiny_spec()
    model, batch = random_model(spec, dtype), batch_of(spec, 2)
    optimizer = AdamW(model.named_parameters(), AdamWConfig(weight_decay=0.0))
    results = [train_step(model, optimizer, [batch], replace(VALUES, learning_rate=1e-2), OBJECTIVE) for _ in range(40)]
    assert results[-1].loss < results[0].loss / 5
    assert results[-1].mtp_loss < results[0].mtp_loss / 5


def test_a_step_goes_down_the_gradient(tiny_spec: SpecFactory, random_model: ModelFactory) -> None:
    """Against a plain AdamW of torch on the whole objective written with torch alone."""
    spec = tiny_spec(num_nextn_predict_layers=0)
    model, batch = random_model(spec), batch_of(spec, 2)
    config = AdamWConfig(eps=1.0, weight_decay=0.1, max_grad_norm=1.0)
    ours, _, _ = stepped(model, [batch], replace(VALUES, gamma=0.0), config)
    theirs = copy.deepcopy(model)
    logits = theirs.logits(theirs(batch.tokens[:, :-1].contiguous()).hidden)
    balance = compute_losses(theirs, batch, separate_documents=False).balance
    (F.cross_entropy(logits.flatten(0, 1), batch.tokens[:, 1:].flatten()) + 1e-4 * balance).backward()
    parameters = list(theirs.parameters())
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in parameters if p.dim() == 1], "weight_decay": 0.0},
    ]
    torch.optim.AdamW(groups, lr=VALUES.learning_rate, betas=(0.9, 0.95), eps=1.0).step()
    for (name, mine), right in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        moved = (right - dict(model.named_parameters())[name]).abs().max()
        room = moved * bound_of(spec) + 4 * right.abs().max() * tolerance(torch.float32)
        assert (mine - right).abs().max() <= room, name
