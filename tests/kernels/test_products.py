"""Products with packed weights: `linear_a8` equals the specification bit for bit, `linear` lies within its stated bound."""

from __future__ import annotations

import itertools
import re

import pytest
import torch
from torch import Tensor

from mpsearch import kernels
from mpsearch.errors import InputError
from mpsearch.kernels import PackedWeight, reference
from mpsearch.schemes.input import IntegerInput

COMPILED = kernels.available_backends()[1:]
SHAPES = [(1, 1), (5, 130), (33, 257), (48, 384)]
GROUP_SIZES = [8, 32, 60, 64, 128, 10_000]
BATCHES = [1, 3, 4, 17, 64]


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def some_weight(
    rows: int, columns: int, bits: int, group_size: int, symmetric: bool, scale_dtype: torch.dtype = torch.float16
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Codes over their whole range, scales of both signs and many sizes, zero points."""
    n_groups = -(-columns // group_size)
    codes = torch.randint(0, 2**bits, (rows, columns), dtype=torch.uint8)
    scales = (torch.randn(rows, n_groups) * 10 ** torch.empty(rows, n_groups).uniform_(-4, 0)).to(scale_dtype)
    zero_points = None if symmetric else torch.randint(0, 2**bits, (rows, n_groups), dtype=torch.uint8)
    return codes, scales, zero_points


def some_packed(
    rows: int, columns: int, bits: int, group_size: int, symmetric: bool = False, scale_dtype: torch.dtype = torch.float16
) -> PackedWeight:
    return kernels.pack_weight(
        *some_weight(rows, columns, bits, group_size, symmetric, scale_dtype), bits=bits, group_size=group_size
    )


def largest_error(y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> float:
    """The error of `linear`, as a share of its bound, where that is largest."""
    bias = torch.zeros(len(weight)) if bias is None else bias
    exact = x.double() @ weight.double().T + bias.double()
    bound = (weight.shape[1] + 8) * 2.0**-24 * (x.double().abs() @ weight.double().abs().T + bias.double().abs())
    return float(((y.double() - exact).abs() / bound.clamp(min=1e-300)).nan_to_num(0).max())


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.thin(3)
def test_backends_agree(bits: int, symmetric: bool) -> None:
    torch.manual_seed(bits)
    for (rows, columns), group_size in itertools.product(SHAPES, GROUP_SIZES):
        scale_dtype = torch.float32 if group_size == 60 else torch.float16
        codes, scales, zero_points = some_weight(rows, columns, bits, min(group_size, columns), symmetric, scale_dtype)
        packed = kernels.pack_weight(codes, scales, zero_points, bits=bits, group_size=group_size)
        weight = reference.dequantize_codes(codes, scales, zero_points, bits, min(group_size, columns))
        x = torch.randn(max(BATCHES), columns) * torch.rand(max(BATCHES), 1) + 0.1
        with kernels.use_backend("reference"):
            expected = kernels.linear_a8(x, packed)
            assert largest_error(kernels.linear(x, packed), x, weight) <= 1
        for backend in COMPILED:
            with kernels.use_backend(backend):
                for n in BATCHES:
                    where = (backend, rows, columns, group_size, n)
                    assert torch.equal(kernels.linear_a8(x[:n], packed), expected[:n]), where
                    assert largest_error(kernels.linear(x[:n], packed), x[:n], weight) <= 1, where


@pytest.mark.parametrize("bits", [1, 4, 8])
def test_bias(bits: int) -> None:
    """Added last: of the size of the product, vanishing beside it, and dwarfing it; on rows with and without padding."""
    torch.manual_seed(bits)
    for rows, columns in SHAPES:
        codes, scales, zero_points = some_weight(rows, columns, bits, min(32, columns), False)
        packed = kernels.pack_weight(codes, scales, zero_points, bits=bits, group_size=32)
        weight = reference.dequantize_codes(codes, scales, zero_points, bits, min(32, columns))
        x = torch.randn(max(BATCHES), columns)
        bias = torch.randn(rows) * 10.0 ** (torch.arange(rows) % 9 - 4)
        strided = bias.repeat_interleave(2)[::2]
        with kernels.use_backend("reference"):
            expected = kernels.linear_a8(x, packed, bias)
            assert torch.equal(expected, kernels.linear_a8(x, packed) + bias)
        for backend in kernels.available_backends():
            with kernels.use_backend(backend):
                for n in BATCHES:
                    where = (backend, rows, columns, n)
                    assert torch.equal(kernels.linear_a8(x[:n], packed, strided), expected[:n]), where
                    assert largest_error(kernels.linear(x[:n], packed, strided), x[:n], weight, bias) <= 1, where
    nothing = kernels.pack_weight(torch.empty(3, 0, dtype=torch.uint8), torch.ones(3, 0), None, bits=bits, group_size=8)
    for product in (kernels.linear, kernels.linear_a8):
        assert torch.equal(product(torch.ones(2, 0), nothing, torch.arange(3.0)), torch.arange(3.0).expand(2, 3))


def test_input_scale() -> None:
    """The given step for all tokens: values beyond 127 of them saturate, others round to the nearest, half to even."""
    identity = torch.eye(8, dtype=torch.uint8)
    packed = kernels.pack_weight(identity, torch.ones(8, 1), torch.zeros(8, 1, dtype=torch.uint8), bits=4, group_size=8)
    steps = torch.tensor([[0.5, 1.5, 2.49, -0.51, 126.5, 127.6, 1e30, -1e30], [torch.inf, *[1.0] * 7]])
    y = kernels.linear_a8(steps * 0.25, packed, None, 0.25)
    assert torch.equal(y[0], 0.25 * torch.tensor([0.0, 2, 2, -1, 126, 127, 127, -127]))
    assert y[1].isnan().all()

    torch.manual_seed(0)
    x, bias = torch.randn(max(BATCHES), 130), torch.randn(37)
    x[2, 5] = torch.nan
    packed = some_packed(37, 130, 3, 32)
    for input_scale in (0.01, 0.1, 1e-38 * 1.2, 3e38):
        with kernels.use_backend("reference"):
            expected = kernels.linear_a8(x, packed, bias, input_scale).nan_to_num(7.0)
        for backend, n in itertools.product(COMPILED, BATCHES):
            with kernels.use_backend(backend):
                y = kernels.linear_a8(x[:n], packed, bias, input_scale).nan_to_num(7.0)
                assert torch.equal(y, expected[:n]), (backend, n, input_scale)


# How an input is quantized: each width, symmetric or not, found for each token or given.
INPUTS: list[dict] = [
    {"largest_code": 2 ** (bits - symmetric) - 1, "symmetric": symmetric, **given}
    for bits, symmetric in [*itertools.product(range(2, 8), (True, False)), (8, True)]
    for given in ({}, {"input_scale": 0.3, "zero_point": bits - 2 if not symmetric else 0})
]
INPUTS += [{"largest_code": 254, "symmetric": False, "input_scale": 0.02, "zero_point": zero} for zero in (0, 100, 254)]


def test_inputs_of_few_bits() -> None:
    """Codes are those of `IntegerInput`, which the search simulates, to the bit."""
    torch.manual_seed(0)
    packed = kernels.pack_weight(
        torch.eye(70, dtype=torch.uint8), torch.ones(70, 1), torch.zeros(70, 1).byte(), bits=4, group_size=70
    )
    x = torch.randn(9, 70) + torch.linspace(-3, 3, 9)[:, None]
    x[1].abs_()
    x[2] = -x[2].abs()
    x[3, 3], x[4, 69], x[5, 0] = torch.nan, torch.inf, -torch.inf
    x[6] = torch.arange(70) / 7 - 0.5
    x[7] = 1e-39
    for how, backend in itertools.product(INPUTS, kernels.available_backends()):
        static = "input_scale" in how
        bits = how["largest_code"].bit_length() + how["symmetric"]
        of = IntegerInput(bits, "static" if static else "token", how["symmetric"])
        stored = {"input_scale": torch.tensor([how["input_scale"]])} if static else {}
        if static and not how["symmetric"]:
            stored["input_zero_point"] = torch.tensor([how["zero_point"]], dtype=torch.uint8)
        with kernels.use_backend(backend):
            y = kernels.linear_a8(x, packed, **how)
        codes, scale = of.split(x, 1, stored)
        shift = how["zero_point"] - 127 if bits == 8 and not how["symmetric"] else 0
        assert torch.equal(y.nan_to_num(7.0), ((codes + shift) * scale).nan_to_num(7.0)), (how, backend)
        assert torch.equal(y.isnan().all(1), torch.arange(9) // 3 == 1), (how, backend)


@pytest.mark.parametrize("bits", range(1, 9))
def test_extreme_codes_do_not_overflow(bits: int) -> None:
    """All codes and inputs at their largest, over more columns than int16 or float32 hold exactly."""
    columns = 32_768
    codes = torch.full((17, columns), 2**bits - 1, dtype=torch.uint8)
    codes[1:3, ::2] = 0
    scales, zero_points = torch.ones(17, 1, dtype=torch.float16), torch.zeros(17, 1, dtype=torch.uint8)
    zero_points[2:] = 2**bits - 1
    packed = kernels.pack_weight(codes, scales, zero_points, bits=bits, group_size=columns)
    x = torch.ones(9, columns)
    x[1::2] *= -1
    assert kernels.linear_a8(x[:1], packed)[0, 0] == columns * (2**bits - 1)
    with kernels.use_backend("reference"):
        expected = kernels.linear_a8(x, packed)
    for backend, n in itertools.product(COMPILED, (1, 2, 9)):
        with kernels.use_backend(backend):
            assert torch.equal(kernels.linear_a8(x[:n], packed), expected[:n]), (backend, n)


@pytest.mark.parametrize("scale_dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.thin(3)
def test_layout(bits: int, scale_dtype: torch.dtype) -> None:
    """Packed and unpacked again, for shapes with and without padding; where whole, `bits` bits a weight and a header a record."""
    torch.manual_seed(bits)
    for (rows, columns), group_size, symmetric in itertools.product(SHAPES, (8, 33, 64), (False, True)):
        group_size = min(group_size, columns)
        codes, scales, zero_points = some_weight(rows, columns, bits, group_size, symmetric, scale_dtype)
        data = reference.pack_weight(codes, scales, zero_points, bits, group_size)
        for backend in COMPILED:
            with kernels.use_backend(backend):
                packed = kernels.pack_weight(codes, scales, zero_points, bits=bits, group_size=group_size)
                assert torch.equal(packed.data, data), (backend, rows, columns, group_size, symmetric)
        got = reference.unpack_weight(data, rows, columns, bits, group_size, scale_dtype)
        assert torch.equal(got[0], codes)
        assert torch.equal(got[1], scales)
        implied = 1 if bits == 1 else 2**bits
        assert torch.equal(got[2], torch.full_like(got[2], implied) if zero_points is None else 2 * zero_points.short())
    header = 64 if scale_dtype == torch.float16 else 128
    assert some_packed(32, 256, bits, 64, scale_dtype=scale_dtype).nbytes == 32 * 256 * bits // 8 + 2 * 4 * header


@pytest.mark.parametrize("scale_dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("bits", range(1, 9))
def test_unpacking_gives_back_what_was_packed(bits: int, scale_dtype: torch.dtype) -> None:
    torch.manual_seed(bits)
    backends = itertools.cycle(kernels.available_backends())
    for (rows, columns), group_size, symmetric in itertools.product([*SHAPES, (0, 5), (3, 0)], (8, 33, 64), (False, True)):
        weight = some_weight(rows, columns, bits, min(group_size, max(columns, 1)), symmetric, scale_dtype)
        with kernels.use_backend(next(backends)):
            got = kernels.unpack_weight(kernels.pack_weight(*weight, bits=bits, group_size=group_size))
        for field, expected in zip(got, weight, strict=True):
            assert (field is None) == (expected is None)
            if field is not None:
                assert field.dtype == expected.dtype
                assert torch.equal(field, expected)
                assert field.is_contiguous()


def test_quantized_weights_multiply_as_they_dequantize() -> None:
    """From `quantize` to `linear`: the product is that of the dequantized weight."""
    torch.manual_seed(0)
    weight, x = torch.randn(100, 300), torch.randn(6, 300)
    for bits, symmetric in itertools.product(range(1, 9), (False, True)):
        how = {"bits": bits, "group_size": 64, "symmetric": symmetric}
        quantized = kernels.quantize(weight, **how)
        packed = kernels.pack_weight(*quantized, bits=bits, group_size=64)
        dequantized = reference.dequantize_codes(*quantized, bits, 64)
        assert largest_error(kernels.linear(x, packed), x, dequantized) <= 1
        x8, scale = reference.quantize_tokens(x, None, 127, -1)
        torch.testing.assert_close(kernels.linear_a8(x, packed), scale * x8 @ dequantized.T, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("backend", kernels.available_backends())
def test_input_values(backend: str) -> None:
    """Zeros, vanishing and huge tokens, ties, and values that are not finite, which spoil their own token only."""
    torch.manual_seed(0)
    packed = some_packed(20, 70, 4, 32)
    x = torch.randn(9, 70)
    x[0] = 0
    x[1] *= 1e-39
    x[2] *= 1e37
    x[3] = torch.arange(70) - 35 + 0.5
    x[3, 0] = 127
    x[4, 3], x[5, 69], x[6, 0] = torch.nan, torch.inf, -torch.inf
    for how in INPUTS:
        with kernels.use_backend("reference"):
            expected = kernels.linear_a8(x, packed, **how)
        with kernels.use_backend(backend):
            y = kernels.linear_a8(x, packed, **how)
        assert torch.equal(y.isnan().all(1), torch.tensor([False] * 4 + [True] * 3 + [False] * 2)), how
        assert torch.equal(y.nan_to_num(7.0), expected.nan_to_num(7.0)), how
        assert (y[:2] == 0).all() or how["largest_code"] > 127
    with kernels.use_backend(backend):
        y = kernels.linear_a8(x, packed)
        for token in range(9):
            assert torch.equal(kernels.linear_a8(x[token : token + 1], packed).nan_to_num(7.0)[0], y[token].nan_to_num(7.0))
        spoilt = kernels.linear(x, packed).isfinite().all(1)
        assert torch.equal(spoilt, torch.tensor([True] * 4 + [False] * 3 + [True] * 2))


@pytest.mark.parametrize("product", [kernels.linear, kernels.linear_a8])
@pytest.mark.parametrize("backend", kernels.available_backends())
def test_shapes_and_strides(backend: str, product) -> None:
    torch.manual_seed(0)
    packed = some_packed(21, 64, 3, 32)
    x = torch.randn(2, 3, 64)
    with kernels.use_backend(backend):
        y = product(x, packed)
        assert y.shape == (2, 3, 21)
        assert torch.equal(product(x[0, 0], packed), product(x[0, :1], packed)[0])
        apart = torch.randn(64, 6).T  # a transposed view
        apart.copy_(x.reshape(6, 64))
        assert not apart.is_contiguous()
        assert torch.equal(product(apart, packed), y.reshape(6, 21))
        assert product(torch.empty(0, 64), packed).shape == (0, 21)
        assert product(torch.empty(2, 0, 64), packed).shape == (2, 0, 21)
        for rows, columns in ((0, 5), (3, 0)):
            nothing = kernels.pack_weight(
                torch.empty(rows, columns, dtype=torch.uint8), torch.ones(rows, int(columns > 0)), None, bits=4, group_size=8
            )
            assert torch.equal(product(torch.ones(2, columns), nothing), torch.zeros(2, rows))


@pytest.mark.parametrize("product", [kernels.linear, kernels.linear_a8])
@pytest.mark.parametrize("backend", COMPILED)
def test_thread_counts_agree(backend: str, product, threads) -> None:
    """Also over more tokens than are multiplied in one pass."""
    torch.manual_seed(0)
    packed = some_packed(500, 300, 5, 64)
    x = torch.randn(300, 300)
    with kernels.use_backend(backend):
        results = []
        for n in (1, 2, 5):
            threads(n)
            results.append([product(x[:tokens], packed) for tokens in (1, 5, 300)])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"bits": 9}, "bits must be 1 to 8; got 9"),
        ({"group_size": 0}, "group_size must be 1 or more; got 0"),
        ({"codes": torch.zeros(4, 6)}, r"codes must be uint8 \[rows, columns\]; got float32 \[4, 6\]"),
        ({"codes": torch.zeros(24, dtype=torch.uint8)}, r"codes must be uint8 \[rows, columns\]; got uint8 \[24\]"),
        ({"codes": torch.full((4, 6), 16, dtype=torch.uint8)}, "The largest code is 16, but 4 bits hold 0 to 15"),
        ({"scales": torch.ones(4, 2).double()}, "scales must be float16 or float32 .*; got float64"),
        ({"scales": torch.ones(4, 1)}, r"scales must be float16 or float32 \[4, 2\] on cpu; got float32 \[4, 1\]"),
        ({"scales": torch.tensor([[1.0, torch.nan]] * 4)}, "4 of 8 scales are NaN or infinite"),
        ({"scales": torch.tensor([[1.0, 1.0]] * 3 + [[-torch.inf, 1.0]]).half()}, "1 of 8 scales are NaN or infinite"),
        ({"zero_points": torch.zeros(4, 2)}, "zero_points must be uint8 .*; got float32"),
        ({"zero_points": torch.zeros(4, 3, dtype=torch.uint8)}, r"zero_points must be uint8 \[4, 2\] on cpu; got uint8 \[4, 3\]"),
        (
            {"codes": torch.zeros(1, 40_000, dtype=torch.uint8), "scales": torch.ones(1, 1), "group_size": 40_000},
            "group_size must be at most 32768 for products; got 40000",
        ),
    ],
)
@pytest.mark.parametrize("backend", [kernels.available_backends()[0], kernels.available_backends()[-1]])
def test_packing_refuses(backend: str, change: dict, sentence: str) -> None:
    arguments = {"codes": torch.zeros(4, 6, dtype=torch.uint8), "scales": torch.ones(4, 2), "zero_points": None}
    with kernels.use_backend(backend), pytest.raises(InputError, match=sentence):
        kernels.pack_weight(**{**arguments, "bits": 4, "group_size": 3, **change})


@pytest.mark.parametrize("product", [kernels.linear, kernels.linear_a8])
@pytest.mark.parametrize(
    ("x", "sentence"),
    [
        (torch.ones(2, 63), r"x must be float32 \[..., 64\], the columns of the weight; got float32 \[2, 63\]"),
        (torch.ones(2, 64).double(), r"x must be float32 .*; got float64 \[2, 64\]"),
        (torch.tensor(1.0), r"x must be float32 .*; got float32 \[\]"),
        (torch.ones(2, 64, device="meta"), "x and the packed weight must be on one device; got meta and cpu"),
    ],
)
def test_products_refuse(product, x: Tensor, sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        product(x, some_packed(3, 64, 4, 32))


@pytest.mark.parametrize("product", [kernels.linear, kernels.linear_a8])
@pytest.mark.parametrize(
    ("bias", "sentence"),
    [
        (torch.ones(4), r"bias must be float32 \[3\] on cpu; got float32 \[4\] on cpu"),
        (torch.ones(3).double(), r"bias must be float32 \[3\] on cpu; got float64 \[3\]"),
        (torch.ones(1, 3), r"bias must be float32 \[3\] on cpu; got float32 \[1, 3\]"),
        (torch.ones(3, device="meta"), r"bias must be float32 \[3\] on cpu; got float32 \[3\] on meta"),
    ],
)
def test_a_bias_is_refused(product, bias: Tensor, sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        product(torch.ones(2, 64), some_packed(3, 64, 4, 32), bias)


@pytest.mark.parametrize("input_scale", [0.0, -1.0, 1e-39, float("nan"), float("inf"), 1e39])
def test_an_input_scale_is_refused(input_scale: float) -> None:
    with pytest.raises(InputError, match=re.escape(f"input_scale must be 1.17549e-38 to 3.40282e+38; got {input_scale}")):
        kernels.linear_a8(torch.ones(2, 64), some_packed(3, 64, 4, 32), None, input_scale)


@pytest.mark.parametrize(("largest_code", "zero_point"), [(0, 0), (255, 0), (15, 16)])
def test_codes_of_an_input_are_refused(largest_code: int, zero_point: int) -> None:
    with pytest.raises(InputError, match=f"largest_code must be 1 to 254, .*; got {largest_code} and {zero_point}"):
        kernels.linear_a8(torch.ones(2, 64), some_packed(3, 64, 4, 32), None, 0.1, largest_code, False, zero_point)
    with pytest.raises(InputError, match="zero_point must be 0 to largest_code, 15; got -1"):
        kernels.linear_a8(torch.ones(2, 64), some_packed(3, 64, 4, 32), None, 0.1, 15, False, -1)
    with pytest.raises(InputError, match=r"largest_code must be 1 to 127, .*; got 128 and 0"):
        kernels.linear_a8(torch.ones(2, 64), some_packed(3, 64, 4, 32), None, None, 128, False)


def test_a_packed_weight_of_another_size_is_refused() -> None:
    packed = some_packed(16, 64, 4, 32)
    sentence = r"packed weight must be contiguous uint8 \[640\] for 4 bits \[16, 64\] in groups of 32; got uint8 \[639\]"
    with pytest.raises(InputError, match=sentence):
        PackedWeight(packed.data[:-1], packed.format)
    with pytest.raises(InputError, match=sentence):
        torch.ops.mpsearch.linear(torch.ones(1, 64), packed.data[:-1], packed.format)


@pytest.mark.parametrize("product", [kernels.linear, kernels.linear_a8])
@pytest.mark.parametrize("backend", kernels.available_backends())
def test_gradients_are_not_followed(backend: str, product) -> None:
    with kernels.use_backend(backend):
        assert not product(torch.randn(2, 64, requires_grad=True), some_packed(3, 64, 4, 32)).requires_grad


@pytest.mark.parametrize("name", ["linear", "linear_a8"])
@pytest.mark.slow
def test_registration(name: str) -> None:
    packed = some_packed(20, 64, 4, 32)
    arguments = (packed.data, packed.format)
    for x, bias in ((torch.randn(3, 64), None), (torch.randn(2, 5, 64), torch.randn(20))):
        torch.library.opcheck(getattr(torch.ops.mpsearch, name).default, (x, *arguments, bias))
    meta = getattr(torch.ops.mpsearch, name)(torch.ones(5, 64, device="meta"), packed.data.to("meta"), *arguments[1:])
    assert meta.shape == (5, 20)


@pytest.mark.parametrize("product", [kernels.linear, kernels.linear_a8])
@pytest.mark.slow
def test_compiled_graphs_hold_the_product(product) -> None:
    packed = some_packed(20, 64, 4, 32)
    x = torch.randn(3, 64)
    bias = torch.randn(20)
    layer = torch.compile(lambda x: product(x, packed, bias) + 1, fullgraph=True, backend="aot_eager")
    assert torch.equal(layer(x), product(x, packed, bias) + 1)
