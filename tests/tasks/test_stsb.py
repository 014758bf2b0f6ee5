"""The STS benchmark: Spearman's rho in parts, and batches of pairs."""

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from torch import nn

from mpsearch.errors import InputError
from mpsearch.tasks.stsb import TEMPERATURE, STSBenchmark, rho_parts


def save(folder: Path, name: str, n: int, seed: int = 0) -> None:
    rng = np.random.default_rng(seed)
    ids = [np.where(np.arange(9) < rng.integers(2, 10, (n, 1)), rng.integers(1, 30, (n, 9)), 0).astype(np.uint16) for _ in "ab"]
    np.savez(folder / f"{name}.npz", a=ids[0], b=ids[1], gold=rng.integers(0, 26, n).astype(np.float32) / 5)


@pytest.fixture
def folder(tmp_path):
    save(tmp_path, "sts_train", 60)
    save(tmp_path, "sts_dev", 32, seed=1)
    return tmp_path


@pytest.mark.parametrize("ties", [False, True])
def test_the_mean_of_the_parts_is_rho_and_their_spread_its_error(ties):
    rng = np.random.default_rng(0)
    x = rng.normal(size=400)
    y = x + rng.normal(size=400)
    y = np.round(y * 3) if ties else y
    parts = rho_parts(x, y)
    assert parts.mean() == pytest.approx(spearmanr(x, y)[0], abs=1e-12)
    draws = [spearmanr(x[i], y[i])[0] for i in rng.integers(0, 400, (1500, 400))]
    assert parts.std() / 20 == pytest.approx(np.std(draws), rel=0.08)
    u, v = (np.argsort(np.argsort(values)) / 400 - 0.5 for values in (x, y))
    assert (12 * u * v).std() / 20 != pytest.approx(np.std(draws), rel=0.2), "products of ranks spread differently"


def test_values_that_are_alike_or_none_have_no_rho():
    assert rho_parts(np.ones(5), np.arange(5)).tolist() == [0.0] * 5
    assert np.isfinite(rho_parts(np.full(5, np.nan), np.arange(5))).all()


class Bag(nn.Module):
    """Ids -> the mean of their embeddings, of length 1."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(30, 8)

    def forward(self, ids):
        real = (ids != 0)[:, :, None]
        return nn.functional.normalize((self.embed(ids) * real).sum(1), dim=-1)


def test_pairs_are_scored_by_their_own_similarity(folder, tiny):
    task = STSBenchmark(folder, 20, 20, None, batch_size=10)
    assert task.describe("confirm") == "30 samples, STS-B dev"
    model = Bag()
    with torch.no_grad():
        logits = torch.cat([task.forward(model, x) for x, _ in task.batches("confirm")])
        cosines = torch.cat([(model(a) * model(b)).sum(1) for (a, b), _ in task.batches("confirm")])
    gold = torch.cat([y for _, y in task.batches("confirm")])
    assert logits.shape == (30, 10)
    torch.testing.assert_close(torch.cat([part.diagonal() for part in logits.split(10)]) * TEMPERATURE, cosines)
    parts = task.quality(logits, gold)
    assert parts.mean().item() == pytest.approx(spearmanr(cosines, gold)[0], abs=1e-6)
    assert task.cross_entropy(logits, gold).shape == (30,)
    lengths = [((a != 0).sum(1) + (b != 0).sum(1)) for (a, b), _ in task.batches("confirm")]
    assert torch.cat(lengths).diff().min() >= 0

    engine = tiny.engine(model, task)
    score = engine.score(engine.space.uniform("w2"))
    assert score.quality_low <= score.quality <= score.quality_high
    assert score.n_samples == 20


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n_search": 15}, "n_search is 15; it must be a multiple of batch_size, 10"),
        ({"n_search": 50}, "holds 60 samples, 70 were asked for"),
        ({"n_confirm": 40}, r"sts_dev\.npz holds 32 samples, 40 were asked for"),
    ],
)
def test_sizes_that_do_not_fit_are_sentences(folder, arguments, message):
    with pytest.raises(InputError, match=message):
        STSBenchmark(folder, **({"n_calibration": 20, "n_search": 20, "batch_size": 10} | arguments))


def test_files_that_are_none_are_sentences(folder):
    with pytest.raises(InputError, match=r"There is no data file .*sts_train\.npz\. Give .* arrays a and b and gold"):
        STSBenchmark(folder / "nowhere")
    np.savez(folder / "sts_dev.npz", a=np.zeros((3, 4), int), b=np.ones((3, 4), int), gold=np.ones(3))
    with pytest.raises(InputError, match=r"sts_dev\.npz holds a int64 \[3, 4\], .* none of them empty"):
        STSBenchmark(folder)
