"""Products with packed weights against PyTorch's, ONNX Runtime's and ggml's."""

import itertools
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence

import matmul_peers
import torch
import torch.nn.functional as F
from harness import Row, benchmark, compared, interleaved, ratio_row
from torch import Tensor

from mpsearch import kernels

GROUP_SIZE = matmul_peers.GROUP_SIZE
COLD_BYTES = 80_000_000  # of all copies of a weight together, so that weights come from memory
FLOAT, INT8, READ = "torch float32", "torch dynamic int8", "read"
Calls = dict[str, Callable[[], object]]


def in_turn(call: Callable[[int], object], n_copies: int) -> Callable[[], object]:
    """Calls on copy 0, 1, … of a weight, and from the first again."""
    turns = itertools.cycle(range(n_copies))
    return lambda: call(next(turns))


def n_copies(n_bytes: float, cold: bool) -> int:
    """How many copies of a weight of so many bytes are used in turn; one where it should stay in the caches."""
    return int(COLD_BYTES // n_bytes) + 1 if cold else 1


def packed_calls(weight: Tensor, x: Tensor, cold: bool, widths: Sequence[int] = range(1, 9)) -> tuple[Calls, dict[str, int]]:
    """Our products with float32 and with int8 inputs, and the bytes of each weight."""
    calls, n_bytes = Calls(), {}
    for bits in widths:
        quantized = kernels.quantize(weight, bits=bits, group_size=GROUP_SIZE, symmetric=False)
        copies = [kernels.pack_weight(*quantized, bits=bits, group_size=GROUP_SIZE)]
        n = n_copies(copies[0].nbytes, cold)
        copies += [kernels.pack_weight(*quantized, bits=bits, group_size=GROUP_SIZE) for _ in range(n - 1)]
        for name, product in {f"w{bits}": kernels.linear, f"w{bits}a8": kernels.linear_a8}.items():
            calls[name] = in_turn(lambda i, product=product, copies=copies: product(x, copies[i]), n)
            n_bytes[name] = copies[0].nbytes
    return calls, n_bytes


def torch_calls(weight: Tensor, x: Tensor, cold: bool) -> Calls:
    """PyTorch's float32 and int8 products, and a dot product that reads as much memory as the float32 one."""
    torch.backends.quantized.engine = "fbgemm"
    floats = [weight.clone() for _ in range(n_copies(weight.nbytes, cold))]
    warnings.filterwarnings("ignore", message="torch.quantize_per_tensor")  # deprecated; the product is what is measured
    quantized = torch.quantize_per_tensor(weight, float(weight.abs().max()) / 127, 0, torch.qint8)
    int8 = [torch.ops.quantized.linear_prepack(quantized, None) for _ in range(n_copies(weight.numel(), cold))]
    flat = torch.cat([copy.flatten() for copy in floats])
    return {
        FLOAT: in_turn(lambda i: F.linear(x, floats[i]), len(floats)),
        INT8: in_turn(lambda i: torch.ops.quantized.linear_dynamic(x, int8[i]), len(int8)),
        READ: lambda: torch.dot(flat, flat),
    }


@benchmark(
    "matmul",
    tokens=(1, 4, 16, 64, 256),
    threads=(1, 2),
    size=(4096,),
    seconds=(0.3,),
    quick={"tokens": (1,), "threads": (1,), "size": (256,), "seconds": (0.001,)},
)
def matmul(tokens: int, size: int, seconds: float) -> Iterator[Row]:
    """Products with packed weights of 1 to 8 bits against PyTorch's float32 and dynamic int8, interleaved in this process.

    Groups of 128, asymmetric, float16 scales; with float32 input (`w4`) and with the input quantized to int8 (`w4a8`). Every
    call is on the next of several copies of its weight, so that weights come from memory. For one token also the rate at which
    packed weights are read, against a dot product's.
    """
    torch.manual_seed(0)
    weight, x = torch.randn(size, size) / size**0.5, torch.randn(tokens, size)
    ours, n_bytes = packed_calls(weight, x, cold=True)
    times = interleaved(ours | torch_calls(weight, x, cold=True), seconds)
    read = n_copies(weight.nbytes, True) * weight.nbytes / times.pop(READ)
    yield from compared(times, (FLOAT, INT8))
    for name in ours if tokens == 1 else ():
        rate = n_bytes[name] / times[name]
        row = {"what": "weights read", "case": name, "value": rate / 1e9, "unit": "GB/s", "rival": READ}
        yield row | {"rival_value": read / 1e9, "ratio": rate / read}


@benchmark(
    "matmul_peers",
    shape=("4096x4096 cold", "1536x384 hot", "2304x768 hot", "3072x768 hot"),
    threads=(1, 2),
    seconds=(0.3,),
    quick={"shape": ("256x256 hot",), "threads": (1,), "seconds": (0.001,)},
)
def peers(shape: str, seconds: float) -> Iterator[Row]:
    """One token: products of as many bits with int8 input against PyTorch's, ONNX Runtime's MatMulNBits and ggml's types.

    `cold`: every call is on the next of several copies of its weight; `hot`: the weight stays in the caches, calls included.
    Peers that are not installed (`pip install -e ".[bench]"`) are left out.
    """
    torch.manual_seed(0)
    rows, columns = map(int, shape.split()[0].split("x"))
    cold = shape.endswith("cold")
    weight, x = torch.randn(rows, columns) / columns**0.5, torch.randn(1, columns)
    ours, _ = packed_calls(weight, x, cold)
    theirs = {name: call for name, call in torch_calls(weight, x, cold).items() if name != READ}
    y = F.linear(x, weight)
    for name, (call, copies) in matmul_peers.peers(weight, x, lambda n: n_copies(n, cold), torch.get_num_threads()).items():
        error = float((call(0).reshape(y.shape) - y).norm() / y.norm())
        if not error < 1:
            raise SystemExit(f"{name} is {error:.2f} of the product off it: not the same product.")
        theirs[name] = in_turn(call, copies)
    times = interleaved(ours | theirs, seconds)
    for name in theirs:
        own = f"w{matmul_peers.BITS.get(name, 4)}a8"
        yield {"case": own} | ratio_row(times[own], name, times[name], "us")


@benchmark(
    "matmul_calls",
    what=("call", "packing", "busy"),
    size=(4096,),
    seconds=(0.3,),
    quick={"what": ("call", "packing", "busy"), "size": (256,), "seconds": (0.001,)},
)
def calls(what: str, size: int, seconds: float) -> Iterator[Row]:
    """What a call costs apart from its kernel, packing against copying the float32 weight, and slow calls on a busy machine.

    `call`: a product so small that it is all call, against PyTorch's. `busy`: the 95th percentile on 2 threads while another
    process keeps a core busy, against the median on one thread of a quiet machine.
    """
    weight, x = torch.randn(size, size), torch.randn(1, size)
    if what == "call":
        small, few = torch.randn(8, 128), torch.randn(1, 128)
        ours, _ = packed_calls(small, few, cold=False, widths=(4,))
        yield from compared(interleaved(ours | {FLOAT: lambda: F.linear(few, small)}, seconds, most=20_000), (FLOAT,), "us")
    elif what == "packing":
        copy = torch.empty_like(weight)
        for bits in range(1, 9):
            quantized = kernels.quantize(weight, bits=bits, group_size=GROUP_SIZE, symmetric=False)
            packed = kernels.pack_weight(*quantized, bits=bits, group_size=GROUP_SIZE)
            work: Calls = {
                f"pack w{bits}": lambda q=quantized, bits=bits: kernels.pack_weight(*q, bits=bits, group_size=GROUP_SIZE),
                f"unpack w{bits}": lambda packed=packed: kernels.unpack_weight(packed),
                "copy": lambda: copy.copy_(weight),
            }
            yield from compared(interleaved(work, seconds), ("copy",))
    else:
        yield from busy(weight, x, 400 if seconds > 0.1 else 20)


def busy(weight: Tensor, x: Tensor, n_calls: int) -> Iterator[Row]:
    """Slow calls while another process keeps a core busy."""
    work, _ = packed_calls(weight, x, cold=True, widths=(2, 4, 8))
    work[INT8] = torch_calls(weight, x, cold=True)[INT8]

    def times(call: Callable[[], object]) -> list[float]:
        taken = []
        for _ in range(n_calls):
            start = time.perf_counter()
            call()
            taken.append(time.perf_counter() - start)
        return taken

    quiet = {name: statistics.median(times(call)) for name, call in work.items()}
    torch.set_num_threads(2)
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as process:
        slow = {name: statistics.quantiles(times(call), n=20)[-1] for name, call in work.items()}
        process.kill()
    torch.set_num_threads(1)
    for name in work:
        yield {"case": name} | ratio_row(slow[name], "quiet median, 1 thread", quiet[name])
