"""The lab's tokenizer: a real Hugging Face tokenizer of one token per character."""

from __future__ import annotations

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

# As in Qwen3 base models one token both ends a text and pads a batch, and the model's vocabulary is
# larger than the tokenizer's: whoever confuses these goes wrong here first.
END = "<|endoftext|>"
TOKENS = [END, "\n", *"0123456789", "+", "-", "=", r"\boxed{", "}", *"abcdefghijklmnopqrstuvwxyz"]
VOCABULARY = 48  # rows of the embedding


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer that ``AutoTokenizer`` loads back from its saved folder."""
    vocabulary = {token: index for index, token in enumerate(TOKENS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=END))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\\boxed\{|[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END, pad_token=END, clean_up_tokenization_spaces=False
    )
