"""Writes the gallery, ``docs/gallery/index.md`` and its pictures: every preset and option as a table and as a picture.

    python docs/gallery/make.py          # all of it
    python docs/gallery/make.py ramp     # only the pages whose names have "ramp" in them; the index stays

Networks are on the meta device, so nothing is downloaded and little memory is needed. A page that fails is named at the
end, and the others are written.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torchvision
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_freeze

HERE = Path(__file__).parent


class Transformer(nn.Module):
    """An encoder of 12 blocks, as in BERT-base, with a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embeddings = nn.Embedding(30_522, 768)
        self.position = nn.Parameter(torch.zeros(1, 512, 768))
        self.blocks = nn.ModuleList(nn.TransformerEncoderLayer(768, 12, 3072, activation="gelu") for _ in range(12))
        self.norm = nn.LayerNorm(768)
        self.head = nn.Linear(768, 10)


class Gan(nn.Module):
    """A generator and a discriminator of five blocks each."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = nn.Sequential(*(nn.Sequential(nn.Conv2d(64, 64, 3), nn.BatchNorm2d(64)) for _ in range(5)))
        self.discriminator = nn.Sequential(*(nn.Conv2d(64, 64, 4) for _ in range(5)), nn.Linear(64, 1))


class Byol(nn.Module):
    """An online network, its target, and a predictor."""

    def __init__(self) -> None:
        super().__init__()
        self.online = torchvision.models.resnet18(num_classes=256)
        self.predictor = nn.Sequential(nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 256))
        self.target = torchvision.models.resnet18(num_classes=256)


class Small(LightningModule):
    """A network that is really trained, for the picture of what a fit did."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(3)))
        self.head = nn.Linear(8, 3)

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        loss = nn.functional.cross_entropy(self.head(self.backbone(batch[0])), batch[1])
        self.log("loss", loss, on_step=False, on_epoch=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.01)


class Cosine(Small):
    """The same with a scheduler."""

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)]


def fit(schedule: Any, model: LightningModule, max_epochs: int) -> None:
    """Train on noise, quietly."""
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(64, 8), torch.arange(64) % 3)
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    Trainer(max_epochs=max_epochs, callbacks=[schedule], accelerator="cpu", **quiet).fit(model, DataLoader(data, 8))


@cache
def models() -> dict[str, Any]:
    """Return the networks, by the names that the pages give them."""
    torch.manual_seed(0)
    with torch.device("meta"):
        made = {
            "resnet": torchvision.models.resnet50(num_classes=10),
            "transformer": Transformer(),
            "detector": torchvision.models.detection.fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None),
            "gan": Gan(),
            "byol": Byol(),
        }
    return {**made, "small": Small(), "cosine": Cosine(), "fit": fit}


@dataclass(frozen=True)
class Page:
    """One schedule.

    Args:
        name: The name of its picture.
        title: Its heading.
        text: What it is for.
        make: The code that makes ``schedule``.
        on: The network, and how long the fit takes, as arguments of ``preview`` and ``plot``.
        plot: Other arguments of ``plot``, where it shows what a fit did.
    """

    name: str
    title: str
    text: str
    make: str
    on: str
    plot: str | None = None

    @property
    def code(self) -> str:
        """What a reader would write."""
        shown = (
            f"print(schedule.preview({self.on}, optimizer=torch.optim.AdamW))\nschedule.plot({self.plot or self.on})"
        )
        return f"{self.make}\n{shown}"

    def run(self, *, picture: bool = True) -> tuple[Any, Any]:
        """Return the table, and the figure if it is wanted."""
        names = {**vars(lightning_freeze), "torch": torch, **models()}
        exec(self.make, names)
        table = eval(f"schedule.preview({self.on}, optimizer=torch.optim.AdamW)", names)
        return table, eval(f"schedule.plot({self.plot or self.on})", names) if picture else None


LAYERS = 'layers = ["conv1", "bn1", "layer1", "layer2", "layer3", "layer4", "fc"]\n'
BLOCKS = 'layers = ["embeddings", *(f"blocks.{n}" for n in range(12)), "head"]\n'

PAGES = [
    Page(
        "probe", "Linear probe, then everything",
        "The head alone, so that its first, large gradients do not distort the features; then all, the backbone slower "
        "(Kumar et al. 2022).",
        'schedule = FreezeSchedule(linear_probe_then_finetune("fc", probe_epochs=2, backbone_scale=0.1))',
        "resnet, max_epochs=8",
    ),
    Page(
        "gradual", "Gradual unfreezing with discriminative rates",
        "One layer more each epoch, from the last to the first, each at its successor's rate divided by 2.6 (ULMFiT, "
        "Howard and Ruder 2018).",
        LAYERS + "schedule = FreezeSchedule(gradual_unfreezing(layers, lr_decay=2.6))",
        "resnet, max_epochs=10",
    ),
    Page(
        "gradual_blocks", "Gradual unfreezing of a transformer",
        "Block by block. What no layer names is below the table, and grey in the picture.",
        BLOCKS + "schedule = FreezeSchedule(gradual_unfreezing(layers, lr_decay=1.3))",
        "transformer, max_epochs=18",
    ),
    Page(
        "chain_thaw", "Chain-thaw",
        "The new layer alone, each other layer alone, then everything (DeepMoji, Felbo et al. 2017).",
        LAYERS + "schedule = FreezeSchedule(chain_thaw(layers))",
        "resnet, max_epochs=12",
    ),
    Page(
        "lisa", "Layerwise sampling",
        "Two blocks at a time, drawn anew every 20 steps; embedding and head always (LISA, Pan et al. 2024). With "
        "`optimizer_state=\"drop\"` it takes the memory of these few.",
        "layers = [f\"blocks.{n}\" for n in range(12)]\n"
        'phases = layerwise_sampling(layers, ["embeddings", "head"], total_steps=400)\n'
        'schedule = FreezeSchedule(phases, optimizer_state="drop")',
        "transformer, max_steps=400",
    ),
    Page(
        "ends", "Ends of phases: epochs, steps, a share of the fit",
        "A phase lasts epochs, optimizer steps or a share of the fit, whichever comes first, or until a metric stops "
        "getting better.",
        "schedule = FreezeSchedule([\n"
        '    Phase("fc", fraction=0.1),\n'
        '    Phase(["fc", "layer4"], steps=300),\n'
        '    Phase(["fc", "layer4", "layer3"], epochs=2),\n'
        '    Phase("*"),\n'
        "])",
        "resnet, max_epochs=10, steps_per_epoch=200",
    ),
    Page(
        "last_end", "The end of the last phase ends the fit",
        "Nobody has to make `max_epochs` equal to the sum of the phases.",
        'schedule = FreezeSchedule([Phase("fc", epochs=2), Phase("*", epochs=4)])',
        "resnet, max_epochs=100",
    ),
    Page(
        "scales", "Learning rate scales",
        "A factor for everything, or for a part; where selectors overlap, the last one counts.",
        "schedule = FreezeSchedule([\n"
        '    Phase("head", epochs=2, lr_scale=2.0),\n'
        '    Phase(["head", "blocks.10", "blocks.11"], epochs=2, lr_scale={"blocks": 0.3}),\n'
        '    Phase("*", lr_scale={"*": 0.1, "blocks.10": 0.3, "blocks.11": 0.3, "head": 1.0}),\n'
        "])",
        "transformer, max_epochs=10",
    ),
    Page(
        "layerwise_decay", "Layer-wise decay of rates",
        "Each block's rate is its successor's times 0.75, from the first step on. What no layer names "
        "has the full rate.",
        'layers = ["embeddings", *layers_of(transformer)]\n'
        'schedule = FreezeSchedule([Phase("*", lr_scale=layerwise_lr_decay(layers, 0.75))])',
        "transformer, max_epochs=5",
    ),
    Page(
        "ramp", "Ramps: rates that rise instead of jumping in",
        "What unfreezes begins slowly: linearly, by the same ratio each step, or slowly at both ends.",
        "schedule = FreezeSchedule([\n"
        '    Phase("fc", epochs=2, lr_scale=Ramp(0.1, epochs=1)),\n'
        '    Phase(["fc", "layer4"], epochs=3, lr_scale={"layer4": Ramp(0.01, 0.3, epochs=2, shape="exponential")}),\n'
        '    Phase("*", lr_scale={"*": Ramp(0.01, 0.1, epochs=3, shape="cosine"), "fc": 1.0}),\n'
        "])",
        "resnet, max_epochs=10",
    ),
    Page(
        "own_scheduler", "A scheduler of a phase's own",
        "`cosine` returns a `CosineAnnealingLR`. The first phase has another one in its place; in the second it goes "
        "on, in the third it begins anew.",
        "from torch.optim.lr_scheduler import OneCycleLR\n\n"
        "schedule = FreezeSchedule([\n"
        '    Phase("head", epochs=3, lr_scheduler=lambda optimizer, steps: OneCycleLR(optimizer, 0.02, steps)),\n'
        '    Phase(["head", "backbone.2"], epochs=3, lr_scale={"backbone": Ramp(0.1, epochs=2)}),\n'
        '    Phase("*", lr_scheduler="restart", lr_scale={"backbone": 0.5}),\n'
        "])",
        "cosine, max_epochs=10, steps_per_epoch=20",
    ),
    Page(
        "again", "Layers can freeze again",
        "Head and backbone in turn, as in alternating training.",
        "schedule = FreezeSchedule([\n"
        '    Phase("fc", epochs=1), Phase(["*", "!fc"], epochs=2, lr_scale=0.1),\n'
        '    Phase("fc", epochs=1), Phase(["*", "!fc"], epochs=2, lr_scale=0.03),\n'
        '    Phase("*", lr_scale=0.01),\n'
        "])",
        "resnet, max_epochs=8",
    ),
    Page(
        "bias", "Biases only",
        "Selectors name kinds of parameters too. A row in which only parts train is drawn in parts.",
        'schedule = FreezeSchedule([Phase(["*.bias", "head"], epochs=4), Phase("*", lr_scale=0.1)])',
        "transformer, max_epochs=6",
    ),
    Page(
        "slices", "Slices of blocks",
        "`blocks[-4:]` are the last four.",
        'schedule = FreezeSchedule([\n    Phase("head", epochs=1),\n    Phase(["head", "blocks[-4:]"], epochs=2),\n'
        '    Phase(["head", "blocks[-8:]"]),\n])',
        "transformer, max_epochs=6",
    ),
    Page(
        "batchnorm", "Beside `FreezeBatchNorm`",
        "What another callback keeps frozen is frozen in every phase.",
        'schedule = FreezeSchedule([Phase("fc", epochs=2), Phase("*", lr_scale={"*": 0.1, "fc": 1.0})])',
        'resnet, max_epochs=6, callbacks=[FreezeBatchNorm("*")]',
    ),
    Page(
        "target", "Beside `TargetNetwork`",
        "A target network never trains, also under `\"*\"`.",
        'schedule = FreezeSchedule([Phase("predictor", epochs=1), Phase("*")])',
        'byol, max_epochs=5, callbacks=[TargetNetwork("online", "target", tau=0.01)]',
    ),
    Page(
        "detection", "Detection",
        "Heads first, then the pyramid, then the backbone without its stem, slowly.",
        'stem = ["!backbone.body.conv1", "!backbone.body.bn1", "!backbone.body.layer1"]\n'
        "schedule = FreezeSchedule([\n"
        '    Phase("roi_heads", name="box head", epochs=1),\n'
        '    Phase(["roi_heads", "rpn", "backbone.fpn"], name="heads and pyramid", epochs=2),\n'
        '    Phase(["*", *stem], name="all but the stem", lr_scale={"backbone.body": Ramp(0.01, 0.1, epochs=2)}),\n'
        "])",
        "detector, max_epochs=8",
    ),
    Page(
        "gan", "A GAN",
        "The discriminator first and faster; at the end its first layers are frozen (FreezeD, Mo et al. 2020).",
        "schedule = FreezeSchedule([\n"
        '    Phase("discriminator", epochs=1),\n'
        '    Phase("*", epochs=4, lr_scale={"discriminator": 4.0}),\n'
        '    Phase(["*", "!discriminator.0", "!discriminator.1"], name="FreezeD", lr_scale={"discriminator": 4.0}),\n'
        "])",
        "gan, max_epochs=8",
    ),
    Page(
        "plateau", "Until a metric stops getting better",
        "When a plateau comes, nobody knows: before the fit the table shows a guess, and says so. After the fit the "
        "picture shows what happened.",
        "schedule = FreezeSchedule([\n"
        '    Phase("head", until=Plateau("loss", patience=2, min_delta=0.02)),\n'
        '    Phase(["head", "backbone.2"], steps=30),\n'
        '    Phase("*", lr_scale={"backbone": 0.3}),\n'
        "], verbose=False)\n"
        "fit(schedule, small, max_epochs=12)",
        "small, max_epochs=12, steps_per_epoch=8",
        "small",
    ),
]  # fmt: skip


def sections(pages: list[Page], pictures: Path | None = HERE) -> Iterator[tuple[Page, str | Exception]]:
    """Yield each page and its Markdown, or what it raised; write the pictures if a folder for them is given."""
    for page in pages:
        try:
            table, figure = page.run()
            if pictures is not None:
                figure.savefig(
                    pictures / f"{page.name}.png", pil_kwargs={"optimize": True}, metadata={"Software": None}
                )
        except Exception as error:  # a page that fails is no reason not to write the others
            yield page, error
            continue
        yield (
            page,
            (
                f"## {page.title}\n\n{page.text}\n\n```python\n{page.code}\n```\n\n```text\n{table}\n```\n\n"
                f"![{page.title}]({page.name}.png)\n"
            ),
        )


def main() -> None:
    """Write the gallery."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    wanted = [page for page in PAGES if not sys.argv[1:] or any(word in page.name for word in sys.argv[1:])]
    made, failed = [], list[str]()
    for page, text in sections(wanted):
        if isinstance(text, Exception):
            failed.append(f"{page.name}: {type(text).__name__}: {text}")
        else:
            made.append(text)
    if not sys.argv[1:]:
        introduction = (
            "# Gallery\n\nEvery ready-made schedule and option, as `preview` prints it and `plot` draws it. The\n"
            "memory is that of AdamW. This file and its pictures are written by `make gallery`.\n"
        )
        (HERE / "index.md").write_text("\n".join([introduction, *made]), encoding="utf-8")
    size = sum(path.stat().st_size for path in HERE.glob("*.png"))
    print(f"{len(made)} pages; all pictures together {size / 1e6:.2f} MB")
    if failed:
        sys.exit("\n".join(["failed:", *failed]))


if __name__ == "__main__":
    main()
