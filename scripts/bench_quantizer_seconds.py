"""What the default quantizer takes for a layer, against GPTQ and against its arithmetic."""

import functools
import time
from collections.abc import Iterator

import torch
from harness import Row, benchmark
from networks import choice, load
from torch import Tensor

from mpsearch.engine.calibrate import hessians, output_fishers
from mpsearch.layer import weight_rows
from mpsearch.quantizers.base import InputMoments, Quantizer
from mpsearch.quantizers.gptq import damped_by
from mpsearch.schemes.base import QuantizedTensor

LAYERS = {"576x576": "q_proj", "1536x576": "up_proj", "576x1536": "down_proj"}  # of SmolLM2's block 20
BLOCK = "layers.20."
Matrices = tuple[Tensor, Tensor, Tensor]  # weight, Hessian, output Fisher


@functools.cache
def smollm2() -> dict[str, Matrices]:
    """The layers of `LAYERS` with the matrices of the calibration data."""
    calibration = load("smollm2", ("w3",), "round_to_nearest", n_calibration=4).bank.calibration
    names = {end: la.name for la in calibration.layers for end in LAYERS.values() if BLOCK in la.name and la.name.endswith(end)}
    model, task, batches = calibration.model, calibration.task, calibration.batches
    inputs = hessians(model, task, list(names.values()), batches)
    outputs = output_fishers(model, task, list(names.values()), batches, calibration.divergence)
    return {
        size: (weight_rows(model.get_submodule(names[end])).detach().float(), inputs[names[end]], outputs[names[end]])
        for size, end in LAYERS.items()
    }


def synthetic(rows: int, columns: int) -> Matrices:
    """Gaussian weights, inputs and gradients; an eighth as many directions as there are values hold most of the variance."""
    torch.manual_seed(0)

    def covariance(n: int) -> Tensor:
        x = torch.randn(2 * n, n) + 0.3 * torch.randn(2 * n, n // 8) @ torch.randn(n // 8, n)
        return (x.T @ x / len(x))[None]

    return 0.02 * torch.randn(rows, columns), covariance(columns), covariance(rows)


def seconds_of(
    quantizer: Quantizer, scheme: object, weight: Tensor, moments: InputMoments
) -> tuple[QuantizedTensor, float, float]:
    """The quantized weight, seconds, and seconds of the processors."""
    start, cpu_start = time.perf_counter(), time.process_time()
    quantized = quantizer.quantize(weight, scheme, moments)  # type: ignore[arg-type]
    return quantized, time.perf_counter() - start, time.process_time() - cpu_start


def multiply_seconds(rows: int, columns: int, n_passes: int) -> float:
    """What PyTorch's float32 products take for the quantizer's multiplications, no code being skipped in any pass."""
    by_rows, by_columns = rows * rows * columns, rows * columns * columns
    n = 1.5 * by_columns + 0.5 * by_rows + n_passes * (by_rows + 2 * by_columns)  # first codes and sums; passes and fits
    a = torch.randn(1024, 1024)
    times = []
    for _ in range(7):
        start = time.perf_counter()
        torch.mm(a, a)
        times.append(time.perf_counter() - start)
    return n * sorted(times)[3] / 1024**3


@benchmark(
    "quantizer_seconds",
    size=(*LAYERS, "4096x4096"),
    scheme=("w3", "w3g64"),
    threads=(1, 2),
    n=(3,),
    quick={"size": ("64x96",), "scheme": ("w3",), "threads": (1,), "n": (1,)},
)
def quantizer_seconds(size: str, scheme: str, n: int) -> Iterator[Row]:
    """Seconds of one layer and scheme by `kronecker_descent`, and by GPTQ in the same run; the least of `n` turns.

    The first scheme of a layer factors its matrices, further ones share them. Layers of SmolLM2 have their own Hessians and
    output Fishers, other sizes synthetic ones. `error` is tr(G E H E^T), `damped` with what the quantizer adds to the diagonals,
    both as a part of GPTQ's. `bound_ratio` is the time in units of the quantizer's multiplications by PyTorch's float32 products.
    """
    rows, columns = map(int, size.split("x"))
    weight, hessian, fisher = smollm2()[size] if size in LAYERS else synthetic(rows, columns)
    ours, gptq = choice("quantizer", "kronecker_descent"), choice("quantizer", "gptq")
    second = hessian.diagonal(dim1=1, dim2=2).contiguous()
    times: dict[tuple[str, str], list[tuple[float, float]]] = {}
    errors = {}
    for _ in range(n):
        moments = InputMoments(torch.zeros_like(second), second, hessian=hessian, fisher=fisher)
        for case in ("first scheme", "further scheme"):
            for quantizer in (ours, gptq):
                name = type(quantizer).__name__
                quantized, *taken = seconds_of(quantizer, choice("scheme", scheme), weight, moments)
                times.setdefault((case, name), []).append((taken[0], taken[1]))
                errors[name] = (quantized.dequantize() - weight).double()
    pairs = (hessian[0].double(), fisher[0].double())
    damped = (damped_by(hessian.double(), ours.damping)[0], damped_by(fisher.double(), ours.output_damping)[0])
    error, with_damping = (
        [float((g * (e @ h @ e.T)).sum()) for e in (errors["KroneckerDescent"], errors["GPTQ"])] for h, g in (pairs, damped)
    )
    bound = multiply_seconds(rows, columns, ours.n_passes)
    for case in ("first scheme", "further scheme"):
        (value, cpu), (rival, rival_cpu) = (min(times[case, name]) for name in ("KroneckerDescent", "GPTQ"))
        row = {"case": case, "value": value, "unit": "s", "rival": "gptq", "rival_value": rival, "ratio": rival / value}
        row |= {"cpu_seconds": cpu, "rival_cpu_seconds": rival_cpu, "bound_ratio": value / bound}
        yield row | {"error": error[0] / error[1], "damped": with_damping[0] / with_damping[1]}
