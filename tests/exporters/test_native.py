"""Our own format: what the two files say, and that every damage to them is a sentence."""

import hashlib
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file

from mpsearch.allocation import Allocation
from mpsearch.errors import InputError
from mpsearch.exporters.allocation_file import load_allocation, sha256
from mpsearch.exporters.base import Exporter, Picked
from mpsearch.graph.channel_scaling import load_equalization
from mpsearch.layer import weights_sha256
from mpsearch.packed.model import load
from mpsearch.pipeline.evaluators import ConfirmEvaluator, SearchEvaluator
from mpsearch.schemes.codebook import Codebook
from mpsearch.schemes.floating import Float
from mpsearch.schemes.integer import Integer
from mpsearch.schemes.rotated import Rotated

ROOT = Path(__file__).parents[2]
ALLOCATION = Allocation({"first": "w3", "second": "w2g5", "last": "fp16"})
SCHEMES = {"w3": Integer(3), "w2g5": Integer(2, 5, symmetric=False), "fp16": Float("float16")}


@pytest.fixture
def exported(tiny, tmp_path, request):
    """The path of a written `allocation.json`, and the engine it came from."""
    config = request.config.rootpath / "conf" / "exporter" / "native.yaml"
    exporter = instantiate(OmegaConf.load(config))
    assert isinstance(exporter, Exporter)
    engine = tiny.engine(tiny.net(), tiny.task(), SCHEMES)
    evaluate = SearchEvaluator(engine)
    e, confirmed = evaluate(ALLOCATION, "sampler", trial=0), ConfirmEvaluator(engine)(ALLOCATION, "sampler")
    picked = Picked(
        e,
        {"search": e, "confirm": confirmed},
        {"search": evaluate(Allocation(), "float")},
        "accuracy",
        weights_sha256(engine.model),
        (),
    )
    path = exporter.export(picked, engine, tmp_path / "new" / "folder")
    assert path == tmp_path / "new" / "folder" / "allocation.json"
    return path, engine, picked


def change(path, edit, sealed=True):
    """Edit the JSON; `sealed`: with a new digest, as by someone who means it."""
    data = json.loads(path.read_text())
    edit(data)
    if sealed and "sha256" in data:
        data["sha256"] = sha256(data)
    path.write_text(json.dumps(data))


def tensors_of(path):
    """The tensor file that a JSON names."""
    return path.parent / json.loads(path.read_text())["tensors"]["file"]


def test_what_the_json_says(exported):
    path, _, picked = exported
    data = json.loads(path.read_text())
    assert (data["format"], data["version"]) == ("mpsearch-allocation", 2)
    e = picked.evaluation
    assert (data["size_bytes"], data["average_bits"], data["fraction"]) == (e.size_bytes, e.average_bits, e.fraction)
    assert data["scores"]["confirm"]["accuracy"] == picked.scores["confirm"].quality
    assert data["scores"]["search"]["loss"] == e.loss
    assert set(data["float_scores"]) == {"search"}
    second = data["layers"]["second"]
    assert second["kind"] == "conv2d"
    assert second["shape"] == [6, 2, 3, 3]
    assert second["scheme"] == {"name": "w2g5", **SCHEMES["w2g5"].fields()}
    assert second["tensors"] == ["codes", "scales", "zero_points"]
    assert second["biases"] == []
    assert data["layers"]["last"]["biases"] == ["last"]
    assert {path.name for path in path.parent.iterdir()} == {"allocation.json", data["tensors"]["file"]}
    assert data["tensors"]["file"] == f"allocation-{data['tensors']['sha256'][:12]}.safetensors"
    assert data["size_bytes"] == data["other_bytes"] + sum(layer["size_bytes"] for layer in data["layers"].values())


def test_static_ranges_are_said_and_applied(tiny, tmp_path):
    """The exported model rounds its inputs as the one that was scored, without calibration data."""
    static = {"scale": "static", "symmetric": False, "range": "mse"}
    schemes = {"w3a4": Integer(3, input={"bits": 4, **static}), "w8a8": Integer(8, input={"bits": 8, **static})}
    engine = tiny.engine(tiny.net(), tiny.task(), schemes)
    allocation = Allocation({"first": "w8a8", "second": "w3a4", "last": "w3a4"})
    e = SearchEvaluator(engine)(allocation, "sampler", trial=0)
    picked = Picked(e, {"search": e}, {}, "accuracy", weights_sha256(engine.model), ())
    path = instantiate(OmegaConf.load(ROOT / "conf" / "exporter" / "native.yaml")).export(picked, engine, tmp_path)
    said = json.loads(path.read_text())["layers"]["second"]
    input_params = engine.quantized("second", "w3a4").input_params
    assert (said["input_scale"], said["input_zero_point"]) == (input_params["input_scale"].item(), 0)
    assert said["scheme"]["input"] == {"bits": 4, **static}
    assert sum(layer["size_bytes"] for layer in json.loads(path.read_text())["layers"].values()) == sum(
        engine.space.schemes[s].storage_bits(engine.model.get_submodule(la).weight.shape) // 8 for la, s in allocation.items()
    )
    inputs, _ = engine.batches("search")[0]
    with torch.no_grad(), engine.applied(allocation) as model:
        expected = model(inputs)
    exported = load_allocation(path)
    with torch.no_grad():
        assert torch.equal(exported.apply(tiny.net())(inputs), expected)
        assert torch.allclose(exported.pack(tiny.net())(inputs), expected, rtol=1e-3, atol=1e-3)


def test_small_floats_and_rotations_are_said_and_applied(tiny, tmp_path):
    schemes = {
        "fp8a8": Codebook("e4m3", "channel", "float32", {"levels": "e4m3", "scale": "static"}),
        "w4a8r": Rotated(Integer(4, input={"bits": 8})),
    }
    engine = tiny.engine(tiny.net(), tiny.task(), schemes)
    allocation = Allocation({"first": "fp8a8", "second": "fp8a8", "last": "w4a8r"})
    e = SearchEvaluator(engine)(allocation, "sampler", trial=0)
    picked = Picked(e, {"search": e}, {}, "accuracy", weights_sha256(engine.model), ())
    path = instantiate(OmegaConf.load(ROOT / "conf" / "exporter" / "native.yaml")).export(picked, engine, tmp_path)
    said = json.loads(path.read_text())["layers"]
    assert said["first"]["scheme"]["input"] == {"levels": "e4m3", "scale": "static"}
    assert said["first"]["input_scale"] == engine.quantized("first", "fp8a8").input_params["input_scale"].item()
    assert said["last"]["scheme"] == {"name": "w4a8r", **schemes["w4a8r"].fields()}
    inputs, _ = engine.batches("search")[0]
    with torch.no_grad(), engine.applied(allocation) as model:
        expected = model(inputs)
    exported = load_allocation(path)
    with torch.no_grad():
        assert torch.equal(exported.apply(tiny.net())(inputs), expected)
        assert torch.allclose(exported.pack(tiny.net())(inputs), expected, rtol=1e-3, atol=1e-3)


def test_tensors_are_those_of_the_bank(exported):
    path, engine, _ = exported
    tensors = load_file(tensors_of(path))
    expected = {f"{la}.{key}": t for la, s in ALLOCATION.items() for key, t in engine.quantized(la, s).tensors.items()}
    expected |= {f"{name}.bias": b for la, s in ALLOCATION.items() for name, b in engine.biases(la, s).items()}
    assert tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(tensors[name], tensor)
        assert tensors[name].dtype == tensor.dtype


def test_it_is_read_back(exported):
    path, _, _ = exported
    loaded = load_allocation(path)
    assert load_allocation(str(path)).schemes == loaded.schemes == dict(ALLOCATION)


def test_written_again_it_is_the_same(exported, request, tmp_path):
    path, engine, picked = exported
    before = {file.name: file.read_bytes() for file in path.parent.iterdir()}
    instantiate({"_target_": "mpsearch.exporters.native.Native"}).export(picked, engine, path.parent)
    assert {file.name: file.read_bytes() for file in path.parent.iterdir()} == before


def test_another_model_is_refused_and_left_alone(exported, tiny):
    path, _, picked = exported
    net = tiny.net(seed=1)
    before = tiny.state(net)
    with pytest.raises(
        InputError, match=rf"for a model with checksum {picked.model_sha256[:12]}…; this one has .* Load the same float"
    ):
        load_allocation(path).apply(net)
    tiny.assert_same_state(net, before)


def test_a_model_is_not_quantized_twice(exported, tiny):
    path, _, _ = exported
    net = load_allocation(path).apply(tiny.net())
    with pytest.raises(InputError, match="unfolded and unquantized"):
        load_allocation(path).apply(net)


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda path: path.write_text(path.read_text()[:200]), r"allocation.json is damaged or was edited: .*line"),
        (lambda path: path.write_text(""), r"allocation.json is damaged or was edited: .*line"),
        (lambda path: path.write_bytes(b"\xff\xfe" + path.read_bytes()), "allocation.json is damaged .*codec can't decode"),
        (lambda path: path.write_text("[]"), "the file must be a JSON object"),
        (lambda path: change(path, lambda data: data.update(format="other")), "is no allocation of mpsearch"),
        (lambda path: change(path, lambda data: data.update(version=1)), "has version 1; this mpsearch reads 2. Export it again"),
        (lambda path: change(path, lambda data: data.pop("version")), "has version None"),
        (lambda path: change(path, lambda data: data.pop("tensors")), "'tensors' is missing"),
        (lambda path: change(path, lambda data: data.update(tensors="x")), 'tensors must be a JSON object, got "x"'),
        (lambda path: change(path, lambda data: data.pop("layers")), "'layers' is missing"),
        (lambda path: change(path, lambda data: data.pop("model_sha256")), "'model_sha256' is missing"),
        (lambda path: path.unlink(), "allocation.json' does not exist. Give the allocation.json that mpsearch export wrote"),
        (lambda path: tensors_of(path).unlink(), "allocation-.*safetensors' does not exist"),
    ],
)
def test_damage_to_the_json_is_said(exported, damage, sentence):
    path, _, _ = exported
    damage(path)
    with pytest.raises(InputError, match=sentence):
        load_allocation(path)


def test_a_folder_is_no_allocation(exported):
    path, _, _ = exported
    with pytest.raises(InputError, match=r"is a folder, not a regular file. Give the allocation.json"):
        load_allocation(path.parent)


@pytest.mark.parametrize("at", [0, 8, -1])
def test_one_changed_byte_of_the_tensors_is_seen(exported, at):
    path, _, _ = exported
    file = tensors_of(path)
    data = bytearray(file.read_bytes())
    data[at] ^= 1
    file.write_bytes(data)
    with pytest.raises(InputError, match=r"allocation-.*safetensors is not the file that allocation.json was written with"):
        load_allocation(path)


def test_tensors_that_never_were_any_are_said(exported):
    path, _, _ = exported
    tensors_of(path).write_bytes(b"no tensors")
    change(path, lambda data: data["tensors"].update(sha256=hashlib.sha256(b"no tensors").hexdigest()))
    with pytest.raises(InputError, match="is no safetensors file"):
        load_allocation(path)


def test_tensors_of_another_export_are_refused(exported):
    path, _, _ = exported
    tensors = load_file(tensors_of(path))
    tensors["last.values"] = tensors["last.values"] + 1
    save_file(tensors, tensors_of(path))
    with pytest.raises(InputError, match="is not the file that"):
        load_allocation(path)


def first_layer(edit):
    return lambda data: edit(data["layers"]["first"])


@pytest.mark.parametrize(
    ("edit", "sentence"),
    [
        (lambda data: data["layers"].pop("second"), r"its 2 layers have .* bytes .*: a layer was deleted or changed"),
        (first_layer(lambda la: la["scheme"].update(scale_dtype="float32")), r"'layers.first.size_bytes' must be \d+, got"),
        (first_layer(lambda la: la["scheme"].update(scale_dtype=["float32"])), "'layers.first.scheme' is no scheme"),
        (first_layer(lambda la: la["scheme"].update(bits=4)), "'layers.first.size_bytes' must be"),
        (
            first_layer(lambda la: la["scheme"].update(bits=9)),
            "'layers.first.scheme' is no scheme: bits of an integer scheme must be an integer from 1 to 8; got 9",
        ),
        (
            first_layer(lambda la: la["scheme"].update(symmetric=1)),
            "'layers.first.scheme' is no scheme: symmetric must be true or false; got 1",
        ),
        (first_layer(lambda la: la["scheme"].pop("input")), "lacks fields of a Integer"),
        (first_layer(lambda la: la["scheme"].update(input={"bits": 8, "scale": "static"})), "'layers.first.scheme' lacks fields"),
        (first_layer(lambda la: la["scheme"].update({"class": "Nothing"})), "'Nothing' is no known scheme"),
        (first_layer(lambda la: la.update(shape=[2, 4, 3, 3])), "'first.*' must be .*; got|size_bytes"),
        (first_layer(lambda la: la.update(shape=[4, -2, 3, 3])), "'layers.first.shape' must be a list of integers"),
        (first_layer(lambda la: la.update(modules=[])), "must have a known kind, a module and a shape"),
        (first_layer(lambda la: la.update(modules=["other"])), "'layers.first.biases' must be among its modules"),
        (first_layer(lambda la: la.update(biases=[])), r"the tensor 'first.bias' belongs to no layer"),
        (first_layer(lambda la: la.update(biases=["first", "first"])), "must be a list of different strings"),
        (first_layer(lambda la: la.update(tensors=["codes"])), "'layers.first.tensors' must be codes, scales"),
        (first_layer(lambda la: la.update(note="x")), "'layers.first.note' is unknown"),
        (first_layer(lambda la: la.update(size_bytes=True)), "'layers.first.size_bytes' must be an integer"),
        (lambda data: data.update(size_bytes=data["size_bytes"] - 1), "a layer was deleted or changed"),
        (lambda data: data.update(more=1), "'more' is unknown"),
        (lambda data: data.update(folded_batch_norms=[["a"]]), "'folded_batch_norms' must be a list of pairs of strings"),
        (lambda data: data.update(equalization={"file": "x"}), "x' does not exist"),
    ],
)
def test_an_edit_with_a_new_digest_is_said(exported, edit, sentence):
    path, _, _ = exported
    change(path, edit)
    with pytest.raises(InputError, match=sentence) as error:
        load_allocation(path)
    assert "allocation.json" in str(error.value)


@pytest.mark.parametrize(
    "edit", [lambda data: data["scores"]["search"].update(loss=0.0), lambda data: data.update(average_bits=1)]
)
def test_an_edit_without_a_new_digest_is_seen(exported, edit):
    path, _, _ = exported
    change(path, edit, sealed=False)
    with pytest.raises(InputError, match="content does not match its digest"):
        load_allocation(path)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ('{"format": 1, "format": 2}', "the key 'format' appears twice"),
        ('{"format": NaN}', "the number NaN is not finite"),
        ('{"format": -1e999}', "the number -1e999 is not finite"),
        (f'{{"format": {"9" * 5000}}}', "does not fit in 64 bits"),
        ("[" * 100_000, "nested too deeply"),
        ('{"format": "mpsearch-allocation", "version": 2, "layers": "x"}', "'size_bytes' is missing"),
        ('{\n "format": 1,\n}', "line 3 column 1"),
    ],
)
def test_traps_of_json_are_sentences(tmp_path, text, sentence):
    (tmp_path / "allocation.json").write_text(text)
    with pytest.raises(InputError, match=f"allocation.json is damaged or was edited: .*{sentence}"):
        load_allocation(tmp_path / "allocation.json")


@pytest.mark.parametrize("key", ["tensors", "equalization"])
@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("../allocation.safetensors", "must be a bare file name"),
        ("/etc/passwd", "must be a bare file name"),
        ("a\\b", "must be a bare file name"),
        ("a\0b", "must be a bare file name"),
        ("..", "must be a bare file name"),
        (".", "must be a bare file name"),
        ("", "must be a bare file name"),
        (7, "must be a string, got 7"),
        ("pipe", "is a pipe or device, not a regular file"),
        ("zero", "is a pipe or device, not a regular file"),
        ("folder", "is a folder, not a regular file"),
        ("nowhere", "does not exist"),
    ],
)
def test_files_are_bare_names_of_regular_files(exported, key, name, sentence):
    """Whatever else would be read outside the folder, hang or never end."""
    path, _, _ = exported
    os.mkfifo(path.parent / "pipe")
    (path.parent / "zero").symlink_to("/dev/zero")
    (path.parent / "folder").mkdir()
    change(path, lambda data: data.update({key: {"file": name, "sha256": "0" * 64}}))
    with pytest.raises(InputError, match=sentence):
        load_allocation(path)


@pytest.mark.parametrize("read", [load_allocation, lambda path: load(path, torch.nn.Linear(2, 2)), load_equalization])
def test_only_regular_files_are_read(tmp_path, read):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for path in (tmp_path / "pipe", "/dev/zero", tmp_path, tmp_path / "none", tmp_path / "a\0b", tmp_path / "loop"):
        with pytest.raises(InputError, match=r"not a regular file|does not exist|cannot be read"):
            read(Path(path))


def test_a_link_to_a_regular_file_is_read(exported, tmp_path):
    """As in a download cache, whose folders hold links to their content."""
    path, _, _ = exported
    (tmp_path / "cache").mkdir()
    for file in path.parent.iterdir():
        (tmp_path / "cache" / file.name).symlink_to(file)
    assert load_allocation(tmp_path / "cache" / "allocation.json").schemes == dict(ALLOCATION)


def test_a_score_that_is_not_finite_is_null(exported, request):
    path, engine, picked = exported
    broken = replace(picked.scores["confirm"], loss=float("inf"), cross_entropy=float("nan"))
    instantiate({"_target_": "mpsearch.exporters.native.Native"}).export(
        replace(picked, scores={"confirm": broken}), engine, path.parent
    )
    score = load_allocation(path).data["scores"]["confirm"]
    assert (score["loss"], score["cross_entropy"]) == (None, None)
