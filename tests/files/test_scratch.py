"""Tensors in files without a name."""

import pytest
import torch

from mpsearch.errors import InputError
from mpsearch.files import scratch
from mpsearch.files.scratch import joined


def parts(dtype=torch.float32):
    return [torch.arange(12.0).reshape(4, 3).to(dtype), torch.ones(1, 3, dtype=dtype), torch.zeros(2, 3, dtype=dtype)]


@pytest.mark.parametrize("max_bytes", [0, 48, 50, 10**6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_parts_are_joined_wherever_they_are_kept(tmp_path, max_bytes, dtype):
    result = joined(iter(parts(dtype)), max_bytes, tmp_path / "new")
    assert torch.equal(result, torch.cat(parts(dtype)))
    assert not tmp_path.joinpath("new").exists() or not list(tmp_path.joinpath("new").iterdir())
    result[0] = 5
    assert result[0, 0] == 5, "it may be written into"


def test_a_full_disk_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(scratch, "LEAST_FREE", 10**18)
    with pytest.raises(InputError, match=r"too little space for the float model's outputs, of which 0.0 GB are written"):
        joined(parts(), 0, tmp_path)
    assert not list(tmp_path.iterdir())
