"""A run on an equalized network: searched by a worker in another process, gone on with, exported, always the same network."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from omegaconf import OmegaConf

from mpsearch.cli.build import build_object
from mpsearch.cli.commands import export
from mpsearch.errors import InputError
from mpsearch.exporters.allocation_file import load_allocation
from mpsearch.exporters.native import Native
from mpsearch.graph.channel_scaling import Equalization, recorded
from mpsearch.models.digits import digits
from mpsearch.pipeline.engine_options import EngineOptions
from mpsearch.pipeline.prepare import planned_engine, prepare
from mpsearch.runs.run import RunFolder
from mpsearch.tasks.digits import Digits

LAUNCH = "import sys, torch; torch.set_num_threads(1); from mpsearch.cli import main; sys.argv[0] = 'mpsearch'; main()"
WORDS = (
    *("equalizer=cross_layer", "scheme=[w2,w4]", "quantizer=clip_search", "metric=weight_mse"),
    *("n_trials=8", "n_seeds=3", "executor=local", "executor.workers=1", "hydra.run.dir=run"),
)


@pytest.mark.slow
def test_a_run_of_an_equalized_network(tmp_path):
    ended = subprocess.run(
        [sys.executable, "-c", LAUNCH, "search", *WORDS], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert ended.returncode == 0, ended.stderr
    folder = tmp_path / "run"
    found = recorded(folder)
    about = json.loads((folder / "space.json").read_text())["equalizer"]
    assert about == {
        "class": "CrossLayer",
        "tolerance": 1e-3,
        "max_sweeps": 100,
        "sha256": found.sha256,
    }
    assert found.names == {
        "outputs": ["block1.conv1", "block2.conv1", "block3.conv1"],
        "inputs": ["block1.conv2", "block2.conv2", "block3.conv2"],
        "high": [],
    }

    page = (folder / "report.md").read_text()
    assert "Channels were equalized beforehand: CrossLayer (tolerance=0.001, max_sweeps=100)." in page

    settings = OmegaConf.to_container(OmegaConf.load(folder / "config.yaml"))

    def build(key, **extra):
        return Native() if key == "exporter" else build_object(settings, key, **extra)

    def prepared(equalizer="cross_layer", equalization=None):
        words = {"schemes": ["w2", "w4"], "quantizer": "clip_search", "name": "digits"}
        return prepare(digits(), Digits(), equalizer=equalizer, equalization=equalization, **words)

    again = prepared()
    assert again.plan.equalization.sha256 == found.sha256  # the same one is found again on the same machine
    RunFolder(folder).identify(again.identity)

    # What was recorded counts, not what would be found again.
    double = Equalization("CrossLayer", {n: t * 2 if n.endswith("inputs") else t / 2 for n, t in found.tensors.items()})
    plan = replace(again.plan, equalization=double)
    weight = planned_engine(digits, Digits(), plan, EngineOptions(), again.not_searched, folder).model.block1.conv2.weight
    assert torch.equal(weight, 2 * again.model.block1.conv2.weight)
    with pytest.raises(InputError, match="it has another equalizer"):
        RunFolder(folder).identify(prepared(equalization=double).identity)
    with pytest.raises(InputError, match="it has another equalizer"):
        RunFolder(folder).identify(prepared(equalizer=None).identity)

    export(settings | {"pick": {"bits": 4}, "finetuned": False}, build, folder)
    exported = load_allocation(folder / "allocation.json")
    assert exported.data["equalization"] == {
        "equalizer": "CrossLayer",
        "file": f"equalization-{found.sha256[:12]}.safetensors",
        "sha256": found.sha256,
        **found.names,
    }
    model, task = exported.apply(digits()), Digits()
    with torch.no_grad():
        hits = torch.cat([(task.forward(model, x).argmax(-1) == y).float() for x, y in task.batches("confirm")])
    assert float(hits.mean()) > 0.9  # at 4 bits in all layers the network as it came has 0.98
    file = folder / exported.data["equalization"]["file"]
    file.unlink()
    with pytest.raises(InputError, match="does not exist"):
        load_allocation(folder / "allocation.json")
    Equalization("CrossLaser", found.tensors).save(file)
    with pytest.raises(InputError, match=r"is not the file that allocation.json was written with"):
        load_allocation(folder / "allocation.json")
