"""What exported files measure in their runtimes, for the page and the console."""

from __future__ import annotations

from collections.abc import Sequence

from mpsearch.runs.run import Run
from mpsearch.runs.verified import Verified


def verified_sentence(run: Run, v: Verified) -> str:
    """One verification in a sentence."""
    q = run.quality
    unit = " %" if q.kind == "share" else ""
    tokens = f" {v.same_tokens} of {v.n_tokens} greedily generated tokens are those of the packed model." if v.n_tokens else ""
    return (
        f"Verified in {v.runtime} (exporter={v.exporter}): {v.file_bytes:,} bytes; confirm split: {q.name} {q.text(v.quality)}"
        f"{unit} (95 % interval {q.range_text(v.quality_low, v.quality_high)}), loss {v.loss:.4g} (packed "
        f"{v.packed_loss:.4g}); {v.ms:.3g} ms per forward pass (float model in PyTorch {v.float_ms:.3g}, packed "
        f"{v.packed_ms:.3g}; {v.measured_on}).{tokens}"
    )


def verified_rows(run: Run, verified: Sequence[Verified]) -> tuple[list[str], list[tuple[str, ...]]]:
    """(header, rows) of a table of verifications, of each file the latest."""
    q = run.quality
    header = [
        "runtime",
        "exporter",
        "point",
        "bytes of files",
        f"{q.label} confirm (95 %)",
        f"{run.loss_label} confirm",
        "packed",
    ]
    header += ["ms in the runtime", "ms float in PyTorch", "ms packed", "same tokens"]
    latest = {(v.exporter, v.point, v.trained): v for v in verified}
    rows = []
    for v in latest.values():
        quality = f"{q.text(v.quality)} ({q.range_text(v.quality_low, v.quality_high)})"
        point = f"{v.point}{', trained' if v.trained else ''}"
        times = (f"{ms:.3g}" for ms in (v.ms, v.float_ms, v.packed_ms))
        tokens = f"{v.same_tokens} of {v.n_tokens}" if v.n_tokens else ""
        sizes = v.runtime, v.exporter, point, f"{v.file_bytes:,}"
        rows.append((*sizes, quality, f"{v.loss:.4g}", f"{v.packed_loss:.4g}", *times, tokens))
    return header, rows
