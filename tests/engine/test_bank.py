"""What was quantized is found again, to the last bit, and never where it does not belong."""

import copy
import os
import stat

import pytest
import torch

from mpsearch.engine.calibrate import calibrate
from mpsearch.engine.engine import QuantEngine
from mpsearch.engine.scoring import load_batches
from mpsearch.engine.weight_files import WeightFiles
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
    return QuantEngine(base.model, base.task, base.space, dict.fromkeys(SCHEMES, quantizer), moments, files=bank)


def test_nothing_is_quantized_twice(tiny, tmp_path):
    first = engine_with(tiny, WeightFiles(tmp_path / "bank", {"run": 1}), CoordinateDescent())
    again = engine_with(tiny, WeightFiles(tmp_path / "bank", {"run": 1}), Unused())
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
    assert not list((tmp_path / "bank").glob("*bf16.safetensors")), "rounding to floats is quicker than a file"


def test_other_settings_and_damage_are_quantized_anew(tiny, tmp_path):
    engine = engine_with(tiny, WeightFiles(tmp_path, {"run": 1}), ClipSearch())
    layer, name = engine.space.layers[0].name, "w3g5"
    right = engine.quantized(layer, name)
    shape = right.shape
    assert WeightFiles(tmp_path, {"run": 2}).read(layer, name, SCHEMES[name], shape) is None
    (file,) = tmp_path.iterdir()
    whole = file.read_bytes()
    flipped = [bytes(byte ^ (i == at) for i, byte in enumerate(whole)) for at in (60, len(whole) // 2, len(whole) - 1)]
    for damage in (b"", whole[:20], whole[:-3], *flipped):
        file.write_bytes(damage)
        other = engine_with(tiny, WeightFiles(tmp_path, {"run": 1}), ClipSearch())
        with pytest.warns(UserWarning, match=r"w3g5.safetensors is damaged .* It is quantized again"):
            assert torch.equal(other.quantized(layer, name).dequantize(), right.dequantize())
        assert file.read_bytes() == whole


def test_damaged_files_are_one_warning_a_run(tiny, tmp_path):
    engine = engine_with(tiny, WeightFiles(tmp_path, {"run": 1}), ClipSearch())
    pairs = [(layer.name, name) for layer in engine.space.layers for name in ("w3g5", "nvfp4", "w2o")]
    right = [engine.quantized(*pair).dequantize() for pair in pairs]
    for file in tmp_path.iterdir():
        data = bytearray(file.read_bytes())
        data[-2] ^= 4
        file.write_bytes(data)
    again = engine_with(tiny, WeightFiles(tmp_path, {"run": 1}), ClipSearch())
    with pytest.warns(UserWarning, match="is damaged") as warned:
        found = [again.quantized(*pair).dequantize() for pair in pairs]
    assert len(warned) == 1
    assert all(map(torch.equal, found, right))


def test_an_entry_under_another_layers_name_is_not_taken(tiny, tmp_path):
    """Whole, of this run, and of the right shape, but not that layer's."""
    bank = WeightFiles(tmp_path, {"run": 1})
    engine = engine_with(tiny, bank, ClipSearch())
    engine.quantized("last", "w3g5")
    (file,) = tmp_path.iterdir()
    file.rename(tmp_path / "other.w3g5.safetensors")
    assert bank.read("other", "w3g5", SCHEMES["w3g5"], (5, 6)) is None


def test_layers_with_long_names_have_files_of_their_own(tiny, tmp_path):
    engine, bank = tiny.engine(tiny.net(), tiny.task(), SCHEMES), WeightFiles(tmp_path, {"run": 1})
    layer = engine.space.layers[0]
    weight = engine.quantized(layer.name, "w3g5")
    names = ["a/" * 200, "a/" * 199 + "b"]
    bank.write(names[0], "w3g5", weight)
    assert bank.read(names[1], "w3g5", SCHEMES["w3g5"], weight.shape) is None
    kept = bank.read(names[0], "w3g5", SCHEMES["w3g5"], weight.shape)
    assert torch.equal(kept.dequantize(), weight.dequantize())


def test_corrected_biases_are_kept(tiny, tmp_path):
    first = engine_with(tiny, WeightFiles(tmp_path, {"run": 1}), ClipSearch())
    second = engine_with(tiny, WeightFiles(tmp_path, {"run": 1}), ClipSearch())
    right = first.biases("first", "w4a8")
    second.bank.calibration.moments = {}  # from which nothing could be corrected
    assert right.keys() == {"first"}
    assert torch.equal(second.biases("first", "w4a8")["first"], right["first"])


def test_files_have_the_mode_of_any_other(tiny, tmp_path):
    before = os.umask(0o022)
    try:
        engine_with(tiny, WeightFiles(tmp_path, {"run": 1}), ClipSearch()).biases("last", "w3g5")
        assert {stat.S_IMODE(file.stat().st_mode) for file in tmp_path.iterdir()} == {0o644}
    finally:
        os.umask(before)


def test_a_folder_that_cannot_be_written_is_said_once(tiny, tmp_path):
    (tmp_path / "bank").write_text("a file")
    engine = engine_with(tiny, WeightFiles(tmp_path / "bank", {}), ClipSearch())
    layer = engine.space.layers[0].name
    with pytest.warns(UserWarning, match="cannot be kept in .*bank"):
        engine.quantized(layer, "w3g5")
    engine.quantized(layer, "w4a8")  # a second warning would be an error


@pytest.mark.slow
def test_a_run_that_goes_on_and_its_export_quantize_nothing(mpsearch, monkeypatch):
    called = []
    quantize = copy.copy(CoordinateDescent.quantize)
    monkeypatch.setattr(CoordinateDescent, "quantize", lambda *a, **k: (called.append(1), quantize(*a, **k))[1])

    def quantized(*words):
        called.clear()
        assert mpsearch(*words)[0] == 0
        return len(called)

    first = ["scheme=[w2,w8]", "quantizer=coordinate_descent", "refiner=null", "n_seeds=3", "hydra.run.dir=run"]
    assert quantized("search", *first, "n_trials=6") == 20
    assert quantized("search", "run=run", "n_trials=9") == 0
    assert quantized("solve", "run=run", "budget.bits=5") == 0
    assert quantized("export", "run=run") == 0
