"""The engine: swaps an allocation's quantized weights into the float model, scores it, and swaps back.

It composes parts that know nothing of it: `Calibration` (statistics of the data), `BiasCorrection`, `WeightBank` (every layer and
scheme quantized once), `PrefixCache` (what two allocations share is not computed again) and `Scorer` (losses and quality).
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from mpsearch.allocation import Allocation, SearchSpace
from mpsearch.engine.bias_correction import BiasCorrection
from mpsearch.engine.calibrate import Calibration
from mpsearch.engine.prefix_cache import PrefixCache
from mpsearch.engine.scoring import Scorer
from mpsearch.engine.weight_bank import Key, WeightBank, needs_hessians
from mpsearch.engine.weight_files import WeightFiles
from mpsearch.evaluation import Score
from mpsearch.graph.surgery import quantize_input, swapped_data
from mpsearch.layer import check_finite
from mpsearch.quantizers.base import InputMoments, Quantizer
from mpsearch.schemes.base import QuantizedTensor
from mpsearch.tasks.base import Task

FLOAT = Allocation()


class QuantEngine:
    """Scores allocations of `space` on the float `model`, which is left bitwise as it was.

    Parameters
    ----------
    model, task, space
        The float model in eval mode, what runs and scores it, and what may be quantized.
    quantizers
        Scheme name -> its quantizer.
    moments
        What `calibrate` returned for the layers of the space.
    bias_correction
        Whether a layer's bias makes up for the mean error of its output (`mpsearch.engine.bias_correction`).
    bank_max_bytes, hessian_max_bytes, prefix_max_bytes
        Limits on dense weights, on Hessians and output Fishers, and on kept outputs in memory. With 0 for outputs
        every score is a whole forward pass.
    device
        Where the model is, as in "cpu".
    files
        Where quantized weights are kept too.
    scorer
        The batches and float outputs of another engine of the same model, task and device.
    """

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        space: SearchSpace,
        quantizers: Mapping[str, Quantizer],
        moments: Mapping[str, InputMoments],
        *,
        bias_correction: bool = True,
        bank_max_bytes: int = 2 * 10**9,
        hessian_max_bytes: int = 2 * 10**9,
        prefix_max_bytes: int = 10**9,
        device: str = "cpu",
        files: WeightFiles | None = None,
        scorer: Scorer | None = None,
    ) -> None:
        for layer in space.layers:
            check_finite(layer.name, model.get_parameter(layer.weight_name))
        scratch = None if files is None else files.folder
        scorer = scorer or Scorer(model, task, device, scratch)
        calibration = Calibration(
            model,
            task,
            space.layers,
            scorer.batches("calibration"),
            moments,
            scorer.divergence,
            with_fishers=any(quantizer.needs_fisher for quantizer in quantizers.values()),
            hessian_max_bytes=hessian_max_bytes,
            with_hessians=_with_hessians(space, quantizers),
            scratch=scratch,
        )
        correction = BiasCorrection(model, calibration) if bias_correction else None
        bank = WeightBank(model, space, quantizers, calibration, correction, files=files, dense_max_bytes=bank_max_bytes)
        self._compose(scorer, bank, PrefixCache(model, task, space, prefix_max_bytes, scratch) if prefix_max_bytes else None)

    @classmethod
    def from_parts(cls, scorer: Scorer, bank: WeightBank, prefix_cache: PrefixCache | None = None) -> QuantEngine:
        """An engine of these parts; the bank and the prefix cache must be of one model and space."""
        engine = cls.__new__(cls)
        engine._compose(scorer, bank, prefix_cache)
        return engine

    def _compose(self, scorer: Scorer, bank: WeightBank, prefix_cache: PrefixCache | None) -> None:
        self.scorer, self.bank, self.prefix_cache = scorer, bank, prefix_cache
        self.model, self.space, self.task = bank.model, bank.space, scorer.task
        self.device, self.divergence, self.quality = scorer.device, scorer.divergence, scorer.quality
        self.moments = bank.calibration.moments
        self._modules = {layer.name: layer.modules for layer in self.space.layers}
        self._members = {group.name: group.layers for group in self.space.groups}
        self._scores: dict[tuple[Allocation, str], Score] = {}
        self._n_applied = 0  # allocations that are swapped in at the moment

    def with_weights(self, weights: Mapping[Key, QuantizedTensor], biases: Mapping[Key, Mapping[str, Tensor]]) -> QuantEngine:
        """An engine on the same model and data whose bank has these (layer, scheme) already, and quantizes all others.

        `biases` maps (layer, scheme) to module name -> bias, float32 `[out]`; where it has none they are corrected as usual.
        """
        prefix_cache = self.prefix_cache and self.prefix_cache.emptied()  # its outputs are of other weights
        return QuantEngine.from_parts(self.scorer, self.bank.with_weights(weights, biases), prefix_cache)

    def release(self) -> None:
        """Let go of what can be computed again: Hessians, dense weights and kept outputs."""
        self.bank.release()
        if self.prefix_cache is not None:
            self.prefix_cache.clear()

    def batches(self, split: str) -> list[tuple[Any, Tensor]]:
        """See `Scorer.batches`."""
        return self.scorer.batches(split)

    def quantized(self, layer: str, scheme: str) -> QuantizedTensor:
        """See `WeightBank.quantized`."""
        return self.bank.quantized(layer, scheme)

    def biases(self, layer: str, scheme: str) -> dict[str, Tensor]:
        """See `WeightBank.biases`."""
        return self.bank.biases(layer, scheme)

    def swaps(self, layer: str, scheme: str, *, keep: bool = True) -> list[tuple[Tensor, Tensor]]:
        """See `WeightBank.dense`."""
        return self.bank.dense(layer, scheme, keep=keep)

    def own_inputs(self) -> AbstractContextManager[None]:
        """See `Calibration.own_inputs`."""
        return self.bank.calibration.own_inputs()

    @contextmanager
    def input_quantized(self, layer: str, scheme: str) -> Iterator[None]:
        """While the block runs, the layer's input is quantized as the scheme says, wherever one of its modules is called."""
        weight = self.quantized(layer, scheme)
        with ExitStack() as undo:
            for name in self._modules[layer]:
                undo.callback(quantize_input(self.model.get_submodule(name), weight))
            yield

    @contextmanager
    def applied(self, allocation: Allocation) -> Iterator[nn.Module]:
        """While the block runs, the model holds the allocation; groups that it leaves out stay float."""
        pairs = [(layer.name, scheme) for group, scheme in allocation.items() for layer in self._members[group]]
        values = [self.swaps(*pair) for pair in pairs]  # all before the first is swapped in: quantizing runs the float model
        self._n_applied += 1
        try:
            with ExitStack() as stack:
                stack.enter_context(swapped_data(itertools.chain(*values)))
                for layer, scheme in pairs:
                    if self.space.schemes[scheme].input_format is not None:
                        stack.enter_context(self.input_quantized(layer, scheme))
                yield self.model
        finally:
            self._n_applied -= 1

    def score(self, allocation: Allocation, split: str = "search") -> Score:
        """The allocation's score on a split; measured once, then looked up."""
        key = (allocation, split)
        if key not in self._scores:
            start = time.perf_counter()
            self.float_logits(split)
            with self.applied(allocation):
                score = self.scorer.score(self.outputs(allocation, split) if allocation else None, split)
            # Of the samples of ten thousand trials, only what is compared is kept: losses where proposals are accepted.
            losses = score.losses[:0] if split == "confirm" else score.losses
            seconds = time.perf_counter() - start
            self._scores[key] = replace(score, qualities=score.qualities[:0], losses=losses, seconds=seconds)
        return self._scores[key]

    def score_of(self, model: nn.Module | None, split: str) -> Score:
        """The score of any model on a split, `None` for the float one, compared with the float model's outputs there."""
        self.float_logits(split)
        return self.scorer.score(None if model is None else self.scorer.outputs(model, split), split)

    def float_logits(self, split: str) -> Tensor:
        """The float model's outputs on a split, float32 `[n, columns]`; computed once, while nothing is swapped in."""
        if self._n_applied and not self.scorer.has_float_outputs(split):
            raise RuntimeError(f"float_logits('{split}') was first called while an allocation is swapped in; call it before.")
        return self.scorer.float_outputs(split, lambda: self.outputs(FLOAT, split))

    def outputs(self, allocation: Allocation, split: str) -> Iterator[Tensor]:
        """The model's outputs `[n, columns]` on each batch of a split, while the allocation is swapped in (`applied`)."""
        if self.prefix_cache is None:
            yield from self.scorer.outputs(self.model, split)
        else:
            for i, (inputs, _) in enumerate(self.batches(split)):
                yield self.prefix_cache.forward(split, i, inputs, allocation)


def _with_hessians(space: SearchSpace, quantizers: Mapping[str, Quantizer]) -> frozenset[str]:
    """Names of the layers that may take a scheme for which a Hessian is needed."""
    needing = {
        name for name, quantizer in quantizers.items() if name in space.schemes and needs_hessians(quantizer, space.schemes[name])
    }
    pairs = zip(space.groups, space.choices, strict=True)
    return frozenset(layer.name for group, choices in pairs if needing & set(choices) for layer in group.layers)
