"""Every backend equals `reference` bit for bit: codes, scales and zero points."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from mpsearch import kernels
from mpsearch.errors import InputError
from mpsearch.kernels import reference

COMPILED = kernels.available_backends()[1:]
SHAPES = [(0, 5), (3, 0), (1, 1), (3, 7), (5, 130), (17, 577)]
GROUP_SIZES = [1, 3, 32, 128, 10_000]
RATIOS = torch.tensor([1.0, 0.95, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.85, 0.3, 1.05])
SIGNED_RATIOS = torch.cat([RATIOS, -RATIOS])


def same_bits(a: Tensor | None, b: Tensor | None) -> bool:
    """Equal in shape, dtype and every bit, the sign of zero included."""
    if a is None or b is None:
        return a is b
    views = {torch.float32: torch.int32, torch.float16: torch.int16, torch.uint8: torch.uint8}
    return a.dtype == b.dtype and torch.equal(a.view(views[a.dtype]), b.view(views[b.dtype]))


def assert_equals_reference(weight: Tensor, **how) -> None:
    with kernels.use_backend("reference"):
        expected = kernels.quantize(weight, **how)
    for backend in COMPILED:
        with kernels.use_backend(backend):
            for name, got, wanted in zip(
                ("codes", "scales", "zero_points"), kernels.quantize(weight, **how), expected, strict=True
            ):
                assert same_bits(got, wanted), (backend, name)


def dequantized(weight: Tensor, **how) -> Tensor:
    return reference.dequantize_codes(*kernels.quantize(weight, **how), how["bits"], how["group_size"])


def some_importance(kind: str, rows: int, columns: int) -> Tensor | None:
    k = {"none": 0, "shared": 1, "per_row": max(rows, 1)}[kind]
    return torch.rand(k, columns) * (torch.rand(k, columns) > 0.2) if k else None


@pytest.mark.parametrize("scale_dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.thin(4)
def test_min_max(bits: int, symmetric: bool, scale_dtype: torch.dtype) -> None:
    torch.manual_seed(bits)
    for (rows, columns), group_size in itertools.product(SHAPES, GROUP_SIZES):
        weight = torch.randn(rows, columns) * torch.rand(rows, 1) * 3 + 0.1 * bits
        assert_equals_reference(weight, bits=bits, group_size=group_size, symmetric=symmetric, scale_dtype=scale_dtype)


@pytest.mark.parametrize("kind", ["none", "shared", "per_row"])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.thin(4)
def test_clip_search(bits: int, symmetric: bool, kind: str) -> None:
    torch.manual_seed(bits)
    ratios = SIGNED_RATIOS if symmetric else RATIOS
    cases = [((0, 5), 3), ((3, 7), 3), ((5, 130), 32), ((17, 277), 128), ((2, 277), 10_000), ((3, 41), 1)]
    for ((rows, columns), group_size), scale_dtype in itertools.product(cases, [torch.float16, torch.float32]):
        weight = torch.randn(rows, columns) ** 3
        assert_equals_reference(
            weight,
            bits=bits,
            group_size=group_size,
            symmetric=symmetric,
            scale_dtype=scale_dtype,
            ratios=ratios[: 1 + (columns + bits) % len(ratios)],
            importance=some_importance(kind, rows, columns),
        )


@pytest.mark.parametrize("magnitude", [1e-42, 1e-30, 1e-8, 3e-7, 1e-5, 1.0, 1e18, 1e30])
@pytest.mark.parametrize("symmetric", [False, True])
def test_magnitudes(magnitude: float, symmetric: bool) -> None:
    """Float16-subnormal and vanishing scales, and scales whose square leaves float32."""
    torch.manual_seed(0)
    weight = torch.randn(4, 131) * magnitude
    for bits, ratios, scale_dtype in itertools.product([1, 4, 8], [None, RATIOS], [torch.float16, torch.float32]):
        if scale_dtype == torch.float32 or magnitude <= 1:
            how = {"bits": bits, "group_size": 32, "symmetric": symmetric, "scale_dtype": scale_dtype}
            assert_equals_reference(weight, ratios=ratios, **how)


@pytest.mark.parametrize("ratios", [None, SIGNED_RATIOS])
def test_zeros_stay_zeros(ratios: Tensor | None) -> None:
    weight = torch.zeros(3, 70)
    weight[1] = 1.0
    weight[2, :32] = -1.0
    weight[0, 5] = -0.0
    for bits, symmetric in itertools.product(range(1, 9), [False, True]):
        how = {"bits": bits, "group_size": 32, "symmetric": symmetric}
        assert_equals_reference(weight, ratios=ratios.abs() if ratios is not None and not symmetric else ratios, **how)
        assert (dequantized(weight, **how)[0] == 0).all()


def test_ties_round_to_even() -> None:
    """Weights half-way between codes, and halves in the scale's last bit."""
    weight = torch.arange(-16, 17).float()[None] / 2  # steps of 1 at 4 bits asymmetric are 16 / 15, at 5 bits symmetric 8 / 15
    weight = torch.cat([weight, torch.full((1, 33), 2.0)], 1)
    for bits, symmetric in itertools.product(range(1, 9), [False, True]):
        assert_equals_reference(weight, bits=bits, group_size=33, symmetric=symmetric)
    exact = torch.tensor([[0.0, 0.5, 1.5, 2.5, 6.5, 7.5, 14.5, 15.0]])  # scale 1, zero point 0
    codes, scales, zero_points = kernels.quantize(exact, bits=4, group_size=8, symmetric=False)
    assert codes.tolist() == [[0, 0, 2, 2, 6, 8, 14, 15]]
    assert scales.tolist() == [[1.0]]
    assert zero_points is not None
    assert zero_points.tolist() == [[0]]
    between = torch.tensor([[0.0, 15 * (1 + 2**-11)], [0.0, 15 * (1 + 3 * 2**-11)]])  # half-way between float16 numbers
    assert kernels.quantize(between, bits=4, group_size=2, symmetric=False)[1].tolist() == [[1.0], [1 + 2 * 2**-10]]


def test_the_first_of_equal_ratios_wins() -> None:
    """All-zero importance makes every error 0; ratios of equal effect are planted before and behind the best."""
    torch.manual_seed(0)
    weight = torch.randn(3, 64)
    how = {"bits": 4, "group_size": 64, "symmetric": False}
    nothing_counts = torch.zeros(1, 64)
    for first in (0.5, 1.0):
        ratios = torch.tensor([first, 0.9, 0.8, 0.7, 0.6, 0.55, 0.45, 0.4, 0.3, 0.2])
        chosen = kernels.quantize(weight, ratios=ratios, importance=nothing_counts, **how)[1]
        assert torch.equal(chosen, kernels.quantize(weight, ratios=ratios[:1], **how)[1])
    level = torch.tensor([[-7.0, 7.0] * 8])  # exact at ratio 1, and mirrored at ratio -1
    for ratios in (torch.tensor([0.9, 1.0, -1.0]), torch.tensor([0.9, -1.0, 1.0])):
        scale = kernels.quantize(level, bits=4, group_size=16, symmetric=True, ratios=ratios)[1]
        assert scale.item() == ratios[1].item()
        assert_equals_reference(level, bits=4, group_size=16, symmetric=True, ratios=ratios)


def test_a_negative_ratio_turns_the_extra_level_round() -> None:
    weight = torch.tensor([[-1.0, 0.5, 1.9, 8.0]])
    ratios = torch.tensor([1.0, -7 / 8])
    codes, scales, _ = kernels.quantize(weight, bits=4, group_size=4, symmetric=True, ratios=ratios)
    assert scales.item() == -1.0
    assert codes.tolist() == [[9, 8, 6, 0]]


def test_the_search_never_chooses_a_scale_of_zero() -> None:
    """Ratios that round the scale to 0 lose the group, though codes and positions agree there."""
    weight = torch.linspace(-1, 1, 64)[None] * 1.2e-6
    how = {"bits": 4, "group_size": 64, "symmetric": False}
    scale = kernels.quantize(weight, ratios=torch.tensor([1.0, 0.9, 0.1]), **how)[1]
    assert scale.item() > 0
    assert_equals_reference(weight, ratios=torch.tensor([0.1, 1.0, 0.9]), **how)


def test_a_search_is_never_worse_than_min_max() -> None:
    torch.manual_seed(0)
    weight = torch.randn(8, 256) ** 3
    for bits, symmetric in itertools.product(range(1, 9), [False, True]):
        how = {"bits": bits, "group_size": 64, "symmetric": symmetric}
        plain = (dequantized(weight, **how) - weight).square().sum()
        searched = (dequantized(weight, ratios=RATIOS, **how) - weight).square().sum()
        assert searched <= plain * (1 + 1e-6)


@pytest.mark.parametrize("backend", kernels.available_backends())
@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"bits": 0}, "bits must be 1 to 8; got 0"),
        ({"group_size": 0}, "group_size must be 1 or more; got 0"),
        ({"scale_dtype": torch.bfloat16}, "scale_dtype must be torch.float16 or torch.float32; got torch.bfloat16"),
        ({"weight": torch.ones(4, 6).double()}, r"weight must be contiguous float32 \[rows, columns\]; got float64 \[4, 6\]"),
        ({"weight": torch.ones(6, 4).T}, r"weight must be contiguous float32 .*; got not contiguous float32 \[4, 6\]"),
        ({"weight": torch.ones(24)}, r"weight must be contiguous float32 \[rows, columns\]; got float32 \[24\]"),
        ({"weight": torch.tensor([[1.0, torch.nan, torch.inf]])}, "2 of 3 weights are NaN or infinite"),
        ({"weight": torch.full((2, 50), -torch.inf)}, "100 of 100 weights are NaN or infinite"),
        ({"weight": torch.full((2, 50), 2e6)}, "weights up to 2e\\+06 and 4 bits .* float16 .65504.*scale_dtype=float32"),
        ({"weight": torch.tensor([[3e38, -3e38]]), "scale_dtype": torch.float32}, "exceeds the largest float32"),
        ({"ratios": torch.tensor([])}, "ratios must be one or more; got none"),
        ({"ratios": torch.ones(1, 2)}, r"ratios must be contiguous float32 \[n\] on cpu; got float32 \[1, 2\]"),
        ({"ratios": torch.tensor([1.0, 0.0])}, r"ratios must be finite and positive \(.*\); got 0.0"),
        ({"ratios": torch.tensor([1.0, -1.0])}, r"ratios must be finite and positive \(.*\); got -1.0"),
        ({"ratios": torch.tensor([torch.nan])}, r"ratios must be finite and positive \(.*\); got nan"),
        ({"ratios": torch.tensor([1.0]).double()}, "ratios must be contiguous float32 .*; got float64"),
        (
            {"importance": torch.ones(3, 6)},
            r"importance must be \[k, 6\] with 4 rows a multiple of k; got \[3, 6\]",
        ),
        ({"importance": torch.ones(1, 5)}, r"importance must be contiguous float32 \[k, 6\] on cpu; got float32 \[1, 5\]"),
        ({"importance": -torch.ones(1, 6)}, "importance must be finite and not negative; got -1 to -1"),
        ({"importance": torch.full((1, 6), torch.nan)}, "importance must be finite and not negative; got nan to nan"),
        ({"importance": torch.full((1, 6), torch.inf)}, "importance must be finite and not negative; got inf to inf"),
    ],
)
def test_bad_arguments(backend: str, change: dict, sentence: str) -> None:
    good = {"weight": torch.ones(4, 6), "bits": 4, "group_size": 4, "symmetric": False}
    with kernels.use_backend(backend), pytest.raises(InputError, match=sentence):
        kernels.quantize(**(good | change))
