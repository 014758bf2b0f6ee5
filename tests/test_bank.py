"""What was quantized is found again, to the last bit, and never where it does not belong."""

import copy

import pytest
import torch

from mpsearch.bank import Bank
from mpsearch.calibrate import calibrate
from mpsearch.engine import QuantEngine, load_batches
from mpsearch.quantizers.clip_search import ClipSearch
from mpsearch.quantizers.coordinate_descent import CoordinateDescent
from mpsearch.schemes.codebook import Codebook
from mpsearch.schemes.floating import Float
from mpsearch.schemes.integer import Integer
from mpsearch.schemes.outliers import Outliers

SCHEMES = {
    "w3g5": Integer(3, 5, symmetric=False),
    "w4a8": Integer(4, input={"bits": 8, "scale": "static", "symmetric": False}),
    "bf16": Float("bfloat16"),
    "nvfp4": Codebook("e2m1", 16, "e4m3"),
    "w2o": Outliers(Integer(2), 0.1),
}


class Unused(ClipSearch):
    def quantize(self, weight, scheme, moments=None):
        assert isinstance(scheme, Float), "quantized again"
        return super().quantize(weight, scheme, moments)


def engine_with(tiny, bank, quantizer):
    base = tiny.engine(tiny.net(), tiny.task(), SCHEMES)
    moments = calibrate(base.model, base.task, base.space.layers, load_batches(base.task, "calibration", "cpu"))
    return QuantEngine(base.model, base.task, base.space, dict.fromkeys(SCHEMES, quantizer), moments, bank=bank)


def test_nothing_is_quantized_twice(tiny, tmp_path):
    first = engine_with(tiny, Bank(tmp_path / "bank", {"run": 1}), CoordinateDescent())
    again = engine_with(tiny, Bank(tmp_path / "bank", {"run": 1}), Unused())
    for layer in first.space.layers:
        for name in SCHEMES:
            one, two = first.quantized(layer.name, name), again.quantized(layer.name, name)
            assert one.tensors.keys() == two.tensors.keys()
            assert all(torch.equal(one.tensors[key].view(-1), two.tensors[key].view(-1)) for key in one.tensors)
            assert all(one.tensors[key].dtype == two.tensors[key].dtype for key in one.tensors)
            assert torch.equal(one.dequantize(), two.dequantize())
    allocation = first.space.uniform("w3g5")
    assert first.score(allocation).loss == again.score(allocation).loss
    assert not list((tmp_path / "bank").glob(".*")), "nothing is left half written"
    assert not list((tmp_path / "bank").glob("*bf16*")), "rounding to floats is quicker than a file"


def test_other_settings_and_damage_are_quantized_anew(tiny, tmp_path):
    engine = engine_with(tiny, Bank(tmp_path, {"run": 1}), ClipSearch())
    layer, name = engine.space.layers[0].name, "w3g5"
    right = engine.quantized(layer, name)
    shape = right.shape
    assert Bank(tmp_path, {"run": 2}).read(layer, name, SCHEMES[name], shape) is None
    (file,) = tmp_path.iterdir()
    whole = file.read_bytes()
    for damage in (b"", whole[:20], whole[:-3]):
        file.write_bytes(damage)
        assert Bank(tmp_path, {"run": 1}).read(layer, name, SCHEMES[name], shape) is None
        other = engine_with(tiny, Bank(tmp_path, {"run": 1}), ClipSearch())
        assert torch.equal(other.quantized(layer, name).dequantize(), right.dequantize())
        assert file.read_bytes() == whole


def test_a_folder_that_cannot_be_written_is_said_once(tiny, tmp_path):
    (tmp_path / "bank").write_text("a file")
    engine = engine_with(tiny, Bank(tmp_path / "bank", {}), ClipSearch())
    layer = engine.space.layers[0].name
    with pytest.warns(UserWarning, match="cannot be kept in .*bank"):
        engine.quantized(layer, "w3g5")
    engine.quantized(layer, "w4a8")  # a second warning would be an error


def test_a_run_that_goes_on_and_its_export_quantize_nothing(mpsearch, monkeypatch):
    called = []
    quantize = copy.copy(CoordinateDescent.quantize)
    monkeypatch.setattr(CoordinateDescent, "quantize", lambda *a, **k: (called.append(1), quantize(*a, **k))[1])

    def quantized(*words):
        called.clear()
        assert mpsearch(*words)[0] == 0
        return len(called)

    first = ["scheme=[w2,w8]", "quantizer=coordinate_descent", "n_seeds=3", "hydra.run.dir=run"]
    assert quantized("search", *first, "n_trials=6") == 20
    assert quantized("search", "run=run", "n_trials=9") == 0
    assert quantized("solve", "run=run", "budget.bits=5") == 0
    assert quantized("export", "run=run") == 0
