"""A ``config.json`` with malformed or contradictory fields: one line each, and what is sound still loads."""

import json

import pytest

from opd_jax.errors import InputError
from opd_jax.model.config_json import config_from_json, config_to_json
from opd_jax.model.presets import preset
from opd_jax.model.rope import Yarn

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32_768}
PLAIN = {"rope_type": "default", "rope_theta": 1e6}


@pytest.fixture
def read(tmp_path):
    """A published config.json with fields changed, read."""

    def read(base="qwen3-0.6b", **fields):
        path = tmp_path / "config.json"
        path.write_text(json.dumps({**json.loads(config_to_json(preset(base), "bfloat16")), **fields}))
        return config_from_json(path)

    return read


INFINITE, NAN, HUGE = float("inf"), float("nan"), 10**400


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("rope_theta", ["1e6", INFINITE, NAN, HUGE, True, 0, -1.0, [1e6]]),
        ("rms_norm_eps", ["1e-6", INFINITE, NAN, HUGE, True, 0, -1e-6]),
        ("eos_token_id", ["x", 1.5, True, -1, [1.5], ["x"], {"id": 1}, 999_999, [999_999]]),
        ("tie_word_embeddings", ["false", "", 0, 1, [], {}]),
        ("vocab_size", ["40", 40.0, True, 0, -1, 2**31]),
        ("num_hidden_layers", [10**30]),
        ("layer_types", ["full_attention", ["sliding_attention"] * 3, ["full_attention"] * 99, [None] * 3]),
        ("head_dim", ["128", 128.0, True, 0, 127]),
        ("max_position_embeddings", ["40960", 40960.0, True, 0]),
        ("rope_scaling", ["yarn", "", 4, 0, False, True, [], ["yarn"], [["rope_type", "yarn"]]]),
        ("rope_parameters", ["default", 1e6, False, []]),
        ("attention_bias", ["false", 0, []]),
        ("use_sliding_window", ["false", 0]),
        ("mlp_only_layers", [0, False, "", {}]),
        ("decoder_sparse_step", [True, 1.0, "1"]),
    ],
)
def test_a_malformed_field_is_refused_by_name(read, field, values):
    for value in values:
        with pytest.raises(InputError, match=field) as caught:
            read(**{field: value})
        assert "\n" not in str(caught.value), value


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("num_experts", ["8", 8.0, True, -8]),
        ("num_experts_per_tok", ["2", 2.0, True, -1, 129]),
        ("moe_intermediate_size", [768.0, True, 0]),
        ("norm_topk_prob", ["false", 1, 0]),
    ],
)
def test_a_malformed_field_of_experts_is_refused_by_name(read, field, values):
    for value in values:
        with pytest.raises(InputError, match=field):
            read("qwen3-30b-a3b", **{field: value})


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("factor", ["4", INFINITE, NAN, HUGE, True, 0, -4.0]),
        ("original_max_position_embeddings", ["32768", INFINITE, True, 0]),
        ("beta_fast", ["32", INFINITE, True, 0]),
        ("beta_slow", ["1", NAN, False, -1]),
        ("attention_factor", ["1.0", INFINITE, NAN, True, -1.0, [1.0]]),
        ("mscale", ["1", INFINITE, True]),
        ("mscale_all_dim", ["1", INFINITE, True]),
        ("truncate", ["false", 0, 1, []]),
    ],
)
def test_a_malformed_field_of_yarn_is_refused_by_name(read, field, values):
    for value in values:
        with pytest.raises(InputError, match=rf"rope_scaling\.{field}"):
            read(rope_scaling={**YARN, field: value})


def test_yarn_needs_a_base_whose_logarithm_divides(read):
    with pytest.raises(InputError, match="rope_theta"):
        read(rope_theta=1.0, rope_scaling=YARN)


def test_a_null_is_a_field_that_is_not_said(read):
    sound = read()
    assert read(rms_norm_eps=None, max_position_embeddings=None, rope_scaling=None) == sound
    assert read(rope_scaling={**YARN, "beta_fast": None, "truncate": None}).rope_scaling == Yarn(4.0, 32_768)
    for field in ("eos_token_id", "vocab_size"):
        with pytest.raises(InputError, match=f"must say {field}"):
            read(**{field: None})


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"rope_parameters": {**PLAIN, "rope_theta": 5e6}}, "rope_theta"),
        ({"rope_scaling": {**YARN, "rope_theta": 5e6}}, "rope_theta"),
        ({"rope_parameters": {**YARN, "rope_theta": 5e6}}, "rope_theta"),
        ({"rope_scaling": YARN, "rope_parameters": PLAIN}, "rope_scaling"),
        ({"rope_scaling": YARN, "rope_parameters": {"rope_theta": 1e6}}, "rope_scaling"),
        ({"rope_scaling": YARN, "rope_parameters": {**PLAIN, **YARN, "factor": 8.0}}, "rope_scaling"),
        ({"rope_scaling": {"rope_type": "default"}, "rope_parameters": {**PLAIN, **YARN}}, "rope_scaling"),
    ],
)
def test_rotary_fields_that_contradict_each_other_are_refused(read, fields, words):
    with pytest.raises(InputError, match=f"{words}.*(?:remove|correct)") as caught:
        read(**fields)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e6}}}, "has full_attention = "),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
        ({"rope_scaling": {**YARN, "partial_rotary_factor": 0.5}}, "has partial_rotary_factor"),
        (
            {"rope_scaling": YARN, "original_max_position_embeddings": 64},
            "= 64 and rope_scaling.original_max",
        ),
    ],
)
def test_rotary_fields_that_are_not_computed_are_refused(read, fields, words):
    with pytest.raises(InputError, match=words) as caught:
        read(**fields)
    assert "\n" not in str(caught.value)


def test_a_deeply_nested_file_is_refused(tmp_path):
    (tmp_path / "config.json").write_text("[" * 100_000)
    with pytest.raises(InputError, match="readable config.json"):
        config_from_json(tmp_path / "config.json")


@pytest.mark.parametrize(
    ("fields", "yarn"),
    [
        ({"rope_parameters": PLAIN}, None),
        ({"rope_parameters": {**PLAIN, "rope_theta": 1_000_000}}, None),
        ({"rope_scaling": {}, "rope_parameters": PLAIN}, None),
        ({"rope_scaling": {"type": "default"}, "rope_parameters": PLAIN}, None),
        ({"rope_scaling": YARN, "rope_parameters": {"rope_theta": 1e6, **YARN}}, Yarn(4.0, 32_768)),
        ({"rope_scaling": YARN, "rope_parameters": {**YARN, "mscale": None}}, Yarn(4.0, 32_768)),
        ({"rope_theta": None, "rope_parameters": {"rope_theta": 1e6, **YARN}}, Yarn(4.0, 32_768)),
        ({"partial_rotary_factor": 1.0}, None),
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}, "original_max_position_embeddings": 64},
            Yarn(4.0, 64),
        ),
    ],
)
def test_rotary_fields_that_agree_are_read(read, fields, yarn):
    config = read(**fields)
    assert (config.rope_theta, config.rope_scaling) == (1e6, yarn)
