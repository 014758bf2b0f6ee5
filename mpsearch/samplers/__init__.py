"""Samplers: propose allocations within the budgets. The contract is in `base`.

`front` (default) refines the measured front with a surrogate of the loss. `nsga2`, `nsga3`, `tpe`, `random` and `brute_force` are
Optuna's; any other of Optuna's samplers is `sampler=custom sampler._target_=optuna.samplers.GPSampler`.
"""
