"""CompletionEval: how good is the student on prompts that it never trained on?"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from opd_lightning import parallel
from opd_lightning.callbacks.asking import ask_ahead
from opd_lightning.callbacks.writing import RunWriters
from opd_lightning.metrics import Grader, PassAtK, TokenMean
from opd_lightning.models.distributions import evaluating
from opd_lightning.module import OPDModule
from opd_lightning.objectives import ForwardKL, MatchedVocab, Objective, ReverseKL, WrittenToken
from opd_lightning.paths import data_file
from opd_lightning.samplers import NativeSampler
from opd_lightning.seeds import run_seed
from opd_lightning.types import Completion, Prompt, Rollout

REVERSE_KL = Objective(ReverseKL())
ON_SHARED = Objective(ReverseKL(), MatchedVocab())
LIKELIHOOD = Objective(ForwardKL(), WrittenToken())


class CompletionEval(pl.Callback):
    """Writes completions of the held-out prompts, grades them, and measures the reverse KL on them.

    The student is measured before the first step, every ``every_n_steps`` and at the end; the teacher once, before the first
    step. The same prompts get the same random numbers each time, so differences are the student's. Completions and scores
    are kept as JSON lines in ``<run>/eval/``.

    Args:
        every_n_steps: optimizer steps between two measurements; 0 measures only before and after.
        grader: judges completions; null takes the one that belongs to the prompt set. Without any, accuracy is left out.
        sampler: how held-out completions are drawn.
        samples_per_prompt: completions of every held-out prompt.
        pass_at: k of every pass@k to report; needs as many samples per prompt.
        neutral_text: JSON-lines file with ``text`` whose likelihood should not move (``package:<module>/<file>`` for one
            that a package carries); null leaves it out.
        seed: of the completions; null takes ``seed_everything``.

    Raises:
        ValueError: for a pass@k with more than ``samples_per_prompt`` completions.
    """

    def __init__(
        self,
        every_n_steps: int = 50,
        grader: Grader | None = None,
        sampler: NativeSampler = NativeSampler(batch_size=256),
        samples_per_prompt: int = 1,
        pass_at: list[int] | None = None,
        neutral_text: str | None = None,
        seed: int | None = None,
    ) -> None:
        self.every_n_steps, self.grader, self.sampler = every_n_steps, grader, sampler
        self.samples_per_prompt, self.pass_at = samples_per_prompt, pass_at or []
        self.neutral_text, self.seed = neutral_text, run_seed(seed)
        if too_many := [k for k in self.pass_at if not 1 <= k <= samples_per_prompt]:
            raise ValueError(f"eval.pass_at={too_many}: k must lie between 1 and eval.samples_per_prompt={samples_per_prompt}")
        self.history: list[dict[str, Any]] = []

    # ---- when ----------------------------------------------------------------------------------------------------------
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        assert isinstance(pl_module, OPDModule)
        pl_module.sampler = self.sampler
        if stage != "fit":
            return
        if self.neutral_text is not None:
            data_file(self.neutral_text)
        held_out = bool(trainer.datamodule.eval_prompts)  # type: ignore[attr-defined]
        trainer.num_sanity_val_steps = 0  # type: ignore[assignment]  # the measurement before the first step takes its place
        if held_out and self.every_n_steps:
            trainer.check_val_every_n_epoch = None
            trainer.val_check_interval = self.every_n_steps * trainer.accumulate_grad_batches
        else:
            trainer.limit_val_batches = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.datamodule.eval_prompts:  # type: ignore[attr-defined]
            return
        assert isinstance(pl_module, OPDModule)
        if not self.history and pl_module.teacher.writes:
            self._publish(trainer, self.measure(trainer, pl_module, "teacher"))
        step = trainer.global_step
        due = step == 0 or (self.every_n_steps and step % self.every_n_steps == 0)
        if due and self._last_step() != step:  # Lightning skips the validation of the step that a run resumes at
            self._publish(trainer, self.measure(trainer, pl_module, "student"))

    def _last_step(self) -> int:
        """Step of the last measurement of the student; -1 before the first."""
        return next((row["step"] for row in reversed(self.history) if row["who"] == "student"), -1)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, OPDModule)
        found = self.measure(trainer, pl_module, "student")
        pl_module.log_dict({f"eval/{k}": v for k, v in found.items() if k not in ("step", "who")}, batch_size=1)

    on_test_epoch_end = on_validation_epoch_end

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        if data.eval_prompts and self._last_step() != trainer.global_step and not trainer.should_stop:
            assert isinstance(pl_module, OPDModule)
            self._publish(trainer, self.measure(trainer, pl_module, "student"))

    def _publish(self, trainer: pl.Trainer, found: dict[str, Any]) -> None:
        """To the loggers directly: these hooks lie outside the steps that Lightning logs from."""
        if found["who"] == "student":
            values = {f"eval/{k}": v for k, v in found.items() if k not in ("step", "who")}
            trainer.callback_metrics.update({k: torch.tensor(v) for k, v in values.items()})
            for logger in trainer.loggers:
                logger.log_metrics(values, step=found["step"])

    # ---- what ----------------------------------------------------------------------------------------------------------
    def measure(self, trainer: pl.Trainer, pl_module: OPDModule, who: str) -> dict[str, Any]:
        """Write, grade and score the held-out prompts of ``student`` or ``teacher``; all ranks must call it."""
        with pl_module.clock.phase("evaluation", whole=True):
            return self._measured(trainer, pl_module, who)

    def _measured(self, trainer: pl.Trainer, pl_module: OPDModule, who: str) -> dict[str, Any]:
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        grader = self.grader or data.grader
        tokens, truncated, accuracy, divergence = (TokenMean().to(pl_module.device) for _ in range(4))
        passes = {k: PassAtK(k).to(pl_module.device) for k in self.pass_at if grader is not None}
        writers = RunWriters(trainer, pl_module, self.sampler, self.seed, "held-out")
        records = []
        with torch.no_grad(), evaluating(pl_module.student), trainer.precision_plugin.forward_context():  # type: ignore[arg-type]
            prompts = list(self._prompts(data.eval_prompts))
            written = getattr(writers, who)(prompts)
            if who == "student" and pl_module.teacher.answers:
                told = data.inform(prompts, written, self.samples_per_prompt)
                self._divergence(trainer, told, written, data.micro_batch_size or 64, divergence)
            nll = self._neutral_nll(pl_module) if who == "student" and self.neutral_text else None
        groups: dict[int, list[float]] = {}
        for prompt, completion in zip(prompts, written, strict=True):
            if prompt.row < 0:
                continue
            text = pl_module.vocabulary.decode(completion.ids)
            score = grader({**prompt.fields, "ended": completion.ended}, text) if grader is not None else torch.nan
            for metric, value in ((tokens, len(completion.ids)), (truncated, not completion.ended), (accuracy, score)):
                metric.update(torch.tensor(float(value), device=pl_module.device))
            groups.setdefault(prompt.index, []).append(score)
            records.append({"prompt": prompt.text, "completion": text, "score": score, "ended": completion.ended})
        for passed in passes.values():
            for scores in groups.values():
                passed.update(correct=sum(s >= 1.0 for s in scores), total=len(scores))
        found: dict[str, Any] = {"step": trainer.global_step, "who": who}
        if grader is not None:
            found["accuracy"] = float(accuracy.compute())
        if pl_module.teacher.answers:
            name = _divergence_of(pl_module)
            found[name] = float(divergence.compute()) if who == "student" else 0.0
            if math.isnan(found[name]):  # no row whose teacher knows more
                del found[name]
        found |= {"completion_tokens": float(tokens.compute()), "truncated": float(truncated.compute())}
        found |= {f"pass@{k}": float(passed.compute()) for k, passed in passes.items()}
        if nll is not None:
            found["neutral_nll"] = nll
        self.history.append(found)
        self._keep(trainer, records, found)
        return found

    def _prompts(self, held_out: list[Prompt]) -> Iterator[Prompt]:
        """This rank's prompts, equally many on every rank, each ``samples_per_prompt`` times; a filler has row -1."""
        world, rank, n = parallel.world_size(), parallel.rank(), self.samples_per_prompt
        for place in range(-(-len(held_out) // world)):
            i = place * world + rank
            prompt = held_out[i] if i < len(held_out) else held_out[0]
            for sample in range(n):
                yield replace(prompt, row=i * n + sample if i < len(held_out) else -1)

    def _divergence(
        self, trainer: pl.Trainer, prompts: list[Prompt], written: list[Completion], size: int, mean: TokenMean
    ) -> None:
        pl_module: Any = trainer.lightning_module
        ask_ahead(trainer, pl_module, pl_module.join(prompts, written))
        for start in range(0, len(prompts), size):
            rollout = pl_module.join(prompts[start : start + size], written[start : start + size])
            counted = (rollout.row >= 0) & torch.tensor([p.informed for p in prompts[start : start + size]])
            objective = REVERSE_KL if pl_module.teacher.translation is None else ON_SHARED
            out = pl_module.score(rollout.to(pl_module.device), objective)
            per_token = out.stats.values[_divergence_of(pl_module)]
            mean.update(per_token[counted[:, None].expand_as(rollout.mask)[rollout.mask].to(per_token.device)])

    def _neutral_nll(self, pl_module: OPDModule) -> float:
        """Nats per token over this file, each rank its share."""
        assert self.neutral_text is not None
        tokenizer, mean = pl_module.vocabulary.tokenizer, TokenMean().to(pl_module.device)
        lines = data_file(self.neutral_text).read_text(encoding="utf-8").splitlines()
        texts = [json.loads(line)["text"] for line in lines if line.strip()]
        world, rank = parallel.world_size(), parallel.rank()
        for place in range(-(-len(texts) // world)):
            i = place * world + rank
            ids = tokenizer(texts[min(i, len(texts) - 1)], add_special_tokens=False).input_ids
            unknown = Completion(tuple(ids[1:]), (torch.nan,) * (len(ids) - 1), ended=True, policy_step=-1)
            rollout = Rollout.of([Prompt(0, "", (ids[0],))], [unknown], pl_module.vocabulary.pad_id)
            nll = pl_module.score(rollout.to(pl_module.device), LIKELIHOOD).token_loss[rollout.mask.to(pl_module.device)]
            mean.update(nll if i < len(texts) else nll * torch.nan)
        return float(mean.compute())

    def _keep(self, trainer: pl.Trainer, records: list[dict[str, Any]], found: dict[str, Any]) -> None:
        everything = [record for part in parallel.gather_objects(records) for record in part]
        if not trainer.is_global_zero:
            return
        folder = Path(trainer.default_root_dir) / "eval"
        lines = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in everything)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{found['who']}-{found['step']:06d}.jsonl").write_text(lines, encoding="utf-8")
            (folder / "history.json").write_text(json.dumps(self.history, indent=1), encoding="utf-8")
        except OSError as error:
            rank_zero_warn(f"held-out completions were not written to {folder}: {error}")

    # ---- state ---------------------------------------------------------------------------------------------------------
    def state_dict(self) -> dict[str, Any]:
        return {"history": self.history}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.history = state_dict["history"]


def _divergence_of(module: OPDModule) -> str:
    """The divergence that can be measured."""
    return "reverse_kl" if module.teacher.known is None else "coarse_reverse_kl"
