"""Networks from ONNX files: the same outputs as in onnxruntime, names kept, and what cannot be converted is said."""

import sys

import numpy as np
import pytest
import torch

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
    assert (model.input_names, model.output_names) == (["image"], ["scores"])
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
    with pytest.raises(InputError, match=r"cannot be converted by onnx2torch: .*operation_type='Sinh'.*model=custom"):
        onnx_model(network(tmp_path / "net.onnx", operator="Sinh"))
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(InputError, match=r"model=onnx needs onnx and onnx2torch .*pip install --no-deps onnx2torch"):
        onnx_model(tmp_path / "net.onnx")
