"""Schemes: how a layer's weight is stored and its input quantized. The contract is `base.QuantScheme`.

| names in `scheme=[...]` | format |
|---|---|
| `w1` ... `w8` | integers, symmetric, one float16 scale per output channel |
| `w2g64`, `w3g64`, `w4g64`, `w8g64` | integers, asymmetric, groups of 64 weights |
| `w2a4` ... `w8a8`, `w8a16`, `w4a8g64` | the same with inputs of 4 to 16 bits, one scale per token |
| `w2g64o1`, `w3g64o1`, `w4g64o1` | the same with 1 % of the weights in float16 |
| `nf4`, `ternary`, `fp8_e4m3`, `fp8_e5m2`, `fp4` | codebooks |
| `mxfp4`, `mxfp6_e2m3`, `mxfp6_e3m2`, `mxfp8_e4m3`, `mxfp8_e5m2`, `mxint8` | OCP MX: blocks of 32 with a power-of-two scale |
| `q4_1`, `q5_1`, `q2_k`, `q3_k`, `q4_k`, `q5_k`, `q6_k`, `iq4_nl`, `iq4_xs` | the blocks of llama.cpp, as in a GGUF file |
| `nvfp4` | blocks of 16 with an E4M3 scale |
| `fp8a8`, `mxfp8a8`, `mxfp4a8`, `nvfp4a4` | the same with inputs in such formats |
| `w2r`, `w3r`, `w4r`, `w4a4r`, `w4a8r`, `w8a8r` | input and weight of Linear layers rotated by a Hadamard matrix |
| `fp16`, `bf16`, `fp32` | floating point |

Every field can be set: `scheme.w4.group_size=32`, `scheme.w8a8.input.scale=static` (with `input.range=minmax`, `percentile`,
`mse` or `entropy`), `input.symmetric=false`.
"""
