"""Refined points of a run: evaluations of their own, which picks, exports and trainings start from; or no trace of them."""

import json
from dataclasses import dataclass

import pytest
import torch

import mpsearch
from mpsearch.errors import InputError
from mpsearch.evaluation import REFINED
from mpsearch.models.digits import digits
from mpsearch.quantizers.clip_search import ClipSearch
from mpsearch.refiners.base import Refiner
from mpsearch.runs.run import Run
from mpsearch.tasks.digits import Digits

OPTIONS = {"schemes": ["w2", "w4"], "quantizer": "clip_search", "n_trials": 8, "n_seeds": 4, "confirm_points": 3}


@dataclass(frozen=True)
class Zeros(Refiner):
    """Makes all weights 0."""

    def start(self, engine):
        def refine(allocation, files=None):
            weights = {}
            for group in engine.space.groups:
                for layer in group.layers:
                    scheme = engine.space.schemes[allocation[group.name]]
                    weights[layer.name, allocation[group.name]] = ClipSearch().quantize(torch.zeros(layer.shape), scheme)
            return engine.with_weights(weights, {key: {} for key in weights})

        return refine


@pytest.fixture(scope="module")
def searched(tmp_path_factory):
    return mpsearch.search(digits(), Digits(), **OPTIONS, folder=tmp_path_factory.mktemp("run"))


def test_refined_weights_are_evaluations_of_their_own_and_kept_where_the_search_split_is_better(searched):
    run = searched.run
    kept = run.refined("search")
    assert kept
    before = run.unrefined.on("search")
    for allocation, after in kept.items():
        assert after.loss < before[allocation].loss
        assert after.size_bytes == before[allocation].size_bytes
        assert after.origin == REFINED
        assert run.on("search")[allocation] == after
        assert run.on("confirm")[allocation].origin == REFINED
        assert run.on("confirm")[allocation].packed
        assert run.on("confirm")[allocation].verified
    confirmed = {c.evaluation.allocation for c in searched.confirmed}
    assert confirmed == {e.allocation for e in run.evaluations if e.split == "confirm" and e.origin != "float"}
    assert Run.load(searched.folder).refined("confirm") == run.refined("confirm")


def test_a_resumed_run_measures_nothing_again(searched):
    again = mpsearch.search(digits(), Digits(), **OPTIONS, folder=searched.folder)
    assert again.run.evaluations == searched.run.evaluations
    with pytest.raises(InputError, match="it has another refiner"):
        mpsearch.search(digits(), Digits(), **OPTIONS, refiner="distillation", folder=searched.folder)


def test_exports_have_the_refined_weights_with_and_without_the_data(searched, tmp_path):
    point = searched.pick(bits=3)
    assert point.evaluation.origin == REFINED
    paths = [
        point.export(folder=tmp_path / "with"),
        mpsearch.load_result(searched.folder, digits()).pick(bits=3).export(folder=tmp_path / "without"),
    ]
    one, two = (json.loads(path.read_text()) for path in paths)
    assert one == two
    losses = {e.loss for e in searched.run.evaluations if e.origin == REFINED and e.allocation == point.allocation}
    assert one["scores"]["search"]["loss"] in losses if "scores" in one else one["search"]["loss"] in losses


def test_training_starts_from_the_refined_weights_and_is_exported(searched, tmp_path):
    point = searched.pick(bits=3)
    trained = mpsearch.finetune(point, epochs=1, batches=1)
    assert trained.training.loss_before == point.evaluation.loss
    assert trained.export(folder=tmp_path).exists()


def test_a_solved_point_is_refined(searched):
    point = mpsearch.solve(searched, budget={"bits": 3.1})
    run = point.result.run
    assert point.evaluation == run.on("search")[point.allocation]
    assert any(e.origin == REFINED and e.allocation == point.allocation for e in run.evaluations)


def test_weights_that_are_worse_are_not_kept(tmp_path):
    result = mpsearch.search(digits(), Digits(), **OPTIONS, refiner=Zeros(), folder=tmp_path)
    run = result.run
    assert any(e.origin == REFINED for e in run.evaluations)
    assert not run.refined("search")
    assert {e.origin for e in run.on("confirm").values()} <= {"uniform", "knapsack", "sampler"}
    assert all(c.evaluation.origin != REFINED for c in result.confirmed)


def test_without_a_refiner_there_is_no_trace_of_one(tmp_path):
    result = mpsearch.search(digits(), Digits(), **OPTIONS, refiner=None, folder=tmp_path)
    assert not any(e.origin == REFINED for e in result.run.evaluations)
    assert "refiner" not in json.loads((tmp_path / "space.json").read_text())
    assert not (tmp_path / "refined").exists()


def test_a_damaged_file_of_refined_weights_is_made_again(searched, tmp_path):
    point = searched.pick(bits=3)
    first = point.export(folder=tmp_path / "first").read_text()
    group, scheme = next(iter(point.allocation.items()))
    file = searched.folder / "refined" / point.id / f"{group}.{scheme}.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 64]))
    with pytest.warns(UserWarning, match="is damaged"):
        again = point.export(folder=tmp_path / "again").read_text()
    assert again == first
    assert file.read_bytes() == whole
