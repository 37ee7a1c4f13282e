"""Models made from nothing: a character tokenizer and small Llama-style networks, for the zoo, tests and notebooks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from opd_lightning.models.loading import blank_generation
from opd_lightning.models.students import Student

__all__ = ["NewStudent", "character_tokenizer", "pair_tokenizer", "save_tiny"]

SPECIAL = ("<pad>", "<bos>", "<eos>", "<unk>")


def character_tokenizer(characters: str) -> PreTrainedTokenizerFast:
    """One token a character, behind four special ones; a text begins with ``<bos>``.

    >>> character_tokenizer("01+")("1+0").input_ids
    [1, 5, 6, 4]
    """
    vocab = {token: i for i, token in enumerate([*SPECIAL, *dict.fromkeys(characters)])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    return _finished(tokenizer)


def pair_tokenizer(characters: str, pairs: str) -> PreTrainedTokenizerFast:
    """Byte-pair merges over characters: any two of ``pairs`` beside each other are one token, the first pairs first.

    >>> pair_tokenizer("01+", "01").convert_ids_to_tokens(pair_tokenizer("01+", "01")("101+0").input_ids)
    ['<bos>', '1', '01', '+', '0']
    """
    merges = [(a, b) for a in pairs for b in pairs]
    tokens = [*SPECIAL, *dict.fromkeys(characters), *(a + b for a, b in merges)]
    vocab = {token: i for i, token in enumerate(tokens)}
    return _finished(Tokenizer(models.BPE(vocab, merges, unk_token="<unk>")))


def _finished(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    tokenizer.decoder = decoders.Fuse()
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>"
    )


class NewStudent(Student):
    """A small Llama-style network with random weights and a character tokenizer, or one with merged pairs of characters.

    Args:
        characters: the alphabet.
        hidden: width.
        layers: number of decoder layers.
        heads: attention heads; ``hidden`` must be a multiple of it.
        intermediate: width of the feed-forward layers; 0 means 4 x hidden.
        max_length: longest sequence.
        init_std: standard deviation of the initial weights; the common 0.02 is small for narrow networks.
        seed: of the weights.
        pairs: any two of these characters that stand beside each other are one token.

    Raises:
        ValueError: if heads do not divide hidden, or pairs are made of other characters.
    """

    def __init__(
        self,
        characters: str,
        hidden: int = 64,
        layers: int = 2,
        heads: int = 4,
        intermediate: int = 0,
        max_length: int = 256,
        init_std: float = 0.06,
        seed: int = 0,
        pairs: str = "",
    ) -> None:
        if strangers := set(pairs) - set(characters):
            raise ValueError(f"NewStudent(pairs={pairs!r}): {''.join(sorted(strangers))!r} is not among its characters")
        if hidden % heads:
            raise ValueError(f"NewStudent(hidden={hidden}, heads={heads}): heads must divide hidden")
        super().__init__(path="", seed=seed)
        self.pairs = pairs
        self.characters, self.hidden, self.layers, self.heads = characters, hidden, layers, heads
        self.intermediate, self.max_length, self.init_std = intermediate or 4 * hidden, max_length, init_std

    def tokenizer(self) -> PreTrainedTokenizerBase:
        return pair_tokenizer(self.characters, self.pairs) if self.pairs else character_tokenizer(self.characters)

    def config(self) -> Any:
        tokenizer = self.tokenizer()
        return LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.heads,
            max_position_embeddings=self.max_length,
            initializer_range=self.init_std,
            tie_word_embeddings=True,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )

    def weights(self) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            return blank_generation(LlamaForCausalLM(self.config()))


def save_tiny(folder: str | Path, characters: str = "0123456789+=,;&c# ", **sizes: Any) -> Path:
    """Write a random tiny model with its tokenizer as a Hugging Face folder, and return the folder."""
    student = NewStudent(characters, **sizes)
    student.weights().save_pretrained(folder)  # type: ignore[operator]
    student.tokenizer().save_pretrained(folder)
    return Path(folder)
