"""AdamW: the kernel against the reference, the reference against torch, and what BF16 does to either."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
import torch
from torch import Tensor

from dovetail.numerics.formats.errors import elementwise_error, normwise_error, tolerance, unit_roundoff
from dovetail.parallel.weights.pieces import Piece
from dovetail.train.run import checkpoint
from dovetail.train.step.optim import AdamW, AdamWConfig, Coefficients, Slot, sums_of_squares, update, update_reference

Draw = Callable[..., Tensor]
CONFIG = AdamWConfig()
FACTORS = Coefficients(rate=1e-3, corrected_rate=1e-3, inverse_correction2=3.0, grad_scale=0.7)


def slot_of(shape: tuple[int, ...], dtype: torch.dtype, draw: Draw, moments: torch.dtype = torch.bfloat16) -> Slot:
    master = draw(*shape)
    parameter = master if dtype == torch.float32 else master.to(dtype)
    moment1, moment2 = draw(*shape, dtype=moments), draw(*shape, dtype=moments).abs()
    return Slot(parameter=parameter, master=master, moment1=moment1, moment2=moment2, weight_decay=0.1)


def copied(slot: Slot, dtype: torch.dtype | None = None) -> Slot:
    """Its own tensors; moments and all in `dtype` where given."""

    def copy(tensor: Tensor) -> Tensor:
        return tensor.detach().to(dtype or tensor.dtype, copy=True)

    master = copy(slot.master)
    is_own = slot.parameter is slot.master
    parameter = master if is_own else copy(slot.parameter)
    moments = {"moment1": copy(slot.moment1), "moment2": copy(slot.moment2)}
    return replace(slot, master=master, parameter=parameter, **moments)


def assert_close_to_reference(ours: Slot, before: Slot, gradient: Tensor, config: AdamWConfig) -> None:
    """Each part within its own format's rounding of the update in FP64... but for `.float()` within it."""
    theirs = copied(before)
    update_reference(theirs, gradient, config, FACTORS)
    step = (theirs.master - before.master).abs().max() + before.master.abs().max()
    assert (ours.master - theirs.master).abs().max() <= step * tolerance(torch.float32, roundings=6)
    # moments stored in BF16 may be rounded the other way where the unrounded ones stand at a tie; those in FP32 differ
    # by two roundings on either side
    for mine, right in ((ours.moment1, theirs.moment1), (ours.moment2, theirs.moment2)):
        assert mine.dtype == before.moment1.dtype
        roundings = 2 if mine.dtype == torch.bfloat16 else 4
        scale = right.float().abs() + gradient.float().abs().max()
        assert ((mine.float() - right.float()).abs() <= scale * roundings * unit_roundoff(mine.dtype)).all()
        assert mine.dtype == torch.float32 or (mine != right).float().mean() <= 0.01
    assert torch.equal(ours.parameter, ours.master.to(ours.parameter.dtype))


@pytest.mark.parametrize("moments", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(0,), (1,), (3, 5), (4095,), (4097,), (3, 64, 65)], ids=str)
def test_kernel_is_the_reference(
    shape: tuple[int, ...], dtype: torch.dtype, grad_dtype: torch.dtype, moments: torch.dtype, draw: Draw
) -> None:
    ours, gradient = slot_of(shape, dtype, draw, moments), draw(*shape, dtype=grad_dtype)
    if not gradient.numel():
        update([ours], [gradient], CONFIG, FACTORS)
        return
    before = copied(ours)
    update([ours], [gradient], CONFIG, FACTORS)
    assert_close_to_reference(ours, before, gradient, CONFIG)


def test_all_together_are_each_alone(draw: Draw) -> None:
    """Of any formats and sizes in any order, to the last bit."""
    kinds = [(torch.bfloat16, torch.bfloat16), (torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)]
    shapes = [(3, 5), (0,), (4096,), (4097,), (1,), (70, 130)]
    together = [slot_of(shape, dtype, draw, moments) for shape in shapes for dtype, moments in kinds]
    together = [replace(slot, weight_decay=0.1 * (i % 3)) for i, slot in enumerate(together)]
    alone = [copied(slot) for slot in together]
    gradients = [draw(*slot.master.shape, dtype=(torch.bfloat16, torch.float32)[i % 2]) for i, slot in enumerate(alone)]
    update(together, gradients, CONFIG, FACTORS)
    for slot, other, gradient in zip(together, alone, gradients, strict=True):
        update([other], [gradient], CONFIG, FACTORS)
        assert all(torch.equal(a, b) for a, b in zip(slot.written, other.written, strict=True))
    separate = [float(sums_of_squares([gradient])[0]) for gradient in gradients]
    assert [float(each) for each in sums_of_squares(gradients)] == separate


def test_a_beta_near_one_keeps_its_complement(draw: Draw) -> None:
    """1 - 0.999 taken in FP32 is wrong by 5e-5; it must be taken in FP64."""
    config = AdamWConfig(beta1=0.0, beta2=0.9999)
    slot = slot_of((64,), torch.float32, draw)
    slot.moment2.zero_()
    gradient = draw(64)
    before = slot.master.clone()
    factors = replace(FACTORS, rate=0.0, corrected_rate=1.0, inverse_correction2=1.0, grad_scale=1.0)
    update([slot], [gradient], config, factors)
    # (1 - b1) g / sqrt((1 - b2) g^2) = 100 sign(g)
    step = (before - slot.master).double() * gradient.sign()
    assert abs(step - 100 / (1 + 1e-8 / (0.01 * gradient.double().abs()))).max() < 100 * tolerance(torch.float32)
    complement = 1 - torch.tensor(0.9999)
    assert abs(float(complement) / 1e-4 - 1) > 100 * tolerance(torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strides_do_not_matter(dtype: torch.dtype, draw: Draw) -> None:
    slot, gradient = slot_of((6, 10), dtype, draw), draw(6, 10)
    same = copied(slot)
    transposed = {
        part: getattr(slot, part).t().contiguous().t() for part in ("parameter", "master", "moment1", "moment2")
    }
    if dtype == torch.float32:
        transposed["parameter"] = transposed["master"]
    strided = replace(slot, **transposed)
    before = copied(same)
    update([strided], [gradient.t().contiguous().t()], CONFIG, FACTORS)
    assert_close_to_reference(strided, before, gradient, CONFIG)
    update([same], [gradient.t().contiguous().t()], CONFIG, FACTORS)
    assert_close_to_reference(same, before, gradient, CONFIG)


@pytest.mark.parametrize("size", [0.0, 1e-42, 1e-25, 1e-10, 1e10, 1e18])
def test_sizes_from_subnormal_to_large(size: float, draw: Draw) -> None:
    slot, gradient = slot_of((257,), torch.float32, draw), draw(257, scale=size)
    for moment in (slot.moment1, slot.moment2):
        moment.zero_()
    before = copied(slot)
    update([slot], [gradient], CONFIG, FACTORS)
    theirs = copied(before)
    update_reference(theirs, gradient, CONFIG, FACTORS)
    assert slot.master.isfinite().all()
    assert normwise_error(slot.master, theirs.master) < tolerance(torch.float32, roundings=6)


def trajectories(
    draw: Draw, config: AdamWConfig, steps: int, moments: Literal["bfloat16", "float32"]
) -> tuple[Tensor, Tensor, list[float]]:
    """Our AdamW and torch's on the same gradients with a changing learning rate."""
    ours = draw(12, 9)
    theirs = ours.clone().requires_grad_()
    optimizer = AdamW([("weight", ours)], config, moments)
    betas = (config.beta1, config.beta2)
    right = torch.optim.AdamW([theirs], betas=betas, eps=config.eps, weight_decay=config.weight_decay)
    rates = [1e-2 * (1 + math.sin(step)) for step in range(steps)]
    for rate in rates:
        gradient = draw(12, 9)
        theirs.grad = gradient.clone()
        right.param_groups[0]["lr"] = rate
        right.step()
        optimizer.step({"weight": gradient}, rate, grad_scale=1.0)
    return ours, theirs.detach(), rates


@pytest.mark.parametrize("config", [CONFIG, AdamWConfig(beta2=0.999, weight_decay=0.0, eps=1e-3)], ids=str)
def test_the_formula_is_that_of_torch(config: AdamWConfig, draw: Draw) -> None:
    """With FP32 moments, over 30 steps."""
    ours, theirs, rates = trajectories(draw, config, 30, "float32")
    # each step adds roundings of the weight and of the update, which is at most 10 learning rates
    bound = (theirs.abs().max() + 10 * max(rates)) * tolerance(torch.float32, roundings=30, terms=30)
    assert (ours - theirs).abs().max() < bound


def test_bf16_moments_stay_near(draw: Draw) -> None:
    """Each is rounded once per step, and forgets within 1 / (1 - beta) steps."""
    ours, theirs, rates = trajectories(draw, CONFIG, 30, "bfloat16")
    error = (ours - theirs).abs().max()
    assert 0 < error < sum(rates) * tolerance(torch.bfloat16, roundings=1 / (1 - CONFIG.beta1) + 1)


def test_norms_and_other_vectors_do_not_decay(draw: Draw) -> None:
    optimizer = AdamW([("norm", draw(8)), ("matrix", draw(8, 8)), ("experts", draw(2, 8, 8))], CONFIG)
    assert {name: slot.weight_decay for name, slot in optimizer.slots.items()} == {
        "norm": 0.0,
        "matrix": 0.1,
        "experts": 0.1,
    }
    before = {name: slot.master.clone() for name, slot in optimizer.slots.items()}
    optimizer.step({name: torch.zeros_like(slot.master) for name, slot in optimizer.slots.items()}, 0.5, 1.0)
    assert torch.equal(optimizer.slots["norm"].master, before["norm"])
    for name in ("matrix", "experts"):
        expected = before[name].double() * (1 - 0.5 * 0.1)
        assert elementwise_error(optimizer.slots[name].master, expected) < tolerance(torch.float32)


def test_masters_are_fp32_and_fp32_parameters_their_own(draw: Draw) -> None:
    low, wide = draw(4, 4, dtype=torch.bfloat16), draw(4)
    optimizer = AdamW([("low", low), ("wide", wide)], CONFIG)
    slots = optimizer.slots
    assert slots["low"].master.dtype == torch.float32
    assert slots["wide"].master.data_ptr() == wide.data_ptr()
    assert all(slot.moment1.dtype == slot.moment2.dtype == torch.bfloat16 for slot in slots.values())
    slots["low"].master.add_(1.0)
    optimizer.refresh_parameters()
    assert torch.equal(low, slots["low"].master.to(torch.bfloat16))
    assert optimizer.state()["master"]["low"] is slots["low"].master


# ---- Pieces ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pieces_are_updated_as_the_whole_is(dtype: torch.dtype, draw: Draw) -> None:
    """Bit for bit, wherever the cuts are; a piece without elements is one too."""
    whole = draw(70, 130, dtype=dtype)
    cut, ends = whole.clone(), [0, 1, 4099, 4099, 9100]
    flats = [cut.view(-1)[first:last] for first, last in zip(ends, ends[1:], strict=False)]
    pieces = [Piece(flat=flat, start=start, shape=(70, 130)) for flat, start in zip(flats, ends, strict=False)]
    one, many = AdamW([("0", whole)], CONFIG), AdamW(((str(i), piece) for i, piece in enumerate(pieces)), CONFIG)
    for _ in range(3):
        gradient = draw(70, 130)
        one.step({"0": gradient}, 0.1, 0.7)
        gradients = gradient.flatten().split([len(flat) for flat in flats])
        many.step({str(i): each for i, each in enumerate(gradients)}, 0.1, 0.7)
    assert torch.equal(cut, whole)
    for part, tensors in many.state().items():
        for start, piece in zip(ends, tensors.values(), strict=False):
            assert isinstance(piece, Piece)
            assert (piece.start, piece.shape) == (start, (70, 130))
        found = torch.cat([piece.flat for piece in tensors.values() if isinstance(piece, Piece)])
        assert torch.equal(found, one.state()[part]["0"].flatten())


def test_a_piece_decays_as_its_whole_does(draw: Draw) -> None:
    flat = draw(8)
    shapes = {"norm": (8,), "matrix": (4, 4)}
    optimizer = AdamW([(name, Piece(flat=flat, start=0, shape=shape)) for name, shape in shapes.items()], CONFIG)
    assert {name: slot.weight_decay for name, slot in optimizer.slots.items()} == {"norm": 0.0, "matrix": 0.1}
    assert optimizer.slots["matrix"].master.data_ptr() == flat.data_ptr()  # FP32: its own master


def test_moments_are_saved_in_their_dtype_and_not_taken_for_another(tmp_path: Path, draw: Draw) -> None:
    wide, narrow = (AdamW([("weight", torch.zeros(4, 4))], CONFIG, dtype) for dtype in ("float32", "bfloat16"))
    wide.step({"weight": draw(4, 4)}, 1e-3, 1.0)
    saver = checkpoint.Checkpointer(tmp_path, 1)
    saver.save(1, {"optimizer": wide.state()}, {})
    saver.wait()
    saver.close()
    (newest,) = (path for path in [checkpoint.latest(tmp_path)] if path is not None)
    with pytest.raises(ValueError, match=r"moment1.* float32 \[4, 4\] in the checkpoint and bfloat16 \[4, 4\]"):
        checkpoint.load_checkpoint(newest, {"optimizer": narrow.state()})
    again = AdamW([("weight", torch.zeros(4, 4))], CONFIG, "float32")
    checkpoint.load_checkpoint(newest, {"optimizer": again.state()})
    for part, saved in wide.state().items():
        assert torch.equal(again.state()[part]["weight"], saved["weight"])


def plateau(has_master: bool) -> float:
    """Distance from the optimum at 1 after 400 steps of up to 2e-3 from 1.5."""
    weight = torch.full((64,), 1.5, dtype=torch.bfloat16)
    optimizer = AdamW([("weight", weight)], AdamWConfig(weight_decay=0.0))
    if not has_master:
        optimizer.slots["weight"] = replace(optimizer.slots["weight"], master=weight)
    for _ in range(400):
        optimizer.step({"weight": (weight.float() - 1.0).to(torch.bfloat16)}, 2e-3, 1.0)
    return float((weight.float() - 1.0).abs().mean())


def test_bf16_weights_without_a_master_stand_still() -> None:
    """A step of 2e-3 is less than half the spacing of BF16 above 1, 2^-7: it is rounded away."""
    assert plateau(has_master=True) < 0.02
    assert plateau(has_master=False) == 0.5


# ---- The norm ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sizes", [[0], [1], [4096, 4097, 3], [7, 0, 90_001]], ids=str)
def test_norm_over_all_gradients(sizes: list[int], dtype: torch.dtype, draw: Draw) -> None:
    gradients = {str(i): draw(size, dtype=dtype) for i, size in enumerate(sizes)}
    optimizer = AdamW([(name, torch.zeros_like(gradient)) for name, gradient in gradients.items()], CONFIG)
    truth = torch.cat([gradient.double() for gradient in gradients.values()]).norm()
    assert math.isclose(optimizer.grad_norm(gradients), truth, rel_tol=tolerance(torch.float32, terms=4096))
    wide = {"0": torch.stack((gradients["0"], gradients["0"]))[:, ::1].t()}
    one = AdamW([("0", torch.zeros(wide["0"].shape))], CONFIG)
    assert math.isclose(one.grad_norm(wide), wide["0"].double().norm(), rel_tol=tolerance(torch.float32, terms=4096))


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
def test_norm_shows_what_is_not_finite(poison: float, draw: Draw) -> None:
    gradients = {"a": draw(5000), "b": draw(3, 4)}
    optimizer = AdamW([(name, torch.zeros_like(gradient)) for name, gradient in gradients.items()], CONFIG)
    assert math.isfinite(optimizer.grad_norm(gradients))
    gradients["a"][4999] = poison
    assert not math.isfinite(optimizer.grad_norm(gradients))


@pytest.mark.parametrize("name", ["beta1", "beta2"])
def test_moments_that_would_stand_still_are_refused(name: str, draw: Draw) -> None:
    """Half the spacing of BF16 numbers is 2^-8; with no more than that left to move by, a moment never falls."""
    for beta, is_refused in ((0.95, False), (1 - 2**-8, False), (1 - 2**-8 + 1e-6, True), (0.999, True)):
        config = AdamWConfig(**{name: beta})
        AdamW([("weight", draw(4))], config, "float32")
        if is_refused:
            said = rf"optimizer.{name} = {beta:g}: .*0.0039.*bf16-fp32-moments.*0.996"
            with pytest.raises(ValueError, match=said):
                AdamW([("weight", draw(4))], config)
        else:
            AdamW([("weight", draw(4))], config)


@pytest.mark.parametrize(("beta2", "falls"), [(1 - 2**-8, True), (0.999, False)])
def test_a_second_moment_falls_where_it_is_allowed(beta2: float, falls: bool, draw: Draw) -> None:
    """Without gradients, from every significand that BF16 has."""
    slot = slot_of((128,), torch.float32, draw, torch.bfloat16)
    slot.moment2.copy_(1 + torch.arange(128) / 128)
    before = slot.moment2.clone()
    update([slot], [torch.zeros(128)], AdamWConfig(beta2=beta2), FACTORS)
    assert (slot.moment2 < before).all() if falls else torch.equal(slot.moment2, before)
