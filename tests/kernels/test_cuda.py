"""The CUDA kernels: on a GPU where one answers, and everywhere else on the emulator, in an order of threads that is shuffled."""

from __future__ import annotations

import cuda_emulation
import pytest
import torch
from cuda_contract import BITS, CHECKS, some_packed, some_weight

from mpsearch import kernels
from mpsearch.errors import InputError
from mpsearch.kernels import cuda_backend
from mpsearch.kernels.arguments import DequantizeArguments, PackArguments, QuantizeArguments, RotateArguments
from mpsearch.kernels.formats import InputFormat, WeightFormat

pytestmark = pytest.mark.slow


@pytest.fixture(scope="session")
def emulated(pytestconfig: pytest.Config) -> cuda_backend.Library:
    """Built once for each state of the sources, which takes half a minute, and kept in pytest's cache."""
    if cuda_emulation.compiler() is None:
        pytest.skip("no C++ compiler to build the emulated kernels with")
    return cuda_emulation.build(pytestconfig.cache.mkdir(f"emulated-{cuda_emulation.state()}"))


@pytest.mark.parametrize("name", CHECKS)
def test_emulated(emulated: cuda_backend.Library, name: str) -> None:
    emulated.functions.mpsearch_schedule(1 + len(name))
    with cuda_emulation.lent(emulated):
        CHECKS[name]("cpu")


@pytest.mark.parametrize("name", CHECKS)
def test_on_the_gpu(name: str) -> None:
    if not cuda_backend.takes(torch.empty(0, device="cuda" if torch.cuda.is_available() else "cpu")):
        pytest.skip(f"no GPU, or no CUDA kernels built for it: {cuda_backend.missing or 'PyTorch shows no GPU'}")
    CHECKS[name]("cuda")


def test_nothing_is_read_or_written_behind_the_end(emulated: cuda_backend.Library) -> None:
    """Inputs and outputs end where memory does, for every kernel and width."""
    torch.manual_seed(0)
    emulated.functions.mpsearch_schedule(0)

    def ends(tensor: torch.Tensor) -> torch.Tensor:
        return cuda_emulation.guarded(emulated, tensor)

    def addresses(**tensors: torch.Tensor) -> dict[str, int]:
        return {name: tensor.data_ptr() for name, tensor in tensors.items()}

    with cuda_emulation.lent(emulated):
        for bits in BITS:
            for rows, columns, group_size in ((16, 128, 128), (17, 96, 32), (33, 320, 64), (5, 52, 40)):
                quantized = some_weight(rows, columns, bits, group_size, symmetric=False)
                codes, scales, zero_points = (ends(of) for of in quantized if of is not None)
                weight, out = ends(torch.randn(rows, columns)), ends(torch.empty(rows, columns))
                written = [ends(of) for of in kernels.quantize(weight, bits=bits, group_size=group_size, symmetric=False)]
                packed, flag = ends(kernels.pack(codes, bits)), ends(torch.zeros(1, dtype=torch.int32))
                sizes = {"rows": rows, "columns": columns, "group_size": group_size, "n_groups": scales.shape[1], "bits": bits}
                calls = {
                    "quantize": QuantizeArguments(
                        **addresses(weight=weight, codes=written[0], scales=written[1], zero_points=written[2], not_finite=flag),
                        **sizes,
                        rows_per_importance=1,
                        half_scales=True,
                    ),
                    "pack": PackArguments(**addresses(source=codes, target=packed, seen=flag), numel=codes.numel(), bits=bits),
                    "unpack": PackArguments(**addresses(source=packed, target=written[0]), numel=codes.numel(), bits=bits),
                    "dequantize": DequantizeArguments(
                        **addresses(packed=packed, scales=scales, zero_points=zero_points, weight=out), **sizes, half_scales=True
                    ),
                    "rotate": RotateArguments(
                        **addresses(x=weight, factors=ends(torch.randn(columns)), y=out), rows=rows, columns=columns
                    ),
                }
                for name, arguments in calls.items():
                    cuda_backend.call(name, weight, arguments)
                data = ends(kernels.pack_weight(codes, scales, zero_points, bits=bits, group_size=group_size).data)
                format = WeightFormat(rows, columns, bits, group_size, half_scales=True, symmetric=False)
                for dtype, n_tokens in ((torch.float16, 1), (torch.bfloat16, 17), (torch.float32, 2), (torch.float32, 300)):
                    x, y = ends(torch.randn(n_tokens, columns).to(dtype)), ends(torch.empty(n_tokens, rows, dtype=dtype))
                    bias = ends(torch.randn(rows))
                    cuda_backend.linear(x, data, y, bias, format, None)
                    if n_tokens < 20:  # int8 input: symmetric, and not, with a grid of its own for each token
                        cuda_backend.linear(x, data, y, bias, format, InputFormat())
                        cuda_backend.linear(x, data, y, bias, format, InputFormat(None, 15, 0))


def test_a_barrier_that_not_all_threads_reach_is_an_error(emulated: cuda_backend.Library) -> None:
    """What the emulator promises, shown on a kernel that breaks it."""
    assert emulated.functions.mpsearch_broken_kernel(1) == 0
    with pytest.raises(RuntimeError, match="'broken_kernel' could not be run: threads wait for one another forever"):
        emulated.check("broken_kernel", emulated.functions.mpsearch_broken_kernel(0))


def test_half_input_is_for_gpus(emulated: cuda_backend.Library) -> None:
    packed, _, _ = some_packed("cpu", 3, 64, 32, bits=4, symmetric=False)
    x = torch.ones(2, 64, dtype=torch.float16)
    with pytest.raises(InputError, match=r"x must be float32 .*; got float16 \[2, 64\]"):
        kernels.linear(x, packed)
    with cuda_emulation.lent(emulated):
        assert kernels.linear(x, packed).dtype == torch.float16


def test_reference_can_be_forced(emulated: cuda_backend.Library, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("the library was called")

    monkeypatch.setattr(cuda_backend.Library, "call", refuse)
    with cuda_emulation.lent(emulated), kernels.use_backend("reference"):
        kernels.pack(torch.ones(9, dtype=torch.uint8), 3)
