"""One trained run for the tests of all commands."""

import jax
import pytest

from nestedjax.cli import main
from tests.cli.tiny import RUN, TEXT, TRANSFORMER


@pytest.fixture(scope="package", autouse=True)
def standard_promotion():
    # optax raises a float to an integer count
    strict = jax.config.jax_numpy_dtype_promotion
    jax.config.update("jax_numpy_dtype_promotion", "standard")
    yield
    jax.config.update("jax_numpy_dtype_promotion", strict)


@pytest.fixture(scope="package")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "book.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture(scope="package")
def trained(tmp_path_factory, text, standard_promotion):
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    arguments = ["train", "transformer_nano", "--run", str(folder), "--data", str(text)]
    assert main([*arguments, "--set", *TRANSFORMER, *RUN]) == 0
    return folder
