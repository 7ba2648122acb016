"""What ends a text by a checkpoint's own files."""

import json

import pytest

from opd_jax.errors import InputError
from opd_jax.model.config_json import read_stop_ids


@pytest.mark.parametrize(
    ("config", "generation", "want"),
    [
        (7, None, (7,)),
        (7, [7, 5], (7, 5)),  # as a published chat model: end of turn, end of text
        ([7, 5], 5, (7, 5)),
        (None, [3], (3,)),
        (0, [2, 0], (0, 2)),
    ],
)
def test_both_files_name_them(tmp_path, config, generation, want):
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": config}))
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": generation}))
    assert read_stop_ids(tmp_path) == want


def test_a_generation_config_may_name_none(tmp_path):
    (tmp_path / "config.json").write_text('{"eos_token_id": 7}')
    (tmp_path / "generation_config.json").write_text('{"top_p": 0.95}')
    assert read_stop_ids(tmp_path) == (7,)


@pytest.mark.parametrize("text", ['{"eos_token_id": ["a"]}', '{"eos_token_id": -1}', "[1]", "{"])
def test_anything_else_is_refused_by_file(tmp_path, text):
    (tmp_path / "config.json").write_text('{"eos_token_id": 7}')
    (tmp_path / "generation_config.json").write_text(text)
    with pytest.raises(InputError, match="generation_config.json"):
        read_stop_ids(tmp_path)
