"""The method again, in float64 NumPy with loops, read off the formulas and nothing else.

A module for each of `opd_jax.method`. Nothing here imports the package: what the two agree on, they
agree on for two reasons.
"""
