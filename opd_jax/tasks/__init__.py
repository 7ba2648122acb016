"""What is asked and whether an answer is right."""

from opd_jax.tasks.grade import boxed, grade
from opd_jax.tasks.problems import Problem, ProblemSet, read_problem_set, read_problems
from opd_jax.tasks.prompts import check_template, prompt_ids, prompt_text, prompting_digest
from opd_jax.tasks.text import (
    TOKENIZER_FILES,
    decode_response,
    encode_prompt,
    is_unicode,
    load_tokenizer,
    newline_table,
    tokenizer_digest,
)

__all__ = [
    "TOKENIZER_FILES",
    "Problem",
    "ProblemSet",
    "boxed",
    "check_template",
    "decode_response",
    "encode_prompt",
    "grade",
    "is_unicode",
    "load_tokenizer",
    "newline_table",
    "prompt_ids",
    "prompt_text",
    "prompting_digest",
    "read_problem_set",
    "read_problems",
    "tokenizer_digest",
]
