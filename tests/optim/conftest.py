"""What the tests of refusals need."""

import jaxtyping
import pytest


@pytest.fixture
def unchecked():
    """Functions as a user calls them: their own refusals, not those of the runtime type check."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
