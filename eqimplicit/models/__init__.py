from .._nn.convolution import Conv2d as Conv2d
from .._nn.normalisation import (
    BatchNorm as BatchNorm,
    GroupNorm as GroupNorm,
    NoNorm as NoNorm,
)
from .base import (
    ConvEncoder as ConvEncoder,
    ConvHead as ConvHead,
    ImageClassifier as ImageClassifier,
    OneStep as OneStep,
    ResidualCell as ResidualCell,
)
from .jfb import (
    jfb_cifar10 as jfb_cifar10,
    jfb_mnist as jfb_mnist,
    jfb_svhn as jfb_svhn,
)
from .resnet import (
    DeepEncoder as DeepEncoder,
    PostNormCell as PostNormCell,
    ResNetEncoder as ResNetEncoder,
)
