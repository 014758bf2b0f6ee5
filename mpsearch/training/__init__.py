"""Training of a picked point as it is stored: quantization-aware, with straight-through gradients."""
