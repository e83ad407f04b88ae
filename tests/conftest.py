import os
from importlib.metadata import version

import equinox as eqx
import jax
import jax.random as jr
import pytest


# Most of the time of the tests goes into compiling, each program to be run once. The
# fusion emitters, which later versions cannot do without, take half of it.
if version("jaxlib").startswith("0.10."):
    os.environ["XLA_FLAGS"] = (
        os.environ.get("XLA_FLAGS", "") + " --xla_cpu_use_fusion_emitters=false"
    )
jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture(scope="module", autouse=True)
def forget_compiled_programs():
    """Each holds memory mappings, of which a process may have 65,530 on Linux."""
    yield
    eqx.clear_caches()
    jax.clear_caches()


@pytest.fixture
def getkey():
    """A function that returns a fresh key at each call, the same ones in every run."""
    keys = iter(range(2**31))

    def _getkey():
        return jr.fold_in(jr.key(5678), next(keys))

    return _getkey


@pytest.fixture
def default_configuration():
    """Examples run under JAX's defaults, not under the strict ones of the tests."""
    defaults = {
        "jax_enable_x64": False,
        "jax_numpy_dtype_promotion": "standard",
        "jax_numpy_rank_promotion": "allow",
    }
    before = {name: getattr(jax.config, name) for name in defaults}
    for name, value in defaults.items():
        jax.config.update(name, value)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.fixture
def all_optimisations():
    """For tests that look at the compiled program."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


def pytest_addoption(parser):
    parser.addoption(
        "--cases", type=int, default=500, help="of random maps, in test_properties.py"
    )


@pytest.fixture
def num_cases(request):
    return request.config.getoption("--cases")
