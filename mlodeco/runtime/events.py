"""What functions and hooks are given as the levels of a run step."""

from __future__ import annotations

from typing import Any

from accelerate import Accelerator

from mlodeco.runtime.assembly import Parts
from mlodeco.runtime.context import Context
from mlodeco.runtime.drawn import Drawn
from mlodeco.runtime.engine import muted_context
from mlodeco.runtime.processes import Processes
from mlodeco.runtime.trainer import Gradients, Trainer


class Events:
    """The moments of a run: the contexts of functions, and what hooks hear of a step.

    Args:
        parts: what steps.
        accelerator: that of the run.
        processes: those of the run.
    """

    def __init__(self, parts: Parts, accelerator: Accelerator, processes: Processes) -> None:
        self._built = parts.built
        self._trainers = parts.trainers
        self._hooks = parts.hooks
        self._schedule = parts.schedule
        self._generators = parts.generators
        self._accelerator = accelerator
        self._processes = processes

    def of_run(self, tick: int) -> Context:
        """A context for what belongs to no level."""
        return Context(
            tick=tick,
            device=self._accelerator.device,
            accelerator=self._accelerator,
            processes=self._processes,
        )

    def of_level(self, name: str) -> Context:
        """A context for a level's step."""
        return Context(
            level=name,
            tick=self._built.tick,
            step=self._schedule.steps[name],
            epoch=self._trainers[name].finished_epochs,
            device=self._accelerator.device,
            generator=self._generators[name],
            accelerator=self._accelerator,
            processes=self._processes,
        )

    def muted(self, name: str) -> Context:
        """A context for second-order passes of a level."""
        return muted_context(
            self._built,
            name,
            step=self._schedule.steps[name],
            epoch=self._trainers[name].epoch,
            accelerator=self._accelerator,
            processes=self._processes,
        )

    def fire(self, event: str, name: str, ctx: Context, **offered: Any) -> None:
        """Calls the hooks of an event of a level."""
        if self._hooks.wants(event):
            trainer = self._trainers[name]
            self._hooks.fire(
                event,
                name,
                ctx=ctx,
                optimizer=trainer.optimizer,
                scheduler=trainer.scheduler,
                **offered,
            )

    def offers(
        self, trainer: Trainer, found: Gradients, batches: tuple[Drawn, ...], ctx: Context
    ) -> dict[str, Any]:
        """What hooks may take of a step that has its gradients."""
        return {
            "batch": batches[-1].batch,
            "grads": trainer.gradients() if self._wants_gradients(ctx) else {},
            "loss": found.loss,
            "metrics": {**found.metrics, **ctx.logged},
            **batches[-1].sources,
        }

    def _wants_gradients(self, ctx: Context) -> bool:
        """Whether some hook takes gradients, and there are some."""
        return self._hooks.listens_to_gradients and not ctx.skipped
