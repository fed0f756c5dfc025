"""Fused kernels for Forward-Forward training (Hinton 2022): forward, goodness and local update in one pass."""

from .backends import current_backend, explain, info, use_backend
from .hybrid import hybrid_images
from .labels import overlay, wrong_labels
from .loss import logistic_loss
from .nn import FFLinear, FFNet, LayerStep, NetStep
from .ops import (
    FFLayer,
    ff_forward,
    ff_grad,
    ff_label_forward,
    ff_label_step_,
    ff_network_step_,
    ff_step_,
    ff_update_,
)
from .optim import SGD, Adam, AdamW, HintonSGD, Optimizer
from .training import EarlyStopping, error_percent

__version__ = "0.1.0"

__all__ = [
    "SGD",
    "Adam",
    "AdamW",
    "EarlyStopping",
    "FFLayer",
    "FFLinear",
    "FFNet",
    "HintonSGD",
    "LayerStep",
    "NetStep",
    "Optimizer",
    "current_backend",
    "error_percent",
    "explain",
    "ff_forward",
    "ff_grad",
    "ff_label_forward",
    "ff_label_step_",
    "ff_network_step_",
    "ff_step_",
    "ff_update_",
    "hybrid_images",
    "info",
    "logistic_loss",
    "overlay",
    "use_backend",
    "wrong_labels",
]
