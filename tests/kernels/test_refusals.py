"""What does not fit an operation is refused in one line, also where annotations are not run."""

import pytest

from tests.kernels import refusals
from tests.plain import refusals as refused


@pytest.fixture(scope="module")
def found():
    return refused("tests.kernels.refusals")


@pytest.mark.parametrize("name", refusals.EXPECTED)
def test_one_line_with_the_value(found, name):
    kind, message = found[name]
    assert kind == "ValueError" and "\n" not in message, message
    assert refusals.EXPECTED[name][1] in message
