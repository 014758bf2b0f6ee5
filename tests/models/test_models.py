"""The contract of every model, the published figures, and weights that do not fit."""

import copy
import importlib.util
from pathlib import Path

import pytest
import torch
from hydra.utils import get_method, instantiate
from omegaconf import OmegaConf
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import mpsearch.models.digits as digits_module
from mpsearch.errors import InputError
from mpsearch.graph.fold import fold_batch_norms
from mpsearch.graph.trace import trace_layers
from mpsearch.models.base import load_weights
from mpsearch.models.digits import DigitsNet, digits
from mpsearch.models.resnet import DEPTHS, resnet
from mpsearch.tasks.cifar10 import Cifar10
from mpsearch.tasks.digits import Digits

CONF = Path(__file__).parents[2] / "conf" / "model"
DIGITS_FILE = Path(digits_module.__file__).with_name("digits.safetensors")


def accuracy(model, task, split):
    with torch.no_grad():
        hits = [task.quality(task.forward(model, x), y) for x, y in task.batches(split)]
    return torch.cat(hits).double().mean().item()


@pytest.mark.parametrize("path", sorted(CONF.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_choice_can_be_built(path):
    """Each YAML opens with the command that uses it and points at a callable; the models of ours are float32, in eval mode."""
    assert path.read_text().startswith("# mpsearch search model=" + path.stem)
    config = OmegaConf.load(path)
    if OmegaConf.is_missing(config, "_target_"):
        return
    if not config._target_.startswith("mpsearch."):
        pytest.importorskip(config._target_.partition(".")[0])
        assert callable(get_method(config._target_))
        return
    if "???" in OmegaConf.to_container(config).values():  # the user's to give
        assert callable(get_method(config._target_))
        return
    if OmegaConf.to_container(config).get("weights"):
        name = "model" if path.stem == "stories260k" else path.stem
        assert OmegaConf.to_container(config)["weights"] == f"${{task.data_dir}}/{name}.safetensors"
        config.weights = None
    elif "weights" in config:  # those of a package
        package = path.read_text().splitlines()[0].rpartition(" ")[2].rstrip(")").replace("-", "_")
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    model = instantiate(config, _convert_="object")
    assert isinstance(model, nn.Module)
    assert not any(module.training for module in model.modules())
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())


@pytest.mark.parametrize(("depth", "n_parameters"), [(20, 269_722), (32, 464_154), (44, 658_586), (56, 853_018)])
def test_resnet_sizes(depth, n_parameters):
    model = resnet(depth)
    assert sum(parameter.numel() for parameter in model.parameters()) == n_parameters
    layers = trace_layers(model, nn.Module.__call__, torch.randn(1, 3, 32, 32))
    assert len(layers) == depth
    assert layers[0].macs == 32 * 32 * 16 * 27
    assert layers[-1].macs == 640
    assert len(fold_batch_norms(model, nn.Module.__call__, torch.randn(1, 3, 8, 8))) == depth - 1


def test_other_depths_are_refused():
    assert DEPTHS == (20, 32, 44, 56)
    with pytest.raises(InputError, match=r"must be one of 20, 32, 44, 56; got 18"):
        resnet(18)


@pytest.mark.slow
@pytest.mark.data
def test_resnet20_scores_its_published_figure(data_dir):
    folder = data_dir / "cifar10"
    task = Cifar10(folder, n_calibration=100, n_search=100, n_confirm=1000)
    model = resnet(20, folder / "resnet20.safetensors")
    assert accuracy(model, task, "confirm") == pytest.approx(0.915, abs=1e-9)
    inputs = task.batches("confirm")[0][0]
    with torch.no_grad():
        before = model(inputs)
        assert len(fold_batch_norms(model, task.forward, inputs)) == 19
        torch.testing.assert_close(model(inputs), before, rtol=0, atol=1e-5 * before.abs().max().item())


def test_digits_score_what_their_file_says():
    model, task = digits(), Digits()
    with safe_open(DIGITS_FILE, framework="pt") as file:
        recorded = file.metadata()
    for split in ("search", "confirm"):
        assert accuracy(model, task, split) == pytest.approx(float(recorded[f"{split}_accuracy"]), abs=1e-6)
        assert accuracy(model, task, split) > 0.975
    assert DIGITS_FILE.stat().st_size < 100_000


def test_digits_layers_and_folds():
    model, task = digits(), Digits()
    inputs = task.batches("calibration")[0][0]
    layers = trace_layers(model, task.forward, inputs)
    assert len(layers) == 10
    assert sum(layer.numel for layer in layers) == 7_864
    folded = copy.deepcopy(model)
    assert len(fold_batch_norms(folded, task.forward, inputs)) == 9
    with torch.no_grad():
        before = model(inputs)
        torch.testing.assert_close(folded(inputs), before, rtol=0, atol=1e-5 * before.abs().max().item())


def small():
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))


def test_load_weights_round_trip(tmp_path):
    path = tmp_path / "w.safetensors"
    stored = {name: tensor for name, tensor in small().state_dict().items() if not name.endswith("num_batches_tracked")}
    save_file(stored | {"extra.a": torch.zeros(2)}, path)
    model = load_weights(small(), path, ignore="extra.")
    assert not model.training
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in stored.items())
    save_file({name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in stored.items()}, path)
    assert load_weights(small(), path)[0].weight.dtype == torch.float32


def test_weights_that_do_not_fit_are_sentences(tmp_path):
    path, good = tmp_path / "w.safetensors", small().state_dict()
    with pytest.raises(InputError, match=r"There is no weights file .*w\.safetensors"):
        load_weights(small(), path)
    with pytest.raises(InputError, match="There is no weights file"):
        load_weights(small(), tmp_path)

    save_file(good, path)
    whole = path.read_bytes()
    for damaged in (b"", whole[:5], whole[:-7], b"\xff" * 200, b"PK\x03\x04 a zip of some kind"):
        path.write_bytes(damaged)
        with pytest.raises(InputError, match=r"is not a complete \.safetensors file"):
            load_weights(small(), path)

    for change, message in [
        ({"0.weight": None}, r"of 7 tensors 1 missing \('0.weight'\)\."),
        ({"2.weight": torch.zeros(1)}, r"1 unexpected \('2.weight'\)\."),
        ({"0.weight": torch.zeros(4, 2)}, r"'0.weight' in .* has shape \[4, 2\], the model needs \[4, 3\]"),
        ({"0.weight": torch.zeros(4, 3, dtype=torch.int8)}, r"'0.weight' in .* is torch.int8; a float checkpoint is needed"),
    ]:
        save_file({name: tensor for name, tensor in (good | change).items() if tensor is not None}, path)
        model = small()
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(InputError, match=message):
            load_weights(model, path)
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())

    with pytest.raises(InputError, match=r"not those of ResNet: .* missing .*, …\) and \d+ unexpected \(.*…\)\. Check"):
        resnet(20, DIGITS_FILE)


def test_the_digits_file_is_its_script_s():
    """What the file holds, so that a retrained one is checked too."""
    names = {name for name in DigitsNet().state_dict() if not name.endswith("num_batches_tracked")}
    assert set(load_file(DIGITS_FILE)) == names | {"split.train", "split.search", "split.confirm"}
