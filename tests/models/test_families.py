"""Families of transformers: all layers are found, sizes are exact, a search runs, and the packed model gives the same outputs."""

import pytest
import torch

import mpsearch
from mpsearch.graph.projections import expose_projections
from mpsearch.graph.shared_copy import shared_copy
from mpsearch.pipeline.prepare import prepare
from tests.models.families import FAMILIES, MOES, batch, tiny

transformers = pytest.importorskip("transformers")
FAST = ("llama_tied", "gpt2", "mixtral", "bert")
EACH = [pytest.param(name, marks=[] if name in FAST else pytest.mark.slow) for name in FAMILIES]


def task(family):
    splits = {name: [batch(family, seed=seed)] for seed, name in enumerate(("calibration", "search", "confirm"))}
    return mpsearch.fidelity_task(**splits, per_token=FAMILIES[family][3] in ("text", "text_to_text", "speech"))


@pytest.mark.filterwarnings("ignore:.*(without a Hessian|not positive definite)")  # Mamba's dt_proj; random networks
@pytest.mark.parametrize("family", EACH)
def test_a_search_finds_all_layers_and_its_points_run_packed(family):
    model = tiny(transformers, family)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    result = mpsearch.search(model, task(family), schemes=["w3", "w8"], quantizer="gptq", n_trials=4, n_seeds=2, confirm_points=2)
    about = result.run.identity["not_searched"]
    assert about["float_bytes"] < 0.05 * about["bytes"], "embedded positions, norms, biases, routers"
    assert all(e.verified for e in result.run.on("confirm").values())
    assert any(e.packed for e in result.run.on("confirm").values())
    assert min(e.loss for e in result.run.front) < 1e-3
    sizes = {e.size_bytes for e in result.run.front}
    assert len(sizes) > 1
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items()), "the model is left as it was"


@pytest.mark.parametrize("family", MOES)
def test_experts_become_linear_layers_with_the_same_outputs(family):
    model, inputs = tiny(transformers, family), batch(family)
    with torch.no_grad():
        expected = model(**inputs).logits
        split = expose_projections(shared_copy(model))
        assert torch.allclose(split(**inputs).logits, expected, atol=1e-5)
    names = [name for name, module in split.named_modules() if isinstance(module, torch.nn.Linear) and ".experts." in name]
    assert len(names) == 2 * 4 * 2, "two projections of four experts in two blocks"
    assert not any(".experts." in name and isinstance(m, torch.nn.Linear) for name, m in model.named_modules())


def test_the_experts_of_a_block_are_one_group():
    prepared = prepare(tiny(transformers, "mixtral"), task("mixtral"), schemes=["w4"])
    groups = [group for group in prepared.space.groups if any(".experts." in layer.name for layer in group.layers)]
    assert [len(group.layers) for group in groups] == [8, 8]
    assert not any("gate." in layer.name or layer.name.endswith(".gate") for g in groups for layer in g.layers), "the router"


def test_an_expert_that_no_token_reaches_is_quantized_too(tmp_path):
    model = tiny(transformers, "mixtral")
    for block in model.model.layers:
        block.mlp.gate.weight.data[3] = 0.0
        block.mlp.gate.weight.data[:3] *= 100.0
    engine = prepare(model, task("mixtral"), schemes=["w4"]).engine(tmp_path)
    assert engine.score(engine.space.uniform("w4")).loss < 0.1
