"""Where each layer stands on a map of the network: transformers as blocks by projections, convolutional networks by stages.

The names say it: "model.layers.3.self_attn.q_proj" is row "self_attn.q_proj" and column 3 of section "model.layers";
"layer2.0.conv1" is row "conv1" and column 0 of section "layer2". Layers without a number in their names, and numbered ones that
share no rows, are a section in one row, in forward order.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

NUMBER = re.compile(r"\d+")
MAX_ROWS = 24  # of a section; blocks with more kinds of layers are too unlike for a grid


@dataclass(frozen=True)
class Section:
    """A part of the network: `cells[layer] = (row, column)`; several layers may share a cell (the experts of a block)."""

    title: str
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    cells: dict[int, tuple[int, int]]


def layer_sections(names: Sequence[str]) -> list[Section]:
    """The sections of a network's layers, given by their qualified names in forward order; each index is in one section."""
    parsed = [_parsed(name) for name in names]
    sections: list[Section] = []
    for title in dict.fromkeys(title for title, _, _ in parsed):
        members = [i for i, (section, _, _) in enumerate(parsed) if section == title]
        grid = _grid(title, members, parsed)
        if len(members) > 2 and _is_dense(grid):
            sections.append(grid)
        else:
            sections.append(_flow(title, members, names))
    return _joined(sections)


def _parsed(name: str) -> tuple[str, str, str]:
    """(section, row, column): "blocks.1.0.conv_pw" -> ("blocks.1", "conv_pw", "0"); no number: ("", name, "")."""
    parts = name.split(".")
    first = next((i for i, part in enumerate(parts[:-1]) if NUMBER.fullmatch(part)), None)
    if first is None:
        return "", name, ""
    last = first
    while last + 2 < len(parts) and NUMBER.fullmatch(parts[last + 1]):
        last += 1
    row = ".".join("*" if NUMBER.fullmatch(part) and i else part for i, part in enumerate(parts[last + 1 :]))
    return ".".join(parts[:last]), row, parts[last]


def _grid(title: str, members: Sequence[int], parsed: Sequence[tuple[str, str, str]]) -> Section:
    rows = tuple(dict.fromkeys(parsed[i][1] for i in members))
    columns = tuple(dict.fromkeys(parsed[i][2] for i in members))
    row_of, column_of = ({text: i for i, text in enumerate(texts)} for texts in (rows, columns))
    return Section(title, rows, columns, {i: (row_of[parsed[i][1]], column_of[parsed[i][2]]) for i in members})


def _is_dense(grid: Section) -> bool:
    """Whether blocks have most of their rows in common."""
    filled = len(set(grid.cells.values()))
    return bool(grid.title) and len(grid.rows) <= MAX_ROWS and filled >= 0.4 * len(grid.rows) * len(grid.columns)


def _flow(title: str, members: Iterable[int], names: Sequence[str]) -> Section:
    """All in one row; the columns are the names within the section."""
    members = list(members)
    prefix = f"{title}." if title else ""
    columns = tuple(names[i].removeprefix(prefix) for i in members)
    return Section(title, ("",), columns, {i: (0, position) for position, i in enumerate(members)})


def _joined(sections: Sequence[Section]) -> list[Section]:
    """Neighbouring sections of one or two layers as one, so that a sequence of unlike stages takes one row."""
    small = [s for s in sections if len(s.rows) == 1 and len(s.cells) <= 2]
    if len(small) < 3:
        return list(sections)
    columns = [f"{s.title}.{column}".strip(".") for s in small for column in s.columns]
    cells = {i: (0, position) for position, i in enumerate(i for s in small for i in s.cells)}
    joined = Section("", ("",), tuple(columns), cells)
    return [*(s for s in sections if s not in small), joined]
