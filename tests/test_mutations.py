"""Damage to files: of more than a thousand mutations each is one `InputError`, or changes nothing that the file says."""

import copy
import json
import random
import warnings
from collections import Counter

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save
from torch import nn

from mpsearch.engine.weight_files import WeightFiles
from mpsearch.errors import InputError
from mpsearch.evaluation import Evaluation
from mpsearch.exporters.allocation_file import load_allocation
from mpsearch.exporters.base import Picked
from mpsearch.exporters.native import Native
from mpsearch.graph.channel_scaling import Equalization
from mpsearch.layer import weights_sha256
from mpsearch.packed.model import load
from mpsearch.packed.model import save as save_packed
from mpsearch.schemes.codebook import Codebook
from mpsearch.schemes.integer import Integer
from mpsearch.schemes.outliers import Outliers

SCHEMES = {
    "w4a8": Integer(4, 5, symmetric=False, input={"bits": 8, "scale": "static", "symmetric": False}),
    "nvfp4": Codebook("e2m1", 16, "e4m3"),
    "w3o": Outliers(Integer(3), 0.1),
    "w8": Integer(8, input={"bits": 8}),
}
INPUT = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))
VALUES = (None, True, -1, 0, 2**70, 1.5, "", "x", [], {}, [[]], {"class": "Integer"}, "float32", "int8", "../x")
N = 420  # mutations of each kind of file

pytestmark = pytest.mark.slow


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 7), nn.ReLU(), nn.Linear(7, 6), nn.Linear(6, 5)).eval()


@pytest.fixture(scope="module")
def files(tiny, tmp_path_factory):
    """A folder with an allocation on an equalized network, its packed model, and a bank."""
    folder = tmp_path_factory.mktemp("files")
    model = net()
    sha256 = weights_sha256(model)
    equalization = Equalization("Own", {"0.outputs": torch.full((8,), 0.5), "2.inputs": torch.full((8,), 2.0)})
    equalization.apply(model)
    engine = tiny.engine(model, tiny.task(shape=(6,), n=8), SCHEMES, files=WeightFiles(folder / "bank", {"run": 1}))
    allocation = engine.space.allocation(range(4))
    size = engine.space.size_bits(engine.space.choice(allocation)) // 8
    point = Evaluation(0, "sampler", allocation, "search", 0.5, 1.0, 0.5, 0.4, 0.6, size, 4.0, 0.1, True, 8, 0.0)
    picked = Picked(point, {"search": point}, {}, "accuracy", sha256, (), equalization)
    path = Native().export(picked, engine, folder)
    save_packed(load_allocation(path).pack(net()), folder / "packed.safetensors")
    for layer in engine.space.layers:
        engine.quantized(layer.name, "w3o")
    return folder


def of_allocation(folder, engine=None):
    with torch.no_grad():
        exported = load_allocation(folder / "allocation.json")
        return exported.apply(net())(INPUT), exported.schemes


def of_packed(folder):
    with torch.no_grad():
        return load(folder / "packed.safetensors", net())(INPUT), None


def of_bank(folder):
    """Damage is never an error there: the entry is not taken."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = WeightFiles(folder / "bank", {"run": 1}).read("2", "w3o", SCHEMES["w3o"], (7, 8))
    if found is None:
        raise InputError("not taken")
    return found.dequantize(), None


CASES = {
    "json": ("allocation.json", of_allocation),
    "tensors": ("allocation-*.safetensors", of_allocation),
    "equalization": ("equalization-*.safetensors", of_allocation),
    "packed": ("packed.safetensors", of_packed),
    "bank": ("bank/2.w3o.safetensors", of_bank),
}


def mutated(data, path, rng):
    """The content of the file with one fault, most of them a reader's worst: still well-formed."""
    kinds = [flip, flip, cut, zero, repeat] + ([edit_json] * 6 if path.suffix == ".json" else [edit_header, edit_tensors] * 2)
    return rng.choice(kinds)(bytearray(data), path, rng)


def flip(data, path, rng):
    at = rng.randrange(min(len(data), rng.choice([9, 400, len(data)])))
    data[at] ^= 1 << rng.randrange(8)
    return data


def cut(data, path, rng):
    return data[: rng.randrange(len(data))]


def zero(data, path, rng):
    at = rng.randrange(len(data))
    data[at : at + rng.randrange(1, 64)] = bytes(8)
    return data


def repeat(data, path, rng):
    at = rng.randrange(len(data))
    return data[:at] + data[at : at + rng.randrange(1, 40)] + data[at:]


def edit_tensors(data, path, rng):
    """A tensor gone, twice, renamed, of another type or shape, or with other values, in a valid file with the same metadata."""
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    name, other = rng.choice(sorted(tensors)), rng.choice(sorted(tensors))
    tensor = tensors[name]
    what = rng.randrange(7)
    if what == 0:
        del tensors[name]
    elif what == 1:
        tensors[f"{name}2"] = tensor.clone()
    elif what == 2:
        tensors[name.replace("2", "0") + "x"] = tensors.pop(name)
    elif what == 3:
        tensors[name] = tensor.to(torch.float64)
    elif what == 4:
        tensors[name] = tensor.reshape(1, *tensor.shape)
    elif what == 5:
        tensors[name], tensors[other] = tensors[other].clone(), tensor.clone()
    else:
        tensors[name] = torch.zeros_like(tensor) if tensor.any() else torch.ones_like(tensor)
    return save(tensors, metadata)


def edit_header(data, path, rng):
    """A value of the header's JSON, or of the JSON in its metadata, changed."""
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    metadata = header.get("__metadata__", {})
    nested = {key: text for key, text in metadata.items() if text.startswith("{")}
    if nested and rng.random() < 0.8:
        key = rng.choice(sorted(nested))
        metadata[key] = json.dumps(edited(json.loads(nested[key]), rng))
    else:
        header = edited(header, rng)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data[8 + size :]


def edit_json(data, path, rng):
    text = json.dumps(edited(json.loads(data), rng))
    trap = rng.randrange(12)
    if trap == 0:
        text = text.replace("0.5", rng.choice(["NaN", "Infinity", "1e999", "9" * 5000]), 1)
    elif trap == 1:
        text = text.replace('"layers"', '"layers": {}, "layers"', 1)
    elif trap == 2:
        text = text.replace("0.5", "[" * 20_000 + "]" * 20_000, 1)
    return text.encode()


def edited(data, rng):
    """One value somewhere in `data` deleted, renamed, of another type, or swapped with a neighbour."""
    place = data
    while True:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        key = rng.choice(keys)
        inner = place[key]
        if not isinstance(inner, dict | list) or not inner or rng.random() < 0.2:
            break
        place = inner
    what = rng.randrange(4)
    if what == 0:
        del place[key]
    elif what == 1:
        place[key] = rng.choice(
            [None, True, -1, 0, 2**70, 1.5, "", "x", [], {}, [[]], {"class": "Integer"}, "float32", "int8", "../x"]
        )
    elif what == 2:
        place[key], place[rng.choice(keys)] = place[rng.choice(keys)], inner
    elif isinstance(place, dict):
        place[f"{key}{rng.choice(['', 'x'])}"] = place.pop(key)
    else:
        place.append(copy.deepcopy(inner))
    return data


@pytest.mark.parametrize("case", CASES)
def test_a_mutated_file_is_refused_or_says_the_same(files, case):
    pattern, read = CASES[case]
    (path,) = files.glob(pattern)
    data = path.read_bytes()
    expected, schemes = read(files)
    rng = random.Random(f"{case} 0")
    seen = Counter()
    try:
        for i in range(N):
            path.write_bytes(mutated(data, path, rng))
            try:
                found, names = read(files)
            except InputError as error:
                seen["refused" if len(str(error).splitlines()) == 1 else "refused in several lines"] += 1
            else:
                assert torch.equal(found, expected), i
                assert names == schemes
                seen["the same"] += 1
            finally:
                path.write_bytes(data)
    finally:
        path.write_bytes(data)
    print(case, dict(seen))
    assert seen["refused"] + seen["the same"] == N
    assert seen["refused"] > 0.8 * N
    assert torch.equal(read(files)[0], expected)
