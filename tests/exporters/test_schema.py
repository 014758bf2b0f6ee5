"""`allocation.schema.json` describes the exported file: exports validate, malformed files do not, and every key has a text."""

import copy
import json
from collections.abc import Iterator
from importlib import resources

import pytest
import torch

from mpsearch.exporters.allocation_file import KEYS, LAYER_KEYS, load_allocation
from mpsearch.exporters.base import Picked
from mpsearch.exporters.native import Native
from mpsearch.graph.channel_scaling import PARTS, Equalization
from mpsearch.layer import KINDS, weights_sha256
from mpsearch.pipeline.evaluators import ConfirmEvaluator, SearchEvaluator
from mpsearch.schemes.codebook import Codebook
from mpsearch.schemes.floating import Float
from mpsearch.schemes.integer import Integer
from mpsearch.schemes.outliers import Outliers
from mpsearch.schemes.rotated import Rotated

jsonschema = pytest.importorskip("jsonschema")

SCHEMA = json.loads(resources.files("mpsearch.exporters").joinpath("allocation.schema.json").read_text(encoding="utf-8"))
VALIDATOR = jsonschema.Draft202012Validator(SCHEMA)
STATIC = {"scale": "static", "symmetric": False, "range": "mse"}
CASES = {
    "integers and a float": [Integer(3), Integer(2, 5, symmetric=False), Float("float16")],
    "static inputs": [
        Integer(3, input={"bits": 4, **STATIC}),
        Codebook("e4m3", "channel", "float32", {"levels": "e4m3", "scale": "static"}),
        Integer(8, "tensor", input={"bits": 8}),
    ],
    "nested schemes": [
        Outliers(Integer(3), 0.1),
        Outliers(Codebook("nf4", 16)),
        Rotated(Integer(4, input={"bits": 8})),
    ],
    "codebooks": [Codebook("ternary"), Codebook("e2m1", 32, "e8m0"), Codebook("e2m1", 16, "e4m3")],
}


@pytest.fixture(scope="module", params=CASES)
def written(request, tiny, tmp_path_factory):
    """The content of an exported file: one scheme a layer; in the first case with equalization and folded batch norms."""
    schemes = {f"s{i}": scheme for i, scheme in enumerate(CASES[request.param])}
    engine = tiny.engine(tiny.net(), tiny.task(), schemes)
    allocation = engine.space.allocation(range(3))
    splits = {e.split: e(allocation, "sampler") for e in (SearchEvaluator(engine), ConfirmEvaluator(engine))}
    folds, equalization = (), None
    if request.param == "integers and a float":
        folds = (("second", "norm"),)
        equalization = Equalization("Own", {"first.outputs": torch.full((4,), 0.5), "second.inputs": torch.full((4,), 2.0)})
    sha256 = weights_sha256(engine.model)
    picked = Picked(splits["search"], splits, {"search": splits["search"]}, "accuracy", sha256, folds, equalization)
    path = Native().export(picked, engine, tmp_path_factory.mktemp("export"))
    assert load_allocation(path).schemes == dict(allocation)
    return json.loads(path.read_text())


def test_the_schema_is_valid() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)


def test_a_written_file_validates(written) -> None:
    VALIDATOR.validate(written)


def test_the_schema_and_the_reader_agree_on_the_keys() -> None:
    layer = SCHEMA["$defs"]["layer"]
    assert SCHEMA["required"] == list(SCHEMA["properties"]) == list(KEYS)
    assert layer["required"] == list(LAYER_KEYS)
    assert layer["properties"]["kind"]["enum"] == list(KINDS.values())
    assert set(PARTS) <= SCHEMA["$defs"]["equalization"]["properties"].keys()


def test_the_schema_names_every_field_of_a_scheme() -> None:
    for scheme in {type(scheme): scheme for schemes in CASES.values() for scheme in schemes}.values():
        described = SCHEMA["$defs"][type(scheme).__name__]
        assert {"class", *described["required"]} == scheme.fields().keys()
        assert described["required"] == list(described["properties"])


def properties(schema: object) -> Iterator[tuple[str, dict]]:
    """(key, schema) of every property in a schema, at any depth."""
    if isinstance(schema, list):
        for item in schema:
            yield from properties(item)
    elif isinstance(schema, dict):
        for keyword, value in schema.items():
            if keyword in ("properties", "patternProperties"):
                yield from value.items()
                yield from (found for item in value.values() for found in properties(item))
            elif keyword != "if":
                yield from properties(value)


def test_every_key_is_described() -> None:
    described = list(properties(SCHEMA))
    assert len(described) > 50
    assert [key for key, schema in described if len(schema.get("description", "")) < 10] == []


def first(data: dict) -> dict:
    return next(iter(data["layers"].values()))


@pytest.mark.parametrize(
    "edit",
    [
        lambda data: data.pop("version"),
        lambda data: data.update(version=1),
        lambda data: data.update(format="other"),
        lambda data: data.update(note="x"),
        lambda data: data.update(size_bytes=1.5),
        lambda data: data.update(sha256="0" * 63),
        lambda data: data.update(layers=[]),
        lambda data: data.update(folded_batch_norms=[["a"]]),
        lambda data: data.update(equalization={"file": "x"}),
        lambda data: data["tensors"].update(file="../allocation.safetensors"),
        lambda data: data["scores"].update(test=data["scores"]["search"]),
        lambda data: data["scores"]["search"].pop("loss"),
        lambda data: data["scores"]["search"].update(accuracy="high"),
        lambda data: first(data).pop("group"),
        lambda data: first(data).update(kind="lstm"),
        lambda data: first(data).update(shape=[4, -1]),
        lambda data: first(data).update(modules=[]),
        lambda data: first(data).update(note="x"),
        lambda data: first(data).update(biases=["first", "first"]),
        lambda data: first(data)["scheme"].pop("name"),
        lambda data: first(data)["scheme"].pop("class"),
        lambda data: first(data)["scheme"].update({"class": "Integer", "bits": 9}),
        lambda data: first(data)["scheme"].update({"class": "Float", "format": "float8"}),
    ],
)
def test_a_malformed_file_is_rejected(written, edit) -> None:
    data = copy.deepcopy(written)
    edit(data)
    assert not VALIDATOR.is_valid(data)


def test_a_scheme_of_another_class_may_have_any_fields(written) -> None:
    data = copy.deepcopy(written)
    first(data)["scheme"] = {"name": "own", "class": "Own", "width": 3}
    VALIDATOR.validate(data)
