"""Language modelling: texts dealt out whole, cut into windows; texts as samples."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from mpsearch.errors import InputError
from mpsearch.tasks.language import Language, Stories


def texts(n=30, length=25):
    """Texts in which each token says whose it is."""
    return [np.full(length, i) for i in range(n)]


def test_no_text_is_in_two_splits_and_targets_follow():
    task = Language(texts(), 10, 8, None, window=12, batch_size=4, source="the tales")
    whose = {split: {int(i) for x, y in task.batches(split) for part in (x, y) for i in part.unique()} for split in
             ("calibration", "search", "confirm")}  # fmt: skip
    assert sum(map(len, whose.values())) == len(set().union(*whose.values())) <= 30
    assert task.describe("calibration") == "10 windows of 12 tokens from 5 of the tales"
    assert [tuple(x.shape) for x, _ in task.batches("search")] == [(4, 12), (4, 12)]
    for x, y in task.batches("search"):
        assert torch.equal(x[:, 1:], y.view(-1, 12)[:, :-1])


def test_training_cuts_the_calibration_texts_at_another_place_each_epoch():
    task = Language([np.arange(20 * i, 20 * i + 20) for i in range(20)], 10, 4, 4, window=12)
    own = {(int(a), int(b)) for x, y in task.batches("calibration") for a, b in zip(x.flatten(), y, strict=True)}
    first, again, second = (list(task.training(epoch, 4, seed=0)) for epoch in (1, 1, 2))
    for batches in (first, second):
        assert [tuple(x.shape) for x, _ in batches] == [(4, 12), (4, 12), (2, 12)]
        assert {(int(a), int(b)) for x, y in batches for a, b in zip(x.flatten(), y, strict=True)} == own
    assert all(torch.equal(a, b) for one, two in zip(first, again, strict=True) for a, b in zip(one, two, strict=True))
    starts = [{int(row[0]) for x, _ in batches for row in x} for batches in (first, second)]
    assert starts[0] != starts[1]


def test_quality_is_each_token_s_cross_entropy_and_its_text_is_known():
    task = Language(texts(), 4, 4, 4, window=12)
    logits, targets = torch.randn(48, 30), torch.randint(30, (48,))
    torch.testing.assert_close(task.quality(logits, targets), F.cross_entropy(logits, targets, reduction="none"))
    assert task.quality_kind == "perplexity"
    for split in ("calibration", "search", "confirm"):
        of_target = torch.cat([y for _, y in task.batches(split)])  # each token says whose it is
        assert len(task.clusters(split).unique()) == len(of_target.unique()) == 2
        assert len({(int(a), int(b)) for a, b in zip(task.clusters(split), of_target, strict=True)}) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n_search": 0}, "n_search is 0; every split needs at least 1 window"),
        ({"n_confirm": 100}, r"the texts have \d+ windows of 12 tokens left for the confirm split, n_confirm=100 were asked for"),
        ({"n_search": 70, "n_confirm": None}, "70 were asked"),
        ({"window": 1}, "window is 1; it must be at least 2"),
    ],
)
def test_sizes_that_do_not_fit_are_sentences(arguments, message):
    sizes = {"n_calibration": 4, "n_search": 4, "n_confirm": 4, "window": 12}
    with pytest.raises(InputError, match=message):
        Language(texts(), **(sizes | arguments))


def test_token_files_that_are_none_are_sentences(tmp_path):
    file = tmp_path / "tokens_dev.npz"
    with pytest.raises(InputError, match=r"There is no data file .*tokens_dev\.npz\. Give"):
        Stories(tmp_path)
    for arrays, message in [
        ({"x": np.arange(3)}, "has no array 'tokens', only \\['x'\\]"),
        ({"tokens": np.ones(3)}, r"float64 \[3\]; it must be"),
    ]:
        np.savez(file, **arrays)
        with pytest.raises(InputError, match=message):
            Stories(tmp_path)
