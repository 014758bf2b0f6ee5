"""Recipes of tools that quantize themselves: what they say, and, where the tools are installed, that they read them."""

import json
from itertools import cycle
from types import SimpleNamespace

import pytest
import torch
import yaml

import mpsearch
from mpsearch.errors import InputError
from mpsearch.exporters.recipe import TOOLS, Recipe
from mpsearch.registry import resolve
from mpsearch.schemes.codebook import Codebook
from mpsearch.schemes.integer import Integer
from tests.models.families import batch, tiny

WEIGHTS = {"w4": Integer(4), "w8g32": Integer(8, 32), "fp32": resolve("scheme", "fp32")}
ALL = {
    **WEIGHTS,
    "w3": Integer(3),
    "w8a8": Integer(8, input={"bits": 8, "scale": "token"}),
    "fp8a8": resolve("scheme", "fp8a8"),
    "mxfp4": resolve("scheme", "mxfp4"),
    "nvfp4": resolve("scheme", "nvfp4"),
}


def written(tool, tmp_path, schemes, family="llama"):
    """Every scheme in turn: (content, allocation, engine)."""
    from mpsearch.models.huggingface import huggingface
    from mpsearch.pipeline.prepare import prepare

    transformers = pytest.importorskip("transformers")
    tiny(transformers, family).save_pretrained(tmp_path / "source")
    model = huggingface(tmp_path / "source")
    splits = {split: [batch(family, seed=seed)] for seed, split in enumerate(("calibration", "search", "confirm"))}
    pins = [f"{name}:fp32" for name, module in model.named_modules() if isinstance(module, torch.nn.Embedding)]
    task = mpsearch.fidelity_task(**splits, per_token=True)
    prepared = prepare(model, task, schemes=schemes, quantizer="round_to_nearest", pin=pins)
    engine, turn = prepared.engine(tmp_path / "bank"), cycle(schemes)
    choice = {group.name: "fp32" if "embed" in group.name else next(turn) for group in engine.space.groups}
    allocation = mpsearch.Allocation(choice)
    picked = SimpleNamespace(evaluation=SimpleNamespace(allocation=allocation))
    path = Recipe(tool).export(picked, engine, tmp_path / tool)
    assert path.name == TOOLS[tool][0]
    with pytest.raises(InputError, match="holds no weights"):
        Recipe(tool).load(path, engine.model)
    text = path.read_text()
    return yaml.safe_load(text) if path.suffix == ".yaml" else json.loads(text), allocation, engine


def test_modelopt(tmp_path):
    config, allocation, _ = written("modelopt", tmp_path, ALL)
    first, *entries = config["quant_cfg"]
    assert first == {"quantizer_name": "*", "enable": False}
    by_name = {entry["quantizer_name"]: entry["cfg"] for entry in entries}
    expected = {
        "w4": {"num_bits": 4, "axis": 0},
        "w8g32": {"num_bits": 8, "block_sizes": {-1: 32}},
        "fp8a8": {"num_bits": "e4m3", "axis": 0},
        "mxfp4": {"num_bits": "e2m1", "block_sizes": {-1: 32, "type": "dynamic", "scale_bits": "e8m0"}},
        "nvfp4": {"num_bits": "e2m1", "block_sizes": {-1: 16, "type": "dynamic", "scale_bits": "e4m3"}},
    }
    for layer, scheme in allocation.items():
        if scheme in expected:
            assert by_name[f"{layer}.weight_quantizer"] == expected[scheme]
        assert (f"{layer}.input_quantizer" in by_name) == (scheme in ("w8a8", "fp8a8"))


def test_auto_round(tmp_path):
    config, allocation, _ = written("auto_round", tmp_path, ALL)
    assert config.keys() == set(allocation)
    expected = {
        "fp32": {"bits": 16},
        "w4": {"bits": 4, "group_size": -1, "sym": True, "data_type": "int"},
        "nvfp4": {"bits": 4, "group_size": 16, "sym": True, "data_type": "nv_fp"},
        "mxfp4": {"bits": 4, "group_size": 32, "sym": True, "data_type": "mx_fp"},
    }
    for layer, scheme in allocation.items():
        assert config[layer] == expected.get(scheme, config[layer])


def test_gptqmodel(tmp_path):
    config, allocation, _ = written("gptqmodel", tmp_path, WEIGHTS)
    assert config["dynamic"]["+:^model\\.layers\\.0\\.self_attn\\.k_proj$"] == {"bits": 8, "group_size": 32, "sym": True}
    assert len(config["dynamic"]) == len(allocation)
    with pytest.raises(InputError, match=r"Layer 'model.layers.0.self_attn.k_proj' \(linear\) in scheme 'nvfp4' .* in GPTQModel"):
        written("gptqmodel", tmp_path / "again", {"w4": ALL["w4"], "nvfp4": ALL["nvfp4"], "fp32": ALL["fp32"]})


@pytest.mark.parametrize(("schemes", "modifier"), [(WEIGHTS, "GPTQModifier"), (ALL, "QuantizationModifier")])
def test_llm_compressor(tmp_path, schemes, modifier):
    config, allocation, _ = written("llm_compressor", tmp_path, schemes)
    (stage,) = config["quantization_stage"]["quantization_modifiers"].values()
    assert config["quantization_stage"]["quantization_modifiers"].keys() == {modifier}
    targets = {name: group["targets"] for name, group in stage["config_groups"].items()}
    assert targets == {s: [la for la, x in allocation.items() if x == s] for s in targets}
    assert stage["ignore"] == [layer for layer, scheme in allocation.items() if scheme == "fp32"]
    package = pytest.importorskip("compressed_tensors.quantization")
    for group in stage["config_groups"].values():
        package.QuantizationScheme(**group)


def test_aimet(tmp_path):
    schemes = {"w4": ALL["w4"], "w8g32": ALL["w8g32"], "w5u": Integer(5, symmetric=False), "fp32": ALL["fp32"]}
    config, allocation, engine = written("aimet", tmp_path, schemes)
    assert config["version"] == "2.0.0"
    encodings = {encoding["name"].removesuffix(".weight"): encoding for encoding in config["encodings"]}
    assert encodings.keys() == {layer for layer, scheme in allocation.items() if scheme != "fp32"}
    for layer, encoding in encodings.items():
        weight = engine.quantized(layer, allocation[layer])
        codes, _, _, size = weight.scheme.unpacked(weight.tensors, weight.shape)
        scale, zero = torch.tensor(encoding["y_scale"]), torch.tensor(encoding.get("y_zero_point", 0))
        values = codes.float() if weight.scheme.symmetric is False else codes.float() - 2 ** (weight.scheme.bits - 1)
        if encoding["axis"] == 0:
            decoded = (values - zero.reshape(-1, 1)) * scale[:, None]
        else:
            assert encoding["block_size"] == size == 32
            decoded = values * scale.repeat_interleave(size, 1)
        assert torch.equal(decoded, weight.dequantize()), "QuantizeLinear's inverse with these scales"
        assert encoding["output_dtype"] == f"{'int' if weight.scheme.symmetric else 'uint'}{weight.scheme.bits}"
    with pytest.raises(InputError, match="in AIMET"):
        written("aimet", tmp_path / "again", {"nvfp4": Codebook("e2m1", 16, "e4m3"), "fp32": ALL["fp32"]})


def read_by_modelopt(tool, config, allocation):
    assert len(tool.QuantizeConfig(**config).quant_cfg) == len(config["quant_cfg"])


def read_by_auto_round(tool, config, allocation):
    for entry in config.values():
        assert tool.QuantizationScheme.from_dict(entry).bits == entry["bits"]
        assert entry.keys() <= set(tool.QuantizationScheme.get_attributes())


def read_by_gptqmodel(tool, config, allocation):
    for layer, scheme in allocation.items():
        entry, bits = tool.dynamic_get(config["dynamic"], layer), {"w4": 4, "w8g32": 8}.get(scheme)
        assert entry is False if bits is None else entry["bits"] == bits


def read_by_llm_compressor(tool, config, allocation):
    recipe = tool.Recipe.create_instance(yaml.safe_dump(config))
    assert type(recipe.modifiers[0]).__name__ == "GPTQModifier"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("module", "read"),
    [
        ("modelopt.torch.quantization.config", read_by_modelopt),
        ("auto_round.schemes", read_by_auto_round),
        ("gptqmodel.quantization.config", read_by_gptqmodel),
        ("llmcompressor.recipe", read_by_llm_compressor),
    ],
)
def test_the_tool_reads_it(tmp_path, module, read):
    tool = pytest.importorskip(module, exc_type=ImportError)
    config, allocation, _ = written(read.__name__.removeprefix("read_by_"), tmp_path, WEIGHTS)
    read(tool, config, allocation)


def test_experts_are_named_as_in_the_checkpoint(tmp_path):
    config, _, _ = written("auto_round", tmp_path, {"w4": ALL["w4"], "fp32": ALL["fp32"]}, "mixtral")
    assert config["model.layers.0.block_sparse_moe.experts.3.w1"]["bits"] == 4


def test_an_unknown_tool_is_named():
    with pytest.raises(InputError, match="tool must be"):
        Recipe("olive")
