"""Bytes that the devices send each other, read off a compiled program.

Collectives exist only after partitioning, so they are counted in the compiled text: what each device
receives of one, times the trips of the loops around it. Loops whose length only the data knows count once.
A TPU's compiler splits one that runs beside other work into fusions that begin it, go on with it and end it,
each with a copy of its line: that is one collective.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter
from typing import NamedTuple

_BYTES = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "f16": 2, "bf16": 2}
_BYTES |= {"s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8}
_SHAPE = re.compile(r"\b(pred|[sufb]f?\d+)\[([\d,]*)\]")
_COLLECTIVE = re.compile(
    r"= (?P<shape>.*?) (?P<kind>all-gather|all-reduce|reduce-scatter|all-to-all|ragged-all-to-all|"
    r"collective-permute)(?P<start>-start)?\("
)
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
_CALLED = re.compile(r"(?:calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)")
_CHANNEL = re.compile(r"channel_id=\d+")  # which collectives of shard_map have in common
_ORIGIN = re.compile(r'op_name="[^"]*"')
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_WHILE = re.compile(r" while\(.*condition=%?([\w.\-]+), body=%?([\w.\-]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_CONSTANT = re.compile(r"s32\[\][^=]* constant\((\d+)\)")


class _Collective(NamedTuple):
    kind: str
    size: int  # bytes that a device receives
    place: str  # the line that it stands in
    identity: str  # what its copies have in common


@dataclasses.dataclass
class _Computation:
    own: list[_Collective] = dataclasses.field(default_factory=list)
    parts: list[str] = dataclasses.field(default_factory=list)  # fusions and branches: of this computation
    calls: list[tuple[str, int]] = dataclasses.field(default_factory=list)  # callee, times
    constants: list[int] = dataclasses.field(default_factory=list)
    conjunction: bool = False  # of a loop's condition: it may also end for another reason


def collective_bytes(text: str) -> dict[str, int]:
    """Bytes each device receives in one call of a program, by kind of collective.

    Args:
      text: ``compiled.as_text()``.
    """
    computations, entry = _parse(text)
    whole: dict[str, Counter[str]] = {}

    def total(name: str) -> Counter[str]:
        if name not in whole:
            found: Counter[str] = Counter()
            own, calls = _with_parts(computations, name)
            for collective in own.values():
                found[collective.kind] += collective.size
            for callee, times in calls:
                for kind, size in total(callee).items():
                    found[kind] += times * size
            whole[name] = found
        return whole[name]

    return dict(total(entry))


def _with_parts(
    computations: dict[str, _Computation], name: str, *, part: bool = False
) -> tuple[dict[str, _Collective], list[tuple[str, int]]]:
    """The collectives and calls of a computation, those of its fusions among them."""
    here = computations[name]
    own = {one.identity if part else one.place: one for one in here.own}
    calls = list(here.calls)
    for inner in dict.fromkeys(here.parts):
        more, further = _with_parts(computations, inner, part=True)
        own |= more
        calls += further
    return own, calls


def _parse(text: str) -> tuple[dict[str, _Computation], str]:
    computations: dict[str, _Computation] = {}
    loops: list[tuple[_Computation, str, str, int | None]] = []
    entry, current = "", _Computation()
    for number, line in enumerate(text.splitlines()):
        head = _COMPUTATION.match(line)
        if head:
            current = computations[head[2]] = _Computation()
            entry = head[2] if head[1] else entry
            continue
        current.conjunction |= " and(" in line
        current.constants += [int(number) for number in _CONSTANT.findall(line)]
        collective = _COLLECTIVE.search(line)
        if collective:
            kind, size, place = collective["kind"], _received(line, collective), f"line {number}"
            channel, origin = _CHANNEL.search(line), _ORIGIN.search(line)
            said = [kind, *_SHAPE.findall(collective["shape"]), channel and channel[0], origin and origin[0]]
            # What has no channel is told apart by where it stands.
            current.own.append(_Collective(kind, size, place, str(said) if channel else place))
        loop = _WHILE.search(line)
        if loop:
            trips = _TRIPS.search(line)
            loops.append((current, loop[1], loop[2], int(trips[1]) if trips else None))
        if " call(" in line:  # as often as it is called
            current.calls += [(name, 1) for name in _CALLED.findall(line)]
        else:
            current.parts += _CALLED.findall(line)
        for names in _BRANCHES.findall(line):
            current.parts += [name.strip().lstrip("%") for name in names.split(",")]
    for caller, condition, body, known in loops:
        # A counted loop compares its counter with the one constant of its condition.
        ends = computations[condition]
        counted = len(ends.constants) == 1 and not ends.conjunction
        caller.calls.append((body, known or (ends.constants[0] if counted else 1)))
    return computations, entry


def _received(line: str, collective: re.Match[str]) -> int:
    """What one device receives: of n devices' result, all parts but its own."""
    kind, n = collective["kind"], _group_size(line)
    shape = collective["shape"]
    # An asynchronous start holds its operands before its results; that of a sum, its results alone.
    if collective["start"] and kind != "all-reduce":
        _, shape, *_ = _elements(shape)
    size = sum(
        math.prod(int(axis) for axis in axes.split(",") if axis) * _BYTES.get(dtype, 4)
        for dtype, axes in _SHAPE.findall(shape)
    )
    if n == 1:
        return 0
    if kind == "all-reduce":
        return 2 * size * (n - 1) // n
    if kind == "reduce-scatter":
        return size * (n - 1)
    return size if kind == "collective-permute" else size * (n - 1) // n


def _elements(shape: str) -> list[str]:
    """The shapes of a tuple, without layouts; those that are tuples themselves stay whole."""
    depth, elements = 0, [""]
    for character in re.sub(r"\{[^}]*\}|/\*.*?\*/", "", shape):
        depth += (character in "([") - (character in ")]")
        if character == "," and depth == 1:
            elements.append("")
        else:
            elements[-1] += character
    return elements


def _group_size(line: str) -> int:
    """How many devices take part in a collective together, in any of the forms that XLA writes.

    ``{{0,2},{1,3}}`` lists them, ``[2,4]<=[8]`` has two groups of four, and
    ``mesh['fsdp'=4,'tensor'=2] {'fsdp'}`` names axes, of which ``'fsdp':(2)2`` is a part.
    """
    if listed := re.search(r"replica_groups=\{\{([\d,]*)\}", line):
        return len(listed[1].split(","))
    if iota := re.search(r"replica_groups=\[(\d+),(\d+)\]", line):
        return int(iota[2])
    if named := re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", line):
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", named[1]))
        over = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", named[2])
        return math.prod(int(part or sizes[axis]) for axis, part in over)
    if " collective-permute" in line:
        return 2
    raise ValueError(
        f"the devices of a collective are written in a form not known here: {line.strip()[:200]}"
    )
