"""Tasks: the data in three splits, and what is measured of a model's outputs. The contract is `base.Task`."""
