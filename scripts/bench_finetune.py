"""What quantization-aware training adds to what post-training quantization gives; to `reports/bench_finetune/`.

    python scripts/bench_finetune.py [CASE ...]      runs these cases (default: all), then writes the page
    python scripts/bench_finetune.py --page          the page of what has been run before

ResNet-20 on CIFAR-10 at few bits and with 4-bit inputs, stories260K at 3 bits, each trained as `mpsearch finetune` does; and what
of it does the work: learned or fixed scales, distillation or cross-entropy, all for the same steps, beside torch.ao's fake
quantization. Data are found in `$MPSEARCH_DATA` (default `../shared/data`); the epoch is chosen on the search split, and what
came of it is measured on the confirm split. A case that was stopped goes on from its checkpoint in `build/bench_finetune/`.
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
import torch
from bench_resnet20 import DATA
from pages import REPORTS, Row, machine
from torch import Tensor, nn
from torch.ao.quantization import FakeQuantize, MovingAveragePerChannelMinMaxObserver

from mpsearch.allocation import Allocation, SearchSpace
from mpsearch.engine.calibrate import calibrate
from mpsearch.engine.engine import FLOAT, QuantEngine, load_batches
from mpsearch.evaluation import Score
from mpsearch.graph.fold import fold_batch_norms
from mpsearch.graph.trace import trace_layers
from mpsearch.graph.unsearched import other_bits
from mpsearch.intervals import paired_interval
from mpsearch.models.llama import stories260k
from mpsearch.models.resnet import resnet
from mpsearch.pipeline.pick import pick
from mpsearch.quantizers.kronecker_descent import KroneckerDescent
from mpsearch.runs.run import Run
from mpsearch.schemes.base import QuantScheme
from mpsearch.schemes.codebook import Codebook
from mpsearch.schemes.input import IntegerInput
from mpsearch.schemes.integer import Integer
from mpsearch.tasks.cifar10 import Cifar10
from mpsearch.tasks.language import Stories
from mpsearch.training.finetune import Training, finetune, train_epoch
from mpsearch.training.student import Student

FOLDER = Path(__file__).parent.parent / "build" / "bench_finetune"
SCHEMES: dict[str, QuantScheme] = {
    **{f"w{bits}": Integer(bits) for bits in (2, 3, 4, 5, 6, 8)},
    "w2g64": Integer(2, 64, symmetric=False),
    "ternary": Codebook("ternary"),
    "w4a4": Integer(4, input=IntegerInput(4, "token", symmetric=False)),
    "w4a4 static": Integer(4, input=IntegerInput(4, "static", symmetric=False, range="mse")),
    "w8a8": Integer(8, input=IntegerInput(8, "token")),
}


@functools.cache
def resnet20() -> QuantEngine:
    task = Cifar10(str(DATA), n_calibration=1000, n_search=1000, seed=0, batch_size=100)
    model = resnet(20, str(DATA / "resnet20.safetensors")).eval()
    fold_batch_norms(model, task.forward, task.batches("calibration")[0][0])
    return _engine(model, task)


@functools.cache
def llama() -> QuantEngine:
    folder = DATA.parent / "stories260k"
    task = Stories(str(folder), n_calibration=256, n_search=64, n_confirm=None, window=256, seed=0)
    return _engine(stories260k(folder / "model.safetensors").eval(), task)


def _engine(model: nn.Module, task: Any) -> QuantEngine:
    layers = trace_layers(model, task.forward, task.batches("calibration")[0][0])
    space = SearchSpace.build(layers, SCHEMES, other_bits=other_bits(model, layers))
    moments = calibrate(model, task, layers, load_batches(task, "calibration", "cpu"))
    return QuantEngine(model, task, space, dict.fromkeys(SCHEMES, KroneckerDescent()), moments)


def uniform(scheme: str, first: str | None = None, last: str | None = None) -> Callable[[QuantEngine], Allocation]:
    """One scheme in all layers but, where those are given, the first and the last."""

    def made(engine: QuantEngine) -> Allocation:
        names = engine.space.names
        return Allocation({**engine.space.uniform(scheme), names[0]: first or scheme, names[-1]: last or scheme})

    return made


def picked(engine: QuantEngine) -> Allocation:
    """The exhibit's point of at most 2.5 bits."""
    return pick(Run.load(REPORTS / "resnet20_cifar10"), bits=2.5).allocation


Found = tuple[Score, list[float], float]  # on the confirm split, losses on the search split, seconds


def ours(engine: QuantEngine, allocation: Allocation, training: Training) -> Found:
    """`mpsearch finetune`."""
    found = finetune(engine, allocation, training, FOLDER)
    return confirmed(found.engine, allocation), list(found.losses), found.seconds


def fixed_scales(engine: QuantEngine, allocation: Allocation, training: Training) -> Found:
    """The same but for the scales, which stay what the quantizer found: plain straight-through training."""
    student = Student(engine, allocation)
    optimizer = torch.optim.Adam([latent for name, latent in student.latents.items() if not name.endswith("scales")])
    losses, start, best = [engine.score(allocation).loss], time.perf_counter(), engine
    for epoch in range(1, training.epochs + 1):
        train_epoch(student, optimizer, training, epoch)
        trained = student.engine()
        losses.append(trained.score(allocation).loss)
        best = trained if losses[-1] == min(losses) else best
    return confirmed(best, allocation), losses, time.perf_counter() - start


class TorchAO(nn.Module):
    """A weight's fake quantization as torch.ao has it: a scale a channel by the moving minimum and maximum."""

    def __init__(self, bits: int) -> None:
        super().__init__()
        most = 2 ** (bits - 1)
        how = {"quant_min": -most, "quant_max": most - 1, "dtype": torch.qint8, "qscheme": torch.per_channel_symmetric}
        self.fake = FakeQuantize(MovingAveragePerChannelMinMaxObserver, ch_axis=0, **how)

    def forward(self, weight: Tensor) -> Tensor:
        """The weight as quantized."""
        return self.fake(weight)


def torch_ao(engine: QuantEngine, allocation: Allocation, training: Training) -> Found:
    """torch.ao's recipe: from the float weights, its own scales, cross-entropy; the same optimizer, rates and batches."""
    model = copy.deepcopy(engine.model).requires_grad_(True)
    for group in engine.space.groups:
        scheme: Any = engine.space.schemes[allocation[group.name]]
        for name in (name for layer in group.layers for name in layer.modules):
            nn.utils.parametrize.register_parametrization(model.get_submodule(name), "weight", TorchAO(scheme.bits))
    parameters = [p for p in model.parameters() if p.requires_grad]
    units = [float(p.detach().square().mean().sqrt()) or 1.0 for p in parameters]
    optimizer = torch.optim.Adam([{"params": [p]} for p in parameters])
    losses, start = [engine.score_of(model, "search").loss], time.perf_counter()
    best = copy.deepcopy(model.state_dict())
    for epoch in range(1, training.epochs + 1):
        for n, (inputs, targets) in enumerate(training.batches_of(engine.task, epoch)):
            for group, unit in zip(optimizer.param_groups, units, strict=True):
                group["lr"] = unit * training.rate(epoch, n)
            optimizer.zero_grad()
            engine.task.cross_entropy(engine.task.forward(model, inputs), targets).mean().backward()
            optimizer.step()
        losses.append(engine.score_of(model, "search").loss)
        if losses[-1] == min(losses):
            best = copy.deepcopy(model.state_dict())
    model.load_state_dict(best)
    return engine.score_of(model, "confirm"), losses, time.perf_counter() - start


def confirmed(engine: QuantEngine, allocation: Allocation) -> Score:
    with engine.applied(allocation) as model:
        return engine.score_of(model, "confirm")


SHORT, MIDDLE, LONG = Training(epochs=4, batches=40), Training(epochs=4, batches=100), Training(epochs=12, batches=100)
TARGETS = Training(epochs=4, batches=40, loss="cross_entropy")
Case = tuple[Callable[[], QuantEngine], str, Callable[[QuantEngine], Allocation], Training, Callable[..., Found]]
# The model, how it is called, what is trained, how, and by what.
CASES: dict[str, Case] = {
    "w2": (resnet20, "ResNet-20, w2 in all layers", uniform("w2"), Training(epochs=10, batches=100), ours),
    "pick": (resnet20, "ResNet-20, the exhibit's pick of at most 2.5 bits", picked, MIDDLE, ours),
    "w4a4": (resnet20, "ResNet-20, w4a4 in all layers, input scales learned", uniform("w4a4 static"), LONG, ours),
    "w4a4 token": (resnet20, "ResNet-20, w4a4 in all layers, an input scale a token", uniform("w4a4"), LONG, ours),
    "image": (resnet20, "ResNet-20, only the first layer w4a4, all others w8a8", uniform("w8a8", first="w4a4"), MIDDLE, ours),
    "w4a4 ends": (
        resnet20,
        "ResNet-20, w4a4 but first and last layer w8a8, input scales learned",
        uniform("w4a4 static", "w8a8", "w8a8"),
        LONG,
        ours,
    ),
    "w4a4 token ends": (
        resnet20,
        "ResNet-20, w4a4 but first and last layer w8a8, an input scale a token",
        uniform("w4a4", "w8a8", "w8a8"),
        LONG,
        ours,
    ),
    "stories": (
        llama,
        "stories260K, w3 in all layers",
        uniform("w3"),
        Training(epochs=6, batch_size=16, learning_rate=3e-3),
        ours,
    ),
    "LSQ, KL": (resnet20, "learned scales, distillation (ours)", uniform("w2"), SHORT, ours),
    "slow": (resnet20, "the same at 3e-4, not 1e-3 a step", uniform("w2"), Training(4, 3e-4, batches=40), ours),
    "STE, KL": (resnet20, "fixed scales, distillation", uniform("w2"), SHORT, fixed_scales),
    "LSQ, CE": (resnet20, "learned scales, cross-entropy", uniform("w2"), TARGETS, ours),
    "STE, CE": (resnet20, "fixed scales, cross-entropy", uniform("w2"), TARGETS, fixed_scales),
    "torch.ao": (resnet20, "torch.ao: min-max scales, cross-entropy, from the float weights", uniform("w2"), TARGETS, torch_ao),
}


def run(case: str) -> None:
    """Train, and write what came of it to `build/bench_finetune/<case>.json`."""
    make, label, allocate, training, train = CASES[case]
    engine = make()
    allocation = allocate(engine)
    quality = engine.quality
    baseline, before = engine.score(FLOAT, "confirm"), confirmed(engine, allocation)
    after, losses, seconds = train(engine, allocation, training)
    low, high = sorted(quality.sign * end for end in paired_interval(after.qualities, before.qualities))
    n = training.batches or sum(1 for _ in training.batches_of(engine.task, 1))
    row: Row = {
        "what": quality.name,
        "case": label,
        "value": quality.scale * after.quality,
        "unit": "%" if quality.scale == 100 else quality.name,
        "rival": "before training",
        "rival_value": quality.scale * before.quality,
        "ratio": (after.quality / before.quality) ** quality.sign,
        "float": quality.scale * baseline.quality,
        "gain_low": quality.scale * low,
        "gain_high": quality.scale * high,
        "kl_before": before.loss,
        "kl": after.loss,
        "bits": (engine.space.size_bits(engine.space.choice(allocation)) - engine.space.other_bits) / engine.space.numel,
        "steps": n * training.epochs,
        "batch_size": training.batch_size,
        "seconds": seconds,
        "losses": losses,
        "machine": machine()["case"],
    }
    FOLDER.mkdir(parents=True, exist_ok=True)
    (FOLDER / f"{case}.json").write_text(json.dumps(row, indent=1) + "\n")
    print(f"{label}: {row['rival_value']:.2f} -> {row['value']:.2f}", flush=True)


ABLATION = ("LSQ, KL", "slow", "STE, KL", "LSQ, CE", "STE, CE", "torch.ao")


def page() -> str:
    """The tables of what has been run, and the figure of how the losses fell."""
    found = {case: json.loads(file.read_text()) for case in CASES if (file := FOLDER / f"{case}.json").exists()}
    rows = [*found.values(), machine()]
    folder = REPORTS / "bench_finetune"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "rows.json").write_text(json.dumps(rows, indent=1) + "\n")
    head = [
        "| what | bits | float | before | after | gain (95 %) | steps | seconds |",
        "| --- | ---: | ---: | ---: | ---: | --- | ---: | ---: |",
    ]

    def line(row: dict[str, Any]) -> str:
        numbers = [f"{row[key]:.2f}" for key in ("bits", "float", "rival_value", "value")]
        gain = f"{row['gain_low']:.2f} to {row['gain_high']:.2f}"
        length = f"{row['steps']:,} x {row['batch_size']}", f"{row['seconds']:.0f} |"
        return " | ".join([f"| {row['case']}", *numbers, gain, *length])

    ours_lines = [line(row) for case, row in found.items() if case not in ABLATION]
    parts = [line(row) for case, row in found.items() if case in ABLATION]
    machines = "; ".join(dict.fromkeys(str(row["machine"]) for row in found.values()))
    text = [
        "# bench_finetune",
        "",
        "Accuracy in percent on the 5,000 staged CIFAR-10 test images, perplexity on the windows of the confirm split; the gain",
        "is paired, sample by sample (points; nats a token for perplexity). *Before* is what post-training quantization gave",
        "(Kronecker descent, biases corrected). Trained on the staged training images but the 1,000 of the search split, which",
        "chooses the epoch; bits count all scales.",
        "",
        *head,
        *ours_lines,
        "",
        "W4A4 in papers leaves the first and the last layer out: PACT (Choi et al. 2018) keeps them float, LSQ (Esser et al.",
        "2020) at 8 bits. What w4a4 in all layers loses beyond that it loses in the image, which then has 16 levels: see the row",
        "of the first layer alone.",
        "",
        "What does the work, of ResNet-20 with w2 in all layers (all from the same start, but torch.ao, which has its own):",
        "",
        *head,
        *parts,
        "",
        "![How the loss fell](losses.png)",
        "",
        f"One thread on a shared machine, seconds of wall clock. {machines}.",
    ]
    (folder / "table.md").write_text("\n".join(text) + "\n")
    figure, axes = plt.subplots(1, 2, figsize=(13, 4.6), layout="constrained")
    for case, row in found.items():
        losses = row["losses"]
        x = [row["steps"] * i / (len(losses) - 1) for i in range(len(losses))]
        axes[int(case in ABLATION)].plot(x, losses, "o-", ms=3, lw=1.2, label=row["case"])
    for ax, title in zip(axes, ("Trained points", "What does the work (w2)"), strict=True):
        ax.set(yscale="log", xlabel="steps", ylabel="KL on the search split (nats)", title=title)
        ax.grid(alpha=0.25)
        ax.legend(fontsize=8)
    figure.savefig(folder / "losses.png", dpi=110)
    return "\n".join(text)


def main() -> None:
    """Run the cases, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case", nargs="*")
    parser.add_argument("--page", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for case in () if arguments.page else arguments.case or CASES:
        run(case)
    print(page())


if __name__ == "__main__":
    main()
