"""Say which parameters train when; everything else in PyTorch Lightning follows exactly."""

from lightning_freeze.arrays import to_numpy
from lightning_freeze.batchnorm import freeze_batchnorm, unfreeze_batchnorm
from lightning_freeze.callbacks.feature_cache import FeatureCache
from lightning_freeze.callbacks.freeze_batchnorm import FreezeBatchNorm
from lightning_freeze.callbacks.freeze_schedule import FreezeSchedule
from lightning_freeze.callbacks.gradient_audit import GradientAudit
from lightning_freeze.callbacks.metric_logger import MetricLogger
from lightning_freeze.callbacks.norm_logger import NormLogger
from lightning_freeze.callbacks.target_network import TargetNetwork
from lightning_freeze.gradients import freeze, frozen, trainable_summary, unfreeze
from lightning_freeze.optimizers import parameter_groups
from lightning_freeze.phases import Phase, Plateau
from lightning_freeze.presets import chain_thaw, gradual_unfreezing, layerwise_sampling, linear_probe_then_finetune
from lightning_freeze.selectors import select_parameters

__all__ = [
    "FeatureCache",
    "FreezeBatchNorm",
    "FreezeSchedule",
    "GradientAudit",
    "MetricLogger",
    "NormLogger",
    "Phase",
    "Plateau",
    "TargetNetwork",
    "chain_thaw",
    "freeze",
    "freeze_batchnorm",
    "frozen",
    "gradual_unfreezing",
    "layerwise_sampling",
    "linear_probe_then_finetune",
    "parameter_groups",
    "select_parameters",
    "to_numpy",
    "trainable_summary",
    "unfreeze",
    "unfreeze_batchnorm",
]
