"""The public API, as a user calls it: a model and a task in memory, choices by name or as objects, files out."""

import gc
import inspect
import json
import pickle

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

import mpsearch
from mpsearch.exporters.allocation_file import load_allocation
from mpsearch.graph.shared_copy import shared_copy
from mpsearch.quantizers.round_to_nearest import RoundToNearest
from mpsearch.registry import names, resolve
from mpsearch.schemes.integer import Integer

CHEAP = {"quantizer": "round_to_nearest", "metric": "weight_mse", "n_trials": 6, "n_seeds": 4}


@pytest.fixture(scope="module")
def done(tiny, tmp_path_factory):
    """(model, task, result) of one search in a folder."""
    model, task = tiny.net(), tiny.task()
    folder = tmp_path_factory.mktemp("runs") / "a run"
    return model, task, mpsearch.search(model, task, schemes=["w2", "w4", "w8"], folder=folder, **CHEAP)


def test_the_callers_model_is_left_unchanged_and_shares_its_weights(tiny):
    model, task = tiny.net().train(), tiny.task()
    model.first.weight.requires_grad_(False)
    before = tiny.state(model)
    result = mpsearch.search(model, task, schemes=["w2", "w8"], budget={"bits": 5}, **CHEAP)
    result.export()
    mpsearch.finetune(result, epochs=1, batches=1)
    tiny.assert_same_state(model, before)
    assert model.training
    assert isinstance(model.norm, nn.BatchNorm2d)
    prepared = result.workspace.prepared
    assert prepared.original is model
    assert prepared.model.last.weight.data_ptr() == model.last.weight.data_ptr(), "no second copy in memory"
    assert prepared.model.second.weight.data_ptr() != model.second.weight.data_ptr(), "folded, so other values"


def test_a_shared_copy_keeps_ties_and_buffers_apart():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.head = nn.Embedding(5, 3), nn.Linear(3, 5, bias=False)
            self.head.weight = self.embedding.weight
            self.register_buffer("counts", torch.zeros(2))

    model = Tied()
    copy = shared_copy(model)
    assert copy.head.weight is copy.embedding.weight
    assert copy.head.weight is not model.head.weight
    assert copy.head.weight.data_ptr() == model.head.weight.data_ptr()
    copy.counts += 1
    assert not model.counts.any()
    copy.head.weight.data = torch.zeros(5, 3)
    assert model.head.weight.any()

    def generator():
        yield 1

    model.stuck = generator()
    with pytest.raises(mpsearch.InputError, match=r"cannot be copied .* Give a function that builds it"):
        shared_copy(model)


def test_names_and_objects_and_functions_are_the_same_choices(tiny, tmp_path):
    named = mpsearch.search(tiny.net(), tiny.task(), schemes=["w2", "w4"], folder=tmp_path / "named", **CHEAP)
    objects = mpsearch.search(
        tiny.net,
        tiny.task(),
        schemes={"w2": Integer(2), "w4": {"_target_": "mpsearch.schemes.integer.Integer", "bits": 4}},
        folder=tmp_path / "objects",
        **{**CHEAP, "quantizer": RoundToNearest(), "metric": resolve("metric", "weight_mse")},
    )
    assert named.run.evaluations
    columns = ["size_bytes", "loss", "accuracy", "split", "allocation"]  # times differ
    pd.testing.assert_frame_equal(named.front[columns], objects.front[columns])
    assert sorted(names("scheme")) == names("scheme")
    assert "custom" not in names("sampler")


def test_tables_are_tidy(done):
    _, _, result = done
    front, evaluations, sensitivity = result.front, result.evaluations, result.sensitivity
    assert {"size_bytes", "average_bits", "loss", "accuracy", "split", "allocation"} <= set(front.columns)
    assert front[front.split == "search"].loss.is_monotonic_decreasing
    assert set(evaluations.split) == {"search", "confirm"}
    assert len(sensitivity) == 3 * 3
    assert {"group", "scheme", "value"} <= set(sensitivity.columns)
    assert repr(result).startswith("Result(TinyNet: ")
    page = result._repr_html_()
    assert page.count("<img") == 1
    assert "uniform w4" in page
    figure = result.plot()
    assert len(figure.axes) >= 2
    assert result.report() == result.folder / "report.md"


def test_a_picked_point_is_exported_and_scores_the_same(done, tmp_path):
    model, task, result = done
    point = result.pick(bits=5)
    path = point.export(folder=tmp_path / "out")
    assert path == tmp_path / "out" / "allocation.json"
    with torch.no_grad():
        loaded = load_allocation(path).apply(shared_copy(model))
        logits = torch.cat([task.forward(loaded, x) for x, _ in task.batches("search")])
    targets = torch.cat([y for _, y in task.batches("search")])
    assert float((logits.argmax(1) == targets).float().mean()) == pytest.approx(point.evaluation.quality)
    assert result.export("packed", tmp_path / "packed", point=point.id).name == "packed.safetensors"
    with pytest.raises(mpsearch.InputError, match="There is no exporter 'gguff'"):
        result.export("gguff")


def test_solve_confirm_and_finetune_return_new_results(done):
    _, _, result = done
    n = len(result.evaluations)
    point = mpsearch.solve(result, budget={"bits": 3.5})
    assert point.evaluation.average_bits <= 3.5
    assert len(result.evaluations) == n
    assert len(point.result.evaluations) >= n
    table = mpsearch.confirm(point.result, [dict.fromkeys(result.run.space.names, "w4")])
    assert table.split.tolist() == ["confirm"]
    assert not table.packed.isna().any()
    trained = mpsearch.finetune(point, epochs=1, batches=1)
    assert trained.training.epochs == 1
    assert json.loads(trained.export(folder=result.folder / "trained").read_text())["format"]
    with pytest.raises(mpsearch.InputError, match="An allocation must give each of the 3 groups one of w2, w4, w8"):
        mpsearch.confirm(result, [{"first": "w4"}])
    with pytest.raises(mpsearch.InputError, match="got neither a budget nor max_drop"):
        mpsearch.solve(result)


def test_a_run_is_loaded_for_tables_and_with_its_model_for_more(done, tiny, tmp_path):
    model, task, result = done
    loaded = mpsearch.load_result(result.folder)
    pd.testing.assert_frame_equal(loaded.sensitivity, result.sensitivity)
    assert loaded.pick(bits=5).id == result.pick(bits=5).id
    with pytest.raises(mpsearch.InputError, match=r"loaded without its model and task.*load_result\(folder, model, task\)"):
        loaded.export()
    with pytest.raises(mpsearch.InputError, match="has checksum"):
        mpsearch.load_result(result.folder, tiny.net(seed=1), task).export(folder=tmp_path)
    again = mpsearch.load_result(result.folder, model, task).export(folder=tmp_path / "again", bits=5)
    first = result.export(folder=tmp_path / "first", bits=5)
    assert again.read_bytes() == first.read_bytes()
    without = mpsearch.load_result(result.folder, model).export(folder=tmp_path / "without", bits=5)
    assert without.read_bytes() == first.read_bytes()


def test_a_search_is_resumed_by_the_same_call(done, tiny):
    _, _, result = done
    more = mpsearch.search(tiny.net(), tiny.task(), schemes=["w2", "w4", "w8"], folder=result.folder, **{**CHEAP, "n_trials": 8})
    trials = more.evaluations.trial.dropna().astype(int)
    assert sorted(trials[more.evaluations.split == "search"]) == list(range(8))
    with pytest.raises(mpsearch.InputError, match="belongs to another run"):
        mpsearch.search(tiny.net(), tiny.task(), schemes=["w2", "w8"], folder=result.folder, **CHEAP)


def test_a_temporary_folder_goes_with_the_result(tiny):
    result = mpsearch.search(tiny.net(), tiny.task(), schemes=["w4", "w8"], **CHEAP)
    folder = result.folder
    assert (folder / "evaluations.csv").exists()
    point = result.pick()
    del result
    assert point.export().exists()
    del point
    gc.collect()
    assert not folder.exists()


def test_sensitivity_and_hardware(tiny, tmp_path):
    table = mpsearch.sensitivity(tiny.net(), tiny.task(), schemes=["w2", "w8"], metric="kl", quantizer="round_to_nearest")
    assert table.values.shape == (3, 2)
    assert np.isfinite(table.values).all()
    space, rows = mpsearch.hardware(tiny.net(), tiny.task(), schemes=["w4"], seconds=0.05, folder=tmp_path)
    assert {row.layer for row in rows} >= set(space.names)


def test_costs_that_budgets_and_objectives_name_are_added(tiny):
    result = mpsearch.search(
        tiny.net(), tiny.task(), schemes=["w2", "w8"], budget={"bit_operations": 1e9}, objective="bytes", **CHEAP
    )
    assert "bit_operations" in result.front.columns


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"schemes": []}, "schemes must name at least one scheme"),
        ({"schemes": ["w44"]}, "There is no scheme 'w44'. Did you mean 'w4a4' or 'w4'"),
        ({"schemes": [Integer(4)]}, "schemes must be names, or a mapping of names to schemes; got a Integer"),
        ({"schemes": ["w4"], "quantizer": "gptqq"}, "There is no quantizer 'gptqq'. Did you mean 'gptq'"),
        ({"schemes": ["w4"], "quantizer_of": {"w2": "gptq"}}, "quantizer_of.w2: this run has no scheme 'w2'"),
        ({"schemes": ["w4"], "budget": {"bitz": 3}}, "There is no cost 'bitz'"),
        ({"schemes": ["w4"], "budget": {"fraction": 12}}, "budget.fraction must be at most 1"),
        ({"schemes": ["w4"], "objective": ["bytes", "bits"]}, "are the same cost in two units"),
        ({"schemes": ["w4"], "objective": []}, "objective must be one cost, or two in brackets; got 0"),
        ({"schemes": ["w4"], "device": "cuda:7"}, "There is no device 'cuda:7'"),
        ({"schemes": ["w4"], "in_flight": 0}, "in_flight"),
        ({"schemes": ["w4"], "max_drop": -1}, "max_drop must be a number of 0 or more"),
        ({"schemes": ["w8a8", "fp32"], "runtime": "onnxruntime"}, "scheme.w8a8.input.scale=static"),
    ],
)
def test_mistakes_are_one_sentence(arguments, message, tiny):
    with pytest.raises(mpsearch.InputError) as caught:
        mpsearch.search(tiny.net(), tiny.task(), **{**CHEAP, **arguments})
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_task_that_is_none_is_refused(tiny):
    with pytest.raises(mpsearch.InputError, match=r"The task is a list; it must be an instance of a subclass of mpsearch.Task"):
        mpsearch.search(tiny.net(), [], schemes=["w4"])
    with pytest.raises(mpsearch.InputError, match=r"The model is a dict; it must be"):
        mpsearch.search({}, tiny.task(), schemes=["w4"])


def test_everything_public_is_documented_and_typed():
    for name in mpsearch.__all__:
        thing = getattr(mpsearch, name)
        assert inspect.getdoc(thing), name
        if inspect.isfunction(thing):
            signature = inspect.signature(thing)
            assert signature.return_annotation is not signature.empty, name
            assert all(p.annotation is not p.empty for p in signature.parameters.values()), name
    assert dir(mpsearch) == sorted([*mpsearch.__all__, "__version__"])
    assert pickle.loads(pickle.dumps(mpsearch.Allocation({"a": "w4"}))) == mpsearch.Allocation({"a": "w4"})
