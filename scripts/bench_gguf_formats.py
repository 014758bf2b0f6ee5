"""llama.cpp's formats with our quantizers against ggml's own encoder, which the package libgguf contains."""

import functools
import time
from collections.abc import Iterator
from typing import Any

import torch
from harness import Row, UnavailableError, benchmark
from networks import choice, load
from torch import Tensor

from mpsearch.engine.engine import QuantEngine
from mpsearch.evaluation import Score
from mpsearch.layer import weight_rows
from mpsearch.quantizers.base import InputMoments
from mpsearch.quantizers.gptq import damped_by
from mpsearch.schemes.base import QuantizedTensor
from mpsearch.schemes.integer import Integer
from mpsearch.schemes.k_quant import KQuant
from mpsearch.schemes.k_quant_layout import FORMATS

OTHERS = {"q4_0": Integer(4, 32), "q5_0": Integer(5, 32), "q8_0": Integer(8, 32)}
NAMES = ("q2_k", "q3_k", "iq4_xs", "iq4_nl", "q4_0", "q4_1", "q4_k", "q5_0", "q5_1", "q5_k", "q6_k", "q8_0")
# Of each error: the quantizer that minimizes it.
ERRORS = {"tr(G E H E^T)": "kronecker_descent", "tr(E H E^T)": "coordinate_descent", "diag(H)": "clip_search"}
KEPT = "*embeddings*|*attention*|*intermediate*|*pooler*"  # of MiniLM: the rows of all others are multiples of 256


@benchmark(
    "gguf_formats",
    network=("synthetic_256", "synthetic_512", "synthetic_1024", "synthetic_2048", "minilm"),
    format=NAMES,
    quick={"network": ("synthetic_256",), "format": ("q2_k", "q4_0")},
)
def gguf_formats(network: str, format: str) -> Iterator[Row]:
    """Errors of layers in llama.cpp's formats, as a share of those of ggml's encoder with the same importance: means over layers.

    H = E[x x^T] of a layer's inputs, whose diagonal is the importance that ggml gets (an imatrix), G = E[g g^T] of the gradients
    at its outputs (with 0.1 of its mean diagonal added, as the quantizer does: it is known from few samples). `synthetic_n` are
    heavy-tailed weights `[256, n]` with correlated inputs and gradients; `minilm` are three of its six layers of 1,536 columns,
    H and G of 50 sentence pairs: these have fewer positions than columns, so that errors hide where no input was, and
    `gguf_network` says what is left of the difference on unseen data. Of each error the quantizer that minimizes it; a value
    below 1 is a smaller error than ggml's. Seconds are those of our quantizer and of ggml's encoder, of one thread on a machine
    with other load.
    """
    scheme = OTHERS.get(format) or KQuant(format)
    ratios: dict[str, list[float]] = {name: [] for name in ERRORS}
    seconds, their_seconds = dict.fromkeys(ERRORS, 0.0), 0.0
    for weight, moments in layers(network):
        start = time.process_time()
        theirs = by_ggml(weight, format, moments.second_moment[0])
        their_seconds += time.process_time() - start
        for name, quantizer in ERRORS.items():
            start = time.process_time()
            ours = choice("quantizer", quantizer).quantize(weight, scheme, fresh(moments)).dequantize()
            seconds[name] += time.process_time() - start
            ratios[name].append(error(name, ours - weight, moments) / error(name, theirs - weight, moments))
    for name, values in ratios.items():
        mean = sum(values) / len(values)
        row = {"what": name, "value": mean, "unit": "of ggml's error", "rival": "ggml", "rival_value": 1.0, "ratio": 1 / mean}
        about = {"quantizer": ERRORS[name], "bits": scheme.storage_bits((1, 256)) / 256}
        yield row | about | {"seconds": seconds[name], "ggml_seconds": their_seconds}


@benchmark("gguf_network", network=("minilm",), format=("q2_k", "q3_k", "q4_0", "q4_k", "q6_k"), quick={"format": ("q2_k",)})
def gguf_network(network: str, format: str) -> Iterator[Row]:
    """The divergence of a network on unseen data, with layers in llama.cpp's formats by our quantizer and by ggml's encoder.

    MiniLM on 150 sentence pairs that neither has seen; its layers of 1,536 columns in the format, all others float. Both get the
    same calibration data (for ggml: mean squared inputs), and have the same bytes.
    """
    engine, names = network_in_formats(network)
    weights = {(layer, format): ggml_tensor(engine, layer, format) for layer in names}
    theirs = engine.with_weights(weights, {})
    (ours_score, ours), (their_score, _) = (scored(each, format) for each in (engine, theirs))
    row = {"value": ours_score.loss, "unit": "divergence", "rival": "ggml", "rival_value": their_score.loss}
    yield row | {"ratio": their_score.loss / ours_score.loss, "case": format, "bits": ours}


def scored(engine: QuantEngine, name: str) -> tuple[Score, float]:
    """The score on the confirm split, and the bits a weight of the layers in the format."""
    space = engine.space
    allocation = space.allocation([space.scheme_names.index(name if name in allowed else "fp32") for allowed in space.choices])
    engine.float_logits("confirm")
    shapes = [layer.shape for layer, scheme in space.layer_schemes(allocation) if scheme == name]
    bits = space.schemes[name].storage_bits(shapes[0]) / (shapes[0][0] * shapes[0][1])
    with engine.applied(allocation) as model:
        return engine.score_of(model, "confirm"), bits


@functools.cache
def network_in_formats(network: str) -> tuple[QuantEngine, tuple[str, ...]]:
    """The engine, and the layers that are not kept float."""
    engine = load(network, NAMES, "kronecker_descent", "none", KEPT, n_calibration=50, n_search=50, n_confirm=150)
    pairs = zip(engine.space.groups, engine.space.choices, strict=True)
    return engine, tuple(layer.name for group, allowed in pairs if NAMES[0] in allowed for layer in group.layers)


def ggml_tensor(engine: QuantEngine, layer: str, format: str) -> QuantizedTensor:
    """The layer's weight by ggml's encoder, as a tensor of the scheme."""
    weight = weight_rows(engine.model.get_submodule(layer)).float()
    spec = next(la for la in engine.space.layers if la.name == layer)
    moments = engine.bank.calibration.input_moments(spec)
    assert moments is not None
    shape = tuple(weight.shape)
    if format in OTHERS:
        return decoded_as_integers(by_ggml(weight, format, moments.second_moment[0]), weight, format, moments)
    blocks = torch.from_numpy(encoded(weight, format, moments.second_moment[0]))
    return QuantizedTensor(KQuant(format), shape, {"blocks": blocks})


def decoded_as_integers(decoded: Tensor, weight: Tensor, format: str, moments: InputMoments) -> QuantizedTensor:
    """Q4_0, Q5_0 and Q8_0 of ggml as tensors of `Integer`: its codes and scales."""
    scheme, blocks = OTHERS[format], torch.from_numpy(encoded(weight, format, moments.second_moment[0]))
    blocks = blocks.reshape(len(weight), -1, {"q4_0": 18, "q5_0": 22, "q8_0": 34}[format])
    scales = blocks[..., :2].contiguous().view(torch.float16)[..., 0]
    unit = torch.where(scales == 0, 1.0, scales.float())[..., None]
    codes = (decoded.reshape(len(weight), -1, 32) / unit).round() + 2 ** (scheme.bits - 1)
    return scheme.stored(codes.to(torch.uint8).reshape(weight.shape), scales.contiguous(), None, {}, tuple(weight.shape))


@functools.lru_cache(maxsize=1)
def layers(network: str) -> list[tuple[Tensor, InputMoments]]:
    """Weights `[rows, columns]` and the moments of their layers."""
    if network.startswith("synthetic"):
        return [synthetic(256, int(network.split("_")[1]))]
    engine, names = network_in_formats(network)
    specs = {layer.name: layer for layer in engine.space.layers}
    pairs = []
    for name in names[::2]:
        moments = engine.bank.calibration.with_hessian(specs[name], centred=False)
        assert moments is not None
        pairs.append((weight_rows(engine.model.get_submodule(name)).detach().float(), moments))
    return pairs


def synthetic(rows: int, columns: int) -> tuple[Tensor, InputMoments]:
    """A heavy-tailed weight, and moments of inputs and gradients that are correlated."""
    torch.manual_seed(columns)
    weight = 0.05 * torch.randn(rows, columns) * torch.rand(rows, columns).add(0.3).reciprocal()
    x = torch.randn(3 * columns, columns) @ (torch.eye(columns) + 0.6 * torch.randn(columns, columns) / columns**0.5)
    x = x * torch.rand(columns).square().add(0.1) + 0.3 * torch.randn(columns)
    g = torch.randn(3 * rows, rows) @ (torch.eye(rows) + 0.8 * torch.randn(rows, rows) / rows**0.5)
    hessian, fisher = x.T @ x / len(x), g.T @ g / len(g)
    second = hessian.diagonal()[None].contiguous()
    return weight, InputMoments(x.mean(0)[None], second, len(x), hessian=hessian[None], fisher=fisher[None])


def fresh(moments: InputMoments) -> InputMoments:
    """The same moments, from which nothing has been derived: times then include the factorizations."""
    return InputMoments(moments.mean, moments.second_moment, moments.count, hessian=moments.hessian, fisher=moments.fisher)


def error(name: str, change: Tensor, moments: InputMoments) -> float:
    """One of `ERRORS` of a change of the weight."""
    assert moments.hessian is not None
    change = change.double()
    if name == "diag(H)":
        return (change.square() * moments.second_moment.double()).sum().item()
    product = change @ moments.hessian[0].double()
    if name == "tr(E H E^T)":
        return (product * change).sum().item()
    assert moments.fisher is not None
    fisher = damped_by(moments.fisher.double(), 0.1)
    parts, others = (each.reshape(len(fisher), -1, change.shape[1]) for each in (product, change))
    return ((fisher @ parts) * others).sum().item()


def encoded(weight: Tensor, format: str, importance: Tensor) -> Any:
    """The bytes of ggml's encoder with an imatrix."""
    try:
        import libgguf
        from gguf import GGMLQuantizationType
    except ImportError as error:
        raise UnavailableError("ggml's encoder is missing: pip install --no-deps gguf libgguf") from error
    return libgguf.quantize_rows(weight.detach().numpy(), GGMLQuantizationType[format.upper()], importance.numpy())


def by_ggml(weight: Tensor, format: str, importance: Tensor) -> Tensor:
    """The weight that ggml's encoder stores."""
    blocks = encoded(weight, format, importance)
    from gguf import GGMLQuantizationType, quants

    return torch.from_numpy(quants.dequantize(blocks, GGMLQuantizationType[format.upper()]))


assert set(NAMES) == {*FORMATS, *OTHERS}
