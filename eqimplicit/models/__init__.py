from .._nn.convolution import Conv2d as Conv2d
from .._nn.normalisation import BatchNorm as BatchNorm, GroupNorm as GroupNorm
from .base import (
    ConvEncoder as ConvEncoder,
    ConvHead as ConvHead,
    ImageClassifier as ImageClassifier,
    OneStep as OneStep,
    ResidualCell as ResidualCell,
)
from .jfb import jfb_mnist as jfb_mnist
