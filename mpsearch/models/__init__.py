"""The shelf of models; its contract is in `base.py`."""
