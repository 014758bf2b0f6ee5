"""Where memory runs out the sentence says so, and not that something else is wrong."""

import errno

import pytest
import torch
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf

from mpsearch.cli.build import build_object
from mpsearch.errors import InputError, check_memory, memory_errors
from mpsearch.metrics.fisher import gradients_at
from mpsearch.pipeline.prepare import prepare

HUGE = 2**60
SENTENCE = r"Memory ran out.*\. Lower the task's batch size, bank_max_bytes or prefix_max_bytes, or the executor's workers"


def allocate(*_, **__):
    return torch.empty(HUGE)


def test_what_the_allocators_say_is_known():
    with pytest.raises(RuntimeError) as caught:
        allocate()
    for error in (
        caught.value,
        MemoryError(),
        MemoryError("Unable to allocate 1 GiB"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
    ):
        with pytest.raises(InputError, match=SENTENCE), memory_errors():
            raise error
    for error in (RuntimeError("shapes cannot be multiplied"), OSError(errno.ENOSPC, "full"), ValueError("memory")):
        check_memory(error)


def test_the_first_forward_pass(tiny, monkeypatch):
    with initialize_config_module("mpsearch.conf", version_base="1.3"):
        settings = OmegaConf.to_container(compose("search"))
    task, model = tiny.task(), tiny.net()

    def build(key, **extra):
        made = {"model": model, "task": task}
        return made[key] if key in made else build_object(OmegaConf.create(settings), key, **extra)

    monkeypatch.setattr(model, "forward", allocate)
    with pytest.raises(InputError, match=SENTENCE):
        prepare(settings, build)


def test_the_gradients_of_a_metric(monkeypatch):
    monkeypatch.setattr(torch.autograd, "grad", allocate)
    with pytest.raises(InputError, match=SENTENCE):
        gradients_at([], torch.zeros(()))
