"""Networks of timm, with a stand-in for the package (nothing but names and numbers reaches it), and its own tiny networks."""

import sys
import types

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import mpsearch
from mpsearch.errors import InputError
from mpsearch.models.timm_model import import_timm, timm_model
from mpsearch.tasks.fidelity import Fidelity
from mpsearch.tasks.image_folder import Preprocessing


@pytest.fixture
def calls(monkeypatch):
    """What `timm.create_model` was called with."""
    given = []

    def create_model(name, **options):
        given.append((name, options))
        return nn.Linear(1, 1)

    module = types.ModuleType("timm")
    module.create_model, module.list_models = create_model, lambda: ["resnet18"]
    monkeypatch.setitem(sys.modules, "timm", module)
    return given


def test_names_and_numbers_are_passed_on(calls):
    assert not timm_model("resnet18", num_classes=7, drop_rate=0.5, scriptable=False, in_chans=None).training
    assert calls == [
        ("resnet18", {"pretrained": True, "num_classes": 7, "drop_rate": 0.5, "scriptable": False, "in_chans": None})
    ]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("hf-hub:someone/model", {}),
        ("hf_hub:someone/model", {}),
        ("local-dir:/tmp/x", {}),
        ("/tmp/x", {}),
        (3, {}),
        ("resnet18", {"checkpoint_path": "evil.pth"}),
        ("resnet18", {"pretrained_cfg": {"file": "evil.pth"}}),
        ("resnet18", {"cache_dir": "/tmp"}),
        ("resnet18", {"features": [1]}),
    ],
)
def test_files_and_repositories_are_refused(name, options, calls):
    with pytest.raises(InputError, match="model=custom"):
        timm_model(name, **options)
    assert not calls


def test_a_missing_package_is_a_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(InputError, match="pip install"):
        timm_model("resnet18")


def test_what_timm_cannot_make_is_a_sentence(calls, monkeypatch):
    def fail(name, **options):
        raise RuntimeError(f"Unknown model ({name})")

    monkeypatch.setattr(sys.modules["timm"], "create_model", fail)
    with pytest.raises(
        InputError, match=r"timm cannot make resnet19 with pretrained=true: Unknown model .* Did you mean 'resnet18'"
    ):
        timm_model("resnet19")


@pytest.fixture(scope="module")
def tiny():
    """A random network of timm itself, which is imported without torchvision."""
    try:
        import_timm("the test")
    except InputError as error:
        pytest.skip(str(error))
    return timm_model("test_resnet", pretrained=False, num_classes=3)


@pytest.mark.parametrize("ending", ["safetensors", "pth", "pth.tar"])
def test_weights_of_a_file(tiny, tmp_path, ending):
    file = tmp_path / f"weights.{ending}"
    if ending == "safetensors":
        save_file(tiny.state_dict(), file)
    else:
        torch.save(tiny.state_dict() if ending == "pth" else {"epoch": 3, "state_dict": tiny.state_dict()}, file)
    model = timm_model("test_resnet", weights=file, num_classes=3)
    assert not model.training
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(model(x), tiny(x))
    with pytest.raises(InputError, match=r"are not those of ResNet|has shape"):
        timm_model("test_resnet", weights=file, num_classes=4)


def test_files_without_weights(tiny, tmp_path):
    (tmp_path / "bad.pth").write_bytes(b"nothing")
    torch.save(tiny, tmp_path / "whole.pth")
    for name, sentence in (("no.pth", "There is no weights file"), ("bad.pth", "no checkpoint of tensors alone"),
                           ("whole.pth", "no checkpoint of tensors alone")):  # fmt: skip
        with pytest.raises(InputError, match=sentence):
            timm_model("test_resnet", weights=tmp_path / name, num_classes=3)


def test_images_are_prepared_as_timm_does(tiny):
    prepared = Preprocessing.of_timm("resnet18")
    assert (prepared.size, prepared.short_side, prepared.resample) == ((224, 224), 235, 3)
    with pytest.raises(InputError, match=r"timm has no model resnet19\. Did you mean 'resnet1"):
        Preprocessing.of_timm("resnet19")


@pytest.mark.slow
def test_a_search(tiny, tmp_path):
    np.savez(tmp_path / "x.npz", x=np.random.default_rng(0).normal(size=(24, 3, 32, 32)).astype(np.float32))
    task = Fidelity(tmp_path / "x.npz", batch_size=8)
    options = {"schemes": ["w4", "w8"], "quantizer": "round_to_nearest", "refiner": None}
    result = mpsearch.search(tiny, task, n_trials=3, n_seeds=2, confirm_points=1, **options)
    assert len(result.front) > 0
