"""Say which parameters train when; everything else in PyTorch Lightning follows exactly."""

from importlib.metadata import version

from lightning_freeze.audit.callback import GradientAudit
from lightning_freeze.audit.findings import AuditError, Finding, Report
from lightning_freeze.feature_cache.callback import FeatureCache
from lightning_freeze.feature_cache.stats import FeatureStats
from lightning_freeze.freezing.batchnorm import freeze_batchnorm, unfreeze_batchnorm
from lightning_freeze.freezing.callback import FreezeBatchNorm
from lightning_freeze.freezing.parameter_groups import parameter_groups
from lightning_freeze.functional import freeze, frozen, to_numpy, trainable_summary, unfreeze
from lightning_freeze.metrics.callback import MetricLogger
from lightning_freeze.norms.callback import NormLogger
from lightning_freeze.schedule.callback import FreezeSchedule
from lightning_freeze.schedule.layers import layers_of, layerwise_lr_decay
from lightning_freeze.schedule.phases import Phase, Plateau
from lightning_freeze.schedule.presets import (
    chain_thaw,
    gradual_unfreezing,
    layerwise_sampling,
    linear_probe_then_finetune,
)
from lightning_freeze.schedule.rates import Ramp
from lightning_freeze.selectors import Selector, select_parameters
from lightning_freeze.target.callback import TargetNetwork

__version__ = version("lightning-freeze")

__all__ = [
    "AuditError",
    "FeatureCache",
    "FeatureStats",
    "Finding",
    "FreezeBatchNorm",
    "FreezeSchedule",
    "GradientAudit",
    "MetricLogger",
    "NormLogger",
    "Phase",
    "Plateau",
    "Ramp",
    "Report",
    "Selector",
    "TargetNetwork",
    "__version__",
    "chain_thaw",
    "freeze",
    "freeze_batchnorm",
    "frozen",
    "gradual_unfreezing",
    "layers_of",
    "layerwise_lr_decay",
    "layerwise_sampling",
    "linear_probe_then_finetune",
    "parameter_groups",
    "select_parameters",
    "to_numpy",
    "trainable_summary",
    "unfreeze",
    "unfreeze_batchnorm",
]


def __dir__() -> list[str]:
    """Return the public names: everything else is the package's own."""
    return sorted(__all__)
