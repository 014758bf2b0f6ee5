"""Reports: tables, findings, figures, and the page `report.md` of a run."""
