"""The contract of a method, shown by a whole one that runs."""

import doctest

import gwpf_baseline.methods


def test_the_toy_method_in_the_docstring_runs() -> None:
    """Word for word, with real data and real bytes."""
    result = doctest.testmod(gwpf_baseline.methods)
    assert result.attempted > 10 and not result.failed
