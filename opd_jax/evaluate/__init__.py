"""n samples a problem, graded, and what they say of a model."""

from opd_jax.evaluate.answers import Answer, answers, by_problem, read_answers, write_answers
from opd_jax.evaluate.pass_at_k import pass_at_k

__all__ = ["Answer", "answers", "by_problem", "pass_at_k", "read_answers", "write_answers"]
