"""Costs of an allocation, which budgets limit and the front trades against the loss. The contract is `base.Cost`.

| name | what it is |
|---|---|
| `bytes` | all parameters and persistent buffers as stored: codes, scales, zero points, padding, and what is kept in float |
| `bits` | average bits of the searched weights, that overhead included |
| `fraction` | `bytes` divided by the size in float32 |
| `latency_ms` | milliseconds of a forward pass: measured times of single layers on this machine, summed |
| `bit_operations` | MACs x weight bits x input bits, per sample |
| `millijoules` | per sample, by an energy model |
| `activation_bytes` | peak memory of activations for one sample, by a model; a budget only |

Several budgets hold together. `objective` names the cost, or two, of the front.
"""
