"""Every Python block of README.md and docs/ runs as it stands, on a small network with the names that they use."""

from __future__ import annotations

import re
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_freeze

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def blocks() -> list[Any]:
    """Return each block, with blank lines before it so that an error shows its line in the file."""
    found = []
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        text = path.read_text(encoding="utf-8")
        for match in BLOCK.finditer(text):
            line = text.count("\n", 0, match.start(1))
            source = "\n" * line + match.group(1)
            found.append(pytest.param(path, source, id=f"{path.name}:{line + 1}"))
    return found


def block(inputs: int, outputs: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU())


class Classifier(LightningModule):
    """What the README's `model` is: a backbone of layers with BatchNorm, and a head."""

    def __init__(self) -> None:
        super().__init__()
        stem = [("conv1", nn.Conv2d(3, 4, 3)), ("bn1", nn.BatchNorm2d(4))]
        layers = [(f"layer{number}", block(4, 4)) for number in range(1, 5)]
        pool = [("pool", nn.AdaptiveAvgPool2d(1)), ("flatten", nn.Flatten())]
        self.backbone = nn.Sequential(OrderedDict([*stem, *layers, *pool]))
        self.head = nn.Linear(4, 10)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.backbone(images))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> dict[str, Tensor]:
        logits = self(batch[0])
        return {"loss": nn.functional.cross_entropy(logits, batch[1]), "preds": logits.detach(), "target": batch[1]}

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> dict[str, Tensor]:
        outputs = self.training_step(batch, batch_idx)
        self.log("val_loss", outputs["loss"])
        return outputs

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def loader() -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(12, 3, 6, 6, generator=generator)
    return DataLoader(TensorDataset(images, torch.arange(12) % 10), batch_size=4)


@pytest.mark.filterwarnings("ignore:.*logging interval")
@pytest.mark.filterwarnings("ignore:.*tensorboardX")
@pytest.mark.filterwarnings("ignore:The dirpath has changed")
@pytest.mark.filterwarnings("ignore:Found .* module.s. in eval mode")  # a finder begins to train while some are frozen
@pytest.mark.parametrize(("path", "source"), blocks())
def test_python_block_of_the_docs_runs(
    path: Path, source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names = {
        "torch": torch,
        "nn": nn,
        "Trainer": Trainer,
        "FreezeSchedule": lightning_freeze.FreezeSchedule,
        "Phase": lightning_freeze.Phase,
        "model": Classifier(),
        "train": loader(),
        "val": loader(),
    }
    exec(compile(source, str(path), "exec"), names)


def test_blocks_are_found_in_the_docs() -> None:
    assert len(blocks()) > 10


def test_readme_names_every_public_name() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [name for name in lightning_freeze.__all__ if not re.search(rf"\b{name}\b", text)] == []


def test_readme_names_only_files_that_exist() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    named = set(re.findall(r"\b(?:benchmarks|examples|docs)/[\w./-]+\.(?:py|md|png)", text))
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []
