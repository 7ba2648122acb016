"""One of two processes of four devices: loads a folder on a mesh over both, and writes it again.

python -m tests.model.two_processes PROCESS PORT FOLDER TARGET
"""

import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from opd_jax.model import hf_load, load_pretrained, make_mesh, save_pretrained

if __name__ == "__main__":
    port, folder, target, process, out = sys.argv[1:]
    jax.config.update("jax_num_cpu_devices", 4)
    jax.distributed.initialize(f"localhost:{port}", 2, int(process))
    read, counts = hf_load.read_shard, []

    def counted(*given):
        shard = read(*given)
        counts.append(shard.size)
        return shard

    hf_load.read_shard = counted
    config, params = load_pretrained(folder, mesh=make_mesh(1, 4, 2), dtype=jnp.bfloat16)
    save_pretrained(target, config, params, shard_bytes=10_000, beside=[Path(folder) / "tokenizer.json"])
    norms = sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(params) if leaf.is_fully_replicated)
    Path(out).write_text(json.dumps({"read": sum(counts), "replicated": norms}))
