"""The image classification example: reading data, mistakes, resuming, and learning."""

import gzip
import hashlib
import json
import pathlib
import struct
import subprocess
import sys

import equinox as eqx
import image_classification
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.io
from training import classifiers, command_line, image_data, loop


_root = pathlib.Path(__file__).parent.parent
pytestmark = pytest.mark.usefixtures("default_configuration")


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError("no network in tests")

    monkeypatch.setattr(image_data.pooch, "retrieve", refuse)


def run(*options):
    command_line.run(lambda: image_classification.main([str(o) for o in options]))


def fails(capsys, *options):
    """The one line that a mistake of the user's gives."""
    with pytest.raises(SystemExit) as exit:
        run(*options)
    assert exit.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "Traceback" not in error
    return error


def idx(array):
    header = struct.pack(">HBB", 0, 8, array.ndim)
    return gzip.compress(
        header + struct.pack(f">{array.ndim}I", *array.shape) + bytes(array)
    )


def published(content):
    checksum = "sha256:" + hashlib.sha256(content).hexdigest()
    return image_data.File(len(content), checksum)


@pytest.fixture
def mnist(tmp_path, monkeypatch):
    """A made-up set of 20 and 4 images in MNIST's format."""
    rng = np.random.default_rng(0)
    arrays = [
        rng.integers(0, 256, (20, 28, 28), np.uint8),
        rng.integers(0, 10, 20, np.uint8),
        rng.integers(0, 256, (4, 28, 28), np.uint8),
        rng.integers(0, 10, 4, np.uint8),
    ]
    folder = tmp_path / "data" / "mnist"
    folder.mkdir(parents=True)
    files = {}
    for name, array in zip(image_data.SOURCES["mnist"].files, arrays):
        (folder / name).write_bytes(idx(array))
        files[name] = published((folder / name).read_bytes())
    source = image_data.SOURCES["mnist"]._replace(files=files)
    monkeypatch.setitem(image_data.SOURCES, "mnist", source)
    return folder, arrays


def test_mnist_files_are_read_as_published(mnist):
    folder, arrays = mnist
    data = image_data.load("mnist", folder.parent)
    assert np.array_equal(data.train.images[..., 0], arrays[0])
    assert np.array_equal(data.train.labels, arrays[1])
    assert np.array_equal(data.test.images[..., 0], arrays[2])
    images, labels = data.normalise(data.train, np.arange(20))
    assert abs(images.mean()) < 1e-6 and abs(images.std() - 1) < 1e-6
    assert np.array_equal(labels, arrays[1])
    # The folder of the files themselves will do as well.
    assert np.array_equal(image_data.load("mnist", folder).test.labels, arrays[3])


def test_cifar10_files_are_read_as_published(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    folder = tmp_path / "cifar-10-batches-bin"
    folder.mkdir()
    files, images = {}, []
    for name in image_data.SOURCES["cifar10"].files:
        image = rng.integers(0, 256, (2, 32, 32, 3), np.uint8)
        planes = image.transpose(0, 3, 1, 2).reshape(2, -1)
        rows = np.concatenate([np.array([[3], [7]], np.uint8), planes], 1)
        (folder / name).write_bytes(rows.tobytes())
        files[name] = published(rows.tobytes())
        images.append(image)
    source = image_data.SOURCES["cifar10"]._replace(files=files)
    monkeypatch.setitem(image_data.SOURCES, "cifar10", source)
    data = image_data.load("cifar10", tmp_path)
    assert np.array_equal(data.train.images, np.concatenate(images[:-1]))
    assert np.array_equal(data.test.images, images[-1])
    assert data.test.labels.tolist() == [3, 7]


def test_svhn_files_are_read_as_published(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (2, 3, 32, 32, 3), np.uint8)
    files = {}
    for name, some in zip(image_data.SOURCES["svhn"].files, images):
        labels = np.array([[10], [1], [9]], np.uint8)
        content = {"X": some.transpose(1, 2, 3, 0), "y": labels}
        scipy.io.savemat(tmp_path / name, content, do_compression=True)
        files[name] = published((tmp_path / name).read_bytes())
    source = image_data.SOURCES["svhn"]._replace(files=files)
    monkeypatch.setitem(image_data.SOURCES, "svhn", source)
    data = image_data.load("svhn", tmp_path)
    assert np.array_equal(data.train.images, images[0])
    assert np.array_equal(data.test.images, images[1])
    assert data.test.labels.tolist() == [0, 1, 9]


def test_digits_are_split_without_overlap():
    data = image_data.load("digits", pathlib.Path("nowhere"))
    train, test = (
        {image.tobytes() for image in part.images} for part in (data.train, data.test)
    )
    assert len(data.train.labels) == 1437 and len(data.test.labels) == 360
    assert not train & test
    assert data.train.images.max() == 16


def test_missing_files_are_named_with_a_remedy(capsys, tmp_path):
    out = tmp_path / "run"
    error = fails(
        capsys, "--dataset", "mnist", "--data-dir", tmp_path / "data", "--out", out
    )
    assert "train-images-idx3-ubyte.gz is missing" in error and "--data-dir" in error
    assert not out.exists()


@pytest.mark.parametrize("damage", ["truncated", "changed", "empty", "a folder"])
def test_damaged_files_are_named_and_left_alone(capsys, mnist, damage):
    folder, _ = mnist
    path = folder / "t10k-images-idx3-ubyte.gz"
    content = path.read_bytes()
    broken = {
        "truncated": content[:-5],
        "changed": content[:-9] + bytes(9),
        "empty": b"",
    }.get(damage)
    path.unlink()
    if broken is None:
        path.mkdir()
    else:
        path.write_bytes(broken)
    error = fails(capsys, "--dataset", "mnist", "--data-dir", folder.parent)
    assert str(path) in error
    assert broken is None or path.read_bytes() == broken


@pytest.mark.parametrize(
    "options, message",
    [
        (["--epochs", 0], "--epochs must be at least 1, not 0"),
        (["--batch-size", 2000], "--batch-size must be at most 1437"),
        (["--learning-rate", -1], "--learning-rate must be a positive number"),
        (["--rtol", -1], "--rtol must be a number, not negative"),
        (["--rtol", 0, "--atol", 0], "--rtol and --atol must not both be zero"),
        (["--damping", "nan"], "--damping must be a positive number"),
        (["--warm-start", "--adjoint", "unrolled"], "--warm-start leaves few steps"),
        (["--train-size", 10**6], "has only 1437 training images"),
    ],
)
def test_values_out_of_range_are_refused(capsys, tmp_path, options, message):
    assert message in fails(capsys, *options, "--out", tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("options", [["--adjoint", "exact"], ["--epoch", "3"]])
def test_misspelt_options_are_refused(capsys, options):
    with pytest.raises(SystemExit) as exit:
        run(*options)
    assert exit.value.code == 2
    assert options[0] in capsys.readouterr().err


def test_help_names_every_option(capsys):
    with pytest.raises(SystemExit) as exit:
        run("--help")
    assert exit.value.code == 0
    text = capsys.readouterr().out
    for field in image_classification.dataclasses.fields(image_classification.Config):
        assert "--" + field.name.replace("_", "-") in text


SHORT = ("--epochs", 2, "--train-size", 200, "--batch-size", 40)


def arrays_of(folder):
    with (folder / "checkpoint.eqx").open("rb") as file:
        file.readline()
        header = json.loads(file.readline())
        return [line["test_accuracy"] for line in header["metrics"]], file.read()


@pytest.mark.slow
def test_a_resumed_run_ends_bit_for_bit_as_one_that_was_never_stopped(
    capsys, tmp_path, monkeypatch
):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    run(*SHORT, "--out", whole)
    run_epoch = loop._epoch

    def stop_in_the_second(task, data, options, folder, epoch, *rest):
        if epoch == 2:
            raise KeyboardInterrupt
        return run_epoch(task, data, options, folder, epoch, *rest)

    monkeypatch.setattr(loop, "_epoch", stop_in_the_second)
    with pytest.raises(SystemExit) as exit:
        run(*SHORT, "--out", stopped)
    assert exit.value.code == 130
    assert len(arrays_of(stopped)[0]) == 1
    monkeypatch.setattr(loop, "_epoch", run_epoch)
    capsys.readouterr()
    run(*SHORT, "--out", stopped)
    assert "resuming after epoch 1" in capsys.readouterr().out
    assert arrays_of(stopped) == arrays_of(whole)

    lines = (stopped / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in lines] == [1, 2]
    assert (stopped / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert not list(stopped.glob("*.part"))

    # A finished run says so, and another configuration is refused.
    before = arrays_of(whole)
    run(*SHORT, "--out", whole)
    assert "is finished" in capsys.readouterr().out
    error = fails(capsys, *SHORT, "--out", whole, "--seed", 1)
    assert "holds a run with seed 0, not 1" in error
    checkpoint = whole / "checkpoint.eqx"
    content = checkpoint.read_bytes()
    assert arrays_of(whole) == before

    checkpoint.write_bytes(content[:50])
    assert "truncated or corrupt" in fails(capsys, *SHORT, "--out", whole)
    assert checkpoint.read_bytes() == content[:50]


def test_a_folder_with_other_files_is_refused(capsys, tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    assert "holds no run" in fails(capsys, "--out", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
    assert "cannot be used" in fails(capsys, "--out", tmp_path / "thesis.tex" / "run")


@pytest.mark.slow
def test_statistics_of_the_batch_norm_are_trained_and_saved(mnist, tmp_path):
    folder, _ = mnist
    out = tmp_path / "run"
    options = ("--dataset", "mnist", "--data-dir", folder.parent, "--epochs", 1)
    run(*options, "--batch-size", 10, "--solver", "picard", "--out", out)
    (line,) = (json.loads(x) for x in (out / "metrics.jsonl").read_text().splitlines())
    assert 2 < line["evaluations"] <= 50 and 0 <= line["test_accuracy"] <= 1
    config = image_classification.Config(dataset="mnist")
    model, state = image_classification.make_model(config, (28, 28, 1))
    images, labels = jnp.ones((10, 28, 28, 1)), jnp.zeros(10, jnp.int32)
    old = jax.tree.leaves(state)
    optimiser = image_classification.make_optimiser(1e-3, 1)
    opt_state = optimiser.init(eqx.filter(model, eqx.is_inexact_array))
    task = loop.Task(None, None, classifiers.forward, optimiser)
    (_, state, _), *_ = loop.train_step(
        (model, state, opt_state),
        images,
        labels,
        jax.random.key(0),
        task,
        loop.as_it_is,
        "bfloat16",
    )
    new = jax.tree.leaves(state)
    assert all(a.dtype == b.dtype == np.float32 for a, b in zip(old, new))
    assert not any(np.array_equal(a, b) for a, b in zip(old, new))


@pytest.mark.process
def test_every_adjoint_learns_the_digits(tmp_path):
    accuracies = {}
    for adjoint in ("jfb", "neumann", "phantom", "implicit", "unrolled"):
        solver = "picard" if adjoint == "unrolled" else "anderson"
        script = [sys.executable, str(_root / "examples" / "image_classification.py")]
        options = ["--adjoint", adjoint, "--solver", solver]
        out = tmp_path / adjoint
        subprocess.run([*script, *options, "--out", out], check=True)
        last = json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])
        accuracies[adjoint] = last["test_accuracy"]
        assert last["gradient_cosine"] > 0.5
    assert min(accuracies.values()) >= 0.965, accuracies
