"""Peers say at import that their interfaces may change; the versions are pinned."""

import os

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
