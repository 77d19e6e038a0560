"""Learn to balance CartPole by deep Q-learning, with a target network that follows the one that learns.

Targets of Q-learning come from a slow copy of the network (Mnih et al. 2015, "Human-level control through deep
reinforcement learning"; Lillicrap et al. 2016 for the average), here with the double estimate of van Hasselt et al.
2016. The LightningModule holds two networks of one architecture and a loss; that one follows the other, requires no
gradient and is in no optimizer, is what ``TargetNetwork`` adds.

Run it with ``python examples/dqn_cartpole.py``; it ends with a table and a picture.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from lightning_freeze import TargetNetwork

Policy = Callable[[np.ndarray], np.ndarray]
DISCOUNT = 0.99


def q_network() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 2))


class DQN(LightningModule):
    """A Q-network and its target. Nothing in here copies, averages, freezes or detaches."""

    def __init__(self, steps: int, lr: float = 5e-4) -> None:
        super().__init__()
        self.online = q_network()
        self.target = copy.deepcopy(self.online)
        self.steps, self.lr = steps, lr
        self.greedy_returns: list[list[float]] = []

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        values = self.online(batch["observation"]).gather(1, batch["action"][:, None])[:, 0]
        with torch.no_grad():
            best = self.online(batch["next"]).argmax(1, keepdim=True)
        following = self.target(batch["next"]).gather(1, best)[:, 0]
        goal = batch["reward"] + DISCOUNT * following * ~batch["terminated"]
        return nn.functional.smooth_l1_loss(values, goal)

    def validation_step(self, episodes: int, batch_idx: int) -> None:
        returns = play(greedy(self.target), episodes, seed=1_000 + self.current_epoch)
        self.greedy_returns.append(returns)
        self.log("greedy_return", float(np.mean(returns)), prog_bar=True, batch_size=1)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), lr=self.lr)
        scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, total_iters=self.steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class Experience(IterableDataset[dict[str, Tensor]]):
    """Plays many games at once with a policy that explores less and less; gives batches of all that has happened.

    Args:
        policy: What to do when it does not explore.
        steps: Batches in all; every game moves on by one step for each.
        per_epoch: Batches in an epoch.
        games: How many are played at once.
        batch_size: Transitions in a batch.
        seed: Of games, exploration and batches.
    """

    WARM_UP = 50

    def __init__(self, policy: Policy, steps: int, per_epoch: int, games: int, batch_size: int, seed: int) -> None:
        self.policy, self.steps, self.per_epoch, self.batch_size = policy, steps, per_epoch, batch_size
        self.random = np.random.default_rng(seed)
        self.game = gymnasium.make_vec("CartPole-v1", games, vectorization_mode="vector_entry_point")
        self.observation, _ = self.game.reset(seed=seed)
        self.over = np.zeros(games, dtype=bool)  # the next step of such a game only begins a new one
        self.running = np.zeros(games)
        self.returns: list[tuple[int, float]] = []  # of episodes that ended: at which batch, and the return
        room = games * (steps + self.WARM_UP)
        self.past = {
            "observation": torch.zeros(room, 4),
            "action": torch.zeros(room, dtype=torch.long),
            "reward": torch.zeros(room),
            "next": torch.zeros(room, 4),
            "terminated": torch.zeros(room, dtype=torch.bool),
        }
        self.held = self.given = 0

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        if self.given == 0:
            for _ in range(self.WARM_UP):
                self.move(explore=1.0)
        for _ in range(self.per_epoch):
            # All at random at first, one move in 25 from a fifth of the time on.
            self.move(explore=max(0.04, 1.0 - 5.0 * self.given / self.steps))
            self.given += 1
            chosen = torch.from_numpy(self.random.integers(self.held, size=self.batch_size))
            yield {name: values[chosen] for name, values in self.past.items()}

    def move(self, explore: float) -> None:
        count = len(self.over)
        at_random = self.random.random(count) < explore
        action = np.where(at_random, self.random.integers(2, size=count), self.policy(self.observation))
        following, reward, terminated, truncated, _ = self.game.step(action)
        real = ~self.over
        new = {
            "observation": self.observation[real],
            "action": action[real],
            # Nothing while the pole stands and -1 when it falls: the same best policy as 1 a step, but small values.
            "reward": -terminated[real].astype(np.float32),
            "next": following[real],
            "terminated": terminated[real],  # an episode cut off at its longest goes on, as far as values go
        }
        for name, values in new.items():
            self.past[name][self.held : self.held + real.sum()] = torch.from_numpy(values)
        self.held += int(real.sum())
        self.running += reward
        self.over = terminated | truncated
        self.returns += [(self.given, float(total)) for total in self.running[self.over]]
        self.running[self.over] = 0.0
        self.observation = following


def greedy(network: nn.Module) -> Policy:
    @torch.inference_mode()
    def policy(observation: np.ndarray) -> np.ndarray:
        return network(torch.from_numpy(observation)).argmax(1).numpy()

    return policy


def at_random(seed: int) -> Policy:
    random = np.random.default_rng(seed)
    return lambda observation: random.integers(2, size=len(observation))


def play(policy: Policy, episodes: int, seed: int) -> list[float]:
    """Play so many episodes at once, and give their returns."""
    game = gymnasium.make_vec("CartPole-v1", episodes, vectorization_mode="vector_entry_point")
    observation, _ = game.reset(seed=seed)
    returns, alive = np.zeros(episodes), np.ones(episodes, dtype=bool)
    while alive.any():
        observation, reward, terminated, truncated, _ = game.step(policy(observation))
        returns += reward * alive
        alive &= ~(terminated | truncated)
    return returns.tolist()


def picture(experience: Experience, model: DQN, chance: list[float]) -> Figure:
    """Draw the return of every episode played, and of the greedy policy before training and after each epoch."""
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots()
    ended, returns = np.array(experience.returns).T
    batches = experience.per_epoch * np.arange(len(model.greedy_returns))
    worst, middle, best = (f(np.array(model.greedy_returns), axis=1) for f in (np.min, np.mean, np.max))
    axes.fill_between(
        batches, worst, best, alpha=0.2, color="#2f6f9f", linewidth=0, label="greedy: worst to best of 20"
    )
    axes.plot(batches, middle, marker="o", markersize=4, color="#2f6f9f", label="greedy: mean of 20")
    axes.scatter(ended, returns, s=12, alpha=0.7, color="#d08a2e", linewidths=0, label="an episode, exploring")
    axes.axhline(np.mean(chance), color="#c1553b", linestyle="--", label=f"at random: {np.mean(chance):.0f}")
    axes.set(xlabel="optimizer step", ylabel="return: steps the pole stood", xlim=(0, experience.steps), ylim=(0, 520))
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(frameon=False, loc="outside upper center", ncols=4)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=16)
    parser.add_argument("--per-epoch", type=int, default=250, help="optimizer steps in an epoch")
    parser.add_argument("--games", type=int, default=8, help="how many are played at once")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--tau", type=float, default=0.02, help="how fast the target follows")
    parser.add_argument("--episodes", type=int, default=100, help="greedy episodes that the result is the mean of")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the picture")
    args = parser.parse_args()

    seed_everything(args.seed, verbose=False)
    began = time.perf_counter()
    steps = args.epochs * args.per_epoch
    model = DQN(steps)
    model.greedy_returns.append(play(greedy(model.target), 20, seed=args.seed))
    experience = Experience(greedy(model.online), steps, args.per_epoch, args.games, args.batch_size, args.seed)
    target = TargetNetwork("online", "target", tau=args.tau)
    trainer = Trainer(
        max_epochs=args.epochs,
        callbacks=[target],
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(model, DataLoader(experience, batch_size=None), DataLoader([20], batch_size=None))

    chance = play(at_random(args.seed), args.episodes, seed=args.seed)
    learned = play(greedy(model.target), args.episodes, seed=args.seed)
    table = Table(title=f"CartPole, {args.episodes} episodes")
    for column in ("policy", "mean return", "worst", "best"):
        table.add_column(column, justify="left" if column == "policy" else "right")
    for name, returns in (("at random", chance), ("greedy, the target network", learned)):
        table.add_row(name, f"{np.mean(returns):.1f}", f"{min(returns):.0f}", f"{max(returns):.0f}")
    Console().print(table)
    print(f"{target.steps:,} steps of the target, {experience.held:,} moves, {time.perf_counter() - began:.0f} s")
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "dqn_cartpole.png"
    picture(experience, model, chance).savefig(path, dpi=120)
    print(f"Picture: {path}")


if __name__ == "__main__":
    main()
