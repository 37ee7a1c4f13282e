"""RolloutRefresh: the only place where text is written during training."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from opd_lightning import parallel
from opd_lightning.callbacks.ahead import Ahead
from opd_lightning.callbacks.asking import ask_ahead
from opd_lightning.callbacks.pairing import declared_with, refuse_unfit_engine, refuse_unfit_teacher, remarks
from opd_lightning.callbacks.prompt_probe import probe
from opd_lightning.callbacks.step_monitor import Logging, at_step_end, log_numbers
from opd_lightning.callbacks.writing import RunWriters
from opd_lightning.data.buffer import Plan, RolloutBuffer
from opd_lightning.data.datamodule import PromptDataModule
from opd_lightning.metrics import DistinctNGrams, Leak, Repetition, told_elsewhere
from opd_lightning.objectives import Objective
from opd_lightning.objectives.validate import refuse_unfit_source
from opd_lightning.samplers import NativeSampler
from opd_lightning.seeds import run_seed
from opd_lightning.sources import Source, StudentSource
from opd_lightning.types import Prompt, Rollout


class BeforeRefresh(pl.Callback):
    """A callback that has a say before text is written for a step: a function of the weights, so that resuming repeats it."""

    def before_refresh(self, trainer: pl.Trainer, pl_module: Any, step: int) -> None:
        """Called on all ranks, before the rollouts of the refresh that begins at optimizer step ``step``."""


class RolloutRefresh(Logging):
    """Fills the rollout buffer: which prompts, who writes, how often.

    Args:
        source: who writes the completions.
        sampler: how completions are drawn.
        rollouts_per_prompt: completions of every prompt (the group); divides data.batch_size.
        every_n_steps: optimizer steps between two refreshes. 1 is strictly on-policy; more shows as staleness.
        passes: how often every rollout is used; divides every_n_steps.
        seed: of all rollouts; null takes ``seed_everything``.
        ahead: write the next refresh while the student trains on this one, so that rollouts are one refresh older (see
            ``train/staleness``): ``same`` on the student's device, or another, such as ``cuda:1``, which holds a copy of the
            student. It changes what is trained, not only how fast. null writes when training waits. A finished run that is
            extended begins with a fresh refresh.

    Raises:
        ValueError: for sizes that do not fit, naming the key.
    """

    def __init__(
        self,
        source: Source = StudentSource(),
        sampler: NativeSampler = NativeSampler(),
        rollouts_per_prompt: int = 1,
        every_n_steps: int = 1,
        passes: int = 1,
        seed: int | None = None,
        ahead: str | None = None,
    ) -> None:
        if min(rollouts_per_prompt, every_n_steps, passes) < 1 or every_n_steps % passes:
            raise ValueError(
                f"rollout.rollouts_per_prompt={rollouts_per_prompt}, every_n_steps={every_n_steps}, passes={passes}: all must "
                "be at least 1, and passes must divide every_n_steps"
            )
        self.source, self.sampler = source, sampler
        self.rollouts_per_prompt, self.every_n_steps, self.passes = rollouts_per_prompt, every_n_steps, passes
        self.seed, self.ahead = run_seed(seed), ahead
        self.buffer: RolloutBuffer | None = None
        self.total_tokens = 0  # completion tokens handed to training so far, over all ranks
        self.measured: dict[str, float | torch.Tensor] = {}  # of the refresh in use; logged with every step of it
        self._on_text = Repetition(), DistinctNGrams()  # to make them takes longer than to use them
        self._loaded: dict[str, Any] | None = None
        self._alone = False
        self._ahead: Ahead | None = None

    # ---- wiring: datamodule.setup, then callbacks, then module.setup, all before train_dataloader() ------------------------
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        data: Any = getattr(trainer, "datamodule", None)
        if data is None:
            raise ValueError("RolloutRefresh needs trainer.fit(module, datamodule=PromptDataModule(...))")
        if trainer.fit_loop.max_epochs not in (None, -1):
            raise ValueError(
                "one Lightning epoch is the whole run: set trainer.max_steps (or max_time), not trainer.max_epochs"
            )
        if trainer.reload_dataloaders_every_n_epochs:  # type: ignore[attr-defined]
            raise ValueError("RolloutRefresh owns the refresh: leave trainer.reload_dataloaders_every_n_epochs at 0")
        plan = self._plan(trainer, data.batch_size, data.micro_batch_size, self._together(pl_module))
        trainer.accumulate_grad_batches = plan.accumulate
        if self.buffer is None or self.buffer.plan != plan:  # a second fit() keeps the buffer
            self.buffer = RolloutBuffer(plan, self.seed)
        self.sampler.check()
        self._ahead = Ahead.of(self.ahead, trainer, self.sampler)
        self.buffer.refill = lambda refresh: self.refresh(trainer, pl_module, refresh)
        data.buffer = self.buffer
        data.total_micro_batches = trainer.max_steps * plan.accumulate if trainer.max_steps > 0 else 10**9
        for line in self.declare(pl_module, data):
            rank_zero_info(line)

    def _together(self, pl_module: Any) -> int:
        """Rows that objectives compare with each other: those of a prompt, or each by itself."""
        objectives = [pl_module.objective, *(phase.objective for phase in pl_module.phases)]
        return self.rollouts_per_prompt if any(o.needs_groups for o in objectives) else 1

    def _plan(self, trainer: pl.Trainer, batch_size: int, micro_batch_size: int, together: int = 1) -> Plan:
        world = trainer.world_size
        share, rest = divmod(batch_size, world)
        if rest:
            raise ValueError(f"data.batch_size={batch_size} must be a multiple of the {world} devices")
        micro = micro_batch_size or share
        if share % micro:
            raise ValueError(
                f"data.micro_batch_size={micro} must divide the {share} rollouts that each of {world} device(s) has of "
                f"data.batch_size={batch_size}"
            )
        if batch_size % self.rollouts_per_prompt:
            raise ValueError(
                f"rollout.rollouts_per_prompt={self.rollouts_per_prompt} must divide data.batch_size={batch_size}: the "
                "rollouts of a prompt stay in one optimizer step"
            )
        if share % together or micro % together:
            raise ValueError(
                f"the objective needs the {together} rollouts of a prompt (rollout.rollouts_per_prompt) in one micro-batch, "
                f"but data.micro_batch_size={micro} of the {share} rollouts that each of {world} device(s) has of "
                f"data.batch_size={batch_size} cuts them: make it a multiple of {together} (0 takes the whole share)"
            )
        if trainer.accumulate_grad_batches not in (1, share // micro):
            raise ValueError(
                f"trainer.accumulate_grad_batches={trainer.accumulate_grad_batches}, but data.batch_size={batch_size}, "
                f"data.micro_batch_size={micro} and {world} device(s) make {share // micro}: leave it out, it is derived"
            )
        return Plan(batch_size, micro, self.every_n_steps, self.passes, trainer.global_rank, world, together)

    def declare(self, pl_module: Any, data: PromptDataModule | None = None) -> list[str]:
        """What every phase descends, a line each, the run's own objective last. Needs neither trainer nor weights.

        Raises:
            DegenerateObjective: if an objective does not fit its source, or the teacher teaches nothing.
            ValueError: if a phase ends inside a refresh, or a teacher should write that cannot.
        """
        for phase in pl_module.phases:
            if phase.end % self.every_n_steps:
                raise ValueError(
                    f"{phase.name} ends at step {phase.end}, inside a refresh: make it a multiple of rollout.every_n_steps="
                    f"{self.every_n_steps}, so that every phase begins with its own rollouts"
                )
        lines = []
        stretches = [(p.name, p.source, p.objective) for p in pl_module.phases]
        for name, source, objective in [*stretches, ("this objective", self.source, pl_module.objective)]:
            refuse_unfit_source(
                objective,
                student_writes=source.student_writes,
                others_write=source.others_write,
                steps_per_refresh=self.every_n_steps * (2 if self.ahead else 1),
            )
            if self.ahead and objective.record_top_k:
                raise ValueError(
                    "rollout.ahead keeps no record of the student's likeliest tokens, which this objective needs: leave it out "
                    "(null), or take another support"
                )
            if objective.needs_groups and self.rollouts_per_prompt < 2:
                raise ValueError(
                    f"{_comparing(objective)} compares the rollouts of a prompt, and rollout.rollouts_per_prompt=1 leaves "
                    "nothing to compare with: make it at least 2, or take `baseline: BatchMean`, `Additive(grouped: false)`"
                )
            if objective.needs_outcome and data is not None and data.prompt_set.grader() is None:
                raise ValueError(
                    f"{name} learns from grades (objective.outcome), but data.prompts has no grader: give data.prompts.grader, "
                    "or `outcome: NoOutcome`"
                )
            refuse_unfit_teacher(pl_module, objective, source, data)
            if source.student_writes and self.sampler.foreign and (remark := refuse_unfit_engine(objective)):
                rank_zero_warn(remark)
            lines.append(f"{name} descends: {declared_with(objective, pl_module.teacher)}")
            if source.student_writes and objective.needs_teacher and self._sampling_differs(objective.temperature):
                rank_zero_warn(
                    f"completions are sampled at temperature {self.sampler.temperature:g}, top_p {self.sampler.top_p:g}, top_k "
                    f"{self.sampler.top_k}, but scored at temperature {objective.temperature:g}: the states are not the "
                    "student's own. Set them equal (rollout.sampler, model.objective.temperature) to be on-policy."
                )
        for remark in remarks(pl_module, data):
            rank_zero_warn(remark)
        return lines

    def _sampling_differs(self, temperature: float) -> bool:
        return self.sampler.temperature != temperature or self.sampler.top_p < 1.0 or self.sampler.top_k > 0

    def source_at(self, pl_module: Any, step: int) -> Source:
        """The source of an optimizer step: that of the phase it lies in (see `ColdStart`), else the run's own."""
        phase = pl_module.phase_at(step)
        return phase.source if phase else self.source

    # ---- state: dump_checkpoint runs on every rank, so they may communicate --------------------------------------------------
    def state_dict(self) -> dict[str, Any]:
        if self.buffer is None:
            return {}
        rollout = self.buffer.rollout.state() if self.buffer.rollout is not None else None
        shards = [rollout] if self._alone else parallel.gather_objects(rollout)
        plan = self.buffer.plan
        return {
            "position": self.buffer.position,
            "accumulate": plan.accumulate,
            "rows": plan.rows,
            "refresh": self.buffer.refresh,
            "scales": [[s / (plan.world * plan.accumulate) for s in step] for step in self.buffer.scales],
            "shards": shards,
            "seed": self.seed,
            "total_tokens": self.total_tokens,
            "measured": self.measured,
            "ahead": self._ahead.state(self._alone) if self._ahead is not None else [],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._loaded = state_dict or None
        self.total_tokens = state_dict.get("total_tokens", 0)
        self.measured = state_dict.get("measured", {})

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._loaded is not None:
            self._restore(trainer, pl_module, self._loaded)
            self._loaded = None
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        if data.selector.probe_samples and data.scores is None:
            data.scores = probe(trainer, pl_module, data, self.sampler, self.seed)

    def _restore(self, trainer: pl.Trainer, pl_module: Any, state: dict[str, Any]) -> None:
        assert self.buffer is not None
        buffer, plan = self.buffer, self.buffer.plan
        step, rest = divmod(state["position"], state["accumulate"])
        if state["rows"] != plan.rows:
            raise ValueError(
                f"the checkpoint's refresh holds {state['rows']} rollouts, this run's {plan.rows}: data.batch_size, "
                "rollout.every_n_steps and rollout.passes must stay what they were"
            )
        if rest and state["accumulate"] != plan.accumulate:
            raise ValueError("the checkpoint lies inside an optimizer step: resume it on as many devices as it was written on")
        self.seed = buffer.seed = state["seed"]
        buffer.position = step * plan.accumulate + rest
        if state["accumulate"] != plan.accumulate:
            _count_micro_batches(trainer, buffer.position)
        if any(shard is None for shard in state["shards"]):
            return
        rows = {
            int(row): (shard, i)
            for shard in map(Rollout.from_state, state["shards"])
            for i, row in enumerate(shard.row.tolist())
        }
        picked = [rows[row] for row in plan.local_rows(state["refresh"])]
        rollout = Rollout.cat([shard.select(torch.tensor([i])) for shard, i in picked])
        factor = plan.world * plan.accumulate
        buffer.put(state["refresh"], rollout, [tuple(s * factor for s in step) for step in state["scales"]])
        if rest or buffer.position % plan.micro_batches:  # some of it is still to be trained on
            ask_ahead(trainer, pl_module, rollout)
        if self._ahead is not None:
            following = state["refresh"] + 1
            self._ahead.restore(following, plan.local_rows(following), state.get("ahead", []))

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._alone = True  # other ranks may be gone

    # ---- the refresh: called by the loader, after the last optimizer step with its checkpoints and validation ---------------
    def refresh(self, trainer: pl.Trainer, pl_module: Any, refresh: int) -> None:
        """Write this rank's rollouts of a refresh and put them into the buffer."""
        assert self.buffer is not None
        plan = self.buffer.plan
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        first_step = refresh * self.every_n_steps
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, BeforeRefresh):
                callback.before_refresh(trainer, pl_module, first_step)
        prompts = self._prompts(data, refresh)
        started = time.perf_counter()
        writers = RunWriters(trainer, pl_module, self.sampler, self.seed, "rollout")
        objective = pl_module.objective_at(first_step)
        with pl_module.clock.phase("rollout", whole=True):
            written = self._ahead.take(refresh) if self._ahead is not None else None
            completions = written or self.source_at(pl_module, first_step).produce(prompts, writers)
            prompts = data.inform(prompts, completions, self.rollouts_per_prompt)
            rollout = pl_module.join(prompts, completions)
            rollout = replace(rollout, group_size=self.rollouts_per_prompt)
            if objective.needs_outcome:
                grades = torch.tensor(writers.grade(prompts, completions), dtype=torch.float32)
                rollout = replace(rollout, outcome=grades)
            if k := min(objective.record_top_k, pl_module.vocabulary.size):
                with trainer.precision_plugin.forward_context():
                    rollout = replace(rollout, top_ids=pl_module.top_ids(rollout, k, plan.micro_batch_size))
        seconds = time.perf_counter() - started
        self.measured = self._measure(rollout, seconds, pl_module.device) | dict(self.sampler.measured)
        if data.teacher_template is not None:
            informed = torch.tensor([p.informed for p in prompts])
            told, count = parallel.sum_over_ranks([float(informed.sum()), float(len(prompts))])
            self.measured["rollout/informed"] = told / count
            if data.teacher_tokenizer is None:  # tokens of two vocabularies cannot be compared
                self.measured |= _leak([p for p in prompts if p.teacher_ids], rollout, pl_module.device)
            rollout = rollout.without(~informed)
        if objective.needs_teacher:
            with pl_module.clock.phase("teacher forward", whole=True):
                ask_ahead(trainer, pl_module, rollout, save=True)
        self.buffer.put(refresh, rollout, self._scales(rollout, objective))
        self._write_ahead(trainer, pl_module, refresh + 1)

    def _prompts(self, data: Any, refresh: int) -> list[Prompt]:
        """This rank's prompts of a refresh."""
        assert self.buffer is not None
        rows = self.buffer.plan.local_rows(refresh)
        return [replace(data.prompt_at(row // self.rollouts_per_prompt), row=row) for row in rows]

    def _write_ahead(self, trainer: Any, pl_module: Any, refresh: int) -> None:
        """Begin with a refresh to come, if the student writes it."""
        first_step = refresh * self.every_n_steps
        over = 0 < trainer.max_steps <= first_step
        if self._ahead is None or over or type(self.source_at(pl_module, first_step)) is not StudentSource:
            return
        self._ahead.start(refresh, self._prompts(trainer.datamodule, refresh), self.seed, self.sampler, trainer, pl_module)

    def _scales(self, rollout: Rollout, objective: Objective) -> list[tuple[float, ...]]:
        """The loss factors of every distinct optimizer step: micro-batches and ranks over the step's denominators."""
        assert self.buffer is not None
        plan = self.buffer.plan
        share = plan.micro_batch_size * plan.accumulate
        rows = [torch.arange(c * share, (c + 1) * share) for c in range(plan.chunks)]
        local = [objective.denominators(rollout.select(chunk)) for chunk in rows]
        total = parallel.sum_over_ranks([d for step in local for d in step])
        factors = [plan.world * plan.accumulate / max(d, 1.0) for d in total]
        terms = len(local[0])
        return [tuple(factors[c * terms : (c + 1) * terms]) for c in range(plan.chunks)]

    def _measure(self, rollout: Rollout, seconds: float, device: torch.device) -> dict[str, float | torch.Tensor]:
        written = float(rollout.written.sum())
        local = [written, float(len(rollout)), float((~rollout.ended).sum()), seconds / parallel.world_size()]
        tokens, count, truncated, mean_seconds = parallel.sum_over_ranks(local)
        self.total_tokens += int(tokens)
        texts = rollout.text.targets[rollout.written].split(rollout.written.sum(-1).tolist())
        again, distinct = (metric if metric.device == device else metric.to(device) for metric in self._on_text)
        for metric in (again, distinct):
            metric.reset()
            metric.update(texts)
        on_text = {"rollout/repetition": float(again.compute()), "rollout/distinct": float(distinct.compute())}
        if rollout.outcome is not None:
            on_text["rollout/grade"] = parallel.sum_over_ranks([float(rollout.outcome.sum())])[0] / count
        known: dict[str, float | torch.Tensor] = {k: v for k, v in on_text.items() if not math.isnan(v)}
        if rollout.unaligned is not None:
            known["rollout/scored_positions"] = parallel.sum_over_ranks([float(rollout.mask.sum())])[0] / max(tokens, 1.0)
        return known | {
            "rollout/completion_tokens": tokens / count,
            "rollout/total_tokens": torch.tensor(self.total_tokens, dtype=torch.float64),  # plain numbers pass through float32
            "rollout/truncated": truncated / count,
            "rollout/seconds": mean_seconds,
            "rollout/tokens_per_second": tokens / max(mean_seconds, 1e-9),
        }

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Rollout, batch_idx: int
    ) -> None:
        if self.measured and at_step_end(trainer):
            log_numbers(pl_module, self.measured)
            self.logged = {key: float(value) for key, value in self.measured.items()}


def _comparing(objective: Objective) -> str:
    """What compares the rollouts of a prompt."""
    parts = [axis for part, _ in objective.flat() for axis in (part.baseline, part.outcome) if axis.needs_groups]
    return type(parts[0]).__name__


def _leak(prompts: Sequence[Prompt], rollout: Rollout, device: torch.device) -> dict[str, float]:
    """How much of what only the teacher was told stands in the completions, and the control. All ranks call it."""
    place = {int(row): b for b, row in enumerate(rollout.row)}
    written = [torch.tensor(rollout.completion(place[p.row]), device=device) for p in prompts]
    told = [torch.tensor(p.teacher_ids, device=device) for p in prompts]
    ours = [torch.tensor(p.ids, device=device) for p in prompts]
    leak, control = Leak().to(device), Leak().to(device)
    leak.update(written, told, ours)
    control.update(written, told_elsewhere([p.index for p in prompts], told), ours)
    found = {"rollout/leak": float(leak.compute()), "rollout/leak_control": float(control.compute())}
    return {key: value for key, value in found.items() if not math.isnan(value)}


def _count_micro_batches(trainer: pl.Trainer, position: int) -> None:
    """Tell Lightning how many micro-batches are done, after a change in how many make an optimizer step."""
    progress: Any = trainer.fit_loop.epoch_loop.batch_progress
    for counter in (progress.total, progress.current):
        surplus = counter.processed - position  # the counters differ by where the checkpoint was written; keep that
        for name in ("ready", "started", "processed", "completed"):
            setattr(counter, name, getattr(counter, name) - surplus)
