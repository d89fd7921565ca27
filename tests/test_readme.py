"""The README's example runs as it stands."""

import doctest
from pathlib import Path


def test_readme_example():
    readme = Path(__file__).parents[1] / "README.md"
    result = doctest.testfile(str(readme), module_relative=False)
    assert result.attempted >= 12 and not result.failed
