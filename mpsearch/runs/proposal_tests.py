"""`proposal_tests.csv`: the p-values of the tests by which proposals are accepted, so that a resumed run does not repeat them.

A test needs the losses of each sample, which the evaluations do not keep; measuring them again would take as long as the test.
"""

from __future__ import annotations

from mpsearch.allocation import Allocation
from mpsearch.files.csv_rows import Row, read_rows
from mpsearch.runs.run import RunFolder

TABLE = "proposal_tests"
COLUMNS = ("proposal", "reference", "p_value")
REMEDY = "Delete the file, and resume the run: the proposals are tested again"

Pair = tuple[str, str]  # the ids of a proposal and of its reference


class ProposalTests:
    """The p-values of a run; of none that has a folder, they are kept in memory.

    Raises
    ------
    InputError
        The table is damaged.
    """

    def __init__(self, folder: RunFolder | None = None) -> None:
        self._folder = folder
        self._p_values: dict[Pair, float] = {}
        if folder is not None and (file := folder.path / f"{TABLE}.csv").exists():
            folder.drop_incomplete_row(TABLE)
            self._p_values.update(read_rows(file, COLUMNS, _parse, remedy=REMEDY))

    def find(self, proposal: Allocation, reference: Allocation) -> float | None:
        """The p-value that the proposal is not better than the reference, where that was tested."""
        return self._p_values.get((proposal.id, reference.id))

    def add(self, proposal: Allocation, reference: Allocation, p_value: float) -> None:
        """Record a test; it is on disk when this returns."""
        self._p_values[proposal.id, reference.id] = p_value
        if self._folder is not None:
            self._folder.append(TABLE, dict(zip(COLUMNS, (proposal.id, reference.id, p_value), strict=True)))


def _parse(row: Row) -> tuple[Pair, float]:
    return (row.cells["proposal"], row.cells["reference"]), row.number("p_value", 0.0, 1.0)
