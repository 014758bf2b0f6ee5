"""Equalizers: scale channels once, after folding, so that weights and inputs are easier to quantize. The contract is
`base.Equalizer`.

The float model's outputs stay the same. `cross_layer` balances the weights of successive layers (for one scale per tensor),
`awq` protects channels with large inputs (for weight rounding), `smooth_quant` moves the range of inputs to weights (for
quantized inputs).
"""
