"""The kernels that quantize, round and rotate, against the same work in PyTorch."""

import functools
import time
from collections.abc import Callable, Iterator

import torch
from harness import Row, benchmark, compared, interleaved, ratio_row
from networks import packed_copy
from torch import Tensor, nn

from mpsearch import kernels
from mpsearch.kernels import reference_rotation
from mpsearch.quantizers.gptq import triangular_feedback
from mpsearch.schemes.base import QuantScheme
from mpsearch.schemes.input import IntegerInput
from mpsearch.schemes.integer import Integer
from mpsearch.schemes.rotated import Rotated

BITS, GROUP_SIZE, TOP = 4, 128, 15
OPTIONS = {"bits": BITS, "group_size": GROUP_SIZE, "symmetric": False, "scale_dtype": torch.float16}
TORCH = "torch"
Calls = dict[str, Callable[[], object]]


def grid(low: Tensor, high: Tensor, ratio: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """Scale, its inverse and the zero point of each group."""
    scale = ((high - low) / TOP * ratio).half().float()
    inverse = 1 / scale
    return scale, inverse, torch.round(torch.clamp(-low * ratio * inverse, 0, TOP))


def bounds(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The weight's groups `[n, GROUP_SIZE]`, and the least and largest value of each, 0 among them."""
    groups = weight.view(-1, GROUP_SIZE)
    low, high = groups.aminmax(dim=1, keepdim=True)
    return groups, low.clamp_(max=0), high.clamp_(min=0)


def min_max(weight: Tensor) -> Tensor:
    """Codes uint8 by rounding to nearest in the range of each group."""
    groups, low, high = bounds(weight)
    _, inverse, zero = grid(low, high)
    return (groups * inverse).add_(zero).clamp_(0, TOP).round_().to(torch.uint8).view_as(weight)


def clip_search(weight: Tensor, ratios: list[float]) -> tuple[Tensor, Tensor]:
    """Scale and zero point of each group, those of the clip ratio with the least squared error."""
    groups, low, high = bounds(weight)
    least = torch.full_like(low, torch.inf)
    best_scale, best_zero = torch.zeros_like(low), torch.zeros_like(low)
    for ratio in ratios:
        scale, inverse, zero = grid(low, high, ratio)
        position = (groups * inverse).add_(zero)
        error = position.clamp(0, TOP).round_().sub_(position).square_().sum(1, keepdim=True).mul_(scale).mul_(scale)
        better = error < least
        least, best_scale = torch.where(better, error, least), torch.where(better, scale, best_scale)
        best_zero = torch.where(better, zero, best_zero)
    return best_scale, best_zero


def work(name: str, rows: int, columns: int) -> tuple[Calls, float]:
    """Ours, PyTorch's, and the bytes that must be read and written."""
    torch.manual_seed(0)
    weight = torch.randn(rows, columns)
    codes, scales, zero_points = kernels.quantize(weight, **OPTIONS)
    packed, n = kernels.pack(codes, BITS), weight.numel()
    if name == "min-max":
        return {name: lambda: kernels.quantize(weight, **OPTIONS)[0], TORCH: lambda: min_max(weight)}, 5 * n
    if name.startswith("clip search"):
        quarter, ratios = weight[: max(rows // 4, 1)], torch.linspace(1, 0.4, int(name.split()[-2]))
        calls: Calls = {name: lambda: kernels.quantize(quarter, ratios=ratios, **OPTIONS)}
        return calls | {TORCH: lambda: clip_search(quarter, ratios.tolist())}, 5 * quarter.numel()
    pairs = codes.view(-1, 2)
    if name == "pack":
        return {name: lambda: kernels.pack(codes, BITS), TORCH: lambda: pairs[:, 0] | (pairs[:, 1] << 4)}, 1.5 * n

    def unpacked() -> Tensor:
        return torch.stack((packed & 15, packed >> 4), dim=1).view(-1)

    if name == "unpack":
        return {name: lambda: kernels.unpack(packed, BITS, n), TORCH: unpacked}, 1.5 * n
    shape = {"bits": BITS, "rows": rows, "columns": columns, "group_size": GROUP_SIZE}
    zeros, steps = zero_points.view(-1, 1), scales.view(-1, 1)
    calls = {name: lambda: kernels.dequantize(packed, scales, zero_points, **shape)}
    calls[TORCH] = lambda: unpacked().view(-1, GROUP_SIZE).float().sub_(zeros).mul_(steps).view(rows, columns)
    return calls, 4.5 * n


@benchmark(
    "quantize",
    case=("min-max", "clip search, 20 ratios", "clip search, 80 ratios", "pack", "unpack", "dequantize"),
    threads=(1, 2),
    rows=(4096,),
    columns=(11008,),
    seconds=(1.0,),
    quick={"threads": (1,), "rows": (8,), "columns": (256,), "seconds": (0.001,)},
)
def quantize(case: str, rows: int, columns: int, seconds: float) -> Iterator[Row]:
    """Quantization kernels against the same in PyTorch: 4 bits, groups of 128, asymmetric, float16 scales.

    PyTorch reuses the buffers that it can, and its search keeps only scale and zero point. The clip search takes a quarter of the
    rows. GB/s are of the bytes that must be read and written.
    """
    calls, n_bytes = work(case, rows, columns)
    ours, theirs = (call() for call in calls.values())  # the rival must do the same work, or its time says nothing
    same = ours == theirs if isinstance(theirs, Tensor) else ours[1].flatten() == theirs[0].flatten()
    if same.float().mean() < 0.99:  # a search adds errors up in another order: now and then another ratio wins
        raise AssertionError(f"{case}: PyTorch computes something else.")
    source = torch.empty(rows, columns)
    target = torch.empty_like(source)
    times = interleaved({**calls, "copy": lambda: target.copy_(source)}, seconds, most=25)
    copied, rate = 2 * source.nbytes / times["copy"], n_bytes / times[case]
    yield ratio_row(times[case], TORCH, times[TORCH])
    row = {"what": "bytes moved", "value": rate / 1e9, "unit": "GB/s", "rival": "copy"}
    yield row | {"rival_value": copied / 1e9, "ratio": rate / copied}


def column_loop(weight: Tensor, feedback: Tensor, scale: Tensor) -> Tensor:
    """The plain loop: every column's error goes to all later columns at once."""
    w, codes, zero = weight.clone(), torch.empty(weight.shape, dtype=torch.uint8), 2.0 ** (BITS - 1)
    columns = feedback.T.contiguous()  # row i: what an error of column i does to each other
    for i in range(w.shape[1]):
        code = (w[:, i] / scale + zero).round().clamp(0, TOP)
        w[:, i + 1 :].addr_((code - zero) * scale - w[:, i], columns[i, i + 1 :], alpha=-1)
        codes[:, i] = code
    return codes


def blocked_loop(weight: Tensor, feedback: Tensor, scale: Tensor, block: int = 128) -> Tensor:
    """GPTQ's own blocking (Frantar et al. 2023, section 3.3): the plain loop within a block, the rest by a matrix product."""
    w, codes, zero = weight.clone(), torch.empty(weight.shape, dtype=torch.uint8), 2.0 ** (BITS - 1)
    for begin in range(0, w.shape[1], block):
        part = slice(begin, min(begin + block, w.shape[1]))
        codes[:, part] = column_loop(w[:, part], feedback[part, part], scale)
        # In this form the error that is fed back is that of the original weight.
        error = (codes[:, part].float() - zero) * scale[:, None] - weight[:, part]
        w[:, part.stop :].addmm_(error, feedback[part.stop :, part].T, alpha=-1)
    return codes


@benchmark("quantizers_speed", size=(4096,), seconds=(1.0,), quick={"size": (64,), "seconds": (0.001,)})
def quantizers_speed(size: int, seconds: float) -> Iterator[Row]:
    """Rounding with error feedback (GPTQ) at 4 bits, against loops in PyTorch; and factoring the Hessian, which PyTorch does."""
    torch.manual_seed(0)
    weight, x = torch.randn(size, size), torch.randn(size + 100, size).cumsum(1) * 0.1
    hessian = (x.T @ x / len(x)).double()
    hessian.diagonal().add_(0.01 * hessian.diagonal().mean())
    start = time.perf_counter()
    feedback = triangular_feedback(hessian[None])
    yield {"case": "factor of the Hessian", "value": time.perf_counter() - start, "unit": "s"}
    scale = weight.abs().amax(1) / 7
    zeros, groups = torch.full((size, 1), 8.0), torch.zeros(size, dtype=torch.int32)
    calls: Calls = {
        "rounding with feedback": lambda: kernels.round_with_feedback(
            weight, feedback, scale[:, None].contiguous(), zeros, groups, bits=BITS
        ),
        "column loop in torch": lambda: column_loop(weight, feedback[0], scale),
        "blocked loop in torch": lambda: blocked_loop(weight, feedback[0], scale),
    }
    yield from compared(interleaved(calls, seconds), list(calls)[1:], "s")


def proximal(groups: Tensor, scale: Tensor, zero: Tensor, n_steps: int) -> Tensor:
    """HQQ's inner loop as its authors publish it (mobiusml/hqq, `optimize_weights_proximal`, p = 0.7), without the early stop."""
    beta, per_step = 10.0, 1 / scale
    for _ in range(n_steps):
        codes = torch.round(groups * per_step + zero).clamp(0, TOP)
        error = groups - (codes - zero) / per_step
        split = torch.sign(error) * torch.nn.functional.relu(error.abs() - (1.0 / beta) * error.abs().pow(0.7 - 1))
        zero = torch.mean(codes - (groups - split) * per_step, dim=1, keepdim=True)
        beta *= 1.01
        error.abs().mean().item()
    return torch.round(groups * per_step + zero).clamp(0, TOP)


@benchmark(
    "quantizers_hqq",
    threads=(1, 2),
    size=(4096,),
    steps=(20,),
    seconds=(1.0,),
    quick={"threads": (1,), "size": (64,), "steps": (2,), "seconds": (0.001,)},
)
def quantizers_hqq(size: int, steps: int, seconds: float) -> Iterator[Row]:
    """Half-quadratic fitting of zero points at 4 bits, groups of 64, against its authors' PyTorch."""
    torch.manual_seed(0)
    weight = torch.randn(size, size)
    _, scales, zeros = kernels.quantize(weight, bits=BITS, group_size=64, symmetric=False)
    options = {"bits": BITS, "group_size": 64, "fit_zeros": True, "n_steps": steps, "beta": 50.0, "growth": 1.01}
    groups = (weight.view(-1, 64), scales.float().view(-1, 1), zeros.float().view(-1, 1))
    calls: Calls = {
        "half-quadratic fitting": lambda: kernels.half_quadratic(weight, scales, zeros.float(), **options),
        "torch": lambda: proximal(*groups, steps),
    }
    yield from compared(interleaved(calls, seconds), ["torch"], "s")


def by_blocks(x: Tensor, blocks: list[Tensor]) -> Tensor:
    """A matrix product for each block of the rotation."""
    parts = x.split([len(block) for block in blocks], -1)
    return torch.cat([part @ block for part, block in zip(parts, blocks, strict=True)], dim=-1) if blocks[1:] else x @ blocks[0]


@benchmark(
    "rotation_speed",
    columns=(64, 384, 1024, 1536, 4096),
    tokens=(1, 256),
    seconds=(0.2,),
    quick={"columns": (64,), "tokens": (1,), "seconds": (0.001,)},
)
def rotation_speed(columns: int, tokens: int, seconds: float) -> Iterator[Row]:
    """The rotation kernel against PyTorch, and packed square layers with a rotated input against the same without.

    One thread, by its time on the processor.
    """
    whole, sizes = kernels.rotate(torch.eye(columns)), kernels.blocks_of(columns)
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    blocks = [whole[i : i + n, i : i + n].contiguous() for i, n in zip(starts, sizes, strict=True)]
    x = torch.randn(tokens, columns)
    calls: Calls = {
        "rotation": lambda: kernels.rotate(x),
        "torch, x @ H": lambda: by_blocks(x, blocks),
        "torch, butterflies": lambda: reference_rotation.rotate(x, False),
    }
    yield from compared(interleaved(calls, seconds, clock=time.thread_time), list(calls)[1:])
    schemes: dict[str, QuantScheme] = {"w4": Integer(4), "w4a8": Integer(4, input=IntegerInput(8))}
    calls = {}
    layer = nn.Sequential(nn.Linear(columns, columns)).eval()
    for name, scheme in (schemes | {f"{name}r": Rotated(scheme) for name, scheme in schemes.items()}).items():
        calls[name] = functools.partial(packed_copy(layer, {"0": scheme}), x)
    with torch.no_grad():
        times = interleaved(calls, seconds, clock=time.thread_time)
    for name in schemes:
        yield {"case": f"packed layer {name}r"} | ratio_row(times[f"{name}r"], name, times[name])
