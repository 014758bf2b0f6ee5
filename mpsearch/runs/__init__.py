"""A run's record in memory and in its folder: written row by row, read back, checked."""
