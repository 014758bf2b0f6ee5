"""What each runtime runs, and how it restricts the space."""

import json
from pathlib import Path

import pytest

from mpsearch.allocation import SearchSpace
from mpsearch.errors import InputError
from mpsearch.graph.sharing import share
from mpsearch.layer import LayerSpec
from mpsearch.registry import resolve
from mpsearch.runs.space_json import read_space
from mpsearch.runtimes.base import Runtime
from mpsearch.runtimes.vllm import VLLM
from mpsearch.schemes.codebook import Codebook
from mpsearch.schemes.floating import Float
from mpsearch.schemes.input import IntegerInput
from mpsearch.schemes.integer import Integer
from mpsearch.schemes.level_input import LevelInput
from mpsearch.schemes.outliers import Outliers
from mpsearch.schemes.rotated import Rotated

CONF = Path(__file__).parents[2] / "conf" / "runtime"
SCHEMES = {
    "w1": Integer(1),
    "w3": Integer(3),
    "w4": Integer(4),
    "w4g32": Integer(4, 32),
    "w4g32f": Integer(4, 32, scale_dtype="float32"),
    "w4g64": Integer(4, 64, symmetric=False),
    "w4g48": Integer(4, 48),
    "w8t": Integer(8, "tensor"),
    "w4a8": Integer(4, input=IntegerInput(8)),
    "w8a8": Integer(8, input=IntegerInput(8)),
    "w8a8s": Integer(8, input=IntegerInput(8, "static")),
    "w8a8u": Integer(8, input=IntegerInput(8, symmetric=False)),
    "w8a8us": Integer(8, input=IntegerInput(8, "static", symmetric=False)),
    "w8a8t": Integer(8, input=IntegerInput(8, "tensor")),
    "w8a4": Integer(8, input=IntegerInput(4)),
    "w8a16s": Integer(8, input=IntegerInput(16, "static")),
    "nf4": Codebook("nf4", 64),
    "fp8": Codebook("e4m3", "channel", "float32"),
    "fp8a8": Codebook("e4m3", "channel", "float32", LevelInput()),
    "fp8a8s": Codebook("e4m3", "tensor", "float32", LevelInput("e4m3", "static")),
    "fp8a8mx": Codebook("e4m3", "channel", "float32", LevelInput("e4m3", "mx")),
    "w8afp8": Integer(8, input=LevelInput("e4m3", "static")),
    "w4g32r": Rotated(Integer(4, 32)),
    "fp8h": Codebook("e4m3", "channel", "float16"),
    "e5m2": Codebook("e5m2", "channel", "float32"),
    "mxfp4": Codebook("e2m1", 32, "e8m0"),
    "mxfp8": Codebook("e4m3", 32, "e8m0"),
    "nvfp4": Codebook("e2m1", 16, "e4m3"),
    "w4g32o": Outliers(Integer(4, 32)),
    "fp16": Float("float16"),
    "fp32": Float("float32"),
}
FLOATS = {"fp16", "fp32"}
VLLM_LINEAR = {"w3", "w4", "w4g32", "w4g32f", "w4g64", "w4a8", "w8a4", "w8a8", "w8a8s"}
VLLM_LINEAR |= {"fp8", "fp8a8", "fp8a8s", "mxfp4", "nvfp4"}
RUNS = {  # a Linear layer of 192 columns, a convolution, an embedding
    "mpsearch": (set(SCHEMES), set(SCHEMES), set(SCHEMES)),
    "torchao": (
        {"w3", "w4", "w4g32", "w4g32f", "w4g64", "w4g48", "w8a8"} | FLOATS,
        FLOATS,
        {"w3", "w4", "w4g32", "w4g32f", "w4g64", "w4g48"} | FLOATS,
    ),
    "vllm": (VLLM_LINEAR | FLOATS, FLOATS, FLOATS),
    "llama_cpp": ({"w4g32", "mxfp4"} | FLOATS, FLOATS, {"w4g32", "mxfp4"} | FLOATS),
    "openvino": (
        {"w3", "w4", "w4g32", "w4g32f", "w4g64", "w4g48", "w8t", "w8a8s", "w8a8us"} | FLOATS,
        {"w3", "w4", "w4g32", "w4g32f", "w4g64", "w4g48", "w8t", "w8a8s", "w8a8us"} | FLOATS,
        {"w3", "w4", "w4g32", "w4g32f", "w4g64", "w4g48", "w8t"} | FLOATS,
    ),
    "onnxruntime": (
        {"w4", "w4g32", "w4g32f", "w4g64", "w4g48", "w8t", "w8a8s", "w8a8us"} | FLOATS,
        {"w4", "w4g32", "w4g32f", "w4g64", "w4g48", "w8t", "w8a8s", "w8a8us"} | FLOATS,
        {"w4", "w4g32", "w4g32f", "w4g64", "w4g48", "w8t"} | FLOATS,
    ),
}
LINEAR = LayerSpec("fc", "linear", (8, 192), 8 * 192, "fc", ("fc",))
CONV = LayerSpec("conv", "conv2d", (8, 3, 8, 8), 8, "conv", ("conv",))
EMBEDDING = LayerSpec("embed", "embedding", (8, 192), 0, "embed", ("embed",))


def test_all_runtimes_are_here():
    assert {path.stem for path in CONF.glob("*.yaml")} == set(RUNS)


@pytest.mark.parametrize("name", RUNS)
def test_what_each_runtime_runs(name):
    runtime = resolve("runtime", name)
    assert isinstance(runtime, Runtime)
    assert runtime.name == name
    for layer, expected in zip((LINEAR, CONV, EMBEDDING), RUNS[name], strict=True):
        assert {s for s, scheme in SCHEMES.items() if runtime.runs(layer, scheme)} == expected


@pytest.mark.parametrize("name", ["torchao", "vllm", "llama_cpp", "onnxruntime"])
def test_rows_of_broken_groups_are_not_known_to_run(name):
    runtime = resolve("runtime", name)
    assert runtime.runs(LINEAR, SCHEMES["w4g32"])
    odd = LayerSpec("odd", "linear", (8, 200), 1600, "odd", ("odd",))
    assert not any(runtime.runs(odd, SCHEMES[name]) for name in ("w4g32", "mxfp4"))


def test_the_space_is_pruned_and_read_back():
    space = SearchSpace.build([LINEAR, CONV], SCHEMES, ["fc:>=8"], 8, VLLM())
    assert dict(zip(space.names, space.choices, strict=True)) == {
        "fc": ("w8a8", "w8a8s", "w8a4", "fp8", "fp8a8", "fp8a8s", "fp16", "fp32"),
        "conv": ("fp16", "fp32"),
    }
    assert list(space.schemes) == ["w8a8", "w8a8s", "w8a4", "fp8", "fp8a8", "fp8a8s", "fp16", "fp32"]
    assert read_space(json.loads(json.dumps(space.to_dict()))) == space
    assert read_space(json.loads(json.dumps(space.to_dict())), SCHEMES) == space


def test_a_layer_that_nothing_runs_is_said():
    with pytest.raises(
        InputError, match=r"vllm is not known to run layer 'conv' \(conv2d, 8x3x8x8\) in any of w3, w4; it runs Linear"
    ):
        SearchSpace.build([LINEAR, CONV], {"w3": Integer(3), "w4": Integer(4)}, runtime=VLLM())


def test_a_group_takes_what_all_of_its_layers_may():
    other = LayerSpec("proj", "linear", (8, 96), 768, "proj", ("proj",))
    layers = share([LINEAR, other], ["fc|proj"])
    pick = {"w4g64": Integer(4, 64), "w4g32": Integer(4, 32), "w8": Integer(8)}
    assert SearchSpace.build(layers, pick, runtime=VLLM()).choices == (("w4g32", "w8"),), "96 columns are no whole groups of 64"
    assert SearchSpace.build(layers, pick, ["fc:w8|w4g32", "proj:w4g32|w4g64"]).choices == (("w4g32",),)
    with pytest.raises(InputError, match="the pins 'fc:w8' and 'proj:w4g32' allow them none in common"):
        SearchSpace.build(layers, pick, ["fc:w8", "proj:w4g32"])
