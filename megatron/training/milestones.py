"""What is due between two steps: validation, test and checkpoints."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from megatron.engine.engine import TrainEngine
from megatron.mixing.reported import Reported
from megatron.monitor.throughput import Throughput
from megatron.signals.validation import Validation
from megatron.signals.windows import HeldOut
from megatron.training.agreement import Agreement
from megatron.training.loop import Ending
from megatron.training.recorder import RunRecorder
from megatron.training.saving import Saver
from megatron.training.stall import SAVING, VALIDATING, Heartbeat

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class TaskNumbers:
    """What an evaluation by tasks found.

    Attributes:
        metrics: by task.
        num_fewshot: examples before every question of a task, where there were any.
    """

    metrics: Mapping[str, Mapping[str, float]]
    num_fewshot: Mapping[str, int] = field(default_factory=dict)


@dataclass(kw_only=True)
class Milestones:
    """Validates and saves where that is due; each at most once for a step.

    Attributes:
        engine: the model.
        validation: the reported validation sets.
        review: tells the controller of a report validation; returns what it did about it.
        say: takes a line for the console.
        test: the test sets, measured once when the run is complete.
        agreement: compares the ranks' states, now and then and before every save.
        saver: writes checkpoints.
        write_product: writes the mixture that the method has found so far, if it finds one.
        recorder: takes the measurements.
        throughput: paused meanwhile, so that the rate is that of training.
        eval_interval: steps between two validations.
        saves_at: whether a checkpoint is due after a step.
        weights: the mixture's start weights [K], for the weighted average.
        tasks: evaluates the model by tasks, on all ranks, and returns metrics by task (nothing
            on ranks other than the first); None where no tasks are asked for.
        tasks_interval: steps between two evaluations by tasks.
        heartbeat: is told when a measurement or a save begins.
    """

    engine: TrainEngine
    validation: Validation
    review: Callable[[Reported], str | None]
    say: Callable[[str], None]
    test: Validation
    agreement: Agreement
    saver: Saver
    write_product: Callable[[int], None]
    recorder: RunRecorder
    throughput: Throughput
    eval_interval: int
    saves_at: Callable[[int], bool]
    weights: FloatArray
    tasks: Callable[[], TaskNumbers | None] | None = None
    tasks_interval: int = 1
    heartbeat: Heartbeat = field(default_factory=Heartbeat)
    _validated: int = field(default=-1, init=False)
    _evaluated: int = field(default=-1, init=False)
    _saved: int = field(default=-1, init=False)

    def before_first(self) -> None:
        """Measure and, if asked for, save the model as it was initialised."""
        self.throughput.pause()
        self._validate(0)
        if self.saves_at(0):
            self._save(0)
        self.throughput.resume()

    def after_step(self, step: int, ending: Ending | None) -> None:
        """Do what is due after ``step``; the last step of a run is always saved.

        A validation that falls on the step at which a run was asked to stop is made before
        the save, so that the records of the whole run do not depend on interruptions.
        """
        if ending is Ending.STOPPED:
            self._wait(step)  # what stopped the run may be a save that has failed
        self.agreement.after_step(step)
        over = ending in (Ending.COMPLETE, Ending.EXHAUSTED)
        validate = over or step % self.eval_interval == 0
        evaluate = self.tasks is not None and (over or step % self.tasks_interval == 0)
        save = ending is not None or self.saves_at(step)
        if not (validate or evaluate or save):
            return
        self.throughput.pause()
        if validate:
            self._validate(step)
        if over:
            self._measure(self.test, step, "test")
        if evaluate:
            self._evaluate(step)
        if save:
            self._save(step, last=ending is not None)
        if ending is not None:
            self._wait(step)
        self.throughput.resume()

    def _validate(self, step: int) -> None:
        if self._validated != step:
            self._measure(self.validation, step, "valid")
            self._validated = step

    def _measure(self, validation: Validation, step: int, split: str) -> None:
        if validation.empty:
            return
        self.heartbeat.at(VALIDATING, step)
        started = time.perf_counter()
        held_out = validation.measure(self.engine)
        seconds = time.perf_counter() - started
        review = self._review(step, held_out) if split == "valid" else None
        self.recorder.validation(
            step, held_out.loss, split=split, weights=self.weights, seconds=seconds, review=review
        )

    def _evaluate(self, step: int) -> None:
        """Evaluate by tasks; collective."""
        if self.tasks is None or self._evaluated == step:
            return
        self.heartbeat.at(VALIDATING, step)
        started = time.perf_counter()
        found = self.tasks()
        if found is not None:
            seconds = time.perf_counter() - started
            self.recorder.tasks(step, found.metrics, found.num_fewshot, seconds=seconds)
        self._evaluated = step

    def _review(self, step: int, held_out: HeldOut) -> str | None:
        """Tell the controller, and the user of what it did."""
        text = self.review(
            Reported(
                step=step,
                loss=held_out.loss,
                window_loss=held_out.window_loss,
                window_domain=held_out.window_domain,
            )
        )
        if text is not None:
            self.say(text)
        return text

    def _wait(self, step: int) -> None:
        """Wait for a save that goes on behind the steps; collective as to its failure."""
        self.heartbeat.at(SAVING, step)
        self.saver.wait()

    def _save(self, step: int, *, last: bool = False) -> None:
        if self._saved != step:
            self.heartbeat.at(SAVING, step)
            self.agreement.compare(step)
            self.saver.save(step, last=last)
            self.write_product(step)
            self._saved = step
