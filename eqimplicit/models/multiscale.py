from collections.abc import Callable

import jax.random as jr
from jaxtyping import PRNGKeyArray

from .._layer.deq import DEQ
from .._nn.normalisation import GroupNorm
from .base import ImageClassifier
from .conv_encoder import ConvEncoder
from .multiscale_cell import MDEQCell, ZeroBranches
from .multiscale_head import MDEQHead


def mdeq(
    in_shape: tuple[int, int, int] = (32, 32, 3),
    num_classes: int = 10,
    channels: int = 24,
    num_branches: int = 2,
    expansion: int = 5,
    head_channels: int = 8,
    final_channels: int = 200,
    groups: int = 8,
    dropout: float = 0.0,
    layer: Callable[..., Callable] = DEQ,
    *,
    key: PRNGKeyArray,
) -> ImageClassifier:
    """A multiscale deep equilibrium model for images. The defaults are those of
    "MDEQ-tiny", with which the phantom-gradient paper compares gradients on CIFAR-10:
    two branches and 159,274 parameters (158,986 in the authors' code).

    Where the authors take batch normalisation, in the encoder and the head, this takes
    that of groups. So it takes one image, as all of Equinox does, and every image has a
    solve of its own.

    !!! example

        ```python
        solver = eqi.Broyden(rtol=1e-3, atol=1e-6)
        layer = ft.partial(
            eqi.DEQ, solver=solver, adjoint=eqi.PhantomAdjoint(5, 0.5), max_steps=22
        )
        net = eqi.models.mdeq(layer=layer, key=key)
        logits = jax.vmap(net)(images)
        ```

    **Arguments:**

    - `in_shape`: the height, width and number of channels of an image.
    - `num_classes`: the number of classes.
    - `channels`: the number of channels of each branch.
    - `num_branches`: the number of branches, each of half the height and width of the
        one before.
    - `expansion`: how many times as many channels a block of the cell has inside.
    - `head_channels`, `final_channels`: as in [`eqimplicit.models.MDEQHead`][].
    - `groups`: the number of groups of the normalisation.
    - `dropout`: that of the cell. With drop-out the layer needs a key: call its parts,
        `encoder`, `layer` and `head`.
    - `layer`: makes the layer from a cell and `init=`; for example a
        `functools.partial` of [`eqimplicit.DEQ`][].
    - `key`: a `jax.random` key for the parameters.

    **Returns:**

    An [`eqimplicit.models.ImageClassifier`][].

    **Raises:** a `ValueError` if the height or width cannot be halved often enough.

    ??? cite "References"

        ```bibtex
        @inproceedings{bai2020multiscale,
            author = {Bai, Shaojie and Koltun, Vladlen and Kolter, J. Zico},
            title = {Multiscale Deep Equilibrium Models},
            booktitle = {Advances in Neural Information Processing Systems},
            year = {2020},
        }

        @inproceedings{geng2021training,
            author = {Geng, Zhengyang and Zhang, Xin-Yu and Bai, Shaojie and Wang, Yisen
                      and Lin, Zhouchen},
            title = {On Training Implicit Models},
            booktitle = {Advances in Neural Information Processing Systems},
            year = {2021},
        }
        ```
    """
    height, width, in_channels = in_shape
    if any(n % 2 ** (num_branches - 1) for n in (height, width)):
        raise ValueError(
            f"An image of {height} x {width} pixels cannot be halved for "
            f"{num_branches} branches."
        )
    keys = jr.split(key, 3)
    norm = lambda channels, affine: GroupNorm(channels, affine, groups)
    encoder = ConvEncoder(
        in_channels, channels, channels, 1, norm, use_bias=False, slope=0.0, key=keys[0]
    )
    cell = MDEQCell(channels, num_branches, expansion, groups, dropout, key=keys[1])
    head = MDEQHead(
        channels,
        num_branches,
        head_channels,
        final_channels,
        num_classes,
        groups,
        key=keys[2],
    )
    return ImageClassifier(encoder, layer(cell, init=ZeroBranches(num_branches)), head)
