"""Frozen feature networks, for losses and metrics: images in [-1, 1] in, a list of feature maps out.

What takes one of them takes any ``nn.Module`` of the user's that keeps the same contract (:data:`FeatureNetwork`).
Weights come from a package or a local file, are checked, and are never replaced by others.
"""

from ctm_fast.models.features.deit import DeiT
from ctm_fast.models.features.dinov2 import DINOv2
from ctm_fast.models.features.efficientnet_lite0 import EfficientNetLite0
from ctm_fast.models.features.inception import Inception, load_inception
from ctm_fast.models.features.network import FeatureNetwork, feature_shapes, freeze
from ctm_fast.models.features.vgg16 import VGG16

__all__ = [
    "VGG16",
    "DINOv2",
    "DeiT",
    "EfficientNetLite0",
    "FeatureNetwork",
    "Inception",
    "feature_shapes",
    "freeze",
    "load_inception",
]
