"""Every scheme that compressed-tensors has a format for, in every layout of a checkpoint: decoded by the package, then run."""

import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

import mpsearch
from mpsearch.errors import InputError
from mpsearch.exporters import hf_checkpoint
from mpsearch.exporters.compressed_tensors import CompressedTensors
from mpsearch.exporters.compressed_tensors_forms import form_of, has_form, tensor_scales
from mpsearch.layer import LayerSpec
from mpsearch.models.huggingface import huggingface
from mpsearch.pipeline.prepare import prepare
from mpsearch.quantizers.base import kernel_codes
from mpsearch.registry import resolve
from mpsearch.runtimes.vllm import VLLM
from mpsearch.schemes.codebook import Codebook
from mpsearch.schemes.floating import Float
from mpsearch.schemes.integer import Integer
from tests.models.families import batch, tiny

transformers = pytest.importorskip("transformers")
pytest.importorskip("compressed_tensors")

INT8 = {"bits": 8, "scale": "token"}
SCHEMES = {
    **{f"w{bits}": Integer(bits) for bits in range(2, 9)},
    **{f"w{bits}g32u": Integer(bits, 32, symmetric=False) for bits in range(2, 9)},
    "w8a8": Integer(8, input=INT8),
    "w8ta8s": Integer(8, "tensor", input={"bits": 8, "scale": "static"}),
    "w4a8": Integer(4, input=INT8),
    "w3g32a8": Integer(3, 32, symmetric=False, input=INT8),
    "w4a4": Integer(4, input={"bits": 4, "scale": "token"}),
    "fp8": Codebook("e4m3", "channel", "float32"),
    "fp8t": Codebook("e4m3", "tensor", "float32"),
    "fp8a8": Codebook("e4m3", "channel", "float32", {"levels": "e4m3", "scale": "token"}),
    "fp8a8s": Codebook("e4m3", "channel", "float32", {"levels": "e4m3", "scale": "static"}),
    "mxfp4": resolve("scheme", "mxfp4"),
    "mxfp8a8": resolve("scheme", "mxfp8a8"),
    "nvfp4": resolve("scheme", "nvfp4"),
    "nvfp4a4": resolve("scheme", "nvfp4a4"),
}
FLOAT_INPUTS = {name: scheme for name, scheme in SCHEMES.items() if scheme.input is None}
FLOATS = {"fp32": Float("float32"), "bf16": Float("bfloat16")}


@pytest.fixture(scope="module")
def engine_of(tmp_path_factory):
    """Family -> an engine with all schemes that have a form, each made once; embeddings in float32 unless searched."""
    made = {}

    def make(family, schemes=SCHEMES, pins=None):
        if (family, *schemes) not in made:
            folder = tmp_path_factory.mktemp(family)
            tiny(transformers, family).save_pretrained(folder / "source")
            model = huggingface(folder / "source")
            splits = {split: [batch(family, seed=seed)] for seed, split in enumerate(("calibration", "search", "confirm"))}
            task = mpsearch.fidelity_task(**splits, per_token=family != "bert")
            names = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Embedding)]
            pins = [f"{name}:fp32" for name in names] if pins is None else pins
            prepared = prepare(model, task, schemes={**schemes, **FLOATS}, quantizer="round_to_nearest", pin=pins)
            made[family, *schemes] = prepared.engine(folder / "bank"), folder / "source"
        return made[family, *schemes]

    return make


def written(engine, folder, choose):
    """Export the scheme that `choose(group name, position)` gives where the group may have it; (path, allocation)."""
    groups = zip(engine.space.groups, engine.space.choices, strict=True)
    chosen = {g.name: s if (s := choose(g.name, i)) in choices else "fp32" for i, (g, choices) in enumerate(groups)}
    allocation = mpsearch.Allocation(chosen)
    picked = SimpleNamespace(evaluation=SimpleNamespace(allocation=allocation))
    return CompressedTensors().export(picked, engine, folder / "out"), allocation


def check(path, source, engine, allocation, rel=1e-3):
    """Weights bit for bit by the package's reader, the loss in transformers as it was scored."""
    decoded = CompressedTensors().decode(path, huggingface(source))
    for group in engine.space.groups:
        for layer in group.layers:
            expected = engine.quantized(layer.name, allocation[group.name]).dequantize()
            for module in layer.modules if allocation[group.name] not in FLOATS else layer.modules[:1]:
                if ".experts." not in module or module in decoded:
                    assert torch.equal(decoded[module], expected), (module, allocation[group.name])
    opened = CompressedTensors().open(path, huggingface(source))
    assert engine.score_of(opened, "search").loss == pytest.approx(engine.score(allocation).loss, rel=rel, abs=1e-6)
    return json.loads(path.read_text())


@pytest.mark.thin(5)
@pytest.mark.parametrize("name", SCHEMES)
def test_every_form(tmp_path, engine_of, name):
    engine, source = engine_of("llama")
    path, allocation = written(engine, tmp_path, lambda group, i: name)
    assert list(allocation.values()).count(name) >= 15
    config = check(
        path, source, engine, allocation, 0.1 if SCHEMES[name].input else 1e-3
    )  # inputs are rounded alike, not equally
    assert config["quantization_config"]["format"] == form_of(SCHEMES[name]).format


def test_each_width_in_turn_in_bert(tmp_path, engine_of):
    engine, source = engine_of("bert")
    names = list(FLOAT_INPUTS)
    path, allocation = written(engine, tmp_path, lambda group, i: names[i % len(names)])
    config = check(path, source, engine, allocation)["quantization_config"]
    assert config["format"] == "mixed-precision"
    targets = [target for group in config["config_groups"].values() for target in group["targets"]]
    assert sorted(targets) == sorted(group for group, scheme in allocation.items() if scheme != "fp32")
    assert not set(targets) & set(config["ignore"])


def test_transformers_opens_every_format_in_bfloat16(tmp_path, engine_of):
    """As its users do; formats with zero points aside, see `_is_loadable`."""
    engine, _ = engine_of("llama")
    names = [name for name, scheme in SCHEMES.items() if getattr(scheme, "symmetric", True)]
    path, allocation = written(engine, tmp_path, lambda group, i: names[i % len(names)])
    assert len(set(allocation.values())) > 14
    model = transformers.AutoModelForCausalLM.from_pretrained(path.parent, dtype=torch.bfloat16)
    inputs = batch("llama")
    with torch.no_grad():
        logits = model(**inputs).logits.float()
        with engine.applied(allocation) as ours:
            expected = ours(**inputs).logits
    for layer in engine.space.layers:
        value = engine.quantized(layer.name, allocation[layer.group]).dequantize()
        assert torch.allclose(model.get_submodule(layer.name).weight.float(), value, rtol=2**-7), layer.name
    assert (logits - expected).std() < 0.1 * expected.std()


@pytest.mark.thin(2)
@pytest.mark.parametrize(
    ("family", "names"),
    [("mixtral", ["w4"]), ("qwen2_moe", ["w3"]), ("qwen2_moe", ["w2", "w5g32u", "mxfp4", "nvfp4"]), ("mixtral", ["fp8"])],
)
def test_experts_are_named_as_in_the_checkpoint(tmp_path, engine_of, family, names):
    engine, source = engine_of(family)
    path, allocation = written(engine, tmp_path, lambda group, i: names[i % len(names)])
    config = check(path, source, engine, allocation)["quantization_config"]
    stored = load_file(path.parent / "model.safetensors")
    files = {name.rpartition(".")[0] for name in stored if ".experts." in name}
    before = {name.rpartition(".")[0] for name in load_file(source / "model.safetensors") if ".experts." in name}
    assert files == before
    patterns = [target for group in config["config_groups"].values() for target in group["targets"] if "experts" in target]
    assert (patterns == [r"re:.*\.experts\.\d+\..*"]) == (len(names) == 1)
    if len(names) == 1:
        model = huggingface(path.parent)  # transformers alone
        assert engine.score_of(model, "search").loss == pytest.approx(engine.score(allocation).loss, rel=1e-3, abs=1e-6)


def test_what_is_one_tensor_stays_one(tmp_path, engine_of):
    """gpt-oss: attention is quantized, experts are written as they were, transposed and stacked."""
    engine, source = engine_of("gpt_oss")
    path, allocation = written(engine, tmp_path, lambda group, i: "fp32" if "experts" in group else "w4")
    check(path, source, engine, allocation)
    stored, before = load_file(path.parent / "model.safetensors"), load_file(source / "model.safetensors")
    kept = [name for name in before if "experts" in name or "router" in name]
    assert len(kept) >= 12
    assert all(torch.equal(stored[name], before[name]) for name in kept)
    with pytest.raises(InputError, match=r"the experts of '.*' are one tensor in the checkpoint"):
        written(engine, tmp_path / "experts", lambda group, i: "w4")
    with pytest.raises(InputError, match="transformers runs experts with float inputs"):
        written(engine_of("mixtral")[0], tmp_path / "inputs", lambda group, i: "w8a8")


def test_conv1d_is_written_as_vllm_reads_it(tmp_path, engine_of):
    """GPT-2: packed codes are output channels first, and vLLM turns round what is called `weight`."""
    engine, source = engine_of("gpt2")
    path, allocation = written(engine, tmp_path, lambda group, i: "bf16" if "c_proj" in group else "w4g32u")
    check(path, source, engine, allocation)
    stored = load_file(path.parent / "model.safetensors")
    assert stored["transformer.h.0.attn.c_attn.weight_packed"].shape == (192, 64 * 4 // 32)
    assert stored["transformer.h.0.mlp.c_proj.weight"].shape == (256, 64)
    with pytest.raises(InputError, match="of a Conv1D vLLM takes packed codes only"):
        written(engine, tmp_path / "again", lambda group, i: "fp8")


def test_a_tied_weight_that_is_searched_is_written_twice(tmp_path, engine_of, caplog):
    engine, source = engine_of("llama_tied", {"w4": SCHEMES["w4"], "w8a8": SCHEMES["w8a8"]}, [])
    path, allocation = written(engine, tmp_path, lambda group, i: "w4")
    assert "is written twice" in caplog.text
    config = check(path, source, engine, allocation)
    assert config["tie_word_embeddings"] is False
    stored = load_file(path.parent / "model.safetensors")
    assert torch.equal(stored["lm_head.weight_packed"], stored["model.embed_tokens.weight_packed"])
    with pytest.raises(InputError, match=r"\(embedding\) in scheme 'w8a8' .* an embedding in 2, 4 or 8 bits"):
        written(engine, tmp_path / "again", lambda group, i: "w8a8")


def test_fused_layers_have_one_tensor_scale(tmp_path, engine_of):
    engine, _ = engine_of("llama", {"nvfp4": SCHEMES["nvfp4"]})
    path, _ = written(engine, tmp_path, lambda group, i: "nvfp4")
    stored = load_file(path.parent / "model.safetensors")
    for fused in (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj")):
        scales = {stored[f"model.layers.0.{name}.weight_global_scale"].item() for name in fused}
        assert len(scales) == 1
    own = {float(engine.quantized(f"model.layers.0.self_attn.{n}_proj", "nvfp4").tensors["tensor_scale"]) for n in "qkv"}
    assert max(own) == 1 / stored["model.layers.0.self_attn.q_proj.weight_global_scale"]
    small = engine.quantized("model.layers.0.self_attn.k_proj", "nvfp4")
    large = Codebook("e2m1", 16, "e4m3").quantize(small.dequantize() * 2.0**14, kernel_codes_of, None)
    layers = [la for la in engine.space.layers if la.name.endswith(("0.self_attn.q_proj", "0.self_attn.k_proj"))]
    weights = {"model.layers.0.self_attn.k_proj": small, "model.layers.0.self_attn.q_proj": large}
    with pytest.raises(InputError, match=r"k_proj' has blocks of weights that are too small for a tensor scale in common"):
        tensor_scales(weights, layers)


def kernel_codes_of(matrix, scheme, group_size, importance):
    return kernel_codes(matrix, scheme, group_size)


def test_large_folders_are_shards_that_keep_a_layer_together(tmp_path, engine_of, monkeypatch):
    engine, source = engine_of("llama")
    monkeypatch.setattr(hf_checkpoint, "SHARD_BYTES", 50_000)
    path, allocation = written(engine, tmp_path, lambda group, i: "w4g32u")
    check(path, source, engine, allocation)
    index = json.loads((path.parent / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) == 3
    assert set(index["weight_map"].values()) == {file.name for file in path.parent.glob("*.safetensors")}
    for file in path.parent.glob("*.safetensors"):
        names = [name.removesuffix("_packed") for name in load_file(file) if name.endswith("weight_packed")]
        assert all(index["weight_map"][f"{name}_scale"] == file.name for name in names)


def test_the_profile_of_vllm_names_what_has_a_form():
    layers = [LayerSpec("fc", kind, (64, 128), 1, "fc", ("fc",)) for kind in ("linear", "embedding", "conv1d")]
    for layer in layers:
        for name, scheme in SCHEMES.items():
            assert not VLLM().runs(layer, scheme) or has_form(layer, scheme), (layer.kind, name)
    assert all(VLLM().runs(layers[0], scheme) for scheme in SCHEMES.values())
    assert not VLLM().runs(LayerSpec("a.experts.0.down_proj", "linear", (8, 64), 1, "", ()), SCHEMES["w8a8"])
    assert not any(VLLM().runs(layers[1], scheme) for scheme in SCHEMES.values()), "transformers opens no packed embedding"
