"""Searched bits of weights and inputs against uniform ones at no more bit-operations; to `reports/resnet20_cifar10_wa/paired.*`.

    mpsearch search experiment=resnet20_cifar10_wa && python scripts/pair_resnet20_wa.py

For each uniform allocation the point of the run's front with the least loss on the search images among those that cost no more
bit-operations; both run packed on the 5,000 test images, which the search never saw, and are compared image by image.
The data are found in `$MPSEARCH_DATA/cifar10` (default `../shared/data/cifar10`).
"""

from __future__ import annotations

import json

import torch
from hydra import compose, initialize_config_module
from hydra.utils import instantiate
from omegaconf import OmegaConf
from pages import REPORTS, Row, machine
from torch import Tensor, nn

from mpsearch.engine.engine import QuantEngine
from mpsearch.intervals import paired_interval
from mpsearch.packed.model import packed
from mpsearch.pipeline.prepare import prepare
from mpsearch.runs.run import Run

FOLDER = REPORTS / "resnet20_cifar10_wa"
UNIFORM = ("w4a4", "w4a6", "w4a8", "w6a8", "w8a8")


def engine_of_the_run() -> QuantEngine:
    """As `mpsearch search` sets it up: other last bits of a Hessian would round some weights otherwise."""
    with initialize_config_module("mpsearch.conf", version_base="1.3"):
        settings = OmegaConf.to_container(compose("search", overrides=["experiment=resnet20_cifar10_wa"]), resolve=True)
    assert isinstance(settings, dict)

    def build(key: str) -> object:
        node: dict = settings
        for part in key.split(".", 1):
            node = node[part]
        return instantiate(node, _convert_="object")

    return prepare(settings, build).engine(settings, FOLDER)


@torch.no_grad()
def divergences(engine: QuantEngine, model: nn.Module) -> Tensor:
    """float64 `[n]`: the KL divergence (nats) from the float model, of each test image."""
    logits = torch.cat([engine.task.forward(model, inputs) for inputs, _ in engine.batches("confirm")]).double()
    wanted = engine.float_logits("confirm").double().log_softmax(-1)
    return (wanted.exp() * (wanted - logits.log_softmax(-1))).sum(-1)


def compared() -> list[Row]:
    """A row for each uniform allocation: accuracy and KL of both, and the paired differences with their 95 % intervals."""
    result = Run.load(FOLDER)
    engine = engine_of_the_run()
    engine.float_logits("confirm")  # while nothing is swapped in
    rows: list[Row] = []
    for scheme, uniform in result.uniform:
        if scheme not in UNIFORM:
            continue
        limit = uniform.costs["bit_operations"]
        ours = min((e for e in result.front if e.costs["bit_operations"] <= limit), key=lambda e: e.loss)
        scores, losses = [], []
        for allocation in (uniform.allocation, ours.allocation):
            with packed(engine, allocation) as on_kernels:
                scores.append(engine.score_of(on_kernels, "confirm"))
                losses.append(divergences(engine, on_kernels))
        theirs, mine = scores
        low, high = paired_interval(mine.qualities, theirs.qualities)
        kl_low, kl_high = paired_interval(losses[0].numpy(), losses[1].numpy())
        rows.append(
            {
                "what": "accuracy at no more bit-operations",
                "case": f"searched against uniform {scheme}",
                "value": 100 * mine.quality,
                "unit": "%",
                "rival": f"uniform {scheme}",
                "rival_value": 100 * theirs.quality,
                "difference": 100 * (mine.quality - theirs.quality),
                "low": 100 * low,
                "high": 100 * high,
                "bit_operations": ours.costs["bit_operations"],
                "rival_bit_operations": limit,
                "bytes": ours.size_bytes,
                "rival_bytes": uniform.size_bytes,
                "kl": mine.loss,
                "rival_kl": theirs.loss,
                "kl_low": kl_low,
                "kl_high": kl_high,
            }
        )
        print(f"{scheme}: {rows[-1]['difference']:.2f} ({rows[-1]['low']:.2f} to {rows[-1]['high']:.2f})", flush=True)
    return rows


def main() -> None:
    """Measure, print the table, and write it beside the run."""
    torch.set_num_threads(1)
    rows = [*compared(), machine()]
    lines = [
        "| uniform | giga bit-operations | accuracy % | KL | searched: giga bit-operations | accuracy % | KL "
        "| accuracy more by, points (95 %, paired) | KL less by (95 %, paired) |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | --- | --- |",
    ]
    for r in rows[:-1]:
        theirs = f"{r['rival']} | {r['rival_bit_operations'] / 1e9:.3f} | {r['rival_value']:.2f} | {r['rival_kl']:.4f}"
        ours = f"{r['bit_operations'] / 1e9:.3f} | {r['value']:.2f} | {r['kl']:.4f}"
        less = f"{r['rival_kl'] - r['kl']:.4f} ({r['kl_low']:.4f} to {r['kl_high']:.4f})"
        lines.append(f"| {theirs} | {ours} | {r['difference']:.2f} ({r['low']:.2f} to {r['high']:.2f}) | {less} |")
    notes = [
        "The searched point is the one with the least loss on the search images among those of the front that cost no more",
        "bit-operations (MACs x bits of the weights x bits of the input, one image); both packed, on 5,000 test images.",
        f"{rows[-1]['case']}.",
    ]
    text = "\n".join(["# Searched bits of weights and inputs, against uniform ones", "", *lines, "", *notes]) + "\n"
    print(text)
    (FOLDER / "paired.md").write_text(text)
    (FOLDER / "paired.json").write_text(json.dumps(rows, indent=1, default=float) + "\n")


if __name__ == "__main__":
    main()
