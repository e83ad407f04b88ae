from .base import (
    BatchNorm as BatchNorm,
    Conv2d as Conv2d,
    GroupNorm as GroupNorm,
)
from .jfb import (
    ConvEncoder as ConvEncoder,
    ConvHead as ConvHead,
    ImageClassifier as ImageClassifier,
    jfb_mnist as jfb_mnist,
    OneStep as OneStep,
    ResidualCell as ResidualCell,
)
