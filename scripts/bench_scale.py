"""What a search of larger language models would take, from what each phase of a measured run took."""

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from harness import REPORTS, Row, UnavailableError, benchmark

import mpsearch
from mpsearch.allocation import SearchSpace
from mpsearch.engine.fisher_blocks import fisher_blocks
from mpsearch.models.digits import digits
from mpsearch.progress import Phase, read_phases
from mpsearch.quantizers.kronecker_descent import KroneckerDescent
from mpsearch.runs.run import Run
from mpsearch.tasks.digits import Digits

Shapes = Sequence[tuple[int, int]]
MODELS = {  # name -> (blocks, width, key and value width, hidden width, vocabulary), as their config.json files say
    "Llama-3.2-1B": (16, 2048, 512, 8192, 128_256),
    "Llama-3.1-8B": (32, 4096, 1024, 14_336, 128_256),
}
WITH_DENSE = ("search", "additive solutions", "uniform allocations", "test proposals", "refine", "confirm first", "confirm")


def shapes_of(model: str) -> Shapes:
    """(rows, columns) of the searched layers of a Llama; embedding and head are one."""
    blocks, width, narrow, hidden, vocabulary = MODELS[model]
    attention = [(width, width), (narrow, width), (narrow, width), (width, width)]
    return [*blocks * [*attention, (hidden, width), (hidden, width), (width, hidden)], (vocabulary, width)]


def shapes_in(space: SearchSpace) -> Shapes:
    """(rows, columns) of the searched layers."""
    return [(layer.shape[0], layer.numel // layer.shape[0]) for group in space.groups for layer in group.layers]


def weights(shapes: Shapes) -> int:
    """How many there are."""
    return sum(rows * columns for rows, columns in shapes)


def largest(shapes: Shapes) -> int:
    """How many the largest layer has."""
    return max(rows * columns for rows, columns in shapes)


def work(shapes: Shapes) -> float:
    """The multiplications that the default quantizer takes for one scheme."""
    quantizer = KroneckerDescent()
    return sum(n * quantizer.work(rows // n, columns) for rows, columns in shapes for n in [fisher_blocks(rows)])


def matrix_bytes(shapes: Shapes) -> int:
    """Of Hessians and output Fishers, which lie in files."""
    return sum(4 * (columns**2 + rows**2 // fisher_blocks(rows)) for rows, columns in shapes)


def of_run(folder: str) -> tuple[Run, list[Phase]]:
    """A committed run; "" is a new one of seconds."""
    if folder:
        path = REPORTS / folder
        if not (path / "space.json").exists():
            raise UnavailableError(f"there is no run in {path}")
        return Run.load(path), read_phases(path)
    with tempfile.TemporaryDirectory() as path:
        mpsearch.search(digits(), Digits(), schemes=["w2", "w4"], n_trials=4, n_seeds=2, folder=Path(path) / "run")
        return Run.load(Path(path) / "run"), read_phases(Path(path) / "run")


@benchmark("scale", folder=("smollm2_wikitext2",), quick={"folder": ("",)})
def scale(folder: str) -> Iterator[Row]:
    """Seconds and memory of each phase of a run, and what they would be for larger networks on this machine.

    The same schemes, windows, trials and confirmed points are assumed. Passes over the data take time in proportion to the
    weights, quantizing and refining in proportion to the multiplications of the default quantizer; passes for Hessians within the
    phase "quantize" are counted as passes. Memory is what the process holds apart from mapped files: what the run held, and four
    bytes more for each weight more of the largest layer, or of all layers in phases that hold an allocation's dense weights.
    "files" are the float weights, the quantized weights of all schemes, and Hessians and output Fishers.
    """
    run, phases = of_run(folder)
    space = run.space
    shapes = shapes_in(space)
    passes = sum(p.seconds for p in phases if p.what in ("hessians", "output fishers"))
    names = [name for name in dict.fromkeys(p.what for p in phases) if name not in ("hessians", "output fishers", "sensitivity")]
    for model in (folder or "digits", *MODELS):
        others = shapes_of(model) if model in MODELS else shapes
        more, harder = weights(others) / weights(shapes), work(others) / work(shapes)
        total, most = 0.0, 0.0
        for name in names:
            seconds = sum(p.seconds for p in phases if p.what == name)
            if name == "quantize":
                taken = max(seconds - passes, 0.0) * harder + passes * more
            else:
                taken = seconds * (harder if name == "refine" else more)
            dense = weights if name in WITH_DENSE else largest
            held = max(p.peak_bytes or 0 for p in phases if p.what == name) + 4 * (dense(others) - dense(shapes))
            total, most = total + taken, max(most, held)
            yield {"what": model, "case": f"{model}, {name}", "value": taken / 3600, "unit": "hours", "memory_gb": held / 1e9}
        bits = sum(scheme.weight_bits for scheme in space.schemes.values())
        files = ((4 + bits / 8) * weights(others) + matrix_bytes(others)) / 1e9
        about = {"memory_gb": most / 1e9, "files_gb": files, "weights": weights(others)}
        yield {"what": model, "case": f"{model}, in all", "value": total / 3600, "unit": "hours", **about}
