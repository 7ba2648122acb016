"""Ids that mean something, on a tokenizer with a hole."""

from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from opd_jax.tasks.vocabulary import special_ids, unused_ids, vocabulary_end


def test_a_vocabulary_with_holes():
    words = models.WordLevel({"a": 0, "b": 1, "<end>": 4, "<sep>": 6}, unk_token="a")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(words), eos_token="<end>", sep_token="<sep>"
    )
    assert len(tokenizer) == 4
    assert vocabulary_end(tokenizer) == 7
    assert unused_ids(tokenizer) == (2, 3, 5)
    assert special_ids(tokenizer, (4,)) == (6,)
    assert special_ids(tokenizer, ()) == (4, 6)


def test_the_labs_vocabulary_has_none(tokenizer):
    assert vocabulary_end(tokenizer) == len(tokenizer)
    assert unused_ids(tokenizer) == ()
