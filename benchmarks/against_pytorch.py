"""Times a training step of the JFB paper's MNIST network against PyTorch.

The same network, batch, optimiser (Adam) and number of Picard iterations in both, on
the CPU: a forward solve that measures its residual at each step (and never meets the
tolerance, so that the number of steps is fixed), one attached application, and the
update. Both start from the same parameters, and their losses are compared first. They
take turns of several steps, as in training (a step after a pause is slower), so that
other work on the machine slows both down alike.

PyTorch runs in a process of its own, since it may live in another environment:

    python benchmarks/against_pytorch.py --torch-python ~/torch/bin/python

Without PyTorch it says so and times nothing. PyTorch is timed with its default memory
format, and with the channels last as in our network.
"""

import argparse
import functools as ft
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any


NUM_STEPS, BATCH, LEARNING_RATE = 10, 100, 1e-4
STEPS_A_TURN = 8
TOLERANCE = 1e-15  # never met


def torch_side(data, device="cpu"):
    """The loss without drop-out, and functions that take a step, by memory format."""
    import torch  # pyright: ignore[reportMissingImports]
    import torch.nn as nn  # pyright: ignore[reportMissingImports]
    import torch.nn.functional as F  # pyright: ignore[reportMissingImports]

    leaky = ft.partial(F.leaky_relu, negative_slope=0.1)

    def conv(name, padding=1):
        weight = torch.tensor(data[f"{name}.weight"]).permute(3, 2, 0, 1)
        layer = nn.Conv2d(weight.shape[1], weight.shape[0], 3, padding=padding)
        with torch.no_grad():
            layer.weight.copy_(weight)
            layer.bias.copy_(torch.tensor(data[f"{name}.bias"]))
        return layer

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = nn.ModuleList(conv(f"encoder.{i}") for i in range(2))
            self.encoder_norms = nn.ModuleList(nn.BatchNorm2d(c) for c in (16, 32))
            self.cell = nn.ModuleList(conv(f"cell.{i}") for i in range(4))
            self.cell_norms = nn.ModuleList(
                nn.BatchNorm2d(32, affine=False) for _ in range(2)
            )
            self.head = conv("head", padding=0)
            self.linear = nn.Linear(784, 10, bias=False)
            # From (height, width, channel) to (channel, height, width).
            weight = torch.tensor(data["linear"]).reshape(7, 7, 16, 10)
            with torch.no_grad():
                self.linear.weight.copy_(weight.permute(3, 2, 0, 1).reshape(10, -1))

        def apply_cell(self, z, x):
            w = z + x
            for i, norm in enumerate(self.cell_norms):
                hidden = leaky(self.cell[2 * i](w))
                w = norm(w + leaky(leaky(self.cell[2 * i + 1](hidden))))
            return 0.5 * w

        def forward(self, d, drop=True):
            x = leaky(self.encoder_norms[0](self.encoder[0](d)))
            x = leaky(self.encoder_norms[1](self.encoder[1](F.max_pool2d(x, 3))))
            with torch.no_grad():
                z = torch.zeros_like(x)
                for _ in range(NUM_STEPS):
                    previous, z = z, self.apply_cell(z, x)
                    if (z - previous).abs().max() <= TOLERANCE:
                        break
            y = leaky(self.head(self.apply_cell(z, x)))
            return self.linear(F.dropout2d(y, 0.2, training=drop).flatten(1))

    formats = {
        "channels first": torch.contiguous_format,
        "channels last": torch.channels_last,
    }
    labels = torch.tensor(data["labels"]).long().to(device)
    images = torch.tensor(data["images"]).permute(0, 3, 1, 2).contiguous().to(device)
    networks = {k: Network().to(device, memory_format=f) for k, f in formats.items()}
    optimisers = {
        k: torch.optim.Adam(n.parameters(), lr=LEARNING_RATE)
        for k, n in networks.items()
    }
    inputs = {k: images.contiguous(memory_format=f) for k, f in formats.items()}

    def step(name):
        optimisers[name].zero_grad()
        F.cross_entropy(networks[name](inputs[name]), labels).backward()
        optimisers[name].step()

    def loss():
        logits = networks["channels first"](images, drop=False)
        return F.cross_entropy(logits, labels).item()

    return loss(), {name: ft.partial(step, name) for name in formats}


def torch_worker(file, threads):
    """Writes the version and the loss, then reads the name of a memory format a line,
    takes a step with it and writes the seconds it took.
    """
    import numpy as np
    import torch  # pyright: ignore[reportMissingImports]

    torch.set_num_threads(threads)
    loss, steps = torch_side(np.load(file))
    print(json.dumps([torch.__version__, loss]), flush=True)
    for line in sys.stdin:
        start = time.perf_counter()
        steps[line.strip()]()
        print(json.dumps(time.perf_counter() - start), flush=True)


def jax_side():
    """The data for the worker, the loss without drop-out, and a function that takes a
    step and returns the seconds it took.
    """
    import equinox as eqx
    import jax
    import jax.numpy as jnp
    import jax.random as jr
    import numpy as np
    import optax

    import eqimplicit as eqi
    from eqimplicit import models

    layer = ft.partial(
        eqi.DEQ,
        solver=eqi.Picard(rtol=0.0, atol=TOLERANCE),
        adjoint=eqi.JFBAdjoint(),
        max_steps=NUM_STEPS,
    )
    make = eqx.nn.make_with_state(models.jfb_mnist)
    net: Any
    net, state = make(layer=layer, key=jr.key(0))
    images = jr.normal(jr.key(1), (BATCH, 28, 28, 1))
    labels = jr.randint(jr.key(2), (BATCH,), 0, 10)
    convs = {f"encoder.{i}": c for i, c in enumerate(net.encoder.convs)}
    in_cell = [c for block in net.layer.cell.blocks for c in block.convs]
    convs |= {f"cell.{i}": c for i, c in enumerate(in_cell)} | {"head": net.head.conv}
    data = {f"{name}.weight": conv.weight for name, conv in convs.items()}
    data |= {f"{name}.bias": conv.bias for name, conv in convs.items()}
    data |= dict(linear=net.head.weight, images=images, labels=labels)

    def loss_fn(net, state, key):
        logits, state = net(images, state, key=key)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return jnp.mean(losses), state

    optimiser = optax.adam(LEARNING_RATE)

    @eqx.filter_jit(donate="all")
    def step(carry):
        net, state, optimiser_state, key = carry
        key, subkey = jr.split(key)
        grad_fn = eqx.filter_value_and_grad(loss_fn, has_aux=True)
        (_, state), grads = grad_fn(net, state, subkey)
        updates, optimiser_state = optimiser.update(grads, optimiser_state)
        return eqx.apply_updates(net, updates), state, optimiser_state, key

    without_drop_out = eqx.tree_at(lambda n: n.head.dropout.inference, net, True)
    loss, _ = eqx.filter_jit(loss_fn)(without_drop_out, state, None)
    data = {name: np.asarray(value) for name, value in data.items()}
    optimiser_state = optimiser.init(eqx.filter(net, eqx.is_inexact_array))
    carry = [(net, state, optimiser_state, jr.key(3))]

    def timed_step():
        start = time.perf_counter()
        carry[0] = jax.block_until_ready(step(carry[0]))
        return time.perf_counter() - start

    return data, float(loss), timed_step


def main(torch_python, rounds=12, threads=2):
    found = subprocess.run([torch_python, "-c", "import torch"], capture_output=True)
    if found.returncode != 0:
        print(f"skipped: {torch_python} cannot import torch")
        return None
    import numpy as np

    data, loss, jax_step = jax_side()
    with tempfile.TemporaryDirectory() as folder:
        file = pathlib.Path(folder) / "data.npz"
        np.savez(file, **data)  # pyright: ignore[reportArgumentType]
        worker = subprocess.Popen(
            [torch_python, __file__, "--worker", str(file), "--threads", str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        with worker:
            to_worker, from_worker = worker.stdin, worker.stdout
            assert to_worker is not None and from_worker is not None
            version, torch_loss = json.loads(from_worker.readline())

            def ask(command):
                print(command, file=to_worker, flush=True)
                return json.loads(from_worker.readline())

            difference = abs(torch_loss - loss)
            assert difference < 1e-4, f"the networks differ: {difference}"
            sides = {
                "eqimplicit": jax_step,
                "PyTorch": ft.partial(ask, "channels first"),
                "PyTorch, channels last": ft.partial(ask, "channels last"),
            }
            times = {name: [] for name in sides}
            for i in range(rounds + 1):
                for name, side in sides.items():
                    seconds = [side() for _ in range(STEPS_A_TURN)]
                    if i > 0:
                        times[name].append(1e3 * statistics.median(seconds))

    print(f"PyTorch {version}, {threads} threads of {os.cpu_count()} CPUs")
    print(f"{'ms a step':24}{'minimum':>9}{'median':>9}")
    for name, values in times.items():
        print(f"{name:24}{min(values):9.1f}{statistics.median(values):9.1f}")
    for name in list(times)[1:]:
        ratios = [a / b for a, b in zip(times["eqimplicit"], times[name])]
        print(f"ratio to {name}: {statistics.median(ratios):.2f} (median of rounds)")
    return times


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--torch-python", default=sys.executable)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker is not None:
        torch_worker(args.worker, args.threads)
    else:
        main(args.torch_python, args.rounds, args.threads)
