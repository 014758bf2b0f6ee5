"""What users type wrong: one sentence with what was given, what is allowed and what to do; exit code 2; no run is left behind."""

from pathlib import Path

import pytest

OWN = """
import torch
import mpsearch
from mpsearch.models.digits import digits
from mpsearch.tasks.digits import Digits

class NoBatches(mpsearch.Task):
    quality_name = "accuracy"

class Nothing(Digits):
    def batches(self, split):
        return None

class Pretrained:
    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        return cls.load(*args, **kwargs)

    @classmethod
    def load(cls, name_or_path):
        try:
            raise ConnectionError("HTTPSConnectionPool(host='hub', port=443)")
        except ConnectionError as error:
            raise OSError(f"{name_or_path} is not a local folder and is not a model identifier") from error
"""

MISTAKES = {
    "budget=120kB": "A budget needs its unit: budget.bytes=120kB, budget.bits=3, …; got budget=120kB.",
    "pin=0.5": "pin must be a list of texts, 'pin=[\"…\",\"…\"]'; got '0.5'.",
    "scheme=null": "A choice must be a name or a list of names, as in scheme=[w4,w8]; got null.",
    "budget.latency_ms=2": "A budget on latency_ms needs the cost: cost=[bytes,latency_ms] budget.latency_ms=VALUE.",
    "budget.fraction=12": "budget.fraction must be at most 1, the size in float32; got 12. For 12 % give 0.12.",
    "runtime=onnxruntime scheme=[w8a8,fp32]": "onnxruntime runs no layer of this model in w8a8, so that all would stay float",
    "task=custom task._target_=my_own.NoBatches": "The task NoBatches has no method batches(split). Define it",
    "task=custom task._target_=my_own.Nothing": "The task's batches('calibration') must",
    "model=custom model._target_=my_own.Pretrained.from_pretrained": "missing 1 required positional argument: 'name_or_path'",
    "model=custom model._target_=my_own.Pretrained.load +model.name_or_path=/no/where": "/no/where is not a local folder",
}


@pytest.mark.parametrize("words", MISTAKES)
def test_a_mistake_is_one_sentence(words, mpsearch, tmp_path):
    (tmp_path / "my_own.py").write_text(OWN)
    code, err = mpsearch("search", *words.split(" "), "n_trials=4", "hydra.run.dir=reports/run")
    sentence = err.splitlines()[-1]
    assert code == 2
    assert sentence.startswith("mpsearch: ")
    assert MISTAKES[words] in sentence
    assert "Traceback" not in err
    assert not Path("reports/run").exists()
