"""The figures of a run, one a file. Each is drawn from a table in the run's folder, so that a reader can redraw it."""
