"""Tensors in files without a name."""

import pytest
import torch

from mpsearch.errors import InputError
from mpsearch.files import scratch
from mpsearch.files.scratch import Kept, joined, weights_in_files


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
    with pytest.raises(InputError, match=r"too little space for what does not fit into memory"):
        joined(parts(), 0, tmp_path)
    assert not list(tmp_path.iterdir())


def test_tensors_beyond_the_limit_are_kept_as_they_were(tmp_path):
    kept, weight = Kept(48, tmp_path, [held := torch.ones(50)]), torch.arange(12.0).reshape(3, 4)
    first, second, third = weight.clone(), weight.t(), torch.rand(2, 3)
    assert kept.keep(first).data_ptr() == first.data_ptr(), "the first fits"
    assert kept.keep(held).data_ptr() == held.data_ptr(), "it is in memory anyway"
    assert kept.keep(wide := torch.ones(1).expand(100)) is wide, "a copy would take more"
    copies = [kept.keep(second), kept.keep(third)]
    assert kept.keep(third) is copies[1], "one copy of each"
    assert torch.equal(copies[0], weight.t())
    before = third.clone()
    third.add_(1)
    assert torch.equal(copies[1], before)
    assert torch.equal(kept.keep(third), before + 1)
    assert not list(tmp_path.iterdir())


def test_large_weights_lie_in_files_and_are_the_same(monkeypatch):
    monkeypatch.setattr(scratch, "WEIGHT_BYTES", 100)
    net = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4, bias=False))
    net[1].weight = net[0].weight  # tied
    net.append(torch.nn.Linear(4, 4))
    x, before = torch.randn(2, 4), [parameter.detach().clone() for parameter in net.parameters()]
    expected, places = net(x), [parameter.data_ptr() for parameter in net.parameters()]
    weights_in_files(net)
    moved = [parameter.data_ptr() != place for parameter, place in zip(net.parameters(), places, strict=True)]
    assert moved == [False, False, True, False], "64 and 16 bytes fit, 64 do not, 16 do"
    assert net[1].weight is net[0].weight
    assert all(torch.equal(parameter, value) for parameter, value in zip(net.parameters(), before, strict=True))
    assert torch.equal(net(x), expected)


def test_weights_stay_in_memory_where_the_disk_is_full(monkeypatch):
    monkeypatch.setattr(scratch, "WEIGHT_BYTES", 0)
    monkeypatch.setattr(scratch, "LEAST_FREE", 10**18)
    net = torch.nn.Linear(4, 4)
    place = net.weight.data_ptr()
    weights_in_files(net)
    assert net.weight.data_ptr() == place
