"""Runs that lose nothing and never load what is wrong: folders, files, checkpoints."""

import io
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from training import command_line, files, run_folder


pytestmark = pytest.mark.usefixtures("default_configuration")
_examples = pathlib.Path(__file__).parent.parent / "examples"
CONFIG = {"seed": 0, "methods": ["a"]}


def make_tree(key=0, size=50):
    keys = jr.split(jr.key(key))
    return {
        "weight": jr.normal(keys[0], (size, size)),
        "bias": np.asarray(jr.normal(keys[1], (size,)), np.float16),
        "count": jnp.array(3),
    }


def metrics(num_epochs):
    return [{"epoch": i + 1, "loss": 1 / (i + 1)} for i in range(num_epochs)]


def equal(a, b):
    return jax.tree.all(jax.tree.map(np.array_equal, a, b))


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def folder(tmp_path):
    """With a checkpoint after one epoch."""
    path = tmp_path / "run"
    run_folder.save(path, CONFIG, [], make_tree())
    run_folder.save(path, CONFIG, metrics(1), make_tree())
    return path


def refused(folder, config=CONFIG, like=None):
    """The one line with which a checkpoint is refused, and left as it was."""
    before = content(folder)
    with pytest.raises(command_line.UserError) as error:
        run_folder.resume(folder, config, make_tree(1) if like is None else like)
    message = str(error.value)
    assert "\n" not in message and content(folder) == before
    return message


def test_what_was_saved_is_resumed(folder):
    resumed = run_folder.resume(folder, CONFIG, make_tree(1))
    assert resumed is not None
    assert resumed[0] == metrics(1) and equal(resumed[1], make_tree())
    assert {*content(folder)} == {"checkpoint.eqx", "metrics.jsonl"}
    assert run_folder.resume(folder.parent / "new", CONFIG, make_tree(1)) is None
    assert "seed 0, not 1" in refused(folder, CONFIG | {"seed": 1})
    assert "float16[50] where" in refused(folder, like=make_tree(size=49))


class FailingFile(io.FileIO):
    """A disk that fails at a write: from then on, or once; with an error, or without.
    Each write takes at most a thousand bytes."""

    remaining, for_good, silent = 0, True, False

    def write(self, data):
        cls = type(self)
        cls.remaining -= 1
        if cls.remaining == 0 or (cls.remaining < 0 and cls.for_good):
            if cls.silent:
                return min(len(data), 1000)
            raise OSError(28, "No space left on device")
        return super().write(memoryview(data)[:1000])


@pytest.mark.parametrize("silent", [False, True])
@pytest.mark.parametrize("for_good", [False, True])
def test_no_failing_write_harms_the_old_checkpoint(
    folder, monkeypatch, capsys, for_good, silent
):
    class Failing(FailingFile):
        pass

    Failing.for_good, Failing.silent = for_good, silent
    opened = lambda path, mode: io.BufferedWriter(Failing(path, mode.replace("b", "")))
    monkeypatch.setattr(files, "_open_new", lambda path: opened(path, "xb"))
    old = (folder / "checkpoint.eqx").read_bytes()
    k = 0
    while True:
        k += 1
        Failing.remaining = k
        save = lambda: run_folder.save(folder, CONFIG, metrics(2), make_tree(2))
        try:
            command_line.run(save)
        except SystemExit as exit:
            assert exit.code == 2
            error = capsys.readouterr().err
            assert error.count("\n") == 1 and "is left as it was" in error
            assert "No space" in error or "not what is read" in error
            assert (folder / "checkpoint.eqx").read_bytes() == old
            assert not list(folder.glob("*.part"))
        else:
            break
    assert k > 10  # one for each thousand bytes of the arrays
    resumed = run_folder.resume(folder, CONFIG, make_tree(1))
    assert resumed is not None
    assert len(resumed[0]) == 2 and equal(resumed[1], make_tree(2))


@pytest.mark.parametrize("name", ["_open_new", "fsync", "replace", "read"])
def test_no_failing_step_of_a_save_harms_the_old_checkpoint(folder, monkeypatch, name):
    def fail(*args, **kwargs):
        raise OSError(5, "Input/output error")

    old = (folder / "checkpoint.eqx").read_bytes()
    if name == "_open_new":
        monkeypatch.setattr(files, name, fail)
    elif name == "read":
        monkeypatch.setattr(pathlib.Path, "read_bytes", fail)
    else:
        monkeypatch.setattr(os, name, fail)
    with pytest.raises(command_line.UserError, match="Input/output error"):
        run_folder.save(folder, CONFIG, metrics(2), make_tree(2))
    monkeypatch.undo()
    assert (folder / "checkpoint.eqx").read_bytes() == old
    assert not list(folder.glob("*.part"))


def test_any_flipped_bit_is_noticed(folder):
    path = folder / "checkpoint.eqx"
    good = path.read_bytes()
    rng = np.random.default_rng(0)
    places = [*rng.integers(0, len(good), 100), len(good) - 1]
    flips = [(place, rng.integers(8)) for place in places]
    flips += [(place, bit) for place in (0, 63, 64, 65) for bit in range(8)]
    for place, bit in flips:
        bad = bytearray(good)
        bad[place] ^= 1 << bit
        path.write_bytes(bad)
        assert "truncated or corrupt" in refused(folder)
    for bad in (good[:-1], good + b"\0", good[:30], b"", good[66:]):
        path.write_bytes(bad)
        assert "truncated or corrupt" in refused(folder)


def test_arrays_of_another_run_and_swapped_or_transposed_ones_are_refused(
    folder, tmp_path
):
    path = folder / "checkpoint.eqx"
    good = path.read_bytes()
    digest, header, arrays = good.split(b"\n", 2)
    run_folder.save(tmp_path / "other", CONFIG, metrics(1), make_tree(7))
    others = (tmp_path / "other" / "checkpoint.eqx").read_bytes().split(b"\n", 2)[2]
    assert len(others) == len(arrays)
    transposed = arrays.replace(b"'fortran_order': False", b"'fortran_order': True ", 1)
    start = b"\x93NUMPY"
    records = [start + record for record in arrays.split(start)[1:]]
    swapped = b"".join(records[::-1])
    for bad in (others, transposed, swapped):
        assert bad != arrays
        path.write_bytes(b"\n".join([digest, header, bad]))
        assert "digest of its arrays is wrong" in refused(folder)
    null = re.sub(rb'"metrics": \[[^]]*\]', b'"metrics": null', header)
    assert null != header
    path.write_bytes(b"\n".join([digest, null, arrays]))
    assert "digest of its header is wrong" in refused(folder)


@pytest.mark.parametrize(
    "header",
    [None, 1, [], {}, "a", {"config": [], "metrics": [], "arrays": []}]
    + [{"metrics": x} for x in (None, 3, "ab", [1], [{}], {"epoch": 1})]
    + [{"config": []}, {"arrays": None}, {"arrays": [1]}, {"digest": 1}],
)
def test_headers_of_the_wrong_kind_are_refused_in_one_line(folder, header):
    path = folder / "checkpoint.eqx"
    _, good, arrays = path.read_bytes().split(b"\n", 2)
    if isinstance(header, dict) and len(header) == 1:
        header = json.loads(good) | header
    line = json.dumps(header).encode() + b"\n"
    digest = run_folder._digest(line).encode() + b"\n"
    path.write_bytes(digest + line + arrays)
    refused(folder)


def test_a_checkpoint_without_an_end_is_refused_at_once(folder):
    path = folder / "checkpoint.eqx"
    with path.open("r+b") as file:
        file.truncate(2**40)  # A terabyte, of which nothing is on the disk.

    def message():
        start = time.perf_counter()
        with pytest.raises(command_line.UserError) as error:
            run_folder.resume(folder, CONFIG, make_tree(1))
        assert time.perf_counter() - start < 5
        return str(error.value)

    assert "digest of its arrays" in message()
    path.write_bytes(b"")
    with path.open("r+b") as file:
        file.truncate(2**40)
    assert "digest of its header" in message()
    path.unlink()
    os.mkfifo(path)
    assert "no plain file" in message()
    path.unlink()
    path.symlink_to("/dev/zero")
    assert "no plain file" in message()


def test_a_part_that_is_a_link_is_not_followed(folder, tmp_path):
    thesis = tmp_path / "thesis.tex"
    thesis.write_text("years of work")
    for name in ("checkpoint.eqx", "metrics.jsonl"):
        (folder / f"{name}.part").symlink_to(thesis)
    run_folder.save(folder, CONFIG, metrics(2), make_tree(2))
    assert thesis.read_text() == "years of work"
    assert not (folder / "checkpoint.eqx").is_symlink()
    assert {*content(folder)} == {"checkpoint.eqx", "metrics.jsonl"}


def test_a_run_killed_while_it_makes_its_folder_begins_again(tmp_path):
    (tmp_path / "checkpoint.eqx.part").write_bytes(b"a part")
    assert run_folder.resume(tmp_path, CONFIG, make_tree()) is None
    run_folder.save(tmp_path, CONFIG, [], make_tree())
    assert [*content(tmp_path)] == ["checkpoint.eqx"]


def test_a_claimed_folder_is_made_and_what_is_not_used_is_removed(tmp_path):
    folder = tmp_path / "a" / "b"
    with files.claim(folder):
        assert folder.is_dir()
        with files.claim(folder):  # as an experiment does with its runs
            pass
        assert (folder / files.LOCK).exists()
    assert not (tmp_path / "a").exists()
    with files.claim(folder):
        files.write(folder / "results.json", b"{}")
    assert content(folder) == {"results.json": b"{}"}


def test_a_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(command_line.UserError, match="cannot be used"):
        with files.claim(tmp_path / "file" / "run"):
            raise AssertionError
    assert [*content(tmp_path)] == ["file"]


SCRIPTS = [
    path.stem
    for path in _examples.glob("*.py")
    if "def main(" in path.read_text() and path.stem != "collect_results"
]


def test_every_script_is_among_those_that_are_tested():
    assert {"toy_equation", "stiff_ode", "jfb_paper", "stability"} < {*SCRIPTS}
    assert len(SCRIPTS) == 11


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_script_checks_its_folder_before_it_works(
    name, tmp_path, monkeypatch, capsys
):
    module = __import__(name)
    (tmp_path / "file").write_text("")

    def work(*args, **kwargs):
        raise AssertionError("it has begun to work")

    # No array is made, no file is read, before the folder was tried.
    for owner, attribute in (
        (jax, "jit"),
        (jnp, "linspace"),
        (jax.random, "key"),
        (module, "image_data") if hasattr(module, "image_data") else (np, "linspace"),
    ):
        monkeypatch.setattr(owner, attribute, work)
    with pytest.raises(SystemExit) as exit:
        command_line.run(lambda: module.main(["--out", str(tmp_path / "file" / "x")]))
    assert exit.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "cannot be used" in error


HOLDER = """
import pathlib, sys, time
from training import files
with files.claim(pathlib.Path(sys.argv[1])):
    print("claimed", flush=True)
    time.sleep(600)
"""


@pytest.mark.process
def test_of_two_runs_in_a_folder_the_second_is_refused_until_the_first_is_killed(
    tmp_path,
):
    out = tmp_path / "run"
    script = [sys.executable, _examples / "image_classification.py"]
    command = [*script, "--epochs", "1", "--train-size", "100", "--out", out]
    holding = [sys.executable, "-c", HOLDER, out]
    pipe = subprocess.PIPE
    with subprocess.Popen(holding, stdout=pipe, cwd=_examples) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"claimed\n"
        second = subprocess.run(command, capture_output=True, text=True)
        holder.send_signal(signal.SIGKILL)
    assert second.returncode == 2
    assert second.stderr.count("\n") == 1 and "in use by another" in second.stderr
    assert (out / files.LOCK).exists()  # which nobody holds
    subprocess.run(command, check=True)
    assert (out / "checkpoint.eqx").exists()


@pytest.fixture
def two_cores():
    """Which the processes that a test starts will have."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(before)[:2])
    yield
    os.sched_setaffinity(0, before)


def train(name, folder, *options, devices=1):
    flags = f"--xla_force_host_platform_device_count={devices}"
    script = [sys.executable, _examples / f"{name}.py", "--dataset", "digits"]
    options = (*options, "--train-size", "160", "--batch-size", "40", "--out", folder)
    environment = os.environ | {"XLA_FLAGS": flags}
    subprocess.run([*script, *options], check=True, timeout=400, env=environment)
    (metrics,) = folder.rglob("metrics.jsonl")
    return json.loads(metrics.read_text().splitlines()[-1])


@pytest.mark.process
@pytest.mark.parametrize("name", ["image_classification", "jfb_paper"])
def test_double_precision_reaches_the_end(tmp_path, name):
    options = ["--epochs", "2", "--precision", "float64"]
    options += ["--small", "--methods", "jfb"] if name == "jfb_paper" else []
    line = train(name, tmp_path, *options)
    assert 0.5 < line["gradient_cosine"] <= 1


@pytest.mark.process
def test_an_interrupted_run_ends_at_once_with_one_line(tmp_path):
    script = [sys.executable, _examples / "image_classification.py"]
    command = [*script, "--epochs", "1000", "--train-size", "100", "--out", tmp_path]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("epoch")
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=30)
    assert process.returncode == 130
    last = error.replace("\r", "\n").splitlines()[-1]
    assert last.endswith("Interrupted. The same command resumes the run.")
    assert "Traceback" not in error


@pytest.mark.process
def test_many_devices_on_two_cores_reach_the_end(tmp_path, two_cores):
    options = "--epochs", "1"
    line = train("image_classification", tmp_path / "a", *options, devices=8)
    assert 0.5 < line["gradient_cosine"] <= 1
    options += "--small", "--networks", "0.5"
    line = train("robust_resnet", tmp_path / "b", *options, devices=8)
    assert line["evaluations"] > 6
