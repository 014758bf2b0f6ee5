"""How a quality is read: shares, numbers and perplexities, and which way is better."""

import math
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.stats import t
from torch import nn

from mpsearch.allocation import Allocation
from mpsearch.budget import Budget
from mpsearch.costs.size import Bytes
from mpsearch.errors import InputError
from mpsearch.evaluation import SensitivityTable
from mpsearch.metrics.kl import KL
from mpsearch.pipeline.confirm import confirm
from mpsearch.pipeline.evaluators import ConfirmEvaluator, SearchEvaluator
from mpsearch.pipeline.pick import pick
from mpsearch.pipeline.sensitivity import measure_sensitivity
from mpsearch.pipeline.solve import cheapest_within
from mpsearch.quality import Quality
from mpsearch.reporting.report import write_report
from mpsearch.runs.run import Run
from mpsearch.schemes.integer import Integer
from mpsearch.tasks.language import Language


def test_each_kind_reads_a_mean_and_a_drop():
    share, number, perplexity = Quality(), Quality("spearman", "number"), Quality("perplexity", "perplexity")
    assert (share.score(0.9), number.score(-0.2)) == (0.9, -0.2)
    assert perplexity.score(math.log(4.5)) == pytest.approx(4.5)
    assert perplexity.score(1e4) == math.inf
    assert share.drop(0.9, 0.8, 0.7, 0.85) == pytest.approx((0.1, 0.05, 0.2))
    nats = np.log([[4.0, 5, 6, 7], [4.4, 5.4, 6.8, 7.7]])
    drop, low, high = perplexity.paired_drop(nats[1], nats[0])
    half = t.ppf(0.975, 3) * (nats[1] - nats[0]).std(ddof=1) / 2
    assert (drop, low, high) == pytest.approx(tuple(np.exp((nats[1] - nats[0]).mean() + x) - 1 for x in (0, -half, half)))
    assert perplexity.drop(4.0, 5.0, 4.8, 5.2) == pytest.approx((0.25, 0.2, 0.3)), "relative"
    assert number.drop(0.8, 0.79, 0.7, 0.81) == pytest.approx((0.01, -0.01, 0.1))
    assert [q.max_drop for q in (share, number, perplexity)] == [0.005, 0.005, 0.01]
    assert [q.drop_text(0.0123) for q in (share, number, perplexity)] == ["1.23 points", "0.0123", "1.23 %"]
    assert (share.range_text(0.98, 1.02), number.range_text(0.98, 1.02)) == ("98.00 to 100.00", "0.98 to 1.02")
    assert (share.text(0.9148), number.text(0.86716), perplexity.text(4.51546)) == ("91.48", "0.8672", "4.515")
    assert (share.label, number.label) == ("accuracy %", "spearman")
    assert [q.drop_word for q in (share, number, perplexity)] == ["drop", "drop", "rise"]
    with pytest.raises(InputError, match=r"no kind 'perplexty' of quality\. Did you mean 'perplexity'"):
        Quality("p", "perplexty")


class Bigrams(nn.Module):
    """Ids [n, length] -> logits [n, length, 20] by two layers."""

    def __init__(self):
        super().__init__()
        self.embed, self.out = nn.Embedding(20, 12), nn.Linear(12, 20, bias=False)

    def forward(self, ids):
        return 3 * self.out(self.embed(ids))


@pytest.fixture(scope="module")
def language(tiny):
    """An engine of a bigram model on texts that it made up itself, windows of 8 tokens."""
    torch.manual_seed(0)
    model = Bigrams().eval()
    texts = []
    for _ in range(60):
        ids = [torch.randint(20, (1,))]
        for _ in range(30):
            ids.append(torch.multinomial(model(ids[-1][None])[0, 0].softmax(-1), 1))
        texts.append(torch.cat(ids).numpy())
    return tiny.engine(model, Language(texts, 20, 60, 80, window=8), {f"w{b}": Integer(b) for b in (2, 3, 8)})


def test_perplexity_is_that_of_all_tokens_and_its_samples_are_texts(language):
    """480 tokens in 60 windows of 16 texts, the last one cut: the samples are the 16 texts, the mean is that of the tokens."""
    score, baseline = language.score(language.space.uniform("w2")), language.score(Allocation())
    assert score.n_samples == 16
    assert score.quality == pytest.approx(math.exp(score.cross_entropy), rel=1e-6)
    assert 1 < baseline.quality < score.quality < 20
    assert baseline.quality_low == baseline.quality == baseline.quality_high, "it differs from itself by nothing"
    assert score.quality_low < score.quality < score.quality_high


def test_the_interval_is_student_s_over_the_texts_exponentiated(language):
    allocation = language.space.uniform("w2")
    score = language.score(allocation)
    targets = torch.cat([y for _, y in language.batches("search")])
    with language.applied(allocation), torch.no_grad():
        logits = torch.cat([language.task.forward(language.model, x) for x, _ in language.batches("search")])
    nats = [F.cross_entropy(x, targets, reduction="none").double().numpy() for x in (logits, language.float_logits("search"))]
    texts = [slice(max(31 * i - 1, 0), 31 * (i + 1) - 1) for i in range(16)]  # of 31 tokens, the first of which nothing predicts
    sums = np.array([(nats[0] - nats[1])[text].sum() for text in texts])
    sizes = np.array([len(nats[0][text]) for text in texts])
    assert sizes.sum() == 480
    ratio = sums.sum() / sizes.sum()
    residuals = 16 * (sums - ratio * sizes) / sizes.sum()
    half = t.ppf(0.975, 15) * math.sqrt((residuals**2).sum() / 15 / 16)
    base = nats[1].mean()
    assert (score.quality_low, score.quality_high) == pytest.approx(
        (math.exp(base + ratio - half), math.exp(base + ratio + half)), rel=1e-5
    )


def test_one_long_text_is_cut_into_few_blocks():
    task = Language([np.arange(3000) % 20] * 3, 10, 4, 100, window=8)
    assert [len(task.clusters(split).unique()) for split in ("calibration", "search", "confirm")] == [15, 15, 15]
    assert task.clusters("confirm").bincount().tolist() == [54, 53, 53] * 5
    assert len(Language([np.arange(8)] * 3, 1, 1, 1, window=2).clusters("search").unique()) == 2


def test_a_broken_model_has_a_perplexity_too(language):
    targets = language.batches("search")[0][1]
    logits = torch.full((len(targets), 20), torch.nan)
    assert math.isfinite(language.quality.score(language.task.quality(logits, targets).double().mean().item()))


@pytest.fixture(scope="module")
def run(language):
    """(evaluator, result) of a few allocations, all of them confirmed."""
    evaluate = SearchEvaluator(language)
    evaluate(Allocation(), "float")
    for i, name in enumerate(language.space.scheme_names):
        evaluate(language.space.uniform(name), "uniform", trial=i)
    table = measure_sensitivity(language, KL())
    identity = {"quality_name": "perplexity", "quality_kind": "perplexity"}
    confirm(ConfirmEvaluator(language, evaluate.log), Run(language.space, "perplexity", evaluate.log, table, {}, identity))
    return evaluate, Run(language.space, "perplexity", evaluate.log, table, {}, identity)


def test_lower_is_better_in_picks(run):
    _, result = run
    w3 = result.on("confirm")[result.space.uniform("w3")]
    assert pick(result, max_quality=w3.quality).allocation == w3.allocation
    assert pick(result, max_quality=w3.quality * 0.999).allocation == result.space.uniform("w8")
    with pytest.raises(
        InputError, match=r"No point of the front that fits has perplexity <= 1 on the confirm split; the best has \d"
    ):
        pick(result, max_quality=1)
    with pytest.raises(InputError, match=r"is perplexity, and lower is better: give pick\.max_quality, not pick\.min_quality"):
        pick(result, min_quality=0.9)
    accuracy = replace(result, identity={})
    with pytest.raises(InputError, match=r"higher is better: give pick\.min_quality, not pick\.max_quality"):
        pick(accuracy, max_quality=5)


def test_the_cheapest_within_a_rise(run):
    evaluate, result = run
    table: SensitivityTable = result.sensitivity
    baseline = result.baseline()
    w3 = result.on("search")[result.space.uniform("w3")]
    objective = Bytes().table(result.space)
    found = cheapest_within(evaluate, table, (), objective, w3.quality / baseline.quality - 1)
    assert found.quality <= w3.quality + 1e-9
    assert found.size_bytes <= w3.size_bytes
    budget = [Budget(objective, result.on("search")[result.space.uniform("w2")].size_bytes)]
    with pytest.raises(InputError, match=r"has a rise of at most 0\.10 % on the search split; the least is \d"):
        cheapest_within(evaluate, table, budget, objective, 0.001)


def test_the_page_says_perplexity(run, tmp_path):
    evaluate, result = run
    confirmed = confirm(ConfirmEvaluator(evaluate.engine, evaluate.log), result)
    worse = next(c for c in confirmed if c.scheme == "w2")
    assert worse.drop > 0
    assert worse.drop_low > 0
    page = write_report(result, tmp_path, pick(result), confirmed).read_text()
    assert "| perplexity search | perplexity confirm | rise, %, confirm (95 %) |" in page
    baseline = result.baseline("confirm")
    assert f"| {baseline.quality:.4g} |" in page
    assert "perplexity %" not in page
    assert "1.00 %" in page
    assert not re.search(r"\d\.\d+ points", page)
