"""Embeddings of packed weights equal the rows of the dequantized matrix bit for bit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mpsearch import kernels
from mpsearch.errors import InputError
from mpsearch.kernels import PackedWeight


def some_table(
    rows: int, columns: int, bits: int, group_size: int, symmetric: bool, scale_dtype: torch.dtype = torch.float16
) -> tuple[PackedWeight, Tensor]:
    """A packed table and the same dequantized."""
    n_groups = -(-columns // group_size)
    codes = torch.randint(0, 2**bits, (rows, columns), dtype=torch.uint8)
    scales = torch.randn(rows, n_groups).to(scale_dtype)
    zero_points = None if symmetric else torch.randint(0, 2**bits, (rows, n_groups), dtype=torch.uint8)
    table = kernels.dequantize(
        kernels.pack(codes, bits), scales, zero_points, bits=bits, rows=rows, columns=columns, group_size=group_size
    )
    return kernels.pack_weight(codes, scales, zero_points, bits=bits, group_size=group_size), table


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", range(1, 9))
def test_rows_are_those_of_dequantize(bits: int, symmetric: bool) -> None:
    torch.manual_seed(bits)
    for rows, columns, group_size in ((1, 1, 1), (37, 130, 130), (50, 97, 8), (33, 128, 64), (16, 31, 7)):
        for scale_dtype in (torch.float16, torch.float32):
            packed, table = some_table(rows, columns, bits, group_size, symmetric, scale_dtype)
            for dtype in (torch.int64, torch.int32):
                indices = torch.randint(0, rows, (3, 11), dtype=dtype)
                for backend in kernels.available_backends():
                    with kernels.use_backend(backend):
                        y = kernels.embedding(indices, packed)
                        assert torch.equal(y, table[indices.long()]), (backend, rows, columns, group_size)
                        assert torch.equal(kernels.embedding(torch.arange(rows, dtype=dtype), packed), table)


@pytest.mark.parametrize("backend", kernels.available_backends())
def test_shapes_and_strides(backend: str) -> None:
    packed, table = some_table(20, 40, 4, 16, False)
    with kernels.use_backend(backend):
        assert torch.equal(kernels.embedding(torch.tensor(7), packed), table[7])
        assert kernels.embedding(torch.empty(0, dtype=torch.int64), packed).shape == (0, 40)
        assert kernels.embedding(torch.empty(2, 0, dtype=torch.int32), packed).shape == (2, 0, 40)
        every_second = torch.arange(20)[::2]
        assert torch.equal(kernels.embedding(every_second, packed), table[::2])
        empty, _ = some_table(4, 0, 4, 8, True)
        assert kernels.embedding(torch.tensor([1, 3]), empty).shape == (2, 0)


def test_thread_counts_agree() -> None:
    packed, table = some_table(500, 256, 5, 64, False)
    indices = torch.randint(0, 500, (4000,))
    before = torch.get_num_threads()
    try:
        for n in (1, 2, 5):
            torch.set_num_threads(n)
            assert torch.equal(kernels.embedding(indices, packed), table[indices])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("indices", "sentence"),
    [
        (torch.tensor([[0, 19], [20, 25]]), "Index 20, number 2 of 4, is out of range: 0 to 19"),
        (torch.tensor([3, -1], dtype=torch.int32), "Index -1, number 1 of 2, is out of range: 0 to 19"),
        (torch.tensor([2**40]), "Index 1099511627776, number 0 of 1, is out of range"),
        (torch.tensor([1.0]), r"indices must be int64 or int32 \[...\] on cpu; got float32 \[1\]"),
        (torch.empty(1, dtype=torch.int64, device="meta"), r"indices must be int64 or int32 .* on cpu; got int64 \[1\] on meta"),
    ],
)
@pytest.mark.parametrize("backend", kernels.available_backends())
def test_bad_indices_are_refused(backend: str, indices: Tensor, sentence: str) -> None:
    packed, _ = some_table(20, 40, 4, 16, False)
    with kernels.use_backend(backend), pytest.raises(InputError, match=sentence):
        kernels.embedding(indices, packed)


def test_an_empty_table_and_a_short_one_are_refused() -> None:
    empty, _ = some_table(0, 8, 4, 8, True)
    with pytest.raises(InputError, match="Index 0, number 0 of 1, is out of range: none"):
        kernels.embedding(torch.tensor([0]), empty)
    packed, _ = some_table(20, 40, 4, 16, True)
    with pytest.raises(InputError, match="Make it with pack_weight"):
        torch.ops.mpsearch.embedding(torch.tensor([0]), packed.data[:-1], packed.format)


def test_registration_and_compiled_graphs() -> None:
    packed, table = some_table(20, 40, 4, 16, False)
    indices = torch.tensor([[1, 5, 19]])
    torch.library.opcheck(torch.ops.mpsearch.embedding.default, (indices, packed.data, packed.format))
    meta = torch.ops.mpsearch.embedding(indices.to("meta"), packed.data.to("meta"), packed.format)
    assert (meta.shape, meta.dtype) == ((1, 3, 40), torch.float32)

    class Lookup(torch.nn.Module):
        def forward(self, indices: Tensor) -> Tensor:
            return kernels.embedding(indices, packed) * 2

    assert torch.equal(torch.compile(Lookup(), fullgraph=True, backend="aot_eager")(indices), 2 * table[indices])
    assert torch.equal(torch.export.export(Lookup(), (indices,)).module()(indices), 2 * table[indices])
