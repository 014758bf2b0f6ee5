"""The recipe for llama-quantize names every searched tensor once, by a pattern that no other matches."""

import re
from types import SimpleNamespace

import pytest

import mpsearch
from mpsearch.errors import InputError
from mpsearch.exporters.llama_cpp_recipe import LlamaCppRecipe
from mpsearch.pipeline.prepare import prepare
from tests.exporters.test_gguf import SCHEMES, saved, task
from tests.models.families import tiny

transformers = pytest.importorskip("transformers")
pytest.importorskip("gguf")


@pytest.mark.parametrize("family", ["llama", "llama_tied"])
def test_the_recipe(tmp_path, family):
    from mpsearch.models.huggingface import huggingface

    model = huggingface(saved(tmp_path / "source", tiny(transformers, family)))
    prepared = prepare(model, task(), schemes=SCHEMES, quantizer="round_to_nearest", runtime="llama_cpp")
    engine = prepared.engine(tmp_path / "bank")
    names = sorted(SCHEMES)
    choice = {group.name: names[i % len(names)] for i, group in enumerate(engine.space.groups)}
    picked = SimpleNamespace(evaluation=SimpleNamespace(allocation=mpsearch.Allocation(choice)))
    path = LlamaCppRecipe().export(picked, engine, tmp_path / "out")
    kinds = {"fp32": "f32", "fp16": "f16"}
    lines = dict(line.rsplit("=", 1) for line in (path.parent / "tensor_types.txt").read_text().split())
    assert lines[r"^blk\.0\.attn_q\.weight$"] == kinds.get(choice[q := "model.layers.0.self_attn.q_proj"], choice[q])
    assert len(lines) == 14, "the Linear layers of two blocks"
    tensors = [f"blk.{i}.{name}.weight" for i in (0, 1) for name in ("attn_q", "attn_output", "ffn_down", "attn_q_norm")]
    assert [sum(re.search(line, name) is not None for line in lines) for name in tensors] == [1, 1, 1, 0] * 2
    command = path.read_text()
    embedding = choice["model.embed_tokens"]
    assert f"--tensor-type-file tensor_types.txt --token-embedding-type {kinds.get(embedding, embedding)} " in command
    assert ("--output-tensor-type" in command) == (family == "llama")
    with pytest.raises(InputError, match="holds no weights: llama-quantize makes them"):
        LlamaCppRecipe().load(path, model)
