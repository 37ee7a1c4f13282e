"""The fused head and divergence: the same numbers as full logits, for every member, head and precision."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from opd_lightning.inspect.oracle import TableLaws, TabularWorld
from opd_lightning.models.distributions import DenseLaws
from opd_lightning.objectives import (
    GAE,
    ClosedFormBaseline,
    CounterfactualRoute,
    Disagreement,
    Discounted,
    Extras,
    ForwardKL,
    GeneralizedJSD,
    Immediate,
    Objective,
    ReferenceLaw,
    ReturnToGo,
    ReverseKL,
    SampledToken,
    SequenceMean,
    SkewReverseKL,
    StudentEntropy,
    Term,
    Terms,
    TopK,
    WrittenToken,
)
from opd_lightning.ops import fused
from opd_lightning.ops.heads import Head
from opd_lightning.types import Completion, Prompt, Rollout
from tests.objectives.test_members import AXES, MEMBERS, around

VOCAB, WIDTH = 23, 6
LENGTHS = [7, 1, 12, 4]


def rollout() -> Rollout:
    generator = torch.Generator().manual_seed(1)
    prompts = [Prompt(i, "", (2, 3)) for i in range(len(LENGTHS))]
    written = [
        Completion(tuple(torch.randint(2, VOCAB, (n,), generator=generator).tolist()), (-2.3,) * n, True, 0) for n in LENGTHS
    ]
    made = Rollout.of(prompts, written, 0)
    top_ids = torch.rand(*made.mask.shape, VOCAB, generator=generator).argsort(-1)
    return replace(made, top_ids=top_ids, outcome=torch.linspace(0.0, 1.0, len(made)))


@dataclass
class Pair:
    """Hidden states and heads of a student, a teacher and a reference."""

    student: DenseLaws
    teacher: DenseLaws
    reference: DenseLaws

    @classmethod
    def random(cls, dtype: torch.dtype = torch.float64, vocab: int = VOCAB, tokens: int = sum(LENGTHS), **head: object) -> Pair:
        torch.manual_seed(0)
        laws = []
        for name in ("student", "teacher", "reference"):
            module = nn.Linear(WIDTH, int(head.get("rows", vocab)), bias=bool(head.get("bias")), dtype=torch.float64)
            hidden = 2.0 * torch.randn(tokens, WIDTH, dtype=torch.float64)
            module = module.to(dtype).requires_grad_(name == "student" and not head.get("frozen"))
            made = Head(module, vocab, float(head.get("factor", 1.0)), head.get("cap"))  # type: ignore[arg-type]
            laws.append(DenseLaws(hidden.to(dtype).requires_grad_(name == "student"), made, vocab))
        return cls(*laws)

    def run(self, objective: Objective, factor: float = 1.0) -> tuple[Tensor, list[Tensor], dict[str, Tensor]]:
        """Loss, all gradients and all measurements."""
        wanted = [self.student.hidden, *self.student.head.trained]
        critic = torch.zeros(len(self.student), dtype=torch.float64)
        ahead = torch.rand(len(self.student), self.student.vocab, generator=torch.Generator().manual_seed(2)).double()
        extras = Extras(self.reference, critic, 0.5, ahead)
        out = objective(self.student, self.teacher, rollout(), agreement_k=3, extras=extras)
        gradients = torch.autograd.grad(factor * out.loss, wanted, allow_unused=True, materialize_grads=True)
        return out.loss.detach(), list(gradients), out.stats.values


SIZES = {
    "one by one": (1, 1, 5 * 8),  # logits of a block, logits of a tile, bytes of gathered gradients: 5 float64 tokens
    "tiles": (3 * VOCAB, 5 * VOCAB, 22 * 8),  # two tiles are gathered
    "a tile at a time": (3 * VOCAB, 8 * VOCAB, 1),
    "one tile": (VOCAB, 10**6, 1024 * 8),
}


def shrink(monkeypatch: pytest.MonkeyPatch, size: str = "tiles") -> None:
    """Blocks and tiles of a few rows, so that small batches take the long way."""
    block, tile, gathered = SIZES[size]
    monkeypatch.setattr(fused, "BLOCK", block)
    monkeypatch.setattr(fused, "TILE", tile)
    monkeypatch.setattr(fused, "TOKENS", 1)
    monkeypatch.setattr(fused, "GATHERED", gathered)
    monkeypatch.setattr(fused, "PIECE", 5)


def same(found: tuple, expected: tuple, rtol: float = 1e-11, atol: float = 1e-13) -> None:
    torch.testing.assert_close(found[0], expected[0], rtol=rtol, atol=atol)
    for mine, exact in zip(found[1], expected[1], strict=True):
        torch.testing.assert_close(mine, exact, rtol=rtol, atol=atol)
    assert found[2].keys() == expected[2].keys()
    for key in expected[2]:
        torch.testing.assert_close(found[2][key], expected[2][key], rtol=rtol, atol=atol)


COMPOSITIONS = {
    "reverse KL": Objective(ReverseKL()),
    "forward KL at temperature 2": Objective(ForwardKL(), temperature=2.0),
    "jsd, sequence mean": Objective(GeneralizedJSD(0.2), reduction=SequenceMean()),
    "skew": Objective(SkewReverseKL(0.1)),
    "top-k": Objective(ReverseKL(), TopK(3, "student", "tail")),
    "sampled": Objective(ReverseKL(), SampledToken(), temperature=1.5),
    "sampled, return to go": Objective(ReverseKL(), SampledToken(), ReturnToGo(), ClosedFormBaseline()),
    "both": Objective(ForwardKL(), TopK(3, "teacher", "tail"), Discounted(0.5)),
    "gated": Objective(ReverseKL(), gates=[StudentEntropy(at_least=0.5), Disagreement(top_fraction=0.5)]),
    "routed": Objective(
        ReverseKL(), SampledToken(), Immediate(), ClosedFormBaseline(), route=CounterfactualRoute(balanced=True)
    ),
    "likelihood": Objective(ForwardKL(), WrittenToken()),
    "exact terms": Terms([Term(Objective(ReverseKL())), Term(Objective(ForwardKL(), reduction=SequenceMean()), weight=0.3)]),
    "terms": Terms(
        [
            Term(Objective(ReverseKL())),
            Term(Objective(ForwardKL(), reduction=SequenceMean()), weight=0.3),
            Term(Objective(ReverseKL(), target=ReferenceLaw()), weight=0.1, final_weight=0.5),
            Term(Objective(ReverseKL(), SampledToken(), GAE(0.9, 0.5, train_critic=False)), weight=0.2),
        ]
    ),
}
HEADS: dict[str, dict[str, object]] = {
    "plain": {},
    "bias": {"bias": True},
    "frozen": {"frozen": True},
    "padded vocabulary": {"rows": VOCAB + 4},
    "scaled and capped": {"factor": 0.7, "cap": 3.0, "rows": VOCAB + 2},
}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("name", COMPOSITIONS)
def test_compositions_on_every_head(name: str, head: str, size: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = Pair.random(**HEADS[head]).run(COMPOSITIONS[name])
    shrink(monkeypatch, size)
    same(Pair.random(**HEADS[head]).run(COMPOSITIONS[name]), expected)


@pytest.mark.parametrize("axis", AXES)
def test_every_member(axis: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cases = [o for member in MEMBERS[axis] for o in around(axis, member)]
    expected = [Pair.random().run(o) for o in cases]
    shrink(monkeypatch)
    for objective, exact in zip(cases, expected, strict=True):
        same(Pair.random().run(objective), exact, rtol=1e-9, atol=1e-12)


# ---- the oracle ------------------------------------------------------------------------------------------------------------


class HeadedLaws(TableLaws):
    """A table of logits as hidden states behind a head: the unit matrix."""

    @property
    def hidden(self) -> Tensor:
        return self.table

    @property
    def head(self) -> Head:
        module = nn.Linear(self.vocab, self.vocab, bias=False, dtype=self.table.dtype)
        nn.init.eye_(module.weight)
        return Head(module.requires_grad_(False), self.vocab)


@pytest.mark.parametrize("name", COMPOSITIONS)
def test_the_oracle_passes_through_the_fused_path(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    world = TabularWorld.random(vocab=4, horizon=3, seed=5, eos=3)
    given = {"reference": world.sampler, "critic": torch.zeros(len(world.states), dtype=torch.float64), "progress": 0.3}
    writer = "student" if COMPOSITIONS[name].needs_teacher else "teacher"
    expected = world.gradients_of(COMPOSITIONS[name], writer, **given)
    monkeypatch.setattr("opd_lightning.inspect.oracle.TableLaws", HeadedLaws)
    monkeypatch.setattr(fused, "BLOCK", 8)
    monkeypatch.setattr(fused, "TILE", 64)
    monkeypatch.setattr(fused, "TOKENS", 1)
    monkeypatch.setattr(fused, "GATHERED", 64)
    passes = []
    run = fused._Work.run
    monkeypatch.setattr(fused._Work, "run", lambda self, *a: passes.append(1) or run(self, *a))
    torch.testing.assert_close(world.gradients_of(COMPOSITIONS[name], writer, **given), expected, rtol=1e-11, atol=1e-13)
    assert passes


# ---- when the gradient is made ---------------------------------------------------------------------------------------------


def count_passes(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Records, for every pass over the tokens, whether it made outputs."""
    passes: list[bool] = []
    run = fused._Work.run

    def counted(self: fused._Work, hidden: Tensor, factors: object, wanted: bool, outputs_wanted: bool) -> tuple:
        passes.append(outputs_wanted)
        return run(self, hidden, factors, wanted, outputs_wanted)  # type: ignore[arg-type]

    monkeypatch.setattr(fused._Work, "run", counted)
    return passes


@pytest.mark.parametrize("factor", [1.0, 1.0 / 3.0])
def test_one_pass_where_the_reduction_decides_and_two_where_later_tokens_do(
    factor: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = {name: Pair.random().run(o, factor) for name, o in COMPOSITIONS.items()}
    shrink(monkeypatch)
    passes = count_passes(monkeypatch)
    for name, objective in COMPOSITIONS.items():
        passes.clear()
        same(Pair.random().run(objective, factor), expected[name])
        ahead = name in (
            "reverse KL",
            "forward KL at temperature 2",
            "jsd, sequence mean",
            "skew",
            "top-k",
            "likelihood",
            "exact terms",
        )
        assert passes == ([True] if ahead else [True, False]), name


def test_the_teacher_is_not_asked_again_for_sampled_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    shrink(monkeypatch)
    asked: list[int] = []

    class Counted(DenseLaws):
        def logits(self, start: int, stop: int) -> Tensor:
            asked.append(stop - start)
            return super().logits(start, stop)

    for name, rounds in (("sampled", 1), ("both", 2)):
        asked.clear()
        pair = Pair.random()
        pair.teacher = Counted(pair.teacher.hidden, pair.teacher.head, VOCAB)
        pair.run(COMPOSITIONS[name])
        assert sum(asked) == rounds * len(pair.teacher)
        assert max(asked) <= 10  # never more than a tile is alive, or two of them where no gradient is made yet


def test_a_wrong_expectation_costs_time_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    objective = COMPOSITIONS["reverse KL"]
    expected = Pair.random().run(objective)
    shrink(monkeypatch)
    passes = count_passes(monkeypatch)
    monkeypatch.setattr(Objective, "expected_gradient", lambda *a: torch.rand(sum(LENGTHS), dtype=torch.float64))
    same(Pair.random().run(objective), expected)
    assert passes == [True, False]


def test_a_second_backward_pass_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    shrink(monkeypatch)
    pair = Pair.random()
    loss = COMPOSITIONS["reverse KL"](pair.student, pair.teacher, rollout()).loss
    wanted = [pair.student.hidden, *pair.student.head.trained]
    first = torch.autograd.grad(3.0 * loss, wanted, retain_graph=True)
    for mine, again in zip(first, torch.autograd.grad(loss, wanted), strict=True):
        torch.testing.assert_close(mine, 3.0 * again)


def test_gradcheck(monkeypatch: pytest.MonkeyPatch) -> None:
    shrink(monkeypatch)
    pair, batch = Pair.random(), rollout()
    module = pair.student.head.module

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        module._parameters["weight"] = weight  # type: ignore[assignment]
        laws = DenseLaws(hidden, Head(module, VOCAB), VOCAB)
        return COMPOSITIONS["jsd, sequence mean"](laws, pair.teacher, batch).loss

    assert torch.autograd.gradcheck(loss, (pair.student.hidden, nn.Parameter(module.weight.detach().clone())))


def test_nothing_is_prepared_without_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = Pair.random().run(COMPOSITIONS["reverse KL"])[0]
    shrink(monkeypatch)
    pair = Pair.random()
    made = []
    monkeypatch.setattr(fused._Product, "backward", lambda *a: made.append(1))
    with torch.no_grad():
        torch.testing.assert_close(COMPOSITIONS["reverse KL"](pair.student, pair.teacher, rollout()).loss, expected)
    assert not made


# ---- precision and adapters ------------------------------------------------------------------------------------------------


def reference_of(pair: Pair, objective: Objective) -> tuple[Tensor, list[Tensor]]:
    """Loss and gradients of the same numbers in float64, on full logits."""
    twin = Pair.random()
    with torch.no_grad():
        for mine, theirs in ((twin.student, pair.student), (twin.teacher, pair.teacher), (twin.reference, pair.reference)):
            mine.hidden.copy_(theirs.hidden)
            mine.head.module.weight.copy_(theirs.head.module.weight)
    loss, gradients, _ = twin.run(objective)
    return loss, gradients


def distance(found: list[Tensor], exact: list[Tensor]) -> list[float]:
    return [float((f.double() - e).norm() / e.norm()) for f, e in zip(found, exact, strict=True)]


@pytest.mark.parametrize("name", COMPOSITIONS)
def test_float32_within_1e_5_and_bfloat16_near_the_error_of_full_logits(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    objective, whole = COMPOSITIONS[name], {d: Pair.random(d).run(COMPOSITIONS[name]) for d in (torch.float32, torch.bfloat16)}
    exact = {d: reference_of(Pair.random(d), objective) for d in whole}
    shrink(monkeypatch, "a tile at a time")
    loss, gradients, _ = Pair.random(torch.float32).run(objective)
    torch.testing.assert_close(loss.double(), exact[torch.float32][0].double(), rtol=1e-5, atol=1e-7)
    assert max(distance(gradients, exact[torch.float32][1])) < 1e-5
    _, gradients, _ = Pair.random(torch.bfloat16).run(objective)
    naive = distance(whole[torch.bfloat16][1], exact[torch.bfloat16][1])
    for mine, theirs in zip(distance(gradients, exact[torch.bfloat16][1]), naive, strict=True):
        assert mine <= 2.0 * theirs + 1e-3  # both round once more than float32 does: here each tile's product, there the sum


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_adapters_on_the_head(dropout: float, monkeypatch: pytest.MonkeyPatch) -> None:
    def adapted() -> Pair:
        pair = Pair.random()
        wrapped = nn.ModuleDict({"lm_head": pair.student.head.module})
        torch.manual_seed(3)
        inject_adapter_in_model(
            LoraConfig(r=2, target_modules=["lm_head"], lora_dropout=dropout, init_lora_weights=False), wrapped
        )
        head = Head(wrapped.double()["lm_head"].train(), VOCAB)
        assert not head.plain and len(head.trained) == 2
        pair.student = DenseLaws(pair.student.hidden, head, VOCAB)
        torch.manual_seed(4)
        return pair

    for name in ("reverse KL", "sampled, return to go"):
        expected = adapted().run(COMPOSITIONS[name])
        with monkeypatch.context() as patch:
            shrink(patch, "one tile" if dropout else "tiles")
            same(adapted().run(COMPOSITIONS[name]), expected)


def test_autocast_multiplies_in_bfloat16_and_keeps_float32_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("reverse KL", "both"):
        with torch.autocast("cpu", torch.bfloat16):
            expected = Pair.random(torch.float32).run(COMPOSITIONS[name])
            with monkeypatch.context() as patch:
                shrink(patch)
                found = Pair.random(torch.float32).run(COMPOSITIONS[name])
        for mine, theirs in zip(found[1], expected[1], strict=True):
            assert mine.dtype == torch.float32
            assert float((mine - theirs).norm() / theirs.norm()) < 2e-2


@pytest.mark.parametrize("size", [None, "tiles"], ids=["whole", "tiles"])
def test_autocast_reaches_the_heads_alone(size: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Losses and measurements are those of the same bfloat16 logits without autocast, to float32's precision."""
    if size:
        shrink(monkeypatch, size)
    for name, objective in COMPOSITIONS.items():
        with torch.autocast("cpu", torch.bfloat16):
            loss, _, measured = Pair.random(torch.float32).run(objective)
        expected, _, known = Pair.random(torch.bfloat16).run(objective)
        assert loss.dtype == torch.float32, name
        torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6, msg=name)
        for key, values in measured.items():
            torch.testing.assert_close(values, known[key], rtol=1e-6, atol=1e-6, msg=f"{name}: {key}")


def test_float16_gradients_neither_vanish_nor_overflow_before_the_loss_is_scaled(monkeypatch: pytest.MonkeyPatch) -> None:
    objective, made = Objective(ReverseKL()), replace(rollout(), scale=(1e-6,))

    def gradients(scale: float) -> list[Tensor]:
        pair = Pair.random(torch.float32)
        (objective(pair.student, pair.teacher, made).loss * scale).backward()
        return [p.grad.double() / scale for p in (pair.student.hidden, *pair.student.head.trained)]

    exact = gradients(1.0)
    shrink(monkeypatch)
    with torch.autocast("cpu", torch.float16):
        found = gradients(2.0**16)
    for mine, true in zip(found, exact, strict=True):
        assert float((mine - true).norm() / true.norm()) < 0.01


def test_masked_logits_stay_finite(monkeypatch: pytest.MonkeyPatch) -> None:
    shrink(monkeypatch)
    for name, objective in COMPOSITIONS.items():
        pair = Pair.random(torch.float32, bias=True)
        with torch.no_grad():
            pair.student.head.module.bias[[3, 7]] = -torch.inf
            pair.teacher.head.module.bias[[3, 11]] = -torch.inf
        loss, gradients, _ = pair.run(objective)
        assert torch.isfinite(loss), name
        assert all(torch.isfinite(g).all() for g in gradients), name


@pytest.mark.parametrize(
    "dtypes", [(torch.float32, torch.float64), (torch.bfloat16, torch.float32), (torch.float64, torch.float32)]
)
def test_models_of_different_precision_are_compared_in_the_students(
    dtypes: tuple[torch.dtype, torch.dtype], monkeypatch: pytest.MonkeyPatch
) -> None:
    for whole in (True, False):
        with monkeypatch.context() as patch:
            if not whole:
                shrink(patch)
            for name, objective in COMPOSITIONS.items():
                mixed, expected = Pair.random(dtypes[0]), Pair.random(dtypes[0]).run(objective)
                mixed.teacher, mixed.reference = (getattr(Pair.random(dtypes[1]), who) for who in ("teacher", "reference"))
                loss, gradients, _ = mixed.run(objective)
                torch.testing.assert_close(loss, expected[0], rtol=0.05, atol=0.02, msg=name)
                assert all(g.dtype == e.dtype for g, e in zip(gradients, expected[1], strict=True))
