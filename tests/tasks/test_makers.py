"""Tasks from data loaders, data sets, tensors and arrays; with labels and without; metrics per sample and over a split."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from mpsearch.engine.scoring import Scorer
from mpsearch.errors import InputError
from mpsearch.intervals import bootstrap_values, paired_interval
from mpsearch.quality import Quality
from mpsearch.tasks.base import SPLITS, Task
from mpsearch.tasks.makers import classification, fidelity_task

X, Y = torch.randn(30, 4, generator=torch.Generator().manual_seed(0)), torch.arange(30) % 3


def parts(form):
    """The three splits, ten samples each, in one of the forms that are accepted."""
    return {split: form(X[10 * i : 10 * i + 10], Y[10 * i : 10 * i + 10]) for i, split in enumerate(SPLITS)}


LABELLED = {
    "tensors": lambda x, y: (x, y),
    "arrays": lambda x, y: [x.double().numpy(), y.numpy()],
    "a data set": TensorDataset,
    "a data loader": lambda x, y: DataLoader(TensorDataset(x, y), batch_size=4),
    "a list of batches": lambda x, y: [(x[:4], y[:4]), (x[4:8], y[4:8]), (x[8:], y[8:])],
    "two batches": lambda x, y: [(x[:4], y[:4]), (x[4:], y[4:])],
    "a generator": lambda x, y: ((x[i : i + 4], y[i : i + 4]) for i in (0, 4, 8)),
}


@pytest.mark.parametrize("form", LABELLED.values(), ids=LABELLED)
def test_every_form_of_data_is_the_same_task(form):
    task = classification(**parts(form), batch_size=4)
    assert task.fingerprint() == classification(**parts(LABELLED["tensors"])).fingerprint()
    assert task.batches("search") == task.batches("search")
    assert task.describe("confirm") == "10 samples"
    assert torch.equal(torch.cat([y for _, y in task.batches("search")]), Y[10:20])
    assert (task.quality_name, task.quality_kind) == ("accuracy", "share")


def test_mappings_are_keyword_arguments_and_tuples_positional_ones():
    class Net(nn.Module):
        def forward(self, ids, mask):
            return ids * mask

    forms = {
        "mapping": lambda x, y: [{"ids": x, "mask": x, "labels": y}],
        "pair": lambda x, y: [({"ids": x, "mask": x}, y)],
        "tuple": lambda x, y: ((x, x), y),
    }
    for form in forms.values():
        task = classification(**parts(form))
        ((inputs, targets),) = task.batches("search")
        assert torch.equal(task.forward(Net(), inputs), X[10:20] ** 2)
        assert torch.equal(targets, Y[10:20])


@pytest.mark.parametrize(
    ("form", "message"),
    [
        (lambda x, y: DataLoader(TensorDataset(x, y), shuffle=True), "calibration data come from a DataLoader that shuffles"),
        (lambda x, y: 3, "calibration data must be a pair .* a DataLoader or an iterable of batches; got a int"),
        (lambda x, y: [(x, y, y)], "must be a pair .*got 3 parts"),
        (lambda x, y: None, "got a NoneType"),
        (lambda x, y: (x, y[:9]), "calibration data have 10 inputs and 9 targets"),
    ],
)
def test_other_data_are_one_sentence(form, message):
    with pytest.raises(InputError, match=message):
        classification(**parts(form))
    with pytest.raises(InputError, match="batch_size is 0"):
        classification(**parts(LABELLED["tensors"]), batch_size=0)


def test_a_task_without_batches_says_what_to_return():
    class Mine(Task):
        pass

    class Forgets(Task):
        def batches(self, split):
            pass

    with pytest.raises(InputError, match=r"Mine has no method batches\(split\). Define it to return the batches"):
        Mine().loaded("search")
    with pytest.raises(InputError, match=r"batches\('search'\) must be a sequence of pairs .* got None"):
        Forgets().loaded("search")


class F1:
    """Duck-typed like torchmetrics: of class 1."""

    higher_is_better = True

    def reset(self):
        self.counts = torch.zeros(3)

    def update(self, outputs, targets):
        predicted, true = outputs.argmax(-1) == 1, targets == 1
        self.counts += torch.stack([(predicted & true).sum(), predicted.sum(), true.sum()])

    def compute(self):
        return 2 * self.counts[0] / (self.counts[1] + self.counts[2]).clamp_min(1)


def test_a_metric_of_each_sample():
    def margin(outputs, targets):
        return outputs.gather(1, targets[:, None])[:, 0]

    task = classification(**parts(LABELLED["tensors"]), metric=margin)
    assert (task.quality_name, task.quality_kind) == ("margin", "number")
    outputs = torch.randn(10, 3)
    score = scored(task, outputs, outputs + 1)
    assert score.quality == pytest.approx(margin(outputs, Y[10:20]).mean().item(), abs=1e-6)
    assert score.n_samples == 10


def scored(task, outputs, reference):
    """The score on the search split of outputs against those of the float model."""
    scorer = Scorer(nn.Identity(), task)
    targets = torch.cat([y for _, y in scorer.batches("search")])
    scorer.divergence = task.chosen_divergence(nn.Identity(), [(reference, targets)])[0]
    scorer.float_outputs("search", lambda: [reference])
    rows = [len(y) for _, y in scorer.batches("search")]
    return scorer.score(None if outputs is None else outputs.split(rows), "search")


def test_a_metric_of_the_whole_split_has_a_paired_bootstrap_interval():
    task = classification(**parts(LABELLED["tensors"]), metric=F1())
    assert (task.quality_name, task.quality_kind) == ("f1", "number")
    good = torch.nn.functional.one_hot(Y[10:20], 3).float()
    worse = good.clone()
    worse[:3] = good[:3].roll(1, 1)
    score = scored(task, worse, good)
    metric = F1()
    metric.reset()
    metric.update(worse, Y[10:20])
    assert score.quality == pytest.approx(float(metric.compute()))
    assert score.quality_low < score.quality < score.quality_high
    assert score.n_samples == 10
    equal = scored(task, good.clone(), good)
    assert equal.quality == pytest.approx(1)
    assert task.quality_kind == "number"
    errors = classification(**parts(LABELLED["tensors"]), metric=type("Error", (F1,), {"higher_is_better": False})())
    assert errors.quality_kind == "error"


def test_a_metric_that_returns_something_else_is_named():
    for value, got in (({"f1": 1.0}, "a dict"), (torch.zeros(3, 3), r"the shape \(3, 3\)"), (None, "a NoneType")):
        task = classification(**parts(LABELLED["tensors"]), metric=lambda outputs, targets, value=value: value)
        with pytest.raises(InputError, match=f"one number per sample.* got {got}"):
            task.quality(torch.zeros(10, 3), Y[:10])


def test_the_bootstrap_has_the_standard_error_of_a_mean_and_covers():
    """Of a mean its interval is Student's; the coverage of a correlation is at least 93 %."""
    random = np.random.default_rng(0)
    x = random.normal(size=200)
    values = bootstrap_values(lambda index: float(x[index].mean()), np.arange(200))
    assert values.mean() == pytest.approx(x.mean(), abs=1e-12)
    low, high = paired_interval(values, np.zeros_like(values))
    exact = paired_interval(x + 5, np.full(200, 5.0))
    assert (high - low) == pytest.approx(exact[1] - exact[0], rel=0.12)
    hits, n_runs = 0, 200
    for _ in range(n_runs):
        pairs = random.multivariate_normal([0, 0], [[1, 0.5], [0.5, 1]], 40)
        values = bootstrap_values(lambda index, pairs=pairs: float(np.corrcoef(pairs[index].T)[0, 1]), np.arange(40))
        low, high = paired_interval(values, np.zeros_like(values))
        hits += low <= 0.5 <= high
    assert hits / n_runs > 0.93 - 2 * (0.93 * 0.07 / n_runs) ** 0.5


def test_clusters_are_resampled_whole():
    seen = []
    bootstrap_values(lambda index: float(len(seen.append(index) or index)), [0, 0, 0, 1, 2, 2])
    for index in seen[:-1]:
        counts = np.bincount(index, minlength=6)
        assert counts[0] == counts[1] == counts[2]
        assert counts[4] == counts[5]
    with pytest.raises(InputError, match="one independent sample"):
        bootstrap_values(lambda index: 0.0, [3, 3])


UNLABELLED = {
    "a tensor": lambda x, y: x,
    "an array": lambda x, y: x.numpy(),
    "a data loader": lambda x, y: DataLoader(TensorDataset(x), batch_size=4),
    "a list": lambda x, y: [x[:4], x[4:]],
    "mappings": lambda x, y: [{"input": x}],
}


@pytest.mark.parametrize("form", UNLABELLED.values(), ids=UNLABELLED)
def test_without_labels_the_quality_is_the_agreement_with_the_float_model(form):
    task = fidelity_task(**parts(form))
    model = nn.Linear(4, 3)
    reference = torch.cat([task.forward(model, x) for x, _ in task.batches("search")]).detach()
    assert torch.allclose(reference, model(X[10:20]))
    outputs = reference.clone()
    outputs[0] = -outputs[0]
    score = scored(task, outputs, reference)
    assert (task.quality_name, score.quality, score.n_samples) == ("agreement", pytest.approx(0.9), 10)
    same = scored(task, None, reference)
    assert same.quality == 1
    assert same.cross_entropy == pytest.approx(torch.distributions.Categorical(logits=reference).entropy().mean().item())


def test_embeddings_agree_by_their_cosine():
    task = fidelity_task(**parts(UNLABELLED["a tensor"]), divergence="relative_mse")
    assert Quality(task.quality_name, task.quality_kind) == Quality("cosine_similarity", "number")
    score = scored(task, -X[10:20], X[10:20])
    assert score.quality == pytest.approx(-1)
    assert score.cross_entropy == pytest.approx(float((4 * X[10:20] ** 2).mean()), rel=1e-5)
    own = fidelity_task(**parts(UNLABELLED["a tensor"]), metric=lambda a, b: (a - b).abs().mean(-1), quality_kind="error")
    assert scored(own, X[10:20] + 1, X[10:20]).quality == pytest.approx(1, abs=1e-6)
    with pytest.raises(InputError, match=r"no cross-entropy to train on. Train with loss=divergence"):
        task.cross_entropy(torch.zeros(2, 3), torch.zeros(2, dtype=torch.long))


def test_tokens_are_compared_one_by_one_and_counted_by_sample():
    ids = torch.randint(0, 7, (12, 5), generator=torch.Generator().manual_seed(1))
    model = nn.Embedding(7, 7)
    data = {"calibration": ids[:4], "search": [ids[4:6, :3], ids[6:8]], "confirm": ids[8:]}
    task = fidelity_task(**data, per_token=True)
    outputs = torch.cat([task.forward(model, x) for x, _ in task.batches("search")]).detach()
    assert outputs.shape == (16, 7)
    assert task.clusters("search").tolist() == [0] * 3 + [1] * 3 + [2] * 5 + [3] * 5
    score = scored(task, outputs.roll(1, 1), outputs)
    assert (score.quality, score.n_samples) == (0, 4)
    labelled = classification(
        **{split: [(x, x) for x in ([value] if torch.is_tensor(value) else value)] for split, value in data.items()},
        per_token=True,
    )
    assert [len(y) for _, y in labelled.batches("search")] == [6, 10]
    found = list(labelled.training(0, 3, seed=1))
    assert sorted(len(x) for x, _ in found) == [1, 3]
    assert all(torch.equal(x.flatten(), y) for x, y in found)
