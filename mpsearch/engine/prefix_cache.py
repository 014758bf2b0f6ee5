"""Prefix reuse: what an allocation has in common with an earlier one, from the first layer on, is not computed again.

The outputs of a few modules (`mpsearch.graph.calls` finds which) are kept for each batch under the schemes of all groups read
until then, so that a score is bit for bit the one of a whole forward pass. An output is kept once another allocation asks for the
same prefix, so that a prefix seen once never displaces a useful one; of two in use, the one that saves more work per byte stays.
"""

from __future__ import annotations

import pathlib
from bisect import bisect_left
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, takewhile
from typing import Any

import torch
from torch import Tensor, nn

from mpsearch.allocation import ALPHABET, Allocation, SearchSpace
from mpsearch.errors import check_memory
from mpsearch.files.scratch import Kept
from mpsearch.graph.calls import Call, Path, find_runs, follow, owned_by, version
from mpsearch.graph.surgery import Handler, intercepted, swapped_data
from mpsearch.graph.trace import first_samples
from mpsearch.tasks.base import Task

N_REMEMBERED = 10**7  # groups of the allocations whose prefixes are known to have been asked for, a character each
N_CHECKED = 2  # samples on which a restart is checked
COPY_BYTES = 2**27  # of copies of weights in memory
FLOAT = "-"

Key = tuple[str, int, int, str]


@dataclass
class _Output:
    """A module's output as it was returned, and the multiply-accumulates of a sample that starting from it saves."""

    tensor: Tensor
    version: int
    macs: float
    used: int = 0  # the last evaluation that started from it

    @property
    def nbytes(self) -> int:
        return self.tensor.untyped_storage().nbytes()

    @property
    def worth(self) -> float:
        """Multiply-accumulates saved per byte."""
        return self.macs / max(self.nbytes, 1)

    @property
    def is_intact(self) -> bool:
        """Whether it is a plain tensor into which nothing has been written."""
        return version(self.tensor) == self.version >= 0


class PrefixCache:
    """Runs `model` batch by batch under the allocations of `space`, and keeps at most `max_bytes` of outputs to start from.

    Copies of a large network's weights are in files in the folder `scratch` (`mpsearch.files.scratch`).
    """

    def __init__(
        self, model: nn.Module, task: Task, space: SearchSpace, max_bytes: int, scratch: pathlib.Path | None = None
    ) -> None:
        self.model, self.task, self.space, self.max_bytes, self.scratch = model, task, space, max_bytes, scratch
        self.n_bytes = 0
        self._kept: dict[Key, _Output] = {}
        self._prefixes: dict[str, _Prefixes] = {}
        self._current: tuple[str, Allocation] | None = None
        self._evaluation = 0
        self._characters = dict(zip(space.scheme_names, ALPHABET, strict=False))
        self._runs: list[list[Call]] | None = None
        self._plan: list[tuple[list[Call], list[str]]] = []
        self._holds: dict[tuple[Call, Call], bool] = {}
        self._paths: dict[tuple[str, int], Path] = {}  # (split, batch)
        self._path = Path()  # of the sample

    def emptied(self) -> PrefixCache:
        """One for the same model and space that holds no outputs, as for other weights."""
        return PrefixCache(self.model, self.task, self.space, self.max_bytes, self.scratch)

    @torch.no_grad()
    def forward(self, split: str, i: int, inputs: Any, allocation: Allocation) -> Tensor:
        """The outputs of the split's batch `i`, while `allocation` is swapped into the model.

        Where something raises to end the pass early, what was computed until then is kept all the same.
        """
        self._start(split, inputs, allocation)
        if not self._runs:
            return self.task.forward(self.model, inputs)
        if (split, i) not in self._paths:  # nothing is kept of it yet
            logits, self._paths[split, i] = follow(self.model, self.task.forward, inputs, self.space.groups, self._order)
            return logits
        handlers: dict[nn.Module, Handler] = {}
        caught: dict[Key, _Output] = {}
        for run, prefixes in self._plan:
            if not self._paths[split, i].has_run(run, self._path):
                continue
            keys = [(split, i, call.begin, prefix) for call, prefix in zip(run, prefixes, strict=True)]
            known = next((j for j in reversed(range(len(run))) if keys[j] in self._kept and self._kept[keys[j]].is_intact), -1)
            if known >= 0:
                self._kept[keys[known]].used = self._evaluation
                handlers |= _replay(run[: known + 1], self._kept[keys[known]].tensor)
            if known < len(run) - 1:
                handlers |= _catch(run[-1], self._work(run[0], run[-1]), caught, keys[-1])
        try:
            with intercepted(handlers):
                return self.task.forward(self.model, inputs)
        finally:
            for key, output in caught.items():
                if output.is_intact:
                    self._keep(key, output)

    @torch.no_grad()
    def begin(self, split: str, i: int, inputs: Any, allocation: Allocation) -> None:
        """Find out now what `forward` finds out: for this the model runs on a few samples, and once on the batch."""
        self._start(split, inputs, allocation)
        if self._runs and (split, i) not in self._paths:
            _, self._paths[split, i] = follow(self.model, self.task.forward, inputs, self.space.groups, self._order)

    def clear(self) -> None:
        """Forget all outputs, as where the model's weights have changed."""
        self._kept, self._prefixes, self._current, self.n_bytes = {}, {}, None, 0

    def _start(self, split: str, inputs: Any, allocation: Allocation) -> None:
        if self._runs is None:
            self._runs = self._prepare(inputs)
        if self._current is None or self._current[0] != split or self._current[1] is not allocation:
            self._begin(split, allocation, self._runs)

    def _prepare(self, inputs: Any) -> list[list[Call]]:
        """Find the runs, and the work of each group, on a few samples, or on the batch if the model takes no fewer."""
        try:
            self._sample = first_samples(inputs, N_CHECKED)
            runs, order = find_runs(self.model, self.task.forward, self._sample, self.space.groups)
        except Exception as error:  # the model takes batches of one size only
            check_memory(error)
            self._sample = inputs
            runs, order = find_runs(self.model, self.task.forward, inputs, self.space.groups)
        if runs:
            self._path = follow(self.model, self.task.forward, self._sample, self.space.groups, order)[1]
        groups = {group.name: group for group in self.space.groups}
        self._order = order
        self._members = [[self.model.get_submodule(m) for la in groups[n].layers for m in la.modules] for n in order]
        work = (sum(layer.macs for layer in groups[name].layers) for name in order)
        self._work_until = list(accumulate(work, initial=0))
        return runs

    def _begin(self, split: str, allocation: Allocation, runs: Sequence[list[Call]]) -> None:
        self._current = split, allocation
        self._evaluation += 1
        code = "".join(self._characters[allocation[n]] if n in allocation else FLOAT for n in self._order)
        common = self._prefixes.setdefault(split, _Prefixes()).common(code)
        self._plan = [(run, [code[: call.after] for call in run]) for run in self._known_runs(runs, common)]

    def _known_runs(self, runs: Sequence[list[Call]], common: int) -> Iterator[list[Call]]:
        """The parts of each run that an allocation which shares the first `common` groups with another need not compute.

        A run is cut where more than the next module reads an output.
        """
        for run in runs:
            start = 0
            while start < len(run):
                end = self._reach(run, start, common)
                if end > start:
                    yield run[start:end]
                else:
                    end = start + 1
                    yield from self._known_runs(run[start].runs, common)
                    if run[start].after > common:
                        return
                start = end

    def _reach(self, run: Sequence[Call], start: int, common: int) -> int:
        """The end of the longest part from `start`, within the first `common` groups, that one output can replace."""
        reach = start
        for i in range(start, len(run)):
            if run[i].after > common:
                break
            if run[i].can_be_kept and self._work(run[start], run[i]):
                if not self._can_restart(run, start, i + 1):
                    break
                reach = i + 1
        return reach

    def _work(self, first: Call, last: Call) -> int:
        """Multiply-accumulates of a sample in the layers from the first call to the last."""
        return self._work_until[last.after] - self._work_until[first.before]

    def _can_restart(self, run: Sequence[Call], start: int, end: int) -> bool:
        """Whether the outputs are the same bit for bit if the output of `run[start:end]` is given instead of computed.

        Tried once, with other weights behind it, after a pass with other weights everywhere, so that a value that a module
        stored itself is a wrong one.
        """
        ends = run[start], run[end - 1]
        if ends not in self._holds:
            self._holds[ends] = self._check(run[start:end])
        return self._holds[ends]

    def _check(self, run: Sequence[Call]) -> bool:
        behind = owned_by([module for members in self._members[run[-1].after :] for module in members])
        everywhere = owned_by([module for members in self._members for module in members])
        caught: dict[Key, _Output] = {}
        key: Key = ("", 0, 0, "")
        try:
            with intercepted(_catch(run[-1], 0, caught, key)):
                self.task.forward(self.model, self._sample)
            output = caught[key]
            with swapped_data(self._changed(behind)):
                expected = self.task.forward(self.model, self._sample)
            with swapped_data(self._changed(everywhere)):
                self.task.forward(self.model, self._sample)
            with swapped_data(self._changed(behind)), intercepted(_replay(run, output.tensor)):
                logits = self.task.forward(self.model, self._sample)
        except Exception as error:  # random weights may break code that looks at values
            check_memory(error)
            return False
        same = logits.shape == expected.shape and torch.allclose(logits, expected, rtol=0, atol=0, equal_nan=True)
        return same and output.is_intact

    def _changed(self, parameters: Sequence[nn.Parameter]) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """Each parameter and its own values in other places, slightly larger."""
        copies = Kept(COPY_BYTES, self.scratch)
        return ((p, copies.keep(torch.empty_like(p.data).copy_(p.data.roll(1) * (1 + 1 / 64)))) for p in parameters)

    def _keep(self, key: Key, output: _Output) -> None:
        """Keep the output if it fits, perhaps in place of outputs that are worth less or were not used lately."""
        if key in self._kept:
            self._drop(key)

        def rank(other: Key) -> tuple[float, int]:
            kept = self._kept[other]
            return kept.worth if kept.used >= self._evaluation - 1 else -1.0, kept.used

        excess, dropped = self.n_bytes + output.nbytes - self.max_bytes, []
        for other in sorted(self._kept, key=rank) if excess > 0 else ():
            if excess <= 0 or rank(other)[0] >= output.worth:
                break
            dropped.append(other)
            excess -= self._kept[other].nbytes
        if excess > 0:
            return
        for other in dropped:
            self._drop(other)
        output.used = self._evaluation
        self._kept[key] = output
        self.n_bytes += output.nbytes

    def _drop(self, key: Key) -> None:
        self.n_bytes -= self._kept.pop(key).nbytes


class _Prefixes:
    """The codes of the allocations that were asked for, and the longest prefix that each shares with an earlier one."""

    def __init__(self) -> None:
        self.sorted: list[str] = []
        self.in_order: deque[str] = deque()
        self.lengths: dict[str, int] = {}

    def common(self, code: str) -> int:
        """The longest prefix that the code shares with an earlier one; the same again where it is asked for again."""
        if code not in self.lengths:
            place = bisect_left(self.sorted, code)  # the nearest in the alphabet share the longest prefix
            self.lengths[code] = max((_shared(code, other) for other in self.sorted[max(place - 1, 0) : place + 1]), default=0)
            self.sorted.insert(place, code)
            self.in_order.append(code)
            if len(self.in_order) * len(code) > N_REMEMBERED:
                oldest = self.in_order.popleft()
                del self.sorted[bisect_left(self.sorted, oldest)], self.lengths[oldest]
        return self.lengths[code]


def _shared(one: str, other: str) -> int:
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=True)))


def _replay(run: Sequence[Call], output: Tensor) -> dict[nn.Module, Handler]:
    """All of the run's modules return the last one's output, which only the modules after it read."""
    return {call.module: lambda *args, **kwargs: output for call in run}


def _catch(call: Call, macs: float, caught: dict[Key, _Output], key: Key) -> dict[nn.Module, Handler]:
    """The call's module runs, and its output is put in `caught` under the key."""

    def run(*args: Any, **kwargs: Any) -> Any:
        output = call.module(*args, **kwargs)
        caught[key] = _Output(output, version(output), macs)
        return output

    return {call.module: run}
