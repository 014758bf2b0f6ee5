"""Folders of torchao: transformers opens them, and torchao dequantizes the weights of the search bit for bit."""

import json
import warnings
from itertools import cycle
from types import SimpleNamespace

import pytest
import torch

import mpsearch
from mpsearch.errors import InputError
from mpsearch.models.huggingface import huggingface
from mpsearch.pipeline.prepare import prepare
from mpsearch.schemes.floating import Float
from mpsearch.schemes.integer import Integer
from tests.models.families import batch, tiny

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of kernels for GPUs that are absent
    torchao = pytest.importorskip("torchao")
    transformers = pytest.importorskip("transformers")
from mpsearch.exporters.torchao import TorchAOFolder

pytestmark = pytest.mark.filterwarnings("ignore")
SCHEMES = {
    **{f"w{bits}": Integer(bits) for bits in range(2, 9)},
    **{f"w{bits}g32u": Integer(bits, 32, symmetric=False) for bits in (2, 4, 7)},
    "w8a8": Integer(8, input={"bits": 8, "scale": "token"}),
    "bf16": Float("bfloat16"),
    "fp32": Float("float32"),
}


def exported(tmp_path, family, schemes, dtype=torch.float32, pin=()):
    """Every scheme in turn where the profile has it: (path, engine, allocation)."""
    tiny(transformers, family).to(dtype).save_pretrained(tmp_path / "source")
    model = huggingface(tmp_path / "source")
    splits = {split: [batch(family, seed=seed)] for seed, split in enumerate(("calibration", "search", "confirm"))}
    task = mpsearch.fidelity_task(**splits, per_token=family != "bert")
    prepared = prepare(model, task, schemes=schemes, quantizer="gptq", runtime="torchao", pin=pin)
    engine, turn = prepared.engine(tmp_path / "bank"), cycle(schemes)
    groups = zip(engine.space.groups, engine.space.choices, strict=True)
    allocation = mpsearch.Allocation({group.name: next(name for name in turn if name in choices) for group, choices in groups})
    picked = SimpleNamespace(evaluation=SimpleNamespace(allocation=allocation))
    return TorchAOFolder().export(picked, engine, tmp_path / "out"), engine, allocation


@pytest.mark.thin(2)
@pytest.mark.parametrize(("family", "dtype"), [("llama", torch.bfloat16), ("bert", torch.float32), ("mixtral", torch.float32)])
def test_codes_are_ours(tmp_path, family, dtype, caplog):
    pin = ["*.experts.*:fp32"] if family == "mixtral" else []
    path, engine, allocation = exported(tmp_path, family, SCHEMES, dtype, pin)
    assert "codes of 2, 3, 4" in caplog.text
    decoded = TorchAOFolder().decode(path, huggingface(tmp_path / "source"))
    for group in engine.space.groups:
        for layer in group.layers:
            if ".experts." not in layer.name:
                expected = engine.quantized(layer.name, allocation[group.name]).dequantize()
                assert torch.equal(decoded[layer.name], expected), (layer.name, allocation[group.name])
    loss = engine.score_of(TorchAOFolder().open(path, huggingface(tmp_path / "source")), "search").loss
    assert loss == pytest.approx(engine.score(allocation).loss, rel=0.05, abs=1e-6)
    model = type(tiny(transformers, family)).from_pretrained(path.parent)  # as its users load it
    with torch.no_grad():
        assert model(**batch(family))[0].dtype == dtype
    config = json.loads(path.read_text())["quantization_config"]["quant_type"]["default"]
    quantized = {name for name, scheme in allocation.items() if scheme not in ("fp32", "bf16")}
    assert config["_data"]["fqn_to_config"].keys() == quantized


def test_what_has_no_tensor_is_refused(tmp_path):
    with pytest.raises(
        InputError, match=r"Layer 'transformer.h.0.attn.c_attn' in scheme 'w4' .* modules that are Linear or Embedding"
    ):
        exported(tmp_path, "gpt2", {"w4": Integer(4), "fp32": Float("float32")}, pin=["*wte:fp32", "*wpe:fp32", "lm_head:fp32"])
    with pytest.raises(InputError, match="exporter=torchao writes models of Hugging Face transformers"):
        TorchAOFolder().check(torch.nn.Linear(2, 2))
