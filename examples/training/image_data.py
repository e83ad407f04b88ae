"""Image classification data sets, read from the files in which they were published.

The digits come with scikit-learn. The files of the other sets are looked for in the
data folder and in its usual subfolders, and downloaded if they are not there. Each must
have the checksum of the published file; nothing is ever overwritten or unpickled.
"""

import contextlib
import gzip
import hashlib
import os
import pathlib
import tarfile
import tempfile
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import numpy as np
import pooch
import scipy.io
import sklearn.datasets
from jaxtyping import Float, Int, UInt8

from . import files
from .command_line import UserError


Name = Literal["digits", "mnist", "fashion-mnist", "svhn", "cifar10"]


class Images(NamedTuple):
    images: UInt8[np.ndarray, "size height width channels"]
    labels: Int[np.ndarray, " size"]


class Dataset(NamedTuple):
    """`mean` and `std` are those of each channel of the training images."""

    train: Images
    test: Images
    mean: Float[np.ndarray, " channels"]
    std: Float[np.ndarray, " channels"]

    def normalise(self, part: Images, indices: np.ndarray) -> tuple[Any, Any]:
        images = (part.images[indices] - self.mean) / self.std
        return images.astype(np.float32), part.labels[indices]


class File(NamedTuple):
    """As it was published: its size in bytes, and its checksum."""

    size: int
    checksum: str


class Source(NamedTuple):
    """Where the files of a data set are found: the folders below the data folder, the
    address, with the checksum of the archive if it is one, and the files in the order
    in which they are read.
    """

    folders: tuple[str, ...]
    url: str
    archive: str | None
    files: dict[str, File]


SOURCES = {
    "mnist": Source(
        ("mnist", "."),
        "https://ossci-datasets.s3.amazonaws.com/mnist/",
        None,
        {
            "train-images-idx3-ubyte.gz": File(
                9912422,
                "sha256:440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
            ),
            "train-labels-idx1-ubyte.gz": File(
                28881,
                "sha256:3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
            ),
            "t10k-images-idx3-ubyte.gz": File(
                1648877,
                "sha256:8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
            ),
            "t10k-labels-idx1-ubyte.gz": File(
                4542,
                "sha256:f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
            ),
        },
    ),
    "fashion-mnist": Source(
        ("fashion_mnist", "."),
        "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
        None,
        {
            "train-images-idx3-ubyte.gz": File(
                26421880,
                "sha256:3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
            ),
            "train-labels-idx1-ubyte.gz": File(
                29515,
                "sha256:a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
            ),
            "t10k-images-idx3-ubyte.gz": File(
                4422102,
                "sha256:346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
            ),
            "t10k-labels-idx1-ubyte.gz": File(
                5148,
                "sha256:67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
            ),
        },
    ),
    "svhn": Source(
        ("svhn", "."),
        "http://ufldl.stanford.edu/housenumbers/",
        None,
        {
            "train_32x32.mat": File(
                182040794,
                "md5:e26dedcc434d2e4c54c9b2d4a06d8373",
            ),
            "test_32x32.mat": File(
                64275384,
                "md5:eb5a983be6a315427106f1b164d9cef3",
            ),
        },
    ),
    "cifar10": Source(
        (
            "cifar10/cifar-10-batches-bin",
            "cifar-10-batches-bin",
            "cifar10",
            ".",
        ),
        "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
        "md5:c32a1d4ab5d03f1284b67883e8d87530",
        {
            "data_batch_1.bin": File(
                30730000,
                "sha256:cee916563c9f80d84e3cc88e17fdc0941787f1244f00a67874d45b261883ada5",
            ),
            "data_batch_2.bin": File(
                30730000,
                "sha256:a591ca11fa1708a91ee40f54b3da4784ccd871ecf2137de63f51ada8b3fa57ed",
            ),
            "data_batch_3.bin": File(
                30730000,
                "sha256:bbe8596564c0f86427f876058170b84dac6670ddf06d79402899d93ceea26f67",
            ),
            "data_batch_4.bin": File(
                30730000,
                "sha256:014e562d6e23c72197cc727519169a60359f5eccd8945ad5a09d710285ff4e48",
            ),
            "data_batch_5.bin": File(
                30730000,
                "sha256:755304fc0b379caeae8c14f0dac912fbc7d6cd469eb67a1029a08a39453a9add",
            ),
            "test_batch.bin": File(
                30730000,
                "sha256:8e2eb146ae340b09e24670f29cabc6326dba54da8789dab6768acf480273f65b",
            ),
        },
    ),
}


def load(
    name: Name,
    data_dir: pathlib.Path,
    train_size: int | None = None,
    test_size: int | None = None,
) -> Dataset:
    """The training and test images, or the first so many of them."""
    if name == "digits":
        train, test = _load_digits()
    elif name == "cifar10":
        batches = [_read_cifar10(path) for path in find_files(name, data_dir)]
        train = Images(*(np.concatenate(arrays) for arrays in zip(*batches[:-1])))
        test = batches[-1]
    elif name == "svhn":
        train, test = (_read_svhn(path) for path in find_files(name, data_dir))
    else:
        arrays = [_read_idx(path) for path in find_files(name, data_dir)]
        train, test = (
            Images(images[..., None], labels.astype(np.int32))
            for images, labels in (arrays[:2], arrays[2:])
        )
    if train_size is not None:
        if train_size > len(train.labels):
            raise UserError(
                f"--train-size is {train_size}, but {name} has only "
                f"{len(train.labels)} training images"
            )
    train, test = (
        Images(part.images[:size], part.labels[:size])
        for part, size in ((train, train_size), (test, test_size))
    )
    axes = (0, 1, 2)
    return Dataset(train, test, train.images.mean(axes), train.images.std(axes))


def _load_digits():
    images, labels = sklearn.datasets.load_digits(return_X_y=True)
    # The writers follow one another in the file, so that the split must be random.
    order = np.random.default_rng(0).permutation(len(labels))
    images = images[order].reshape(-1, 8, 8, 1).astype(np.uint8)
    labels = labels[order].astype(np.int32)
    return Images(images[360:], labels[360:]), Images(images[:360], labels[:360])


def _read_idx(path):
    # The header: two zeros, the type of the entries (8, bytes), the number of
    # dimensions, and each dimension as four bytes.
    content = gzip.decompress(path.read_bytes())
    num_dimensions = content[3]
    shape = np.frombuffer(content, ">u4", count=num_dimensions, offset=4)
    return np.frombuffer(content, np.uint8, offset=4 + shape.nbytes).reshape(shape)


def _read_cifar10(path):
    # For each image a byte for the label, then the planes of red, green and blue.
    rows = np.fromfile(path, np.uint8).reshape(-1, 1 + 3 * 32 * 32)
    images = rows[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return Images(images, rows[:, 0].astype(np.int32))


def _read_svhn(path):
    # A MATLAB file, with the images along the last axis, and 10 for the label 0.
    content = scipy.io.loadmat(path)
    labels = content["y"].reshape(-1).astype(np.int32) % 10
    return Images(content["X"].transpose(3, 0, 1, 2), labels)


def find_files(name: str, data_dir: pathlib.Path) -> list[pathlib.Path]:
    """The checked files of a data set; the missing ones are downloaded."""
    source = SOURCES[name]
    found = {}
    for file, published in source.files.items():
        for folder in source.folders:
            path = data_dir / folder / file
            if os.path.exists(path):
                _check(path, name, published)
                found[file] = path
                break
    for file, published in source.files.items():
        if file not in found:
            path = data_dir / source.folders[0] / file
            with _report_failure(path):
                if source.archive is None:
                    _download(source.url + file, path, published.checksum)
                elif not path.exists():  # or it came with an earlier one
                    _download_archive(source, path.parent)
            found[file] = path
    return [found[file] for file in source.files]


def _check(path, name, published):
    try:
        with files.open_plain(path) as file:
            algorithm, _, digest = published.checksum.partition(":")
            # The size first, for a larger file would take long to read.
            is_published = os.fstat(file.fileno()).st_size == published.size and (
                hashlib.file_digest(file, algorithm).hexdigest() == digest
            )
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})") from error
    if not is_published:
        raise UserError(
            f"{path} is truncated, corrupt, or not the published file of {name}: its "
            "size or checksum is wrong. Move it away to have it downloaded again, or "
            "give another --data-dir"
        )


@contextlib.contextmanager
def _report_failure(path: pathlib.Path) -> Iterator[None]:
    new_folders = [folder for folder in path.parents if not folder.exists()]
    try:
        yield
    # Pooch raises a ValueError where the checksum is wrong.
    except (OSError, ValueError, KeyError, tarfile.TarError) as error:
        for folder in new_folders:
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise UserError(
            f"{path} is missing, and downloading it failed ({type(error).__name__}). "
            "Put the file there, or give the folder that has it by --data-dir or "
            "EQIMPLICIT_DATA"
        ) from error


def _download(url, path, checksum):
    pooch.get_logger().setLevel("WARNING")
    # It downloads to a temporary name, checks, and renames.
    pooch.retrieve(url, checksum, path.name, path.parent, progressbar=True)


def _download_archive(source, folder):
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        archive = pathlib.Path(temporary) / "archive.tar.gz"
        _download(source.url, archive, source.archive)
        with tarfile.open(archive) as tar:
            for file in source.files:
                if not (folder / file).exists():
                    member = tar.extractfile(f"cifar-10-batches-bin/{file}")
                    assert member is not None
                    unpacked = pathlib.Path(temporary) / file
                    unpacked.write_bytes(member.read())
                    os.replace(unpacked, folder / file)
