"""Draws why implicit layers are stable: the phase portraits of four schemes on an
oscillator, and the regions where the layers are stable and where they contract.

    python examples/stability.py
"""

import dataclasses
import pathlib

import equinox as eqx
import jax
import jax.numpy as jnp
import matplotlib.patches
import numpy as np
import tyro
from training import command_line, figures, files

import eqimplicit as eqi


@dataclasses.dataclass(frozen=True)
class Config:
    """Draw phase portraits and regions of stability.

    Takes about five seconds on two cores.
    """

    frequency: float = 50.0
    """The angular frequency of the oscillator."""

    step: float = 0.004
    """The step size of the phase portraits."""

    steps: int = 120
    """How many steps they take."""

    out: pathlib.Path = pathlib.Path("runs/stability")
    """The folder for the figures."""


def phase_portraits(config: Config):
    """The trajectories of the oscillator y' = -w^2 z, z' = y by four schemes."""

    def field(t, state, args):
        y, z = state
        return -(config.frequency**2) * z, y

    h = config.step
    layers = {
        "forward Euler": eqi.ThetaLayer(field, 0.0, h),
        "trapezoidal": eqi.ThetaLayer(field, 0.5, h, form="trapezoid"),
        "backward Euler": eqi.ThetaLayer(field, 1.0, h),
        "Verlet": eqi.VerletLayer(field, h),
    }
    start = jnp.array(config.frequency), jnp.array(0.0)
    run = eqx.filter_jit(
        lambda layer: eqi.ODEBlock(layer, config.steps).trajectory(start)
    )
    return {name: run(layer) for name, layer in layers.items()}


def draw_portraits(config: Config, portraits) -> None:
    figure, axes = figures.grid(1, len(portraits), 2.7, 2.8, sharex=True, sharey=True)
    angle = np.linspace(0, 2 * np.pi, 200)
    for axis, (name, (y, z)) in zip(axes[0], portraits.items()):
        figures.name(axis, name)
        axis.plot(np.cos(angle), np.sin(angle), color=figures.LIGHT, linewidth=2.5)
        axis.plot(y / config.frequency, z, color=figures.ACCENT, linewidth=0.8)
        axis.set(xlim=(-2.5, 2.5), ylim=(-2.5, 2.5), aspect="equal", xlabel="y / w")
    axes[0, 0].set_ylabel("z")
    product = config.frequency * config.step
    title = f"Four schemes on an oscillator, h w = {product:.2g}"
    figures.save(figure, config.out, "portraits.png", title)


def draw_regions(config: Config) -> None:
    """|R(z)| and where it is at most one; where Picard iteration contracts; and the
    disc in which a 1-Lipschitz field has its eigenvalues.
    """
    thetas = (0.0, 0.25, 0.5, 0.75, 1.0)
    figure, axes = figures.grid(1, len(thetas), 2.5, 2.6, sharex=True, sharey=True)
    real, imaginary = np.meshgrid(np.linspace(-5, 5, 301), np.linspace(-5, 5, 301))
    z = real + 1j * imaginary
    for axis, theta in zip(axes[0], thetas):
        figures.name(axis, f"theta = {theta:g}")
        growth = np.abs(eqi.stability_function(z, theta))
        axis.contourf(real, imaginary, growth, [0, 1], colors=[figures.GRID])
        levels = [0.25, 0.5, 1, 2, 4]
        lines = axis.contour(real, imaginary, growth, levels, colors=figures.LIGHT)
        lines.set_linewidth(0.7)
        axis.clabel(lines, fontsize=6)
        if theta > 0:
            axis.contourf(
                real, imaginary, np.abs(z) * theta, [0, 1], colors="red", alpha=0.15
            )
            axis.plot(1 / theta, 0, "x", color=figures.DARK, markersize=5)
        disc = matplotlib.patches.Circle((0, 0), 1, fill=False, hatch="////")
        disc.set(edgecolor=figures.COLOURS[0], linewidth=0.8)
        axis.add_patch(disc)
        axis.set(xlim=(-5, 5), ylim=(-5, 5), aspect="equal", xlabel="Re z")
    axes[0, 0].set_ylabel("Im z")
    title = "Stable (grey), contractive (red), 1-Lipschitz fields (hatched), pole (x)"
    figures.save(figure, config.out, "regions.png", title)


def main(args: list[str] | None = None) -> dict[str, float]:
    config = tyro.cli(Config, args=args)
    jax.config.update("jax_enable_x64", True)
    with files.claim(config.out):
        portraits = phase_portraits(config)
        draw_portraits(config, portraits)
        draw_regions(config)
        growth = {}
        for name, (y, z) in portraits.items():
            radius = np.hypot(y / config.frequency, z)
            growth[name] = float(radius[-1] / radius[0])
            print(f"{name:15s} radius after {config.steps} steps: {growth[name]:.4f}")
        print(f"The figures are in {config.out}")
        return growth


if __name__ == "__main__":
    command_line.run(main)
