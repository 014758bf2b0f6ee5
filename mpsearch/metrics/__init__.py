"""Sensitivity metrics: estimates of the loss increase when one group alone takes a scheme. The contract is
`base.SensitivityMetric`.

`gauss_newton` (default) takes a few backward passes and is the only one that also estimates interactions between groups. `kl` and
`task_loss` evaluate the model for each pair, `fisher` takes one backward pass (diagonal), `hawq` estimates Hessian traces, `sqnr`
and `weight_mse` look at weights alone.
"""
