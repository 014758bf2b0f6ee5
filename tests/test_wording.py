"""Names, docstrings, comments and messages use standard terms; what is never standard is listed here."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PLACES = ("mpsearch", "scripts", "conf", ".github", ".ci", "README.md", "pyproject.toml")
SUFFIXES = {".py", ".cpp", ".h", ".cu", ".cuh", ".txt", ".cmake", ".json", ".yaml", ".yml", ".toml", ".md", ""}

# A pattern, and what to write instead.
PHRASES = {
    r"\bcame\b": "got",
    r"\bminds?\b": "is sensitive to",
    r"\bovertak\w+": "dominated",
    r"\bgone on with\b|\bgoes on where\b": "resumed",
    r"\bleft early\b": "early-stopped",
    r"\bdearer\b": "costs more",
    r"\bfront doors?\b": "entry point",
    r"\brefusals?\b": "error messages",
    r"\bshel(f|ves)\b": "registry",
    r"\bstory\b": "pipeline",
    r"\brooms?\b": "module, space",
    r"\bwhole numbers?\b": "integer",
    r"\bscales? an? (channel|token|tensor|layer|group|block|row)\b": "per-channel scale",
    r"\bbeside\b": "next to, in addition to, compared with",
    r"\b(of_input|met_by)\b": "input_params, a name that says what it is",
}
IDENTIFIERS = {
    *("beside", "came", "found", "here", "holding", "how", "met_by", "minds", "narrowed", "of", "of_input", "refusals", "room"),
    *("shelf", "story", "there", "those"),
}


def files() -> Iterator[Path]:
    for place in PLACES:
        path = ROOT / place
        found = [path] if path.is_file() else path.rglob("*")
        yield from (
            file for file in sorted(found) if file.is_file() and file.suffix in SUFFIXES and "__pycache__" not in file.parts
        )


def identifiers(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, name) of all that is defined: variables, parameters, attributes, functions, classes."""
    for node in ast.walk(tree):
        match node:
            case ast.Name(id=name, ctx=ast.Store()) | ast.Attribute(attr=name, ctx=ast.Store()):
                yield node.lineno, name
            case ast.arg(arg=name) | ast.FunctionDef(name=name) | ast.ClassDef(name=name):
                yield node.lineno, name


def faults(path: Path) -> list[str]:
    text = path.read_text(encoding="utf-8")
    lines = enumerate(text.splitlines(), 1)
    wrong = [
        f"{path.relative_to(ROOT)}:{i}: {match.group()!r}; write: {instead}"
        for i, line in lines
        for pattern, instead in PHRASES.items()
        for match in re.finditer(pattern, line, re.IGNORECASE)
    ]
    if path.suffix == ".py":
        wrong += [
            f"{path.relative_to(ROOT)}:{i}: the name {name!r}; name what it is"
            for i, name in identifiers(ast.parse(text))
            if name.strip("_") in IDENTIFIERS
        ]
    return wrong


def test_only_standard_terms() -> None:
    wrong = [fault for path in files() for fault in faults(path)]
    assert wrong == [], "\n".join(wrong)


@pytest.mark.parametrize(
    ("text", "n"),
    [
        ("'got 3'", 0),
        ("'3 came.'", 1),
        ("# one scale a channel, and a story", 2),
        ("def of(found, x): here = x.there = how(x)", 4),
        ("for those in x: return those", 1),
        ("'what was found here'", 0),
    ],
)
def test_what_is_a_fault(tmp_path, monkeypatch, text, n) -> None:
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    (tmp_path / "module.py").write_text(text)
    assert len(faults(tmp_path / "module.py")) == n
