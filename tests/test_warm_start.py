"""Warm starts in training: what is stored, what it saves, and that it is resumed."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest
from training import classifiers, command_line, image_data, loop, options, warm_start

from .helpers import slow_but
from .test_processes import free_port
from .test_training import data as data, make_task, parameters, train


_script = pathlib.Path(__file__).parent.parent / "examples" / "image_classification.py"
pytestmark = pytest.mark.usefixtures("default_configuration")


@pytest.fixture
def checkpoints(monkeypatch):
    """What each checkpoint of the runs of a test was given: metrics and arrays."""
    saved = []

    def save(folder, record, metrics, arrays):
        whole = lambda x: np.array(x) if isinstance(x, jax.Array) else x
        saved.append((metrics, jax.tree.map(whole, arrays)))
        write(folder, record, metrics, arrays)

    write = loop.run_folder.save
    monkeypatch.setattr(loop.run_folder, "save", save)
    return saved


def test_what_is_stored_are_the_solutions_and_from_them_nothing_is_left_to_solve(
    data, tmp_path, checkpoints
):
    # Nothing is learned, so that the solutions stay what they are.
    task = make_task(optimiser=optax.sgd(0.0), warm_start=True)
    metrics, model, _ = train(task, data, tmp_path / "run")
    cold, _, warm = (arrays[-1] for _, arrays in checkpoints)
    assert cold.shape == warm.shape == (40, 8) and not np.any(cold)

    images, _ = data.normalise(data.train, np.arange(40))
    features = images.reshape(40, 4) @ np.asarray(model.encoder.weight).T
    weight, z = np.asarray(model.layer.cell.weight), np.zeros((40, 8))
    for _ in range(300):
        z = np.tanh(z @ weight.T + features)
    assert np.allclose(warm, z, atol=1e-3)
    assert metrics[0]["evaluations"] > 5 and metrics[1]["evaluations"] < 2


def test_only_the_first_epoch_is_as_without_and_the_next_ones_are_shorter(
    data, tmp_path, checkpoints
):
    lines = []
    for warm in (False, True):
        task = make_task(warm_start=warm)
        metrics, _, _ = train(task, data, tmp_path / str(warm), epochs=3)
        lines.append([{**line, "seconds": None} for line in metrics])
    cold, warm = lines
    assert cold[0] == warm[0]
    assert all(b["evaluations"] < a["evaluations"] for a, b in zip(cold[1:], warm[1:]))
    assert abs(cold[-1]["loss"] - warm[-1]["loss"]) < 1e-3
    # What is off is not in the checkpoint.
    assert checkpoints[-1][1][3] is not None and checkpoints[3][1][3] is None
    header = (tmp_path / "False" / "checkpoint.eqx").read_bytes().split(b"\n")[1]
    arrays = json.loads(header)["arrays"]
    assert not any(name.startswith("[3]") for name in arrays)


@pytest.mark.parametrize(
    "precision", slow_but(["float32", "bfloat16", "float64"], "float32")
)
def test_a_resumed_run_starts_from_the_same_solutions(
    data, tmp_path, monkeypatch, checkpoints, precision
):
    options.start(options.Options(precision=precision))
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    run = lambda folder: train(
        make_task(warm_start=True), data, folder, epochs=3, precision=precision
    )
    run(whole)
    assert checkpoints[-1][1][3].dtype == jnp.dtype(precision)
    run_epoch = loop._epoch

    def stop_in_the_third(task, data, options, folder, epoch, *rest):
        if epoch == 3:
            raise KeyboardInterrupt
        return run_epoch(task, data, options, folder, epoch, *rest)

    monkeypatch.setattr(loop, "_epoch", stop_in_the_third)
    with pytest.raises(KeyboardInterrupt):
        run(stopped)
    monkeypatch.setattr(loop, "_epoch", run_epoch)
    run(stopped)
    assert parameters(stopped) == parameters(whole)


def test_a_store_that_does_not_fit_the_data_is_refused(data, tmp_path):
    task = make_task(warm_start=True)
    train(task, data, tmp_path / "run", epochs=1)
    before = (tmp_path / "run" / "checkpoint.eqx").read_bytes()
    fewer = image_data.Images(data.train.images[:32], data.train.labels[:32])
    data = data._replace(train=fewer)
    with pytest.raises(command_line.UserError, match="stored-solutions 40, not 32"):
        train(task, data, tmp_path / "run", epochs=1)
    assert (tmp_path / "run" / "checkpoint.eqx").read_bytes() == before


def test_a_network_without_a_solution_is_refused():
    with pytest.raises(command_line.UserError, match="needs a network with an impl"):
        warm_start.cold(
            lambda model, state, images, key: classifiers.Output(images, None, {}),
            None,
            None,
            jnp.zeros((2, 3)),
            10,
        )


def test_the_solutions_of_a_batch_are_taken_and_put_by_their_indices():
    states = {"a": jr.normal(jr.key(0), (7, 3)), "b": jr.normal(jr.key(1), (7, 2, 2))}
    before = jax.tree.map(np.asarray, states)
    indices = np.array([5, 0, 3])
    taken = warm_start.take(states, indices)
    new = warm_start.put(states, indices, jax.tree.map(jnp.negative, taken))
    for name in before:
        assert np.array_equal(taken[name], before[name][indices])
        expected = before[name].copy()
        expected[indices] *= -1
        assert np.array_equal(new[name], expected)


def start(folder, *options, devices=1):
    sizes = ("--train-size", "160", "--batch-size", "40", "--epochs", "3")
    command = [sys.executable, _script, *sizes, "--warm-start", "--out", folder]
    flags = f"--xla_force_host_platform_device_count={devices}"
    return subprocess.Popen([*command, *options], env=os.environ | {"XLA_FLAGS": flags})


@pytest.mark.process
def test_a_store_is_the_same_on_several_devices_and_in_several_processes(tmp_path):
    together = "--coordinator", f"localhost:{free_port()}", "--num-processes", "2"
    runs = {
        "one": [()],
        "devices": [()],
        "processes": [(*together, "--process-id", i) for i in "01"],
    }
    lines = {}
    for name, processes in runs.items():
        devices = 2 if name == "devices" else 1
        started = [start(tmp_path / name, *o, devices=devices) for o in processes]
        assert [process.wait(timeout=300) for process in started] == [0] * len(started)
        text = (tmp_path / name / "metrics.jsonl").read_text()
        lines[name] = [json.loads(line) for line in text.splitlines()]
    for name in ("devices", "processes"):
        for one, other in zip(lines["one"], lines[name], strict=True):
            assert other["evaluations"] == pytest.approx(one["evaluations"], rel=1e-2)
            assert other["loss"] == pytest.approx(one["loss"], rel=1e-4)
