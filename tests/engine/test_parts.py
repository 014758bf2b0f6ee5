"""Each part of the engine alone: calibration, bias correction, weight bank, prefix cache and scorer."""

import numpy as np
import pytest
import torch

from mpsearch.allocation import Allocation, SearchSpace
from mpsearch.engine.bias_correction import BiasCorrection
from mpsearch.engine.calibrate import Calibration, calibrate, hessians
from mpsearch.engine.engine import FLOAT, QuantEngine
from mpsearch.engine.prefix_cache import PrefixCache
from mpsearch.engine.scoring import Scorer
from mpsearch.engine.weight_bank import WeightBank
from mpsearch.engine.weight_files import WeightFiles
from mpsearch.graph.trace import trace_layers
from mpsearch.quantizers.gptq import GPTQ
from mpsearch.quantizers.round_to_nearest import RoundToNearest
from mpsearch.schemes.integer import Integer

SCHEMES = {"w2": Integer(2), "w8": Integer(8)}


@pytest.fixture
def parts(tiny):
    """(model, scorer, space, calibration) of the small network."""
    model, task = tiny.net(), tiny.task()
    scorer = Scorer(model, task)
    layers = trace_layers(model, task.forward, scorer.batches("calibration")[0][0])
    space = SearchSpace.build(layers, SCHEMES)
    moments = calibrate(model, task, layers, scorer.batches("calibration"))
    return model, scorer, space, Calibration(model, task, layers, scorer.batches("calibration"), moments, scorer.divergence)


def bank_of(parts, quantizer=None, correct=True, **options):
    model, _, space, calibration = parts
    correction = BiasCorrection(model, calibration) if correct else None
    return WeightBank(model, space, dict.fromkeys(SCHEMES, quantizer or RoundToNearest()), calibration, correction, **options)


def test_a_calibration_gives_the_hessian_of_a_layer_centred_or_not(parts):
    model, scorer, space, calibration = parts
    first, second, _ = space.layers
    expected = hessians(model, scorer.task, [first.name, second.name], scorer.batches("calibration"))
    plain, centred = (calibration.with_hessian(first, centred=flag) for flag in (False, True))
    assert torch.equal(plain.hessian, expected["first"])
    mean = plain.mean[:, :, None]
    assert torch.allclose(centred.hessian, plain.hessian - mean * mean.transpose(1, 2), atol=1e-6)
    assert not centred.mean.any()
    unbiased = calibration.with_hessian(second, centred=True)  # it has no bias that could take the mean error
    assert torch.equal(unbiased.hessian, expected["second"])
    assert unbiased.fisher is None


def test_a_calibration_sees_the_model_as_it_is_then(parts):
    """Hessians of quantized inputs: those of the layers behind one whose weight was changed."""
    model, scorer, space, _ = parts
    before = hessians(model, scorer.task, ["first", "last"], scorer.batches("calibration"))
    engine = QuantEngine(model, scorer.task, space, dict.fromkeys(SCHEMES, RoundToNearest()), {}, scorer=scorer)
    with engine.applied(Allocation({"first": "w2"})):
        after = hessians(model, scorer.task, ["first", "last"], scorer.batches("calibration"))
    assert torch.equal(before["first"], after["first"])
    assert not torch.equal(before["last"], after["last"])


def test_a_bias_correction_subtracts_the_mean_error(parts):
    model, _, space, calibration = parts
    first, second, _ = space.layers
    correction, weight = BiasCorrection(model, calibration), RoundToNearest().quantize(model.first.weight.detach(), SCHEMES["w2"])
    (bias,) = correction.biases(first, weight).values()
    change = (weight.dequantize() - model.first.weight.detach()).flatten(1)
    assert torch.allclose(bias, model.first.bias.detach() - change @ calibration.moments["first"].mean[0], atol=1e-6)
    assert correction.biases(second, bank_of(parts).quantized("second", "w2")) == {}


def test_a_bank_without_a_correction_leaves_biases(parts):
    assert bank_of(parts, correct=False).biases("first", "w2") == {}
    assert len(bank_of(parts, correct=False).dense("first", "w2")) == 1
    assert len(bank_of(parts).dense("first", "w2")) == 2


def test_given_weights_are_neither_read_from_the_files_nor_written_to_them(parts, tmp_path):
    bank = bank_of(parts, files=WeightFiles(tmp_path, {}))
    right = bank.quantized("first", "w2"), bank.biases("first", "w2")["first"]
    files = {path: path.read_bytes() for path in tmp_path.iterdir()}
    assert len(files) == 2
    given = bank.with_weights({("first", "w2"): bank_of(parts).quantized("first", "w8")}, {})
    assert not torch.equal(given.biases("first", "w2")["first"], right[1]), "corrected for the given weight"
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == files
    given.quantized("last", "w2")
    assert len(list(tmp_path.iterdir())) == 3, "all others are kept in the files as before"
    assert bank.quantized("first", "w2") is right[0]


def test_a_bank_asks_the_quantizer_with_hessians(parts):
    space = parts[2]
    found, plain = (bank_of(parts, quantizer).quantized("first", "w2") for quantizer in (GPTQ(), RoundToNearest()))
    assert found.shape == space.layers[0].shape
    assert not torch.equal(found.dequantize(), plain.dequantize())


def test_a_prefix_cache_runs_the_model_bit_for_bit(parts):
    model, scorer, space, _ = parts
    cache = PrefixCache(model, scorer.task, space, 10**6)
    for _ in range(3):
        for i, (inputs, _) in enumerate(scorer.batches("search")):
            expected = scorer.task.forward(model, inputs)
            assert torch.equal(cache.forward("search", i, inputs, FLOAT), expected)
    assert cache.emptied().n_bytes == 0


def test_a_scorer_compares_with_the_float_model(parts):
    model, scorer, _, _ = parts
    outputs = torch.cat(list(scorer.outputs(model, "search")))
    assert not scorer.has_float_outputs("search")
    assert torch.equal(scorer.float_outputs("search"), outputs)
    assert scorer.float_outputs("search", lambda: 1 / 0) is scorer.float_outputs("search"), "computed once"
    itself, other = scorer.score(None, "search"), scorer.score([outputs * 2], "search")
    assert itself.loss == itself.noise == 0.0 < other.loss
    assert other.noise == 1.0
    assert itself.n_samples == other.n_samples == 30


def test_a_split_is_scored_batch_by_batch_like_a_whole_one(parts, tmp_path, monkeypatch):
    """Outputs of the float model that are too large for memory are in a file that has no name any more."""
    model, scorer, _, _ = parts
    outputs = [2 * part for part in scorer.outputs(model, "search")]
    assert len(outputs) > 1
    whole = scorer.score(outputs, "search")
    monkeypatch.setattr("mpsearch.engine.scoring.MEMORY_BYTES", 0)
    monkeypatch.setattr(type(scorer.task), "quality_by_sample", True)
    other = Scorer(model, scorer.task, scratch=tmp_path)
    parted = other.score(iter(outputs), "search")
    assert torch.equal(other.float_outputs("search"), scorer.float_outputs("search"))
    assert not list(tmp_path.iterdir())
    np.testing.assert_array_equal(parted.losses, whole.losses)
    np.testing.assert_array_equal(parted.qualities, whole.qualities)
    for name in ("loss", "cross_entropy", "quality", "quality_low", "quality_high", "proposal_loss"):
        assert getattr(parted, name) == getattr(whole, name)
    assert parted.noise == pytest.approx(whole.noise, rel=1e-12)


def test_an_engine_is_composed_of_parts(parts):
    _, scorer, space, _ = parts
    bank = bank_of(parts)
    engine = QuantEngine.from_parts(scorer, bank)
    assert engine.prefix_cache is None
    allocation = space.uniform("w2")
    score = engine.score(allocation)
    other = engine.with_weights({(name, "w2"): bank.quantized(name, "w8") for name in space.names}, {})
    assert other.score(allocation).loss == pytest.approx(engine.score(space.uniform("w8")).loss, rel=1e-5)
    assert engine.score(allocation) is score
    assert other.scorer is scorer
