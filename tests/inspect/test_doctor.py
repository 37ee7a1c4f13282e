"""The preflight: its figures against sums in float64, its verdicts against hand-made figures, its page on the bundled pair."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from opd_lightning.bars import only_the_outer
from opd_lightning.callbacks.readiness import nearest
from opd_lightning.cli import main, read
from opd_lightning.inspect import doctor
from opd_lightning.inspect.examination import Examination, Figures, Voice
from opd_lightning.inspect.verdict import COLD_START, GO, PROMPTS, REFUSE, Thresholds, judge
from opd_lightning.models.distributions import evaluating
from opd_lightning.models.tiny import save_tiny

GOOD = Figures(
    prompts=16, completions=64, k=4, student=Voice(0.4, 40.0, 0.02), teacher=Voice(0.98, 41.0, 0.0), overlap=0.8,
    mass=(0.98, 0.98), advantage=-0.05, reverse_kl=0.28, nearest_kl=0.05, entropy=(0.1, 0.1), likelihood=(-0.1, -0.4),
    headroom=0.15, ends=(0.98, 0.97), stretches=(), gain={"50%": 0.2}, floor=None, parameters=(1, 2),
)  # fmt: skip


@pytest.fixture(scope="module")
def examined() -> Examination:
    found = Examination(read(["-c", "quickstart.yaml"]), prompts=4, samples=2)
    assert found.network is not None
    return found


def test_figures_are_those_of_the_laws(examined: Examination) -> None:
    found = examined.per_token()
    rollout = examined.rollout()
    teacher = examined.module.teacher.own_model()
    at = rollout.mask
    with torch.no_grad(), evaluating(examined.network):
        ours, theirs = (
            m(input_ids=rollout.text.ids).logits[:, :-1].double()[at].log_softmax(-1) for m in (examined.network, teacher)
        )
    p, q = ours.exp(), theirs.exp()
    tokens = rollout.text.targets[at][:, None]
    expected = {
        "reverse_kl": (p * (ours - theirs)).sum(-1),
        "student_entropy": -(p * ours).sum(-1),
        "teacher_entropy": -(q * theirs).sum(-1),
        "moved": (p - q).clamp(min=0.0).sum(-1),
        "student_likelihood": ours.gather(1, tokens)[:, 0],
        "teacher_likelihood": theirs.gather(1, tokens)[:, 0],
    }
    for name, value in expected.items():
        torch.testing.assert_close(found[name].double(), value, atol=2e-4, rtol=1e-3, msg=name)
    shared = [set(a.topk(4).indices.tolist()) & set(b.topk(4).indices.tolist()) for a, b in zip(ours, theirs, strict=True)]
    assert float(found["overlap"].double().mean()) == pytest.approx(sum(map(len, shared)) / 4 / len(shared), abs=5e-3)
    lengths = [len(c.ids) for c in examined.written]
    means = torch.stack([part.mean() for part in expected["reverse_kl"].split(lengths)])
    own = [float(part.mean()) for part in found["reverse_kl"].split(lengths)]
    assert nearest(own) == pytest.approx(float(means.min()), abs=1e-3)  # of 8 texts, the first
    assert int(found["closing"].sum()) == sum(c.ended for c in examined.written)
    assert found["position"].max() == max(len(c.ids) for c in examined.written) - 1


def test_the_teacher_goes_on_from_the_students_own_text(examined: Examination) -> None:
    seen: list[tuple[int, ...]] = []
    write = examined.write
    examined.write = lambda who, prompts, purpose: (seen.extend(p.ids for p in prompts), write(who, prompts, purpose))[1]  # type: ignore[method-assign]
    graded = examined.gain(0.5, torch.zeros(sum(len(c.ids) for c in examined.written)))
    assert graded.keys() == {"25%", "50%", "75%"} and all(-1.0 <= g <= 1.0 for g in graded.values())
    for ids in seen:
        (owner,) = {i for i, p in enumerate(examined.prompts) if ids[: len(p.ids)] == p.ids and i % 2 == 0}
        begun = ids[len(examined.prompts[owner].ids) :]
        assert any(begun == examined.written[i].ids[: len(begun)] for i in (owner, owner + 1))
    examined.write = write  # type: ignore[method-assign]


def test_a_teacher_that_is_told_the_answer_has_a_floor_and_one_with_a_rule_has_none() -> None:
    found = {}
    for context in ({"class_path": "CustomContext", "init_args": {"wording": "{answer}={prompt}"}},
                    {"class_path": "PlainTemplate", "init_args": {"prefix": "1"}}):  # fmt: skip
        words = ["-c", "quickstart.yaml", "--data.teacher_template", json.dumps(context)]
        found[context["class_path"]] = Examination(read(words), prompts=3, samples=1).floor()
    assert found["CustomContext"] > 0.01
    assert found["PlainTemplate"] == pytest.approx(0.0, abs=1e-5)
    told = [
        "-c",
        "quickstart.yaml",
        "--data.teacher_template",
        '{class_path: CustomContext, init_args: {wording: "{answer}={prompt}"}}',
    ]
    forward = Examination(read([*told, "--model.objective.divergence", "ForwardKL"]), prompts=3, samples=1).floor()
    assert forward == pytest.approx(found["CustomContext"])  # it stands beside the reverse KL, whatever is descended
    assert Examination(read(told), prompts=1, samples=1).floor() is None  # no other row whose answer it could be told


def test_another_teacher_reads_the_same_texts(examined: Examination, tmp_path: Path) -> None:
    setup, written, before = examined.module.teacher, examined.written, examined.per_token()["reverse_kl"]
    from opd_lightning.models import FrozenTeacher

    examined.ask(FrozenTeacher("zoo/addition/student"))
    assert examined.written is written
    assert float(examined.per_token()["reverse_kl"].abs().max()) < 1e-5
    examined.ask(setup)
    torch.testing.assert_close(examined.per_token()["reverse_kl"], before)


@pytest.mark.parametrize(
    ("change", "static", "word", "says"),
    [
        ({}, [], GO, "ahead by 58%"),
        ({"mass": (0.6, 0.7), "nearest_kl": 2.0}, [], COLD_START, "only 60%"),
        ({"reverse_kl": 3.0, "nearest_kl": 2.0}, [], COLD_START, "3.00 nats per token"),
        ({"mass": (0.6, 0.7)}, [], GO, "a tenth of the student's texts are within 0.05"),
        ({"ends": (0.98, 0.01)}, [], REFUSE, "unlearn to end"),
        ({"teacher": Voice(0.41, 40.0, 0.0)}, [], REFUSE, "knows nothing new"),
        ({"teacher": Voice(0.0, 40.0, 0.0), "student": Voice(0.0, 40.0, 0.0)}, [], PROMPTS, "cannot do these prompts"),
        ({"student": Voice(0.97, 40.0, 0.0)}, [], PROMPTS, "can do these prompts already"),
        ({"teacher": Voice(0.98, 40.0, 0.9)}, [], REFUSE, "do not end"),
        ({"student": Voice(0.2, 40.0, 0.9)}, [], COLD_START, "cut by the length limit"),
        ({"floor": 0.2}, [], REFUSE, "cannot be learned"),
        ({}, ["thinking mode: <think> stands 0 times"], REFUSE, "same options"),
        ({}, ["EOS: ~ ends a text for the teacher alone"], GO, "EOS"),
        ({"student": Voice(None, 9.0, 0.0), "teacher": Voice(None, 9.0, 0.0), "reverse_kl": 0.001}, [], REFUSE, "the same"),
        ({"mass": (0.6, 0.7), "ends": (0.9, 0.0)}, [], REFUSE, "unlearn to end"),
    ],
)
def test_verdicts(change: dict, static: list[str], word: str, says: str) -> None:
    found = judge(replace(GOOD, **change), static, batch_size=64)
    assert found.word == word and says in found.reasons[0]
    assert (found.steps > 0) == (word == COLD_START)


def test_thresholds_move_the_verdict_and_the_length_of_a_cold_start() -> None:
    strict = Thresholds(min_mass=0.99, max_kl=0.01)
    assert judge(GOOD, [], 64, strict).word == COLD_START
    wide = replace(GOOD, reverse_kl=2.0, nearest_kl=1.9)
    assert judge(wide, [], 32).steps == pytest.approx(2 * judge(wide, [], 64).steps, abs=2)


def test_its_bars_step_back_where_another_is_shown(examined: Examination, capsys: pytest.CaptureFixture[str]) -> None:
    """`opd reproduce` examines pairs inside a bar of its own."""
    capsys.readouterr()
    with only_the_outer():
        examined.write("student", examined.prompts[:2], "again")
    assert capsys.readouterr().err == ""
    examined.write("student", examined.prompts[:2], "again")
    assert "student writes (again)" in capsys.readouterr().err


def test_page_json_and_report(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["doctor", "-c", "quickstart.yaml", "--prompts", "4", "--samples", "2", "--json", "run/doctor.json"]
    assert main(words) == 0
    shown = capsys.readouterr().out
    for line in ("vocabulary", "forecast", "accuracy", "mass on shared top-4", "teacher goes on from 50%", "verdict: go"):
        assert line in shown
    stored = json.loads(Path("run/doctor.json").read_text())
    assert stored["verdict"]["word"] == GO and stored["figures"]["completions"] == 8
    section = doctor.section(Path("run"))
    assert section.startswith("<h3>run: go</h3>") and "overlap mass" in section
    first = stored["figures"]["stretches"][0]
    assert f"<td>{first['first']} to {first['last']}</td><td>{first['reverse_kl']:.3f}</td>" in section
    assert section.count("<td>") >= 6 * len(stored["figures"]["stretches"])
    assert doctor.section(tmp_path) == ""


def test_models_of_different_tokens_are_refused_with_the_reason(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = save_tiny(tmp_path / "other", characters="abc", hidden=16)
    assert main(["doctor", "-c", "quickstart.yaml", "--model.teacher.path", str(other)]) == 1
    shown = capsys.readouterr().out
    assert "verdict: refuse" in shown and "different tokenizers" in shown


@pytest.mark.parametrize(
    ("words", "says"),
    [(["--prompts", "0"], "at least 1"), (["--model.teacher", "TextTeacher"], "no network")],
)
def test_what_cannot_be_examined(words: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "-c", "quickstart.yaml", *words]) == 2
    assert says in capsys.readouterr().err
