"""Teachers that move, mix, route, come from a run or from a function, on tiny real models."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from opd_lightning.models import (
    AdapterOffTeacher,
    CheckpointTeacher,
    EMATeacher,
    EnsembleTeacher,
    FrozenTeacher,
    FunctionTeacher,
    LiveTeacher,
    LoRA,
    PeriodicTeacher,
    RoutedTeacher,
    StartTeacher,
    Student,
    Teacher,
    TextTeacher,
    TrustRegionTeacher,
)
from opd_lightning.models.distributions import laws_of
from opd_lightning.types import Prompt, Rendering, TokenLaws

TEXT = Rendering.of([(1, 5, 6), (1, 7), (1,)], [(8, 9, 2), (4, 2), (5, 5, 5, 2)], pad_id=0)
N, V = 9, 22


def student_of(pair: tuple[Path, Path], lora: bool = False, dtype: str = "float32", dropout: float = 0.0) -> Any:
    return Student(str(pair[0]), lora=LoRA(r=4, dropout=dropout) if lora else None, dtype=dtype).build()


def shake(model: torch.nn.Module, seed: int) -> None:
    """One 'optimizer step': trained weights move."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn(p.shape, generator=generator).to(p.dtype))


def trained(model: torch.nn.Module) -> dict[str, Tensor]:
    return {n: p.detach().double().clone() for n, p in model.named_parameters() if p.requires_grad}


def law(laws: TokenLaws) -> Tensor:
    """(N, V) float64 log-probabilities."""
    return laws.logits(0, len(laws)).double().log_softmax(-1)


# ---- following the student --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize(("rate", "every"), [(0.05, 1), (0.5, 2)])
def test_ema_is_its_formula(pair: tuple[Path, Path], lora: bool, rate: float, every: int) -> None:
    student, teacher = student_of(pair, lora), EMATeacher(rate, every)
    teacher.build(student)
    expected = trained(student)
    for step in range(1, 6):
        shake(student, step)
        teacher.after_step(student, step)
        teacher.after_step(student, step)  # a second call for the same step changes nothing
        if step % every == 0:
            expected = {n: (1 - rate) * w + rate * trained(student)[n] for n, w in expected.items()}
    own = dict(teacher.own_model().named_parameters())
    for name, weight in expected.items():
        torch.testing.assert_close(own[name].double(), weight, atol=1e-6, rtol=1e-6)
    assert not torch.equal(law(teacher.laws(student, TEXT, V)), law(LiveTeacher().laws(student, TEXT, V)))


def test_a_lora_students_base_exists_once_unless_networks_are_sharded(pair: tuple[Path, Path]) -> None:
    student, teacher, apart = student_of(pair, lora=True), EMATeacher(), EMATeacher()
    teacher.build(student)
    apart.build(student, share=False)
    theirs = dict(student.named_parameters())
    own, far = dict(teacher.own_model().named_parameters()), dict(apart.own_model().named_parameters())
    assert own.keys() == far.keys() == theirs.keys()
    for name, p in theirs.items():
        assert (own[name] is p) is not p.requires_grad
        assert far[name] is not p
        assert not own[name].requires_grad and not far[name].requires_grad


def test_small_rates_are_not_lost_in_bfloat16(pair: tuple[Path, Path]) -> None:
    """1000 pulls of 0.1 % go 63 % of the way; in bfloat16 weights alone they would go nowhere."""
    student, teacher = student_of(pair, dtype="bfloat16"), EMATeacher(rate=0.001)
    teacher.build(student)
    before = trained(teacher.own_model().requires_grad_(True))
    teacher.own_model().requires_grad_(False)
    shake(student, 0)
    for step in range(1, 1001):
        teacher.after_step(student, step)
    own = dict(teacher.own_model().named_parameters())
    way = torch.cat([(own[n].double() - b).flatten() for n, b in before.items()])
    whole = torch.cat([(trained(student)[n] - b).flatten() for n, b in before.items()])
    assert float((way * whole).sum() / whole.square().sum()) == pytest.approx(1 - 0.999**1000, abs=0.01)


def test_a_second_fit_counts_its_steps_from_the_beginning(pair: tuple[Path, Path]) -> None:
    student, teacher = student_of(pair), EMATeacher(0.5)
    teacher.build(student)
    for step in (1, 2, 3):
        teacher.after_step(student, step)
    shake(student, 0)
    now = trained(student)
    start = {n: p.detach().double().clone() for n, p in teacher.model.named_parameters()}
    for step, share in ((1, 0.5), (1, 0.5), (2, 0.75)):  # a step that is told twice counts once
        teacher.after_step(student, step)
        for name, p in teacher.model.named_parameters():
            torch.testing.assert_close(p.double(), start[name] + share * (now[name] - start[name]), atol=1e-6, rtol=1e-5)


def test_a_periodic_copy_jumps(pair: tuple[Path, Path]) -> None:
    student, teacher = student_of(pair), PeriodicTeacher(every=3)
    teacher.build(student)
    student.eval()
    seen = []
    for step in range(1, 7):
        shake(student, step)
        teacher.after_step(student, step)
        seen.append(torch.equal(law(teacher.laws(student, TEXT, V)), law(laws_of(student, TEXT, V))))
    assert seen == [False, False, True, False, False, True]


def test_the_live_teacher_is_the_student_without_dropout_and_gradient(pair: tuple[Path, Path]) -> None:
    student = student_of(pair, lora=True, dropout=0.5)
    shake(student, 1)
    found = LiveTeacher().laws(student, TEXT, V)
    assert student.training and not found.logits(0, N).requires_grad
    assert torch.equal(law(found), law(laws_of(student.eval(), TEXT, V)))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("built_first", [True, False])
def test_the_state_of_a_moving_teacher_is_plain_and_exact(pair: tuple[Path, Path], dtype: str, built_first: bool) -> None:
    student, teacher = student_of(pair, dtype=dtype), EMATeacher(rate=0.3)
    teacher.build(student)
    for step in (1, 2):
        shake(student, step)
        teacher.after_step(student, step)
    state = teacher.state_dict()
    again = EMATeacher(rate=0.3)
    if built_first:
        again.build(student_of(pair, dtype=dtype))
    again.load_state_dict(state)
    again.build(student_of(pair, dtype=dtype))
    assert torch.equal(law(teacher.laws(student, TEXT, V)), law(again.laws(student, TEXT, V)))
    shake(student, 3)
    for one in (teacher, again):
        one.after_step(student, 3)
    assert all(torch.equal(a, again.state_dict()["weights"][n]) for n, a in teacher.state_dict()["weights"].items())


def test_the_state_of_another_student_is_refused(pair: tuple[Path, Path]) -> None:
    teacher, other = EMATeacher(), EMATeacher()
    teacher.build(student_of(pair))
    other.build(student_of(pair, lora=True))
    with pytest.raises(ValueError, match="another student"):
        other.load_state_dict(teacher.state_dict())


@pytest.mark.parametrize("make", [lambda: EMATeacher(0.0), lambda: EMATeacher(1.5), lambda: PeriodicTeacher(0)])
def test_rates_out_of_range(make: Any) -> None:
    with pytest.raises(ValueError, match="rate must lie"):
        make()


# ---- trust region -----------------------------------------------------------------------------------------------------------


def test_the_trust_region_mixes_in_log_space_and_keeps_its_bound(pair: tuple[Path, Path]) -> None:
    student, start = student_of(pair).eval(), StartTeacher()
    start.build(student)
    plain, bounded, loose = TrustRegionTeacher(0.3), TrustRegionTeacher(1.0, max_kl=0.002), TrustRegionTeacher(0.3, max_kl=50.0)
    for teacher in (plain, bounded, loose):
        teacher.build(student)
    for step in range(6):
        shake(student, step)
    old, new = law(start.laws(student, TEXT, V)), law(laws_of(student, TEXT, V))
    expected = (0.7 * old + 0.3 * new).log_softmax(-1)
    torch.testing.assert_close(law(plain.laws(student, TEXT, V)), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(law(loose.laws(student, TEXT, V)), expected, atol=1e-5, rtol=1e-5)
    held = law(bounded.laws(student, TEXT, V))
    distance = (held.exp() * (held - old)).sum(-1)
    assert (new.exp() * (new - old)).sum(-1).min() > 0.002  # the student itself has left the region everywhere
    torch.testing.assert_close(distance, torch.full_like(distance, 0.002), atol=2e-6, rtol=0.0)
    moved, whole = (x - x.mean(-1, keepdim=True) for x in (held - old, new - old))  # constants are normalisers
    share = (moved * whole).sum(-1, keepdim=True) / whole.square().sum(-1, keepdim=True)
    torch.testing.assert_close(moved, share * whole, atol=1e-5, rtol=1e-4)  # on the geometric path from start to student
    assert ((share > 0.0) & (share < 1.0)).all()


# ---- mixtures ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mean", ["arithmetic", "geometric"])
def test_an_ensemble_is_the_weighted_mean_of_its_laws(pair: tuple[Path, Path], mean: Any) -> None:
    student = student_of(pair)
    members: list[Teacher] = [FrozenTeacher(str(pair[0])), FrozenTeacher(str(pair[1]), dtype="float64")]
    teacher = EnsembleTeacher(members, weights=[1.0, 3.0], mean=mean)
    for leaf in teacher.leaves().values():
        leaf.build(student)
    a, b = (law(m.laws(student, TEXT, V)) for m in members)
    p = 0.25 * a.exp() + 0.75 * b.exp() if mean == "arithmetic" else (0.25 * a + 0.75 * b).exp()
    laws = teacher.laws(student, TEXT, V)
    assert len(laws) == N and laws.vocab == V and isinstance(laws, TokenLaws)
    in_chunks = torch.cat([laws.logits(i, min(i + 4, N)) for i in range(0, N, 4)])
    torch.testing.assert_close(in_chunks.double().softmax(-1), p / p.sum(-1, keepdim=True), atol=1e-6, rtol=1e-5)
    assert set(teacher.leaves()) == {"0", "1"}


@pytest.mark.parametrize("weights", [[1.0], [1.0, 0.0], [1.0, -1.0]])
def test_weights_of_an_ensemble_must_fit(pair: tuple[Path, Path], weights: list[float]) -> None:
    with pytest.raises(ValueError, match="one positive weight"):
        EnsembleTeacher([LiveTeacher(), StartTeacher()], weights)
    with pytest.raises(ValueError, match="TextTeacher"):
        EnsembleTeacher([LiveTeacher(), TextTeacher()])


def test_routed_rows_get_their_own_teachers_law(pair: tuple[Path, Path]) -> None:
    student = student_of(pair)
    experts: dict[str, Teacher] = {
        "sums": FrozenTeacher(str(pair[0])),
        "chess": FrozenTeacher(str(pair[1])),
        "idle": StartTeacher(),
    }
    teacher = RoutedTeacher(experts, column="domain", default="chess")
    for leaf in teacher.leaves().values():
        leaf.build(student)
    domains = ["chess", "sums", None]
    prompts = [Prompt(i, "", (1,), fields={"domain": d} if d else {}) for i, d in enumerate(domains)]
    route = torch.tensor([teacher.route(p) for p in prompts])
    assert route.tolist() == [1, 0, 1]
    assert [teacher.writer(p) for p in prompts] == [experts["chess"], experts["sums"], experts["chess"]]
    text = Rendering(TEXT.ids, TEXT.lengths, TEXT.mask, route)
    laws = teacher.laws(student, text, V)
    whole = {name: law(expert.laws(student, TEXT, V)) for name, expert in experts.items()}
    expected = torch.cat([whole["chess"][:3], whole["sums"][3:5], whole["chess"][5:]])
    torch.testing.assert_close(law(laws), expected, atol=1e-6, rtol=1e-6)
    in_chunks = torch.cat([laws.logits(i, i + 1) for i in range(N)])
    torch.testing.assert_close(in_chunks, laws.logits(0, N))
    swapped = teacher.laws(student, text.select(torch.tensor([1, 0])), V)  # rows of a micro-batch carry their route
    torch.testing.assert_close(law(swapped), torch.cat([expected[3:5], expected[:3]]), atol=1e-5, rtol=1e-5)


def test_a_row_without_a_teacher_is_named() -> None:
    teacher = RoutedTeacher({"sums": StartTeacher()})
    with pytest.raises(ValueError, match=r"prompt 7 has domain='go', but the teachers are sums"):
        teacher.route(Prompt(7, "", (1,), fields={"domain": "go"}))
    with pytest.raises(ValueError, match="one of its teachers"):
        RoutedTeacher({"sums": StartTeacher()}, default="go")


def test_teachers_without_a_network_of_their_own_do_not_write(pair: tuple[Path, Path]) -> None:
    student = student_of(pair)
    for teacher in (EnsembleTeacher([LiveTeacher(), LiveTeacher()]), FunctionTeacher(uniform), TextTeacher()):
        assert not teacher.writes
        with pytest.raises(ValueError, match=r"rollout\.source"), teacher.speaking(student):
            pass


# ---- a function -------------------------------------------------------------------------------------------------------------


def uniform(ids: Tensor, vocab: int) -> Tensor:
    return torch.full((*ids[:, 1:].shape, vocab), -math.log(vocab), dtype=torch.float64)


def next_number(ids: Tensor, vocab: int) -> Tensor:
    """Half of the mass on the token after the last one."""
    out = torch.full((*ids[:, 1:].shape, vocab), math.log(0.5 / (vocab - 1)), dtype=torch.float64)
    return out.scatter(-1, ((ids[:, :-1] + 1) % vocab)[..., None], math.log(0.5))


def wrong_shape(ids: Tensor, vocab: int) -> Tensor:
    return torch.zeros(*ids.shape, vocab)


def test_a_function_is_asked_for_the_tokens_that_follow() -> None:
    found = law(FunctionTeacher(next_number).laws(torch.nn.Identity(), TEXT, V))
    before = [6, 8, 9, 7, 4, 1, 5, 5, 5]  # the token in front of every completion token
    assert found.argmax(-1).tolist() == [t + 1 for t in before]
    with pytest.raises(ValueError, match=r"expected \(B, L - 1, V\)"):
        FunctionTeacher(wrong_shape).laws(torch.nn.Identity(), TEXT, V)


def test_a_function_is_stored_by_name_and_a_lambda_is_refused() -> None:
    assert FunctionTeacher(next_number).to_config()["init_args"]["function"].endswith("test_teachers.next_number")
    with pytest.raises(TypeError, match="cannot be stored"):
        FunctionTeacher(lambda ids, vocab: ids).to_config()


# ---- out of an earlier run --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_the_student_of_a_run_teaches(kind: str, pair: tuple[Path, Path], tmp_path: Path) -> None:
    from tests.helpers import tiny_data, tiny_module, tiny_trainer

    module = tiny_module(pair, lora=LoRA(r=4) if kind == "lora" else None)
    tiny_trainer(tmp_path / "run", max_steps=2).fit(module, tiny_data(held_out=0))
    expected = law(LiveTeacher().laws(module.student, TEXT, V))
    assert (expected - law(laws_of(student_of(pair), TEXT, V))).abs().max() > 1e-3  # it has learned something
    module.export(tmp_path / "adapter-or-model")
    module.export(tmp_path / "merged", merge=True)
    for place in ("run/checkpoints/step-000002.ckpt", "adapter-or-model", "merged"):
        teacher = CheckpointTeacher(str(tmp_path / place))
        teacher.build(module.student)
        torch.testing.assert_close(law(teacher.laws(module.student, TEXT, V)), expected, atol=1e-5, rtol=1e-5)
        assert "_checkpoint" not in vars(teacher)  # a second copy of the weights
        assert teacher.rows() == V and teacher.tokenizer().get_vocab() == module.vocabulary.tokenizer.get_vocab()


def test_a_path_that_is_no_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such checkpoint"):
        CheckpointTeacher(str(tmp_path / "nothing.ckpt"))
    torch.save({"state_dict": {}}, tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match="no checkpoint of this package"):
        CheckpointTeacher(str(tmp_path / "other.ckpt")).rows()


def test_adapter_off_is_still_the_start(pair: tuple[Path, Path]) -> None:
    student = student_of(pair, lora=True)
    start = StartTeacher()
    start.build(student)
    shake(student, 1)
    assert torch.equal(law(start.laws(student, TEXT, V)), law(AdapterOffTeacher().laws(student, TEXT, V)))
