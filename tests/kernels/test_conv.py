"""Convolutions of packed weights: `conv_a8` equals the specification bit for bit, `conv` lies within its stated bound."""

from __future__ import annotations

import itertools
import threading
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from test_products import INPUTS
from torch import Tensor

from mpsearch import kernels
from mpsearch.errors import InputError
from mpsearch.kernels import PackedConv, reference

COMPILED = kernels.available_backends()[1:]
ONE = {"stride": (1, 1), "padding": (0, 0), "dilation": (1, 1)}


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@dataclass
class Case:
    """A convolution: x `[n, channels, *size]`, rows and channels given for one group."""

    group_rows: int
    group_channels: int
    kernel_size: tuple[int, ...]
    size: tuple[int, ...]
    groups: int = 1
    n: int = 2
    stride: tuple[int, ...] = (1, 1)
    padding: tuple[int, ...] = (0, 0)
    dilation: tuple[int, ...] = (1, 1)
    bits: int = 4
    group_size: int = 100_000
    symmetric: bool = True
    scale_dtype: torch.dtype = torch.float16
    has_bias: bool = True
    channels_last: bool = False
    input_scale: float | None = None

    @property
    def geometry(self) -> dict:
        return {"stride": self.stride, "padding": self.padding, "dilation": self.dilation}

    def weight(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Codes over their whole range, scales of both signs and many sizes, zero points."""
        rows, columns = self.groups * self.group_rows, self.group_channels * torch.Size(self.kernel_size).numel()
        n_groups = -(-columns // self.group_size)
        codes = torch.randint(0, 2**self.bits, (rows, columns), dtype=torch.uint8)
        scales = (torch.randn(rows, n_groups) * 10 ** torch.empty(rows, n_groups).uniform_(-4, 0)).to(self.scale_dtype)
        zero_points = None if self.symmetric else torch.randint(0, 2**self.bits, (rows, n_groups), dtype=torch.uint8)
        return codes, scales, zero_points

    def packed(self, weight: tuple[Tensor, Tensor, Tensor | None] | None = None) -> PackedConv:
        return kernels.pack_conv(
            *(weight or self.weight()),
            bits=self.bits,
            group_size=self.group_size,
            kernel_size=self.kernel_size,
            groups=self.groups,
        )

    def x(self) -> Tensor:
        x = torch.randn(self.n, self.groups * self.group_channels, *self.size) + 0.1
        return x.to(memory_format=torch.channels_last) if self.channels_last else x


def check(case: Case) -> None:
    """Packing keeps all; every backend against the specification, and that against PyTorch's convolution."""
    weight = case.weight()
    packed, x = case.packed(weight), case.x()
    codes, scales, zero_points = kernels.unpack_conv(packed)
    assert torch.equal(codes, weight[0])
    assert torch.equal(scales, weight[1])
    assert zero_points is weight[2] is None or torch.equal(zero_points, weight[2])
    bias = torch.randn(packed.format.rows) if case.has_bias else None
    floats = reference.dequantize_codes(codes, scales, zero_points, case.bits, packed.format.group_size).double()
    floats = floats.reshape(packed.format.rows, -1, *case.kernel_size)
    product = F.conv2d if len(case.kernel_size) == 2 else F.conv1d

    def exact(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        bias = None if bias is None else bias.double()
        return product(x.double(), weight, bias, case.stride, case.padding, case.dilation, case.groups)

    expected_float = exact(x, floats, bias)
    bound = (packed.format.columns + 8) * 2.0**-24 * exact(x.abs(), floats.abs(), None if bias is None else bias.abs())
    with kernels.use_backend("reference"):
        expected = kernels.conv_a8(x, packed, bias, **case.geometry, input_scale=case.input_scale)
    x8, scale = reference.quantize_tokens(x.flatten(1), case.input_scale, 127, -1)
    simulated = exact((x8.double() * scale.double()).reshape(x.shape), floats, bias)
    torch.testing.assert_close(expected.double(), simulated, rtol=1e-4, atol=1e-5 * float(simulated.abs().max()))
    for backend in kernels.available_backends():
        with kernels.use_backend(backend):
            y8 = kernels.conv_a8(x, packed, bias, **case.geometry, input_scale=case.input_scale)
            y = kernels.conv(x, packed, bias, **case.geometry)
        assert torch.equal(y8, expected), (backend, case)
        assert ((y.double() - expected_float).abs() <= bound).all(), (backend, case)
        assert y.is_contiguous(memory_format=torch.channels_last if case.channels_last else torch.contiguous_format)
        assert y.stride() == y8.stride() == expected.stride()


GEOMETRIES = [
    Case(16, 16, (3, 3), (9, 9), padding=(1, 1)),
    Case(33, 3, (3, 3), (8, 11), padding=(1, 1), stride=(2, 2)),
    Case(7, 5, (1, 1), (6, 7)),
    Case(20, 8, (2, 5), (9, 23), padding=(2, 1), stride=(1, 3), dilation=(3, 2)),
    Case(17, 6, (3, 3), (7, 7), groups=2, padding=(1, 1)),
    Case(1, 1, (3, 3), (13, 14), groups=37, padding=(1, 1)),
    Case(1, 1, (5, 5), (9, 16), groups=16, stride=(2, 1), padding=(2, 2)),
    Case(3, 2, (3, 2), (8, 9), groups=5, dilation=(2, 1)),
    Case(19, 12, (5,), (31,), stride=(2,), padding=(2,), dilation=(1,)),
    Case(2, 4, (3,), (17,), groups=6, stride=(1,), padding=(4,), dilation=(4,)),
]


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=lambda case: f"{case.kernel_size}x{case.groups}")
@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.thin(4)
def test_backends_agree(bits: int, geometry: Case) -> None:
    """Each width with one scale a row, groups that cover whole channels, and groups that do not; symmetric or not."""
    torch.manual_seed(bits)
    taps = torch.Size(geometry.kernel_size).numel()
    for group_size, symmetric in itertools.product((100_000, 4 * taps, 7), (False, True)):
        flags = itertools.cycle((bits % 2 == 0, symmetric))
        check(
            replace(
                geometry,
                bits=bits,
                group_size=group_size,
                symmetric=symmetric,
                scale_dtype=torch.float32 if group_size == 7 else torch.float16,
                has_bias=next(flags),
                channels_last=len(geometry.size) == 2 and next(flags),
                input_scale=0.02 if group_size == 7 else None,
            )
        )


LONG = [Case(17, 3_600, (3, 3), (3, 4)), Case(1, 500, (8, 8), (8, 9), groups=2)]


def pairs(least: int, most: int) -> st.SearchStrategy[tuple[int, int]]:
    return st.tuples(st.integers(least, most), st.integers(least, most))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.builds(
        Case,
        group_rows=st.integers(1, 35),
        group_channels=st.integers(1, 9),
        kernel_size=pairs(1, 4),
        size=pairs(10, 19),
        groups=st.integers(1, 5),
        n=st.integers(1, 3),
        stride=pairs(1, 3),
        padding=pairs(0, 3),
        dilation=pairs(1, 3),
        bits=st.integers(1, 8),
        group_size=st.sampled_from([1, 3, 8, 9, 36, 64, 100_000]),
        symmetric=st.booleans(),
        scale_dtype=st.sampled_from([torch.float16, torch.float32]),
        has_bias=st.booleans(),
        channels_last=st.booleans(),
        input_scale=st.sampled_from([None, 0.01]),
    )
)
def test_any_geometry(case: Case) -> None:
    torch.manual_seed(0)
    check(replace(case, channels_last=case.channels_last and case.group_channels * case.groups > 1))


@pytest.mark.parametrize("geometry", LONG, ids=["whole", "lanes"])
@pytest.mark.parametrize("bits", [1, 7, 8])
@pytest.mark.thin(3)
def test_extreme_codes_do_not_overflow(bits: int, geometry: Case) -> None:
    """All codes and inputs at their largest, over more columns than int16 or float32 hold exactly."""
    case = replace(geometry, bits=bits, symmetric=False)
    codes, _, _ = case.weight()
    codes[:] = 2**bits - 1
    codes[::3, ::2] = 0
    scales, zero_points = torch.ones(len(codes), 1), torch.zeros(len(codes), 1, dtype=torch.uint8)
    zero_points[1::2] = 2**bits - 1
    packed = case.packed((codes, scales, zero_points))
    x = torch.ones(2, case.groups * case.group_channels, *case.size)
    x[1, :, ::2] *= -1
    with kernels.use_backend("reference"):
        expected = kernels.conv_a8(x, packed, **ONE)
    for backend in COMPILED:
        with kernels.use_backend(backend):
            assert torch.equal(kernels.conv_a8(x, packed, **ONE), expected), backend
            assert ((kernels.conv(x, packed, **ONE) - expected).abs() <= 2e-3 * packed.format.columns).all(), backend


@pytest.mark.parametrize("geometry", [GEOMETRIES[i] for i in (0, 1, 5)], ids=["whole", "3 channels", "depthwise"])
@pytest.mark.parametrize("backend", kernels.available_backends())
@pytest.mark.thin(3)
def test_input_values(backend: str, geometry: Case) -> None:
    """Zeros, vanishing and huge samples, ties, and values that are not finite, which spoil their own sample only."""
    torch.manual_seed(0)
    case = replace(geometry, n=8)
    packed, x = case.packed(), case.x()
    x[0] = 0
    x[1] *= 1e-39
    x[2] *= 1e35
    x[3] = torch.arange(x[3].numel()).reshape(x[3].shape) % 100 - 0.5
    x[3, 0, 0, 0] = 127
    x[4, 0, 3, 3], x[5, -1, -1, -1], x[6, 0, 0, 0] = torch.nan, torch.inf, -torch.inf
    for how in INPUTS:
        with kernels.use_backend("reference"):
            expected = kernels.conv_a8(x, packed, **case.geometry, **how)
        with kernels.use_backend(backend):
            y = kernels.conv_a8(x, packed, **case.geometry, **how)
            assert torch.equal(y.flatten(1).isnan().all(1), torch.tensor([False] * 4 + [True] * 3 + [False]))
            assert torch.equal(y.nan_to_num(7.0), expected.nan_to_num(7.0))
            assert (y[:2] == 0).all() or how["largest_code"] > 127
            for sample in range(8):
                alone = kernels.conv_a8(x[sample : sample + 1], packed, **case.geometry, **how)
                assert torch.equal(alone.nan_to_num(7.0)[0], y[sample].nan_to_num(7.0))
    with kernels.use_backend(backend):
        spoilt = ~kernels.conv(x, packed, **case.geometry).flatten(1).isfinite().all(1)
        assert torch.equal(spoilt, torch.tensor([False] * 4 + [True] * 3 + [False]))


@pytest.mark.parametrize("convolve", [kernels.conv, kernels.conv_a8])
@pytest.mark.parametrize("geometry", [Case(40, 20, (3, 3), (30, 31), padding=(1, 1)), replace(GEOMETRIES[5], size=(60, 60))])
@pytest.mark.parametrize("backend", COMPILED)
@pytest.mark.thin(3)
def test_thread_counts_and_batches_agree(backend: str, geometry: Case, convolve, threads) -> None:
    torch.manual_seed(0)
    packed, x = geometry.packed(), replace(geometry, n=9).x()
    with kernels.use_backend(backend):
        results = []
        for n in (1, 2, 5):
            threads(n)
            results += [
                convolve(x, packed, **geometry.geometry),
                torch.cat([convolve(s[None], packed, **geometry.geometry) for s in x]),
            ]
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_calls_from_many_threads_agree() -> None:
    """The interpreter is let go of, and each thread has scratch memory of its own."""
    torch.manual_seed(0)
    case = Case(32, 16, (3, 3), (20, 20), padding=(1, 1))
    packed, inputs = case.packed(), [case.x() for _ in range(4)]
    expected = [kernels.conv_a8(x, packed, **case.geometry) for x in inputs]
    wrong: list[int] = []

    def call(i: int) -> None:
        for _ in range(20):
            if not torch.equal(kernels.conv_a8(inputs[i], packed, **case.geometry), expected[i]):
                wrong.append(i)

    callers = [threading.Thread(target=call, args=(i,)) for i in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert not wrong


@pytest.mark.parametrize("bits", range(1, 9))
def test_no_padding_in_memory(bits: int) -> None:
    """As many bytes as stored: dense codes, scales, zero points; a byte more at most for each tile."""
    for case in GEOMETRIES:
        for symmetric, group_size in itertools.product((False, True), (100_000, 7)):
            packed = replace(case, bits=bits, symmetric=symmetric, group_size=group_size).packed()
            n_groups = -(-packed.format.columns // packed.format.group_size)
            stored = -(-packed.format.rows * packed.format.columns * bits // 8) + packed.format.rows * n_groups * (
                2 if symmetric else 3
            )
            assert stored <= packed.nbytes <= stored + case.groups * -(-case.group_rows // 16)
            assert packed.nbytes == packed.data.numel()
    whole = Case(32, 8, (3, 3), (9, 9), bits=bits).packed()
    assert whole.nbytes == 32 * 72 * bits // 8 + 2 * 32


@pytest.mark.parametrize("convolve", [kernels.conv, kernels.conv_a8])
@pytest.mark.parametrize("backend", kernels.available_backends())
def test_nothing_strides_and_unfolded_kernels(backend: str, convolve) -> None:
    torch.manual_seed(0)
    case = Case(6, 3, (3, 3), (9, 9))
    packed, x, bias = case.packed(), case.x(), torch.randn(6)
    with kernels.use_backend(backend):
        y = convolve(x, packed, bias, **ONE)
        assert convolve(x[:0], packed, bias, **ONE).shape == (0, 6, 7, 7)
        apart = torch.randn(2, 9, 3, 9).permute(0, 2, 3, 1)
        apart.copy_(x)
        assert torch.equal(convolve(apart, packed, bias, **ONE), y)
        assert torch.equal(convolve(x, packed, torch.stack([bias, bias], 1)[:, 0], **ONE), y)
        assert convolve(x[:, :, :3, :3], packed, **ONE).shape == (2, 6, 1, 1)
        nothing = convolve(torch.empty(2, 3, 0, 4), packed, bias, **ONE | {"padding": (2, 0)})
        assert torch.equal(nothing, bias[None, :, None, None].expand(2, 6, 2, 2))
        for rows, channels in ((0, 3), (6, 0)):
            empty = Case(rows, channels, (3, 3), (9, 9))
            y = convolve(empty.x(), empty.packed(), **ONE)
            assert torch.equal(y, torch.zeros(2, rows, 7, 7))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"bits": 9}, "bits must be 1 to 8; got 9"),
        ({"codes": torch.zeros(6, 18)}, r"codes must be uint8 \[rows, columns\]; got float32 \[6, 18\]"),
        ({"codes": torch.full((6, 18), 16, dtype=torch.uint8)}, "The largest code is 16, but 4 bits hold 0 to 15"),
        ({"scales": torch.full((6, 2), torch.inf)}, "12 of 12 scales are NaN or infinite"),
        ({"kernel_size": (2, 2)}, "codes have 18 columns, which a kernel of 4 weights a channel does not divide"),
        ({"kernel_size": (3, 3, 3)}, r"kernel_size must be 1 or 2 integers of 1 or more; got \(3, 3, 3\)"),
        ({"kernel_size": (0, 3)}, r"kernel_size must be 1 or 2 integers of 1 or more; got \(0, 3\)"),
        ({"groups": 4}, "groups must divide the weight's 6 rows; got 4"),
        ({"groups": 0}, "groups must divide the weight's 6 rows; got 0"),
    ],
)
def test_packing_refuses(change: dict, sentence: str) -> None:
    arguments = {"codes": torch.zeros(6, 18, dtype=torch.uint8), "scales": torch.ones(6, 2), "zero_points": None}
    with pytest.raises(InputError, match=sentence):
        kernels.pack_conv(**{**arguments, "bits": 4, "group_size": 9, "kernel_size": (3, 3), "groups": 1, **change})


X = torch.ones(2, 4, 8, 8)


@pytest.mark.parametrize("convolve", [kernels.conv, kernels.conv_a8])
@pytest.mark.parametrize(
    ("x", "change", "sentence"),
    [
        (X.double(), {}, r"x must be float32 \[n, 4, height, width\] on cpu; got float64 \[2, 4, 8, 8\]"),
        (X[0], {}, r"x must be float32 \[n, 4, height, width\] on cpu; got float32 \[4, 8, 8\]"),
        (X[:, :3], {}, r"x must be float32 \[n, 4, height, width\] on cpu; got float32 \[2, 3, 8, 8\]"),
        (X.to("meta"), {}, r"x must be float32 .* on cpu; got float32 \[2, 4, 8, 8\] on meta"),
        (X, {"stride": (0, 1)}, r"stride must be 2 integers of 1 or more; got \(0, 1\)"),
        (X, {"padding": (1,)}, r"padding must be 2 integers of 0 or more; got \(1,\)"),
        (X, {"dilation": (1, -1)}, r"dilation must be 2 integers of 1 or more; got \(1, -1\)"),
        (X, {"dilation": (4, 1)}, r"The kernel covers \[9, 3\] values, dilation included, but the padded input has \[8, 8\]"),
        (X, {"bias": torch.ones(5)}, r"bias must be float32 \[6\] on cpu; got float32 \[5\] on cpu"),
        (X, {"bias": torch.ones(6).half()}, r"bias must be float32 \[6\] on cpu; got float16 \[6\]"),
    ],
)
def test_convolutions_refuse(convolve, x: Tensor, change: dict, sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        convolve(x, Case(3, 2, (3, 3), (8, 8), groups=2).packed(), **{**ONE, **change})


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), float("inf"), 1e-39])
def test_an_input_scale_out_of_range_is_refused(scale: float) -> None:
    with pytest.raises(InputError, match=rf"input_scale must be 1\.17549e-38 to 3\.40282e\+38; got {scale}"):
        kernels.conv_a8(X, Case(6, 4, (3, 3), (8, 8)).packed(), **ONE, input_scale=scale)


def test_a_packed_weight_of_another_size_is_refused() -> None:
    packed = Case(6, 4, (3, 3), (8, 8)).packed()
    sentence = r"packed weight must be contiguous uint8 \[120\] for 4 bits \[6, 36\] .*; got uint8 \[119\]"
    with pytest.raises(InputError, match=sentence):
        replace(packed, data=packed.data[:-1])
    with pytest.raises(InputError, match=sentence):
        torch.ops.mpsearch.conv(X, packed.data[:-1], (6, 36, 4, 36, True, True, 1, 3, 3), None, *ONE.values())


@pytest.mark.parametrize("convolve", [kernels.conv, kernels.conv_a8])
@pytest.mark.parametrize("backend", kernels.available_backends())
def test_gradients_are_not_followed(backend: str, convolve) -> None:
    packed = Case(6, 4, (3, 3), (8, 8)).packed()
    with kernels.use_backend(backend):
        y = convolve(X.clone().requires_grad_(), packed, torch.ones(6, requires_grad=True), **ONE)
    assert not y.requires_grad


@pytest.mark.slow
@pytest.mark.parametrize("case", [GEOMETRIES[0], GEOMETRIES[5], replace(GEOMETRIES[0], channels_last=True), GEOMETRIES[8]])
@pytest.mark.parametrize("name", ["conv", "conv_a8"])
def test_registration(name: str, case: Case) -> None:
    packed = case.packed()
    format = packed.format.to_list()
    arguments = (packed.data, format, torch.ones(packed.format.rows), case.stride, case.padding, case.dilation)
    scale = ((None,), (0.1,)) if name == "conv_a8" else ((),)
    operator = getattr(torch.ops.mpsearch, name)
    for rest in scale:
        torch.library.opcheck(operator.default, (case.x(), *arguments, *rest))
    meta = operator(case.x().to("meta"), packed.data.to("meta"), format, None, *arguments[3:], *scale[0])
    assert meta.shape == operator(case.x(), *arguments, *scale[0]).shape


@pytest.mark.slow
@pytest.mark.parametrize("convolve", [kernels.conv, kernels.conv_a8])
def test_compiled_and_exported_graphs_hold_the_convolution(convolve) -> None:
    case = Case(6, 4, (3, 3), (8, 8), padding=(1, 1))
    packed, bias = case.packed(), torch.randn(6)

    class Layer(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return convolve(x, packed, bias, **case.geometry) + 1

    layer, x = Layer(), case.x()
    expected = layer(x)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    assert torch.equal(compiled(x), expected)
    assert torch.equal(compiled(x[:1]), expected[:1])
    exported = torch.export.export(layer, (x,))
    assert torch.equal(exported.module()(x), expected)
    assert any(convolve.__name__ in str(node.target) for node in exported.graph.nodes)
