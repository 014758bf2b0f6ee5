"""Folders in compressed-tensors: transformers opens them, and decodes the weights of the search bit for bit."""

import json
from itertools import cycle
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

import mpsearch
from mpsearch.errors import InputError
from mpsearch.exporters.compressed_tensors import CompressedTensors
from mpsearch.models.huggingface import huggingface
from mpsearch.pipeline.prepare import prepare
from mpsearch.registry import resolve
from mpsearch.schemes.integer import Integer
from tests.models.families import batch, tiny

transformers = pytest.importorskip("transformers")
pytest.importorskip("compressed_tensors")
byte_tokenizer = pytest.importorskip("tests.models.byte_tokenizer")
SCHEMES = {
    **{name: resolve("scheme", name) for name in ("w2", "w3", "w5", "w8", "w8a8", "fp32")},
    "w4g32": Integer(4, 32),
    "w6": Integer(6, scale_dtype="float32"),
}


def task(family):
    splits = {name: [batch(family, seed=seed)] for seed, name in enumerate(("calibration", "search", "confirm"))}
    return mpsearch.fidelity_task(**splits, per_token=family != "bert")


def source(folder, family):
    tiny(transformers, family).save_pretrained(folder)
    byte_tokenizer.save_byte_tokenizer(transformers, folder)
    return folder


def exported(tmp_path, family, schemes=SCHEMES):
    """Every scheme in turn, embeddings in float32: (path, engine, allocation)."""
    model = huggingface(source(tmp_path / "source", family))
    embeddings = [f"{name}:fp32" for name, module in model.named_modules() if isinstance(module, torch.nn.Embedding)]
    prepared = prepare(model, task(family), schemes=schemes, quantizer="gptq", pin=embeddings)
    engine, turn = prepared.engine(tmp_path / "bank"), cycle(schemes)
    pinned = {name.split(":")[0] for name in embeddings}
    choice = {group.name: "fp32" if group.name in pinned else next(turn) for group in engine.space.groups}
    allocation = mpsearch.Allocation(choice)
    picked = SimpleNamespace(evaluation=SimpleNamespace(allocation=allocation))
    return CompressedTensors().export(picked, engine, tmp_path / "out"), engine, allocation


@pytest.mark.filterwarnings("ignore:.*not positive definite")
@pytest.mark.parametrize("family", ["llama", "llama_tied", "bert"])
def test_weights_are_decoded_bit_for_bit(tmp_path, family):
    path, engine, allocation = exported(tmp_path, family)
    loaded = CompressedTensors().load(path, engine.model)
    loss = engine.score_of(loaded, "search").loss  # the first pass decompresses
    assert loss == pytest.approx(engine.score(allocation).loss, rel=0.1, abs=1e-6), "inputs of 8 bits are rounded at other places"
    stored = load_file(path.parent / "model.safetensors")
    for group in engine.space.groups:
        for layer in group.layers:
            weight = engine.quantized(layer.name, allocation[group.name])
            assert torch.equal(loaded.get_submodule(layer.name).weight, weight.dequantize()), layer.name
            if "w" in allocation[group.name]:
                codes = {"weight", "weight_packed", "weight_scale"}
                tensors = [stored[f"{layer.name}.{name}"] for name in codes if f"{layer.name}.{name}" in stored]
                assert sum(tensor.nbytes for tensor in tensors) == pytest.approx(weight.nbytes, abs=32), "rows of whole words"
    assert {file.name for file in path.parent.iterdir()} >= {"config.json", "tokenizer.json", "model.safetensors"}


def test_the_configuration_names_each_layer_once(tmp_path):
    path, engine, allocation = exported(tmp_path, "llama")
    config = json.loads(path.read_text())["quantization_config"]
    groups = config["config_groups"]
    targets = [name for group in groups.values() for name in group["targets"]]
    quantized = [layer.name for g in engine.space.groups for layer in g.layers if allocation[g.name] != "fp32"]
    assert sorted(targets) == sorted(quantized)
    assert not set(targets) & set(config["ignore"])
    assert config["format"] == "mixed-precision"
    assert groups["w8a8"]["format"] == "int-quantized"
    assert groups["w4g32"]["weights"] | {"num_bits": 4, "group_size": 32, "strategy": "group"} == groups["w4g32"]["weights"]


@pytest.mark.filterwarnings("ignore:.*not positive definite")
@pytest.mark.slow
def test_from_a_search_to_a_folder_that_is_replaced_whole(tmp_path):
    model = huggingface(source(tmp_path / "source", "llama"))
    schemes = {"w4": SCHEMES["w2"], "w8": SCHEMES["w8"], "fp32": SCHEMES["fp32"]}
    options = {"quantizer": "gptq", "pin": ["model.embed_tokens:fp32"], "n_trials": 6, "n_seeds": 3, "confirm_points": 2}
    result = mpsearch.search(model, task("llama"), schemes=schemes, folder=tmp_path / "run", **options)
    path = result.export("compressed_tensors", bits=9)
    assert path == tmp_path / "run" / "compressed_tensors" / "config.json"
    (path.parent / "model-00002-of-00002.safetensors").write_bytes(b"of an earlier export")
    again = result.export("compressed_tensors", tmp_path / "run", bits=20)
    assert again == path
    assert not list(path.parent.glob("model-*"))
    assert not (path.parent / ".export").exists()


def test_what_has_no_form_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"Layer 'lm_head' \(linear\) in scheme 'nf4' .* has no form"):
        exported(tmp_path, "llama", {"nf4": resolve("scheme", "nf4"), "fp32": SCHEMES["fp32"]})
    prepared = prepare(tiny(transformers, "llama"), task("llama"), schemes=["w8"], quantizer="round_to_nearest")
    with pytest.raises(InputError, match="writes models of Hugging Face transformers"):
        CompressedTensors().export(None, SimpleNamespace(model=torch.nn.Linear(2, 2)), tmp_path)
    engine = prepared.engine(tmp_path / "other")
    picked = SimpleNamespace(evaluation=SimpleNamespace(allocation=engine.space.uniform("w8")))
    with pytest.raises(InputError, match=r"has no config.json|writes models of Hugging Face"):
        CompressedTensors().export(picked, engine, tmp_path)
