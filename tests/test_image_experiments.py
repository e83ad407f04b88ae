"""The experiments on images: what each claims, in miniature."""

import json

import jax
import jax.numpy as jnp
import jax.random as jr
import jfb_paper
import lineax as lx
import numpy as np
import phantom_gradients
import phantom_synthetic
import pytest
import robust_resnet
import toy_equation
from normal_equations import NormalEquationsCG
from training import command_line


pytestmark = pytest.mark.usefixtures("default_configuration")


def run(example, folder, *options):
    """The results, which are those in the file, and no figure is missing."""
    content = example.main([*map(str, options), "--out", str(folder)])
    written = json.loads((folder / "results.json").read_text())
    assert written["results"].keys() == content["results"].keys()
    assert len(written["rows"]) == len(content["rows"]) > 0
    assert list(folder.glob("*.png"))
    return content


def fails(capsys, example, *options):
    with pytest.raises(SystemExit) as exit:
        command_line.run(lambda: example.main([*map(str, options)]))
    assert exit.value.code == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return error


def test_the_toy_equation(tmp_path):
    results = run(toy_equation, tmp_path, "--points", 11)["results"]
    y = results["y"]
    # The published values.
    assert y[-1] == pytest.approx(0.5506065793341345, abs=1e-14)
    assert np.allclose(y, results["d"] + y**5, atol=1e-14)
    assert np.allclose(results["exact"], results["formula"], rtol=1e-12)
    assert np.all(results["JFB"] == 1)
    terms = sum((5 * y**4) ** i for i in range(5))
    assert np.allclose(results["Neumann, 5 terms"], terms, rtol=1e-12)


def test_conjugate_gradients_on_the_normal_equations():
    matrices = 0.2 * jr.normal(jr.key(0), (3, 5, 5)) + jnp.eye(5)
    right = jr.normal(jr.key(1), (3, 5))
    operator = lx.FunctionLinearOperator(
        lambda x: jnp.einsum("bij,bj->bi", matrices, x), jax.eval_shape(lambda: right)
    )

    def solve(atol, max_steps):
        solution = lx.linear_solve(
            operator, right, NormalEquationsCG(atol, max_steps), throw=False
        )
        return solution.value, solution.result, solution.stats

    value, result, stats = solve(1e-5, 100)
    expected = jnp.linalg.solve(matrices, right[..., None])[..., 0]
    assert result == lx.RESULTS.successful
    assert jnp.allclose(value, expected, atol=1e-4)
    assert stats["num_products"] == 2 * stats["num_steps"] + 3

    # With the paper's loose tolerance it stops where it starts.
    value, _, stats = solve(100.0, 100)
    assert stats["num_steps"] == 0
    start = jnp.einsum("bji,bj->bi", matrices, right)
    assert jnp.allclose(value, start)
    assert solve(1e-6, 1)[1] == lx.RESULTS.max_steps_reached


@pytest.mark.slow
def test_the_jfb_experiment(tmp_path, capsys):
    options = ("--dataset", "digits", "--small", "--epochs", 1, "--train-size", 100)
    options += ("--batch-size", 20, "--methods", "neumann-5", "cg", "explicit")
    content = run(jfb_paper, tmp_path, *options)
    results = content["results"]
    products = {name: one["products"][0] for name, one in results.items()}
    assert products["neumann-5"] == 5 and products["cg"] >= 3
    assert 0.8 < results["neumann-5"]["gradient_cosine"][0] < 0.9999
    # Again nothing is trained, and another experiment is refused.
    capsys.readouterr()
    assert jfb_paper.main([*map(str, options), "--out", str(tmp_path)])
    assert capsys.readouterr().out.count("is finished") == 3
    robust = ("--dataset", "digits", "--small", "--networks", "0", "--out", tmp_path)
    (tmp_path / "cg-0").rename(tmp_path / "0-0")
    assert "holds a run with" in fails(capsys, robust_resnet, *robust)


@pytest.mark.slow
def test_the_noise_experiment(tmp_path, capsys):
    options = ("--dataset", "digits", "--small", "--epochs", 2, "--train-size", 250)
    content = run(robust_resnet, tmp_path, *options, "--networks", "1")
    for one in content["results"].values():
        for part in ("train, gaussian", "train, clipped", "test, clipped"):
            first, second = (np.array(one[f"{part}, top-{k}"]) for k in (1, 2))
            assert first.shape == second.shape == (1, 6)
            assert np.all(second >= first) and np.all(first <= 100)
        # Without noise there is nothing to clip.
        clean = (one[f"test, {kind}, top-1"][0, 0] for kind in robust_resnet.KINDS)
        assert len(set(clean)) == 1
        assert one["evaluations"][0] > 6
    assert "is no theta" in fails(capsys, robust_resnet, *options, "--networks", "2")
    assert "is no theta" in fails(capsys, robust_resnet, *options, "--networks", "x")


@pytest.mark.slow
def test_phantom_gradients_on_random_maps():
    one = phantom_synthetic.compare("linear, orthogonal", 16, 5)
    steps = phantom_synthetic.STEPS
    unrolled, neumann = one["unrolled"], one["neumann"]
    assert np.allclose(unrolled, neumann, atol=1e-4)
    # With one step the damping is but a factor; with more it costs accuracy.
    assert np.allclose(unrolled[:, :, 0], unrolled[:, :1, 0], atol=1e-5)
    assert np.all(unrolled[:, 0, 3:] > unrolled[:, 1, 3:])
    assert np.all(unrolled[:, 1, 1:] > unrolled[:, 2, 1:])
    mean = unrolled.mean(0)
    assert np.all(np.diff(mean, axis=1) > 0)
    # And it improves the condition number.
    condition = np.median(one["condition"], axis=0)
    assert condition.shape == (3, len(steps))
    assert np.all(condition[:, 0] < 1.001)
    assert condition[2, 3] < condition[1, 3] < condition[0, 3]


@pytest.mark.process
def test_networks_without_a_solve_meet_noise(tmp_path):
    options = ("--dataset", "digits", "--small", "--epochs", 1, "--train-size", 100)
    content = run(robust_resnet, tmp_path, *options, "--networks", "0", "skip")
    for one in content["results"].values():
        assert one["evaluations"][0] == 0


@pytest.mark.process
def test_the_ablation_of_phantom_gradients(tmp_path, capsys):
    options = ("--dataset", "digits", "--small", "--epochs", 2, "--train-size", 320)
    options += ("--batch-size", 32, "--parts", "ablation")
    methods = ("implicit", "UPG(5, .5)", "implicit, Jacobian penalty")
    content = run(phantom_gradients, tmp_path, *options, "--methods", *methods)
    assert content["results"].keys() == set(methods)
    for (metrics,) in content["results"].values():
        assert len(metrics) == 2
        assert metrics[-1]["loss"] < metrics[0]["loss"]
        assert 0 < metrics[-1]["spectral_radius"]
        assert -1 <= metrics[-1]["cosine_npg"] <= 1
    assert "--methods must be among" in fails(
        capsys, phantom_gradients, *options, "--methods", "backprop"
    )
