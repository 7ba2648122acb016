"""What is asked and whether an answer is right."""

from opd_jax.tasks.grade import boxed, grade
from opd_jax.tasks.problems import Problem, read_problems
from opd_jax.tasks.text import (
    TOKENIZER_FILES,
    decode_response,
    encode_prompt,
    load_tokenizer,
    newline_table,
    tokenizer_digest,
)

__all__ = [
    "TOKENIZER_FILES",
    "Problem",
    "boxed",
    "decode_response",
    "encode_prompt",
    "grade",
    "load_tokenizer",
    "newline_table",
    "read_problems",
    "tokenizer_digest",
]
