"""One level in a run: its optimizer, data and steps."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from mlodeco.calculus.clipping import clip_factor, clip_rows, row_norms
from mlodeco.calculus.mean import Mean
from mlodeco.calculus.point import LowerProblem, Point
from mlodeco.calculus.products import Reverse, differentiate_once
from mlodeco.calculus.randomness import RecordedStreams, SavedRandomness
from mlodeco.calculus.rule import Rule, RuleOfEach
from mlodeco.calculus.slots import Slot, State
from mlodeco.calculus.stateless import frozen, require_finite
from mlodeco.calculus.sweep import Hypergradient, Memories, Solve
from mlodeco.calculus.update import Iterate, Update
from mlodeco.declare.calls import noted
from mlodeco.errors import NonFiniteError
from mlodeco.runtime.build import Build, BuiltLevel
from mlodeco.runtime.context import Context
from mlodeco.runtime.data import Feed, Placer, Share, items_for
from mlodeco.runtime.drawn import Drawn
from mlodeco.runtime.fsdp import rest, shard_like
from mlodeco.runtime.modules import copy_into
from mlodeco.runtime.nonfinite import Watch
from mlodeco.runtime.optimizers import (
    fresh_state,
    is_divided,
    load_optimizer,
    make_optimizer,
    make_scheduler,
    read_state,
    read_step,
    save_optimizer,
)
from mlodeco.runtime.overlap import Passes
from mlodeco.runtime.processes import Processes
from mlodeco.runtime.scaling import LossScale, scale_for
from mlodeco.runtime.sharded_passes import ShardedPasses
from mlodeco.runtime.sharding import plain_part
from mlodeco.tree import Tree, dense, dot, norm


@dataclass
class Gradients:
    """What one step's backward passes found; the gradients are in ``.grad``.

    ``own_loss`` is that of this process, where ``loss`` is a mean over processes.
    """

    loss: float
    metrics: dict[str, Any]
    solves: tuple[Solve, ...] = ()
    cosine: float | None = None
    trouble: NonFiniteError | None = None
    own_loss: float = 0.0


class Trainer:
    """The state of one level in a run and the parts of its step.

    Args:
        built: the program.
        level: the level.
        place: moves batches to the device of the run.
        processes: those of the run.
        share: makes of a source of batches the part that this process sees.
        choose_passes: those of the steps of a level that has its first gradients.
    """

    def __init__(
        self,
        built: Build,
        level: BuiltLevel,
        place: Placer,
        processes: Processes,
        share: Share,
        choose_passes: Callable[[BuiltLevel], Passes],
    ) -> None:
        self.level = level
        self.optimizer = None if level.rule else make_optimizer(level)
        self.scheduler = make_scheduler(level, self.optimizer) if self.optimizer else None
        self._rule_state: Mapping[str, Any] = {}
        self._built = built
        self.memories: Memories = {}
        self._last_hypergradient: tuple[Tree, float] = {}, 0.0
        self._processes = processes
        self._feed = Feed(level.declaration, share)
        self._choose_passes = choose_passes
        self._passes: Passes | None = None
        if level.loss.shards is not None:
            self._passes = ShardedPasses(level)
        self._place = place
        self._snapshot: _Snapshot | None = None
        self._before_last_step = SavedRandomness()
        self._generator_before = torch.Generator().get_state()
        self.step_seed = 0
        self.scale: LossScale | None = None
        self.watch = Watch(level, "raise")
        self._before_step: _BeforeStep | None = None

    @property
    def rule_state(self) -> Mapping[str, Any]:
        """What the level's update rule carries on."""
        return self._rule_state

    @rule_state.setter
    def rule_state(self, state: Mapping[str, Any]) -> None:
        # for hypergradients too, which know the level alone
        self._rule_state = self.level.rule_state = state

    def state_dict(self) -> dict[str, Any]:
        """How the level's updates stand: the same in all processes."""
        return {
            "optimizer": self.optimizer and save_optimizer(self.optimizer, self._processes.rank),
            "scheduler": self.scheduler and self.scheduler.state_dict(),
            "rule": dict(self._rule_state),
            "scale": self.scale and self.scale.state_dict(),
            "watch": self.watch.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes up the updates of that state."""
        if self.optimizer is not None:
            load_optimizer(self.optimizer, state["optimizer"])
        if self.scheduler is not None:
            self.scheduler.load_state_dict(state["scheduler"])
        self.rule_state = state["rule"]
        if self.scale is not None and state["scale"] is not None:
            self.scale.load_state_dict(state["scale"])
        self.watch.load_state_dict(state["watch"])

    def own_state_dict(self) -> dict[str, Any]:
        """What this process alone knows: its data, and what the next step looks back at."""
        rolls_back = self.level.declaration.rollback
        return {
            "feed": self._feed.state_dict(),
            "step_seed": self.step_seed,
            "memories": {key: dict(memory) for key, memory in self.memories.items()},
            "last": self._last_hypergradient,
            "snapshot": self._snapshot and self._snapshot.state_dict(),
            "streams": self._before_last_step.state_dict() if rolls_back else None,
            "generator": self._generator_before,
        }

    def load_own_state_dict(self, state: Mapping[str, Any], then: int) -> None:
        """Goes on from that state, of ``then`` processes; the global random numbers are moved."""
        self._feed.load_state_dict(state["feed"], then, self._processes.count)
        self.step_seed, self.memories = state["step_seed"], state["memories"]
        last, size = state["last"]
        self._last_hypergradient = shard_like(last, self.level.parameters), size
        self._snapshot = None
        if state["snapshot"] is not None:
            self._snapshot = _Snapshot(self)
            self._snapshot.load_state_dict(state["snapshot"])
        if state["streams"] is not None:
            self._before_last_step.load_state_dict(state["streams"])
        self._generator_before = state["generator"]

    @property
    def epoch(self) -> int:
        """Passes over the data that had ended when the newest batch was drawn."""
        return self._feed.epoch

    @property
    def finished_epochs(self) -> int:
        """Passes over the data that have ended, that of the newest batch included."""
        return self._feed.finished

    @property
    def learning_rate(self) -> float:
        """The optimizer's, in its first group; not a number where there is none."""
        if self.optimizer is None:
            return math.nan
        return float(self.optimizer.param_groups[0].get("lr", math.nan))

    def draw(self, sources: Sequence[Mapping[str, Any]]) -> tuple[tuple[Drawn, ...], bool]:
        """The micro-batches of one step, and whether a pass over the data ended.

        Args:
            sources: for each micro-batch the items of the sources that the level reads.
        """
        drawn = [(*self._feed.advance(), items) for items in sources]
        batches = tuple(Drawn(self._place(batch), items) for batch, _, items in drawn)
        return batches, any(end for _, end, _ in drawn)

    @property
    def own_scale(self) -> float:
        """The scale of the level's own loss; one unless it is in float16."""
        return scale_for(self.level, self.scale.value) if self.scale else 1.0

    @property
    def may_lose(self) -> bool:
        """Whether numbers that are not finite are found behind a step's passes, and end none."""
        return self.scale is not None or not self.watch.is_strict

    @property
    def skips_lost(self) -> bool:
        """Whether a step whose numbers are not finite is skipped."""
        return self.scale is not None or self.watch.skips

    @contextmanager
    def undone_on_error(self, generator: torch.Generator) -> Iterator[None]:
        """Puts buffers, random numbers, ``.grad`` and the solvers' memories back on an error.

        Buffers of modules that belong to other levels are put back in any case: a
        level's buffers change by its own steps alone.

        Args:
            generator: the level's own random numbers.
        """
        foreign = _SavedBuffers(self.level, self.level.loss.buffers, own=False)
        streams = RecordedStreams(((generator, generator),))
        self._before_step = _BeforeStep(self)
        try:
            yield
        except BaseException:
            self._rest()
            streams.restore()
            self._before_step.restore(self)
            raise
        finally:
            self._before_step = None
            foreign.restore()

    def overflowed(self, found: Gradients) -> bool:
        """Whether a step is to be skipped; if so all is as before it, but for random numbers.

        The same in all processes, whose gradients have been averaged. Moves the scale.

        Raises:
            NonFiniteError: nothing but overflows for a long time.
        """
        if self.scale is None:
            return False
        if math.isfinite(found.loss) and math.isfinite(norm(self.gradients())):
            self.scale.grow()
            return False
        self.undo_step()
        self.scale.shrink()
        return True

    def undo_step(self) -> None:
        """Puts back what the backward passes of the present step have changed."""
        if self._before_step is not None:
            self._before_step.restore(self)

    def bad_loss(self, found: Gradients) -> NonFiniteError | None:
        """What is said of a loss that is not finite; the same in all processes.

        Not of a level with lower levels, whose loss may be lost by an overflow of its derivatives.
        """
        if self._built.graph.lower[self.level.name]:
            return None
        try:
            require_finite(found.loss, self.level.name, self.level.site)
        except NonFiniteError as error:
            return error
        return None

    def trouble(self, found: Gradients) -> NonFiniteError | None:
        """What is not finite in a step's numbers, unless that ends the run where it is found."""
        if found.trouble is not None or self.watch.is_strict:
            return found.trouble
        try:
            require_finite(found.loss, self.level.name, self.level.site)
            self._require_finite(norm(self.gradients()))
        except NonFiniteError as error:
            return error
        return None

    def backward(self, batches: tuple[Drawn, ...], ctx: Context) -> Gradients:
        """The ordinary backward passes of a level without lower levels, averaged over processes.

        The first ones are averaged behind them: they show whether DDP can do so in between.
        """
        for parameter in self.level.parameters.values():
            parameter.grad = None
        passes = self._passes or Passes(self.level)
        share = 1.0 / len(batches)
        total = 0.0
        metrics: dict[str, Any] = {}
        for number, batch in enumerate(batches, 1):
            with passes.kept_local(is_last=number == len(batches)):
                loss, metrics = passes.call(items_for(self.level, batch, ctx))
                total += share * self._value_of(loss)
                loss = loss if self.own_scale == 1.0 else loss * self.own_scale
                passes.backward(loss if share == 1.0 else loss * share)
        self._passes = self._passes or self._choose_passes(self.level)
        self._assign({name: dense(grad) for name, grad in self.gradients().items()})
        if self.own_scale != 1.0:
            torch._foreach_mul_(list(self.gradients().values()), 1.0 / self.own_scale)
        averaged = passes.take_loss(total)
        if averaged is not None:
            return Gradients(averaged, metrics, own_loss=total)
        return self.average(Gradients(total, metrics))

    def _value_of(self, loss: Tensor) -> float:
        """The loss as a number, which may be infinite where all processes decide on the step."""
        if self.may_lose:
            return float(loss.detach())
        return require_finite(loss, self.level.name, self.level.site)

    def _rest(self) -> None:
        """Puts sharded modules that the loss sees to rest."""
        if self.level.loss.shards is not None:
            rest(self.level.loss.module)

    def differentiate(self, point: Point) -> Gradients:
        """The same at a point, for a level that sees replicas."""
        found = differentiate_once(LowerProblem(point, self.level.name, ()))
        self.adopt(found.gradient, found.state)
        return self._reported(found.outcomes, point)

    def adopt_graph(self, graph: Reverse, point: Point) -> Gradients:
        """The same from a gradient whose graph is kept."""
        self.adopt(graph.gradient(), graph.state)
        return self._reported(graph.outcomes, point)

    def _reported(self, outcomes: list[tuple[Tensor, dict[str, Any]]], point: Point) -> Gradients:
        share = 1.0 / len(outcomes)
        total = sum(share * self._value_of(loss) for loss, _ in outcomes)
        return Gradients(*point.reported(total, [metrics for _, metrics in outcomes]))

    def adopt(self, gradient: dict[str, Tensor], state: State) -> None:
        """Takes a hypergradient as ``.grad``, and the own buffers of its pass if it had an end."""
        with torch.no_grad():
            # copies: autograd may give one tensor for two parameters, or an expanded one
            self._assign({name: found.clone() for name, found in gradient.items()})
            for slot in self.level.loss.buffers:
                if slot.child in self.level.own_children and slot.key in state:
                    slot.tensor.copy_(state[slot.key])

    def _assign(self, gradient: Tree) -> None:
        for name, parameter in self.level.parameters.items():
            parameter.grad = gradient.get(name)

    def average(self, found: Gradients) -> Gradients:
        """The means over processes of ``.grad`` and of the loss, by one collective."""
        mean = self._processes.mean
        if mean is None:
            return found
        parameters = plain_part({n: p.detach() for n, p in self.level.parameters.items()})
        gradients = self.gradients()
        loss, gradient = self._mean_with_loss(mean, found.loss, plain_part(gradients), parameters)
        self._assign(gradients | gradient)
        return replace(found, loss=loss, own_loss=found.loss)

    def average_hypergradient(self, found: Hypergradient) -> Hypergradient:
        """The same for a hypergradient, for which each process has used its own data alone."""
        mean = self._processes.mean
        if mean is None:
            return found
        parameters = {name: p.detach() for name, p in self.level.parameters.items()}
        loss, gradient = self._mean_with_loss(mean, found.loss, found.gradient, parameters)
        return replace(found, loss=loss, gradient=gradient, size=norm(gradient))

    def _mean_with_loss(
        self, mean: Mean, loss: float, gradient: Tree, like: Tree
    ) -> tuple[float, Tree]:
        some = next(iter(self.level.parameters.values()))
        known = {"loss": torch.tensor(loss, dtype=some.dtype, device=some.device)}
        means, found = mean([known, gradient], [known, like])
        return float(means["loss"]), found

    def turn_of(self, found: Hypergradient) -> float | None:
        """The cosine with the last hypergradient, which this one then replaces."""
        last, size = self._last_hypergradient
        self._last_hypergradient = found.gradient, found.size
        sizes = size * found.size
        return dot(last, found.gradient) / sizes if sizes > 0.0 else None

    def gradients(self) -> dict[str, Tensor]:
        """The present ``.grad`` by parameter name."""
        found = {name: p.grad for name, p in self.level.parameters.items()}
        return {name: grad for name, grad in found.items() if grad is not None}

    def clip(self) -> float:
        """Clips the gradients if the level asks for it.

        Returns:
            Their norm before.

        Raises:
            NonFiniteError: it is not finite.
        """
        bound = self.level.declaration.clip_norm
        grads = self.gradients()
        if self.level.is_replicated and grads:
            return self._clip_each(grads)
        size = norm(grads)
        self._require_finite(size)
        factor = clip_factor(size, bound)
        if factor != 1.0:
            plain = plain_part(grads)
            shards = {key: g for key, g in grads.items() if key not in plain}
            for part in filter(None, (plain, shards)):
                torch._foreach_mul_(list(part.values()), factor)
        return size

    def _clip_each(self, grads: dict[str, Tensor]) -> float:
        """Every replica's gradient by itself; the mean of their norms."""
        sizes = row_norms(grads)
        for size in sizes:
            self._require_finite(size)
        clipped = clip_rows(grads, self.level.declaration.clip_norm, len(sizes))
        for key, grad in grads.items():
            if clipped[key] is not grad:
                grad.copy_(clipped[key])
        return sum(sizes) / len(sizes)

    def _require_finite(self, size: float) -> None:
        """Refuses a norm that is not finite."""
        if not math.isfinite(size):
            raise NonFiniteError(
                f"the norm of the gradient before clipping is {size}.",
                expected="a finite number.",
                remedy="use a smaller learning rate or clip_norm=, or look for operations "
                "whose derivative is infinite, such as sqrt at 0.",
                level=self.level.name,
                site=self.level.site,
            )

    def iterate(self) -> Iterate:
        """Where the level stands, in tensors that nobody changes."""
        parameters = {key: p.detach().clone() for key, p in self.level.parameters.items()}
        if self.optimizer is None:
            return Iterate(parameters, self.rule_state)
        state = read_state(self.level, self.optimizer)
        copied = {
            key: {n: v.detach().clone() if isinstance(v, Tensor) else v for n, v in known.items()}
            for key, known in state.items()
        }
        return Iterate(parameters, copied)

    def read_update(self) -> Update:
        """The next update with its present options."""
        if self.level.rule is not None:
            return self.level.rule
        if self.optimizer is None:
            raise RuntimeError("a level has a rule or an optimizer")
        return read_step(self.level, self.optimizer)

    def tune(self) -> None:
        """Sets the options of the optimizer that are computed from other levels."""
        tuning = self.level.tuning
        if tuning is None or self.optimizer is None:
            return
        with torch.no_grad():
            numbers = tuning.numbers(self._built.values(tuning.reads))
        for group in self.optimizer.param_groups:
            group.update(numbers)

    def update(self, *, skipped: bool) -> None:
        """Steps by the gradients, unless the step is skipped."""
        if not skipped:
            self.apply()
            self.watch.passed()

    def apply(self) -> None:
        """One step of the optimizer and of the scheduler, or of the level's own rule."""
        if self.optimizer is not None:
            self._step(self.optimizer)
        elif self.level.rule is not None:
            self._apply_rule(self.level.rule)
        if self.scheduler is not None:
            self.scheduler.step()

    def _step(self, optimizer: Optimizer) -> None:
        meeting = self._processes.meeting() if is_divided(optimizer) else nullcontext()
        with meeting, noted("optimizer=", f"level {self.level.name!r} ({self.level.site})"):
            optimizer.step()

    def _apply_rule(self, rule: Rule | RuleOfEach) -> None:
        before = Iterate(frozen(self.level.parameters), self.rule_state)
        # the gradients are clipped already
        after = rule.unclipped.advance(before, self.gradients(), self._built.values(rule.reads))
        with torch.no_grad():
            for key, parameter in self.level.parameters.items():
                parameter.copy_(after.parameters[key])
        self.rule_state = after.state

    def begin_loop(self) -> None:
        """Starts an inner loop: from ``init_from``, or noting the state for ``rollback``."""
        if self.level.init_from is not None:
            self._start_from(self._built.levels[self.level.init_from].module)
        if self.level.declaration.rollback:
            self._snapshot = _Snapshot(self)

    def _start_from(self, module: nn.Module) -> None:
        """Copies parameters and buffers in, and forgets what the optimizer has kept."""
        copy_into(self.level.module, module)
        if self.level.is_replicated:
            with torch.no_grad():
                for key, parameter in self.level.parameters.items():
                    parameter.copy_(self.level.template[key].detach().clone())
        self.rule_state = {}
        if self.optimizer is not None:
            fresh = fresh_state(self.level, self.optimizer)
            self.optimizer.state.clear()
            for key, state in fresh.items():
                self.optimizer.state[self.level.parameters[key]] = state

    def begin_step(self, generator: torch.Generator) -> None:
        """Remembers the random numbers before a step, for ``rollback``.

        Those of a step that sees replicas are drawn from one seed.
        """
        if self.level.declaration.rollback:
            self._before_last_step = SavedRandomness()
            self._generator_before = generator.get_state()
        if self.level.copied:
            self.step_seed = int(torch.randint(2**62, ()))

    def roll_back(self, generator: torch.Generator, step: Callable[[], None]) -> None:
        """Goes back to the start of the inner loop and repeats its last step as it was drawn.

        If the step raises, the level is as it was before.
        """
        if self._snapshot is None:
            return
        self._rest()
        present = _Snapshot(self)
        self._snapshot.restore(self)
        now, generator_now = SavedRandomness(), generator.get_state()
        self._before_last_step.restore()
        generator.set_state(self._generator_before)
        try:
            step()
        except BaseException:
            present.restore(self)
            raise
        finally:
            now.restore()
            generator.set_state(generator_now)


class _BeforeStep:
    """What the backward passes of a step may change: own buffers, ``.grad``, memories."""

    def __init__(self, trainer: Trainer) -> None:
        level = trainer.level
        self._grads = [(p, p.grad) for p in level.parameters.values()]
        self._buffers = _SavedBuffers(level, level.loss.buffers, own=True)
        self._remembered = trainer.memories, trainer._last_hypergradient

    def restore(self, trainer: Trainer) -> None:
        """Puts it all back."""
        trainer.memories, trainer._last_hypergradient = self._remembered
        self._buffers.restore()
        for parameter, grad in self._grads:
            parameter.grad = grad


class _SavedBuffers:
    """The buffers that a level's loss sees, its own or those of other levels' modules."""

    def __init__(self, level: BuiltLevel, buffers: Iterable[Slot], *, own: bool) -> None:
        self._saved = [
            (slot, slot.tensor, slot.tensor.detach().clone())
            for slot in buffers
            if (slot.child in level.own_children) == own
        ]

    @property
    def values(self) -> list[Tensor]:
        """The values that are kept."""
        return [value for *_, value in self._saved]

    def replace(self, values: Sequence[Tensor]) -> None:
        """Keeps other values."""
        pairs = zip(self._saved, values, strict=True)
        self._saved = [(slot, tensor, value) for (slot, tensor, _), value in pairs]

    def restore(self) -> None:
        """Puts back values, and the tensors themselves where a module assigned new ones."""
        with torch.no_grad():
            for slot, buffer, value in self._saved:
                slot.holder[slot.name] = buffer.copy_(value)


class _Snapshot:
    """Parameters, own buffers, optimizer and scheduler of a level at one moment."""

    def __init__(self, trainer: Trainer) -> None:
        level = trainer.level
        self._parameters = [(p, p.detach().clone()) for p in level.parameters.values()]
        self._buffers = _SavedBuffers(level, level.loss.buffers, own=True)
        optimizer = trainer.optimizer
        self._optimizer = None if optimizer is None else copy.deepcopy(optimizer.state_dict())
        self._rule_state = trainer.rule_state
        scheduler = trainer.scheduler
        self._scheduler = None if scheduler is None else copy.deepcopy(scheduler.state_dict())

    def restore(self, trainer: Trainer) -> None:
        with torch.no_grad():
            for parameter, saved in self._parameters:
                parameter.copy_(saved)
        self._buffers.restore()
        trainer.rule_state = self._rule_state
        if trainer.optimizer is not None and self._optimizer is not None:
            # the optimizer steps the tensors that it is given
            trainer.optimizer.load_state_dict(copy.deepcopy(self._optimizer))
        if trainer.scheduler is not None and self._scheduler is not None:
            trainer.scheduler.load_state_dict(self._scheduler)

    def state_dict(self) -> dict[str, Any]:
        """What is kept, in tensors and plain values."""
        return {
            "parameters": [saved for _, saved in self._parameters],
            "buffers": self._buffers.values,
            "optimizer": self._optimizer,
            "rule": dict(self._rule_state),
            "scheduler": self._scheduler,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Keeps what another moment had."""
        pairs = zip(self._parameters, state["parameters"], strict=True)
        self._parameters = [(parameter, saved) for (parameter, _), saved in pairs]
        self._buffers.replace(state["buffers"])
        self._optimizer, self._scheduler = state["optimizer"], state["scheduler"]
        self._rule_state = state["rule"]
