"""Every builder of torchvision and families of timm: select the head, freeze, step, unfreeze half, step, resume."""

from __future__ import annotations

import importlib
import math
import os
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_freeze import FreezeSchedule, Phase, freeze, select_parameters, unfreeze
from tests.compatibility.check import Outcome, equal, sentence
from tests.nets import Probe, moved, snapshot, trainer

#: A network of more parameters is built without memory, selected and frozen, but not trained.
LARGEST = int(float(os.environ.get("LF_LARGEST", "30e6")))

# Smaller ones are trained on as few pixels as they take; these need more than 64.
SIZES = {"inception_v3": 299, "maxvit_t": 224, "raft_large": 128, "raft_small": 128, "mvit_v1_b": 224, "mvit_v2_s": 224}

_TIMM = """
cait_xxs24_224 coat_lite_tiny coatnet_nano_rw_224 convmixer_768_32 convnext_atto convnextv2_atto crossvit_tiny_240
cspresnet50 davit_tiny deit_tiny_patch16_224 densenet121 dla34 dpn48b edgenext_xx_small efficientformer_l1
efficientnet_lite0 efficientvit_b0 ese_vovnet19b_dw eva02_tiny_patch14_224 fastvit_t8 focalnet_tiny_srf gcvit_xxtiny
ghostnet_050 gmixer_12_224 gmlp_ti16_224 hardcorenas_a hgnetv2_b0 hrnet_w18_small lcnet_050 levit_128s mambaout_femto
mixer_s32_224 mnasnet_small mobilenetv2_050 mobilenetv3_small_050 mobilenetv4_conv_small mobilevit_xxs nest_tiny
nf_regnet_b0 pit_ti_224 poolformer_s12 pvt_v2_b0 regnetx_002 regnety_002 repghostnet_050 repvgg_a0 res2net50_26w_4s
resmlp_12_224 resnest14d resnet18 resnext26ts rexnet_100 selecsls42b seresnet18 skresnet18 starnet_s1
swin_tiny_patch4_window7_224 tiny_vit_5m_224 tinynet_e twins_pcpvt_small vgg11 visformer_tiny vit_tiny_patch16_224
volo_d1_224 xception41 xcit_nano_12_p16_224
"""
TIMM = _TIMM.split()


def torchvision_names() -> list[str]:
    models = importlib.import_module("torchvision.models")
    return list(models.list_models())


class Learner(LightningModule):
    """Trains a network of any kind on two samples of what it takes."""

    def __init__(self, net: nn.Module, batch: Any, loss: Callable[[nn.Module, Any], Tensor]) -> None:
        super().__init__()
        self.net, self.loss = net, loss
        self.batch = batch

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        torch.default_generator.manual_seed(self.trainer.current_epoch)  # dropout draws the same in a run that resumes
        return self.loss(self.net, self.batch)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=1e-2, momentum=0.9)


def total(outputs: Any) -> Tensor:
    """A loss of whatever a network returns: of every tensor that has a gradient."""
    if isinstance(outputs, Tensor):
        return outputs.float().square().mean() if outputs.requires_grad else torch.zeros(())
    values = outputs.values() if isinstance(outputs, dict) else outputs if isinstance(outputs, list | tuple) else ()
    losses = [total(value) for value in values]
    return torch.stack(losses).sum() if losses else torch.zeros(())


def plain_loss(net: nn.Module, batch: Any) -> Tensor:
    return total(net(*batch))


def torchvision_model(name: str) -> tuple[nn.Module, Any]:
    """A network with random weights, and what it is called with."""
    models = importlib.import_module("torchvision.models")
    kind = models.get_model_builder(name).__module__.split(".")[2]
    options: dict[str, Any] = {"weights": None}
    if kind in ("detection", "segmentation"):
        options |= {"weights_backbone": None, "num_classes": 3}
    if name.startswith("vit_"):
        options["image_size"] = 64 if not name.endswith("14") else 56
    if name in ("inception_v3", "googlenet", "quantized_inception_v3", "quantized_googlenet"):
        options |= {"init_weights": False}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        net = models.get_model(name, **options)
    torch.manual_seed(0)
    size = options.get("image_size", SIZES.get(name.removeprefix("quantized_"), 64))
    if kind == "optical_flow":
        return net, (torch.randn(1, 3, size, size), torch.randn(1, 3, size, size), 2)
    if kind == "video":
        frames = 16 if name.startswith(("mvit", "s3d")) else 4
        return net, (torch.randn(2, 3, frames, 224 if name == "s3d" else size, 224 if name == "s3d" else size),)
    if kind == "detection":
        return net, detected(name)
    return net, (torch.randn(2, 3, size, size),)


def detected(name: str) -> Any:
    boxes = torch.tensor([[4.0, 4.0, 40.0, 40.0], [20.0, 10.0, 60.0, 50.0]])
    target: dict[str, Tensor] = {"boxes": boxes, "labels": torch.tensor([1, 2])}
    if name.startswith("mask"):
        target["masks"] = torch.ones(2, 64, 64, dtype=torch.uint8)
    if name.startswith("keypoint"):
        target["keypoints"] = torch.tensor([[[10.0, 10.0, 1.0]] * 17, [[30.0, 20.0, 1.0]] * 17])
        target["labels"] = torch.tensor([1, 1])
    return [torch.rand(3, 64, 64) for _ in range(2)], [dict(target) for _ in range(2)]


def timm_model(name: str) -> tuple[nn.Module, Any]:
    """A network with random weights, and images of 64 pixels where it takes them."""
    timm = importlib.import_module("timm")
    torch.manual_seed(0)
    net = timm.create_model(name, pretrained=False, num_classes=3)
    for size in (64, net.default_cfg["input_size"][-1]):
        images = torch.randn(2, 3, size, size)
        try:
            with torch.no_grad():
                net.eval()(images)
        except (AssertionError, RuntimeError, ValueError):
            continue
        return net.train(), (images,)
    return net.train(), (images,)


def parts(net: nn.Module) -> tuple[list[str], list[str]]:
    """The selectors of the head, and of the later half of all layers."""
    children = [(name, child) for name, child in net.named_children() if any(True for _ in child.parameters())]
    prefix = "net."
    while len(children) == 1:
        prefix += f"{children[0][0]}."
        net = children[0][1]
        children = [(name, child) for name, child in net.named_children() if any(True for _ in child.parameters())]
    layers = [
        name for name, module in net.named_modules() if name and any(True for _ in module.parameters(recurse=False))
    ]
    return [prefix + children[-1][0]], [prefix + name for name in layers[len(layers) // 2 :]]


def check_model(make: Callable[[], tuple[nn.Module, Any]]) -> Outcome:
    """Train and resume; without us only where something is wrong."""
    size = sum(p.numel() for p in shape_only(make).parameters())
    if size > LARGEST:
        return _select(make, size)
    with tempfile.TemporaryDirectory() as place:
        try:
            return _train(make, Path(place))
        except Exception as error:
            try:
                net, batch = make()
                plain_loss(net, batch).backward()
            except Exception as own:
                return Outcome("itself", sentence(own))
            return Outcome("fails", f"{type(error).__name__}: {sentence(error)}")


def shape_only(make: Callable[[], tuple[nn.Module, Any]]) -> nn.Module:
    """A network without memory for its weights, if its builder does not look at values."""
    try:
        with torch.device("meta"):
            return make()[0]
    except (NotImplementedError, RuntimeError):
        return make()[0]


def _select(make: Callable[[], tuple[nn.Module, Any]], size: int) -> Outcome:
    net = nn.ModuleDict({"net": shape_only(make)})
    head, half = parts(net["net"])
    freeze(net)
    for select in (head, half):
        unfreeze(net, select)
        if not all(p.requires_grad for p in select_parameters(net, select).values()):
            return Outcome("fails", "not all that is selected trains")
    return Outcome("selected", f"{math.ceil(size / 1e6)} million parameters: selected and frozen, not trained")


def _train(make: Callable[[], tuple[nn.Module, Any]], folder: Path) -> Outcome:
    problems: list[str] = []

    def fit(resume: Path | None = None) -> dict[str, Any]:
        torch.manual_seed(0)
        net, batch = make()
        learner = Learner(net, batch, plain_loss)
        head, half = parts(net)
        schedule = FreezeSchedule([Phase(head, epochs=1), Phase([*head, *half])], verbose=False)
        before: dict[str, Tensor] = {}

        def end(run: Trainer, module: LightningModule) -> None:
            problems.extend(_wrong(module, before, moved(before, snapshot(module))))

        saver = [] if resume else [ModelCheckpoint(folder, "{epoch}", save_top_k=-1, save_on_train_epoch_end=True)]
        probe = Probe(lambda _, module: before.update(snapshot(module)), end)
        run = trainer(folder, callbacks=[schedule, probe, *saver], max_epochs=2, enable_checkpointing=not resume)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            run.fit(learner, DataLoader([0]), ckpt_path=resume, weights_only=False)  # type: ignore[arg-type]
        return {"weights": snapshot(learner), "state": run.optimizers[0].state_dict()}

    whole = fit()
    (folder / "epoch=1.ckpt").unlink()
    again = fit(folder / "epoch=0.ckpt")
    if problems:
        return Outcome("fails", problems[0])
    differ = [key for key in whole if not equal(whole[key], again[key])]
    return Outcome("fails", f"a resumed run differs: {', '.join(differ)}") if differ else Outcome("works")


def _wrong(module: LightningModule, before: dict[str, Tensor], changed: set[str]) -> list[str]:
    found = []
    parameters = dict(module.named_parameters())
    for name, p in parameters.items():
        if name in changed and not p.requires_grad:
            found.append(f"moves although frozen: {name}")
        if name not in changed and p.requires_grad and p.grad is not None and p.grad.abs().max() > 1e-3:
            found.append(f"stays although trained: {name}")
    for name in changed - parameters.keys():
        owner = module.get_submodule(name.rpartition(".")[0])
        own = list(owner.parameters(recurse=False))
        if own and not any(p.requires_grad for p in own):
            found.append(f"moves although frozen: {name}")
    return found
