"""Quantizers: algorithms that find the codes and scales of a layer. The contract is `base.Quantizer`.

`kronecker_descent` is the default: coordinate descent on the loss as the Kronecker product of the input's Hessian and the
output's Fisher matrix sees it. `coordinate_descent` and `gptq` use the Hessian alone, `adaround` learns roundings on calibration
data, `clip_search` takes the clipping with the least squared error (also for layers without a Hessian), `hqq` needs no data,
`percentile` and `entropy` choose ranges, `round_to_nearest` clips nothing. `quantizer_of.w2=...` sets another one for one scheme.
"""
