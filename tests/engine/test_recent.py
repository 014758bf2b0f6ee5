"""Values in memory up to a limit."""

from mpsearch.engine.recent import Recent


def test_what_was_asked_for_last_stays():
    kept = Recent(10)
    assert kept.put("a", 1, 4) == 1
    kept.put("b", 2, 4)
    assert kept.get("a") == 1
    kept.put("c", 3, 4)
    assert ("a" in kept, "b" in kept, "c" in kept) == (True, False, True)
    assert kept.get("b") is None
    assert kept.n_bytes == 8
    assert kept.put("large", 4, 11) == 4
    assert kept.n_bytes == 0, "a value that does not fit is not kept, and everything older went before it"
    kept.put("d", 5, 10)
    kept.clear()
    assert kept.n_bytes == 0
    assert "d" not in kept
