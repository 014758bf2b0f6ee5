"""Allocations, and the space of all there are: pins, uniform allocations, one character a group."""

import json

import pytest

from mpsearch.allocation import ALPHABET, Allocation, SearchSpace
from mpsearch.errors import InputError
from mpsearch.layer import LayerSpec
from mpsearch.runs.space_json import read_space
from mpsearch.schemes.floating import Float
from mpsearch.schemes.integer import Integer

SCHEMES = {"w2": Integer(2), "w4": Integer(4), "w8": Integer(8)}
W = tuple(SCHEMES)


def layer(name, group=None, modules=None, shape=(8, 10)):
    return LayerSpec(name, "linear", shape, 80, group or name, modules or (name,))


LAYERS = [layer("stem"), layer("layer1.conv1"), layer("layer1.conv2"), layer("layer2.conv1", shape=(4, 4)), layer("head")]


def choices(pin):
    space = SearchSpace.build(LAYERS, SCHEMES, pin)
    return dict(zip(space.names, space.choices, strict=True))


def test_allocation_is_a_value():
    one, other = Allocation({"a": "w2", "b": "w4"}), Allocation([("b", "w4"), ("a", "w2")])
    assert one == other
    assert hash(one) == hash(other)
    assert one != Allocation({"a": "w2"})
    assert one != {"a": "w2", "b": "w4"}
    assert dict(one) == {"a": "w2", "b": "w4"}
    assert one.to_json() == '{"a":"w2","b":"w4"}'
    assert len({one, other, Allocation()}) == 2
    with pytest.raises(TypeError):
        one["a"] = "w8"


def test_a_uniform_allocation_takes_its_own_scheme_and_not_another_of_its_size():
    """`w4` and `w4b` weigh the same; only a group that may not take the scheme falls back to the nearest in size."""
    schemes = {"w4": Integer(4), "w4b": Integer(4, scale_dtype="float16"), "w8": Integer(8)}
    space = SearchSpace.build(LAYERS, schemes, ["head:w4|w8"])
    assert space.storage_bits[:, 0].tolist() == space.storage_bits[:, 1].tolist()
    assert set(space.uniform("w4").values()) == {"w4"}
    assert dict(space.uniform("w4b")) == {**dict.fromkeys(space.names, "w4b"), "head": "w4"}


def test_layers_of_one_group_share_a_choice():
    space = SearchSpace.build([layer("q", "qkv"), layer("o"), layer("k", "qkv", shape=(3, 5))], SCHEMES)
    assert space.names == ("qkv", "o")
    assert [la.name for la in space.layers] == ["q", "k", "o"]
    assert space.numel == 80 + 15 + 80
    for j, scheme in enumerate(SCHEMES.values()):
        assert space.storage_bits[0, j] == scheme.storage_bits((8, 10)) + scheme.storage_bits((3, 5))
    assert space.log10_combinations == pytest.approx(2 * 0.4771212547)


def test_a_pin_narrows_what_it_matches():
    assert choices(["stem:w8"]) == {**dict.fromkeys((la.name for la in LAYERS), W), "stem": ("w8",)}
    assert choices(["layer?.conv1:w4|w8"])["layer2.conv1"] == ("w4", "w8")
    assert choices(["layer1.*:w8|w2"])["layer1.conv2"] == ("w2", "w8"), "in the order of the schemes"
    assert choices(["stem|*.conv2:w8"]) == {**choices(["stem:w8"]), "layer1.conv2": ("w8",)}
    assert choices([]) == dict.fromkeys((la.name for la in LAYERS), W)


def test_a_pin_may_ask_for_bits():
    assert choices(["layer1.*:>=4", "head:>= 8"]) == {
        "stem": W,
        "layer1.conv1": ("w4", "w8"),
        "layer1.conv2": ("w4", "w8"),
        "layer2.conv1": W,
        "head": ("w8",),
    }


def test_later_pins_win():
    pinned = choices(["*:w8", "layer1.*:w4", "layer1.conv2:w2|w4"])
    assert list(pinned.values()) == [("w8",), ("w4",), ("w2", "w4"), ("w8",), ("w8",)]


def test_a_pin_finds_groups_and_every_owner_of_a_tied_weight():
    layers = [layer("q", "qkv"), layer("k", "qkv"), layer("embed", modules=("embed", "head"))]
    for pattern in ("qkv", "q", "k"):
        assert SearchSpace.build(layers, SCHEMES, [f"{pattern}:w8"]).choices == (("w8",), W)
    for pattern in ("embed", "head"):
        assert SearchSpace.build(layers, SCHEMES, [f"{pattern}:w8"]).choices == (W, ("w8",))


@pytest.mark.parametrize(
    ("pin", "sentence"),
    [
        ("layer1.conv3:w8", r"'layer1.conv3:w8' matches no layer. Did you mean 'layer1.conv2' or"),
        ("stem:w9", r"names a scheme 'w9' that is not searched. Did you mean"),
        ("stem:fp16", r"names a scheme 'fp16' that is not searched. There is: w2, w4, w8"),
        ("stem:>=9", r"'stem:>=9' asks for 9 bits or more, which none of w2, w4, w8 has"),
        ("stem:>=x", r"names a scheme '>=x' that is not searched"),
        ("stem", "A pin reads 'pattern:scheme'"),
        ("stem:", "A pin reads 'pattern:scheme'"),
        (":w8", "A pin reads 'pattern:scheme'"),
        ("stem:|", "A pin reads 'pattern:scheme'"),
    ],
)
def test_a_wrong_pin_is_said(pin, sentence):
    with pytest.raises(InputError, match=sentence):
        choices([pin])


def test_too_few_and_too_many_schemes_are_said():
    with pytest.raises(InputError, match="Name at least one"):
        SearchSpace.build(LAYERS, {})
    with pytest.raises(InputError, match="Got 81 schemes; at most 80"):
        SearchSpace.build(LAYERS, {f"w{i}": Integer(4) for i in range(81)})


def test_one_character_a_group():
    schemes = {f"s{i}": Integer(1 + i % 8) for i in range(len(ALPHABET))}
    space = SearchSpace.build(LAYERS, schemes)
    allocation = space.allocation([0, 9, 10, 36, 61])
    assert space.encode(allocation) == "09aAZ"
    assert space.decode("09aAZ") == allocation
    assert list(space.decode("09aAZ")) == list(space.names)
    assert space.choice(allocation).tolist() == [0, 9, 10, 36, 61]


@pytest.mark.parametrize("text", ["", "0", "00000000", "0003", "000-0", "00009"])
def test_text_of_another_space_is_refused(text):
    with pytest.raises(ValueError, match="is no allocation of 5 groups and 3 schemes"):
        SearchSpace.build(LAYERS, SCHEMES).decode(text)


def test_uniform_takes_the_nearest_in_size_where_pinned():
    space = SearchSpace.build(LAYERS, SCHEMES, ["stem:w8", "head:w2|w4"])
    assert list(space.uniform("w4").values()) == ["w8", "w4", "w4", "w4", "w4"]
    assert list(space.uniform("w8").values()) == ["w8", "w8", "w8", "w8", "w4"]
    assert all(name in names for name, names in zip(space.uniform("w2").values(), space.choices, strict=True))


def test_a_space_is_the_same_when_read_back():
    schemes = {
        "w3g5": Integer(3, 5, symmetric=False, scale_dtype="float32"),
        "w8": Integer(8, "tensor"),
        "bf16": Float("bfloat16"),
    }
    space = SearchSpace.build([*LAYERS, layer("tied", "head", ("tied", "other"))], schemes, ["stem:w8|bf16"], other_bits=77)
    again = read_space(json.loads(json.dumps(space.to_dict())))
    assert again == space
    assert again.to_dict() == space.to_dict()
    assert (again.storage_bits == space.storage_bits).all()
    assert (again.allowed == space.allowed).all()
