"""GGUF files: the package gguf decodes the weights of the search bit for bit, and llama.cpp computes what they give."""

import json
from itertools import cycle
from types import SimpleNamespace

import pytest
import torch

import mpsearch
from mpsearch.errors import InputError
from mpsearch.exporters.gguf import GGUF
from mpsearch.exporters.gguf_blocks import ggml_type
from mpsearch.exporters.gguf_source import read_gguf
from mpsearch.graph.shared_copy import shared_copy
from mpsearch.models.huggingface import huggingface
from mpsearch.pipeline.prepare import prepare
from mpsearch.registry import resolve
from mpsearch.schemes.codebook import MXFP4
from mpsearch.schemes.integer import Integer
from tests.models.families import FAMILIES, batch, tiny

transformers = pytest.importorskip("transformers")
pytest.importorskip("gguf")
byte_tokenizer = pytest.importorskip("tests.models.byte_tokenizer")
FLOATS = {name: resolve("scheme", name) for name in ("fp32", "fp16", "bf16")}
SCHEMES = {"q4_0": Integer(4, 32), "q5_0": Integer(5, 32), "q8_0": Integer(8, 32), "mxfp4": MXFP4, **FLOATS}
LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
CONFIGS = {  # in addition to those of `FAMILIES`
    "llama_scaled": ("llama", {"rope_parameters": {**LLAMA3, "original_max_position_embeddings": 16, "rope_theta": 1e4}}),
    "llama_biased": ("llama", {"attention_bias": True}),
    "gemma2": ("gemma2", {"query_pre_attn_scalar": 16}),
    "gemma3": ("gemma3", {"query_pre_attn_scalar": 16}),
}
NAMES = ("llama", "llama_tied", "llama_scaled", "llama_biased", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "gpt2")


def model_of(name, gain=4, **changes):
    """A tiny model with random weights, biases included, and with attention that has something to attend to."""
    family, more = CONFIGS.get(name, (name, {}))
    model, config, arguments, _ = FAMILIES[family]
    torch.manual_seed(0)
    built = getattr(transformers, model)(getattr(transformers, config)(**{**arguments, **more, **changes})).eval()
    for parameter in built.parameters():
        if parameter.dim() == 1:
            parameter.data = parameter.data + 0.1 * torch.randn_like(parameter)
        else:
            parameter.data *= gain
    return built


def saved(folder, model):
    """The folder of a model, with a tokenizer of bytes and one merge, without which llama.cpp loads none."""
    model.save_pretrained(folder)
    byte_tokenizer.save_byte_tokenizer(transformers, folder)
    about = json.loads((folder / "tokenizer.json").read_text())
    about["model"] |= {"vocab": {**about["model"]["vocab"], "th": 258}, "merges": [["t", "h"]]}
    (folder / "tokenizer.json").write_text(json.dumps(about))
    return folder


def task(family="llama"):
    splits = {name: [batch(family, seed=seed)] for seed, name in enumerate(("calibration", "search", "confirm"))}
    return mpsearch.fidelity_task(**splits, per_token=True)


def prepared_of(folder, schemes=SCHEMES, **options):
    options = {"quantizer": "round_to_nearest", "runtime": "llama_cpp", **options}
    return prepare(huggingface(folder), task(), schemes=schemes, **options)


def exported(prepared, folder, schemes=SCHEMES):
    """Every scheme in turn: (path, engine, allocation)."""
    engine, turn = prepared.engine(folder / "bank"), cycle(schemes)
    allocation = mpsearch.Allocation({group.name: next(turn) for group in engine.space.groups})
    picked = SimpleNamespace(evaluation=SimpleNamespace(allocation=allocation))
    return GGUF().export(picked, engine, folder / "out"), engine, allocation


def chosen(engine, allocation):
    return [(layer, engine.quantized(layer.name, allocation[g.name])) for g in engine.space.groups for layer in g.layers]


@pytest.mark.thin(4)
@pytest.mark.parametrize("name", NAMES)
def test_weights_are_decoded_bit_for_bit(tmp_path, name):
    prepared = prepared_of(saved(tmp_path / "source", model_of(name)))
    path, engine, allocation = exported(prepared, tmp_path)
    exporter = GGUF()
    decoded = exporter.decode(path, engine.model)
    stored = {tensor.name: tensor for tensor in read_gguf(path).tensors}
    nbytes = {tensor.tensor_type.name: 0 for tensor in stored.values()}
    for layer, weight in chosen(engine, allocation):
        assert torch.equal(decoded[layer.name], weight.dequantize()), layer.name
        nbytes[ggml_type(weight.scheme)] += weight.nbytes
    for kind in set(nbytes) - {"F32"}:
        assert nbytes[kind] == sum(tensor.n_bytes for tensor in stored.values() if tensor.tensor_type.name == kind)
    loaded = exporter.load(path, shared_copy(prepared.original))
    assert engine.score_of(loaded, "search").loss == pytest.approx(engine.score(allocation).loss, rel=1e-4)
    assert ("output.weight" in stored) == (not prepared.original.config.tie_word_embeddings)


@pytest.mark.thin(4)
@pytest.mark.parametrize("name", NAMES)
def test_llama_cpp_computes_what_the_weights_give(tmp_path, name):
    pytest.importorskip("llama_cpp")
    prepared = prepared_of(saved(tmp_path / "source", model_of(name)), FLOATS)
    path, engine, _ = exported(prepared, tmp_path, {"fp32": FLOATS["fp32"]})
    ids = batch("llama")["input_ids"]
    opened = GGUF().open(path, engine.model)
    with torch.no_grad():
        ours = prepared.original(input_ids=ids).logits
    assert (opened(ids) - ours).abs().max() < 0.01 * ours.abs().max(), "its cache of keys and values is in float16"
    assert opened(ids[:, :5]).shape == (4, 5, ours.shape[-1])


def test_a_gguf_file_is_a_source_too(tmp_path):
    pytest.importorskip("accelerate")
    prepared = prepared_of(saved(tmp_path / "source", model_of("llama_scaled")))
    path, engine, _ = exported(prepared, tmp_path)
    again = prepared_of(path)
    assert again.original.name_or_path == str(path)
    for name, values in GGUF().decode(path, engine.model).items():
        assert torch.equal(again.original.get_submodule(name).weight, values), name
    second, _, _ = exported(again, tmp_path / "again", {"fp32": FLOATS["fp32"]})
    keys, copied = read_gguf(path).fields, read_gguf(second).fields
    assert keys.keys() == copied.keys()
    assert all(keys[key].contents() == copied[key].contents() for key in keys if key != "general.file_type")
    names = [tensor.name for tensor in read_gguf(second).tensors]
    assert "rope_freqs.weight" in names, "no parameter of the model"
    assert len(names) == len(set(names))


@pytest.mark.parametrize(
    ("family", "message"),
    [
        ("mixtral", r"causal language models .* got a MixtralForCausalLM \(mixtral\)\. Search with model=hf"),
        ("bert", r"got a BertForSequenceClassification \(bert\)"),
    ],
)
def test_other_architectures_are_refused_before_the_search(tmp_path, family, message):
    with pytest.raises(InputError, match=message):
        prepare(tiny(transformers, family), task(), schemes=["w8"], runtime="llama_cpp")
    with pytest.raises(InputError, match="got a Linear"):
        prepare(torch.nn.Linear(2, 2), task(), schemes=["w8"], runtime="llama_cpp")


def test_settings_that_llama_cpp_computes_otherwise_are_refused(tmp_path):
    with pytest.raises(InputError, match="by its head size, 16; got query_pre_attn_scalar=256"):
        prepare(tiny(transformers, "gemma2"), task(), schemes=["w8"], runtime="llama_cpp")
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    dynamic = transformers.LlamaConfig(rope_parameters=rope, **FAMILIES["llama"][2])
    with pytest.raises(InputError, match="of the types default, linear, llama3, yarn; got dynamic"):
        GGUF().check(transformers.LlamaForCausalLM(dynamic))


def test_incomplete_folders_are_refused_before_the_search(tmp_path):
    folder = tmp_path / "source"
    model_of("llama").save_pretrained(folder)
    with pytest.raises(InputError, match=r"has no tokenizer.json, .*AutoTokenizer.from_pretrained"):
        prepared_of(folder)
    (folder / "tokenizer.json").write_text('{"model": {}}')
    with pytest.raises(InputError, match=r"tokenizer.json is not a tokenizer in JSON"):
        prepared_of(folder)
    with pytest.raises(InputError, match="needs the folder of the model"):
        prepare(model_of("llama"), task(), schemes=["w8"], runtime="llama_cpp")


def test_what_has_no_form_leaves_no_file(tmp_path):
    folder = saved(tmp_path / "source", model_of("llama"))
    prepared = prepared_of(folder, ["w4g64"], runtime="mpsearch")
    with pytest.raises(InputError, match=r"'model.embed_tokens' \(embedding\) in scheme 'w4g64' .* has no form in GGUF files"):
        exported(prepared, tmp_path, ["w4g64"])
    prepared = prepared_of(folder)
    prepared.model.add_module("extra", torch.nn.Linear(2, 2))
    with pytest.raises(InputError, match=r"parameter 'extra.weight' has no name in llama.cpp's architecture 'llama'"):
        exported(prepared, tmp_path)
    del prepared.model.extra
    prepared.model.config.vocab_size = 100
    with pytest.raises(InputError, match=r"has 259 tokens or more, the model only 100"):
        exported(prepared, tmp_path)
    assert not list((tmp_path / "out").glob("*"))


def test_rows_of_broken_blocks_stay_float(tmp_path):
    config = transformers.LlamaConfig(**{**FAMILIES["llama"][2], "intermediate_size": 144})
    prepared = prepared_of(saved(tmp_path / "source", transformers.LlamaForCausalLM(config).eval()))
    choices = dict(zip(prepared.space.names, prepared.space.choices, strict=True))
    assert set(choices["model.layers.0.mlp.down_proj"]) == set(FLOATS), "144 columns are no whole blocks of 32"


def test_a_damaged_file_is_one_sentence(tmp_path):
    prepared = prepared_of(saved(tmp_path / "source", model_of("llama")))
    path, engine, _ = exported(prepared, tmp_path)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(InputError, match="is not a complete GGUF file"):
        GGUF().decode(path, engine.model)


def test_llama_cpp_that_is_not_installed_is_said(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "llama_cpp", None)
    with pytest.raises(InputError, match="needs llama-cpp-python: pip install llama-cpp-python"):
        GGUF().open(tmp_path / "model.gguf", model_of("llama"))
