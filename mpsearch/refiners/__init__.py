"""Refiners: they quantize the layers of one allocation jointly, each in the presence of the errors of those before it.

`base.py` is the contract; a choice is one file here and one YAML file in `conf/refiner/`. `error_propagation`, the default, goes
through the layers once; `distillation` then trains them together for a few steps.
"""
