"""What the benchmarks write: a page for people and rows for programs, with the machine they were measured on."""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path

import torch

REPORTS = Path(__file__).parent.parent / "reports"
Row = dict[str, object]


def machine() -> Row:
    """The last row of each report: processor, cores, load, PyTorch, commit and date."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    cpu = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    model = cpu[0].split(":")[1].strip() if cpu else platform.machine()
    case = (
        f"{model}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, torch {torch.__version__}, commit {commit}, "
        f"{datetime.date.today().isoformat()}"
    )
    return {"what": "machine", "case": case, "value": os.cpu_count(), "unit": "cores"}


def write(name: str, lines: Sequence[str], rows: Sequence[Row], also: Path | None = None) -> None:
    """Print the page and write it to `reports/<name>/table.md`, the rows to `rows.json` there and to the file `also`."""
    text = "\n".join(lines) + "\n"
    print(text)
    folder = REPORTS / name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "table.md").write_text(text)
    for file in filter(None, (also, folder / "rows.json")):
        file.write_text(json.dumps(rows, indent=1, default=float) + "\n")
