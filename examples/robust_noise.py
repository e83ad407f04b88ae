"""How many images a network still tells when they are noisy."""

import itertools

import numpy as np
from training import image_data, loop


PARTS = ("train", "test")
KINDS = ("gaussian", "clipped")
NOISES = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5)


def add_noise(part: image_data.Images, size: float, most: int, kind: str):
    """Gaussian noise on the grey values from 0 to 1. Clipped is what then lies outside:
    on a black background that is half of the noise, and the rest is brighter."""
    noise = np.random.default_rng(0).normal(0, size, part.images.shape)
    images = part.images / most + noise
    if kind == "clipped":
        images = np.clip(images, 0, 1)
    return image_data.Images((images * most).astype(np.float32), part.labels)


def score(task, model, data, config, most):
    """Top-1 and top-2 accuracies at each level of noise, in percent."""
    scores = {}
    for part, kind in itertools.product(PARTS, KINDS):
        all_ranks = [
            loop.ranks(
                task,
                model,
                None,
                data,
                add_noise(getattr(data, part), noise, most, kind),
                config.batch_size,
                config.precision,
            )
            for noise in NOISES
        ]
        for top in (1, 2):
            key = f"{part}, {kind}, top-{top}"
            scores[key] = [100 * np.mean(ranks < top) for ranks in all_ranks]
    return scores
