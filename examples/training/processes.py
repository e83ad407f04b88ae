"""Processes that train together, of which none outlives another that failed.

Each command that the user starts becomes a supervisor: it runs the same command again
as its child, which trains. The supervisors are connected to that of process 0. If a
child or a supervisor ends that had not finished, all of them end, with a line that says
which it was.
"""

import contextlib
import json
import os
import queue
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from typing import Any, NamedTuple, NoReturn

import jax

from .command_line import UserError


_CHILD = "EQIMPLICIT_CHILD"
# Seconds: for all processes to come, and for the news of what made a child fail.
_PATIENCE, _NEWS = 45.0, 5.0


class Ended(NamedTuple):
    """That a process ended, with its exit status, or None if its machine is silent."""

    process: int
    status: int | None

    def __str__(self):
        if self.status is None:
            return f"process {self.process} is gone"
        if self.status < 0:
            name = signal.Signals(-self.status).name
            return f"process {self.process} was ended by {name}"
        return (
            f"process {self.process} has ended with status {self.status}, and says why"
        )


def join(coordinator: str | None, num_processes: int, process_id: int) -> None:
    """Joins the processes that train together, if there are several. To be called
    before JAX is used. In a supervisor it does not return.

    - `coordinator`: `HOST:PORT`, where process 0 can be reached by the others.
    """
    if num_processes == 1 and coordinator is None:
        return
    if coordinator is None:
        raise UserError("--num-processes needs --coordinator HOST:PORT")
    if not 0 <= process_id < num_processes:
        raise UserError(
            f"--process-id must be from 0 to {num_processes - 1}, not {process_id}"
        )
    host, _, port = coordinator.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not (_is_host(host) and len(port) < 6 and port.isdecimal()):
        raise UserError(f"--coordinator must be HOST:PORT, not {coordinator}")
    if _CHILD in os.environ:
        service_port, alive, log = map(int, os.environ[_CHILD].split())
        _prepare_child(alive, log)
        jax.distributed.initialize(f"{host}:{service_port}", num_processes, process_id)
    else:
        gather = _gather if process_id == 0 else _reach
        peers, service_port = gather(host, int(port), num_processes, process_id)
        sys.exit(_supervise(peers, service_port, process_id))


def _is_host(name):
    try:
        return bool(name.encode("idna"))
    except UnicodeError:
        return False


# Supervisors.


def _gather(host, port, num_processes, process_id):
    """Process 0: waits for the others, and tells them the port that JAX will use."""
    end = time.monotonic() + _PATIENCE
    peers = {}
    try:
        server = socket.create_server((host, port), family=_family(host, port))
    except (OSError, OverflowError) as error:
        raise UserError(
            f"process 0 cannot listen at --coordinator {host}:{port} ({error})"
        ) from error
    with server, contextlib.ExitStack() as opened:
        while len(peers) < num_processes - 1:
            remaining = max(0.1, end - time.monotonic())
            server.settimeout(remaining)
            try:
                peer = opened.enter_context(server.accept()[0])
                peer.settimeout(min(remaining, _NEWS))
            except TimeoutError as error:
                missing = sorted({*range(1, num_processes)} - {*peers})
                raise UserError(
                    f"process {', '.join(map(str, missing))} did not come to "
                    f"{host}:{port} within {_PATIENCE:.0f} seconds"
                ) from error
            try:
                with peer.makefile() as lines:
                    number = int(lines.readline(10))
            except (OSError, ValueError):
                continue  # Something else that looked for an open port.
            if number in peers or not 0 < number < num_processes:
                raise UserError(
                    f"two processes have --process-id {number}, or it is not below "
                    f"--num-processes {num_processes} of process 0"
                )
            peers[number] = _keep(peer)
        opened.pop_all()  # And with them those that were no processes, till the end.
    with socket.create_server((host, 0), family=_family(host, 0)) as free:
        service_port = free.getsockname()[1]
    for peer in peers.values():
        with contextlib.suppress(OSError):  # Its end will be noticed.
            peer.sendall(f"{service_port}\n".encode())
    return peers, service_port


def _reach(host, port, num_processes, process_id):
    """The others: connects to process 0 as soon as it is there."""
    end = time.monotonic() + _PATIENCE
    while True:
        try:
            peer = socket.create_connection((host, port), timeout=_NEWS)
            break
        except (OSError, OverflowError) as error:
            if time.monotonic() > end or isinstance(error, socket.gaierror):
                raise UserError(
                    f"process 0 cannot be reached at --coordinator {host}:{port} "
                    f"({error})"
                ) from error
            time.sleep(0.2)
    peer.settimeout(_PATIENCE + _NEWS)
    line = b""
    with contextlib.suppress(OSError, ValueError):
        peer.sendall(f"{process_id}\n".encode())
        while len(line) < 10 and (byte := peer.recv(1)):
            line += byte
            if byte == b"\n":
                return {0: _keep(peer)}, int(line)
    peer.close()
    raise UserError(
        f"process 0 ended before all had come, and says why; or what listens at {host}:"
        f"{port} is something else"
    )


def _family(host, port):
    return socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]


def _keep(connection):
    """A connection whose end is noticed within a minute if the other machine stops."""
    connection.settimeout(None)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in ("TCP_KEEPIDLE", 20), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", 2):
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    return connection


def _supervise(peers, service_port, process_id):
    """Runs the child, and returns the exit status."""
    news: queue.Queue[Ended] = queue.Queue()
    with tempfile.TemporaryFile() as log:
        child, alive = _start_child(service_port, log)
        signal.signal(signal.SIGINT, lambda number, frame: child.send_signal(number))
        threads = [(_wait, (process_id, child, news))]
        threads += [(_listen, (number, peer, news)) for number, peer in peers.items()]
        for target, args in threads:
            threading.Thread(target=target, args=args, daemon=True).start()
        ended = _first_failure(news, peers, process_id)
        _tell(peers, ended)
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(timeout=1)  # It may be saying that it made the same mistake.
        child.kill()
        os.close(alive)
        if child.wait() > 1:
            return child.returncode
        if ended.process != process_id:
            raise UserError(
                f"{ended}. The same commands, for all processes, resume the run"
            )
        if child.returncode < 0:
            log.seek(0)
            sys.stderr.write(log.read().decode(errors="replace"))
            raise UserError(f"{ended}. The same commands resume the run")
        return child.returncode


def _start_child(service_port, log):
    # The child reads from a pipe that nobody writes to, and which is closed with this
    # process, however that ends.
    reader, alive = os.pipe()
    child = subprocess.Popen(
        [sys.executable, *sys.orig_argv[1:]],
        env=os.environ | {_CHILD: f"{service_port} {reader} {log.fileno()}"},
        pass_fds=(reader, log.fileno()),
        start_new_session=True,  # Interrupts come through this process.
    )
    os.close(reader)
    return child, alive


def _wait(process_id, child, news):
    news.put(Ended(process_id, child.wait()))


def _listen(number, peer, news):
    with contextlib.suppress(OSError, ValueError), peer.makefile() as lines:
        for line in lines:
            news.put(Ended(*json.loads(line)))
    news.put(Ended(number, None))


def _tell(peers, ended):
    line = json.dumps(ended).encode() + b"\n"
    for peer in peers.values():
        with contextlib.suppress(OSError):
            peer.sendall(line)


def _first_failure(news, peers, process_id) -> Ended:
    """Waits until this process has finished, or until one has failed."""
    finished = set()
    while True:
        ended = news.get()
        if ended.process in finished:
            continue
        if ended.status != 0:
            break
        finished.add(ended.process)
        if ended.process == process_id:
            return ended
        _tell({k: peer for k, peer in peers.items() if k != ended.process}, ended)
    # JAX aborts what has lost another process, whose own end may be heard of later.
    if ended in ((process_id, -signal.SIGABRT), (process_id, 1)):
        with contextlib.suppress(queue.Empty):
            while (other := news.get(timeout=_NEWS)).process in finished:
                pass
            return other
    return ended


# Children.


def _prepare_child(alive, log):
    threading.Thread(target=_end_with, args=(alive,), daemon=True).start()
    # What JAX writes by itself, much of it when it loses a process, is shown only if
    # nothing else explains the end.
    sys.stdout, sys.stderr = (os.fdopen(os.dup(n), "w", buffering=1) for n in (1, 2))
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.excepthook = _end_by_exception


def _end_with(alive):
    os.read(alive, 1)
    os._exit(1)


def _end_by_exception(kind: Any, error: BaseException, trace: Any) -> NoReturn:
    if isinstance(error, jax.errors.JaxRuntimeError):
        time.sleep(2 * _NEWS)  # Another process has ended, most likely.
    traceback.print_exception(kind, error, trace)
    sys.stderr.flush()
    # JAX would wait for the others, which wait for this one.
    os._exit(1)
