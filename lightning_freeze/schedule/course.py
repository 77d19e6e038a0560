"""The course of one fit through the phases of a schedule."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch.optim import Optimizer

from lightning_freeze._lightning import Trainer, callbacks_of, log_values, logged_step
from lightning_freeze.freezing.step_view import Scale
from lightning_freeze.logs import get_logger
from lightning_freeze.ranks import check_agreement, greatest
from lightning_freeze.schedule import report
from lightning_freeze.schedule.fit import Fit
from lightning_freeze.schedule.length import phase_length, refuse_unknown, steps_in_all, steps_per_epoch
from lightning_freeze.schedule.looks import Looks, count_anew
from lightning_freeze.schedule.phases import describe, function_name
from lightning_freeze.schedule.progress import Progress, begin_or_go_on
from lightning_freeze.schedule.rates import Length, planned_factor
from lightning_freeze.schedule.weights import bring_back, movable, refuse_sharded

_log = get_logger(__name__)


class Course:
    """A schedule that moves on through its phases.

    ``who`` is the name by which the ledger knows the schedule, ``before`` the progress of the fit that this one goes on
    from; if ``verbose``, a line is logged for each phase that begins.
    """

    def __init__(self, fit: Fit, trainer: Trainer, who: str, before: Progress | None, *, verbose: bool) -> None:
        self.fit, self.trainer, self.phases = fit, trainer, fit.phases
        self._who, self._before, self._verbose = who, before, verbose
        self.progress = Progress()
        self.looks = Looks(trainer, fit.ledger, fit.phases)
        self._length = Length()  # how long the current phase is
        self._stepped = 0  # how often the user has stepped optimizers since the batch began

    @property
    def step(self) -> int:
        """Optimizer steps taken, also those that ``trainer.global_step`` has missed."""
        step = self.trainer.global_step + self.progress.uncounted
        return step + self._stepped if step == self.progress.seen else step

    def begin(self, saved: Mapping[str, Any] | None) -> None:
        """Find out which phase holds and apply it, before optimizers and loops are restored."""
        refuse_sharded(self.trainer.strategy, self.phases)
        report.refuse_averages(self.trainer, self.phases)
        self.fit.begin(self.trainer)
        self.fit.ledger.steps.before.insert(0, self._follow)
        if not self.trainer.lightning_module.automatic_optimization:  # else Lightning counts every step
            self.fit.ledger.steps.counted.append(self._count)
        self._find(saved)  # how many steps the fit takes is not known before the data is there
        self.apply(modes=False)

    def restore(self, saved: Mapping[str, Any] | None) -> None:
        """Go on from what a checkpoint held; tuners restore one in the middle of a fit too."""
        self._find(saved, steps_in_all(self.trainer))
        refuse_unknown(self.trainer, self.progress.phases)
        at = self.trainer.current_epoch, self.trainer.global_step
        if at[1] == 0:
            self.fit.schedulers.take_as_first()
        self.fit.schedulers.check(self.progress.phases, lambda phase: phase_length(self.trainer, phase, at).phase)
        if saved is not None:
            report.another_schedule(self.trainer, self.phases, saved, self.progress.index)
            self.fit.load_state(saved.get("optimizers", []))
        self.fit.ledger.look_again()  # the module's own on_fit_start has run since
        self.apply()
        self.fit.schedulers.begin(self.progress.phase, self._length.phase)

    def start(self) -> None:
        """Begin the phase that holds if it is new; end the fit if the last phase was over."""
        self._tell_start()
        self._end_if_over()

    def begin_epoch(self) -> bool:
        """Look at what the last epoch logged; begin the next phase if this one is over, and return whether it was."""
        self.looks.begin_epoch(self.progress)
        moved = self._move(self._asked(ask_function=True, epoch_begins=True))
        self.progress.seen, self._stepped = self.step, 0
        self._log_phase()
        return moved

    def begin_batch(self, batch_idx: int) -> None:
        """Begin the next phase between two optimizer steps if this one is over, and log scaled rates."""
        progress, step = self.progress, self.step
        stepped, progress.seen, self._stepped = step != progress.seen, step, 0
        # An accumulation window is open unless the last batch ended with a step.
        if progress.may_end_in_epoch and (stepped or batch_idx == 0) and self._move(self._asked(ask_function=stepped)):
            self._log_phase()
        # As LearningRateMonitor does: after the batch a scheduler has gone on to the next step's rate.
        every: int = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        logs = self.phases[progress.index].lr_scale is not None and self.trainer.loggers and every
        if logs and (logged_step(self.trainer) + 1) % every == 0:
            rates = self.fit.rates(self.progress.index)
            log_values(self.trainer, {f"freeze/lr/{select}": rate for select, rate in rates.items()}, monitored=False)

    def end_batch(self) -> None:
        """Count the optimizer steps that Lightning has not counted; end the fit if the last phase is over."""
        steps = self.fit.ledger.steps
        if steps.begun:  # user code may have caught the error of one
            steps.reset()
        if self._stepped and (uncounted := self.step - self.trainer.global_step - self.progress.uncounted):
            if self.progress.uncounted == 0:
                _log.warning(
                    "the optimizer is stepped past Lightning, as SAM's first_step() and second_step() do: "
                    "trainer.global_step does not count these steps. The schedule counts them itself; limits such as "
                    "max_steps do not."
                )
            self.progress.uncounted += uncounted
        if self.progress.may_end_in_epoch:
            self._end_if_over()

    def end_validation(self) -> None:
        """Look at the phase's metric if validation has logged it; end the fit if the last phase is over."""
        if not self.trainer.sanity_checking:
            self.looks.end_validation(self.progress)
            self._end_if_over()

    def end_epoch(self) -> None:
        """End the fit if the last phase is over; what comes back is then in the checkpoint of the epoch's end."""
        self.looks.end_epoch(self.progress)
        self._end_if_over(epochs=1)
        if self.progress.ended and _may_stop(self.trainer):
            self._end_phase(self.progress.ended)

    def end(self) -> None:
        """End the last phase with the fit."""
        progress = self.progress
        self.agree()
        if progress.is_last:
            self._end_phase(progress.ended)
        if self.trainer.fast_dev_run:  # type: ignore[attr-defined]
            self.looks.check(progress, range(len(self.phases)))
        report.fit_ends(self.trainer, self.phases, progress)

    def agree(self) -> None:
        """Have the ranks agree on the progress before it is saved."""
        progress = self.progress
        progress.unlooked, progress.logged = self.looks.epoch_value(progress), self.looks.logged(progress, self.phases)
        progress.asked = greatest(self.trainer.strategy, progress.asked) > 0

    def apply(self, *, modes: bool = True) -> None:
        """Bring everything in line with the phase; doing it twice changes nothing."""
        index, resolved = self.progress.index, self.fit.resolved
        check_agreement(
            self.trainer.strategy,
            lambda: {
                "schedule": describe(self.phases),
                "epoch": self.trainer.current_epoch,
                "phase": index,
                "trains": [(name, tuple(p.shape)) for name, p in resolved.trains[index].items()],
            },
        )
        self.fit.ledger.hold(self._who, resolved.holds[index])
        self.fit.ledger.settle(modes=modes)
        self._length = phase_length(self.trainer, self.progress.phase, self.progress.history[-1][:2])
        self.fit.apply(index, self.factor)

    def factor(self, scale: Scale) -> float:
        """Return the factor that a learning rate scale of the current phase is in the next step."""
        return planned_factor(scale, self.step - self.progress.history[-1][1], self._length)

    def _count(self, optimizer: Optimizer) -> None:
        self._stepped += self.fit.ledger.has(optimizer)

    def _follow(self, optimizer: Optimizer) -> None:
        """Take over an optimizer that somebody has put in the place of another, before its first step."""
        followed = any(phased.optimizer is optimizer for phased in self.fit.optimizers)
        if not followed and self.fit.follow(self.trainer):
            _log.info("the Trainer's optimizers have been exchanged; the schedule goes on with the new ones")
            self.fit.apply(self.progress.index, self.factor)
            self.fit.schedulers.begin(self.progress.phase, self._length.phase)

    def _find(self, saved: Mapping[str, Any] | None, total: int | None = None) -> None:
        self._stepped = 0
        self.progress = begin_or_go_on(
            *(self.phases, self._before, saved, (self.trainer.current_epoch, self.trainer.global_step)),
            steps_per_epoch(self.trainer),
            total=total if any(phase.fraction is not None for phase in self.phases) else None,
            dry_run=bool(self.trainer.fast_dev_run),  # type: ignore[attr-defined]
        )

    def _asked(self, *, ask_function: bool, epoch_begins: bool = False) -> str:
        """Return who asks for the next phase, on whichever rank; empty if nobody does."""
        progress, until, says = self.progress, self.progress.phase.until, 0
        # Ranks that ask each other at every step would wait for each other at every step.
        if progress.ended or not (epoch_begins or callable(until) or self.trainer.world_size == 1):
            return ""
        if ask_function and callable(until) and self.step > progress.history[-1][1]:
            says = int(bool(until(self.trainer, self.trainer.lightning_module)))
        says = greatest(self.trainer.strategy, 2 if progress.asked else says)
        return ("", function_name(until), "next_phase()")[says]

    def _move(self, asked: str) -> bool:
        """Begin the next phase if this one is over, and return whether it began; after the last one end the fit."""
        epoch, progress = self.trainer.current_epoch, self.progress
        why = progress.ended or progress.over(epoch, self.step, asked)
        if not why:
            return False
        if progress.is_last:
            self._end_fit(why)
            if _may_stop(self.trainer):
                raise StopIteration  # before the batch or the epoch that begins, as for on_train_batch_start() == -1
            return False
        self._end_phase(why)
        progress.begin_next(epoch, self.step, why)
        self.apply()
        self.fit.schedulers.begin(progress.phase, self._length.phase, anew=True)
        count_anew(self.trainer)
        self._tell_start()
        return True

    def _tell_start(self) -> None:
        if self._verbose:
            report.phase_begins(self.phases, self.progress, self.fit)
        if not (self.progress.told or self.progress.ended):
            self.progress.told = True  # before the hooks: they may save, and restore
            self._call("on_phase_start")

    def _end_phase(self, why: str) -> None:
        """End the phase that has begun; ``why`` is empty if only the fit ends."""
        progress, watch = self.progress, self.progress.plateau
        if not progress.told:
            return
        if why:
            if why == watch.why:
                bring_back(watch.kept, movable(self.fit.ledger))
            watch.kept = {}
        self._call("on_phase_end")
        progress.told = not why

    def _end_if_over(self, *, epochs: int = 0) -> None:
        """End the fit if the last phase is over, ``epochs`` after the current one began."""
        progress, epoch = self.progress, self.trainer.current_epoch + epochs
        is_closed = progress.ended or epochs or self.step != progress.seen  # the accumulation window
        if progress.is_last and is_closed and (why := progress.ended or progress.over(epoch, self.step)):
            self._end_fit(why)

    def _end_fit(self, why: str) -> None:
        if not self.trainer.should_stop or not self.progress.ended:
            report.last_phase_is_over(self.trainer, self.phases, why, goes_on=not _may_stop(self.trainer))
        self.progress.ended = why
        self.trainer.should_stop = True

    def _log_phase(self) -> None:
        values = {"freeze/phase": self.progress.index, "freeze/trainable_parameters": self.fit.trainable()}
        log_values(self.trainer, {name: float(value) for name, value in values.items()})

    def _call(self, hook: str) -> None:
        """Call a hook of every callback that has it, and then of the module."""
        pl_module, phase = self.trainer.lightning_module, self.phases[self.progress.index]
        for owner in (*callbacks_of(self.trainer), pl_module):
            if callable(function := getattr(owner, hook, None)):
                function(self.trainer, pl_module, phase)


def _may_stop(trainer: Trainer) -> bool:
    """Return whether ``trainer.should_stop`` ends the fit, or the Trainer goes on to its min_epochs or min_steps."""
    epochs: int = trainer.fit_loop.epoch_progress.current.processed  # type: ignore[attr-defined]
    return epochs >= (trainer.min_epochs or 0) and trainer.global_step >= (trainer.min_steps or 0)
