"""What the JFB paper does on each data set, and what it found."""

import dataclasses
import functools as ft
from typing import Any, Literal, NamedTuple

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
