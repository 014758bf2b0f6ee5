"""The structure of the source: private attributes are used inside only, and files, functions and the root stay small."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
SOURCES = {path.relative_to(ROOT).as_posix(): path for part in ("mpsearch", "scripts") for path in (ROOT / part).rglob("*.py")}
TREES = {name: ast.parse(path.read_text()) for name, path in SOURCES.items()}

MOST_LINES, MOST_FUNCTION_LINES, MOST_ROOT_ENTRIES = 350, 60, 40

# Private attributes of other libraries, and why they are used.
THIRD_PARTY = {
    "_version": "torch counts writes into a tensor's memory nowhere else",
    "_parameters": "torch: the parameters that a module registered itself, unlike those that a property computes",
    "_buffers": "torch: as _parameters",
    "_forward_hooks": "torch has no other way to ask whether a module has hooks",
    "_forward_pre_hooks": "torch: as _forward_hooks",
    "_backward_hooks": "torch: as _forward_hooks",
    "_reversed_padding_repeated_twice": "torch: the padding of a convolution as F.pad takes it",
    "_local_scalar_dense": "torch: the operator that reads a number out of a tensor",
    "_C": "torch: dispatch modes are not public",
    "_len_torch_dispatch_stack": "torch: as _C",
    "_ops": "torch: the class of operators is not public",
    "_exit": "os: a public function with such a name",
}


def defined(tree):
    """The names that a module and its classes define: functions, classes, fields, and attributes of `self` and `cls`."""
    for node in ast.walk(tree):
        match node:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                yield name
            case ast.Attribute(value=ast.Name(id="self" | "cls"), attr=name, ctx=ast.Store()):
                yield name
            case ast.Name(id=name, ctx=ast.Store()):
                yield name


def test_private_attributes_are_used_inside_only():
    wrong = []
    for name, tree in TREES.items():
        own = {*defined(tree), *THIRD_PARTY}
        for node in ast.walk(tree):
            match node:
                case ast.Attribute(value=ast.Name(id="self" | "cls")):
                    continue
                case ast.Attribute(attr=attribute) if attribute.startswith("_") and not attribute.startswith("__"):
                    if attribute not in own:
                        wrong.append(f"{name}:{node.lineno}: {ast.unparse(node)}")
                case ast.ImportFrom(module=module, names=names) if (module or "").startswith("mpsearch"):
                    private = [each.name for each in names if each.name.startswith("_") and each.name != "__version__"]
                    wrong += [f"{name}:{node.lineno}: imports {each} of {module}" for each in private]
    assert not wrong, "\n".join(wrong)


def test_files_are_small():
    large = {name for name, path in SOURCES.items() if len(path.read_text().splitlines()) > MOST_LINES}
    assert not large, large


def lines_of_code(function):
    """Without the signature and the docstring: a public function may have many documented parameters."""
    body = function.body[1:] if ast.get_docstring(function) else function.body
    return function.end_lineno - body[0].lineno + 1 if body else 0


def test_functions_are_short():
    long = {
        f"{name}::{node.name}"
        for name, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and lines_of_code(node) > MOST_FUNCTION_LINES
    }
    assert not long, long


def test_headings_of_docstrings_stand_alone():
    """A reflow that joins a heading and its underline with the text leaves nothing that the reference could show."""
    joined = [
        f"{name}: {line.strip()}"
        for name, path in SOURCES.items()
        for line in path.read_text().splitlines()
        if re.search(r"(Attributes|Parameters|Returns|Yields|Raises|Notes) -{3,}|^ +-{5,} \w", line)
    ]
    assert joined == []


def test_the_root_of_the_package_has_few_entries():
    entries = [path.name for path in (ROOT / "mpsearch").iterdir() if not path.name.startswith(("_cpu", "__pycache__"))]
    assert len(entries) <= MOST_ROOT_ENTRIES, sorted(entries)
