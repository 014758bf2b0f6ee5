"""The contract of `quantizers/base.py`, which every quantizer fulfils, and where quantizers differ."""

import itertools
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf

from mpsearch.errors import InputError
from mpsearch.quantizers.adaround import AdaRound
from mpsearch.quantizers.base import InputMoments, Quantizer, clip_ratios
from mpsearch.quantizers.clip_search import ClipSearch
from mpsearch.quantizers.coordinate_descent import CoordinateDescent
from mpsearch.quantizers.entropy import Entropy
from mpsearch.quantizers.gptq import GPTQ
from mpsearch.quantizers.hqq import HQQ
from mpsearch.quantizers.kronecker_descent import KroneckerDescent
from mpsearch.quantizers.percentile import Percentile
from mpsearch.quantizers.round_to_nearest import RoundToNearest
from mpsearch.schemes.floating import Float
from mpsearch.schemes.integer import Integer
from mpsearch.schemes.k_quant import KQuant

CONF = Path(__file__).parents[2] / "conf" / "quantizer"
NEAREST = RoundToNearest()
SCHEMES = [
    Integer(bits, group_size, symmetric, scale_dtype)
    for bits in range(1, 9)
    for group_size in ("tensor", "channel", 16, 5)
    for symmetric in (True, False)
    for scale_dtype in ("float16", "float32")
]


@pytest.fixture(params=sorted(CONF.glob("*.yaml")), ids=lambda path: path.stem)
def quantizer(request):
    found = instantiate(OmegaConf.load(request.param), _convert_="object")
    assert isinstance(found, Quantizer)
    return found


def weights(shape=(8, 3, 3, 3), seed=0):
    """Heavier tails than a bell curve, as trained weights have."""
    torch.manual_seed(seed)
    return torch.randn(shape) * torch.rand(shape).add(0.2).reciprocal()


def moments(columns, k=1, seed=1):
    torch.manual_seed(seed)
    return InputMoments(torch.randn(k, columns), torch.rand(k, columns) ** 4 + 1e-3)


def squared(quantized, weight, importance=None):
    """The (weighted) squared error; `importance` [k, columns] holds for rows that divide by k."""
    error = (quantized.dequantize() - weight).flatten(1).double().square()
    if importance is not None:
        error = error * importance.double().repeat_interleave(len(error) // len(importance), 0)
    return error.sum().item()


def test_error_falls_with_bits(quantizer):
    weight = weights()
    for group_size in ("tensor", "channel", 9):
        errors = [squared(quantizer.quantize(weight, Integer(bits, group_size)), weight) for bits in range(2, 9)]
        assert all(b < a for a, b in itertools.pairwise(errors)), errors
        assert errors[-1] < 1e-3 * weight.square().sum()


def test_shapes_and_dtypes(quantizer):
    weight = weights((6, 2, 3))
    for scheme in SCHEMES:
        quantized = quantizer.quantize(weight, scheme, moments(6, k=2))
        rows, columns, size = scheme.grid((6, 2, 3))
        groups = (rows, -(-columns // size))
        assert quantized.scheme == scheme
        assert tuple(quantized.tensors) == ("codes", "scales", *(() if scheme.symmetric else ("zero_points",)))
        assert tuple(quantized.tensors["scales"].shape) == groups
        assert str(quantized.tensors["scales"].dtype) == f"torch.{scheme.scale_dtype}"
        assert 8 * quantized.nbytes == scheme.storage_bits((6, 2, 3))
        assert torch.isfinite(quantized.dequantize()).all()


def test_weight_is_left_alone_and_the_result_is_the_same_again(quantizer):
    weight = weights()
    before = weight.clone()
    one, other = (quantizer.quantize(weight, Integer(3, 16, symmetric=False), moments(27)) for _ in range(2))
    assert torch.equal(weight, before)
    for name, tensor in one.tensors.items():
        assert torch.equal(tensor, other.tensors[name])


def test_one_bit_keeps_the_sign(quantizer):
    weight = weights((4, 40))
    dense = quantizer.quantize(weight, Integer(1)).dequantize()
    assert torch.equal(dense.sign(), weight.sign())
    assert all(row.abs().unique().numel() == 1 for row in dense)


def test_zeros_stay_zeros(quantizer):
    for scheme in (Integer(1), Integer(2), Integer(8, "tensor"), Integer(4, 5, symmetric=False)):
        assert torch.equal(quantizer.quantize(torch.zeros(3, 7), scheme).dequantize(), torch.zeros(3, 7))


def test_floats_are_rounded_by_all_alike(quantizer):
    weight = weights()
    assert torch.equal(quantizer.quantize(weight, Float("float16")).dequantize(), weight.half().float())


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_weights_that_are_not_finite_are_counted(quantizer, bad):
    weight = weights((4, 9))
    weight[1, 3] = bad
    for scheme in (Integer(4), Integer(4, "tensor", symmetric=False), Integer(2, 4)):
        with pytest.raises(InputError, match="1 of 36 weights are NaN or infinite"):
            quantizer.quantize(weight, scheme)


def test_scales_beyond_float16_are_said(quantizer):
    with pytest.raises(InputError, match="a scale exceeds the largest float16"):
        quantizer.quantize(torch.full((2, 4), 1e6), Integer(2))
    large = quantizer.quantize(torch.full((2, 4), 1e6), Integer(2, scale_dtype="float32")).dequantize()
    assert torch.allclose(large, torch.full((2, 4), 1e6))


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_clip_search_is_never_worse_than_nearest(scheme):
    """The ratio 1 is among the candidates, so the searched (weighted) error of no group can be larger."""
    for weight, k in ((weights(), 1), (weights((8, 2, 3, 3)), 4), (weights((5, 33)), 1)):
        columns = weight[0].numel()
        given = moments(columns, k)
        for importance in (None, given):
            clipped = ClipSearch().quantize(weight, scheme, importance)
            nearest = NEAREST.quantize(weight, scheme)
            weighting = None if importance is None else importance.second_moment
            assert squared(clipped, weight, weighting) <= squared(nearest, weight, weighting) * (1 + 1e-6)


def test_clip_search_is_much_better_at_few_bits():
    weight = weights((64, 200))
    for bits, factor in ((2, 2.0), (3, 1.5), (4, 1.2)):
        assert factor * squared(ClipSearch().quantize(weight, Integer(bits)), weight) < squared(
            NEAREST.quantize(weight, Integer(bits)), weight
        )


def test_clip_search_gives_the_extra_level_to_the_side_that_needs_it():
    """Two bits stand for -2 -1 0 1: exact for (-1, 2), but only with a negative scale."""
    weight = torch.tensor([[2.0, 1.0, 0.0, -1.0, 2.0, 2.0]])
    quantized = ClipSearch(n_candidates=181, min_ratio=0.1).quantize(weight, Integer(2, scale_dtype="float32"))
    assert quantized.tensors["scales"].item() < 0
    assert squared(quantized, weight) < 1e-6 < squared(NEAREST.quantize(weight, Integer(2)), weight)


def outliers():
    """400 weights a channel of standard deviation 1, one of them replaced by one of 50 sigma, in a column of its own."""
    torch.manual_seed(3)
    weight = torch.randn(16, 400)
    columns = torch.randperm(400)[:16]
    weight[torch.arange(16), columns] = 50.0
    inliers = torch.ones(16, 400, dtype=torch.bool)
    inliers[torch.arange(16), columns] = False
    return weight, inliers, columns


def test_one_outlier_ruins_round_to_nearest_but_not_a_clipped_range():
    """At 4 bits a step of 50 / 7 rounds nearly every weight to 0; where the range ends near 3 sigma the noise is 1/50 of that."""
    weight, inliers, columns = outliers()
    importance = torch.ones(1, 400)
    importance[0, columns] = 1e-6  # inputs that are hardly ever on: what the outlier itself loses does not count
    weighted = InputMoments(torch.zeros(1, 400), importance)

    def noise(quantizer, given=None):
        error = quantizer.quantize(weight, Integer(4), given).dequantize() - weight
        return (error[inliers].square().sum() / weight[inliers].square().sum()).item()

    nearest = noise(NEAREST)
    assert 0.8 < nearest < 1.2
    assert noise(Percentile(99.5)) < nearest / 50
    assert noise(ClipSearch(min_ratio=0.02), weighted) < nearest / 50


def test_clip_search_clips_outliers_where_that_pays():
    """Without importance the outlier counts as well: one of 6 sigma among 400 is clipped, and the sum of all errors falls."""
    weight, inliers, _ = outliers()
    weight[~inliers] = 6.0
    error = {}
    for quantizer in (NEAREST, ClipSearch()):
        change = quantizer.quantize(weight, Integer(3)).dequantize() - weight
        error[quantizer] = change[inliers].square().sum().item(), change.square().sum().item()
    assert error[ClipSearch()][0] < error[NEAREST][0] / 2.5
    assert error[ClipSearch()][1] < error[NEAREST][1] / 2


def test_importance_changes_the_choice():
    weight = weights((4, 64))
    left, right = torch.full((1, 64), 1e-4), torch.full((1, 64), 1e-4)
    left[:, :32] = 1
    right[:, 32:] = 1
    none = torch.zeros(1, 64)
    for_left, for_right = (ClipSearch().quantize(weight, Integer(3), InputMoments(none, x)) for x in (left, right))
    assert not torch.equal(for_left.tensors["scales"], for_right.tensors["scales"])
    assert squared(for_left, weight, left) < squared(for_right, weight, left)
    assert squared(for_right, weight, right) < squared(for_left, weight, right)
    for other in (NEAREST, Percentile()):
        one, two = (other.quantize(weight, Integer(3), InputMoments(none, x)).tensors["scales"] for x in (left, right))
        assert torch.equal(one, two)


def test_importance_of_a_grouped_convolution_belongs_to_its_rows():
    """Two groups of two rows, whatever the granularity: the second moments of one do not reach the rows of the other."""
    weight = weights((4, 3, 3))
    one, other = moments(9, k=2, seed=1), moments(9, k=2, seed=1)
    other.second_moment[1] = other.second_moment[1].flip(0)
    for group_size in ("channel", 4):
        a, b = (ClipSearch().quantize(weight, Integer(2, group_size), m).dequantize() for m in (one, other))
        assert torch.equal(a[:2], b[:2])
        assert not torch.equal(a[2:], b[2:])
    whole = ClipSearch().quantize(weight, Integer(2, "tensor"), one)
    alone = ClipSearch().quantize(
        weight.reshape(1, 36),
        Integer(2),
        InputMoments(torch.zeros(1, 36), one.second_moment.repeat_interleave(2, 0).reshape(1, 36)),
    )
    assert torch.equal(whole.dequantize().flatten(), alone.dequantize().flatten())


def test_percentile_is_that_of_numpy():
    weight = weights((3, 101))
    low, high = torch.quantile(weight, 0.05, dim=1, keepdim=True), torch.quantile(weight, 0.95, dim=1, keepdim=True)
    most = torch.quantile(weight.abs(), 0.95, dim=1, keepdim=True)
    expected = {
        False: NEAREST.quantize(weight.clamp(low, high), Integer(4, symmetric=False)),
        True: NEAREST.quantize(weight.clamp(-most, most), Integer(4)),
    }
    for symmetric, nearest in expected.items():
        quantized = Percentile(95.0).quantize(weight, Integer(4, symmetric=symmetric))
        assert torch.allclose(quantized.dequantize(), nearest.dequantize(), atol=1e-3)
    assert torch.equal(
        Percentile(100.0).quantize(weight, Integer(4, 7)).dequantize(), NEAREST.quantize(weight, Integer(4, 7)).dequantize()
    )


def test_entropy_clips_a_long_tail_and_nothing_else():
    """A bell curve with a weight of 30 sigma: the range ends where the bell does. Evenly spread weights keep theirs."""
    torch.manual_seed(0)
    weight = torch.randn(1, 20_000)
    weight[0, 7] = 30.0
    scheme = Integer(4, "tensor", scale_dtype="float32")
    largest = 7 * Entropy().quantize(weight, scheme).tensors["scales"].item()
    assert 2.5 < largest < 6.0
    even = torch.linspace(-1, 1, 4096)[None]
    assert Entropy().quantize(even, scheme).tensors["scales"].item() > 0.9 / 7
    assert squared(Entropy().quantize(weight, scheme), weight) < 2 * squared(ClipSearch().quantize(weight, scheme), weight)


def test_entropy_is_that_of_the_definition():
    """Four bins, two levels, worked by hand: P = [5, 3, 1, 7] / 16 with nothing cut off."""
    counts = torch.tensor([5.0, 3.0, 1.0, 7.0], dtype=torch.float64)
    p, q = counts / 16, torch.tensor([4.0, 4.0, 4.0, 4.0]).double() / 16
    expected = (p * (p / q).log()).sum().item()
    found = Entropy()._divergences(counts, Integer(1, scale_dtype="float32"), torch.ones(1))
    assert found.item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("group_size", ["tensor", "channel", 9])
@pytest.mark.parametrize("symmetric", [True, False])
def test_hqq_lets_a_few_err_much_so_that_many_err_little(group_size, symmetric):
    """Its |r|^(3/4) is below that of the grid that it starts from, and the median error too, which the outliers set there."""
    weight = weights((32, 6, 3, 3))
    scheme = Integer(3, group_size, symmetric)
    fitted, nearest = (q.quantize(weight, scheme).dequantize().sub(weight).abs() for q in (HQQ(), NEAREST))
    assert fitted.pow(0.75).sum() < nearest.pow(0.75).sum()
    assert fitted.median() < nearest.median()


@pytest.mark.parametrize("path", sorted((CONF.parent / "scheme").glob("*.yaml")), ids=lambda path: path.stem)
@pytest.mark.thin(6)
def test_every_scheme_of_the_registry_is_taken(quantizer, path):
    """With and without a Hessian: one default quantizer serves a mixed list of schemes."""
    scheme = instantiate(OmegaConf.load(path), _convert_="object")
    shape = (4, 256) if isinstance(scheme, KQuant) else (4, 3, 2, 2)
    weight, (given, _) = weights(shape), correlated(math.prod(shape[1:]))
    for moments in (given, None):
        quantized = quantizer.quantize(weight, scheme, moments)
        assert 8 * quantized.nbytes == scheme.storage_bits(shape)
        assert torch.isfinite(quantized.dequantize()).all()


def test_ratios():
    assert torch.allclose(clip_ratios(4, 0.1, both_signs=False), torch.tensor([1.0, 0.7, 0.4, 0.1]))
    assert torch.allclose(clip_ratios(2, 0.5, both_signs=True), torch.tensor([1.0, -1.0, 0.5, -0.5]))


@pytest.mark.parametrize(
    ("build", "sentence"),
    [
        (lambda: ClipSearch(n_candidates=1), "n_candidates >= 2 and 0 < min_ratio < 1; got 1 and 0.1"),
        (lambda: ClipSearch(min_ratio=0), "got 80 and 0"),
        (lambda: ClipSearch(min_ratio=1.0), "got 80 and 1.0"),
        (lambda: Entropy(n_bins=1), "got 80, 0.1 and 1"),
        (lambda: GPTQ(damping=0), "must be above 0 and at most 1; got 0"),
        (lambda: CoordinateDescent(n_sweeps=0), "n_sweeps must be an integer of at least 1; got 0"),
        (lambda: AdaRound(warmup=1), "0 <= warmup < 1 and pull > 0; got 300, 0.1, 1 and 100"),
        (lambda: KroneckerDescent(n_passes=0), "n_passes must be 1 or more and output_damping above 0; got 0 and 0.1"),
        (lambda: HQQ(n_steps=0), "n_steps >= 1, beta > 0 and growth >= 1; got 0, 50 and 1.01"),
        (lambda: HQQ(beta=-1), "got 20, -1 and 1.01"),
        (lambda: Percentile(50), "above 50 and at most 100; got 50"),
        (lambda: Percentile(100.1), "above 50 and at most 100; got 100.1"),
    ],
)
def test_settings_are_checked(build, sentence):
    with pytest.raises(InputError, match=sentence):
        build()


def correlated(columns, k=1, seed=2, n=400):
    """Moments with a Hessian of inputs that go together, as neighbouring pixels do, and `[k, n, columns]` such inputs."""
    torch.manual_seed(seed)
    x = torch.randn(k, n, columns).cumsum(-1) * 0.3 + 0.5
    hessian = x.transpose(1, 2) @ x / n
    return InputMoments(x.mean(1), x.square().mean(1), n, hessian=hessian), x


def output_error(quantized, weight, x):
    """The squared error of the outputs on the inputs `[k, n, columns]`."""
    change = (quantized.dequantize() - weight).reshape(len(x), -1, x.shape[-1])
    return (x @ change.transpose(1, 2)).square().sum().item()


@pytest.mark.parametrize("group_size", ["tensor", "channel", 16])
@pytest.mark.parametrize("symmetric", [True, False])
def test_feedback_beats_the_clip_search_and_descent_beats_feedback(group_size, symmetric):
    weight = weights((12, 4, 3, 3))
    for k in (1, 3):
        given, x = correlated(36, k)
        for bits in (2, 3, 4):
            scheme = Integer(bits, group_size, symmetric, "float32")
            clip, gptq, descent = (
                output_error(quantizer.quantize(weight, scheme, given), weight, x)
                for quantizer in (ClipSearch(), GPTQ(), CoordinateDescent())
            )
            assert gptq < 0.7 * clip
            assert descent < gptq * (1.001 if group_size == "tensor" else 1)  # of the damped error it is never more


@pytest.mark.parametrize("group_size", ["tensor", "channel", 16])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.thin(3)
def test_learnt_rounding_beats_the_clip_search_and_is_up_or_down_only(group_size, symmetric):
    weight = weights((12, 4, 3, 3))
    for k, bits in ((1, 2), (3, 4)):
        (given, x), scheme = correlated(36, k), Integer(bits, group_size, symmetric, "float32")
        clip, learnt = (quantizer.quantize(weight, scheme, given) for quantizer in (ClipSearch(), AdaRound()))
        assert output_error(learnt, weight, x) < 0.75 * output_error(clip, weight, x)
        codes, nearest = (scheme.unpacked(of.tensors, of.shape)[0].int() for of in (learnt, clip))
        assert torch.equal(learnt.tensors["scales"], clip.tensors["scales"])
        assert (codes - nearest).abs().max() == 1


def test_without_correlations_feedback_is_the_clip_search():
    weight, given = weights(), moments(27)
    diagonal = replace(given, hessian=torch.diag_embed(given.second_moment))
    for scheme in (Integer(3), Integer(4, 9, symmetric=False), Integer(1)):
        a, b = ClipSearch().quantize(weight, scheme, given), GPTQ().quantize(weight, scheme, diagonal)
        assert torch.equal(a.dequantize(), b.dequantize())


def test_descent_ends_where_no_single_code_helps():
    """Enough sweeps: no other code of any one weight has a smaller error."""
    weight = weights((5, 20))
    given, _ = correlated(20)
    scheme = Integer(3, scale_dtype="float32")
    found = CoordinateDescent(n_sweeps=100).quantize(weight, scheme, given)
    codes = scheme.unpacked(found.tensors, found.shape)[0].double()
    scale = found.tensors["scales"].double()
    hessian = GPTQ()._damped(given.hessian)[0]

    def error(codes):
        e = (codes - 4) * scale - weight.double()
        return ((e @ hessian) * e).sum(1)

    least = error(codes)
    for column in range(20):
        for code in range(8):
            other = codes.clone()
            other[:, column] = code
            assert (error(other) >= least * (1 - 1e-5)).all()


def informed(given, rows, seed=4):
    """The moments with the Fisher information `[k, rows / k, rows / k]` of outputs that the loss minds together."""
    k = len(given.mean)
    torch.manual_seed(seed)
    gradients = torch.randn(k, 300, rows // k) @ (torch.eye(rows // k) + 0.5)
    return replace(given, fisher=gradients.transpose(1, 2) @ gradients / 300)


def kronecker_error(quantized, weight, given, damping=0.1):
    """tr(G E H E^T) of both, damped."""
    change = (quantized.dequantize() - weight).double().reshape(len(given.fisher), -1, given.hessian.shape[-1])
    fisher = given.fisher.double()
    diagonal = fisher.diagonal(dim1=1, dim2=2)
    fisher = fisher + torch.diag_embed((damping * diagonal.mean(1, keepdim=True)).expand_as(diagonal))
    return (fisher * (change @ GPTQ()._damped(given.hessian) @ change.transpose(1, 2))).sum().item()


@pytest.mark.parametrize("group_size", ["tensor", "channel", 16])
@pytest.mark.parametrize("symmetric", [True, False])
def test_rows_make_up_for_one_another_where_the_loss_minds_them_together(group_size, symmetric):
    weight = weights((12, 4, 3, 3))
    ratios = []
    for k, bits in itertools.product((1, 3), (2, 3, 4)):
        given, scheme = informed(correlated(36, k)[0], 12), Integer(bits, group_size, symmetric)
        alone, together = (q.quantize(weight, scheme, given) for q in (CoordinateDescent(), KroneckerDescent()))
        ratios.append(kronecker_error(together, weight, given) / kronecker_error(alone, weight, given))
    assert max(ratios) <= 1
    assert sum(ratios) / len(ratios) < 0.96


def test_rows_that_the_loss_minds_apart_are_left_to_coordinate_descent():
    weight, (given, _) = weights((12, 20)), correlated(20)
    apart = replace(given, fisher=torch.eye(12)[None])
    found = KroneckerDescent(n_sweeps=100).quantize(weight, Integer(3, scale_dtype="float32"), apart).dequantize()
    expected = CoordinateDescent(n_sweeps=100).quantize(weight, Integer(3, scale_dtype="float32"), given).dequantize()
    assert torch.allclose(found, expected, atol=1e-5)
    for missing in (replace(given, fisher=None), replace(informed(given, 12), hessian=None)):
        found, expected = (
            q.quantize(weight, Integer(3), missing).dequantize() for q in (KroneckerDescent(), CoordinateDescent())
        )
        assert torch.equal(found, expected)


def test_few_samples_and_constant_inputs_are_damped():
    weight = weights((6, 30))
    for n in (1, 3):
        given, _ = correlated(30, n=n)
        given.hessian[:, :5] = given.hessian[:, :, :5] = 0  # inputs that are never on
        for quantizer in (GPTQ(), CoordinateDescent()):
            dense = quantizer.quantize(weight, Integer(3), given).dequantize()
            assert torch.isfinite(dense).all()
            nearest = NEAREST.quantize(weight, Integer(3)).dequantize()
            assert (dense - weight).abs().max() < 4 * (nearest - weight).abs().max()
    nothing = InputMoments(torch.zeros(1, 30), torch.zeros(1, 30), hessian=torch.zeros(1, 30, 30))
    assert torch.isfinite(GPTQ().quantize(weight, Integer(3), nothing).dequantize()).all()


def test_a_hessian_that_is_not_positive_definite_is_damped_more_or_refused():
    hessian = torch.eye(4)[None].clone()
    hessian[0, 0, 0] = -0.05
    weight = weights((3, 4))
    given = InputMoments(torch.zeros(1, 4), torch.ones(1, 4), hessian=hessian)
    with pytest.warns(UserWarning, match=r"not positive definite with damping=0.01; 0.1 was used"):
        GPTQ().quantize(weight, Integer(3), given)
    hessian[0, 0, 0] = -2.0
    with pytest.raises(InputError, match="not positive definite even with"):
        GPTQ().quantize(weight, Integer(3), replace(given, hessian=hessian))


def test_moments_that_are_centred_or_pooled():
    (a, x), (b, y) = correlated(6, seed=1, n=30), correlated(6, seed=2, n=10)
    both = torch.cat([x, y], 1)
    pooled = InputMoments.pooled([a, b])
    assert torch.allclose(pooled.hessian, both.transpose(1, 2) @ both / 40, atol=1e-5)
    deviation = both - both.mean(1, keepdim=True)
    centred = pooled.centred()
    assert torch.allclose(centred.hessian, deviation.transpose(1, 2) @ deviation / 40, atol=1e-4)
    assert torch.allclose(centred.second_moment, deviation.square().mean(1), atol=1e-4)
    assert InputMoments.pooled([a, replace(b, hessian=None)]).hessian is None


def rounded_by_definition(weight, hessian, scale, columns):
    """Codes of a 3-bit channel-wise grid: columns in this order, each to where the later ones can best make up for the others."""
    codes, error = torch.empty_like(weight), torch.zeros_like(weight)
    for at, column in enumerate(columns):
        done, left = columns[:at], columns[at:]
        # The errors of the remaining columns that minimize e^T H e, those of the done ones being fixed.
        best = -torch.linalg.solve(hessian[left][:, left], hessian[left][:, done] @ error[:, done].T).T
        codes[:, column] = ((weight[:, column] + best[:, 0]) / scale[:, 0] + 4).round().clamp(0, 7)
        error[:, column] = (codes[:, column] - 4) * scale[:, 0] - weight[:, column]
    return codes


@pytest.mark.parametrize("act_order", [True, False])
def test_gptq_takes_the_columns_of_largest_inputs_first(act_order):
    weight, (given, _) = weights((10, 16)), correlated(16)
    scheme = Integer(3, scale_dtype="float32")
    quantized = GPTQ(act_order=act_order).quantize(weight, scheme, given)
    codes, scales, _, _ = scheme.unpacked(quantized.tensors, quantized.shape)
    hessian = given.hessian[0].double()
    hessian += 0.01 * hessian.diagonal().mean() * torch.eye(16)
    columns = sorted(range(16), key=lambda j: -hessian[j, j].item()) if act_order else list(range(16))
    expected = rounded_by_definition(weight.double(), hessian, scales.double(), columns)
    assert (codes == expected).double().mean() > 0.99, "but for ties"
    other = rounded_by_definition(weight.double(), hessian, scales.double(), columns[::-1])
    assert (codes == other).double().mean() < 0.95
