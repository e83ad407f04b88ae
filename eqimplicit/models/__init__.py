from .._nn.convolution import Conv2d as Conv2d
from .._nn.normalisation import (
    BatchNorm as BatchNorm,
    GroupNorm as GroupNorm,
    NoNorm as NoNorm,
)
from .base import ImageClassifier as ImageClassifier, OneStep as OneStep
from .cifar10 import (
    DeepEncoder as DeepEncoder,
    jfb_cifar10 as jfb_cifar10,
    PostNormCell as PostNormCell,
)
from .conv_encoder import ConvEncoder as ConvEncoder
from .conv_head import ConvHead as ConvHead
from .implicit_resnet import ConvField as ConvField, ImplicitResNet as ImplicitResNet
from .mnist import jfb_mnist as jfb_mnist
from .multiscale import mdeq as mdeq
from .multiscale_cell import MDEQCell as MDEQCell, ZeroBranches as ZeroBranches
from .multiscale_head import MDEQHead as MDEQHead
from .residual_cell import ResidualCell as ResidualCell
from .starter import ConvCell as ConvCell, DenseCell as DenseCell
from .svhn import jfb_svhn as jfb_svhn, ResNetEncoder as ResNetEncoder
