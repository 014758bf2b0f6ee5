"""What the CUDA kernels owe: the same checks for the emulator's CPU tensors and for a GPU's. Needs PyTorch and the kernels only.

Each `check_*(device)` compares with `reference`: codes, scales, int8 products bit for bit, float products within their bound.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from mpsearch import kernels
from mpsearch.errors import InputError
from mpsearch.kernels import PackedWeight, cuda_backend, reference

RATIOS = torch.tensor([1.0, 0.95, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.85, 0.3, 1.05])
BITS = range(1, 9)
BYTES_OF = {torch.float32: torch.int32, torch.float16: torch.int16, torch.uint8: torch.uint8}


def same_bits(got: Tensor | None, wanted: Tensor | None) -> bool:
    if got is None or wanted is None:
        return got is wanted
    got = got.cpu()
    return got.dtype == wanted.dtype and torch.equal(got.view(BYTES_OF[got.dtype]), wanted.view(BYTES_OF[got.dtype]))


def assert_quantizes(device: str, weight: Tensor, **how) -> None:
    with kernels.use_backend("reference"):
        wanted = kernels.quantize(weight, **how)
    there = {name: of.to(device) if isinstance(of, Tensor) else of for name, of in how.items()}
    got = kernels.quantize(weight.to(device), **there)
    assert all(same_bits(a, b) for a, b in zip(got, wanted, strict=True)), how


def check_min_max(device: str) -> None:
    torch.manual_seed(0)
    shapes = [((0, 5), 3), ((3, 0), 8), ((1, 1), 1), ((3, 7), 3), ((5, 130), 32), ((3, 577), 10_000)]
    shapes += [((33, 128), size) for size in (16, 32, 64, 128)]  # groups that stay in registers
    for bits, symmetric, scale_dtype in itertools.product(BITS, (False, True), (torch.float16, torch.float32)):
        for (rows, columns), group_size in shapes:
            weight = torch.randn(rows, columns) * torch.rand(rows, 1) * 3 + 0.1 * bits
            how = {"bits": bits, "group_size": group_size, "symmetric": symmetric, "scale_dtype": scale_dtype}
            assert_quantizes(device, weight, **how)
    for magnitude, group_size in itertools.product((0.0, 1e-42, 3e-7, 1e18), (32, 48)):
        weight = torch.randn(4, 96) * magnitude
        for symmetric in (False, True):
            assert_quantizes(device, weight, bits=4, group_size=group_size, symmetric=symmetric, scale_dtype=torch.float32)


def check_clip_search(device: str) -> None:
    torch.manual_seed(0)
    for bits, symmetric, kind in itertools.product(BITS, (False, True), range(3)):
        rows, columns = 4, 141
        ratios = torch.cat([RATIOS, -RATIOS]) if symmetric else RATIOS
        importance = [None, torch.rand(1, columns), torch.rand(rows, columns) * (torch.rand(rows, columns) > 0.2)][kind]
        weight = torch.randn(rows, columns) ** 3
        for group_size in (32, 141):
            how = {"bits": bits, "group_size": group_size, "symmetric": symmetric, "importance": importance}
            assert_quantizes(device, weight, ratios=ratios[: 1 + (bits + kind * 7) % len(ratios)], **how)
    nothing_counts = torch.zeros(1, 141)  # all errors are equal: the first ratio wins
    assert_quantizes(device, weight, bits=4, group_size=64, symmetric=False, ratios=RATIOS, importance=nothing_counts)
    tiny = torch.linspace(-1, 1, 64)[None] * 1.2e-6  # ratios that make the scale 0 are never chosen
    assert_quantizes(device, tiny, bits=4, group_size=64, symmetric=False, ratios=torch.tensor([0.1, 1.0, 0.9]))


def check_refusals(device: str) -> None:
    spoilt = torch.ones(3, 128)
    spoilt[1, 5] = torch.nan
    too_large = torch.full((3, 128), 1e8)
    for weight, group_size, ratios in itertools.product((spoilt, too_large), (128, 100), (None, RATIOS.to(device))):
        try:
            kernels.quantize(weight.to(device), bits=4, group_size=group_size, symmetric=False, ratios=ratios)
        except InputError:
            continue
        raise AssertionError("not refused")


def check_packing(device: str) -> None:
    torch.manual_seed(0)
    for bits, numel in itertools.product(BITS, (0, 1, 7, 8, 9, 33, 1009, 4096)):
        codes = torch.randint(0, 2**bits, (numel,), dtype=torch.uint8)
        packed = kernels.pack(codes.to(device), bits)
        assert torch.equal(packed.cpu(), reference.pack(codes, bits)), (bits, numel)
        assert torch.equal(kernels.unpack(packed, bits, numel).cpu(), codes), (bits, numel)
        if numel > 9:  # from an address that is no multiple of 8
            assert torch.equal(kernels.pack(codes.to(device)[1:], bits).cpu(), reference.pack(codes[1:], bits))
            if bits < 8:
                codes[numel - 1] = 2**bits
                try:
                    kernels.pack(codes.to(device), bits)
                except InputError:
                    continue
                raise AssertionError("a code that does not fit was packed")


def check_dequantizing(device: str) -> None:
    torch.manual_seed(0)
    for bits, symmetric, scale_dtype in itertools.product(BITS, (False, True), (torch.float16, torch.float32)):
        for rows, columns, group_size in ((1, 1, 1), (3, 7, 3), (5, 130, 32), (3, 577, 128), (2, 64, 10_000)):
            quantized = some_weight(rows, columns, bits, min(group_size, columns), symmetric, scale_dtype)
            packed = kernels.pack(quantized[0].to(device), bits)
            scales, zero_points = (None if of is None else of.to(device) for of in quantized[1:])
            how = {"bits": bits, "rows": rows, "columns": columns, "group_size": group_size}
            wanted = reference.dequantize_codes(*quantized, bits, min(group_size, columns))
            assert same_bits(kernels.dequantize(packed, scales, zero_points, **how), wanted), how


def some_weight(
    rows: int, columns: int, bits: int, group_size: int, symmetric: bool, scale_dtype: torch.dtype = torch.float16
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Codes over their whole range, scales of both signs and many sizes, zero points."""
    n_groups = -(-columns // group_size)
    codes = torch.randint(0, 2**bits, (rows, columns), dtype=torch.uint8)
    scales = (torch.randn(rows, n_groups) * 10 ** torch.empty(rows, n_groups).uniform_(-4, 0)).to(scale_dtype)
    zero_points = None if symmetric else torch.randint(0, 2**bits, (rows, n_groups), dtype=torch.uint8)
    return codes, scales, zero_points


def some_packed(device: str, rows: int, columns: int, group_size: int, **how) -> tuple[PackedWeight, PackedWeight, Tensor]:
    """A packed weight on the device and on the CPU, and its floats."""
    bits, group_size = how["bits"], min(group_size, columns)
    quantized = some_weight(rows, columns, group_size=group_size, **how)
    packed = kernels.pack_weight(*quantized, bits=bits, group_size=group_size)
    weight = reference.dequantize_codes(*quantized, bits, group_size)
    there = PackedWeight(packed.data.to(device), packed.format)
    return there, packed, weight


# rows, columns, group_size, scale_dtype: groups of one, two, four, five blocks and of all columns; with and without tails
SHAPES = [
    (1, 1, 8, torch.float16),
    (40, 257, 32, torch.float16),
    (17, 320, 64, torch.float32),
    (70, 384, 128, torch.float16),
    (20, 190, 60, torch.float16),
    (33, 610, 160, torch.float32),
    (48, 672, 10_000, torch.float16),
]


def worst(y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> float:
    """The error of `linear`, as a share of its bound, where that is largest."""
    product, size = x.double() @ weight.double().T, x.double().abs() @ weight.double().abs().T
    if bias is not None:
        product, size = product + bias.double(), size + bias.double().abs()
    rounding = {torch.float32: 0.0, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}[y.dtype]
    smallest = 2.0**-25 if y.dtype == torch.float16 else 1e-38
    bound = 2 * (weight.shape[1] + 8) * 2.0**-24 * size + rounding * product.abs() + smallest
    return float(((y.cpu().double() - product).abs() / bound).max())


def check_linear(device: str, dtype: torch.dtype, bits: int) -> None:
    torch.manual_seed(bits)
    for (rows, columns, group_size, scale_dtype), symmetric in itertools.product(SHAPES, (False, True)):
        how = {"bits": bits, "symmetric": symmetric, "scale_dtype": scale_dtype}
        packed, _, weight = some_packed(device, rows, columns, group_size, **how)
        bias = torch.randn(rows) if symmetric else None
        for n_tokens in (1, 2, 3 + bits) if symmetric else (1, 9):
            x = (torch.randn(n_tokens, columns) * torch.rand(n_tokens, 1) + 0.1).to(dtype)
            y = kernels.linear(x.to(device), packed, None if bias is None else bias.to(device))
            assert y.dtype == dtype
            assert worst(y, x, weight, bias) <= 1, (rows, columns, group_size, symmetric, n_tokens)


def check_many_tokens(device: str) -> None:
    """Every number of tiles, several passes, and beyond them the dequantized weight; the same bits when asked again."""
    torch.manual_seed(0)
    for rows, columns, group_size in ((40, 256, 128), (50, 96, 32)):
        packed, _, weight = some_packed(device, rows, columns, group_size, bits=4, symmetric=False)
        for n_tokens, dtype in itertools.product((16, 30, 64, 70, 257), (torch.float16, torch.bfloat16, torch.float32)):
            x = torch.randn(n_tokens, columns).to(dtype)
            y = kernels.linear(x.to(device), packed)
            streamed = n_tokens * cuda_backend.columns_each(dtype, group_size) <= cuda_backend.MOST_STREAMED_COLUMNS
            multiplied = weight if streamed else weight.to(dtype)
            assert worst(y, x, multiplied, None) <= (1 if streamed else 8), (rows, n_tokens, dtype)  # cuBLAS may round sums
            assert torch.equal(kernels.linear(x.to(device), packed), y)


def check_dequantized_weight(device: str) -> None:
    """What cuBLAS multiplies is, in float32, the weight to the bit: a product with one 1 in each token shows it."""
    torch.manual_seed(0)
    for bits, (rows, columns, group_size, scale_dtype) in itertools.product(BITS, SHAPES[1:]):
        how = {"bits": bits, "symmetric": bits % 2 == 1, "scale_dtype": scale_dtype}
        packed, _, weight = some_packed(device, rows, columns, group_size, **how)
        x = torch.eye(columns)
        for dtype in (torch.float32, torch.float16, torch.bfloat16) if columns > 256 else (torch.float32,):
            y = kernels.linear(x.to(device, dtype), packed)
            assert torch.equal(y.cpu(), weight.T.to(dtype)), (bits, rows, dtype)


def check_linear_a8(device: str, bits: int) -> None:
    torch.manual_seed(bits)
    for (rows, columns, group_size, scale_dtype), symmetric in itertools.product(
        [*SHAPES, (5, 2560, 2560, torch.float16)], (False, True)
    ):
        how = {"bits": bits, "symmetric": symmetric, "scale_dtype": scale_dtype}
        packed, here, _ = some_packed(device, rows, columns, group_size, **how)
        bias, input_scale = (torch.randn(rows), 0.01) if symmetric else (None, None)
        for n_tokens in (1, 2 + bits) if columns < 2000 else (1,):
            x = torch.randn(n_tokens, columns) * torch.rand(n_tokens, 1) + 0.1
            with kernels.use_backend("reference"):
                wanted = kernels.linear_a8(x, here, bias, input_scale)
            got = kernels.linear_a8(x.to(device), packed, None if bias is None else bias.to(device), input_scale)
            assert same_bits(got, wanted), (rows, columns, group_size, symmetric, n_tokens)


def check_long_rows(device: str, bits: int) -> None:
    """Enough steps for a warp to go round its ring more than once."""
    torch.manual_seed(bits)
    columns = 18_560
    packed, here, weight = some_packed(device, 3, columns, 128, bits=bits, symmetric=False)
    for n_tokens, dtype in ((1, torch.float16), (2, torch.bfloat16), (17, torch.float16)):
        x = torch.randn(n_tokens, columns).to(dtype)
        assert worst(kernels.linear(x.to(device), packed), x, weight, None) <= 1, (n_tokens, dtype)
    with kernels.use_backend("reference"):
        wanted = kernels.linear_a8(x.float(), here)
    assert same_bits(kernels.linear_a8(x.float().to(device), packed), wanted)


def check_int8_input(device: str) -> None:
    """Zeros, vanishing and huge tokens, ties, values that are not finite; half input; several passes; the largest sums."""
    torch.manual_seed(0)
    packed, here, _ = some_packed(device, 20, 70, 32, bits=4, symmetric=False)
    x = torch.randn(40, 70)
    x[0] = 0
    x[1] *= 1e-39
    x[2] *= 1e37
    x[3] = torch.arange(70) - 35 + 0.5
    x[3, 0] = 127
    x[4, 3], x[5, 69], x[6, 0] = torch.nan, torch.inf, -torch.inf
    of_token = itertools.product((None,), (1, 7, 127), (True, False), (0,))
    for how in (*of_token, (0.02, 127, True, 0), (0.3, 7, True, 0), (0.3, 15, False, 4), (0.02, 254, False, 9)):
        with kernels.use_backend("reference"):
            wanted = kernels.linear_a8(x, here, None, *how)
        got = kernels.linear_a8(x.to(device), packed, None, *how).cpu()
        assert torch.equal(got.isnan(), wanted.isnan())
        assert same_bits(got.nan_to_num(7.0), wanted.nan_to_num(7.0))
    spoilt = kernels.linear(x.to(device), packed).isfinite().all(1).cpu()
    assert torch.equal(spoilt, torch.tensor([True] * 4 + [False] * 3 + [True] * 33))
    for dtype in (torch.float16, torch.bfloat16):
        halves = torch.randn(5, 70).to(dtype)
        with kernels.use_backend("reference"):
            wanted = kernels.linear_a8(halves.float(), here).to(dtype)
        assert torch.equal(kernels.linear_a8(halves.to(device), packed).cpu(), wanted)

    codes = torch.full((3, 32_768), 255, dtype=torch.uint8)
    zero_points = torch.tensor([[0], [255], [1]], dtype=torch.uint8)
    here = kernels.pack_weight(codes, torch.ones(3, 1, dtype=torch.float16), zero_points, bits=8, group_size=32_768)
    packed = PackedWeight(here.data.to(device), here.format)
    x = torch.ones(2, 32_768)
    x[1] = -1
    with kernels.use_backend("reference"):
        wanted = kernels.linear_a8(x, here)
    assert same_bits(kernels.linear_a8(x.to(device), packed), wanted)


def check_shapes_and_strides(device: str) -> None:
    torch.manual_seed(0)
    packed, here, _ = some_packed(device, 21, 64, 32, bits=3, symmetric=False)
    assert all(same_bits(a, b) for a, b in zip(kernels.unpack_weight(packed), kernels.unpack_weight(here), strict=True))
    x = torch.randn(2, 3, 64, device=device)
    for product in (kernels.linear, kernels.linear_a8):
        y = product(x, packed)
        assert y.shape == (2, 3, 21)
        apart = x.reshape(6, 64).T.contiguous().T
        assert torch.equal(product(apart, packed), y.reshape(6, 21))
        assert product(x[:0], packed).shape == (0, 3, 21)
        off = torch.randn(65, device=device).to(torch.float16)[1:]  # from an address that is no multiple of 16
        assert torch.equal(product(off, packed), product(off.clone(), packed))
        shifted = torch.cat([packed.data[:1], packed.data])[1:]
        assert torch.equal(product(x, PackedWeight(shifted, packed.format)), y)


def check_rotation(device: str) -> None:
    torch.manual_seed(0)
    for columns, back in itertools.product((1, 2, 7, 8, 33, 64, 172, 384, 4100), (False, True)):
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            x = torch.randn(3, columns).to(dtype)
            with kernels.use_backend("reference"):
                wanted = kernels.rotate(x, back=back)
            assert torch.equal(kernels.rotate(x.to(device), back=back).cpu(), wanted), (columns, back, dtype)


CHECKS = {
    "rotation": check_rotation,
    "min-max": check_min_max,
    "clip search": check_clip_search,
    "refusals": check_refusals,
    "packing": check_packing,
    "dequantizing": check_dequantizing,
    "many tokens": check_many_tokens,
    "dequantized weight": check_dequantized_weight,
    "int8 input": check_int8_input,
    "shapes and strides": check_shapes_and_strides,
}
for _bits in BITS:
    CHECKS[f"linear_a8, {_bits} bits"] = lambda device, bits=_bits: check_linear_a8(device, bits)
    CHECKS[f"long rows, {_bits} bits"] = lambda device, bits=_bits: check_long_rows(device, bits)
    for _dtype in (torch.float32, torch.float16, torch.bfloat16):
        _name = f"linear, {_bits} bits, {str(_dtype).removeprefix('torch.')}"
        CHECKS[_name] = lambda device, bits=_bits, dtype=_dtype: check_linear(device, dtype, bits)
