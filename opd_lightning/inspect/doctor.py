"""``opd doctor``: sixteen prompts and no training, to say whether a run will work, and what to change if not."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from opd_lightning.inspect.cost import Forecast
from opd_lightning.inspect.examination import Examination, Figures
from opd_lightning.inspect.pairs import model_lines, prompt_differences, teacher_text
from opd_lightning.inspect.setups import Setup
from opd_lightning.inspect.verdict import REFUSE, Thresholds, Verdict, judge
from opd_lightning.models.distributions import head_of
from opd_lightning.models.vocabulary import VocabularyMismatch

FILE = "doctor.json"
"""Name of the JSON in a run's folder, from where the report takes it."""
WIDTH = 30


@dataclass(frozen=True)
class Diagnosis:
    """What the examination of one pair found.

    Attributes:
        verdict: what to do.
        facts: name -> what was read off the two models and the configuration.
        differences: what differs beside the information, a line each.
        figures: what was measured; None where the pair was refused before.
        seconds: forecast of an optimizer step, and of the run.
        memory: forecast of the peak, bytes.
    """

    verdict: Verdict
    facts: dict[str, str]
    differences: tuple[str, ...]
    figures: Figures | None = None
    seconds: tuple[float, float] | None = None
    memory: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def static_differences(setup: Setup, prompts: int) -> list[str]:
    """End tokens, templates and thinking mode: what differs between the two, each once. No weights are loaded."""
    data, tokenizer = setup.data, setup.module.vocabulary.tokenizer
    found = [line.strip().removeprefix("! ") for line in model_lines(setup) if line.strip().startswith("!")]
    for row in data.prompt_set.rows()[:prompts]:
        ours = data.template.text(row, tokenizer)
        theirs, _ = teacher_text(data, row, tokenizer)
        asked = row["prompt"] if isinstance(row["prompt"], str) else row["prompt"][-1]["content"]
        found += prompt_differences(ours, theirs, ours.rpartition(asked)[2])
    return list(dict.fromkeys(found))


def diagnose(examination: Examination, setup: Setup, at: Thresholds, forecasting: bool = True) -> Diagnosis:
    """Examine the pair as it stands."""
    facts = {"vocabulary": examination.module.prove_vocabularies().removeprefix("vocabulary: ")}
    differences = static_differences(setup, len(examination.prompts))
    facts |= _facts(examination, setup)
    seconds = memory = None
    if forecasting:
        forecast = Forecast.of(setup)
        step, steps = sum(forecast.seconds.values()), int(setup.config["trainer"]["max_steps"])
        seconds, memory = (step, step * max(steps, 0)), sum(forecast.memory.values())
    figures = examination.figures()
    return Diagnosis(
        judge(figures, differences, setup.data.batch_size, at), facts, tuple(differences), figures, seconds, memory
    )


def examine(setup: Setup, prompts: int, samples: int, k: int, at: Thresholds) -> Diagnosis:
    """``opd doctor`` without its page. A pair that shares no vocabulary is refused, not an error."""
    try:
        setup.module.prove_vocabularies()
    except VocabularyMismatch as error:
        return Diagnosis(Verdict(REFUSE, (str(error),)), {}, ())
    return diagnose(Examination(setup, prompts, samples, k), setup, at)


def _facts(examination: Examination, setup: Setup) -> dict[str, str]:
    module, tokenizer = setup.module, setup.module.vocabulary.tokenizer
    ids = {"bos": tokenizer.bos_token, "pad": tokenizer.pad_token}
    names: Any = tokenizer.convert_ids_to_tokens
    ends = ", ".join(names(list(module.vocabulary.eos_ids)))
    out = {"end, begin and pad": f"{ends}; {ids['bos'] or 'no begin token'}; {ids['pad'] or 'no pad token, the end stands in'}"}
    shape = []
    for name, network in {"student": examination.network, **_networks(module)}.items():
        head = head_of(network)
        cap = f", capped at {head.cap:g}" if head.cap else ""
        shape.append(f"{name} x {head.factor:g}{cap}")
    out["logits"] = "; ".join(shape)
    row = setup.data.prompt_set.rows()[0]
    theirs, note = teacher_text(setup.data, row, tokenizer)
    same = theirs == setup.data.template.text(row, tokenizer)
    out["prompts"] = "the teacher reads what the student reads" if same else f"the teacher reads its own{note}"
    return out


def _networks(module: Any) -> dict[str, Any]:
    found = {name: leaf.own_model() for name, leaf in module.teacher.leaves().items()}
    return {f"teacher {name}".strip(): network for name, network in found.items() if network is not None}


# ---- the page ----------------------------------------------------------------------------------------------------------------
def page(found: Diagnosis) -> str:
    """What the terminal shows, the verdict last."""
    lines: list[str] = []
    for name, value in found.facts.items():
        lines.append(f"{name:<{WIDTH}}{value}")
    lines += [f"! {line}" for line in found.differences]
    if found.seconds is not None and found.memory is not None:
        step, run = found.seconds
        lines.append(
            f"{'forecast':<{WIDTH}}{step:.2g} s a step, {_time(run)} in all, {found.memory / 2**20:.0f} MiB at the peak"
        )
    if found.figures is not None:
        lines += ["", *_measured(found.figures)]
    lines += ["", f"verdict: {found.verdict}", *(f"  - {reason}" for reason in found.verdict.reasons)]
    return "\n".join(lines)


def _measured(f: Figures) -> Iterator[str]:
    yield f"{f'{f.completions} completions of {f.prompts} prompts':<{WIDTH}}{'student':>10}{'teacher':>10}"
    voices = (f.student, f.teacher)
    if f.graded:
        yield _pair("accuracy", *(f"{v.accuracy:.0%}" if v and v.accuracy is not None else "-" for v in voices))
    yield _pair("tokens of a completion", *(f"{v.tokens:.1f}" if v else "-" for v in voices))
    yield _pair("cut by the length limit", *(f"{v.truncated:.0%}" if v else "-" for v in voices))
    yield ""
    yield "on the student's text"
    yield _pair("entropy (nats)", *(f"{x:.3f}" for x in f.entropy))
    yield _pair("log-likelihood (nats/token)", *(f"{x:.3f}" for x in f.likelihood))
    if f.ends is not None:
        yield _pair("end, where the student ended", *(f"{x:.3f}" for x in f.ends))
    yield _pair(f"mass on shared top-{f.k}", *(f"{x:.3f}" for x in f.mass))
    yield f"{f'overlap of top-{f.k}':<{WIDTH}}{f.overlap:10.3f}"
    yield f"{'reverse KL (nats/token)':<{WIDTH}}{f.reverse_kl:10.3f}"
    yield f"{'of its nearest tenth':<{WIDTH}}{f.nearest_kl:10.3f}"
    yield f"{'headroom (share of states)':<{WIDTH}}{f.headroom:10.1%}"
    if f.floor is not None:
        yield f"{'of it unlearnable (nats)':<{WIDTH}}{f.floor:10.3f}"
    for share, gain in f.gain.items():
        shown = f"{gain:+10.1%} accuracy" if f.graded else f"{gain:+10.3f} nats/token"
        yield f"{f'teacher goes on from {share}':<{WIDTH}}{shown}"
    yield ""
    yield f"{'position':<16}{'reverse KL':>14}{'student ent.':>14}{'teacher ent.':>14}{'overlap':>10}{'tokens':>8}"
    for s in f.stretches:
        yield (
            f"{f'{s.first} to {s.last}':<16}{s.reverse_kl:14.3f}{s.student_entropy:14.3f}{s.teacher_entropy:14.3f}"
            f"{s.overlap:10.3f}{s.tokens:8d}"
        )


def _pair(name: str, ours: str, theirs: str) -> str:
    return f"{name:<{WIDTH}}{ours:>10}{theirs:>10}"


def _time(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def save(found: Diagnosis, file: Path) -> None:
    """The diagnosis as JSON."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(found.to_dict(), indent=1) + "\n", encoding="utf-8")


def section(run: Path) -> str:
    """The examination in a run's folder as part of its report, HTML; empty if there is none."""
    file = run / FILE
    if not file.is_file():
        return ""
    from html import escape

    found = json.loads(file.read_text(encoding="utf-8"))
    verdict, figures = found["verdict"], found["figures"]
    steps = f" (about {verdict['steps']} steps)" if verdict["steps"] else ""
    reasons = "".join(f"<li>{escape(reason)}</li>" for reason in verdict["reasons"])
    rows: Sequence[tuple[str, str]] = list(found["facts"].items())
    if figures is not None:
        rows = [
            *rows,
            ("overlap", f"{figures['overlap']:.3f} of the top-{figures['k']}"),
            ("overlap mass (student, teacher)", ", ".join(f"{x:.3f}" for x in figures["mass"])),
            ("reverse KL", f"{figures['reverse_kl']:.3f} nats/token"),
            ("headroom", f"{figures['headroom']:.1%} of the states"),
            ("gain when the teacher goes on", ", ".join(f"{x:+.3f} from {share}" for share, x in figures["gain"].items())),
        ]
    cells = "".join(f"<tr><td>{escape(name)}</td><td>{escape(value)}</td></tr>" for name, value in rows)
    heading = f"<h3>{escape(run.name)}: {escape(verdict['word'] + steps)}</h3>"
    found_at = _positions(figures["stretches"]) if figures is not None else ""
    return f'{heading}<ul>{reasons}</ul><div class="scroll"><table class="text">{cells}</table></div>{found_at}'


def _positions(stretches: Sequence[Mapping[str, float]]) -> str:
    """What was measured by position in the completion, HTML; the terminal shows the same."""
    titles = ("position", "reverse KL (nats)", "student entropy (nats)", "teacher entropy (nats)", "overlap", "tokens")
    names = ("reverse_kl", "student_entropy", "teacher_entropy", "overlap")
    rows = [(f"{s['first']} to {s['last']}", *(f"{s[name]:.3f}" for name in names), str(s["tokens"])) for s in stretches]
    head = "".join(f"<th>{title}</th>" for title in titles)
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return f'<div class="scroll"><table class="numbers"><tr>{head}</tr>{body}</table></div>'
