"""The gradients are LSQ's, and what comes out is what the scheme stores."""

import math

import pytest
import torch

from mpsearch.quantizers.round_to_nearest import RoundToNearest
from mpsearch.schemes.input import IntegerInput
from mpsearch.schemes.integer import Integer
from mpsearch.schemes.levels import LEVELS
from mpsearch.training.fake_quantize import (
    IntegerGrid,
    LevelGrid,
    column_groups,
    fake_quantize,
    fake_quantize_input,
    scaled_steps,
)


def case(bits, columns=10, group_size=4, zero=None):
    torch.manual_seed(bits)
    matrix = torch.randn(3, columns)
    groups = column_groups(columns, group_size)
    scales = 0.2 + torch.rand(3, int(groups[-1]) + 1)
    zeros = torch.full_like(scales, (2 ** (bits - 1) if bits > 1 else 0.5) if zero is None else zero)
    return [t.requires_grad_() for t in (matrix, scales, zeros)], groups


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_gradients_are_those_of_lsq(bits):
    (matrix, scales, zeros), groups = case(bits)
    weighs = torch.randn(3, 10)
    (fake_quantize(matrix, scales, zeros, groups, IntegerGrid(bits)) * weighs).sum().backward()
    values, steps, offsets = (tensor.detach() for tensor in (matrix, scales, zeros))
    gain = 1 / math.sqrt(10 / 3 * max(2 ** (bits - 1) - 1, 1))
    of_scale, of_zero = torch.zeros_like(scales), torch.zeros_like(scales)
    for i in range(3):
        for j in range(10):
            g = int(groups[j])
            s, z = float(steps[i, g]), float(offsets[i, g])
            raw = round(float(values[i, j] / steps[i, g] + offsets[i, g]))
            inside = 0 <= raw <= 2**bits - 1
            level = min(max(raw, 0), 2**bits - 1) - z
            assert float(matrix.grad[i, j]) == pytest.approx(float(weighs[i, j]) if inside else 0.0)
            of_scale[i, g] += gain * float(weighs[i, j]) * (level - float(values[i, j]) / s if inside else level)
            of_zero[i, g] += 0.0 if inside else -gain * s * float(weighs[i, j])
    torch.testing.assert_close(scales.grad, of_scale)
    torch.testing.assert_close(zeros.grad, of_zero)


def test_clipped_weights_move_with_the_scale_as_finite_differences_say():
    matrix, groups = torch.full((1, 8), 9.0), column_groups(8, 8)
    scales, zeros = torch.tensor([[0.5]], requires_grad=True), torch.tensor([[4.0]])
    fake_quantize(matrix, scales, zeros, groups, IntegerGrid(3)).sum().backward()
    up, down = (fake_quantize(matrix, torch.tensor([[s]]), zeros, groups, IntegerGrid(3)).sum() for s in (0.501, 0.499))
    assert float(scales.grad) == pytest.approx(float(up - down) / 0.002 / math.sqrt(8 * 3), rel=1e-3)


@pytest.mark.parametrize("scheme", [Integer(1), Integer(3), Integer(4, group_size=4, symmetric=False)])
def test_codes_and_values_are_those_that_the_scheme_stores(scheme):
    torch.manual_seed(0)
    weight = torch.randn(5, 12)
    stored = RoundToNearest().quantize(weight, scheme)
    codes, scales, zero_points, size = scheme.unpacked(stored.tensors, (5, 12))
    middle = 2 ** (scheme.bits - 1) if scheme.bits > 1 else 0.5
    zeros = torch.full_like(scales.float(), middle) if zero_points is None else zero_points.float()
    found = fake_quantize(stored.dequantize(), scales.float(), zeros, column_groups(12, size), IntegerGrid(scheme.bits))
    assert torch.equal(found, stored.dequantize())
    steps = scaled_steps(stored.dequantize(), scales.float(), zeros, column_groups(12, size))
    assert torch.equal(IntegerGrid(scheme.bits).nearest(steps), codes.float())


def test_a_scale_of_zero_gives_zero_and_no_gradient():
    matrix, scales = torch.ones(1, 4, requires_grad=True), torch.zeros(1, 1, requires_grad=True)
    out = fake_quantize(matrix, scales, torch.full((1, 1), 2.0), column_groups(4, 4), IntegerGrid(2))
    out.sum().backward()
    assert not out.any()
    assert not scales.grad.any()


@pytest.mark.parametrize("how", [IntegerInput(4, "static"), IntegerInput(3, "static", symmetric=False)])
def test_a_static_input_s_scale_has_the_gradient_of_lsq(how):
    torch.manual_seed(0)
    x, weighs = torch.randn(2, 3, 4, requires_grad=True), torch.randn(2, 3, 4)
    scale, zero = torch.tensor([0.3], requires_grad=True), torch.tensor([0.0 if how.symmetric else 2.0])
    found = fake_quantize_input(x, scale, zero, how, 2)
    assert torch.equal(found, how.fake_quantize(x.detach(), 2, {"input_scale": scale, "input_zero_point": zero}))
    (found * weighs).sum().backward()
    least, most = (-7, 7) if how.symmetric else (-2, 5)
    of_scale = 0.0
    for value, g, got in zip(x.detach().flatten(), weighs.flatten(), x.grad.flatten(), strict=True):
        steps = float(value) / 0.3
        held = least <= steps <= most
        level = round(min(max(steps, least), most))
        assert float(got) == pytest.approx(float(g) if held else 0.0)
        of_scale += float(g) * (level - (steps if held else 0.0))
    assert float(scale.grad) == pytest.approx(of_scale / math.sqrt(12 * 7), rel=1e-4)


@pytest.mark.parametrize("name", ["nf4", "ternary", "e2m1"])
def test_a_table_passes_gradients_where_it_does_not_saturate(name):
    torch.manual_seed(0)
    table = LevelGrid(LEVELS[name])
    matrix, scales = torch.randn(3, 8, requires_grad=True), (0.5 / table.largest * torch.ones(3, 1)).requires_grad_()
    found = fake_quantize(matrix, scales, torch.zeros(3, 1), column_groups(8, 8), table)
    levels = LEVELS[name].values[LEVELS[name].values.isfinite()]
    steps = matrix.detach() / scales.detach()
    nearest = levels[(steps[..., None] - levels).abs().argmin(-1)]
    torch.testing.assert_close(found.detach(), nearest * scales.detach())
    found.sum().backward()
    held = steps.abs() <= table.largest
    assert torch.equal(matrix.grad, held.float())
    moved = torch.where(held, nearest - steps, nearest).sum(1, keepdim=True) / math.sqrt(8 * table.largest)
    torch.testing.assert_close(scales.grad, moved, rtol=1e-4, atol=1e-5)


def test_the_next_values_of_a_grid():
    below, above = LevelGrid(LEVELS["e2m1"]).gaps(torch.tensor([-6.0, -0.5, 0.0, 1.5, 6.0]))
    assert below.tolist() == [2.0, 0.5, 0.5, 0.5, 2.0]
    assert above.tolist() == [2.0, 0.5, 0.5, 0.5, 2.0]
    assert [gap.tolist() for gap in IntegerGrid(2).gaps(torch.tensor([0.0, 3.0]))] == [[1.0, 1.0]] * 2
