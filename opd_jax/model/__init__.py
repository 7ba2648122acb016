"""Qwen3 in JAX: sizes, parameters, forward pass, vocabulary head, shardings, checkpoints."""

from opd_jax.model.config import Qwen3Config
from opd_jax.model.forward import forward, hidden_states
from opd_jax.model.hf_load import load_pretrained, weight_files
from opd_jax.model.hf_save import save_pretrained
from opd_jax.model.parameters import init_params, parameter_count, parameter_table
from opd_jax.model.presets import preset
from opd_jax.model.sharding import make_mesh, param_shardings
from opd_jax.model.vocab import readout, token_logprobs, top_k_logprobs

__all__ = [
    "Qwen3Config",
    "forward",
    "hidden_states",
    "init_params",
    "load_pretrained",
    "make_mesh",
    "param_shardings",
    "parameter_count",
    "parameter_table",
    "preset",
    "readout",
    "save_pretrained",
    "token_logprobs",
    "top_k_logprobs",
    "weight_files",
]
