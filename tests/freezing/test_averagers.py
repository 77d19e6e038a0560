from __future__ import annotations

import pytest
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from torch import nn

from lightning_freeze.freezing.averagers import refuse_new_statistics
from tests.nets import trainer


def test_refused_only_where_statistics_would_be_lost() -> None:
    averaging = trainer(callbacks=[StochasticWeightAveraging(0.1)])
    with pytest.raises(MisconfigurationException, match="has Me and StochasticWeightAveraging"):
        refuse_new_statistics(averaging, nn.Sequential(nn.BatchNorm1d(2)), "Me")
    refuse_new_statistics(averaging, nn.LayerNorm(2), "Me")
    refuse_new_statistics(trainer(callbacks=[WeightAveraging()]), nn.BatchNorm1d(2), "Me")
