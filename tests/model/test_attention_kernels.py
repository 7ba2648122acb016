"""Which kernel is taken, which is refused, and in what words."""

import pytest

from opd_jax.errors import InputError
from opd_jax.model.kernels import choose_kernel

ROWS = {"dtype": "bfloat16", "length": 18_432, "head_dim": 128, "packed": False}
A100 = {"platform": "gpu", "compute_capability": "8.0"}
H100 = {"platform": "gpu", "compute_capability": "9.0"}
T4 = {"platform": "gpu", "compute_capability": "7.5"}
MI300 = {"platform": "gpu", "compute_capability": "gfx942"}
TPU = {"platform": "tpu"}
CPU = {"platform": "cpu"}


@pytest.mark.parametrize(
    ("device", "rows", "words"),
    [
        (CPU, {}, "attention kernel xla: there is no fused kernel for cpu"),
        (A100, {}, "attention kernel cudnn: the fused kernel for gpu"),
        (H100, {"dtype": "float16"}, "attention kernel cudnn: the fused kernel for gpu"),
        (
            {"platform": "gpu", "compute_capability": "10.3"},
            {},
            "attention kernel cudnn: the fused kernel for gpu",
        ),
        (H100, {"length": 1001}, "attention kernel cudnn: the fused kernel for gpu"),
        (TPU, {}, "attention kernel splash: the fused kernel for tpu"),
        (TPU, {"packed": True}, "attention kernel splash: the fused kernel for tpu"),
        (TPU, {"dtype": "float32", "head_dim": 256}, "attention kernel splash: the fused kernel for tpu"),
    ],
)
def test_auto_takes_the_best_that_is_valid(device, rows, words):
    assert str(choose_kernel("auto", **device, **ROWS | rows)) == words


OBSTACLES = [
    ("cudnn", CPU, {}, "cudnn attention runs on NVIDIA GPUs: got cpu; run on one"),
    ("cudnn", TPU, {}, "cudnn attention runs on NVIDIA GPUs: got tpu; run on one"),
    (
        "cudnn",
        {"platform": "gpu"},
        {},
        "cudnn attention runs on NVIDIA GPUs: got gpu of unknown compute capability; run on one",
    ),
    (
        "cudnn",
        MI300,
        {},
        "cudnn attention runs on NVIDIA GPUs: got gpu of compute capability gfx942; run on one",
    ),
    (
        "cudnn",
        T4,
        {},
        "cudnn attention needs compute capability 8.0 (Ampere) or newer: got 7.5; run on such a GPU",
    ),
    (
        "cudnn",
        A100,
        {"dtype": "float32"},
        "cudnn attention reads bfloat16 or float16: got float32; compute in bfloat16",
    ),
    (
        "cudnn",
        A100,
        {"head_dim": 192},
        "cudnn attention needs a head_dim that is a multiple of 8 up to 128: got 192; choose such a model",
    ),
    (
        "cudnn",
        A100,
        {"head_dim": 10},
        "cudnn attention needs a head_dim that is a multiple of 8 up to 128: got 10; choose such a model",
    ),
    (
        "cudnn",
        H100,
        {"packed": True},
        "cudnn attention cannot keep the sequences of a row apart: got packed rows; "
        "put one sequence in a row",
    ),
    ("splash", CPU, {}, "splash attention runs on TPUs: got cpu; run on one"),
    ("splash", H100, {}, "splash attention runs on TPUs: got gpu; run on one"),
    (
        "splash",
        TPU,
        {"dtype": "float16"},
        "splash attention reads bfloat16 or float32: got float16; compute in bfloat16",
    ),
    (
        "splash",
        TPU,
        {"length": 300},
        "splash attention needs rows of a multiple of 128 positions: got 300; pad rows to 384",
    ),
    (
        "splash",
        TPU,
        {"head_dim": 64},
        "splash attention needs a head_dim that is a multiple of 128: got 64; choose such a model",
    ),
]


@pytest.mark.parametrize(("name", "device", "rows", "words"), OBSTACLES)
def test_one_asked_for_by_name_is_refused_in_words(name, device, rows, words):
    with pytest.raises(InputError) as refused:
        choose_kernel(name, **device, **ROWS | rows)
    assert str(refused.value) == f"{words}, or ask for auto or xla"


@pytest.mark.parametrize(
    ("name", "device", "rows", "words"),
    [case for case in OBSTACLES if (case[0], case[1]["platform"]) in [("cudnn", "gpu"), ("splash", "tpu")]],
)
def test_auto_says_why_it_falls_back(name, device, rows, words):
    assert str(choose_kernel("auto", **device, **ROWS | rows)) == f"attention kernel xla: {words}"


@pytest.mark.parametrize(("name", "device"), [("xla", CPU), ("xla", TPU), ("cudnn", H100), ("splash", TPU)])
def test_one_asked_for_by_name_is_taken(name, device):
    assert str(choose_kernel(name, **device, **ROWS)) == f"attention kernel {name}: asked for by name"


def test_a_name_that_is_none():
    with pytest.raises(InputError, match="must be auto, xla, cudnn or splash: got 'flash'"):
        choose_kernel("flash", **CPU, **ROWS)
