import jax
import jax.random as jr
import pytest


jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture
def getkey():
    """A function that returns a fresh key at each call, the same ones in every run."""
    keys = iter(range(2**31))

    def _getkey():
        return jr.fold_in(jr.key(5678), next(keys))

    return _getkey
