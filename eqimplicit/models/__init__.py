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
from .cifar10 import (
    DeepEncoder as DeepEncoder,
    jfb_cifar10 as jfb_cifar10,
    PostNormCell as PostNormCell,
)
from .implicit_resnet import ConvField as ConvField, ImplicitResNet as ImplicitResNet
from .mnist import jfb_mnist as jfb_mnist
from .multiscale import (
    mdeq as mdeq,
    MDEQCell as MDEQCell,
    MDEQHead as MDEQHead,
    ZeroBranches as ZeroBranches,
)
from .starter import ConvCell as ConvCell, DenseCell as DenseCell
from .svhn import jfb_svhn as jfb_svhn, ResNetEncoder as ResNetEncoder
