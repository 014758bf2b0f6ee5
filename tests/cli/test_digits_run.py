"""The run that a new user sees first, `mpsearch search` on the packaged digits: its data show what mixed precision is worth."""

import json

import pandas as pd


def test_the_default_run_shows_a_trade_off(mpsearch, tmp_path):
    """On the confirm split the smallest uniform allocation loses 3 points or more; what is picked beats all uniform ones.

    Not so after refinement, which regains most of that loss.
    """
    assert mpsearch("search", "n_trials=24", "refiner=null", "hydra.run.dir=run")[0] == 0
    assert mpsearch("export", "run=run")[0] == 0
    evaluations, uniform = (pd.read_csv(tmp_path / "run" / f"{name}.csv") for name in ("evaluations", "uniform"))
    confirmed = uniform[uniform.split == "confirm"].sort_values("size_bytes")
    (float_accuracy,) = evaluations[(evaluations.origin == "float") & (evaluations.split == "confirm")].accuracy
    assert float_accuracy >= 0.98
    assert float_accuracy - confirmed.accuracy.iloc[0] >= 0.03

    picked = json.loads((tmp_path / "run" / "allocation.json").read_text())
    accuracy, size = picked["scores"]["confirm"]["accuracy"], picked["size_bytes"]
    assert float_accuracy - accuracy <= 0.02
    at_least = min(accuracy, confirmed.accuracy.max())  # it may be better than all uniform ones, on few samples
    assert size < confirmed[confirmed.accuracy >= at_least].size_bytes.min()
