"""What quantizers, schemes, equalizers and rotations make of trained networks, on data that nothing else is done with."""

from collections.abc import Iterator
from typing import Any

from harness import REPORTS, Row, benchmark
from networks import choice, confirmed, load, quality_row, quantize_all, weight_decibels

from mpsearch.intervals import paired_interval
from mpsearch.optimize.knapsack import solve
from mpsearch.pipeline.sensitivity import measure_sensitivity
from mpsearch.runs.run import Run

QUANTIZERS = ("round_to_nearest", "hqq", "clip_search", "gptq", "adaround", "coordinate_descent", "kronecker_descent")
THREE = ("round_to_nearest", "clip_search", "coordinate_descent")
EMBEDDINGS = {"stories260k": "embed*|*head", "minilm": "*embeddings*"}  # stay float where only other layers are compared
CHART = {"x": "bits", "y": "kl", "line": "quantizer", "panel": "network"}
SPLITS: dict[str, dict[str, Any]] = {
    "digits": {},
    "resnet20": {"n_calibration": 1000},
    "stories260k": {"n_calibration": 64, "n_search": 1, "n_confirm": 64},
    "minilm": {"n_calibration": 200, "n_search": 50, "n_confirm": 500},
    "efficientnet_lite0": {"n_calibration": 100, "n_search": 28},
}
ALL = SPLITS | {"minilm": {}, "efficientnet_lite0": {}}  # all data that are left confirm
FEWER = SPLITS | {  # where there are many schemes
    "resnet20": {"n_calibration": 1000, "n_confirm": 1000},
    "stories260k": {"n_calibration": 64, "n_search": 1, "n_confirm": 32},
}
UNIFORM = {
    "digits": ("w2", "w4"),
    "resnet20": ("w2", "w3", "w4"),
    "stories260k": ("w2", "w3", "w3g64", "w4"),
    "minilm": ("w3",),
    "efficientnet_lite0": ("w4",),
}


@benchmark(
    "quantizers",
    network=("stories260k", "minilm", "resnet20", "efficientnet_lite0"),
    quantizer=QUANTIZERS,
    quick={"network": ("digits",), "quantizer": ("clip_search", "gptq")},
    chart=CHART,
)
def quantizers(network: str, quantizer: str) -> Iterator[Row]:
    """Each quantizer on uniform allocations; quality, KL and the processor seconds that quantizing takes.

    Embeddings stay float. Intervals are paired with the float model. Bits are those of the quantized layers, scales counted.
    Seconds are of one scheme; those of a quantizer's first scheme include its Hessians.
    """
    if quantizer == "adaround" and network in ("minilm", "efficientnet_lite0"):
        return  # takes hours
    engine = load(network, UNIFORM[network], quantizer, "none", EMBEDDINGS.get(network, ""), **ALL[network])
    for scheme in UNIFORM[network]:
        seconds = quantize_all(engine, (scheme,))
        yield {"case": scheme, **quality_row(engine, engine.space.uniform(scheme)), "cpu_seconds": seconds}


@benchmark(
    "mixed",
    network=("resnet20",),
    quantizer=("coordinate_descent", "kronecker_descent"),
    target=(3.0, 3.5, 4.0),
    quick={"network": ("digits",), "quantizer": ("clip_search",), "target": (3.0,)},
)
def mixed(network: str, quantizer: str, target: float) -> Iterator[Row]:
    """The exact additive solution of diagonal Fisher sensitivities at `target` average bits."""
    engine = load(network, ("w2", "w3", "w4", "w5", "w6", "w8"), quantizer, **SPLITS[network])
    sensitivity = measure_sensitivity(engine, choice("metric", "fisher"))
    chosen = solve(sensitivity.values, engine.space.storage_bits, target * engine.space.numel)
    yield quality_row(engine, engine.space.allocation(chosen))


@benchmark(
    "equalizers",
    network=("efficientnet_lite0", "stories260k", "minilm"),
    equalizer=("none", "cross_layer", "awq", "smooth_quant"),
    quantizer=THREE,
    quick={"network": ("digits",), "equalizer": ("cross_layer",), "quantizer": ("clip_search",)},
    chart={"x": "scheme", "y": "kl", "line": "equalizer", "panel": "network"},
)
def equalizers(network: str, equalizer: str, quantizer: str) -> Iterator[Row]:
    """Channels scaled beforehand: every scheme in all layers, on data that neither calibration nor an equalizer has seen.

    `smooth_quant` is measured with quantized inputs alone, and quantized inputs with clip search alone.
    """
    weights = {"efficientnet_lite0": ("w4", "w8_tensor", "w6_tensor")}.get(network, ("w3", "w4", "w3g64"))
    inputs = ("w8a8_static", "w8a6_static", "w4a8_static", "w4a4_static", "w4a4")
    schemes = ((*weights, *inputs) if equalizer != "smooth_quant" else inputs) if quantizer == "clip_search" else weights
    if equalizer == "smooth_quant" and quantizer != "clip_search":
        return
    engine = load(network, schemes, quantizer, equalizer, **FEWER[network])
    for scheme in schemes:
        yield {"case": scheme, "scheme": scheme, **quality_row(engine, engine.space.uniform(scheme))}


FORMATS = (  # by the bits of a large layer, so that those of about one size follow one another
    *("w1", "ternary", "ternary_g64", "w2", "w3g32", "w3g64o1", "w3g128o1", "w4", "w4g64s", "nf4", "fp4", "mxfp4"),
    *("w4g32s", "nf4_g32", "fp4_g32", "nvfp4", "w4o1", "w6g64s", "mxfp6_e2m3", "mxfp6_e3m2"),
    *("w8", "w8g64s", "fp8_e4m3", "fp8_e5m2", "mxfp8_e4m3", "mxfp8_e5m2", "mxint8"),
)


@benchmark(
    "formats",
    network=("resnet20", "stories260k"),
    quantizer=THREE,
    scheme=FORMATS,
    quick={"network": ("digits",), "quantizer": ("clip_search",), "scheme": ("w4", "nf4")},
    chart=CHART,
)
def formats(network: str, quantizer: str, scheme: str) -> Iterator[Row]:
    """Number formats of weights at about equal bits, every scheme in all layers; scales, zero points, outliers and padding count.

    `weight_db` is the signal to noise ratio of the weights, all weighted alike; the searches minimize errors weighted by the
    inputs' second moments, or of the layer's output.
    """
    engine = load(network, FORMATS, quantizer, **FEWER[network])
    yield quality_row(engine, engine.space.uniform(scheme)) | {"weight_db": weight_decibels(engine, scheme)}


@benchmark(
    "clipping",
    network=("resnet20",),
    quantizer=("round_to_nearest", "entropy", "percentile", "clip_search"),
    scheme=("w3", "w3o1", "w4", "w4o1"),
    quick={"network": ("digits",), "quantizer": ("percentile",), "scheme": ("w3o1",)},
)
def clipping(network: str, quantizer: str, scheme: str) -> Iterator[Row]:
    """Ways to choose the range of weights, with and without 1 % of the weights kept in float16 (`o1`), per-channel scales."""
    engine = load(network, ("w3", "w3o1", "w4", "w4o1"), quantizer, **SPLITS[network])
    yield quality_row(engine, engine.space.uniform(scheme)) | {"weight_db": weight_decibels(engine, scheme)}


INPUTS = (
    *("w8", "w8a8", "fp8_e4m3", "fp8a8", "fp8a8_static", "fp8a8_e5m2", "mxfp8a8", "mxfp4", "mxfp4a8", "mxfp4a4"),
    *("nvfp4", "nvfp4a4", "nvfp4a4r", "w4g16s", "w4g16a4", "w4g16a4r"),
)


def inputs(network: str, scheme: str) -> Iterator[Row]:
    """Number formats of inputs, by clip search; embeddings stay float, scales of weights count and those of inputs do not."""
    engine = load(network, INPUTS, "clip_search", "none", EMBEDDINGS.get(network, ""), **SPLITS[network])
    yield quality_row(engine, engine.space.uniform(scheme)) | {"input_bits": engine.space.schemes[scheme].input_bits}


for _network in ("stories260k", "minilm"):
    _quick = {"network": ("digits",), "scheme": ("fp8a8",)}
    benchmark(f"inputs_{_network}", network=(_network,), scheme=INPUTS, quick=_quick)(inputs)


@benchmark(
    "ranges",
    network=("resnet20",),
    input_bits=(8, 6, 4),
    range=("token", "minmax", "percentile", "mse", "entropy"),
    symmetry=("symmetric", "asymmetric"),
    quick={"network": ("digits",), "input_bits": (4,), "range": ("mse",), "symmetry": ("symmetric",)},
    chart={"x": "input_bits", "y": "kl", "line": "range", "panel": "symmetry"},
)
def ranges(network: str, input_bits: int, range: str, symmetry: str) -> Iterator[Row]:
    """The range of quantized inputs: one for each token at run time, or a static one of calibration; weights of 8 bits."""
    scheme = f"w8a{input_bits}_{range}_{symmetry}"
    engine = load(network, (scheme,), "clip_search", **SPLITS[network])
    yield quality_row(engine, engine.space.uniform(scheme))


def rotation(network: str, quantizer: str, scheme: str) -> Iterator[Row]:
    """The input of every Linear layer rotated, or not; embeddings (and a head tied to one) stay float.

    The ratio is that of the KL divergences. The interval is that of the paired difference, rotated minus plain, of the samples'
    own qualities (nats of a text; parts of the correlation).
    """
    engine = load(network, (scheme, f"{scheme}r"), quantizer, "none", EMBEDDINGS.get(network, ""), **SPLITS[network])
    plain, rotated = (confirmed(engine, engine.space.uniform(name)) for name in (scheme, f"{scheme}r"))
    row = quality_row(engine, engine.space.uniform(f"{scheme}r"), rotated)
    low, high = paired_interval(rotated.qualities, plain.qualities)
    row |= {"rival": "not rotated", "rival_value": engine.quality.scale * plain.quality, "rival_kl": plain.loss}
    yield row | {"ratio": plain.loss / rotated.loss, "low": low, "high": high}


for _network in ("stories260k", "minilm"):
    _quick = {"network": ("stories260k",), "quantizer": ("round_to_nearest",), "scheme": ("w4",)}
    _grid = {"quantizer": THREE, "scheme": ("w2", "w3", "w4", "w4a8", "w4a4")}
    benchmark(f"rotation_{_network}", network=(_network,), quick=_quick, **_grid)(rotation)


@benchmark(
    "bit_operations",
    run=("resnet20_cifar10_wa",),
    uniform=("w4a4", "w4a6", "w4a8", "w6a8", "w8a8"),
    n_confirm=(4000,),
    quick={"uniform": ("w4a4",), "n_confirm": (100,)},
)
def bit_operations(run: str, uniform: str, n_confirm: int) -> Iterator[Row]:
    """Searched bits of weights and inputs against a uniform allocation of at least as many bit operations, on ResNet-20.

    Of the front of the run in `reports/` the point with the least loss on the search data; the interval is that of the paired
    difference on the confirm split, the ratio that of the KL divergences.
    """
    result = Run.load(REPORTS / run)
    limit = next(e.costs["bit_operations"] for scheme, e in result.uniform if scheme == uniform)
    ours = min((e for e in result.front if e.costs["bit_operations"] <= limit), key=lambda e: e.loss)
    splits = {**SPLITS["resnet20"], "n_search": 1000, "search_data": "test_0000_4999.npz"}  # those of the run
    engine = load("resnet20", result.space.scheme_names, "kronecker_descent", n_confirm=n_confirm, **splits)
    mine, theirs = confirmed(engine, ours.allocation), confirmed(engine, engine.space.uniform(uniform))
    low, high = (engine.quality.scale * end for end in paired_interval(mine.qualities, theirs.qualities))
    row = quality_row(engine, ours.allocation, mine) | {"rival": uniform, "rival_value": engine.quality.scale * theirs.quality}
    yield row | {"ratio": theirs.loss / mine.loss, "rival_kl": theirs.loss, "low": low, "high": high}
