"""How the memory of a run is divided."""

import pytest

from mpsearch.errors import InputError
from mpsearch.pipeline.engine_options import EngineOptions

GB = 10**9


@pytest.mark.parametrize(
    ("options", "n_weights", "expected"),
    [
        (EngineOptions(), 270_000, (4 * 0.544 * GB, 5 * 1.08e6, 0.8 * GB - 5.4e6)),  # all dense weights fit
        (EngineOptions(), 22_000_000, (4 * 0.544 * GB, 0.4 * GB, 0.4 * GB)),
        (EngineOptions(), 135_000_000, (4 * 0.544 * GB, 0.54 * GB, 0.26 * GB)),  # one dense allocation
        (EngineOptions(), 10**9, (4 * 4 * GB, 3.192 * GB, 1.064 * GB)),
        (EngineOptions(max_bytes="2GB"), 135_000_000, (4 * 1.744 * GB, 1 * GB, 1 * GB)),
        (EngineOptions(max_bytes="2GB", device="cuda"), 135_000_000, (1.744 * GB, 1 * GB, 1 * GB)),
        (EngineOptions(max_bytes="2GB", prefix_max_bytes=0), 135_000_000, (4 * 1.744 * GB, 1 * GB, 0)),
    ],
)
def test_limits(options, n_weights, expected):
    limits = options.limits(n_weights, n_schemes=5)
    assert [limits[name] for name in ("hessian_max_bytes", "bank_max_bytes", "prefix_max_bytes")] == pytest.approx(expected)


def test_what_is_no_size():
    with pytest.raises(InputError, match="'much' is not a size"):
        EngineOptions(max_bytes="much").limits(10, 2)
