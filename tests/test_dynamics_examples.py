"""The examples that learn differential equations: what each claims, in miniature."""

import json

import allen_cahn
import dynamics
import equinox as eqx
import jax
import jax.numpy as jnp
import lotka_volterra
import numpy as np
import optax
import pytest
import sine_regression
import spiral
import stability
import stiff_ode
from training import command_line

import eqimplicit as eqi


pytestmark = pytest.mark.usefixtures("default_configuration")


def run(example, folder, *options):
    """The results, which are those in the file, and no figure is missing."""
    options = [str(option) for option in options]
    results = example.main([*options, "--out", str(folder)])
    written = json.loads((folder / "results.json").read_text())["results"]
    assert written.keys() == results["results"].keys()
    assert list(folder.glob("*.png"))
    return results["results"]


@pytest.mark.slow
def test_lotka_volterra_bends_as_the_law_says(tmp_path):
    options = ("--layers", "0", "--adam-steps", 1000, "--lbfgs-steps", 0)
    (one,) = run(lotka_volterra, tmp_path, *options).values()
    assert one["train_loss"][0] < 5e-3
    (real, imaginary), law = one["eigenvalue"][0], one["law"]
    assert abs(complex(real, imaginary) - complex(*law)) < 0.05
    # In continuous time the field of the explicit layers decays.
    assert one["amplitude"][0] < 0.05


@pytest.mark.slow
def test_implicit_layers_do_not_oscillate_on_a_stiff_equation(tmp_path):
    options = ("--thetas", 0.5, "--points", 10, "--epochs", 6)
    (implicit,) = run(stiff_ode, tmp_path, *options).values()
    assert implicit["rmse"][0] < 0.08
    assert implicit["transient_rmse"][0] < 0.15
    assert implicit["continuous_rmse"][0] < 0.08


def test_explicit_layers_oscillate_whatever_they_have_learned():
    key = jax.random.key(0)
    block = stiff_ode.make_block(0.0, stiff_ode.SETTINGS["code"], key)
    starts = jnp.array([[-0.5], [1.5]])
    apart = jax.vmap(lambda z0: stiff_ode.trajectory(block, 0, z0))(starts)
    distance = jnp.squeeze(apart[1] - apart[0])
    factors = distance[1:] / distance[:-1]
    # Slopes between -25 and -15, at the step 0.1.
    assert jnp.all((-1.5 <= factors) & (factors <= -0.5))


def test_the_data_of_the_stiff_equation_are_its_closed_form():
    jax.config.update("jax_enable_x64", True)
    setting = stiff_ode.SETTINGS["code"]
    firsts, z0s, states = stiff_ode.make_data(setting, 5, jax.random.key(0))
    starts = stiff_ode.STEP * firsts[:, None]
    times = starts + stiff_ode.STEP * jnp.arange(21.0)
    expected = stiff_ode.closed_form(times, starts, z0s)
    assert jnp.allclose(states[..., 0], expected, atol=1e-7)


@pytest.mark.slow
def test_a_reward_for_dissipation_costs_the_fit_of_the_sine(tmp_path):
    options = ("--thetas", 0.5, "--divergence-weights", 0, 3, "--steps", 400)
    free, rewarded = run(sine_regression, tmp_path, *options).values()
    assert free["mse"][0] < 0.02
    assert free["least_real_part"][0] > rewarded["least_real_part"][0]
    assert free["mse"][0] < rewarded["mse"][0]
    assert free["newton_steps"][0] < rewarded["newton_steps"][0]


@pytest.mark.slow
def test_spirals_are_separated(tmp_path):
    options = ("--fields", "mixed", "--thetas", 0, "--steps", 600)
    options += ("--seeds", 1)
    (one,) = run(spiral, tmp_path, *options).values()
    assert one["train"][0] > 0.9
    validation, *shifted = one["shifted"][0]
    assert validation > 0.85
    assert shifted[-1] < validation


@pytest.mark.slow
def test_diffusion_is_found_by_implicit_layers(tmp_path):
    options = ("--thetas", 0.5, "--size", 100, "--trajectories", 2, "--steps", 100)
    (implicit,) = run(allen_cahn, tmp_path, *options, "--num-steps", 5).values()
    assert implicit["solved"][0] == 1
    assert abs(implicit["diffusivity"][0] - 1) < 0.3
    assert implicit["window_rmse"][0] < 0.1


def test_explicit_layers_cannot_carry_the_diffusion():
    u = jnp.sin(2 * jnp.pi * jnp.arange(128) / 128) ** 3
    layer = lambda theta: eqi.ThetaLayer(allen_cahn.allen_cahn, theta, 0.2)
    end = lambda theta: eqi.ODEBlock(layer(theta), 40)(u)
    assert not jnp.max(jnp.abs(end(0.0))) < 1e3
    assert jnp.max(jnp.abs(end(0.5))) < 1.1


def test_schemes_grow_and_shrink_as_theory_says(tmp_path):
    growth = stability.main(["--out", str(tmp_path), "--steps", "50"])
    factor = np.hypot(1, 0.2) ** 50
    assert np.isclose(growth["forward Euler"], factor, rtol=1e-6)
    assert np.isclose(growth["backward Euler"], 1 / factor, rtol=1e-6)
    assert np.isclose(growth["trapezoidal"], 1, rtol=1e-6)
    assert abs(growth["Verlet"] - 1) < 0.02


@pytest.mark.parametrize(
    "example, options, message",
    [
        (lotka_volterra, ("--layers", "leapfrog"), "leapfrog is no theta"),
        (lotka_volterra, ("--seeds", "0"), "at least 1"),
        (stiff_ode, ("--points", "3"), "3 does not divide 20"),
        (stiff_ode, ("--thetas", "2"), "not between 0 and 1"),
        (sine_regression, ("--thetas", "-1"), "not between 0 and 1"),
        (spiral, ("--fields", "3-Lipschitz"), "3-Lipschitz is not one of plain"),
        (allen_cahn, ("--step-size", "0"), "must be positive"),
    ],
)
def test_mistakes_are_one_line(example, options, message, capsys, tmp_path):
    with pytest.raises(SystemExit) as exit:
        command_line.run(lambda: example.main([*options, "--out", str(tmp_path / "x")]))
    assert exit.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and message in error
    assert not (tmp_path / "x").exists()


def test_a_loss_that_is_not_finite_ends_the_training():
    def loss(model, x):
        value = jnp.where(x > 30, jnp.nan, jnp.sum(model**2))
        return value, {"loss": value}

    with pytest.raises(
        command_line.UserError, match="test: .*not finite after step 35"
    ):
        dynamics.fit(loss, jnp.ones((2, 3)), optax.sgd(0.1), 100, name="test")


def test_backward_solves_that_fail_for_long_end_the_training():
    class Field(eqx.Module):
        rates: jax.Array

        def __call__(self, t, y, args):
            return -self.rates * y

    def make(rates):
        adjoint = eqi.ImplicitAdjoint(eqi.GMRES(1e-6, 0.0, max_steps=1))
        return eqi.ODEBlock(eqi.ThetaLayer(Field(rates), 1.0, adjoint=adjoint), 2)

    def loss(block, x):
        value = jnp.sum(block(jnp.ones(3)) ** 2)
        return value, {"loss": value}

    models = eqx.filter_vmap(make)(jnp.array([[1.0, 2.0, 3.0], [2.0, 5.0, 7.0]]))
    with pytest.raises(command_line.UserError, match="step 5: 50% of the backward"):
        dynamics.fit(loss, models, optax.sgd(0.1), 20, name="test", backward_patience=6)


def test_models_are_trained_side_by_side():
    def loss(model, x):
        value = jnp.sum((model - 1) ** 2)
        return value, {"loss": value}

    start = jnp.stack([jnp.zeros(3), 2 * jnp.ones(3)])
    trained, record = dynamics.fit(loss, start, optax.sgd(0.1), 33, name="test")
    assert record["loss"].shape == (2, 33)
    assert jnp.allclose(trained - 1, (start - 1) * 0.8**33, rtol=1e-4)
