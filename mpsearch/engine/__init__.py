"""The engine: quantizes layers once, swaps allocations into the model, and scores them."""
