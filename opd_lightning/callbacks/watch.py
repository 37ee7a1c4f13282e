"""Alarms on duty: on in every fit, each with a policy of its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from opd_lightning.callbacks import alarms as known
from opd_lightning.callbacks.alarms import Alarm, Facts
from opd_lightning.callbacks.recovery import save_whole
from opd_lightning.callbacks.step_monitor import at_step_end, logged_at_step
from opd_lightning.module import OPDModule
from opd_lightning.types import Rollout

ACTIONS = ("off", "log", "warn", "checkpoint", "stop")


def standard() -> list[Alarm]:
    """One of each kind, as it is by default."""
    classes = [getattr(known, name) for name in known.__all__ if name not in ("Alarm", "Facts")]
    return [cls() for cls in classes]


class Alarms(pl.Callback):
    """Watches every optimizer step for what usually goes wrong, and says what to do next.

    Every alarm of `opd_lightning.callbacks.alarms` is on and warns. What rang is logged as ``alarm/name`` and kept in
    ``<run>/alarms.json``.

    Args:
        alarms: with other thresholds than the defaults, or your own; each replaces the default of its class.
        actions: class name -> ``off``, ``log`` (file and logger alone), ``warn``, ``checkpoint`` (warn, and keep
            ``checkpoints/alarm-<name>-<step>.ckpt``) or ``stop`` (warn, and end the run; its checkpoint is written as usual).

    Raises:
        ValueError: for an unknown alarm or action.
    """

    def __init__(self, alarms: list[Alarm] | None = None, actions: dict[str, str] | None = None) -> None:
        own = {type(alarm).__name__: alarm for alarm in alarms or []}
        found = {type(alarm).__name__: alarm for alarm in standard()} | own
        self.actions = actions or {}
        for name, action in self.actions.items():
            if name not in found or action not in ACTIONS:
                raise ValueError(
                    f"alarms.actions.{name}={action!r}: alarms are {', '.join(found)}; actions are {', '.join(ACTIONS)}"
                )
        self.alarms = {name: alarm for name, alarm in found.items() if self.actions.get(name) != "off"}
        self.fired: list[dict[str, Any]] = []
        self._phase: str | None = None

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Rollout, batch_idx: int
    ) -> None:
        if not at_step_end(trainer):
            return
        assert isinstance(pl_module, OPDModule)
        step = trainer.global_step
        phase = pl_module.phase_at(step - 1)
        if (phase.name if phase else None) != self._phase:
            self._phase = phase.name if phase else None
            for alarm in self.alarms.values():
                alarm.reset()
        now = logged_at_step(trainer)
        facts = Facts(not pl_module.objective_at(step - 1).needs_sampler, bool(pl_module.teacher.moving))
        for name, alarm in self.alarms.items():
            if what := alarm.watch(now, facts):
                self._ring(trainer, pl_module, alarm, what, self.actions.get(name, "warn"))

    def _ring(self, trainer: pl.Trainer, pl_module: OPDModule, alarm: Alarm, what: str, action: str) -> None:
        """The same on every rank: what was logged is equal there."""
        step = trainer.global_step
        self.fired.append({"step": step, "alarm": alarm.name, "action": action, "what": what, "advice": alarm.advice})
        for logger in trainer.loggers:  # directly: Lightning's own log would repeat the value at every later step
            logger.log_metrics({f"alarm/{alarm.name}": 1.0}, step=step - 1)
        if action != "log":
            rank_zero_warn(f"alarm {alarm.name} at step {step}: {what}. Next: {alarm.advice}.")
        if action == "stop":
            trainer.should_stop = True
        folder = Path(trainer.default_root_dir)
        if action == "checkpoint":
            save_whole(trainer, folder / "checkpoints" / f"alarm-{alarm.name}-{step:06d}.ckpt")
        if trainer.is_global_zero:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                (folder / "alarms.json").write_text(json.dumps(self.fired, indent=1), encoding="utf-8")
            except OSError as error:
                rank_zero_warn(f"the alarm was not written to {folder}: {error}")

    # ---- state ---------------------------------------------------------------------------------------------------------
    def state_dict(self) -> dict[str, Any]:
        memory = {name: {"count": a.count, "memory": a.memory} for name, a in self.alarms.items()}
        return {"fired": self.fired, "phase": self._phase, "alarms": memory}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.fired, self._phase = list(state_dict["fired"]), state_dict["phase"]
        for name, state in state_dict["alarms"].items():
            if name in self.alarms:
                self.alarms[name].count, self.alarms[name].memory = state["count"], dict(state["memory"])
