"""Fused kernels for Forward-Forward training (Hinton 2022): forward, goodness and local update in one pass."""

from .augment import Affine, Chain, Noise, Shift
from .average import WeightAverage
from .backends import current_backend, explain, info, use_backend
from .head import SoftmaxHead
from .hybrid import HybridImages, ImageNegatives, hybrid_images
from .label_ops import ff_label_forward, ff_label_step_
from .labels import neutral, overlay, wrong_labels
from .layer import FFLinear, LayerStep
from .loss import Hinge, Logistic, Loss, PairSoftplus, SymBa, logistic_loss
from .negatives import DrawnOnce, HardLabels, Negatives, PermutedLabels, UniformLabels
from .network import FFLayer, ff_network_forward, ff_network_step_
from .nn import FFNet, NetStep
from .ops import ff_forward, ff_grad, ff_step_, ff_update_
from .optim import SGD, Adam, AdamW, HintonSGD, Optimizer
from .receptive import ReceptiveFields
from .recurrent import RecurrentFFNet
from .schedule import Schedule
from .selection import HardInputs, Selection
from .training import EarlyStopping, error_percent

__version__ = "0.1.0"

__all__ = [
    "SGD",
    "Adam",
    "AdamW",
    "Affine",
    "Chain",
    "DrawnOnce",
    "EarlyStopping",
    "FFLayer",
    "FFLinear",
    "FFNet",
    "HardInputs",
    "HardLabels",
    "Hinge",
    "HintonSGD",
    "HybridImages",
    "ImageNegatives",
    "LayerStep",
    "Logistic",
    "Loss",
    "Negatives",
    "NetStep",
    "Noise",
    "Optimizer",
    "PairSoftplus",
    "PermutedLabels",
    "ReceptiveFields",
    "RecurrentFFNet",
    "Schedule",
    "Selection",
    "Shift",
    "SoftmaxHead",
    "SymBa",
    "UniformLabels",
    "WeightAverage",
    "current_backend",
    "error_percent",
    "explain",
    "ff_forward",
    "ff_grad",
    "ff_label_forward",
    "ff_label_step_",
    "ff_network_forward",
    "ff_network_step_",
    "ff_step_",
    "ff_update_",
    "hybrid_images",
    "info",
    "logistic_loss",
    "neutral",
    "overlay",
    "use_backend",
    "wrong_labels",
]
