"""Trains the digits network and writes the file that comes with the package: weights, split indices, accuracy.

    python scripts/train_digits.py            # about a minute on two cores

The 1,797 images are split once, class by class: 997 to train on (calibration data are drawn from these), 400 for the
search, 400 for the confirmation. The seed fixes everything on one machine; another may round differently.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from mpsearch.models.digits import SPLIT_PREFIX, DigitsNet
from mpsearch.tasks.digits import read_digits

N_HELD_OUT = 400  # images in each of search and confirm
PACKAGED = Path(__file__).parents[1] / "mpsearch" / "models" / "digits.safetensors"


def split(labels: np.ndarray, seed: int) -> dict[str, np.ndarray]:
    """Disjoint indices int32 of `train`, `search` and `confirm`; every class in about its share of each."""
    order = np.random.default_rng(seed).permutation(len(labels))
    order = order[np.argsort(labels[order], kind="stable")]  # by class, shuffled within
    held_out = np.linspace(0, len(labels) - 1, 2 * N_HELD_OUT).round().astype(int)
    train = np.setdiff1d(np.arange(len(labels)), held_out)
    parts = {"train": train, "search": held_out[::2], "confirm": held_out[1::2]}
    return {name: np.sort(order[part]).astype(np.int32) for name, part in parts.items()}


def shifted(x: Tensor, generator: torch.Generator) -> Tensor:
    """Every image of [n, 1, 8, 8] moved by -1, 0 or 1 pixel each way, the border filled with zeros."""
    rows, columns = torch.randint(0, 3, (2, len(x), 1), generator=generator)
    padded = F.pad(x, (1, 1, 1, 1))[:, 0]
    span = torch.arange(8)
    return padded[torch.arange(len(x))[:, None, None], (rows + span)[:, :, None], (columns + span)[:, None, :]][:, None]


def train(x: Tensor, y: Tensor, epochs: int, seed: int) -> nn.Module:
    """The network trained on x float32 [n, 1, 8, 8], y int64 [n]."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model, batch_size = DigitsNet(), 64
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=0.02)
    n_steps = epochs * (len(x) // batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=4e-3, total_steps=n_steps)
    for epoch in range(epochs):
        order = torch.randperm(len(x), generator=generator)
        for start in range(0, len(x) - batch_size + 1, batch_size):
            batch = order[start : start + batch_size]
            loss = F.cross_entropy(model(shifted(x[batch], generator)), y[batch], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        if epoch % 20 == 19:
            print(f"epoch {epoch + 1} of {epochs}: loss {loss.item():.4f}", flush=True)
    return model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=PACKAGED)
    args = parser.parse_args()

    pixels, labels = read_digits()
    indices = split(labels, args.seed)
    x, y = torch.from_numpy(pixels), torch.from_numpy(labels)
    model = train(x[indices["train"]], y[indices["train"]], args.epochs, args.seed)

    metadata = {"seed": str(args.seed), "epochs": str(args.epochs), "made_by": "scripts/train_digits.py"}
    for name, index in indices.items():
        with torch.no_grad():
            accuracy = (model(x[index]).argmax(1) == y[index]).double().mean().item()
        metadata[f"{name}_accuracy"] = f"{accuracy:.6f}"
        print(f"{name}: {accuracy:.2%} of {len(index)} images")
    tensors = {name: tensor for name, tensor in model.state_dict().items() if not name.endswith("num_batches_tracked")}
    tensors |= {f"{SPLIT_PREFIX}{name}": torch.from_numpy(index) for name, index in indices.items()}
    save_file(tensors, args.out, metadata)
    args.out.chmod(0o644)  # safetensors makes it readable by its owner only, and an installed package is read by all
    print(args.out)


if __name__ == "__main__":
    main()
