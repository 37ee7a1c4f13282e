"""RunCard: what a reader must know to believe a run, written by the run itself.

The 21 items of the reporting checklist that "A Formula-Driven Survey and Research Agenda for On-Policy Distillation"
(arXiv 2606.22793) asks for, in our reconstruction.
"""

from __future__ import annotations

import json
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from opd_lightning.callbacks.completion_eval import CompletionEval
from opd_lightning.callbacks.fingerprints import of_prompts, of_tokenizer, of_weights
from opd_lightning.callbacks.pairing import declared_with
from opd_lightning.callbacks.rollout_refresh import RolloutRefresh
from opd_lightning.callbacks.step_monitor import at_step_end, logged_at_step
from opd_lightning.callbacks.watch import Alarms
from opd_lightning.module import OPDModule
from opd_lightning.seeds import run_seed
from opd_lightning.types import Rollout

Card = dict[str, Any]
PACKAGES = ("torch", "lightning", "transformers", "peft", "torchmetrics", "jsonargparse")
COMPATIBILITY = ("overlap", "student_overlap_mass", "teacher_overlap_mass", "student_entropy", "teacher_entropy", "reverse_kl")
OFF_POLICY = ("ratio_deviation", "effective_sample", "staleness", "k1", "k3")
SIGNAL = ("neg_frac", "suppressed", "raised", "signal_outliers")


class RunCard(pl.Callback):
    """Writes ``run_card.json`` and ``run_card.md`` into the run's folder: at the start, after every evaluation, at the end.

    Everything that the run can know is filled in; what only a person can know is declared here, or stays "not declared".

    Args:
        evidence: class of evidence, e.g. ``E4: reproduced here``.
        deviations: what differs from the paper or the code that is followed.
        lineage: where the student comes from, e.g. how it was cold-started.
    """

    def __init__(self, evidence: str = "", deviations: list[str] | None = None, lineage: str = "") -> None:
        self.evidence, self.deviations, self.lineage = evidence, deviations or [], lineage
        self.start: dict[str, Any] = {}  # what is known at the first step alone
        self.first: dict[str, float] = {}
        self.latest: dict[str, float] = {}

    # ---- when ----------------------------------------------------------------------------------------------------------
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, OPDModule)
        if not self.start:
            self.start = {"student": of_weights(pl_module.student)}
            self.start |= {name: of_weights(leaf.own_model()) for name, leaf in pl_module._leaves().items()}
        self.write(trainer, pl_module, "running")

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Rollout, batch_idx: int
    ) -> None:
        if not at_step_end(trainer):
            return
        self.latest |= logged_at_step(trainer)
        self.first = self.first or dict(self.latest)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn == "fit":
            self.write(trainer, pl_module, "running")

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        whole = 0 < trainer.max_steps <= trainer.global_step
        self.write(trainer, pl_module, "finished" if whole else "stopped")

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        if self.start:
            self.write(trainer, pl_module, f"failed: {type(exception).__name__}: {exception}")

    def state_dict(self) -> dict[str, Any]:
        return {"start": self.start, "first": self.first}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.start, self.first = dict(state_dict["start"]), dict(state_dict["first"])

    def write(self, trainer: pl.Trainer, pl_module: Any, status: str) -> None:
        """Both files, from rank zero."""
        if not trainer.is_global_zero or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        card = {"status": status, "step": trainer.global_step, "items": self.items(trainer, pl_module)}
        try:
            save(Path(trainer.default_root_dir), card)
        except OSError as error:
            rank_zero_warn(f"the run card was not written: {error}")

    # ---- what ----------------------------------------------------------------------------------------------------------
    def items(self, trainer: Any, module: OPDModule) -> Card:
        """The 21 items, by name and in order."""
        callbacks: list[Any] = trainer.callbacks
        refresh = next(c for c in callbacks if isinstance(c, RolloutRefresh))
        data: Any = trainer.datamodule
        return {
            "identities": self._identities(module, data),
            "state source": _source(refresh, module),
            "state compatibility": {**self._moved(COMPATIBILITY), "lineage of the student": self.lineage or "not declared"},
            **_axes(module),
            "optimization": _optimization(trainer, module, refresh),
            "off-policyness": self._moved(OFF_POLICY),
            "stability": self._stability(callbacks),
            "budget": _budget(trainer, module, refresh),
            "outcome": _outcome(callbacks),
            "controls": {"run": "none", "this run is": _control(module)},
            "evidence": {"class": self.evidence or "not declared", "deviations": self.deviations or "not declared"},
            "data": of_prompts(data) | {"prompts": repr(data.prompt_set), "selector": repr(data.selector)},
        }

    def _identities(self, module: OPDModule, data: Any) -> dict[str, Any]:
        return {
            "student": repr(module.recipe),
            "teacher": repr(module.teacher),
            "reference": repr(module.reference) if "reference" in module._asked else "not asked",
            "weights at the start": self.start,
            "tokenizer": of_tokenizer(module.vocabulary.tokenizer),
            "template": repr(data.template),
            "teacher's context": repr(data.teacher_template) if data.teacher_template is not None else "the student's",
            "versions": versions(),
        }

    def _moved(self, keys: tuple[str, ...], where: str = "train") -> dict[str, Any]:
        """First and latest value of logged keys."""
        pairs = {key: (self.first.get(f"{where}/{key}"), self.latest.get(f"{where}/{key}")) for key in keys}
        return {key: {"first": a, "latest": b} for key, (a, b) in pairs.items() if b is not None}

    def _stability(self, callbacks: list[Any]) -> dict[str, Any]:
        fired = next((c.fired for c in callbacks if isinstance(c, Alarms)), [])
        text = self._moved(("completion_tokens", "truncated", "repetition", "distinct"), "rollout")
        return {"alarms": fired or "none", **self._moved(("gradient_norm", *SIGNAL)), **text}


def versions() -> dict[str, str]:
    """Of the packages that a result may depend on."""
    import opd_lightning

    found = {"opd_lightning": opd_lightning.__version__, "python": platform.python_version()}
    return found | {name: metadata.version(name) for name in PACKAGES} | {"platform": platform.platform()}


def _source(refresh: RolloutRefresh, module: OPDModule) -> dict[str, Any]:
    return {
        "source": repr(refresh.source),
        "sampler": repr(refresh.sampler),
        "rollouts per prompt": refresh.rollouts_per_prompt,
        "steps between refreshes": refresh.every_n_steps,
        "passes": refresh.passes,
        "phases before": [f"{p.name} to step {p.end}: {p.source!r}" for p in module.phases] or "none",
    }


def _axes(module: OPDModule) -> Card:
    """Items 4 to 13: what is compared and how, a value for every term of the objective."""
    parts = [part for part, _ in module.objective.flat()]
    target = declared_with(module.objective, module.teacher)

    def of(name: str) -> Any:
        found = [repr(getattr(part, name)) for part in parts]
        return found[0] if len(set(found)) == 1 else found

    return {
        "feedback": {"divergence": of("divergence"), "target": of("target"), "temperature": of("temperature")},
        "support": {"support": of("support")},
        "realization": {
            "declared target": target.name,
            "parts": list(target.parts),
            "known biases": list(target.biases) or "none",
            "defect": target.defect or "none",
        },
        "temporal credit": {"credit": of("credit"), "baseline": of("baseline")},
        "routing": {"route": of("route")},
        "gates and weights": {"gates": of("gates"), "correction": of("correction")},
        "shaping": {"shaper": of("shaper")},
        "outcome coupling": {"outcome": of("outcome")},
        "regularization": {"terms": repr(module.objective) if len(parts) > 1 else "none"},
        "reduction": {"reduction": of("reduction"), "normalized over": "the whole optimizer step, all micro-batches and ranks"},
    }


def _optimization(trainer: Any, module: OPDModule, refresh: RolloutRefresh) -> dict[str, Any]:
    optimizer = trainer.optimizers[0] if trainer.optimizers else None
    settings = optimizer.defaults if optimizer else {}  # as built: schedules change the groups alone
    return {
        "optimizer": type(optimizer).__name__,
        "settings": {k: v for k, v in settings.items() if isinstance(v, (int, float, bool, tuple)) and v is not None},
        "schedule": module.hparams.get("scheduler") or "constant",
        "steps": trainer.max_steps,
        "rollouts in a step": trainer.datamodule.batch_size,
        "updates per rollout": refresh.passes,
        "gradient clip": trainer.gradient_clip_val,
        "precision": trainer.precision,
        "devices": trainer.world_size,
        "strategy": type(trainer.strategy).__name__,
        "seed": run_seed(None),
        "seed of the rollouts": refresh.seed,
        "trained parameters": sum(p.numel() for p in module.parameters() if p.requires_grad),
    }


def _budget(trainer: Any, module: OPDModule, refresh: RolloutRefresh) -> dict[str, Any]:
    seconds = module.clock.read()
    memory = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
    return {
        "completion tokens written": refresh.total_tokens,
        "tokens scored by both models": refresh.total_tokens * refresh.passes,
        "seconds of this process": {name: round(s, 2) for name, s in seconds.items()},
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "CPU",
        "peak device memory, bytes": memory if memory is not None else "not measured",
    }


def _outcome(callbacks: list[Any]) -> dict[str, Any]:
    evaluation = next((c for c in callbacks if isinstance(c, CompletionEval)), None)
    if evaluation is None or not evaluation.history:
        return {"held-out prompts": "not measured"}
    students = [row for row in evaluation.history if row["who"] == "student"]
    teachers = [row for row in evaluation.history if row["who"] == "teacher"]
    return {
        "sampler": repr(evaluation.sampler),
        "completions of a prompt": evaluation.samples_per_prompt,
        "student first": students[0] if students else "not measured",
        "student latest": students[-1] if students else "not measured",
        "teacher, same protocol": teachers[-1] if teachers else "not measured",
    }


def _control(module: OPDModule) -> str:
    kinds = [part.control for part, _ in module.objective.flat() if part.control]
    return "; ".join(dict.fromkeys(kinds)) or "no control"


# ---- files -----------------------------------------------------------------------------------------------------------------
def save(run: Path, card: Card) -> None:
    """Write both files of a card."""
    run.mkdir(parents=True, exist_ok=True)
    (run / "run_card.json").write_text(json.dumps(card, indent=1, ensure_ascii=False, default=str) + "\n", encoding="utf-8")
    (run / "run_card.md").write_text(markdown(run.name, card), encoding="utf-8")


def load(run: Path) -> Card | None:
    """The card of a run, with the controls that have been trained beside it; None where there is none."""
    file = run / "run_card.json"
    if not file.is_file():
        return None
    card: Card = json.loads(file.read_text(encoding="utf-8"))
    done = sorted(f.parent.name for f in (run / "controls").glob("*/summary.json"))
    card["items"]["controls"]["run"] = done or "none"
    return card


def rows(item: dict[str, Any]) -> list[tuple[str, str]]:
    """An item as (field, text) pairs, for tables."""
    return [
        (key, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str))
        for key, value in item.items()
    ]


def markdown(name: str, card: Card) -> str:
    """The card for people."""
    out = [f"# Run card: {name}", "", f"{card['status']}, step {card['step']}"]
    for number, (title, item) in enumerate(card["items"].items(), 1):
        out += ["", f"## {number}. {title[0].upper()}{title[1:]}", "", "| | |", "|---|---|"]
        for key, value in rows(item):
            escaped = value.replace("|", "\\|").replace("\n", " ")
            out.append(f"| {key} | {escaped} |")
    return "\n".join(out) + "\n"
