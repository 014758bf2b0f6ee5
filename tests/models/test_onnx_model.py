"""Networks from ONNX files: the same outputs as in onnxruntime, names kept, and what cannot be converted is said."""

import copy
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import mpsearch
from mpsearch.errors import InputError
from mpsearch.models.onnx_model import onnx_model
from mpsearch.tasks.fidelity import Fidelity

onnx = pytest.importorskip("onnx")
reference = pytest.importorskip("onnx.reference")
if not __import__("importlib.util").util.find_spec("onnx2torch"):
    pytest.skip("onnx2torch is not installed", allow_module_level=True)


def network(path, operator="Relu", weights_as="initializers"):
    """A convolution, an operator, a mean over space and a matrix product: float32 [n, 3, 8, 8] to [n, 4]."""
    from onnx import TensorProto, helper, numpy_helper

    random = np.random.default_rng(0)
    weights = {
        "kernel": random.standard_normal((8, 3, 3, 3)).astype(np.float32) / 3,
        "matrix": random.standard_normal((8, 4)).astype(np.float32),
        "bias": random.standard_normal(4).astype(np.float32),
    }
    tensors = [numpy_helper.from_array(array, name) for name, array in weights.items()]
    nodes = [
        helper.make_node("Conv", ["image", "kernel"], ["a"], pads=[1, 1, 1, 1]),
        helper.make_node(operator, ["a"], ["b"]),
        helper.make_node("GlobalAveragePool", ["b"], ["c"]),
        helper.make_node("Flatten", ["c"], ["d"]),
        helper.make_node("Gemm", ["d", "matrix", "bias"], ["scores"]),
    ]
    if weights_as == "constants":
        constants = [helper.make_node("Constant", [], [f"{tensor.name}_value"], value=tensor) for tensor in tensors]
        copies = [helper.make_node("Identity", [f"{tensor.name}_value"], [tensor.name]) for tensor in tensors]
        nodes, tensors = [*constants, *copies, *nodes], []
    image = helper.make_tensor_value_info("image", TensorProto.FLOAT, ["n", 3, 8, 8])
    scores = helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["n", 4])
    graph = helper.make_graph(nodes, "small", [image], [scores], tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    onnx.save(model, path)
    return path


@pytest.mark.parametrize("weights_as", ["initializers", "constants"])
def test_outputs_are_those_of_the_graph(tmp_path, weights_as):
    path = network(tmp_path / "net.onnx", weights_as=weights_as)
    model, x = onnx_model(path), np.random.default_rng(1).standard_normal((2, 3, 8, 8)).astype(np.float32)
    expected = reference.ReferenceEvaluator(str(path)).run(None, {"image": x})[0]
    with torch.no_grad():
        assert np.allclose(model(torch.from_numpy(x)).numpy(), expected, atol=1e-5)
    source = copy.deepcopy(model).meta["onnx"]
    assert (source.input_names, source.output_names) == (("image",), ("scores",))
    assert not model.training
    assert "torchvision" not in sys.modules, "its stand-in is gone"


@pytest.mark.slow
def test_a_search_of_an_onnx_network(tmp_path):
    np.savez(tmp_path / "inputs.npz", image=np.random.default_rng(2).standard_normal((36, 3, 8, 8)).astype(np.float32))
    task = Fidelity(tmp_path / "inputs.npz", n_confirm=20, n_search=8, n_calibration=8)
    model = onnx_model(network(tmp_path / "net.onnx"))
    result = mpsearch.search(model, task, schemes=["w2", "w8"], quantizer="gptq", n_trials=4, n_seeds=2)
    assert {layer.kind for layer in result.run.space.layers} == {"conv2d", "linear"}
    assert all(e.verified for e in result.run.on("confirm").values())


def test_what_cannot_be_converted_is_one_sentence(tmp_path, monkeypatch):
    with pytest.raises(InputError, match="There is no ONNX file"):
        onnx_model(tmp_path / "nowhere.onnx")
    (tmp_path / "bad.onnx").write_bytes(b"not a graph")
    with pytest.raises(InputError, match="cannot be read as an ONNX network"):
        onnx_model(tmp_path / "bad.onnx")
    with pytest.raises(InputError, match=r"for which onnx2torch has no converter: Sinh\. .*model=custom"):
        onnx_model(network(tmp_path / "net.onnx", operator="Sinh"))
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(InputError, match=r"model=onnx needs onnx and onnx2torch .*pip install --no-deps onnx2torch"):
        onnx_model(tmp_path / "net.onnx")


def saved(path, nodes, weights, shape, opset=13):
    """A graph of one input `x` and one output `y` whose inner shapes are not written down."""
    from onnx import TensorProto, helper, numpy_helper

    tensors = [numpy_helper.from_array(array, name) for name, array in weights.items()]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, list("abcd"))
    made = [helper.make_node(*node[:3], **(node[3] if len(node) > 3 else {})) for node in nodes]
    graph = helper.make_graph(made, "g", [x], [y], tensors)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)]), path)
    return path


RANDOM = np.random.default_rng(1)
CHANNELS = RANDOM.uniform(0.5, 2, (4, 5)).astype(np.float32)
KERNEL = RANDOM.standard_normal((5, 3, 1, 1)).astype(np.float32)
PADS = np.array([0, 1, 0, 2, 0, 2, 0, 3])
NODES = {
    "the largest of each channel": ([("GlobalMaxPool", ["x"], ["y"])], {}),
    "reflection of columns alone": (
        [("Pad", ["x", "pads"], ["y"], {"mode": "reflect"})],
        {"pads": np.array([0, 1, 0, 2, 0, 2, 0, 3])},
    ),
    "a batch norm after a convolution of an unknown shape": (
        [
            ("Shape", ["x"], ["known"]),
            ("Cast", ["known"], ["number"], {"to": 1}),
            ("Cast", ["number"], ["any"], {"to": 7}),
            ("Reshape", ["x", "any"], ["r"]),
            ("Conv", ["r", "kernel"], ["c"]),
            ("Relu", ["c"], ["d"]),
            ("BatchNormalization", ["d", "scale", "shift", "mean", "var"], ["y"]),
        ],
        {"kernel": KERNEL, **dict(zip(("scale", "shift", "mean", "var"), CHANNELS, strict=True))},
    ),
}


EXPECTED = (
    lambda x: x.amax((2, 3), keepdim=True),
    lambda x: x[..., [2, 1, 0, 1, 2, 3, 2, 1, 0]][:, [1, 0, 1, 2, 1, 0]],
    lambda x: F.batch_norm(F.conv2d(x, torch.from_numpy(KERNEL)).relu(), *map(torch.from_numpy, CHANNELS[[2, 3, 0, 1]])),
)


@pytest.mark.parametrize(("name", "expected"), list(zip(NODES, EXPECTED, strict=True)), ids=list(NODES))
def test_operators_of_our_own(tmp_path, name, expected):
    nodes, weights = NODES[name]
    path = saved(tmp_path / "net.onnx", nodes, weights, ["n", 3, 4, 4])
    x = torch.from_numpy(RANDOM.standard_normal((2, 3, 4, 4)).astype(np.float32))
    with torch.no_grad():
        torch.testing.assert_close(onnx_model(path)(x), expected(x))


def test_an_export_keeps_the_graph_of_the_file(tmp_path, caplog):
    """Names of nodes, tensors, inputs and outputs, and free dimensions; batch norms are folded into the layers before them."""
    pytest.importorskip("onnxruntime")
    from onnx import helper, numpy_helper

    from mpsearch.exporters.base import ModelCall, Picked
    from mpsearch.exporters.onnx import ONNX
    from mpsearch.graph.trace import first_samples
    from mpsearch.pipeline.prepare import prepare

    path = network(tmp_path / "net.onnx")
    proto = onnx.load(path)
    norm = [numpy_helper.from_array(np.linspace(0.5, 2, 8, dtype=np.float32), name) for name in ("gamma", "beta", "mean", "var")]
    proto.graph.initializer.extend(norm)
    proto.graph.node[0].output[0] = "before"
    node = helper.make_node("BatchNormalization", ["before", *(tensor.name for tensor in norm)], ["a"], name="norm")
    proto.graph.node.insert(1, node)
    onnx.save(proto, path)

    np.savez(tmp_path / "inputs.npz", image=np.random.default_rng(2).standard_normal((36, 3, 8, 8)).astype(np.float32))
    task = Fidelity(tmp_path / "inputs.npz", n_confirm=20, n_search=8, n_calibration=8)
    model = onnx_model(path)
    prepared = prepare(model, task, schemes=["w4", "w2"], quantizer="round_to_nearest", runtime="onnxruntime")
    engine = prepared.engine(tmp_path / "bank")
    assert prepared.plan.folds
    engine.float_logits("confirm")
    call = ModelCall.record(engine.model, task.forward, first_samples(prepared.calibration[0][0], 2))
    for scheme in ("w4", "w2"):
        e = type("E", (), {"allocation": engine.space.uniform(scheme)})
        written = ONNX().export(Picked(e, {}, {}, "agreement", "", (), None, call), engine, tmp_path / scheme)
        graph = onnx.load(written).graph
        nodes = [node for node in graph.node if node.output[0] in ("before", "a", "b", "c", "d", "scores")]
        assert [node.op_type for node in nodes] == ["Conv", "Identity", "Relu", "GlobalAveragePool", "Flatten", "Gemm"]
        assert nodes[1].name == "norm"
        assert [value.name for value in (*graph.input, *graph.output)] == ["image", "scores"]
        assert graph.input[0].type.tensor_type.shape.dim[0].dim_param == "n"
        with engine.applied(e.allocation) as simulated:
            ours = engine.score_of(simulated, "confirm").loss
        assert engine.score_of(ONNX().open(written, copy.deepcopy(model)), "confirm").loss == pytest.approx(ours, rel=1e-4)
        for name, weight in ONNX().decode(written, model).items():
            assert torch.equal(weight, engine.quantized(name, scheme).dequantize())

    path.unlink()
    with caplog.at_level("INFO", "mpsearch"):
        ONNX().export(Picked(e, {}, {}, "agreement", "", (), None, call), engine, tmp_path / "traced")
    assert "cannot be kept" in caplog.text
