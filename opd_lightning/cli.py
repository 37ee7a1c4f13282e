"""``opd``: LightningCLI with the keys and verbs of a distillation run."""

from __future__ import annotations

import difflib
import faulthandler
import inspect
import io
import logging
import os
import re
import select
import sys
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar

import lightning.pytorch as pl
import yaml
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_only

# Short class names resolve among imported classes, so everything that YAML may name is imported here.
from opd_lightning import callbacks, configfiles, data, metrics, models, objectives, samplers, schedulers, sources  # noqa: F401
from opd_lightning.callbacks import Alarms, ColdStart, CompletionEval, GracefulStop, RolloutRefresh
from opd_lightning.callbacks.asking import TeacherAway
from opd_lightning.callbacks.recovery import last_checkpoint
from opd_lightning.configurable import Configurable
from opd_lightning.data.datamodule import PromptDataModule
from opd_lightning.inspect.report import Report
from opd_lightning.inspect.setups import Setup
from opd_lightning.models import LoRA
from opd_lightning.module import OPDModule
from opd_lightning.trainer import DEFAULTS, OPDTrainer

BASE = "base.yaml"
CLI = TypeVar("CLI", bound="OPDCLI")


class Parser(LightningArgumentParser):
    """Says which key or class was probably meant."""

    def error(self, message: str, ex: Exception | None = None) -> Any:
        hints: list[str] = []
        for found in re.findall(r"Option '([\w.]+)' is not accepted|does not accept option '([\w.]+)'", message):
            wrong = "".join(found)
            hints.append(_near(wrong.rpartition(".")[2], _argument_names(), "key"))
        if message.startswith("unrecognized arguments"):
            flags = [flag for action in self._actions for flag in action.option_strings]
            hints += [_near(wrong, flags, "key") for wrong in re.findall(r"(--[\w.+]+)", message)]
        for wrong in re.findall(r"Expected a dot import path string: (\w+)", message):
            hints.append(_near(wrong, _class_names(), "class"))
        message += "".join(hint for hint in dict.fromkeys(hints) if hint.strip() not in message)
        if self.exit_on_error:  # the outermost parser; inner ones raise
            sys.stderr.write(
                f"opd: error: {message}\n"
                "(all keys: opd fit --help; what a class takes: opd fit --model.objective.help Objective)\n"
            )
            self.exit(2)
        return super().error(message, ex)


def _near(wrong: str, known: Iterable[str], what: str) -> str:
    if wrong in known and what == "key":
        owners = sorted(c.__name__ for c in _components() if wrong in inspect.signature(c).parameters)
        return f"\n  {wrong!r} belongs to {', '.join(owners[:4])}"
    close = difflib.get_close_matches(wrong, sorted(known), 1, cutoff=0.5)
    return f"\n  {wrong!r} is not a known {what}; did you mean {close[0]!r}?" if close else ""


def _components() -> list[type]:
    """Everything that a configuration can name."""
    found: list[type] = [OPDModule, PromptDataModule, OPDTrainer, pl.Trainer, LoRA, *Configurable.__subclasses__()]
    for cls in found:  # grows while it is read
        below: list[type] = cls.__subclasses__()
        found += [c for c in below if c not in found]
    return [*found, *(getattr(callbacks, name) for name in callbacks.__all__)]


def _class_names() -> set[str]:
    return {cls.__name__ for cls in _components()}


def _argument_names() -> set[str]:
    """Keys that some component, or the top level, accepts."""
    top = {"seed_everything", "trainer", "model", "data", "rollout", "cold_start", "eval", "alarms", "report", "ckpt_path"}
    return top.union(*(inspect.signature(cls).parameters for cls in _components()))


class CarriedConfig(SaveConfigCallback):
    """The resolved configuration as ``<run>/config.yaml`` and inside every checkpoint."""

    started = False

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if trainer.is_global_zero and stage == "fit":
            folder = Path(trainer.default_root_dir)
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "config.yaml").write_text(self._text(), encoding="utf-8")

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        CarriedConfig.started = True

    def _text(self) -> str:
        text: str = self.parser.dump(self.config, skip_none=False, skip_link_targets=True)
        return text

    def state_dict(self) -> dict[str, Any]:
        return {"config": self._text()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing: the text is read before parsing (see `opd_lightning.configfiles.with_carried`)."""


class OPDCLI(LightningCLI):
    """LightningCLI for OPDModule and PromptDataModule, with the core callbacks as keys of their own.

    ``rollout``, ``cold_start``, ``eval`` and ``alarms`` merge by key when configurations are laid over each other; items of
    ``trainer.callbacks`` would replace the whole list (append with ``callbacks+``).
    """

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """The verbs; the one alone that is asked for, since every parser takes a second to build."""
        verbs = {
            **LightningCLI.subcommands(),
            "generate": {"model", "datamodule"},
            "export": {"model", "datamodule"},
        }
        asked = sys.argv[1] if len(sys.argv) > 1 else None
        return {asked: verbs[asked]} if asked in verbs else verbs

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_lightning_class_args(ColdStart, "cold_start")
        parser.add_lightning_class_args(RolloutRefresh, "rollout")
        parser.add_lightning_class_args(CompletionEval, "eval")
        parser.add_lightning_class_args(Alarms, "alarms")
        parser.add_class_arguments(Report, "report")

    def _parse_ckpt_path(self) -> None:
        """Not Lightning's: it would put the checkpoint's values over the command line."""

    def before_instantiate_classes(self) -> None:
        if self.subcommand is None:
            return
        config = self.config[self.subcommand]
        run = Path(config.trainer.default_root_dir)
        if config.get("ckpt_path") == "last":
            found = last_checkpoint(run)
            if found is None:
                rank_zero_info(f"no checkpoint in {run / 'checkpoints'}: starting from the beginning")
            config["ckpt_path"] = str(found) if found else None

    def after_instantiate_classes(self) -> None:
        if self.subcommand == "fit" and self.config.fit.ckpt_path is None and not self.config.fit.trainer.fast_dev_run:
            _move_aside(Path(self.config.fit.trainer.default_root_dir))

    def after_fit(self) -> None:
        if self.trainer.is_global_zero and not _was_stopped(self.trainer):
            config = self.config["fit"]
            report: Report = self.config_init["fit"]["report"]
            report.finish(Path(config.trainer.default_root_dir), sys.argv[2:])


@rank_zero_only
def _move_aside(run: Path) -> None:
    """A new run never writes into an old one's folder."""
    if not (run / "config.yaml").is_file():
        return
    number = 1
    while (old := run.with_name(f"{run.name}.old-{number}")).exists():
        number += 1
    run.rename(old)
    rank_zero_info(f"the run that was in {run} is now in {old} (continue it with --ckpt_path last instead)")


def _was_stopped(trainer: pl.Trainer) -> bool:
    return any(isinstance(c, GracefulStop) and c.stopped for c in trainer.callbacks)  # type: ignore[attr-defined]


class _Quiet(logging.Filter):
    """Drops Lightning's lines about other products and absent hardware."""

    def filter(self, record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(("💡", "TPU available", "HPU available", "`weights_only` was not set"))


class ReadingCLI(OPDCLI):
    """Parses the words of ``opd fit`` and builds the recipes, and stops there: no trainer, no weights, no folder."""

    def before_instantiate_classes(self) -> None:
        """No checkpoint is looked for."""

    def after_instantiate_classes(self) -> None:
        """No run is moved aside."""

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        """None: a configuration for devices that this machine lacks can be read too."""

    def _set_seed(self) -> None:
        """Nothing is drawn."""

    def _run_subcommand(self, subcommand: str) -> None:
        """Nothing is run."""


def read(words: list[str]) -> Setup:
    """What ``opd fit`` with these words would train."""
    cli = _built(ReadingCLI, ["fit", *words])
    text = cli._parser("fit").dump(cli.config["fit"], skip_none=False, skip_link_targets=True)
    built = cli.config_init["fit"]
    return Setup(yaml.safe_load(text), built["model"], built["rollout"], built["cold_start"], built["data"])


class PreparedCLI(OPDCLI):
    """Builds everything for ``opd fit`` and does not start it."""

    def after_instantiate_classes(self) -> None:
        """No run is moved aside."""

    def _run_subcommand(self, subcommand: str) -> None:
        """Nothing is run."""


def prepared(words: list[str]) -> PreparedCLI:
    """Trainer, module and data of ``opd fit`` with these words, not started.

    Raises:
        ValueError: if the words are refused; the reason has been printed.
    """
    argv = sys.argv
    try:
        return _built(PreparedCLI, ["fit", *words])
    except SystemExit as error:
        raise ValueError(f"opd fit {' '.join(words)} is refused; the reason stands above") from error
    finally:
        sys.argv = argv


def run_verbs(argv: list[str]) -> OPDCLI:
    """Parse and run one of the verbs that build a module."""
    return _built(OPDCLI, argv)


def _built(cls: type[CLI], argv: list[str]) -> CLI:
    for name in ("utilities.rank_zero", "trainer.connectors.checkpoint_connector"):
        logging.getLogger(f"lightning.pytorch.{name}").addFilter(_Quiet())
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")  # inside Lightning 2.6 with torch 2.13
    argv = configfiles.with_carried(configfiles.expand(argv))
    # In sys.argv, not in args=: the ddp and fsdp launchers start the other ranks with the same sys.argv.
    sys.argv = [sys.argv[0], *argv]
    base = {"default_config_files": [str(configfiles.find(BASE))]}
    return cls(
        OPDModule,
        PromptDataModule,
        trainer_class=OPDTrainer,
        trainer_defaults=DEFAULTS,
        parser_class=Parser,
        parser_kwargs={verb: dict(base) for verb in cls.subcommands()},
        save_config_callback=CarriedConfig,
        auto_configure_optimizers=False,
        seed_everything_default=0,
    )


PIPE = 141
"""What a shell reports of a command whose output nobody reads any more: 128 and the number of SIGPIPE."""


def main(argv: list[str] | None = None) -> int:
    """Entry point of ``opd``. Exit code 0 done, 1 failed while running, 2 refused before, 75 stopped for want of a teacher
    server (resume it), 141 nobody reads its output any more (``opd configs | head -3``), 143 stopped by a signal. A crash below
    Python (a negative code) says where Python was.
    """
    if sys.__stderr__ is not None and not faulthandler.is_enabled():
        faulthandler.enable(sys.__stderr__)
    try:
        code = _main(list(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()
        return code
    except (BrokenPipeError, SystemExit):  # a help is printed on the way out
        if not _nobody_reads():
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more, without a word
        return PIPE


def _nobody_reads() -> bool:
    """Whether the other end of stdout is closed: another pipe than this may have broken."""
    ends = select.poll()
    try:
        ends.register(sys.stdout.fileno(), 0)
        sys.stdout.flush()
    except (io.UnsupportedOperation, BrokenPipeError) as error:  # the first of a stdout that is no file
        return isinstance(error, BrokenPipeError)
    return any(event & select.POLLERR for _, event in ends.poll(0))


def _main(argv: list[str]) -> int:
    from opd_lightning import commands

    CarriedConfig.started = False
    try:
        if argv and argv[0] in {**commands.COMMANDS, **commands.OWN_PARSER}:
            return commands.run(argv, read)
        cli = run_verbs(argv)
    except SystemExit:
        if argv in (["-h"], ["--help"]):
            print(commands.OVERVIEW)
        raise
    except TeacherAway as away:
        print(f"opd: {away}", file=sys.stderr)
        return away.code
    except (ValueError, OSError, ImportError, TypeError, KeyError, yaml.YAMLError) as error:
        if CarriedConfig.started or os.environ.get("OPD_TRACEBACK") or isinstance(error, BrokenPipeError):
            raise
        text = error.args[0] if isinstance(error, KeyError) and error.args else error
        print(f"opd: {type(error).__name__}: {text}", file=sys.stderr)
        print("(the whole traceback: OPD_TRACEBACK=1)", file=sys.stderr)
        return 2
    return GracefulStop.EXIT_CODE if _was_stopped(cli.trainer) else 0


if __name__ == "__main__":
    sys.exit(main())
