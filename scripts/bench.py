"""Runs benchmarks: what is measured, against which rivals, is said by `--list`.

    python scripts/bench.py --list
    python scripts/bench.py matmul conv
    python scripts/bench.py quantizers network=resnet20 quantizer=gptq,hqq     some values of the parameters only
    python scripts/bench.py matmul --quick --json rows.json                    a run of seconds, at sizes that say little

An interrupted run is resumed. The table, the rows (CSV) and the figure go to `reports/bench_<name>/`; points that were not asked
for stay in them. Data are read from `$MPSEARCH_DATA` (default: `../shared/data`); points whose data are missing are skipped.
"""

import argparse
import importlib
import json
import os
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME or PARAMETER=VALUE,VALUE")
    parser.add_argument("--list", action="store_true", help="the benchmarks and their parameters")
    parser.add_argument("--quick", action="store_true", help="smoke sizes; writes no report unless --reports is given")
    parser.add_argument("--again", action="store_true", help="forget what an interrupted run has measured")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows, and one of the machine, as JSON")
    parser.add_argument("--reports", type=Path, metavar="FOLDER", help="in place of reports/")
    options = parser.parse_args()
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")  # threads that spin for long slow each other down: as the command sets it
    registry = registered()
    if options.list or not options.names:
        for bench in registry.values():
            grid = " ".join(f"{name}={','.join(map(str, values))}" for name, values in bench.grid.items())
            print(f"{bench.name}: {bench.text.splitlines()[0]}\n    {grid}")
        return
    run(options, registry)


def registered() -> dict:
    """All benchmarks by name: those of the modules `bench_*.py` of this folder."""
    import harness

    for file in sorted(Path(__file__).parent.glob("bench_*.py")):
        importlib.import_module(file.stem)
    return harness.REGISTRY


def run(options: argparse.Namespace, registry: dict) -> None:
    import harness

    chosen = dict(name.split("=", 1) for name in options.names if "=" in name)
    names = [name for name in options.names if "=" not in name]
    if unknown := [name for name in names if name not in registry]:
        raise SystemExit(f"There is no benchmark '{unknown[0]}', only {', '.join(registry)}.")
    everything: list[dict] = []
    for name in names:
        bench = registry[name]
        partial = None if options.quick else harness.PARTIAL / f"{name}.jsonl"
        if options.again and partial is not None:
            partial.unlink(missing_ok=True)
        rows = harness.run(bench, bench.points(options.quick, chosen), partial)
        everything += rows
        folder = (options.reports or harness.REPORTS) / f"bench_{name}"
        if rows and (options.reports or not options.quick):
            harness.write(bench, merged(folder / "rows.csv", rows), folder)
        if partial is not None:
            partial.unlink(missing_ok=True)
        print("\n".join(harness.table(rows, bench.grid)))
    if options.json:
        options.json.write_text(json.dumps([*everything, harness.machine()], indent=1, default=float) + "\n")


def merged(file: Path, rows: list[dict]) -> list[dict]:
    """`rows` in place of those of the same `what` and `case` in the file, and the others of it."""
    import pandas as pd

    if not file.exists():
        return rows
    new = {(row["what"], str(row["case"])) for row in rows}
    old = pd.read_csv(file, dtype={"case": str, "commit": str}).to_dict("records")
    kept = [{key: value for key, value in row.items() if pd.notna(value)} for row in old]
    return [row for row in kept if (row["what"], row["case"]) not in new] + rows


if __name__ == "__main__":
    main()
