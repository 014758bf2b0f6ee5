"""Models: functions that return a trained network in float32. The contract is in `base`."""
