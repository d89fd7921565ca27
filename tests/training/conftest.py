"""Optax promotes dtypes implicitly; its callers run without the suite's strict promotion."""

import functools

import jax
import pytest

from nestedjax.training import loop


@pytest.fixture(scope="package", autouse=True)
def standard_promotion():
    strict = jax.config.jax_numpy_dtype_promotion
    jax.config.update("jax_numpy_dtype_promotion", "standard")
    yield
    jax.config.update("jax_numpy_dtype_promotion", strict)


@pytest.fixture(scope="package", autouse=True)
def compile_each_dispatch_once():
    """The same functions in run after run: what a resumed run compiles is equal anyway."""
    patch = pytest.MonkeyPatch()
    for name in ("make_dispatch", "make_evaluate"):
        patch.setattr(loop, name, once(getattr(loop, name)))
    yield
    patch.undo()


def once(make):
    cached = functools.cache(make)

    def made(*args, shardings=None, **options):
        if shardings is not None:  # a tree, not hashable
            return make(*args, shardings=shardings, **options)
        return cached(*args, **options)

    return made
