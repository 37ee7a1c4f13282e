"""Claims: how recipes are read and judged, what is not measured twice, and the world that they are made in."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch

from opd_lightning.cli import main
from opd_lightning.inspect.reproduce import page, recipe
from opd_lightning.inspect.reproduce.arms import Record
from opd_lightning.inspect.reproduce.criteria import Criterion
from opd_lightning.inspect.reproduce.digits import (
    CHARACTERS,
    DigitSum,
    GrammarTeacher,
    continued,
    correct,
    prompts,
    vocabulary_size,
    written,
)
from opd_lightning.inspect.reproduce.listed import ListedTokens
from opd_lightning.inspect.reproduce.pairs import Framed, Pair
from opd_lightning.inspect.reproduce.probes import mcnemar
from opd_lightning.models.tiny import character_tokenizer
from opd_lightning.objectives import ReverseKL

TRAINED = """
# A few steps of everything that trains
# Source: nowhere
networks:
  fresh:
    student: new
    teacher: {{class_path: TextTeacher}}
    source: DatasetSource
    objective: {{class_path: Objective, init_args: {{divergence: ForwardKL, support: WrittenToken}}}}
    batch: 8
    group: 1
    steps: 2
  rewarded:
    student: fresh
    teacher: {{class_path: GrammarTeacher, init_args: {{patterns: {{A: 1.0}}}}}}
    objective:
      class_path: RightAnswer
      init_args: {{divergence: ReverseKL, support: SampledToken, allow_degenerate: true}}
    batch: 8
    steps: 2
arms:
  network: &short {{student: fresh, teacher: rewarded, batch: 8, group: 2, steps: 4}}
  grammar:
    <<: *short
    teacher: {{class_path: GrammarTeacher, init_args: {{patterns: {{A: 1.0}}}}}}
    cold_start: 2
    longest: {longest}
  begun:
    <<: *short
    run: Started
    until: {{class_path: Readiness, init_args: {{near: 0.0, every_n_steps: 1, prompts: 4}}}}
    most: 3
  judged:
    <<: *short
    run: Pair
    about: two networks
    teacher_template: {{class_path: PlainTemplate, init_args: {{suffix: <think>}}}}
  prefix: {{run: Continuation, student: fresh, teacher: rewarded, task: {{class_path: DigitSum}}, prefixes: [1, 5]}}
  signal: {{run: Signal, student: fresh, teacher: rewarded}}
  noise:
    run: Noise
    student: fresh
    teacher: {{class_path: GrammarTeacher, init_args: {{patterns: {{A: 1.0}}}}}}
    objective: {{class_path: Objective, init_args: {{divergence: ReverseKL, support: SampledToken}}}}
    completions: 4
passes_if:
  - "grammar.teacher_accuracy >= 0.5"
  - "network.accuracy >= 2"
draw: [accuracy, overlap, gain]
"""


def records(folder: Path) -> dict[str, int]:
    return {f.name: f.stat().st_mtime_ns for f in (folder / "records").glob("*.json")}


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a recipe of its own, measured with one seed."""
    root = tmp_path_factory.mktemp("reproduce")
    (root / "t1_trained.yaml").write_text(TRAINED.format(longest=4))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("opd_lightning.inspect.reproduce.probes.COUNT", 16)
        patch.setattr("opd_lightning.inspect.reproduce.training.HELD_OUT", 16)
        assert main(["reproduce", str(root / "t1_trained.yaml"), "--seeds", "3", "--folder", str(root / "run")]) == 0
    return root


def test_a_null_is_shown_with_its_figures(work: Path) -> None:
    found = json.loads((work / "run/summary.json").read_text())["t1_trained"]
    assert found["verdict"] == "null" and [c["holds"] for c in found["criteria"]] == [True, False]
    figures = found["figures"]["network"][0]
    assert {"accuracy", "recovery", "overlap_start", "student_overlap_mass_end", "entropy_gap_end"} <= set(figures)
    assert found["figures"]["grammar"][0]["completion_tokens_end"] > 4  # judged at full length, whatever was trained on
    begun, judged = (found["figures"][name][0] for name in ("begun", "judged"))
    assert 0 < begun["cold_start_over"] <= 3 and found["figures"]["grammar"][0]["cold_start_over"] == 2
    assert judged["foreseen"] == 0.0 and judged["agrees"] == 1.0 - judged["succeeded"]  # refused: another thinking mode
    text = (work / "run/t1_trained.md").read_text()
    assert "**NULL** over 1 seeds" in text and "| `network.accuracy >= 2` | **no** |" in text
    assert (work / "run/t1_trained.svg").read_text().startswith("<?xml")


def test_nothing_is_measured_twice_and_what_changed_is(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["reproduce", str(work / "t1_trained.yaml"), "--seeds", "3", "--folder", str(work / "run")]
    before = records(work / "run")
    assert main([*words, "--json"]) == 0
    assert records(work / "run") == before and len(before) == 7
    assert json.loads(capsys.readouterr().out)["t1_trained"]["verdict"] == "null"
    (work / "t1_trained.yaml").write_text(TRAINED.format(longest=3))
    assert main(words) == 0
    after = records(work / "run")
    assert len(after) == 8 and all(after[name] == time for name, time in before.items())


def test_a_failed_arm_fails_its_claim_and_no_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = "# Broken\nrun: BaselineNoise\narms: {a: {vocab: 1}}\npasses_if: ['a.kl_near <= 1']\n"
    (tmp_path / "b0_broken.yaml").write_text(broken)
    assert main(["reproduce", str(tmp_path / "b0_broken.yaml"), "R8", "--folder", str(tmp_path / "run"), "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["b0_broken"]["verdict"] == "failed" and found["b0_broken"]["error"]
    assert found["r8_gradient_identity"]["verdict"] == "pass"


@pytest.mark.slow
def test_two_processes_measure_what_one_does(tmp_path: Path) -> None:
    for jobs in ("1", "2"):
        assert main(["reproduce", "A7", "R8", "--seeds", "0", "1", "--jobs", jobs, "--folder", str(tmp_path / jobs)]) == 0
    one, two = (json.loads((tmp_path / jobs / "summary.json").read_text()) for jobs in ("1", "2"))
    for name, found in one.items():
        assert found["figures"] == two[name]["figures"] and found["verdict"] == two[name]["verdict"] == "pass"


def test_the_table_goes_between_its_markers(work: Path, tmp_path: Path) -> None:
    target = tmp_path / "README.md"
    target.write_text(f"before\n{page.BEGIN}\nyesterday\n{page.END}\nafter\n")
    run = ["--seeds", "3", "--folder", str(work / "run"), "--table", str(target)]
    assert main(["reproduce", str(work / "t1_trained.yaml"), *run]) == 0
    text = target.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "yesterday" not in text
    assert "**not** `network.accuracy >= 2`" in text
    target.write_text("no markers")
    assert main(["reproduce", str(work / "t1_trained.yaml"), *run]) == 2


def test_verdicts_and_outcomes_are_counted(tmp_path: Path) -> None:
    pairs = []
    for about, flaw, said, came in (("a", "", "go", 1), ("b", "", "go", 0), ("c", "EOS", "refuse", 0), ("d", "", "refuse", 1)):
        accuracies = {"accuracy_start": 0.2, "accuracy": 0.2 + 0.6 * came, "teacher_accuracy": 0.9}
        figures = {"foreseen": float(said == "go"), "succeeded": float(came), "agrees": float((said == "go") == bool(came))}
        arm = Pair(about=about, flaw=flaw, student="new", teacher="new")
        pairs.append((arm, [Record(accuracies | figures, words={"verdict": said})] * 2))
    lines = Pair.table(pairs)
    assert lines[2:4] == ["| the doctor says `go` | 2 | 2 |", "| it says anything else | 2 | 2 |"]
    assert "4 of 8 verdicts agree" in lines[5]
    assert "| c | fail: EOS | refuse | 20% → 20% (90%) | 2 of 2 |" in lines
    pairs[0][1][1] = Record({**pairs[0][1][0].figures, "foreseen": 0.0, "agrees": 0.0}, words={"verdict": "refuse"})
    assert "| a | succeed | go (1), refuse (1) | 20% → 80% (90%) | 1 of 2 |" in Pair.table(pairs)


def test_a_text_that_is_framed_is_graded_by_its_answer() -> None:
    task = Framed(asked="?", opening="::", digits=4)
    row = task.row(random.Random(1))
    assert row["prompt"].endswith("=?") and row["completion"].startswith("::A") and task(row, row["completion"]) == 1.0
    ended = Framed(closing=":", digits=4)
    late = ended.row(random.Random(1))
    assert late["completion"].endswith(":") and ended(late, late["completion"]) == 0.0


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("arms: {a: {vocab: 4}}\npasses_if: ['b.error <= 1']\nrun: BaselineBias\n", "passes_if speaks of b; arms are a"),
        ("arms: {a: {vocabulary: 4}}\npasses_if: []\nrun: BaselineBias\n", "vocabulary"),
        ("arms: {a: {}}\npasses_if: []\nrun: Magic\n", "'Magic' is not among"),
        ("arms: {a: {}}\npasses_if: ['a.x == 1']\nrun: BaselineBias\n", "one comparison"),
        ("arms: {a: {}}\npasses_if: ['a.nothing >= 1']\nrun: BaselineBias\n", "was not measured; a has"),
        ("arms: {a: {student: lost, teacher: lost}}\npasses_if: []\n", "no network 'lost'"),
        ("arms: {a: {}}\npasses: []\nrun: BaselineBias\n", "unknown keys passes"),
    ],
)
def test_what_cannot_be_run_is_refused(change: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x.yaml").write_text("# A claim\n" + change)
    assert main(["reproduce", str(tmp_path / "x.yaml"), "--folder", str(tmp_path / "run")]) == 2
    assert said in capsys.readouterr().err


def test_unknown_names_name_near_ones(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["reproduce", "R8_gradient"]) == 2
    assert "Did you mean r8_gradient_identity" in capsys.readouterr().err


def test_every_shipped_recipe_can_be_run() -> None:
    found = [recipe.load(file) for file in recipe.files().values()]
    known = recipe.networks(Path("nowhere"), found)
    for one in found:
        assert one.source and len(one.title) > 30 and one.criteria, one.name
        assert len(one.seeds) >= recipe.LEAST_SEEDS, one.name
        assert all(known.key(arm) for arm in one.arms.values())
        lines = [x for x in one.file.read_text().splitlines() if x.strip() and not x.startswith("#")]
        assert len(lines) <= 30, one.name
    mixed = [Path(f"{name}.yaml") for name in ("cr_x", "a1_x", "r10_x", "r2_x")]
    assert [file.stem for file in sorted(mixed, key=recipe._order)] == ["r2_x", "r10_x", "a1_x", "cr_x"]


# ---- criteria --------------------------------------------------------------------------------------------------------------
SEEDS = [{"a": {"x": 1.0, "y": 0.2}, "b": {"x": 0.5}}, {"a": {"x": 0.0, "y": 0.4}, "b": {"x": 0.1}}]


@pytest.mark.parametrize(
    ("text", "holds", "left", "note"),
    [
        ("a.x - b.x >= 0.2", True, 0.2, ""),
        ("abs(b.x - a.x) > 0.2", False, 0.2, ""),  # of the means, not the mean of the seeds' own
        ("every seed: a.x >= b.x", False, 0.5, "1 of 2 seeds"),
        ("50% of seeds: a.x >= b.x", True, 0.5, "1 of 2 seeds"),
        ("max(a.x, a.y, 2) / 4 < -a.x + 1.5", True, 0.5, ""),
    ],
)
def test_criteria(text: str, holds: bool, left: float, note: str) -> None:
    found = Criterion.of(text).judge(SEEDS)
    assert (found.holds, found.note) == (holds, note)
    assert found.left == pytest.approx(left)


def test_criteria_are_arithmetic_and_nothing_else() -> None:
    with pytest.raises(ValueError, match="arithmetic"):
        Criterion.of("a.x.__class__ >= 1").judge(SEEDS)
    with pytest.raises(ValueError, match="arithmetic"):
        Criterion.of("print(a.x) >= 1").judge(SEEDS)


# ---- the world -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("pattern", "ABC")
def test_a_grammar_teacher_that_does_not_slip_writes_what_the_task_writes(pattern: str) -> None:
    task = DigitSum(6, {pattern: 1.0})
    asked = prompts(task, 40, 5)
    teacher = GrammarTeacher({pattern: 1.0}, slip=1e-9)
    done = continued(teacher.logprobs, asked, 20, torch.Generator().manual_seed(0))
    tokenizer = character_tokenizer(CHARACTERS)
    for row, ids in zip(task.rows(40, 5, "held_out"), done, strict=True):
        text = tokenizer.decode(ids[len(row["prompt"]) + 1 :], skip_special_tokens=True)
        assert text == row["completion"] and task(row, text) == 1.0
    assert bool(correct(done, 6).all())
    wrong = done.clone()
    place = (wrong == 4 + CHARACTERS.index("#")).int().argmax(-1) + 1
    wrong[torch.arange(40), place] = 4 + (wrong[torch.arange(40), place] - 3) % 7
    assert not bool(correct(wrong, 6).any())


def test_its_laws_are_laws_and_go_on_from_what_stands_there() -> None:
    teacher = GrammarTeacher({"A": 0.3, "B": 0.7}, slip=0.1, under_colon={"C": 1.0}, reliable=2)
    tokenizer = character_tokenizer(CHARACTERS)
    texts = ["314052=A33", "314052:C22", "314052=A35"]  # the last has written a wrong sum
    ids = torch.tensor([tokenizer(t).input_ids for t in texts])
    law = teacher.logprobs(torch.cat([ids, ids[:, :2]], 1), vocabulary_size()).exp()
    torch.testing.assert_close(law.sum(-1), torch.ones(law.shape[:2]))
    at = {c: 4 + i for i, c in enumerate(CHARACTERS)}
    opening = law[:, 7]
    torch.testing.assert_close(opening[0, [at["A"], at["B"]]], torch.tensor([0.27, 0.63]), atol=0.1, rtol=0)
    assert opening[1].argmax() == at["C"] and law[0, 10].argmax() == at["1"]
    assert law[0, 11].argmax() == at["4"]  # 3 + 1
    assert law[2, 11].argmax() == at["6"]  # 5 + 1
    assert law[0, 11].max() < law[0, 8].max()  # less reliable further on


def test_non_overlap_pushes_exactly_the_tokens_of_one_set() -> None:
    generator = torch.Generator().manual_seed(0)
    logits, theirs = torch.randn(2, 5, 9, generator=generator, dtype=torch.float64)
    teacher = theirs.log_softmax(-1)
    for normalized in (False, True):
        student = logits.log_softmax(-1).requires_grad_(True)
        scores = ListedTokens(3, "non_overlap", normalized).score(ReverseKL(), student, teacher, torch.zeros(5).long())
        (found,) = torch.autograd.grad(scores.direct.sum(), student)
        student = student.detach()
        for n in range(5):
            mine, other = (set(law[n].topk(3).indices.tolist()) for law in (student, teacher))
            chosen = mine ^ other
            total = sum(student[n, v].exp() for v in chosen) if normalized else 1.0
            for v in range(9):
                expected = student[n, v].exp() / total * (student[n, v] - teacher[n, v]) if v in chosen else 0.0
                assert float(found[n, v]) == pytest.approx(float(expected), abs=1e-12)


def test_prompts_of_marks_and_numbers() -> None:
    task = DigitSum(4, {"A": 0.5, "C:": 0.5}, numbers={"01": 0.5, "56": 0.5})
    rows = [task.row(random.Random(i)) for i in range(60)]
    assert {(r["prompt"][-1], r["completion"][0]) for r in rows} == {("=", "A"), (":", "C")}
    assert all(set(r["prompt"][:-1]) <= set("01") or set(r["prompt"][:-1]) <= set("56") for r in rows)
    assert written([1, 2], "B") == "B3#3"
    with pytest.raises(ValueError, match="even number"):
        DigitSum(3)
    assert mcnemar(torch.ones(5).bool(), torch.ones(5).bool()) == 1.0
