"""llama.cpp, in those of its formats that are schemes of this package.

Q4_0, Q5_0, Q8_0 and MXFP4 hold 32 weights of a row as symmetric codes with a float16 scale: 4.5, 5.5 and 8.5 bits a weight, as
`Integer` with `group_size=32`, or as E2M1 with an E8M0 scale (ggml/src/ggml-common.h: `block_q4_0`, `block_q5_0`, `block_q8_0`,
`block_mxfp4`). `KQuant` and other schemes with an attribute `ggml_type` are formats of its own. The experts of a block
are one tensor for each of gate, up and down (`ffn_gate_exps` ...), and a tensor has one type. Its CPU
kernels round inputs to 8 bits, 32 at a time, which the scores of the search do not include.
"""

from __future__ import annotations

from mpsearch.layer import LayerSpec
from mpsearch.runtimes.base import Runtime, whole_groups
from mpsearch.schemes.base import QuantScheme
from mpsearch.schemes.codebook import MXFP4
from mpsearch.schemes.floating import Float
from mpsearch.schemes.integer import Integer


class LlamaCpp(Runtime):
    """llama.cpp, from a GGUF file."""

    name = "llama_cpp"
    what = (
        "Linear layers and embeddings in its block formats (q2_k to q6_k, q4_1, q5_1, iq4_nl, iq4_xs), at 4, 5 or 8 bits, "
        "symmetric, with a float16 scale per 32 weights (q4_0, q5_0, q8_0), or in MXFP4, in rows of whole blocks"
    )
    exporter = "gguf"
    shared = tuple(f"*.experts.**.{name}" for name in ("gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"))

    def runs(self, layer: LayerSpec, scheme: QuantScheme) -> bool:
        """Linear layers and embeddings: its blocks; symmetric 4, 5 or 8 bits, a float16 scale per 32 weights; MXFP4."""
        if isinstance(scheme, Float):
            return True
        if layer.kind not in ("linear", "embedding"):
            return False
        if scheme == MXFP4:
            return whole_groups(layer, 32)
        if getattr(scheme, "ggml_type", None) is not None:
            return scheme.takes(layer.kind, layer.shape)
        if not isinstance(scheme, Integer) or scheme.input is not None:
            return False
        block = (scheme.group_size, scheme.symmetric, scheme.scale_dtype) == (32, True, "float16")
        return block and scheme.bits in (4, 5, 8) and whole_groups(layer, 32)
