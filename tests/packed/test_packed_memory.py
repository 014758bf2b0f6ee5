"""Where memory runs out the sentence says so, and not that something else is wrong."""

import errno

import pytest
import torch

from mpsearch.errors import InputError, check_memory, memory_errors
from mpsearch.metrics.fisher import Recording
from mpsearch.pipeline.prepare import prepare

HUGE = 2**60
SENTENCE = r"Memory ran out.*\. Lower the task's batch size, memory.max_bytes or the executor's workers"


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
    task, model = tiny.task(), tiny.net()

    monkeypatch.setattr(model, "forward", allocate)
    with pytest.raises(InputError, match=SENTENCE):
        prepare(model, task, schemes=["w4"])


def test_the_gradients_of_a_metric(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "backward", allocate)
    with pytest.raises(InputError, match=SENTENCE):
        Recording(torch.nn.Linear(1, 1)).backward(torch.zeros(()), lambda i, gradient: None)
