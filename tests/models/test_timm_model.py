"""Networks of timm, with a stand-in for the package: nothing but names and numbers reaches it."""

import sys
import types

import pytest
from torch import nn

from mpsearch.errors import InputError
from mpsearch.models.timm_model import timm_model


@pytest.fixture
def calls(monkeypatch):
    """What `timm.create_model` was called with."""
    given = []

    def create_model(name, **options):
        given.append((name, options))
        return nn.Linear(1, 1)

    module = types.ModuleType("timm")
    module.create_model = create_model
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
