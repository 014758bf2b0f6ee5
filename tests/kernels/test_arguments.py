"""The structs of Python are those of C++, field by field, and a compiled module of other sources is not used."""

from __future__ import annotations

import ctypes
import re
from pathlib import Path

import pytest
from test_backends import USE, run_python

from mpsearch.kernels import arguments

CPU = Path(arguments.__file__).parent / "cpu"
KINDS = {"int": ctypes.c_int, "int64_t": ctypes.c_int64, "bool": ctypes.c_bool, "float": ctypes.c_float}
STRUCTS = dict(
    match
    for file in ("arguments.h", "input.h")
    for match in re.findall(r"struct (\w+) \{(.*?)\n\};", (CPU / file).read_text(), re.S)
)
NAMES = {"WeightFormat": "_Weight", "InputFormat": "_Input"}


def declared(body: str) -> list[tuple[str, object]]:
    """(name, type) of each field of a struct in C++."""
    fields: list[tuple[str, object]] = []
    for declaration in re.sub(r"//.*", "", body).split(";")[:-1]:
        kind, names = re.fullmatch(r"\s*(?:const )?(\w+\*?) (.*?)\s*", declaration, re.S).groups()
        type_ = ctypes.c_void_p if kind.endswith("*") else KINDS.get(kind) or getattr(arguments, NAMES.get(kind, kind))
        fields += [(name.strip(), type_) for name in names.split(",")]
    return fields


@pytest.mark.parametrize("name", [name for name in STRUCTS if name != "InputGrid"])
def test_python_mirrors_the_header(name: str) -> None:
    struct = getattr(arguments, NAMES.get(name, name))
    assert [kind for _, kind in struct._fields_] == [kind for _, kind in declared(STRUCTS[name])]
    assert [field.removesuffix("_code") for field, _ in struct._fields_] == [field for field, _ in declared(STRUCTS[name])]


def test_a_module_of_other_sources_is_not_used() -> None:
    other = "import sys, types\nm = types.ModuleType('_cpu')\nm.__file__ = 'other.so'\nsys.modules['mpsearch.kernels._cpu'] = m\n"
    run = run_python(other + USE + "print(k.available_backends())")
    assert run.stdout == "('reference',)\n", run.stderr
    run = run_python(other + USE, MPSEARCH_REQUIRE_KERNELS="1")
    assert "ImportError: The compiled kernels are missing (other.so was built from other sources)" in run.stderr
