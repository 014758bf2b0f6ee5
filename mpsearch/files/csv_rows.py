"""CSV files whose rows are checked when they are read: plain CSV with a last column `crc`.

The `crc` of a row is the CRC-32 of the header and all rows up to it, without this column, as 8 hexadecimal digits. Rows that were
changed, removed, added, swapped or repeated are therefore found, except rows that are missing at the end: a table that grows row
by row looks the same after an interruption. The checksum of a table written in one go also covers the number of rows. This
protects against damage, not against intent.
"""

from __future__ import annotations

import csv
import io
import math
import os
import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from mpsearch.errors import InputError
from mpsearch.files import append_durably, file_errors, read_regular, write_atomically

CRC = "crc"
REMEDY = "Delete that line and what follows it, or start a new run"
_INTEGER = re.compile(r"0|-?[1-9][0-9]{0,17}")
_NUMBER = re.compile(r"-?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]{1,3})?|-?inf|nan")

Item = TypeVar("Item")


@dataclass(frozen=True)
class Row:
    """The cells of line number `line` (from 1) of `file`, by column; what is no valid cell raises an `InputError`."""

    file: Path
    line: int
    cells: Mapping[str, str]
    remedy: str = REMEDY

    def damage(self, column: str, expected: str) -> InputError:
        """The sentence for a cell that is not as `expected`."""
        got = text if len(text := ascii(self.cells[column])) <= 60 else f"{text[:40]}… ({len(self.cells[column]):,} characters)"
        return InputError(
            f"{self.file} is damaged: line {self.line}, column '{column}': got {got}, expected {expected}. {self.remedy}."
        )

    def one_of(self, column: str, allowed: Sequence[str]) -> str:
        """One of the texts that are allowed."""
        if self.cells[column] not in allowed:
            raise self.damage(column, f"one of {', '.join(allowed)}")
        return self.cells[column]

    def boolean(self, column: str) -> bool:
        """`True` or `False`, nothing else."""
        return self.one_of(column, ("True", "False")) == "True"

    def integer(self, column: str, least: int = 0) -> int:
        """An integer from `least`, in plain digits."""
        text = self.cells[column]
        if not _INTEGER.fullmatch(text) or int(text) < least:
            raise self.damage(column, f"an integer from {least}")
        return int(text)

    def number(
        self,
        column: str,
        least: float = 0.0,
        most: float = math.inf,
        *,
        infinite: bool = False,
        nan: bool = False,
        slack: float = 0,
    ) -> float:
        """A number from `least` to `most`, or `slack` beyond; `infinite` and `nan` say whether it may be one of those."""
        text = self.cells[column]
        value = float(text) if _NUMBER.fullmatch(text) else None
        if value is not None and math.isnan(value) and nan:
            return value
        if value is None or not least - slack <= value <= most + slack or (math.isinf(value) and not infinite):
            limits = f" from {least:g}" * (least > -math.inf) + f" to {most:g}" * (most < math.inf)
            raise self.damage(column, f"a {'' if infinite else 'finite '}number{limits}")
        return value


def append_row(path: Path, row: Mapping[str, Any]) -> None:
    """Add a row to a table that grows; the first row writes the header too. It is on disk when this returns."""
    text, crc = "", _begin(list(row))
    if path.exists() and path.stat().st_size > 0:
        crc = _last_crc(path, crc)
    else:
        text = _line([*row, CRC])
    line, _ = _checked(list(row.values()), crc)
    append_durably(path, text + line)


def write_rows(path: Path, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Write a complete table."""
    lines, crc = [_line([*columns, CRC])], _begin(columns, len(rows))
    for row in rows:
        line, crc = _checked(row, crc)
        lines.append(line)
    write_atomically(path, "".join(lines))


def drop_incomplete_row(path: Path) -> None:
    """Cut off a last row that was not written to its end."""
    if path.exists() and not (data := read_regular(path)).endswith(b"\n"):
        with file_errors(path):
            os.truncate(path, data.rfind(b"\n") + 1)


def read_rows(
    path: Path,
    columns: Sequence[str],
    parse: Callable[[Row], Item],
    *,
    at_once: bool = False,
    unchecked: bool = False,
    remedy: str = REMEDY,
) -> list[Item]:
    """What `parse` makes of each row; it raises `Row.damage` for a wrong cell, and runs before the row's checksum is compared.

    `at_once` says that the table was written by `write_rows`, else by `append_row`: then a last row without its line end, as an
    interruption leaves it, is left out. `unchecked` lets in a table that has no column `crc` at all, as people write it.
    `InputError` where the table is damaged, with `remedy`.
    """
    data = read_regular(path)
    whole = data[: data.rfind(b"\n") + 1]

    def damaged(line: int, what: str) -> InputError:
        return InputError(f"{path} is damaged: line {line}: {what}. {remedy}.")

    if at_once and whole != data:
        raise damaged(data.count(b"\n") + 1, "the line has no end")
    try:
        text = whole.decode("utf-8")
    except UnicodeDecodeError as error:
        raise damaged(data[: error.start].count(b"\n") + 1, "it is not UTF-8 text") from None
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    lines, number = [], 1
    try:
        for cells in reader:
            lines.append((number, cells))
            number = reader.line_num + 1
    except csv.Error as error:
        raise damaged(number, str(error)) from None
    if not lines and not at_once:
        return []
    header = lines[0][1] if lines else []
    if header != [*columns, CRC] and not (unchecked and header == list(columns)):
        raise damaged(1, f"expected the columns {','.join([*columns, CRC])}")
    if at_once and len(lines) == 1:
        raise damaged(2, "expected at least one row")
    items, crc = [], _begin(columns, len(lines) - 1 if at_once else None)
    for number, cells in lines[1:]:
        if len(cells) != len(header):
            raise damaged(number, f"got {len(cells)} values for {len(header)} columns")
        items.append(parse(Row(path, number, dict(zip(columns, cells, strict=False)), remedy)))
        expected, crc = _checked(cells[: len(columns)], crc)
        if CRC in header and expected != _line(cells):
            raise damaged(number, "its values do not match its checksum: it was changed, or rows were added, removed or moved")
    return items


def _line(cells: Sequence[Any]) -> str:
    values = ("" if cell is None else repr(float(cell)) if isinstance(cell, float) else cell for cell in cells)
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(values)
    return text.getvalue()


def _begin(columns: Sequence[str], count: int | None = None) -> int:
    return zlib.crc32(_line(columns).encode() + (b"" if count is None else b"%d" % count))


def _checked(cells: Sequence[Any], crc: int) -> tuple[str, int]:
    """The row with its checksum, which follows the `crc` of the row before."""
    line = _line(cells)
    crc = zlib.crc32(line.encode(), crc)
    return f"{line[:-1]},{crc:08x}\n", crc


def _last_crc(path: Path, begin: int) -> int:
    """The checksum of the last row; `begin` where there is the header alone."""
    with file_errors(path, "read"), open(path, "rb") as stream:
        stream.seek(max(-16, -os.fstat(stream.fileno()).st_size), os.SEEK_END)
        tail = stream.read()
    if tail.endswith(b",crc\n"):
        return begin
    match = re.search(rb",([0-9a-f]{8})\n\Z", tail)
    if match is None:
        raise InputError(f"{path} is damaged: it does not end with a whole row. Delete its last line, or start a new run.")
    return int(match[1], 16)
