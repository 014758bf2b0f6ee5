"""Packing: round trips and byte counts on ugly sizes, every backend against `reference`, and packed dequantization."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mpsearch import kernels
from mpsearch.errors import InputError
from mpsearch.kernels import reference

BACKENDS = kernels.available_backends()
SIZES = [0, 1, 2, 7, 8, 9, 31, 33, 127, 128, 1009, 4096, 100_003]


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest):
    with kernels.use_backend(request.param):
        yield request.param


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("numel", SIZES)
def test_round_trip(backend: str, bits: int, numel: int) -> None:
    codes = torch.randint(0, 2**bits, (numel,), dtype=torch.uint8)
    packed = kernels.pack(codes, bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (math.ceil(numel * bits / 8),)
    with kernels.use_backend("reference"):
        assert torch.equal(packed, kernels.pack(codes, bits))
    assert torch.equal(kernels.unpack(packed, bits, numel), codes)


@settings(max_examples=50, deadline=None)
@given(bits=st.integers(1, 8), data=st.data())
def test_the_stream_is_little_endian(bits: int, data: st.DataObject) -> None:
    values = data.draw(st.lists(st.integers(0, 2**bits - 1), max_size=70))
    whole = sum(code << (i * bits) for i, code in enumerate(values))
    expected = list(whole.to_bytes(math.ceil(len(values) * bits / 8), "little"))
    codes = torch.tensor(values, dtype=torch.uint8)
    for name in BACKENDS:
        with kernels.use_backend(name):
            packed = kernels.pack(codes, bits)
            assert packed.tolist() == expected
            assert kernels.unpack(packed, bits, len(values)).tolist() == values


def test_any_shape_and_stride(backend: str) -> None:
    codes = torch.randint(0, 8, (6, 5, 7), dtype=torch.uint8).transpose(0, 2)
    assert torch.equal(kernels.unpack(kernels.pack(codes, 3), 3, codes.numel()).reshape(codes.shape), codes)


@pytest.mark.parametrize("at", [0, 40, 99])
def test_codes_that_do_not_fit_are_refused(backend: str, at: int) -> None:
    codes = torch.zeros(100, dtype=torch.uint8)
    codes[at] = 9
    with pytest.raises(InputError, match="largest code is 9, but 3 bits hold 0 to 7"):
        kernels.pack(codes, 3)


@pytest.mark.parametrize("scale_dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", range(1, 9))
def test_dequantize_equals_the_reference(backend: str, bits: int, symmetric: bool, scale_dtype: torch.dtype) -> None:
    torch.manual_seed(bits)
    for (rows, columns), group_size in [
        ((0, 5), 3),
        ((1, 1), 1),
        ((3, 7), 3),
        ((5, 130), 32),
        ((17, 577), 128),
        ((3, 6007), 10_000),
    ]:
        weight = torch.randn(rows, columns)
        how = {"bits": bits, "group_size": group_size, "symmetric": symmetric, "scale_dtype": scale_dtype}
        codes, scales, zero_points = kernels.quantize(weight, **how)
        restored = kernels.dequantize(
            kernels.pack(codes, bits), scales, zero_points, bits=bits, rows=rows, columns=columns, group_size=group_size
        )
        expected = reference.dequantize_codes(codes, scales, zero_points, bits, group_size)
        assert torch.equal(restored.view(torch.int32), expected.view(torch.int32))


def _dequantize(*, packed: torch.Tensor, scales: torch.Tensor, zero_points: torch.Tensor, **how) -> torch.Tensor:
    return kernels.dequantize(packed, scales, zero_points, **how)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            {"packed": torch.zeros(7, dtype=torch.uint8)},
            r"packed codes \(24 of 2 bits\) must be contiguous uint8 \[6\]; got uint8 \[7\]",
        ),
        ({"packed": torch.zeros(6)}, r"packed codes \(24 of 2 bits\) must be contiguous uint8 \[6\]; got float32 \[6\]"),
        ({"scales": torch.zeros(3, 2, dtype=torch.float64)}, "scales must be contiguous float16 or float32 .*; got float64"),
        ({"scales": torch.zeros(3, 3)}, r"scales must be contiguous float16 or float32 \[3, 2\] on cpu; got float32 \[3, 3\]"),
        ({"zero_points": torch.zeros(3, 2)}, "zero_points must be contiguous uint8 .*; got float32"),
        ({"bits": 9}, "bits must be 1 to 8; got 9"),
        ({"group_size": 0}, "group_size must be 1 or more; got 0"),
        ({"rows": -1}, "rows must be 0 or more; got -1"),
    ],
)
def test_bad_arguments_of_dequantize(change: dict, sentence: str) -> None:
    good = {
        "packed": torch.zeros(6, dtype=torch.uint8),
        "scales": torch.zeros(3, 2),
        "zero_points": torch.zeros(3, 2, dtype=torch.uint8),
        "bits": 2,
        "rows": 3,
        "columns": 8,
        "group_size": 4,
    }
    assert _dequantize(**good).shape == (3, 8)
    with pytest.raises(InputError, match=sentence):
        _dequantize(**(good | change))


def test_bad_arguments_of_pack_and_unpack() -> None:
    with pytest.raises(InputError, match=r"codes must be uint8 .*; got int64"):
        kernels.pack(torch.zeros(3, dtype=torch.int64), 4)
    with pytest.raises(InputError, match="bits must be 1 to 8; got 0"):
        kernels.pack(torch.zeros(3, dtype=torch.uint8), 0)
    with pytest.raises(InputError, match="numel must be 0 or more; got -1"):
        kernels.unpack(torch.zeros(3, dtype=torch.uint8), 4, -1)
    with pytest.raises(InputError, match=r"packed codes \(7 of 4 bits\) must be contiguous uint8 \[4\]; got uint8 \[3\]"):
        kernels.unpack(torch.zeros(3, dtype=torch.uint8), 4, 7)


@pytest.mark.slow
def test_indices_go_beyond_31_bits() -> None:
    """2**31 + 9 codes, all but the last one 0: pages of zeros are not really there, so that this takes 270 MB."""
    if kernels.active_backend() == "reference":
        pytest.skip("plain PyTorch makes copies of 2 GB")
    numel = 2**31 + 9
    codes = torch.zeros(numel, dtype=torch.uint8)
    codes[-1] = 1
    packed = kernels.pack(codes, 1)
    assert packed.shape == (2**28 + 2,)
    assert packed[-1] == 1
    assert not packed[:-1].any()
