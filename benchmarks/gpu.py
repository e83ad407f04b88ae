"""The speed of this package on one accelerator, in one table and in a few minutes.

    python benchmarks/gpu.py --data-dir data
    python benchmarks/gpu.py --small

The folder holds the four files of MNIST, as they were published. Without them an epoch
is not trained. With `--small` every part is right but small, to try it on a CPU.
"""

import argparse
import functools as ft
import os
import pathlib
import sys
import time
import traceback


# So that PyTorch has memory left.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import against_pytorch  # noqa: E402
import equinox as eqx  # noqa: E402
import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import jax.random as jr  # noqa: E402
import numpy as np  # noqa: E402
import optax  # noqa: E402
from bench import machine, markdown, read_mnist, Row, take_turns  # noqa: E402
from cells import ADJOINTS, make_step, mnist, NUM_STEPS  # noqa: E402

import eqimplicit as eqi  # noqa: E402
from eqimplicit import models  # noqa: E402


def _temporary_mb(step):
    compiled = step.func.lower(*step.args).compile().compiled
    return compiled.memory_analysis().temp_size_in_bytes / 2**20


@eqx.filter_jit
def _evaluations(cell, z, state):
    """The evaluations of a forward solve, and nothing else."""
    body = lambda _, image: cell(image, z, state)[0]
    return jax.lax.fori_loop(0, NUM_STEPS, body, z)


def network(small: bool) -> list[Row]:
    """Training steps of the MNIST network, batch 100, with ten Picard steps."""
    rows = []
    for dtype in (jnp.float32, jnp.bfloat16):
        cast = lambda a, to=dtype: a.astype(to) if eqx.is_inexact_array(a) else a
        steps, f, batch = {}, None, 0
        for name, adjoint in ADJOINTS.items():
            net, loss, x = mnist(adjoint, small)
            net, x = jax.tree.map(cast, (net, x))
            steps[name], batch = make_step(net, loss, x), len(x)
            # A pooled image of 9 x 9 with 32 channels, and nothing but the cell.
            _, state = eqx.nn.make_with_state(models.jfb_mnist)(
                layer=ft.partial(eqi.DEQ), key=jr.key(0)
            )
            z = jnp.ones((batch, 9, 9, 32), x.dtype)
            state = jax.tree.map(cast, state)
            f = ft.partial(_evaluations, net.layer.cell, z, state)
        assert f is not None
        times = take_turns({"f": f, **steps}, 3 if small else 15, 50.0)
        for name, step in steps.items():
            ms = times.median(name)
            rows.append(
                {
                    "MNIST network": f"{name}, {dtype.__name__}",
                    "step, ms": ms,
                    "spread": times.spread(name),
                    "images a second": 1e3 * batch / ms,
                    "share of the forward evaluations": times.median("f") / ms,
                    "temporary memory, MiB": _temporary_mb(step),
                }
            )
    return rows


class Dense(eqx.Module):
    weight: jax.Array

    def __call__(self, z, x):
        return jnp.tanh(self.weight @ z + x)


def dense(small: bool) -> list[Row]:
    """A gradient of a dense layer; and what raising an error on the host would cost.

    In full float32: the products of TensorFloat-32, the default on GPUs, are too coarse
    for the tolerance.
    """
    size, batch = (64, 8) if small else (4096, 64)
    weight = 0.8 * jr.normal(jr.key(0), (size, size)) / size**0.5
    x = jr.normal(jr.key(1), (batch, size))

    @eqx.filter_jit
    def count(cell, x):
        return jax.vmap(eqi.DEQ(cell).solve)(x).stats["num_evaluations"]

    evaluations = int(jnp.max(count(Dense(weight), x)))

    def gradient(adjoint, throw):
        def loss(cell, x):
            layer = eqi.DEQ(cell, adjoint=adjoint, throw=throw)
            return jnp.sum(jax.vmap(layer)(x) ** 2)

        return ft.partial(eqx.filter_jit(eqx.filter_grad(loss)), Dense(weight), x)

    sides = {
        f"{name}{', throw=True' if throw else ''}": gradient(adjoint, throw)
        for name, adjoint in ADJOINTS.items()
        for throw in (False, True)
    }
    times = take_turns(sides, 3 if small else 15, 50.0)
    return [
        {
            f"dense layer, {batch} x {size}": name,
            "evaluations": evaluations,
            "gradient, ms": times.median(name),
            "spread": times.spread(name),
            "temporary memory, MiB": _temporary_mb(side),
        }
        for name, side in sides.items()
    ]


def against_torch(small: bool) -> list[Row]:
    """The MNIST network's JFB step here and in PyTorch, from the same parameters."""
    try:
        import torch  # pyright: ignore[reportMissingImports]
    except ImportError:
        return [{"PyTorch": "not installed"}]
    data, loss, jax_step = against_pytorch.jax_side()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.backends.cudnn.benchmark = True
    torch_loss, steps = against_pytorch.torch_side(data, device)
    assert abs(torch_loss - loss) < 1e-2, (torch_loss, loss)

    def finish(step):
        step()
        if device == "cuda":
            torch.cuda.synchronize()

    sides = {"eqimplicit": jax_step}
    sides |= {
        f"PyTorch, eager, {k}": ft.partial(finish, step) for k, step in steps.items()
    }
    times = take_turns(sides, 2 if small else 15, 50.0)
    return [
        {
            "JFB step, float32": name,
            "ms": times.median(name),
            "spread": times.spread(name),
            "ours / theirs": times.ratio("eqimplicit", name),
        }
        for name in sides
    ]


def epoch(small: bool, folder: pathlib.Path) -> list[Row]:
    """An epoch of MNIST, from the data on the host to the accuracy on the test set."""
    try:
        images, labels, test_images, test_labels = read_mnist(folder)
    except FileNotFoundError as error:
        return [{"epoch of MNIST": f"left out, since {error.filename} is missing"}]
    if small:
        images, labels = images[:2000], labels[:2000]
        test_images, test_labels = test_images[:1000], test_labels[:1000]
    scale = lambda a: ((a[..., None] / 255 - 0.1307) / 0.3081).astype(np.float32)

    layer = lambda cell: eqi.DEQ(
        cell, eqi.Anderson(1e-3, 1e-3), eqi.JFBAdjoint(), max_steps=20
    )
    net, state = eqx.nn.make_with_state(models.jfb_mnist)(layer=layer, key=jr.key(0))
    optimiser = optax.adam(1e-3)
    opt_state = optimiser.init(eqx.filter(net, eqx.is_inexact_array))

    def loss_fn(net, state, x, y, key):
        logits, state = net(x, state, key=key)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, y)
        return jnp.mean(losses), state

    @eqx.filter_jit(donate="all")
    def step(net, state, opt_state, x, y, key):
        grads, state = eqx.filter_grad(loss_fn, has_aux=True)(net, state, x, y, key)
        updates, opt_state = optimiser.update(grads, opt_state)
        return eqx.apply_updates(net, updates), state, opt_state

    @eqx.filter_jit
    def predict(net, state, x):
        logits, _ = net(x, state)
        return jnp.argmax(logits, axis=-1)

    order = np.random.default_rng(0).permutation(len(images))
    compiled_at = start = time.perf_counter()
    for i, batch in enumerate(order.reshape(-1, 100)):
        x, y = scale(images[batch]), labels[batch].astype(np.int32)
        key = jr.fold_in(jr.key(1), i)
        net, state, opt_state = step(net, state, opt_state, x, y, key)
        if i == 0:
            jax.block_until_ready(opt_state)
            compiled_at = time.perf_counter()
    jax.block_until_ready(opt_state)
    end = time.perf_counter()
    net = eqx.nn.inference_mode(net)
    hits = [
        np.asarray(predict(net, state, scale(x))) == y
        for x, y in zip(
            test_images.reshape(-1, 500, 28, 28), test_labels.reshape(-1, 500)
        )
    ]
    return [
        {
            "epoch of MNIST": f"JFB, Anderson, {len(images)} images",
            "seconds": end - compiled_at,
            "first step, with compilation, s": compiled_at - start,
            "test accuracy, %": float(100 * np.mean(hits)),
        }
    ]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--data-dir", type=pathlib.Path, default=pathlib.Path("data"))
    args = parser.parse_args()
    print(f"{time.strftime('%Y-%m-%d')}, {machine()}", flush=True)
    parts = {
        "network": network,
        "dense": jax.default_matmul_precision("highest")(dense),
        "epoch": ft.partial(epoch, folder=args.data_dir),
        "PyTorch": against_torch,
    }
    failed = False
    for name, part in parts.items():
        # The time on an accelerator is short: what works is shown, whatever else fails.
        try:
            print(f"\n{markdown(part(args.small))}", flush=True)
        except Exception:
            failed = True
            print(f"\n{name} failed:\n{traceback.format_exc()}", flush=True)
    sys.exit(failed)
