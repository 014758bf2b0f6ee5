"""The steps of a run, one module each; `mpsearch.search` calls them in this order.

1. **prepare**: batch norms are folded into the layers before them. The model runs once to find its layers: Linear, Conv,
   ConvTranspose and Embedding, the projections of `nn.MultiheadAttention` and of Hugging Face's `Conv1D`. Tied weights are one
   layer. With an equalizer, channels are then scaled without changing the outputs of the float model.
2. **calibrate**: the calibration split runs once, for what quantizers and bias correction need to know of each layer's input.
3. **sensitivity**: each layer is quantized in each scheme once and kept; the metric estimates the loss of each pair.
4. **search**: the uniform allocations and exact knapsack solutions along the front, then proposals of the sampler within the
   budgets, each evaluated on the search split. One row is on disk before the next evaluation begins.
5. **confirm**: points of the front and the uniform allocations on the confirm split, on packed weights and the compiled
   kernels, with 95 % intervals paired with the float model. Before a point is scored it is refined (`mpsearch.refiners`); the
   refined weights are kept where their loss on the search split is lower. The points are tested from the largest down; the
   default pick is the last one whose quality is non-inferior to the float model's within `max_drop`.

A run folder holds the page `index.html`, `report.md` and its figures, and the tables that they are drawn from: `evaluations.csv`
(everything that was measured), `front.csv` and `uniform.csv` (two rows a point: search and confirm), `confirm.csv`,
`sensitivity.csv`, `effects.npy` (interactions between groups), `proposal_tests.csv` (which proposals are better than the additive
solution), `progress.json` (phases and their seconds); `space.json`, `config.yaml` and `environment.json` describe what was
searched. What is read back has a checksum. `bank/` keeps every layer as it
was quantized, `refined/` those of refined points, `confirmed/` what each sample scored at each confirmed point; all three may be
deleted at any time.

While a search runs, scores are simulated: dequantized weights, float32 arithmetic, inputs rounded where the scheme says so
(`packed` is `False` in the tables). Confirmed scores are of the packed model (`packed` is `True`) and agree with the simulated
ones within float rounding, which is checked on the first batch of each point (`verified`).
"""
