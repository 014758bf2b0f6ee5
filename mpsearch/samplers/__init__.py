"""What proposes the next allocation; the contract is in `base.py`."""
