"""OPDModule: a student, a teacher and an objective, in one LightningModule."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.core.mixins.hparams_mixin import _given_hyperparameters
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer

from opd_lightning import parallel, strategies
from opd_lightning.clock import Clock
from opd_lightning.configurable import to_plain
from opd_lightning.media import beside
from opd_lightning.models.building import ReadOnce, build_all
from opd_lightning.models.distributions import evaluating, laws_of, likeliest
from opd_lightning.models.export import export_student
from opd_lightning.models.lora import base_of
from opd_lightning.models.processors import close_eyes
from opd_lightning.models.students import Student, trainable_report
from opd_lightning.models.teachers import AdapterOffTeacher, StartTeacher, Teacher
from opd_lightning.models.vocabulary import Vocabulary, extra_eos, prove_shared
from opd_lightning.objectives import Extras, Objective
from opd_lightning.samplers import NativeSampler
from opd_lightning.seeds import fold, run_seed
from opd_lightning.sources import Phase
from opd_lightning.types import NOT_A_STUDENT, Completion, ObjectiveOutput, Prompt, Rendering, Rollout, TokenLaws, Watch


class OPDModule(pl.LightningModule):
    """On-policy distillation of a student from a teacher.

    `training_step` is a pure function of a `Rollout`; who wrote it and when is decided by the `RolloutRefresh` callback.

    Args:
        student: the recipe of the model that learns.
        teacher: who answers on the student's states.
        objective: what is descended.
        optimizer: called with all parameters; frozen ones never get a state. null is AdamW with a learning rate of 1e-4.
        scheduler: called with the optimizer, stepped after every optimizer step; null keeps the learning rate.
        reference: a third, frozen model, for objectives that extrapolate from it or stay near it; null is the student as it
            was before the first step. It is loaded only where an objective needs it.
        packed: score completions without padding, and what rows have in common (the prompt of a group) once. The result is the
            same up to rounding; false is for finding faults.
    """

    def __init__(
        self,
        student: Student,
        teacher: Teacher,
        objective: Objective,
        optimizer: OptimizerCallable | None = None,
        scheduler: LRSchedulerCallable | None = None,
        reference: Teacher | None = None,
        packed: bool = True,
    ) -> None:
        super().__init__()
        self._remember(
            student=student,
            teacher=teacher,
            objective=objective,
            optimizer=optimizer,
            scheduler=scheduler,
            reference=reference,
            packed=packed,
        )
        teacher.check(student)
        reference = reference or (AdapterOffTeacher() if student.lora else StartTeacher())
        reference.check(student)
        if objective.needs_reference and not reference.answers:
            raise ValueError(f"model.reference {reference!r} has no network, but the objective needs its law")
        if objective.needs_teacher and not teacher.answers:
            raise ValueError(f"{teacher!r} has no network, but the objective compares with one: use `support: WrittenToken`")
        self.recipe, self.teacher, self.objective, self.reference = student, teacher, objective, reference
        self.optimizer = optimizer or functools.partial(torch.optim.AdamW, lr=1e-4)
        self.scheduler, self.packed = scheduler, packed
        self.agreement_k = 0  # set by AgreementMonitor
        self.watch: Watch | None = None  # set by TokenRecords for a micro-batch
        self.writer, self.sampler = "student", NativeSampler()  # of predict; set by `opd generate` and CompletionEval
        self.phases: list[Phase] = []
        self.clock = Clock()
        self.student: nn.Module | None = None
        self.critic: nn.Linear | None = None  # the value head of GAE
        self.past: dict[int, torch.Tensor] = {}  # what the baselines of each objective remember: (terms, 2), all ranks
        self._seen: list[float] = []  # and what this optimizer step has added so far
        self.gradient_norm: float | None = None  # of this optimizer step; set by TrainMonitor
        self._trained_names: set[str] = set()
        self._checkpoint: dict[str, Any] | None = None
        self.strict_loading = False  # checkpoints leave the frozen base out; on_load_checkpoint checks what must be there

    def _remember(self, **arguments: Any) -> None:
        """Store the same plain hyper-parameters whether the CLI or Python built this module."""
        if _given_hyperparameters.get() is not None:
            self.save_hyperparameters()
        else:
            self.save_hyperparameters({**to_plain(arguments), "_instantiator": "lightning.pytorch.cli.instantiate_module"})

    # ---- building ------------------------------------------------------------------------------------------------------
    @cached_property
    def vocabulary(self) -> Vocabulary:
        """The student's tokenizer, available before any weights."""
        return Vocabulary.of(self.recipe.tokenizer(), extra_eos(self.recipe.config()), self.recipe.processor)

    def setup(self, stage: str) -> None:
        strategies.refuse_split_weights(self.trainer.strategy)
        if self.trainer.precision in ("bf16-true", "16-true"):
            raise ValueError(
                f"trainer.precision={self.trainer.precision} rounds rotary tables and batch floats: use `bf16-mixed`, or load "
                "the weights themselves in bfloat16 (`model.student.dtype: bfloat16`) with precision 32-true"
            )
        if self.student is not None:
            return
        rank_zero_info(self.prove_vocabularies())

    def prove_vocabularies(self) -> str:
        """Refuse models that do not share the student's tokens; what is cut off, in words. No weights are loaded."""
        rows = int(self.recipe.config().get_text_config().vocab_size)
        said, notes = prove_shared(self.vocabulary, rows, self._leaves())
        for note in notes:
            rank_zero_warn(note)
        return said

    def configure_model(self) -> None:
        if self.student is not None:  # called again by every fit, validate and predict
            return
        rank_zero_info(f"building {self.recipe!r} and {', '.join(map(repr, self._asked.values()))}")
        leaves, shared = list(self._leaves().values()), None
        if self.device_mesh is not None and parallel.world_size() > 1:  # FSDP2: one process reads the weights for all
            shared = ReadOnce(self.recipe, leaves, self.packed)
            student = shared.build()
        else:
            whole = self._trainer is None or not parallel.is_sharded(self._trainer.strategy)
            student = build_all(self.recipe, leaves, self.packed, share=whole)
        prompts = getattr(getattr(self._trainer, "datamodule", None), "train_prompts", [])
        if prompts and not any(p.media for p in prompts):
            close_eyes(base_of(student))
        self._trained_names = {f"student.{n}" for n, p in student.named_parameters() if p.requires_grad}
        if not self._trained_names:
            raise ValueError("no parameter of the student is trainable")
        if any(o.needs_critic for o in self._objectives):
            self.critic = self._new_critic()
            self._trained_names |= {"critic.weight", "critic.bias"}
        strategies.split(self, base_of(student), [base_of(own) for own in self._own_models()])
        if shared is not None:
            shared.fill(self.trainer.strategy.root_device)
        self.student = student
        rank_zero_info(f"student: {trainable_report(student)}")

    @property
    def _asked(self) -> dict[str, Teacher]:
        """The models that are asked; a reference that no objective needs is not even loaded."""
        needed = any(o.needs_reference for o in self._objectives)
        return {"teacher": self.teacher} | ({"reference": self.reference} if needed else {})

    @property
    def _objectives(self) -> list[Objective]:
        return [self.objective, *(phase.objective for phase in self.phases)]

    def _number(self, objective: Objective) -> int:
        """Which of the run's objectives; -1 for a foreign one."""
        return next((i for i, own in enumerate(self._objectives) if own is objective), -1)

    def _leaves(self) -> dict[str, Teacher]:
        """The same, taken apart into networks: ``teacher``, ``reference``, ``teacher.code``, ..."""
        return {
            f"{name}.{inner}" if inner else name: leaf
            for name, model in self._asked.items()
            for inner, leaf in model.leaves().items()
        }

    def _own_models(self) -> list[nn.Module]:
        return [own for model in self._leaves().values() if (own := model.own_model()) is not None]

    def after_step(self) -> None:
        """Let the teachers that follow the student take their step; `TeacherUpdate` calls it after the optimizer's."""
        for model in self._leaves().values():
            model.after_step(self._student, self.global_step)

    def _new_critic(self) -> nn.Linear:
        """A linear head on the student's hidden states that starts at zero; no gradient flows into the student through it."""
        if self.device_mesh is not None:
            raise ValueError(
                "a learned critic is not sharded: use another strategy than fsdp2, or GAE with train_critic: false"
            )
        critic = nn.Linear(self.recipe.config().get_text_config().hidden_size, 1)
        nn.init.zeros_(critic.weight)
        nn.init.zeros_(critic.bias)
        return critic

    def _place_teacher(self) -> None:
        if self.device_mesh is None:
            for own in self._own_models():
                own.to(self.device)

    def on_fit_start(self) -> None:
        self._place_teacher()
        if self._checkpoint is not None:
            parallel.optimizer_states_by_position(self, self._checkpoint)
            self._checkpoint = None

    on_validation_start = on_test_start = on_predict_start = _place_teacher

    @property
    def _student(self) -> nn.Module:
        if self.student is None:
            raise RuntimeError("the student is built by configure_model(), which the Trainer calls")
        return self.student

    # ---- writing and scoring -------------------------------------------------------------------------------------------
    def write(
        self,
        prompts: Sequence[Prompt],
        who: str,
        sampler: NativeSampler,
        seeds: Sequence[int],
        on_progress: Callable[[int], None] | None = None,
    ) -> list[Completion]:
        """Completions of the ``student`` or the ``teacher``, without gradient, each behind its own prompt."""
        student = self._student
        owns = self._own_models() if who != "student" else []
        with evaluating(student), parallel.whole_weights(student, *owns):
            if who == "student":
                ids, shown = [p.ids for p in prompts], [p.media for p in prompts]
                return sampler.write(student, ids, seeds, self.vocabulary, self.global_step, on_progress, **beside(shown))
            written: dict[int, Completion] = {}
            voices = [self.teacher.writer(p) for p in prompts]
            for voice in {id(v): v for v in voices}.values():
                rows = [i for i, v in enumerate(voices) if v is voice]
                ids, shown = map(list, zip(*(prompts[i].for_teacher for i in rows), strict=True))
                own_seeds = [seeds[i] for i in rows]
                with voice.speaking(student) as model:
                    own = sampler.write(model, ids, own_seeds, self.vocabulary, NOT_A_STUDENT, on_progress, **beside(shown))
                written |= zip(rows, own, strict=True)
            return [written[i] for i in range(len(prompts))]

    def join(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> Rollout:
        """Prompts with what was written behind them, ready to be scored. Rows without privileged information stay in."""
        rollout = Rollout.of(prompts, completions, self.vocabulary.pad_id)
        if (translation := self.teacher.translation) is not None:
            rollout = translation.applied(rollout, prompts, completions)
        return rollout.routed(torch.tensor([self.teacher.route(p) for p in prompts])) if self.teacher.routes else rollout

    def top_ids(self, rollout: Rollout, k: int, rows: int) -> torch.Tensor:
        """(B, T, k) the student's likeliest tokens as it is now; see `opd_lightning.models.distributions.likeliest`."""
        with evaluating(self._student), parallel.whole_weights(self._student):
            return likeliest(self._student, rollout.text, self.vocabulary.size, k, rows)

    def score(self, rollout: Rollout, objective: Objective, agreement_k: int = 0) -> ObjectiveOutput:
        """Both models' laws on a rollout, compared by an objective."""

        def compare() -> ObjectiveOutput:
            with self.clock.phase("student forward"):
                ours = laws_of(self._student, rollout.text, self.vocabulary.size)
            with self.clock.phase("teacher forward"):
                theirs = self._ask(self.teacher, rollout.for_teacher) if objective.needs_teacher else None
                third = self._ask(self.reference, rollout.text) if objective.needs_reference else None
            values = None
            if self.critic is not None and objective.needs_critic:
                values = self.critic(ours.hidden.detach().to(self.critic.weight.dtype)).squeeze(-1)
            past = self.past.get(self._number(objective))
            extras = Extras(third, values, self.progress, past=past, known=self.teacher.known, watch=self.watch)
            with self.clock.phase("heads and loss"):
                return objective(ours, theirs, rollout, agreement_k, extras)

        return parallel.run_inside(base_of(self._student), compare)

    def _ask(self, model: Teacher, text: Rendering) -> TokenLaws:
        return model.laws(self._student, text, self.vocabulary.size)

    @property
    def progress(self) -> float:
        """Share of the run's optimizer steps that are done, in [0, 1]; 0 where their number is open."""
        steps = self._trainer.max_steps if self._trainer is not None else -1
        return min(self.global_step / steps, 1.0) if steps > 0 else 0.0

    def phase_at(self, step: int) -> Phase | None:
        """The phase that an optimizer step lies in; None in the main part. A function of the step, so resuming is exact."""
        return next((phase for phase in self.phases if step < phase.end), None)

    def objective_at(self, step: int) -> Objective:
        """The objective of an optimizer step."""
        phase = self.phase_at(step)
        return phase.objective if phase else self.objective

    # ---- steps ---------------------------------------------------------------------------------------------------------
    def training_step(self, rollout: Rollout, batch_idx: int) -> dict[str, Any]:
        objective = self.objective_at(self.global_step)
        out = self.score(rollout, objective, self.agreement_k)
        loss = out.loss
        if out.advantages is not None:
            added = parallel.sum_over_ranks(out.advantages.flatten().tolist())
            self._seen = [a + b for a, b in zip(self._seen or [0.0] * len(added), added, strict=True)]
        if self.critic is not None and not objective.needs_critic:  # DDP waits for every parameter
            loss = loss + 0.0 * (self.critic.weight.sum() + self.critic.bias.sum())
        return {"loss": loss, "output": replace(out, loss=out.loss.detach())}  # the graph ends with its backward pass

    def on_before_backward(self, loss: Tensor) -> None:
        self.clock.enter("backward")

    def on_after_backward(self) -> None:
        self.clock.leave()

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        self.clock.enter("optimizer")
        if self._seen:  # all micro-batches of the step have been scored with what was remembered before it
            objective = self.objective_at(self.global_step)
            number, seen = self._number(objective), torch.tensor(self._seen, dtype=torch.float64).view(-1, 2)
            self.past[number] = objective.remember(self.past.get(number), seen)
            self._seen = []

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: float | None = None, gradient_clip_algorithm: Any = None
    ) -> None:
        strategies.clip(self, optimizer, gradient_clip_val, gradient_clip_algorithm)

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(epoch, batch_idx, optimizer, *args, **kwargs)
        optimizer.zero_grad()  # the next rollouts are written without them
        self.clock.leave()

    def validation_step(self, prompts: list[Prompt], batch_idx: int) -> None:
        """The work is done by `CompletionEval`, which writes and grades completions of the batch."""

    test_step = validation_step

    def predict_step(self, prompts: list[Prompt], batch_idx: int) -> list[dict[str, Any]]:
        """Completions of `writer` behind the prompts."""
        seeds = [fold(run_seed(None), "predict", p.row) for p in prompts]
        written = self.write(prompts, self.writer, self.sampler, seeds)
        return [
            {"prompt": p.text, "completion": self.vocabulary.decode(c.ids), "ended": c.ended}
            for p, c in zip(prompts, written, strict=True)
            if p.row >= 0
        ]

    def configure_optimizers(self) -> Any:
        # Every parameter in one group: Lightning maps states to sharded strategies by position in parameters().
        optimizer = self.optimizer(self.parameters())
        if self.scheduler is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": self.scheduler(optimizer), "interval": "step"}}

    # ---- checkpoints ---------------------------------------------------------------------------------------------------
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what training changes: the frozen base of a LoRA student is not in the file, and of the teachers only those
        that move.
        """
        checkpoint["past_advantages"] = {"past": self.past, "seen": self._seen}
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k in self._trained_names}
        checkpoint["teachers"] = {name: state for name, model in self._leaves().items() if (state := model.state_dict())}
        parallel.optimizer_states_by_name(self, checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        kept = checkpoint.get("past_advantages", {"past": {}, "seen": []})
        self.past, self._seen = dict(kept["past"]), list(kept["seen"])
        found_teachers = checkpoint.get("teachers", {})
        for name, model in self._leaves().items():
            if name in found_teachers:
                model.load_state_dict(found_teachers[name])
            elif model.state_dict():
                rank_zero_warn(
                    f"the checkpoint holds no state of the {name} {model!r}: it starts anew from the student's start"
                )
        if "state_dict" not in checkpoint:  # sharded strategies load the weights themselves
            return
        found, own = checkpoint["state_dict"], self.state_dict()
        other = sorted(n for n in self._trained_names if n not in found or found[n].shape != own[n].shape)
        if other:
            raise ValueError(
                f"the checkpoint lacks {len(other)} of {len(self._trained_names)} trained tensors, or has others "
                f"(first: {other[0]}). It belongs to another student: compare model.student in its config with this run's."
            )
        if self._trainer is not None:
            self._checkpoint = checkpoint

    def export(self, folder: str | Path, merge: bool = False, gguf: bool = False) -> Path:
        """Write the student; see `opd_lightning.models.export.export_student`."""
        return export_student(self._student, self.vocabulary, Path(folder), merge, gguf)
