"""The shelf of tasks; its contract is in `base.py`."""
