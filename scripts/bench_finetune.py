"""What quantization-aware training adds to post-training quantization."""

import copy
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from harness import PARTIAL, REPORTS, Row, benchmark, git_commit
from networks import confirmed, load, quality_row
from torch import Tensor, nn

from mpsearch.allocation import Allocation
from mpsearch.engine.engine import QuantEngine
from mpsearch.evaluation import Score
from mpsearch.intervals import paired_interval
from mpsearch.pipeline.pick import pick
from mpsearch.runs.run import Run
from mpsearch.training.finetune import Training, finetune, train_epoch
from mpsearch.training.student import Student

SCHEMES = ("w2", "w3", "w4", "w5", "w6", "w8", "w2g64", "ternary", "w4a4", "w4a4_static_mse", "w8a8")
SPLITS: dict[str, dict[str, Any]] = {
    "digits": {},
    "resnet20": {"n_calibration": 1000},
    "stories260k": {"n_calibration": 256, "n_search": 64},
}


class Trained(NamedTuple):
    """The score on the confirm split after training, the losses on the search split after each epoch, and seconds."""

    score: Score
    losses: Sequence[float]
    seconds: float


def learned_scales(engine: QuantEngine, allocation: Allocation, training: Training) -> Trained:
    """As `mpsearch finetune` trains; resumed from its checkpoint."""
    folder = PARTIAL / f"finetune-{git_commit()}"
    folder.mkdir(parents=True, exist_ok=True)
    tuned = finetune(engine, allocation, training, folder)
    return Trained(confirmed(tuned.engine, allocation), tuned.losses, tuned.seconds)


def fixed_scales(engine: QuantEngine, allocation: Allocation, training: Training) -> Trained:
    """The same but for the scales, which stay as the quantizer chose them: straight-through training of the weights."""
    student = Student(engine, allocation)
    optimizer = torch.optim.Adam([latent for name, latent in student.latents.items() if not name.endswith("scales")])
    losses, start, best = [engine.score(allocation).loss], time.perf_counter(), engine
    for epoch in range(1, training.epochs + 1):
        train_epoch(student, optimizer, training, epoch)
        trained = student.engine()
        losses.append(trained.score(allocation).loss)
        best = trained if losses[-1] == min(losses) else best
    return Trained(confirmed(best, allocation), losses, time.perf_counter() - start)


class TorchAO(nn.Module):
    """A weight's fake quantization as torch.ao has it: a scale for each channel by the moving minimum and maximum."""

    def __init__(self, bits: int) -> None:
        super().__init__()
        from torch.ao.quantization import FakeQuantize, MovingAveragePerChannelMinMaxObserver

        most = 2 ** (bits - 1)
        options = {"quant_min": -most, "quant_max": most - 1, "dtype": torch.qint8, "qscheme": torch.per_channel_symmetric}
        self.fake = FakeQuantize(MovingAveragePerChannelMinMaxObserver, ch_axis=0, **options)

    def forward(self, weight: Tensor) -> Tensor:
        """The weight as quantized."""
        return self.fake(weight)


def torch_ao(engine: QuantEngine, allocation: Allocation, training: Training) -> Trained:
    """torch.ao's recipe: from the float weights, its own scales, cross-entropy; the same optimizer, rates and batches."""
    model = copy.deepcopy(engine.model).requires_grad_(True)
    for group in engine.space.groups:
        bits = engine.space.schemes[allocation[group.name]].weight_bits
        for name in (name for layer in group.layers for name in layer.modules):
            nn.utils.parametrize.register_parametrization(model.get_submodule(name), "weight", TorchAO(bits))
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam([{"params": [p], "unit": float(p.detach().square().mean().sqrt()) or 1.0} for p in parameters])
    losses, start = [engine.score_of(model, "search").loss], time.perf_counter()
    best = copy.deepcopy(model.state_dict())
    for epoch in range(1, training.epochs + 1):
        for n, (inputs, targets) in enumerate(training.batches_of(engine.task, epoch)):
            for group in optimizer.param_groups:
                group["lr"] = group["unit"] * training.rate(epoch, n)
            optimizer.zero_grad()
            engine.task.cross_entropy(engine.task.forward(model, inputs), targets).mean().backward()
            optimizer.step()
        losses.append(engine.score_of(model, "search").loss)
        if losses[-1] == min(losses):
            best = copy.deepcopy(model.state_dict())
    model.load_state_dict(best)
    return Trained(engine.score_of(model, "confirm"), losses, time.perf_counter() - start)


def allocation_of(engine: QuantEngine, allocation: str) -> Allocation:
    """A scheme in all layers, or another one in the `first` layer or both `ends`: "w4a4 ends w8a8"; `pick`: the exhibit's."""
    if allocation == "pick":
        return pick(Run.load(REPORTS / "resnet20_cifar10"), bits=2.5).allocation
    scheme, *other = allocation.split()
    names = engine.space.names
    ends = {"ends": (names[0], names[-1]), "first": names[:1]}[other[0]] if other else ()
    return Allocation({**engine.space.uniform(scheme), **dict.fromkeys(ends, other[-1] if other else "")})


def rows_of(network: str, allocation: str, training: Training, train: Callable[..., Trained]) -> Iterator[Row]:
    """The quality before and after, and the loss after each epoch."""
    engine = load(network, SCHEMES, "kronecker_descent", **SPLITS[network])
    chosen = allocation_of(engine, allocation)
    before = confirmed(engine, chosen)
    after = train(engine, chosen, training)
    scale, sign = engine.quality.scale, engine.quality.sign
    low, high = sorted(scale * sign * end for end in paired_interval(after.score.qualities, before.qualities))
    row = quality_row(engine, chosen, after.score)
    row |= {"float": row["rival_value"], "rival": "before training", "rival_value": scale * before.quality}
    row |= {"ratio": (after.score.quality / before.quality) ** sign, "rival_kl": before.loss, "seconds": after.seconds}
    yield {"what": "quality", **row, "low": low, "high": high}
    for epoch, loss in enumerate(after.losses):
        yield {"what": "loss on the search split", "case": f"epoch {epoch}", "epoch": epoch, "value": loss, "unit": "nats"}


CHART = {"x": "epoch", "y": "value"}


@benchmark(
    "finetune",
    network=("resnet20",),
    allocation=("w2", "pick", "w4a4_static_mse", "w4a4", "w8a8 first w4a4", "w4a4_static_mse ends w8a8", "w4a4 ends w8a8"),
    epochs=(12,),
    batches=(100,),
    quick={"network": ("digits",), "allocation": ("w2 ends w8",), "epochs": (1,), "batches": (2,)},
    chart={**CHART, "line": "allocation"},
)
def finetuned(network: str, allocation: str, epochs: int, batches: int) -> Iterator[Row]:
    """Points trained as `mpsearch finetune` does: quality before and after on the confirm split, and the search loss by epoch.

    The interval is that of the paired gain. The epoch is chosen on the search split, of which no sample is trained on. `first`
    and `ends` name the layers that have another scheme: papers leave the first and the last layer out of w4a4 (PACT, Choi et
    al. 2018: float; LSQ, Esser et al. 2020: 8 bits). `w4a4_static_mse` learns the scales of its inputs, `w4a4` has one for each
    token.
    """
    yield from rows_of(network, allocation, Training(epochs=epochs, batches=batches), learned_scales)


@benchmark(
    "finetune_text",
    network=("stories260k",),
    allocation=("w3",),
    epochs=(6,),
    quick={"network": ("digits",), "epochs": (1,)},
    chart={**CHART, "line": "allocation"},
)
def finetuned_text(network: str, allocation: str, epochs: int) -> Iterator[Row]:
    """A language model trained likewise, on whole passes over its training texts."""
    yield from rows_of(network, allocation, Training(epochs=epochs, batch_size=16, learning_rate=3e-3), learned_scales)


@benchmark(
    "finetune_parts",
    recipe=("learned scales, KL", "fixed scales, KL", "learned scales, cross-entropy", "fixed scales, cross-entropy", "torch.ao"),
    network=("resnet20",),
    epochs=(4,),
    batches=(40,),
    quick={"recipe": ("fixed scales, cross-entropy", "torch.ao"), "network": ("digits",), "epochs": (1,), "batches": (2,)},
    chart={**CHART, "line": "recipe"},
)
def finetune_parts(recipe: str, network: str, epochs: int, batches: int) -> Iterator[Row]:
    """What of training does the work: learned or fixed scales, distillation (KL) or cross-entropy, for the same steps at 2 bits.

    All from the same start, but torch.ao, which begins with the float weights and min-max scales.
    """
    training = Training(epochs=epochs, batches=batches, loss="kl" if recipe.endswith("KL") else "cross_entropy")
    train = {"fixed": fixed_scales, "learned": learned_scales}.get(recipe.split()[0], torch_ao)
    yield from rows_of(network, "w2", training, train)
