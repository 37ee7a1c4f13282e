"""A teacher with another tokenizer: where the two meet, what is compared there, and what is refused."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from opd_lightning.callbacks import ColdStart, CompletionEval, RolloutRefresh
from opd_lightning.data import Addition, TaskPrompts
from opd_lightning.models import CrossTokenizerTeacher, EnsembleTeacher, FrozenTeacher, NewStudent, Student, Vocabulary
from opd_lightning.models.tiny import character_tokenizer, pair_tokenizer
from opd_lightning.models.translation import TranslatedLaws, Translation, token_bytes
from opd_lightning.models.vocabulary import VocabularyMismatch
from opd_lightning.module import OPDModule
from opd_lightning.objectives import (
    Discounted,
    ForwardKL,
    GeneralizedJSD,
    MatchedVocab,
    Objective,
    Renyi,
    ReverseKL,
    SampledToken,
    Skewed,
    Term,
    Terms,
    TokenGap,
    TopK,
    WrittenToken,
)
from opd_lightning.objectives.defects import DegenerateObjective
from opd_lightning.samplers import NativeSampler
from opd_lightning.sources import DatasetSource, TeacherSource
from opd_lightning.types import Completion, Prompt, Rollout, TableLaws
from tests.helpers import tiny_data, tiny_trainer

ALPHABET = "0123456789+=,;&c#"
ZOO = "zoo/addition/teacher"
OBJECTIVE = Objective(GeneralizedJSD(0.5), MatchedVocab())


def between(ours: Any, theirs: Any) -> Translation:
    return Translation(Vocabulary.of(ours), Vocabulary.of(theirs))


@pytest.fixture(scope="module")
def translation() -> Translation:
    """From pairs of digits to the same characters without '#' and '&'."""
    return between(pair_tokenizer(ALPHABET, "0123456789"), character_tokenizer("0123456789+=,;c!"))


def byte_level(merges: list[tuple[str, str]]) -> PreTrainedTokenizerFast:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {t: i for i, t in enumerate(["<eos>", *letters, *(a + b for a, b in merges)])}
    inner = Tokenizer(models.BPE(vocab, merges))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>")


# ---- where two tokenizers meet -----------------------------------------------------------------------------------------------


def test_positions_meet_where_both_begin_a_token_at_the_same_byte(translation: Translation) -> None:
    ours, theirs = translation.ours.tokenizer, translation.theirs.tokenizer
    ids = ours("7+10=120", add_special_tokens=False).input_ids
    assert ours.convert_ids_to_tokens(ids) == ["7", "+", "10", "=", "12", "0"]
    reading = translation.read([*ids, ours.eos_token_id])
    assert theirs.convert_ids_to_tokens(list(reading.ids)) == [*"7+10=120", "<eos>"]
    assert reading.ours == (0, 1, 2, 3, 4, 5, 6)
    assert reading.theirs == (0, 1, 2, 4, 5, 7, 8)
    back = between(theirs, ours).read([*theirs("7+10=120", add_special_tokens=False).input_ids, theirs.eos_token_id])
    assert (back.ours, back.theirs) == (reading.theirs, reading.ours)  # a character inside a pair has no partner


def test_nothing_meets_behind_what_one_of_the_two_cannot_read(translation: Translation) -> None:
    ours = translation.ours.tokenizer
    ids = ours("7+#10", add_special_tokens=False).input_ids  # '#' is <unk> to the teacher
    assert translation.read([*ids, ours.eos_token_id]).ours == (0, 1, 2)
    special = [*ours("7", add_special_tokens=False).input_ids, ours.bos_token_id, *ids]
    assert translation.read(special).ours == (0,)
    assert translation.read([]).ids == ()


def test_byte_level_tokens_meet_inside_a_letter_and_half_letters_end_it() -> None:
    ours = byte_level([("Ã", "©")])  # the two bytes of é
    theirs = byte_level([])
    ids = ours("aéb").input_ids
    assert len(ids) == 3 and len(theirs("aéb").input_ids) == 4
    assert between(ours, theirs).read([*ids, 0]) == ((*theirs("aéb").input_ids, 0), (0, 1, 2, 3), (0, 1, 3, 4))
    half = [*theirs("aé").input_ids[:2], *theirs("b").input_ids]  # a, the first byte of é, b
    reading = between(theirs, ours).read(half)
    assert (reading.ours, reading.theirs) == ((0, 1), (0, 1))


def test_sentencepiece_spaces_and_byte_tokens_are_bytes() -> None:
    vocab = {t: i for i, t in enumerate(["<unk>", "<eos>", "\u2581a", "a", "<0xC3>", "\u2581"])}
    inner = Tokenizer(models.BPE(vocab, [("\u2581", "a")], unk_token="<unk>", byte_fallback=True))
    inner.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>", unk_token="<unk>")
    assert token_bytes(tokenizer) == [None, None, b" a", b"a", b"\xc3", b" "]


def test_word_pieces_keep_no_bytes() -> None:
    inner = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1, "##b": 2, "<eos>": 3}, unk_token="[UNK]"))
    with pytest.raises(VocabularyMismatch, match="does not keep the bytes"):
        token_bytes(PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>"))


def test_a_teacher_that_changes_the_text_is_refused(translation: Translation) -> None:
    from tokenizers import normalizers

    other = character_tokenizer("0123456789+=xX")
    other.backend_tokenizer.normalizer = normalizers.Prepend("0")
    with pytest.raises(VocabularyMismatch, match="puts something before it"):
        between(translation.ours.tokenizer, other).prove()
    with pytest.raises(VocabularyMismatch, match="share no token"):
        between(character_tokenizer("ab"), character_tokenizer("xy")).prove()
    assert translation.prove() == (
        "two tokenizers: 19 tokens are in both vocabularies, 102 in the student's alone, 1 in the teacher's alone"
    )


# ---- what is compared: by hand -----------------------------------------------------------------------------------------------


def by_hand() -> tuple[torch.Tensor, torch.Tensor, TranslatedLaws]:
    """Student tokens a, b, ab, abb; the teacher has a, b, c in the order b, c, a."""
    student = torch.tensor([[0.4, 0.2, 0.1, 0.3]], dtype=torch.float64).log()
    teacher = torch.tensor([[0.5, 0.2, 0.3]], dtype=torch.float64).log()
    laws = TranslatedLaws(TableLaws(teacher), torch.tensor([2, 0, 3, 3, 1]), torch.tensor([True, True, False, False]))
    return student, teacher, laws


def test_a_hand_made_case_with_exact_shares() -> None:
    student, _, laws = by_hand()
    rollout = Rollout.of([Prompt(0, "", (0,))], [Completion((0,), (0.0,), False, 0)], 0)
    student.requires_grad_()
    out = Objective(ReverseKL(), MatchedVocab(0.5))(TableLaws(student), laws, rollout)
    p, q = torch.tensor([0.4, 0.2]).double(), torch.tensor([0.3, 0.5]).double()
    divergence = (p * (p / q).log() - p + q).sum()
    distance = abs(0.3 - 0.2) + abs(0.1 - 0.0)  # 0.3, 0.1 of the student against 0.2 of the teacher
    torch.testing.assert_close(out.loss.detach(), divergence + 0.5 * distance)
    stats = out.stats.values
    assert stats["matched_student_mass"].item() == pytest.approx(0.6)
    assert stats["matched_teacher_mass"].item() == pytest.approx(0.8)
    inner = (p / 0.6 * ((p / 0.6) / (q / 0.8)).log()).sum()
    assert stats["reverse_kl"].item() == pytest.approx(inner.item())
    assert "k1" not in stats
    (gradient,) = torch.autograd.grad(out.loss, student)
    p = student.detach().exp()[0]
    of_p = torch.stack([(p[0] / 0.3).log(), (p[1] / 0.5).log(), torch.tensor(0.5).double(), torch.tensor(0.5).double()])
    torch.testing.assert_close(gradient[0], p * (of_p - (p * of_p).sum()))


def test_all_is_zero_where_shared_tokens_and_sorted_rest_agree() -> None:
    _, _, laws = by_hand()
    student = torch.tensor([[0.3, 0.5, 0.0, 0.2]], dtype=torch.float64).log().requires_grad_()
    score = MatchedVocab().score(ReverseKL(), student.log_softmax(-1), laws.logits(0, 1), torch.tensor([0]), None, laws.matched)
    assert score.direct.item() == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("divergence", [ReverseKL(), ForwardKL(), GeneralizedJSD(0.3)], ids=repr)
def test_equal_tokenizers_give_the_ordinary_objective(divergence: Any, pair: tuple[Path, Path]) -> None:
    """The same losses and gradients in float64, through the teacher's own reading of the text."""
    found = []
    for teacher, support in ((FrozenTeacher, None), (CrossTokenizerTeacher, MatchedVocab())):
        objective = Objective(divergence, support) if support else Objective(divergence)
        module = OPDModule(Student(str(pair[0]), dtype="float64"), teacher(str(pair[1]), dtype="float64"), objective)
        module.configure_model()
        data = tiny_data()
        data.vocabulary = module.vocabulary
        if module.teacher.translation is not None:
            data.teacher_tokenizer = module.teacher.translation.theirs.tokenizer
        data.setup()
        prompts = data.train_prompts[:3]
        written = [Completion(p.reference or (), (torch.nan,) * len(p.reference or ()), True, 0) for p in prompts]
        out = module.score(module.join(prompts, written), objective)
        out.loss.backward()
        found.append((out.loss.detach(), module.student.get_input_embeddings().weight.grad))  # type: ignore[union-attr]
    assert found[0][0] > 0.01
    assert found[0][0].item() == pytest.approx(found[1][0].item(), abs=1e-14)
    torch.testing.assert_close(found[0][1], found[1][1], atol=1e-15, rtol=1e-12)


# ---- a run -------------------------------------------------------------------------------------------------------------------


def module_of(objective: Any = OBJECTIVE, teacher: Any = None, student: Any = None, **kwargs: Any) -> OPDModule:
    student = student or NewStudent(ALPHABET, hidden=16, heads=2, pairs="0123456789")
    return OPDModule(student, teacher or CrossTokenizerTeacher(ZOO), objective, **kwargs)


def test_a_run_logs_what_was_scored_and_resumes_in_the_middle_of_a_refresh(tmp_path: Path) -> None:
    from opd_lightning.callbacks import OPDCheckpoint
    from tests.helpers import same, weights

    def fit(root: Path, steps: int, **kwargs: Any) -> tuple[OPDModule, Any]:
        module = module_of()
        refresh = RolloutRefresh(sampler=NativeSampler(max_new_tokens=6), seed=1, every_n_steps=2)
        trainer = tiny_trainer(root, [refresh, OPDCheckpoint(every_n_steps=1, keep=0)], max_steps=steps)
        trainer.fit(module, tiny_data(batch_size=4), **kwargs)
        return module, trainer

    whole, trainer = fit(tmp_path / "whole", 4)
    logged = trainer.callback_metrics
    batch = trainer.datamodule.buffer.rollout
    share = float(batch.mask.sum() / batch.written.sum())  # all but what stands behind a special token
    assert logged["rollout/scored_positions"] == pytest.approx(share) and share > 0.5
    assert 0.0 < logged["train/matched_student_mass"] < 0.5 and logged["train/matched_teacher_mass"] == pytest.approx(1.0)
    fit(tmp_path / "part", 3)
    resumed, _ = fit(tmp_path / "part", 4, ckpt_path=str(tmp_path / "part/checkpoints/step-000003.ckpt"))
    assert same(weights(whole), weights(resumed))


@pytest.mark.slow
def test_a_student_with_pairs_comes_nearer_to_a_teacher_of_characters(tmp_path: Path) -> None:
    """On its own text, after a start on written solutions: both phases bring it nearer, held out."""
    student = NewStudent(ALPHABET, hidden=48, heads=4, pairs="789", seed=3)
    writing = {"sampler": NativeSampler(max_new_tokens=24, batch_size=64)}
    evaluation = CompletionEval(every_n_steps=40, seed=0, **writing)
    callbacks = [RolloutRefresh(seed=1, **writing), ColdStart(40, DatasetSource()), evaluation]
    data = tiny_data(prompts=TaskPrompts(Addition(digits=2), size=400, seed=3), held_out=64, batch_size=32)
    trainer = tiny_trainer(tmp_path, callbacks, max_steps=80)
    trainer.fit(module_of(student=student, optimizer=partial(torch.optim.AdamW, lr=4e-3)), data)
    start, cold, end = (row["reverse_kl"] for row in evaluation.history if row["who"] == "student")
    assert end < 0.8 * cold < 0.64 * start, (start, cold, end)
    assert trainer.callback_metrics["rollout/scored_positions"] > 0.9  # all but what stands behind a special token


def test_positions_that_do_not_meet_are_masked_and_counted(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """The student writes characters, the teacher reads pairs: the second digit of a pair is not scored."""
    NewStudent(ALPHABET, hidden=16, heads=2, pairs="0123456789").weights().save_pretrained(tmp_path / "t")  # type: ignore[operator]
    pair_tokenizer(ALPHABET, "0123456789").save_pretrained(tmp_path / "t")
    module = module_of(teacher=CrossTokenizerTeacher(str(tmp_path / "t")), student=Student(ZOO))
    module.configure_model()
    tokenizer = module.vocabulary.tokenizer
    prompt = Prompt(
        0, "1+1=", tuple(tokenizer("1+1=").input_ids), tuple(pair_tokenizer(ALPHABET, "0123456789")("1+1=").input_ids)
    )
    ids = (*tokenizer("12+345", add_special_tokens=False).input_ids, tokenizer.eos_token_id)
    rollout = module.join([prompt], [Completion(ids, (-1.0,) * 7, True, 0)])
    assert rollout.unaligned is not None
    assert rollout.text.targets[rollout.mask].tolist() == [ids[0], ids[2], ids[3], ids[5], ids[6]]  # 1. + 3. 5 end
    assert (int(rollout.mask.sum()), int(rollout.written.sum())) == (5, 7)
    assert rollout.completion(0) == list(ids)
    assert module.score(rollout, OBJECTIVE).stats.position.tolist() == [0, 1, 2, 3, 4]
    for again in (Rollout.from_state(rollout.state()), Rollout.cat([rollout]), rollout.select(torch.tensor([0]))):
        assert torch.equal(again.written, rollout.written) and torch.equal(again.mask, rollout.mask)
    with pytest.raises(ValueError, match="lacks the teacher's tokens"):
        module.join([Prompt(0, "1+1=", prompt.ids)], [Completion(ids, (-1.0,) * 7, True, 0)])


# ---- what is refused ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "objective",
    [
        Objective(ReverseKL()),
        Objective(ReverseKL(), SampledToken()),
        Objective(ReverseKL(), TopK(4)),
        Terms([Term(OBJECTIVE), Term(Objective(ReverseKL(), SampledToken()))]),
    ],
    ids=["full", "sampled", "top-k", "a term"],
)
def test_objectives_that_take_the_teachers_ids_for_the_students_are_refused(objective: Any) -> None:
    with pytest.raises(DegenerateObjective, match="support: MatchedVocab"):
        RolloutRefresh().declare(module_of(objective), tiny_data())


@pytest.mark.parametrize(
    ("choices", "words"),
    [
        ({"divergence": Renyi(2.0)}, "not a sum over entries"),
        ({"credit": Discounted(0.5)}, "credit: Immediate"),
        ({"target": Skewed(0.1)}, "target: TeacherLaw"),
        ({"gates": [TokenGap(at_least=0.1)]}, "gates: "),
    ],
)
def test_axes_that_need_a_common_vocabulary_are_refused(choices: dict[str, Any], words: str) -> None:
    with pytest.raises(DegenerateObjective, match=words):
        Objective(**{"divergence": ReverseKL(), "support": MatchedVocab(), **choices})


def test_places_that_a_foreign_teacher_cannot_take_are_refused() -> None:
    foreign = CrossTokenizerTeacher(ZOO)
    both = EnsembleTeacher([FrozenTeacher(ZOO), foreign])
    with pytest.raises(ValueError, match=r"model\.teacher\.1 is a CrossTokenizerTeacher"):
        RolloutRefresh().declare(module_of(teacher=both), tiny_data())
    with pytest.raises(ValueError, match=r"model\.reference is a CrossTokenizerTeacher"):
        RolloutRefresh().declare(module_of(reference=foreign), tiny_data())
    with pytest.raises(ValueError, match="CrossTokenizerTeacher only scores"):
        RolloutRefresh(TeacherSource()).declare(module_of(), tiny_data())
    with pytest.raises(ValueError, match="at least 0"):
        MatchedVocab(-1.0)
    module = module_of(Terms([Term(OBJECTIVE), Term(Objective(ForwardKL(), WrittenToken()), rows="others")]))
    ColdStart(steps=2, source=DatasetSource()).announce(module)
    from opd_lightning.sources import MixtureSource, StudentSource

    lines = RolloutRefresh(MixtureSource(StudentSource(), DatasetSource())).declare(module, tiny_data())
    assert "generalised JSD" in lines[-1].lower() or "tokens of both vocabularies" in lines[-1]
