"""The experiments of the JFB paper: how training fares with the Jacobian-free gradient,
several terms of the Neumann series, the paper's conjugate gradients, and the exact
gradient.

    python examples/jfb_paper.py --dataset mnist --data-dir data
    python examples/jfb_paper.py --dataset mnist --data-dir data --small

Each method and seed has a run folder of its own, so that the same command resumes.
"""

import dataclasses
import functools as ft
import pathlib
import typing
from typing import Any, Literal, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import tyro
from normal_equations import NormalEquationsCG
from training import (
    classifiers,
    command_line,
    devices,
    figures,
    image_data,
    loop,
    options,
    results as results_file,
)
from training.command_line import UserError

import eqimplicit as eqi


Method = Literal[
    "explicit",
    "jfb",
    "neumann-1",
    "neumann-5",
    "neumann-10",
    "cg",
    "cg-converged",
    "exact",
]
SMALL: tuple[Method, ...] = ("explicit", "jfb", "neumann-5", "cg", "exact")


@dataclasses.dataclass(frozen=True)
class Config(options.Options):
    """Repeat the experiments of the JFB paper."""

    dataset: image_data.Name = "mnist"
    """The digits are embedded, the others are in --data-dir."""

    methods: tuple[Method, ...] | None = None
    """By default all, or explicit, jfb, neumann-5, cg, exact if
    small. explicit applies the cell once; neumann-K adds K products
    with the Jacobian; cg is conjugate gradients as the paper
    stops them, without batch normalisation in the cell, whose
    kernels have bounded norms; cg-converged is the same but
    runs to the end; exact is this package's own, with batch
    normalisation. results.json has those of one call."""

    epochs: int | None = None
    """Passes over the training images."""

    batch_size: int = 100
    """Images per training step."""

    learning_rate: float | None = None
    """Of Adam. By default the paper's, or 1e-3 if small."""

    seeds: int = 1
    """Runs of each method, from --seed on."""

    small: bool = False
    """A setting for two cores: fewer images and epochs."""

    out: pathlib.Path | None = None
    """The folder of the experiment, by default runs/jfb-..."""


class Reported(NamedTuple):
    """What the paper has of each method: accuracies, seconds per epoch (on a TITAN X),
    and products with the Jacobian."""

    accuracy: dict[str, str] = {}
    seconds: dict[str, str] = {}
    products: dict[str, str] = {}


@dataclasses.dataclass(frozen=True)
class Setting:
    """What the paper does on a data set, and what it found: in percent, of the paper
    and of the files that its authors published."""

    make: Any
    learning_rate: float
    weight_decay: float
    atol: float
    max_steps: int
    epochs: int
    small: dict[str, int]
    paper: Reported
    code: dict[str, str]
    # Of the state, and the bound of each kernel's norm with which the cell is a
    # contraction without normalisation.
    latent_shape: tuple[int, int, int]
    bound: float
    augment: bool = False
    # What makes the network smaller, where it is too large for two cores.
    small_network: dict[str, int] = dataclasses.field(default_factory=dict)
    # The forward solve of the paper's exact gradient, where it is another.
    exact_solve: tuple[float, int] | None = None


_mnist = Setting(
    eqi.models.jfb_mnist,
    learning_rate=1e-4,
    weight_decay=1e-6,
    atol=1e-4,
    max_steps=50,
    epochs=40,
    small={"epochs": 3, "train_size": 6000, "test_size": 2000},
    paper=Reported(
        {"jfb": "99.4", "explicit": "99.4", "cg": "99.2"},
        {"jfb": "17.6", "cg": "28.4"},
        {"cg": "1.0 CG step an image"},
    ),
    code={"jfb": "99.36", "explicit": "99.29", "cg": "95.99"},
    latent_shape=(9, 9, 32),
    bound=0.6,
)
SETTINGS = {
    "digits": dataclasses.replace(
        _mnist,
        make=ft.partial(eqi.models.jfb_mnist, pool=1),
        small={"epochs": 10},
        paper=Reported(),
        code={},
        latent_shape=(8, 8, 32),
    ),
    "mnist": _mnist,
    "fashion-mnist": dataclasses.replace(_mnist, paper=Reported(), code={}),
    "svhn": Setting(
        eqi.models.jfb_svhn,
        learning_rate=1e-4,
        weight_decay=2e-4,
        atol=1e-4,
        max_steps=200,
        epochs=30,
        small={"epochs": 1, "train_size": 1000, "test_size": 500},
        paper=Reported(
            {"jfb": "94.1", "explicit": "93.7", "cg": "90.1"},
            {"jfb": "36.9", "cg": "92.8"},
            {"cg": "1.9 CG steps an image"},
        ),
        code={"jfb": "94.12", "explicit": "93.89", "cg": "84.67"},
        latent_shape=(8, 8, 64),
        bound=0.3,
    ),
    "cifar10": Setting(
        eqi.models.jfb_cifar10,
        learning_rate=1e-3,
        weight_decay=1e-3,
        atol=1e-1,
        max_steps=50,
        epochs=40,
        small={"epochs": 2, "train_size": 1000, "test_size": 500},
        small_network={"channels": 12, "num_blocks": 2},
        paper=Reported(
            {"jfb": "93.67", "cg": "87.9"},
            {"jfb": "146.6", "cg": "530.9"},
            {"cg": "19.4 CG steps an image"},
        ),
        code={},
        latent_shape=(10, 10, 35),
        bound=0.36,
        exact_solve=(1e-4, 500),
        augment=True,
    ),
}


def make_tolerance(method: Method, setting: Setting) -> tuple[float, int]:
    """Of the forward solve: the absolute tolerance, and the most steps."""
    if method.startswith("cg") and setting.exact_solve is not None:
        return setting.exact_solve
    return setting.atol, setting.max_steps


def make_adjoint(method: Method, setting: Setting) -> Any:
    if method in ("explicit", "jfb"):
        return eqi.JFBAdjoint()
    if method.startswith("neumann-"):
        return eqi.NeumannAdjoint(num_terms=int(method.removeprefix("neumann-")) + 1)
    if method == "cg":
        return eqi.ImplicitAdjoint(NormalEquationsCG(*make_tolerance(method, setting)))
    if method == "cg-converged":
        return eqi.ImplicitAdjoint(NormalEquationsCG(1e-5 / 100, 500))
    return eqi.ImplicitAdjoint()


def make_model(method: Method, setting: Setting, shape, seed: int) -> tuple[Any, Any]:
    def layer(cell):
        if method == "explicit":
            return eqi.models.OneStep(cell)
        if method.startswith("cg"):
            # The authors rescale the kernels when a random test finds no contraction.
            cell = eqi.with_spectral_norm(
                cell, setting.bound, input_shape=setting.latent_shape, key=jr.key(seed)
            )
        atol, max_steps = make_tolerance(method, setting)
        solver = eqi.Picard(rtol=0.0, atol=atol, norm=largest_of_batch)
        return eqi.DEQ(cell, solver, make_adjoint(method, setting), max_steps)

    cell_norm = eqi.models.NoNorm if method.startswith("cg") else None
    make = eqx.nn.make_with_state(setting.make)
    return make(shape, cell_norm=cell_norm, layer=layer, key=jr.key(seed))


def largest_of_batch(tree: Any) -> jax.Array:
    """The largest two-norm of an image, with which the paper stops."""
    squares = sum(
        jnp.sum(jnp.square(x.astype(jnp.float32)), axis=range(1, x.ndim))
        for x in jax.tree.leaves(tree)
    )
    return jnp.sqrt(jnp.max(squares))


@ft.cache
def make_optimiser(learning_rate, weight_decay, halve_every):
    schedule: Any = learning_rate
    if halve_every is not None:
        schedule = optax.exponential_decay(
            learning_rate, halve_every, 0.5, staircase=True
        )
    # Decay in the gradient, as PyTorch's Adam has it.
    return optax.chain(optax.add_decayed_weights(weight_decay), optax.adam(schedule))


def augment(key, images):
    """A flip, a crop after a frame of 2 pixels, and a random rectangle of noise."""

    def one(key, image):
        keys = jr.split(key, 5)
        image = jnp.where(jr.bernoulli(keys[0]), image[:, ::-1], image)
        height, width, _ = image.shape
        framed = jnp.pad(image, ((2, 2), (2, 2), (0, 0)), constant_values=0.449)
        top, left = jr.randint(keys[1], (2,), 0, 5)
        image = jax.lax.dynamic_slice(framed, (top, left, 0), image.shape)
        area = height * width * jr.uniform(keys[2], minval=0.1, maxval=0.25)
        ratio = jnp.exp(jr.uniform(keys[3], minval=jnp.log(0.3), maxval=jnp.log(3.3)))
        size = jnp.array([jnp.sqrt(area * ratio), jnp.sqrt(area / ratio)])
        limits = jnp.array([height, width]) - size
        corner = jr.uniform(keys[4], (2,)) * jnp.maximum(limits, 0)
        rows, columns = jnp.arange(height)[:, None], jnp.arange(width)
        inside = (rows >= corner[0]) & (rows < corner[0] + size[0])
        inside &= (columns >= corner[1]) & (columns < corner[1] + size[1])
        noise_key, chance_key = jr.split(key)
        erased = inside & jr.bernoulli(chance_key, 0.95)
        return jnp.where(erased[..., None], jr.normal(noise_key, image.shape), image)

    return jax.vmap(one)(jr.split(key, len(images)), images)


@eqx.filter_jit
def inspect_gradient(model, state, images, labels):
    """The cosine of a batch's gradient to the exact one, and its products with J."""
    features, state = eqx.nn.inference_mode(model.encoder)(images, state)
    head = eqx.nn.inference_mode(model.head)
    loss = lambda z: classifiers.cross_entropy(head(z), labels)
    _, report = eqi.gradient_report(
        model.layer, loss, features, adjoints=[model.layer.adjoint], state=state
    )
    return report.cosine, report.num_products


def diagnose(model, state, images, labels):
    """On a few images, since the exact gradient takes many products."""
    if isinstance(model.layer, eqi.models.OneStep):
        return {}
    cosine, products = inspect_gradient(model, state, images[:32], labels[:32])
    return {"gradient_cosine": float(cosine), "products": int(products)}


def run(
    config: Config, folder: pathlib.Path
) -> tuple[dict[str, Any], dict[str, list[Any]]]:
    setting = SETTINGS[config.dataset]
    small = setting.small if config.small else {}
    if config.small:
        *size, channels = setting.latent_shape
        channels = setting.small_network.get("channels", channels)
        setting = dataclasses.replace(
            setting,
            make=ft.partial(setting.make, **setting.small_network),
            latent_shape=(*size, channels),
        )
    config = dataclasses.replace(
        config,
        methods=options.given(
            config.methods, SMALL if config.small else typing.get_args(Method)
        ),
        epochs=options.given(config.epochs, small.get("epochs", setting.epochs)),
        train_size=options.given(config.train_size, small.get("train_size")),
        learning_rate=options.given(
            config.learning_rate, 1e-3 if config.small else setting.learning_rate
        ),
    )
    if config.seeds < 1:
        options.refuse("seeds", config.seeds, "at least 1")
    if not config.methods:
        raise UserError("--methods needs at least one method")
    data = image_data.load(
        config.dataset, options.data_folder(config), config.train_size
    )
    test = image_data.Images(*(x[: small.get("test_size")] for x in data.test))
    data = data._replace(test=test)
    steps = options.steps_per_epoch(config, len(data.train.labels))
    histories = {}
    for method in config.methods:
        histories[method] = []
        for seed in range(config.seed, config.seed + config.seeds):
            model, state = make_model(
                method, setting, data.train.images.shape[1:], seed
            )
            task = loop.Task(
                model,
                state,
                classifiers.forward,
                make_optimiser(
                    config.learning_rate,
                    setting.weight_decay,
                    200 * steps if setting.augment else None,
                ),
                after=eqi.advance_spectral_norms,
                augment=augment if setting.augment else None,
                diagnose=diagnose,
            )
            metrics, _, _ = loop.train(
                task,
                data,
                # So that more methods and seeds can join the same experiment.
                dataclasses.replace(config, methods=(method,), seed=seed, seeds=1),
                folder / f"{method}-{seed}",
                f"{config.dataset}: {method}",
                "jfb-paper",
            )
            histories[method].append(metrics)
    return summarise(config, setting, histories, len(data.test.labels)), histories


def summarise(config, setting, histories, test_size):
    rows, results = [], {}
    for method, runs in histories.items():
        last = [metrics[-1] for metrics in runs]
        # The first epoch of each contains the compilation.
        seconds = [
            float(np.mean([line["seconds"] for line in metrics[1:] or metrics]))
            for metrics in runs
        ]
        results[method] = {
            "test_accuracy": [line["test_accuracy"] for line in last],
            "seconds": seconds,
            "evaluations": [line.get("evaluations") for line in last],
            "unconverged": [line.get("unconverged") for line in last],
            "products": [line.get("products") for line in last],
            "gradient_cosine": [line.get("gradient_cosine") for line in last],
        }
        rows.append(
            results_file.row(
                f"{method}: test accuracy, %",
                100 * np.array(results[method]["test_accuracy"]),
                setting.paper.accuracy.get(method, "not stated"),
                setting.code.get(method, "not known"),
            )
        )
        rows.append(
            results_file.row(
                f"{method}: seconds per epoch",
                seconds,
                setting.paper.seconds.get(method, "not stated"),
            )
        )
        if method != "explicit":
            rows.append(
                results_file.row(
                    f"{method}: products with J per gradient",
                    results[method]["products"],
                    setting.paper.products.get(method, "not stated"),
                )
            )
    size = ", small" if config.small else ""
    return {
        "experiment": f"JFB paper, {config.dataset}{size}, {config.epochs} epochs",
        "config": dataclasses.asdict(config),
        "test_size": test_size,
        "rows": rows,
        "results": results,
    }


def report(content: dict[str, Any]) -> None:
    keys = ("test_accuracy", "seconds", "evaluations", "unconverged", "products")
    keys += ("gradient_cosine",)
    rows = [
        [method, *(results_file.spread(one[key]) for key in keys)]
        for method, one in content["results"].items()
    ]
    header = ["method", "test accuracy", "s / epoch", "evaluations", "unconverged"]
    results_file.print_table([*header, "products", "cosine"], rows)


def draw(config: Config, folder: pathlib.Path, histories: dict[str, list[Any]]) -> None:
    """Accuracy against epochs and against time, as in the paper's figures 5, 6 and 9,
    and the cosine with the exact gradient."""
    figure, axes = figures.grid(1, 3, height=3.3)
    colours = (*figures.COLOURS, figures.LIGHT, figures.DARK)
    for (method, runs), colour in zip(histories.items(), colours):
        accuracy = np.mean([[m["test_accuracy"] for m in run] for run in runs], 0)
        seconds = np.mean([np.cumsum([m["seconds"] for m in run]) for run in runs], 0)
        epochs = np.arange(1, len(accuracy) + 1)
        style = {"color": colour, "markersize": 3, "label": method}
        axes[0, 0].plot(epochs, 100 * accuracy, "o-", **style)
        axes[0, 1].plot(seconds, 100 * accuracy, "o-", **style)
        if method != "explicit":
            cosines = np.mean([[m["gradient_cosine"] for m in run] for run in runs], 0)
            axes[0, 2].plot(epochs, cosines, "o-", **style)
    axes[0, 0].set(xlabel="epoch", ylabel="test accuracy, %")
    axes[0, 1].set(xlabel="seconds, with evaluation", ylabel="test accuracy, %")
    axes[0, 2].set(xlabel="epoch", ylabel="cosine with the exact gradient")
    figures.legend(axes[0, 0])
    title = f"{config.dataset}: the gradients of the JFB paper"
    figures.save(figure, folder, "accuracy.png", title)


def main(args: list[str] | None = None) -> dict[str, Any]:
    config = tyro.cli(Config, args=args)
    options.start(config)
    folder = config.out or pathlib.Path("runs", f"jfb-{config.dataset}")
    with devices.claim(folder):
        content, histories = run(config, folder)
        if not devices.is_first():
            return content
        report(content)
        results_file.save(folder, content)
        draw(config, folder, histories)
        print(f"The figure and results.json are in {folder}.")
        return content


if __name__ == "__main__":
    command_line.run(main)
