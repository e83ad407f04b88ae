"""The training package of the examples: what goes wrong, and how runs go on."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest
from training import (
    classifiers,
    command_line,
    image_data,
    loop,
    options,
    results,
)

import eqimplicit as eqi


_root = pathlib.Path(__file__).parent.parent
_script = str(_root / "examples" / "image_classification.py")
pytestmark = pytest.mark.usefixtures("default_configuration")


class Cell(eqx.Module):
    weight: jax.Array

    def __call__(self, z, x):
        return jnp.tanh(self.weight @ z + x)


class Encoder(eqx.Module):
    weight: jax.Array

    def __call__(self, x, state, *, key=None):
        return self.weight @ x.reshape(-1), state


class Head(eqx.Module):
    weight: jax.Array

    def __call__(self, z, *, key=None):
        return self.weight @ z


def make_task(size=8, **kwargs):
    """Of ten unknowns on images of 2 x 2 pixels."""
    keys = jr.split(jr.key(0), 3)
    layer = eqi.DEQ(
        Cell(0.3 * jr.normal(keys[0], (size, size))),
        eqi.Anderson(1e-4, 1e-4),
        kwargs.pop("adjoint", eqi.JFBAdjoint()),
    )
    encoder = Encoder(jr.normal(keys[1], (size, 4)))
    head = Head(jr.normal(keys[2], (3, size)))
    model = eqi.models.ImageClassifier(encoder, layer, head)
    optimiser = kwargs.pop("optimiser", optax.adam(1e-2))
    return loop.Task(model, None, classifiers.forward, optimiser, **kwargs)


@pytest.fixture
def data():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 40).astype(np.int32)
    images = rng.integers(0, 50, (40, 2, 2, 1)) + 70 * labels[:, None, None, None]
    some = image_data.Images(images.astype(np.uint8), labels)
    mean, std = images.mean((0, 1, 2)), images.std((0, 1, 2))
    return image_data.Dataset(some, some, mean, std)


def train(task, data, folder, experiment="test", **kwargs):
    chosen = options.Options(**{"epochs": 2, "batch_size": 8, **kwargs})
    return loop.train(task, data, chosen, folder, "a test", experiment)


def saved_metrics(folder):
    with (folder / "checkpoint.eqx").open("rb") as file:
        file.readline()
        return json.loads(file.readline())["metrics"]


@pytest.mark.slow
def test_it_learns_and_a_step_is_compiled_once_for_each_function_of_the_schedule(
    data, tmp_path
):
    traces = []

    def short(model):
        traces.append("short")
        return classifiers.unroll(3)(model)

    def long(model):
        traces.append("long")
        return model

    task = make_task(at_step=lambda step: short if step < 7 else long)
    metrics, _, _ = train(task, data, tmp_path / "run", epochs=40)
    assert traces == ["short", "long"]
    assert metrics[0]["evaluations"] == 3 and metrics[-1]["evaluations"] > 4
    assert metrics[-1]["test_accuracy"] > 0.9
    assert not any(name.startswith("backward") for name in metrics[0])


def test_a_number_that_is_not_finite_ends_the_run_and_keeps_the_last_checkpoint(
    data, tmp_path
):
    good = data.train.images
    train(make_task(), data, tmp_path / "run", epochs=2)
    before = (tmp_path / "run" / "checkpoint.eqx").read_bytes()

    # One image in the second half of an epoch.
    task = make_task(augment=lambda key, x: x.at[0].set(jnp.nan))
    with pytest.raises(command_line.UserError) as error:
        train(task, data, tmp_path / "bad")
    message = str(error.value)
    assert "step 0 (epoch 1)" in message and "`layer` was the first" in message
    assert "checkpoint of epoch 0" in message
    assert saved_metrics(tmp_path / "bad") == []

    # The solve is finite, the loss is not.
    head = lambda m: m.head.weight
    task = make_task()
    task = task._replace(model=eqx.tree_at(head, task.model, head(task.model) * 1e38))
    with pytest.raises(command_line.UserError, match="Every solve gave finite values"):
        train(task, data, tmp_path / "loss")
    assert (tmp_path / "run" / "checkpoint.eqx").read_bytes() == before
    assert np.array_equal(good, data.train.images)


@pytest.mark.parametrize("max_steps, finds", ((20, True), (2, False)))
def test_backward_solves_are_logged_and_end_a_run_in_which_they_fail(
    data, tmp_path, max_steps, finds
):
    adjoint = eqi.ImplicitAdjoint(eqi.GMRES(1e-5, 0.0, max_steps=max_steps))
    task = make_task(adjoint=adjoint, backward_patience=7)
    if not finds:
        # The second of five steps of the second epoch.
        message = "step 6: 100% of the backward.* each of the last 7 steps"
        with pytest.raises(command_line.UserError, match=message):
            train(task, data, tmp_path / "run")
    else:
        train(task, data, tmp_path / "run")
    (first, *_) = saved_metrics(tmp_path / "run")
    assert first["backward_solves"] == 8
    assert first["backward_failed"] == (0 if finds else 1)
    assert (first["backward_residual"] < 1e-5) == finds
    assert 1 <= first["backward_products"] <= max_steps


def test_a_run_that_diverges_later_keeps_the_epochs_before(data, tmp_path):
    def explode(step):
        return as_it_was if step < 12 else broken

    def as_it_was(model):
        return model

    def broken(model):
        return eqx.tree_at(
            lambda m: m.encoder.weight, model, replace_fn=lambda w: w / 0
        )

    with pytest.raises(command_line.UserError, match=r"step 12 \(epoch 3\)") as error:
        train(make_task(at_step=explode), data, tmp_path / "run", epochs=4)
    assert "checkpoint of epoch 2" in str(error.value)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in lines] == [1, 2]


def test_a_checkpoint_of_another_network_or_experiment_is_refused(data, tmp_path):
    folder = tmp_path / "run"
    train(make_task(), data, folder)
    before = (folder / "checkpoint.eqx").read_bytes()
    with pytest.raises(command_line.UserError, match=r"\[8, 4\] where .*\[9, 4\]"):
        train(make_task(size=9), data, folder)
    with pytest.raises(command_line.UserError, match="experiment test, not other"):
        train(make_task(), data, folder, experiment="other")
    (folder / "checkpoint.eqx").write_bytes(before[:-100])
    with pytest.raises(command_line.UserError, match="truncated or corrupt"):
        train(make_task(), data, folder)
    assert (folder / "checkpoint.eqx").read_bytes() == before[:-100]


@pytest.mark.skipif(os.getuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written_is_refused(data, tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(command_line.UserError, match="cannot be used"):
        train(make_task(), data, tmp_path / "run")


def test_batches_larger_than_the_data_are_refused_before_anything_is_written(
    data, tmp_path
):
    with pytest.raises(command_line.UserError, match="at most 40"):
        train(make_task(), data, tmp_path / "run", batch_size=41)
    assert not (tmp_path / "run").exists()


def test_bfloat16_keeps_parameters_and_errors_in_single_precision(data, tmp_path):
    metrics, model, _ = train(
        make_task(), data, tmp_path / "run", epochs=5, precision="bfloat16"
    )
    leaves = jax.tree.leaves(eqx.filter(model, eqx.is_inexact_array))
    assert all(leaf.dtype == jnp.float32 for leaf in leaves)
    assert metrics[-1]["loss"] < metrics[0]["loss"]


def test_ranks_count_each_image_once_and_the_best_few(data):
    # With logits that do not depend on the image.
    task = make_task()
    logits = jnp.array([0.0, 2.0, 1.0])
    forward = lambda model, state, images, key=None: classifiers.Output(
        jnp.broadcast_to(logits, (len(images), 3)), state, {}
    )
    task = task._replace(forward=forward)
    part = image_data.Images(data.train.images[:11], data.train.labels[:11])
    for top, labels in ((1, [1]), (2, [1, 2]), (3, [0, 1, 2])):
        ranks = loop.ranks(task, task.model, None, data, part, 4)
        assert np.mean(ranks < top) == pytest.approx(
            np.mean(np.isin(part.labels, labels))
        )


@pytest.mark.parametrize("value", [0.0, np.nan])
def test_logits_that_decide_nothing_are_not_right(data, value):
    task = make_task()
    forward = lambda model, state, images, key=None: classifiers.Output(
        jnp.full((len(images), 3), value), state, {}
    )
    task = task._replace(forward=forward)
    ranks = loop.ranks(task, task.model, None, data, data.train, 8)
    assert np.all(ranks >= 2)


def test_parameters_that_are_not_finite_are_never_saved(data, tmp_path):
    # In the last step, after which no loss is computed.
    task = make_task(optimiser=optax.sgd(1e38))
    options = {"epochs": 1, "batch_size": 40}
    with pytest.raises(command_line.UserError, match="new parameters (inf|nan)"):
        train(task, data, tmp_path / "run", **options)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_double_precision_is_double(data, tmp_path):
    options.start(options.Options(precision="float64"))
    _, model, _ = train(make_task(), data, tmp_path / "run", precision="float64")
    leaves = jax.tree.leaves(eqx.filter(model, eqx.is_inexact_array))
    assert all(leaf.dtype == jnp.float64 for leaf in leaves)


def test_the_table_of_results(tmp_path, capsys):
    import collect_results

    for name, ours in (("a", [1.0, 2.0]), ("b", [None])):
        rows = [{"quantity": "|q|", "paper": "3", "code": "4", "ours": ours}]
        results.save(tmp_path / name, {"experiment": name, "rows": rows})
    collect_results.main([str(tmp_path)])
    out = capsys.readouterr().out
    assert "| a | \\|q\\| | 3 | 4 | 1.5 (1 to 2) | 2 |" in out
    assert "| b | \\|q\\| | 3 | 4 | nan | 1 |" in out
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "results.json").write_text("{")
    with pytest.raises(command_line.UserError, match="cannot be read"):
        collect_results.main([str(tmp_path)])
    (tmp_path / "c" / "results.json").write_text("{}")
    with pytest.raises(command_line.UserError, match="not the results file"):
        collect_results.main([str(tmp_path)])
    rows = [{"quantity": "q", "ours": [1.0]}]
    results.save(tmp_path / "c", {"experiment": "c", "rows": rows})
    with pytest.raises(command_line.UserError, match="not the results file"):
        collect_results.main([str(tmp_path)])
    with pytest.raises(command_line.UserError, match="no results.json"):
        collect_results.main([str(tmp_path / "nowhere")])


def parameters(folder):
    with (folder / "checkpoint.eqx").open("rb") as file:
        file.readline(), file.readline()
        return file.read()


def num_finished(folder):
    """The epochs of a checkpoint, -1 if there is none."""
    return len(saved_metrics(folder)) if (folder / "checkpoint.eqx").exists() else -1


SHORT = ("--epochs", "4", "--train-size", "300", "--batch-size", "20")


@pytest.mark.process
def test_a_run_that_is_killed_again_and_again_ends_as_one_that_never_was(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    command = [sys.executable, _script, *SHORT, "--out"]
    subprocess.run([*command, whole], check=True)
    rng = np.random.default_rng(0)
    # Before and while the first epoch is trained, and soon after each checkpoint.
    for num_epochs, at_most in ((None, 3.0), (0, 5.0), (0, 5.0), (1, 0.2), (2, 0.2)):
        process = subprocess.Popen([*command, killed])
        end = time.monotonic() + 200
        while num_epochs is not None and num_finished(killed) < num_epochs:
            assert process.poll() is None and time.monotonic() < end
            time.sleep(0.01)
        time.sleep(rng.uniform(0, at_most))
        process.send_signal(signal.SIGKILL)
        process.wait()
    subprocess.run([*command, killed], check=True)
    assert parameters(killed) == parameters(whole)
    assert not list(killed.glob("*.part"))
