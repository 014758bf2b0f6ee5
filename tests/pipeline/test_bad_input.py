"""What a user may give by mistake: an error of a sentence or two, before the data are run."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import mpsearch
from mpsearch.errors import InputError
from mpsearch.models.huggingface import huggingface
from mpsearch.tasks.image_folder import ImageFolder
from mpsearch.tasks.text import Text
from tests.models.families import tiny as tiny_model

SAID = 450  # characters: a sentence of what is wrong and one of what to do


class Returns(nn.Module):
    """A network whose output is made by a function of its logits."""

    def __init__(self, change):
        super().__init__()
        self.layer, self.change = nn.Linear(4, 3), change

    def forward(self, x):
        return self.change(self.layer(x))


def refused(call, sentence):
    with pytest.raises(InputError, match=sentence) as caught:
        call()
    assert len(str(caught.value)) < SAID
    assert "Traceback" not in str(caught.value)


@pytest.fixture
def unrun(monkeypatch):
    """No statistic of the data may be taken."""
    monkeypatch.setattr("mpsearch.pipeline.prepare.calibrate", lambda *_, **__: pytest.fail("the data were run"))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda y: {"features": y}, r"must be a tensor \[n, columns\] or have a tensor 'logits'; got a dict with features"),
        (lambda y: SimpleNamespace(last_hidden_state=y), "'logits'; got a SimpleNamespace with last_hidden_state"),
        (lambda y: y[:, None].expand(-1, 5, -1), r"must be \[n, columns\], as logits"),
        (lambda y: None, "'logits'; got a NoneType"),
        (lambda y: y * float("nan"), "NaN"),
    ],
    ids=["a mapping", "hidden states", "three dimensions", "nothing", "NaN"],
)
def test_a_model_without_logits(unrun, change, sentence):
    x, y = torch.randn(12, 4), torch.arange(12) % 3
    task = mpsearch.classification(calibration=(x[:4], y[:4]), search=(x[4:8], y[4:8]), confirm=(x[8:], y[8:]))
    refused(lambda: mpsearch.search(Returns(change), task, schemes=["w4"], n_trials=2), sentence)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(unrun, bad):
    x, y = torch.randn(12, 4), torch.arange(12) % 3
    task = mpsearch.classification(calibration=(x[:4], y[:4]), search=(x[4:8], y[4:8]), confirm=(x[8:], y[8:]))
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))
    model[2].weight.data[1, 2] = bad
    refused(lambda: mpsearch.search(model, task, schemes=["w4"]), r"'2.weight' has 1 weights of 15 that are NaN or infinite")


def test_folders_that_are_no_models(tmp_path):
    transformers = pytest.importorskip("transformers")
    refused(lambda: huggingface(tmp_path), r"has no config\.json")
    folder = tmp_path / "model"
    tiny_model(transformers, "llama").save_pretrained(folder)
    (tmp_path / "text.txt").write_text("words\n\n" * 50)
    refused(lambda: Text(tmp_path / "text.txt", folder), r"has no tokenizer \(tokenizer\.json")
    (folder / "config.json").write_text(json.dumps({"model_type": "unheard-of", "architectures": ["UnheardOf"]}))
    refused(lambda: huggingface(folder), r"UnheardOf, which transformers .* does not have")


def test_a_gguf_file_of_an_unknown_architecture(tmp_path):
    pytest.importorskip("transformers")
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "unheard-of")
    writer.add_block_count(1)
    writer.add_tensor("token_embd.weight", np.zeros((8, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    refused(lambda: huggingface(tmp_path / "model.gguf"), "transformers cannot load .*unheard-of")


def test_a_text_shorter_than_a_window(tmp_path):
    transformers = pytest.importorskip("transformers")
    byte_tokenizer = pytest.importorskip("tests.models.byte_tokenizer")
    byte_tokenizer.save_byte_tokenizer(transformers, tmp_path)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "text.txt").write_text("a few words")
    refused(lambda: Text(tmp_path / "text.txt", tmp_path), "have 0 windows of 256 tokens left for the calibration split")


def test_images_of_several_sizes_are_brought_to_one(tmp_path):
    image = pytest.importorskip("PIL.Image")
    for i, size in enumerate(((12, 16), (30, 9), (8, 8))):
        (tmp_path / "class").mkdir(exist_ok=True)
        image.fromarray(np.zeros((*size, 3), np.uint8)).save(tmp_path / "class" / f"{i}.png")
    task = ImageFolder(tmp_path, size=8)
    assert {tuple(x.shape) for x, _ in task.batches("search")} == {(1, 3, 8, 8)}
