"""Exporters: write a picked point as files that a runtime opens. The contract is `base.Exporter`.

`native` writes `allocation.json`, which `allocation.schema.json` describes, and the packed tensors in a safetensors file;
`mpsearch.load_allocation` reads them. `packed` writes the packed model in one safetensors file for `mpsearch.packed.model.load`.
What was written is loaded and scored again before it replaces an earlier export.
"""
