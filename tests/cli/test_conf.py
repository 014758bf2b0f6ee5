"""Every file in conf/: it composes, its first line says whose it is, and its target exists and takes what the file spells."""

import importlib.util
import inspect
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_module
from hydra.utils import get_object, instantiate
from omegaconf import OmegaConf

from mpsearch.cli import COMMANDS
from mpsearch.schemes.input import IntegerInput

CONF = Path(__file__).parents[2] / "conf"
OPTIONS = [path.relative_to(CONF) for path in sorted(CONF.glob("*/**/*.yaml"))]
EXPORT_GROUPS = {"pick", "exporter"}
MULTI_SELECT = {"scheme", "cost"}


def plain(path: Path) -> dict[str, Any]:
    """The file without its defaults, which are of other groups."""
    node = OmegaConf.to_container(OmegaConf.load(CONF / path)) or {}
    return {str(key): value for key, value in node.items() if key != "defaults"}  # type: ignore[union-attr]


def targets(node: Any) -> list[dict[str, Any]]:
    """All nodes with a `_target_`."""
    if not isinstance(node, dict):
        return []
    return [node] * ("_target_" in node) + [found for value in node.values() for found in targets(value)]


def composed(command: str, *overrides: str) -> Any:
    with initialize_config_module("mpsearch.conf", version_base="1.3"):
        return compose(command, overrides=list(overrides))


@pytest.mark.parametrize("command", COMMANDS)
def test_a_primary_file_reads_like_a_table_of_contents(command: str) -> None:
    text = (CONF / f"{command}.yaml").read_text()
    assert text.startswith(f"# mpsearch {command}: ")
    settings = plain(Path(f"{command}.yaml"))
    scalars = [key for key, value in settings.items() if not isinstance(value, dict | list)]
    assert len(scalars) <= 12
    assert composed(command) is not None


def test_every_primary_file_is_a_command() -> None:
    assert {path.stem for path in CONF.glob("*.yaml")} == set(COMMANDS)


def test_the_defaults() -> None:
    search, sensitivity = composed("search"), composed("sensitivity")
    assert list(search.scheme) == ["w2", "w3", "w4", "w6", "w8"]
    assert dict(search.budget) == {"bytes": None, "bits": None, "fraction": None}
    assert list(search.cost) == list(search.budget)
    shared = sensitivity.keys() & search.keys()
    assert shared == sensitivity.keys()
    assert all(sensitivity[key] == search[key] for key in shared)
    assert dict(composed("export").pick) == {
        "max_bytes": None,
        "bits": None,
        "max_ms": None,
        "max_drop": None,
        "min_quality": None,
        "max_quality": None,
        "point": None,
    }


@pytest.mark.parametrize("path", [path for path in OPTIONS if path.parent.name not in MULTI_SELECT], ids=str)
@pytest.mark.thin(8)
def test_every_option_composes(path: Path) -> None:
    group, name = str(path.parent), path.stem
    config = composed("export" if group in EXPORT_GROUPS else "search", f"{group}={name}")
    if group != "experiment":
        assert OmegaConf.to_container(config[group]) == plain(path)


@pytest.mark.parametrize("group", sorted(MULTI_SELECT))
def test_all_options_of_a_multi_select_compose(group: str) -> None:
    names = [path.stem for path in OPTIONS if path.parent.name == group]
    config = composed("search", f"{group}=[{','.join(names)}]")
    assert list(config[group]) == names
    for name in names:
        node = plain(Path(group, f"{name}.yaml"))
        assert OmegaConf.to_container(config[group][name]) == (node["cost"][name] if group == "cost" else node)


@pytest.mark.parametrize("path", OPTIONS, ids=str)
def test_every_target_takes_what_its_file_spells(path: Path) -> None:
    for node in targets(plain(path)):
        target = node["_target_"]
        if target == "???":
            continue
        root = target.partition(".")[0]
        if root != "mpsearch" and importlib.util.find_spec(root) is None:
            pytest.skip(f"{root} is not installed")
        parameters = inspect.signature(get_object(target)).parameters
        if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
            assert {key for key in node if not key.startswith("_")} <= parameters.keys()


@pytest.mark.parametrize("path", [path for path in OPTIONS if path.parent.name != "scheme"], ids=str)
def test_a_choice_spells_the_defaults_of_its_target(path: Path) -> None:
    """All of them, with the values of the signature: what the command line runs by default is what Python runs by default.

    Schemes are excepted, as their files are many choices of one class, and so are interpolations and classes of other packages.
    """
    for node in targets(plain(path)):
        if node["_target_"].startswith("mpsearch."):
            parameters = inspect.signature(get_object(node["_target_"])).parameters.values()
            defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
            assert defaults.keys() <= node.keys()
            spelt = {key: node[key] for key in defaults if not str(node[key]).startswith("${")}
            assert spelt == {key: defaults[key] for key in spelt}


@pytest.mark.parametrize("path", [path for path in OPTIONS if path.parent.name in MULTI_SELECT], ids=str)
def test_a_multi_select_file_says_where_it_goes(path: Path) -> None:
    group, name = path.parent.name, path.stem
    first = (CONF / path).read_text().splitlines()[0]
    assert first == ("# @package _global_" if group == "cost" else f"# @package {group}.{name}")
    if group == "cost":
        assert plain(path).keys() == {"cost", "budget"}
        assert plain(path)["budget"] == {name: None}


@pytest.mark.parametrize("path", [path for path in OPTIONS if path.parent.name == "scheme"], ids=str)
def test_a_scheme_spells_every_field(path: Path) -> None:
    node = plain(path)
    scheme = instantiate(node, _convert_="object")
    assert {key for key in node if not key.startswith("_")} == set(inspect.signature(type(scheme)).parameters)
    if path.stem.startswith("w"):
        if path.stem.endswith("r"):
            scheme = scheme.dense
        text, _, outliers = path.stem[1:].removesuffix("r").partition("o")
        if outliers:
            assert 100 * scheme.share == int(outliers)
            scheme = scheme.dense
        bits, _, group = text.partition("g")
        bits, _, input_params = bits.partition("a")
        input_bits, _, scale = input_params.partition("_")
        assert scheme.bits == int(bits)
        how = {"symmetric": int(input_bits or 0) >= 8, **({"scale": scale, "range": "mse"} if scale else {})}
        assert scheme.input == (IntegerInput(int(input_bits), **how) if input_bits else None)
        assert scheme.group_size == (int(group) if group else "channel")
        assert scheme.symmetric == (not group)
