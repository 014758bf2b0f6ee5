"""The exporter of the packed model: from a run's folder to a network that classifies, with nothing but the file."""

import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from safetensors.torch import load_file

from mpsearch.exporters.base import Exporter, Picked
from mpsearch.graph.fold import fold_batch_norms
from mpsearch.models.digits import digits
from mpsearch.packed.model import load
from mpsearch.pipeline.evaluators import SearchEvaluator
from mpsearch.schemes.integer import Integer


def test_the_file_is_the_confirmed_model(tiny, tmp_path, request):
    exporter = instantiate(OmegaConf.load(request.config.rootpath / "conf" / "exporter" / "packed.yaml"))
    assert isinstance(exporter, Exporter)
    engine = tiny.digits({"w4a8": Integer(4, input={"bits": 8})})
    folds = fold_batch_norms(digits(), engine.task.forward, engine.task.batches("calibration")[0][0])
    e = SearchEvaluator(engine)(engine.space.uniform("w4a8"), "uniform")
    before = tiny.state(engine.model)
    path = exporter.export(Picked(e, {"search": e}, {}, "accuracy", "0" * 64, folds), engine, tmp_path / "run")
    tiny.assert_same_state(engine.model, before)
    assert sum(tensor.nbytes for tensor in load_file(path).values()) == e.size_bytes
    with torch.device("meta"):
        unfolded = type(engine.model)().eval()
    model = load(path, unfolded)
    with torch.no_grad():
        hits = [(model(x).argmax(-1) == y).float() for x, y in engine.batches("confirm")]
    assert torch.cat(hits).mean() > 0.97
