"""Runtimes: which schemes they run, and which layers they fuse, so that those share a scheme. The contract is `base.Runtime`.

`mpsearch` (default) runs every scheme. `torchao`, `vllm`, `llama_cpp` and `onnxruntime` restrict the search to what their
sources or manuals say they load.
"""
