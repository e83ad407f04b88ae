"""Processes that train together: they reach what one process does, or end together."""

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from training import command_line, processes


_script = pathlib.Path(__file__).parent.parent / "examples" / "image_classification.py"


def free_port():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def message(coordinator, num_processes=2, process_id=1):
    with pytest.raises(command_line.UserError) as error:
        processes.join(coordinator, num_processes, process_id)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    "coordinator",
    ["localhost", "a:", ":80", "a:b", "a..b:80", f"{'a' * 70}.com:80", "a:123456"],
)
def test_a_coordinator_that_cannot_be_parsed_is_refused(coordinator):
    assert "must be HOST:PORT" in message(coordinator)


def test_processes_that_cannot_be_are_refused():
    assert "needs --coordinator" in message(None)
    assert "from 0 to 1, not 2" in message("localhost:80", process_id=2)


def test_a_coordinator_that_cannot_be_reached_is_named(monkeypatch):
    monkeypatch.setattr(processes, "_PATIENCE", 1.0)
    start = time.perf_counter()
    address = f"localhost:{free_port()}"
    assert f"process 0 cannot be reached at --coordinator {address}" in message(address)
    assert "cannot be reached" in message("nowhere.invalid:1234")
    assert "process 1 did not come" in message(address, process_id=0)
    assert "cannot listen at" in message("192.0.2.1:1234", process_id=0)
    assert time.perf_counter() - start < 20
    assert processes._PATIENCE < 60


@pytest.mark.parametrize("banner", [b"", b"SSH-2.0-OpenSSH\r\n"])
def test_another_service_at_the_port_is_not_waited_for(monkeypatch, banner):
    monkeypatch.setattr(processes, "_PATIENCE", 0.5)
    monkeypatch.setattr(processes, "_NEWS", 0.5)
    with socket.create_server(("localhost", 0)) as server:
        port = server.getsockname()[1]

        def serve():
            peer, _ = server.accept()
            with peer:
                peer.sendall(banner)
                time.sleep(3)

        service = threading.Thread(target=serve)
        service.start()
        assert "something else" in message(f"localhost:{port}")
        service.join()


def gather(port, num_processes, results):
    try:
        results[0] = processes._gather("localhost", port, num_processes, 0)
    except command_line.UserError as error:
        results[0] = str(error)


def test_process_0_waits_for_each_and_refuses_two_of_a_number(monkeypatch):
    monkeypatch.setattr(processes, "_PATIENCE", 20.0)
    for numbers, expected in (((2, 1), None), ((1, 1), "two processes have")):
        port, results = free_port(), {}
        waiting = threading.Thread(target=gather, args=(port, 3, results))
        waiting.start()

        def come(number, port=port, results=results):
            try:
                results[f"as {number}"] = processes._reach("localhost", port, 3, number)
            except command_line.UserError:
                pass

        others = [threading.Thread(target=come, args=(n,)) for n in numbers]
        for other in others:
            other.start()
        for thread in (waiting, *others):
            thread.join(timeout=30)
        if expected is None:
            peers, service_port = results[0]
            assert {*peers} == {1, 2}
            for number in numbers:
                (own, port_there) = results[f"as {number}"]
                assert {*own} == {0} and port_there == service_port
                own[0].close()
            for peer in peers.values():
                peer.close()
        else:
            assert expected in results[0]


def start(folder, num_processes=2, of_the_second=(), **options):
    """Two supervisors, whose children train until they are ended."""
    address = f"localhost:{free_port()}"
    settings = {"epochs": 1000, "train_size": 200, "batch_size": 20, **options}
    command = [sys.executable, _script, "--solver", "picard", "--out", folder]
    for name, value in settings.items():
        command += ["--" + name.replace("_", "-"), str(value)]
    # Without the settings of the tests, which a user does not have.
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    return [
        subprocess.Popen(
            [
                *command,
                *("--coordinator", address, "--num-processes", str(num_processes)),
                *("--process-id", str(i)),
                *(of_the_second if i == 1 else ()),
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for i in range(num_processes)
    ]


def wait_for_an_epoch(folder, together):
    end = time.monotonic() + 200
    while not (folder / "metrics.jsonl").exists():
        assert time.monotonic() < end
        assert all(process.poll() is None for process in together)
        time.sleep(0.2)


def child_of(process):
    path = f"/proc/{process.pid}/task/{process.pid}/children"
    (child,) = pathlib.Path(path).read_text().split()
    return int(child)


def is_alive(pid):
    try:
        return "zombie" not in pathlib.Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def last_line(process, seconds=60):
    """Of what it says, when it has ended, which it does in a minute."""
    _, error = process.communicate(timeout=seconds)
    lines = [line for line in error.replace("\r", "\n").split("\n") if line.strip()]
    # The bar of the epoch that was running, and one line.
    said = [line for line in lines if not line.startswith("epoch")]
    assert len(said) <= 1, error
    return said[0] if said else ""


@pytest.mark.process
@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("part", ["child", "supervisor"])
def test_when_one_dies_the_other_ends_and_says_which(tmp_path, victim, part):
    folder = tmp_path / "run"
    together = start(folder)
    wait_for_an_epoch(folder, together)
    children = [child_of(process) for process in together]
    victims = {"child": children[victim], "supervisor": together[victim].pid}
    os.kill(victims[part], signal.SIGKILL)
    other = together[1 - victim]
    said = last_line(other)
    assert said.startswith(f"error: process {victim} ") and "resume" in said
    assert other.returncode == 2
    assert together[victim].wait(timeout=60) != 0
    together[victim].communicate()
    end = time.monotonic() + 10
    while any(map(is_alive, children)):
        assert time.monotonic() < end
        time.sleep(0.1)


@pytest.mark.process
def test_a_mistake_of_one_ends_both_and_an_interrupted_run_is_resumed(tmp_path):
    folder = tmp_path / "run"
    together = start(folder, batch_size=21)
    said = [last_line(process, 120) for process in together]
    # The other may come to it as well.
    assert any("--batch-size must be" in line for line in said)
    assert all("--batch-size" in line or "has ended with" in line for line in said)
    assert [process.returncode for process in together] == [2, 2]

    together = start(folder)
    wait_for_an_epoch(folder, together)
    together[0].send_signal(signal.SIGINT)
    assert "resumes the run" in last_line(together[0])
    assert together[0].returncode == 130
    assert "process 0 has ended with status 130" in last_line(together[1])
    with (folder / "checkpoint.eqx").open("rb") as file:
        file.readline()
        finished = len(json.loads(file.readline())["metrics"])
    together = start(folder)
    output = together[0].stdout
    assert output is not None
    line = output.readline()
    assert f"resuming after epoch {finished}" in line
    for process in together:
        process.kill()
        process.communicate()


@pytest.mark.process
def test_processes_with_other_options_are_refused(tmp_path):
    folder = tmp_path / "run"
    together = start(folder, of_the_second=("--seed", "5"))
    said = [last_line(process, 120) for process in together]
    assert any("do not agree on their options" in line for line in said)
    assert [process.returncode for process in together] == [2, 2]
    assert not (folder / "checkpoint.eqx").exists()


@pytest.mark.process
def test_two_processes_train_as_one_does(tmp_path):
    together = start(tmp_path / "two", epochs=2)
    assert [process.wait(timeout=300) for process in together] == [0, 0]
    for process in together:
        process.communicate()
    (alone,) = start(tmp_path / "one", epochs=2, num_processes=1)
    assert alone.wait(timeout=300) == 0
    alone.communicate()
    one, two = (
        json.loads((tmp_path / name / "metrics.jsonl").read_text().splitlines()[-1])
        for name in ("one", "two")
    )
    assert two["loss"] == pytest.approx(one["loss"], rel=1e-3)
    # The same network, and so the same parameters, to rounding.
    one, two = (load(tmp_path / name) for name in ("one", "two"))
    assert len(one) == len(two) > 5
    for a, b in zip(one, two):
        assert np.allclose(a, b, rtol=1e-2, atol=1e-4)


def load(folder):
    """The floating arrays of a checkpoint."""
    with (folder / "checkpoint.eqx").open("rb") as file:
        file.readline()
        header = json.loads(file.readline())
        arrays = [np.load(file) for _ in header["arrays"]]
    return [x for x in arrays if np.issubdtype(x.dtype, np.floating)]
