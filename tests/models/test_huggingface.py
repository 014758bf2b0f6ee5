"""Folders of Hugging Face transformers: what they hold is loaded, and what is missing is said."""

import json
import sys

import pytest
import torch

from mpsearch.errors import InputError
from mpsearch.models.huggingface import huggingface
from tests.models.families import batch, tiny

transformers = pytest.importorskip("transformers")


@pytest.fixture
def folder(tmp_path):
    tiny(transformers, "llama").save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


def test_a_folder_gives_the_model_that_was_saved(folder):
    model, inputs = huggingface(folder), batch("llama")
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, tiny(transformers, "llama")(**inputs).logits)
    assert type(model) is transformers.LlamaForCausalLM
    assert not model.training
    assert not model.config.use_cache
    assert type(huggingface(folder, head="none")) is transformers.LlamaModel


def test_weights_of_16_bits_become_float32(tmp_path):
    tiny(transformers, "llama").to(torch.bfloat16).save_pretrained(tmp_path)
    assert {parameter.dtype for parameter in huggingface(tmp_path).parameters()} == {torch.float32}


def test_a_head_that_the_file_lacks_is_not_made_up(folder):
    with pytest.raises(
        InputError, match=r"lacks 1 tensors of LlamaForSequenceClassification, which would be random: score.weight"
    ):
        huggingface(folder, head="sequence_classification")


def edited(folder, **values):
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def test_what_is_wrong_with_a_folder_is_one_sentence(folder, tmp_path):
    for path, sentence in [
        (tmp_path / "nowhere", "There is no folder"),
        (tmp_path, "has no config.json"),
        (tmp_path / "nowhere.gguf", "There is no GGUF file"),
    ]:
        with pytest.raises(InputError, match=sentence):
            huggingface(path)
    with pytest.raises(InputError, match=r"model.head must be one of causal_lm, .*; got 'casual_lm'"):
        huggingface(folder, head="casual_lm")
    edited(folder, architectures=["OwnModel"])
    with pytest.raises(InputError, match=r"names OwnModel, which transformers .* does not have. Give model.head"):
        huggingface(folder)
    edited(folder, architectures=None)
    with pytest.raises(InputError, match="names no architecture"):
        huggingface(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(InputError, match="is not a configuration in JSON"):
        huggingface(folder)


def test_no_code_of_a_folder_is_run(folder):
    (folder / "own.py").write_text("raise SystemExit('run')")
    edited(folder, model_type="own", architectures=None, auto_map={"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M"})
    with pytest.raises(InputError, match="transformers cannot load"):
        huggingface(folder, head="causal_lm")


def test_pickled_weights_are_refused(folder):
    weights = folder / "model.safetensors"
    torch.save({}, folder / "pytorch_model.bin")
    weights.rename(folder / "kept")
    with pytest.raises(InputError, match=r"only pickled weights \(pytorch_model.bin\), which could run code"):
        huggingface(folder)
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(InputError, match=r"has no weights; expected .safetensors files"):
        huggingface(folder)
    weights.write_bytes((folder / "kept").read_bytes()[:1000])
    with pytest.raises(InputError, match="transformers cannot load"):
        huggingface(folder)


def test_the_package_is_asked_for(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(InputError, match=r"model=hf needs the package transformers: pip install 'mpsearch\[hf\]'"):
        huggingface(folder)
