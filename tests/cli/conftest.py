"""One trained run for the tests of all commands."""

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

from nestedjax.cli import main
from tests.cli.processes import Process
from tests.cli.tiny import RUN, TEXT, TRANSFORMER


@pytest.fixture(scope="package", autouse=True)
def standard_promotion():
    # optax raises a float to an integer count
    strict = jax.config.jax_numpy_dtype_promotion
    jax.config.update("jax_numpy_dtype_promotion", "standard")
    yield
    jax.config.update("jax_numpy_dtype_promotion", strict)


@pytest.fixture(scope="package", autouse=True)
def compile_once(tmp_path_factory):
    # every command of these tests compiles the same few programs
    options = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("xla")),
        "jax_persistent_cache_min_compile_time_secs": 0,
        "jax_persistent_cache_min_entry_size_bytes": 0,
    }
    before = {name: getattr(jax.config, name) for name in options}
    compilation_cache.reset_cache()
    for name, value in options.items():
        jax.config.update(name, value)
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.fixture(scope="package")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "book.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture(scope="package")
def trained(tmp_path_factory, text, standard_promotion):
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    arguments = ["train", "transformer_nano", "--run", str(folder), "--data", str(text)]
    assert main([*arguments, *TRANSFORMER, *RUN]) == 0
    return folder


@pytest.fixture(scope="package")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("xla")


@pytest.fixture
def start(cache):
    """Starts commands in processes of their own, and ends those that a failed test left running."""
    started = []

    def start(*given, **options):
        started.append(Process(given, cache, **options))
        return started[-1]

    yield start
    for process in started:
        process.kill()
