"""Rollouts that other trainers wrote down, row by row.

verl (0.7). ``trainer.rollout_data_dir`` gets ``{step}.jsonl`` with ``input``, ``output``, ``gts``, ``score``,
``step`` and what the reward function adds: texts without their special tokens, no token ids and no
log-probs, from which no drift can be read. The tensors of a step have all of it: ``prompts`` ``[B, P]``
padded on the left, ``responses`` ``[B, R]`` padded on the right, ``attention_mask`` ``[B, P + R]``,
``response_mask``, ``rollout_log_probs`` (the sampler's, with ``rollout.calculate_log_probs``),
``old_log_probs`` (the trainer's), ``token_level_scores``. They are read from ``{step}.safetensors``, or
row by row, as lists, from parquet or JSON lines. ``DataProto.save_to_disk`` is a pickle, and refused.

trl (1.16). ``log_completions`` writes ``completions/completions_{step}.parquet`` with ``step``, ``prompt``,
``completion``, a column a reward function, and ``advantage``; the same completions come again at every
step that reuses them. Log-probs are there only if a reward function adds them (``log_extra``): columns
``completion_ids``, ``prompt_ids``, ``logprobs`` or ``sampling_per_token_logps`` (the sampler's) and
``old_per_token_logps`` (the trainer's).
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from opd_jax.config import ProblemsConfig
from opd_jax.errors import InputError
from opd_jax.tasks import encode_prompt, is_unicode, prompt_ids
from opd_jax.tasks.tables import file_rows

Trainer = Literal["verl", "trl"]
Fields = Mapping[str, Any]

READ = (".jsonl", ".parquet", ".safetensors")
PICKLES = (".pt", ".pth", ".pkl", ".pickle", ".bin", ".ckpt")

PROMPT_IDS = ("prompt_ids", "prompts")
RESPONSE_IDS = ("response_ids", "completion_ids", "responses")
TEXTS = {"verl": ("input", "output"), "trl": ("prompt", "completion")}
BEHAVIOUR = {"verl": ("rollout_log_probs",), "trl": ("sampling_per_token_logps", "logprobs")}
OLD = {"verl": ("old_log_probs",), "trl": ("old_per_token_logps",)}
REWARDS = ("score", "reward", "token_level_scores", "token_level_rewards")
_LARGEST = float(np.finfo(np.float32).max)  # a reward that can be stored
# Numbers that are no reward.
_NO_REWARD = ("step", "advantage", "index")


@dataclasses.dataclass(frozen=True)
class Dumped:
    """One rollout of a dump."""

    where: str  # file and row, in words
    step: int
    group: str  # same for the rollouts of one prompt
    prompt_ids: np.ndarray  # [P] int32
    response_ids: np.ndarray  # [R] int32
    behaviour: np.ndarray | None  # [R] float32: the sampler's log-probs
    old: np.ndarray | None  # [R] float32: the trainer's, before it updated
    reward: float


def read_dump(path: Path, trainer: Trainer, tokenizer: Any, reward: str = "") -> Iterator[Dumped]:
    """The rollouts of a dump, in the order of their files' numbers.

    Args:
      path: a file, or a folder of files.
      trainer: whose names the columns have.
      tokenizer: what the token ids mean; it also reads texts, where a dump has no ids.
      reward: the column of the reward; by default one of `REWARDS`, or the only column of numbers.

    Raises:
      InputError: there is nothing to read, a file is a pickle, or a row lacks something or contradicts
        itself; the message names it.
    """
    for file in _files(path):
        rows = _tensor_rows(file) if file.suffix == ".safetensors" else file_rows(file)
        for where, fields in rows:
            yield _dumped(where, file, fields, trainer, tokenizer, reward)


def _files(path: Path) -> list[Path]:
    if path.is_file():
        files = [path]
    else:
        files = [f for f in path.rglob("*") if f.is_file() and not f.name.startswith(".")]
    for file in files:
        if file.suffix in PICKLES:
            raise InputError(
                f"a pickle is a program that runs when it is read: {file} is one; where you trust it, save "
                "its tensors with safetensors.torch.save_file(dict(data.batch), '{step}.safetensors')"
            )
    found = [file for file in files if file.suffix in READ]
    if not found:
        raise InputError(
            f"a dump must have {', '.join(READ)} files: {path} has none; name the folder the trainer wrote"
        )
    return sorted(found, key=lambda f: (_numbers(f), str(f)))


def _numbers(file: Path) -> list[int]:
    return [int(digits) for digits in re.findall(r"\d+", file.stem)]


def _tensor_rows(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of tensors saved together, ``[B, ...]`` each."""
    try:
        tensors = load_file(file)
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"tensors must be a safetensors file of types NumPy has: {file} is not ({reason}); save "
            "floats as float32"
        ) from None
    counts = {len(tensor) if tensor.ndim else 0 for tensor in tensors.values()}
    if len(counts) != 1:
        raise InputError(
            f"tensors of a step must have as many rows: {file} has {sorted(counts)}; save one batch"
        )
    if "attention_mask" not in tensors:
        raise InputError(
            f"padding is told by the mask: {file} has no attention_mask among {', '.join(tensors)}; save it"
        )
    for row in range(counts.pop()):
        yield f"row {row} of {file}", {name: tensor[row] for name, tensor in tensors.items()}


def _dumped(where: str, file: Path, fields: Fields, trainer: Trainer, tokenizer: Any, reward: str) -> Dumped:
    try:
        behaviour, old = (_named(fields, names[trainer]) for names in (BEHAVIOUR, OLD))
        if behaviour is None and old is None:
            wanted = " or ".join((*BEHAVIOUR[trainer], *OLD[trainer]))
            raise InputError(
                f"drift is a difference of log-probs: {where} has {', '.join(fields)}, and no {wanted}; dump "
                "them with the token ids, and import that"
            )
        prompt, response, keep = _ids(where, fields, trainer, tokenizer, behaviour if old is None else old)
        for ids in (prompt, response):
            if len(ids) and not 0 <= ids.min() <= ids.max() < len(tokenizer):
                raise InputError(
                    f"token ids must be of the tokenizer: {where} has {ids.min()} to {ids.max()}, that has "
                    f"{len(tokenizer)} ids; name the model's own with --tokenizer"
                )
        prompt, response = prompt.astype(np.int32), response.astype(np.int32)
        return Dumped(
            where=where,
            step=_step(where, file, fields),
            group=_group(where, fields, prompt),
            prompt_ids=prompt,
            response_ids=response,
            behaviour=_per_token(where, behaviour, keep),
            old=_per_token(where, old, keep),
            reward=_reward(where, fields, reward),
        )
    except (TypeError, ValueError, OverflowError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"ids, log-probs and scores must be lists of numbers: {where} has others ({error}); correct it"
        ) from None


def _named(fields: Fields, names: Sequence[str]) -> Any:
    return next((fields[name] for name in names if fields.get(name) is not None), None)


def _step(where: str, file: Path, fields: Fields) -> int:
    """The step of a row: its own, which trl writes as text, or the last number of the file's name."""
    numbers = _numbers(file)
    step = fields.get("step")
    if step is None and not numbers:
        raise InputError(
            f"a rollout must say its step: {where} does not, nor its file's name; add a column step"
        )
    text = str(numbers[-1] if step is None else np.asarray(step).item())
    if not re.fullmatch(r"[0-9]+(\.0)?", text) or float(text) >= 2**31:
        raise InputError(f"a step must be a whole number below 2^31: {where} has {text[:40]!r}; correct it")
    return int(float(text))


def _group(where: str, fields: Fields, prompt: np.ndarray) -> str:
    uid = fields.get("uid")
    if uid is None:
        return hashlib.sha256(prompt.tobytes()).hexdigest()[:16]
    if not is_unicode(str(uid)):
        raise InputError(f"a uid must be text that UTF-8 can hold: {where} has {str(uid)!r}; correct it")
    return str(uid)


def _flat(where: str, what: str, column: Any, kinds: str = "iuf") -> np.ndarray:
    """A column as one flat array ``[N]`` of a NumPy kind among ``kinds``."""
    values = np.asarray(column)
    if values.ndim != 1 or (len(values) and values.dtype.kind not in kinds):
        numbers = "numbers" if "f" in kinds else "whole numbers"
        raise InputError(
            f"{what} must be flat lists of {numbers}: {where} has {values.dtype} of shape "
            f"{list(values.shape)}; correct it"
        )
    return values


def _ids(
    where: str, fields: Fields, trainer: Trainer, tokenizer: Any, logprobs: Any
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Prompt and response ids ``[P]`` and ``[R]``, and which positions of a column are response: bool."""
    prompt, response = _named(fields, PROMPT_IDS), _named(fields, RESPONSE_IDS)
    if prompt is None or response is None:
        return _ids_of_texts(where, fields, trainer, tokenizer, len(logprobs))
    prompt, response = (_flat(where, "token ids", ids, "iu") for ids in (prompt, response))
    mask = _mask(where, fields, "attention_mask", len(prompt) + len(response))
    trained = _mask(where, fields, "response_mask", len(response))
    if mask is None:
        of_response = np.ones(len(response), bool) if trained is None else trained
        mask = np.append(np.ones(len(prompt), bool), of_response)
    asked, keep = mask[: len(prompt)], mask[len(prompt) :]
    if not asked[len(prompt) - int(asked.sum()) :].all():
        raise InputError(
            f"a prompt is padded on the left, and nowhere else: {where} has an attention_mask of 0 behind "
            "its first token; correct it, or leave that row out"
        )
    if not keep[: int(keep.sum())].all() or (trained is not None and (trained != keep).any()):
        raise InputError(
            f"a response is one stretch of sampled tokens: {where} has tokens of others within (tools, other "
            "turns); leave such rows out"
        )
    return prompt[asked], response[keep], keep


def _mask(where: str, fields: Fields, name: str, length: int) -> np.ndarray | None:
    if fields.get(name) is None:
        return None
    mask = _flat(where, "masks", fields[name], "biuf")
    if len(mask) != length:
        raise InputError(
            f"{name} must be as long as what it masks: {where} has {len(mask)} positions for {length}; dump "
            "them alike"
        )
    others = mask[(mask != 0) & (mask != 1)]  # NaN is one
    if len(others):
        raise InputError(f"{name} must be of 0 and 1: {where} has {others[0]}; correct it")
    return mask.astype(bool)


def _ids_of_texts(
    where: str, fields: Fields, trainer: Trainer, tokenizer: Any, count: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ids of texts, if they come to as many as there are log-probs, the end of text counted or not."""
    asked, answered = (fields.get(name) for name in TEXTS[trainer])
    question, answer = _text(asked, ("user",)), _text(answered, ("assistant", None))
    if not question or answer is None:
        raise InputError(
            f"a rollout must have token ids, or the texts of one prompt and one answer: {where} has "
            f"{', '.join(fields)}; dump {PROMPT_IDS[0]} and {RESPONSE_IDS[0]}"
        )
    if isinstance(asked, str):
        prompt = encode_prompt(tokenizer, question)
    else:
        prompt = prompt_ids(tokenizer, question, ProblemsConfig(template="chat"))
    response = encode_prompt(tokenizer, answer)
    if len(response) + 1 == count and tokenizer.eos_token_id is not None:
        response = np.append(response, np.int32(tokenizer.eos_token_id))
    if len(response) != count:
        raise InputError(
            f"text read again must come to the tokens it was sampled as: {where} has {count} log-probs for "
            f"{len(response)} tokens; dump {PROMPT_IDS[0]} and {RESPONSE_IDS[0]}"
        )
    return prompt, response, np.ones(count, bool)


def _text(told: Any, roles: Sequence[str | None]) -> str | None:
    """What a text, or a conversation of one message of such a role, says; None where it is neither."""
    if isinstance(told, Sequence) and len(told) == 1 and isinstance(told[0], Mapping):
        told = told[0].get("content") if told[0].get("role") in roles else None
    return told if isinstance(told, str) and is_unicode(told) else None


def _per_token(where: str, column: Any, keep: np.ndarray) -> np.ndarray | None:
    if column is None:
        return None
    with np.errstate(over="ignore"):  # infinity is refused below
        values = _flat(where, "log-probs", column).astype(np.float32)
    if len(values) != len(keep):
        raise InputError(
            f"log-probs must be as many as response positions: {where} has {len(values)} for {len(keep)}; "
            "dump them alike"
        )
    values = values[keep]
    if not np.isfinite(values).all() or (values > 1e-3).any():
        raise InputError(
            f"log-probs must be finite and at most 0: {where} has {values.min()} to {values.max()}; leave "
            "that row out"
        )
    return values


def _reward(where: str, fields: Fields, name: str) -> float:
    if name and name not in fields:
        raise InputError(f"--reward names a column: {where} has {', '.join(fields)}, no {name}; name one")
    column = name or next((known for known in REWARDS if known in fields), "")
    if not column:
        numbers = [
            other
            for other, number in fields.items()
            if other not in _NO_REWARD and isinstance(number, int | float) and not isinstance(number, bool)
        ]
        if len(numbers) != 1:
            raise InputError(
                f"a rollout must have a reward: {where} has {', '.join(numbers) or 'no column of numbers'}; "
                "name one with --reward"
            )
        column = numbers[0]
    values = np.asarray(fields[column], np.float64)
    if not values.size:
        raise InputError(
            f"a reward must be a number: {where} has none in {column}; leave that row out, or name another "
            "column with --reward"
        )
    total = float(np.sum(values))
    if not abs(total) <= _LARGEST:  # false for NaN
        raise InputError(
            f"a reward must be a finite number: {where} has {total} in {column}; leave that row out, or name "
            "another column with --reward"
        )
    return total
