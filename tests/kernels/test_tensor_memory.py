"""What kernels read: storage that is too small is refused, negative views have their sign, indices are read once."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from mpsearch import kernels
from mpsearch.errors import InputError
from mpsearch.kernels import backends

HOW = {"bits": 4, "group_size": 8}
Case = tuple[Callable[..., object], dict[str, Tensor]]


def cases() -> dict[str, Case]:
    """Each operator as a function of tensors, and tensors for it."""
    torch.manual_seed(0)
    weight, x, bias, image = torch.randn(8, 16), torch.randn(3, 16), torch.randn(8), torch.randn(2, 4, 3, 3)
    codes, scales, zero_points = kernels.quantize(weight, symmetric=False, **HOW)
    assert zero_points is not None
    parts = {"codes": codes, "scales": scales, "zero_points": zero_points}
    packed = kernels.pack(codes, 4)
    linear = kernels.pack_weight(codes, scales, zero_points, **HOW)
    conv = kernels.pack_conv(codes, scales, zero_points, kernel_size=(2, 2), groups=1, **HOW)
    window = {"stride": (1, 1), "padding": (0, 0), "dilation": (1, 1)}
    shape = {"rows": 8, "columns": 16}
    format = (8, 16, 4, 8, True, False, 1, 2, 2)
    ops, geometry = torch.ops.mpsearch, tuple(window.values())
    floats = {"weight": weight, "scales": scales.float(), "zero_points": zero_points.float()}
    return {
        "quantize": (
            lambda **t: kernels.quantize(**t, symmetric=True, **HOW),
            {"weight": weight, "ratios": torch.tensor([1.0, 0.8]), "importance": torch.rand(2, 16)},
        ),
        "pack": (lambda codes: kernels.pack(codes, 4), {"codes": codes}),
        "unpack": (lambda packed: kernels.unpack(packed, 4, 128), {"packed": packed}),
        "dequantize": (
            lambda **t: kernels.dequantize(**t, **shape, **HOW),
            {"packed": packed, "scales": scales, "zero_points": zero_points},
        ),
        "pack_weight": (lambda **t: kernels.pack_weight(**t, **HOW).data, parts),
        "unpack_weight": (lambda data: kernels.unpack_weight(kernels.PackedWeight(data, linear.format)), {"data": linear.data}),
        "linear": (lambda **t: kernels.linear(weight=linear, **t), {"x": x, "bias": bias}),
        "linear operator": (
            lambda x, data, bias: ops.linear(x, data, linear.format, bias),
            {"x": x, "data": linear.data, "bias": bias},
        ),
        "linear_a8": (lambda **t: kernels.linear_a8(weight=linear, **t), {"x": x, "bias": bias}),
        "pack_conv": (lambda **t: kernels.pack_conv(**t, kernel_size=(2, 2), groups=1, **HOW).data, parts),
        "unpack_conv": (
            lambda data: kernels.unpack_conv(kernels.PackedConv(data, conv.format)),  # type: ignore[arg-type]
            {"data": conv.data},
        ),
        "conv": (lambda **t: kernels.conv(weight=conv, **t, **window), {"x": image, "bias": bias}),
        "conv operator": (
            lambda x, data, bias: ops.conv(x, data, format, bias, *geometry),
            {"x": image.to(memory_format=torch.channels_last), "data": conv.data, "bias": bias},
        ),
        "conv_a8": (lambda **t: kernels.conv_a8(weight=conv, **t, **window), {"x": image, "bias": bias}),
        "embedding": (
            lambda indices, data: ops.embedding(indices, data, linear.format),
            {"indices": torch.tensor([[1, 7, 0]]), "data": linear.data},
        ),
        "rotate": (lambda x: kernels.rotate(x), {"x": x}),
        "half_quadratic": (
            lambda **t: kernels.half_quadratic(**t, fit_zeros=True, n_steps=2, beta=10.0, growth=1.0, **HOW),
            floats,
        ),
        "round_with_feedback": (
            lambda **t: kernels.round_with_feedback(**t, bits=4),
            {
                **floats,
                "feedback": torch.randn(2, 16, 16),
                "column_groups": (torch.arange(16) // 8).int(),
                "errors": torch.randn(8, 16),
                "fixed": torch.rand(8, 16) < 0.3,
            },
        ),
    }


ARGUMENTS = [(operator, name) for operator, (_, tensors) in cases().items() for name in tensors]


def cut(tensor: Tensor, n_bytes: int) -> Tensor:
    """A copy with the same strides whose storage then shrinks to `n_bytes`."""
    copy = tensor.clone()
    copy.untyped_storage().resize_(n_bytes)
    return copy


@pytest.mark.parametrize("backend", kernels.available_backends())
@pytest.mark.parametrize(("operator", "name"), ARGUMENTS)
def test_storage_that_was_freed_is_refused(operator: str, name: str, backend: str) -> None:
    """As FSDP frees a parameter: the shape stays, the memory is gone. Without the check the process ends by a signal."""
    run, tensors = cases()[operator]
    with kernels.use_backend(backend):
        for n_bytes in (0, tensors[name].nbytes - 1):
            with pytest.raises(
                ValueError, match=rf"The storage of .* has {n_bytes} bytes, but .* needs {tensors[name].nbytes}\. "
            ):
                run(**(tensors | {name: cut(tensors[name], n_bytes)}))


def test_offsets_and_strides_count() -> None:
    """The last value of a view is what must be there, not as many bytes as the view has values."""
    base = torch.randn(10, 16)
    packed = kernels.pack_weight(*kernels.quantize(torch.randn(8, 16), symmetric=True, **HOW), **HOW)
    views = {"offset": base[7:], "strides": base[::3], "repeated": base[:1].expand(3, 16)}
    for name, needed in {"offset": 640, "strides": 640, "repeated": 64}.items():
        assert torch.equal(kernels.linear(views[name], packed), kernels.linear(views[name].clone(), packed)), name
        base.untyped_storage().resize_(needed - 4)
        with pytest.raises(InputError, match=f"has {needed - 4} bytes, but .* needs {needed}"):
            kernels.linear(views[name], packed)
        base.untyped_storage().resize_(640)
    assert kernels.linear(cut(torch.empty(0, 16), 0), packed).shape == (0, 8), "no values need no memory"


@pytest.mark.parametrize("backend", kernels.available_backends())
@pytest.mark.parametrize(("operator", "name"), [of for of in ARGUMENTS if of[1] != "fixed"])  # bool has no negative
def test_negative_views_have_their_sign(operator: str, name: str, backend: str) -> None:
    """`imag` of a conjugate: contiguous, the memory holds the opposite values."""
    run, tensors = cases()[operator]
    negative = torch._neg_view(-tensors[name])
    assert negative.is_neg()
    assert torch.equal(negative, tensors[name])
    with kernels.use_backend(backend):
        expected, found = (run(**(tensors | {name: given})) for given in (tensors[name], negative))
    for a, b in zip(expected, found, strict=True) if isinstance(expected, tuple) else [(expected, found)]:
        assert (a is None and b is None) or torch.equal(a, b)


def test_indices_are_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the caller's tensor becomes while the kernel runs has no effect: what was checked is what is read."""
    packed = kernels.pack_weight(*kernels.quantize(torch.randn(8, 16), symmetric=True, **HOW), **HOW)
    indices, real = torch.tensor([1, 7, 0]), backends.compiled
    expected = kernels.embedding(indices, packed)

    def meanwhile(*arguments: int) -> None:
        indices.fill_(5)
        real.embedding(*arguments)

    monkeypatch.setattr(backends, "compiled", SimpleNamespace(embedding=meanwhile))
    assert torch.equal(kernels.embedding(indices, packed), expected)
    assert indices.tolist() == [5, 5, 5]


GOOD = {"data": torch.zeros(0, dtype=torch.uint8), "rows": 0, "columns": 0, "bits": 4, "group_size": 1}
FLAGS = {"half_scales": True, "symmetric": True}


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"symmetric": 3.5}, "symmetric must be True or False; got 3.5"),
        ({"half_scales": 1}, "half_scales must be True or False; got 1"),
        ({"rows": 2**31}, "rows must be an integer from 0 to 2147483647; got 2147483648"),
        ({"rows": 2**31 - 1, "columns": 2**31 - 1}, r"must be contiguous uint8 \[\d+\] for 4 bits"),
        ({"columns": -1}, "columns must be an integer .*; got -1"),
        ({"bits": 4.0}, "bits must be an integer .*; got 4.0"),
        ({"bits": True}, "bits must be an integer .*; got True"),
        ({"bits": 9}, "for 9 bits .* Make it with pack_"),
        ({"group_size": 0}, "in groups of 0.* Make it with pack_"),
        ({"data": torch.zeros(1, dtype=torch.uint8)}, r"The packed weight must be contiguous uint8 \[0\] .*; got uint8 \[1\]"),
        ({"data": bytearray()}, "data must be a tensor; got bytearray"),
        ({"kernel_size": [1, 1]}, r"kernel_size must be a tuple .*; got \[1, 1\]"),
        ({"kernel_size": (1.0,)}, r"kernel_size must be a tuple .*; got \(1.0,\)"),
        ({"kernel_size": (2**40,)}, "kernel .1099511627776. .* Make it with pack_conv"),
        ({"groups": 0}, "0 groups of the convolution.* Make it with pack_conv"),
    ],
)
def test_fields_of_packed_weights_are_checked(change: dict, sentence: str) -> None:
    """Where they are made: with a wrong number a kernel would loop for minutes, or read beyond the data."""
    conv = {**GOOD, **FLAGS, "kernel_size": (1, 1), "groups": 1}

    def pack_weight(data: object, **fields: object) -> kernels.PackedWeight:
        return kernels.PackedWeight(data, kernels.WeightFormat(**fields))

    def pack_conv(data: object, **fields: object) -> kernels.PackedConv:
        return kernels.PackedConv(data, kernels.ConvFormat(**fields))

    assert pack_conv(**conv).nbytes == pack_weight(**GOOD, **FLAGS).nbytes == 0
    with pytest.raises(InputError, match=sentence):
        pack_conv(**(conv | change))
    if not change.keys() & {"kernel_size", "groups"}:
        with pytest.raises(InputError, match=sentence):
            pack_weight(**(GOOD | FLAGS | change))
