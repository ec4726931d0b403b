"""What a compiled program sends between devices, read from its HLO text with the trip counts of its loops."""

import math
import re
from typing import NamedTuple

import numpy as np

BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f32": 4, "s32": 4, "u32": 4, "f64": 8,
         "s64": 8, "u64": 8}
KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")
BETWEEN_SLICES = " between slices"
CALL = re.compile(rf" ({'|'.join(KINDS)})(-start)?\(")
# How TPU programs send to other slices: by way of the host, the kind of collective being a note.
HOSTS = re.compile(r" send\(.*_xla_megascale_target=\"\{([\d,]+)\}.*_xla_megascale_transfer_type=\"(\w+)\"")
# What one device sends in a ring of n, as a part of the array that all of them hold together (of a device's own array
# for the last three): a gather or a scatter passes n - 1 of n pieces on, a reduction does both.
SENT_FRACTION = {
    "all-gather": lambda n: (n - 1) / n, "reduce-scatter": lambda n: (n - 1) / n, "all-reduce": lambda n: 2 *
    (n - 1) / n, "all-to-all": lambda n: (n - 1) / n, "collective-permute": lambda n: 1
}


class Traffic(NamedTuple):
    """How often one kind of collective runs, and the bytes that a device sends for it."""

    calls: int
    bytes: float


def communication(text: str, slice_size: int | None = None) -> dict[str, Traffic]:
    """Traffic of one run of a compiled program (`compiled.as_text()`), by kind of collective; {} on one device.

    A loop whose length the text does not state counts once. Collectives among one device only are left out. With
    slice_size, the devices of a slice (numbered slice by slice), those that join devices of several slices are of kinds
    of their own, BETWEEN behind their names. In programs for TPUs these are so anyway.
    """
    found: dict[tuple[str, str], Traffic] = {}  # by kind and channel: an asynchronous one appears in several places
    computations = _computations(text)
    for name, times in _multiplicities(computations).items():
        for line in computations[name]:
            call, hosts = CALL.search(line), HOSTS.search(line)
            if hosts:
                kind = hosts[2].lower().replace("_", "-")
                size = times * _bytes(line.partition(" = ")[2].partition(", u32[]")[0])
                found[kind + BETWEEN_SLICES, line] = Traffic(times,
                                                             size * SENT_FRACTION[kind](len(hosts[1].split(","))))
            if call is None:
                continue
            kind, size = _kind_and_bytes(name, call, line)
            devices = _group_size(line)
            if devices > 1:
                channel = re.search(r"channel_id=(\d+)", line)
                between = slice_size is not None and _crosses(line, slice_size)
                key = kind + BETWEEN_SLICES * between, channel[1] if channel else line
                traffic = Traffic(times, times * size * SENT_FRACTION[kind](devices))
                found[key] = max(found.get(key, traffic), traffic)
    return {kind: Traffic(*(sum(values) for values in zip(*(t for (k, _), t in found.items() if k == kind))))
            for kind in (*KINDS, *(kind + BETWEEN_SLICES for kind in KINDS)) if any(k == kind for k, _ in found)}


def _computations(text: str) -> dict[str, list[str]]:
    """Instruction lines by name of computation; the entry has the key "ENTRY"."""
    result, lines = {}, []
    for line in text.splitlines():
        header = re.match(r"(ENTRY )?%(\S+) .*\{$", line)
        if header:
            lines = result["ENTRY" if header[1] else header[2]] = []
        elif line.startswith("  "):
            lines.append(line)
    return result


def _multiplicities(computations: dict[str, list[str]]) -> dict[str, int]:
    """How often each computation runs (every branch of a conditional counts as taken)."""
    times = dict.fromkeys(computations, 0)

    def visit(name: str, factor: int) -> None:
        times[name] += factor
        for line in computations[name]:
            loops = _trip_count(line, computations) if " while(" in line else 1
            for callee in re.findall(r"(?:body|condition|calls|to_apply|\w+_computation)=%([^\s,)]+)", line):
                visit(callee, factor * loops)
            for branches in re.findall(r"branch_computations=\{([^}]*)\}", line):
                for callee in re.findall(r"%([^\s,]+)", branches):
                    visit(callee, factor)

    visit("ENTRY", 1)
    return times


def _trip_count(line: str, computations: dict[str, list[str]]) -> int:
    """From the compiler's note, else from the loop's condition `counter < constant` (loops of jax count from 0)."""
    noted = re.search(r'"known_trip_count":\{"n":"(\d+)"', line)
    if noted:
        return int(noted[1])
    name, *_ = re.findall(r"condition=%([^\s,]+)", line)
    condition = computations[name]
    matches = [re.search(r"constant\((\d+)\)", other) for other in condition]
    constants = [int(constant[1]) for constant in matches if constant]
    counts = len(constants) == 1 and any("direction=LT" in other for other in condition)
    return constants[0] if counts else 1


def _kind_and_bytes(computation: str, call: re.Match, line: str) -> tuple[str, float]:
    """Kind of the collective, and bytes of the array that SENT refers to, from the type of its result."""
    kind, devices = call[1], _group_size(line)
    type_ = line[:call.start()].partition(" = ")[2]
    size = _bytes(type_)
    if kind == "all-reduce" and computation.startswith("all-reduce-scatter"):  # how TPU programs write it
        return "reduce-scatter", size
    started = call[2] is not None  # its result holds the operand as well
    if kind == "all-gather" and started:
        return kind, size * devices / (devices + 1)
    if kind == "reduce-scatter":
        return kind, size * devices / (devices + 1) if started else size * devices
    return kind, size / 2 if kind == "collective-permute" and started else size


def _bytes(type_: str) -> int:
    """Of all arrays of a type as it is written."""
    return sum(BYTES.get(kind, 1) * math.prod(map(int, filter(None, dims.split(","))))
               for kind, dims in re.findall(r"(\w+)\[([\d,]*)\]", type_))


def _group_size(line: str) -> int:
    """Devices that one collective runs among; 2 for a permutation (its pairs)."""
    groups = _groups(line)
    return 2 if groups is None else len(groups[0])


def _crosses(line: str, slice_size: int) -> bool:
    """Whether a collective joins devices of several slices; one that names no devices joins all."""
    groups = _groups(line)
    return groups is None or any(len({device // slice_size for device in group}) > 1 for group in groups)


def _groups(line: str) -> list[list[int]] | None:
    """The devices that a collective runs among, each group by itself (of a permutation its pairs); None if it does not
    say."""
    explicit = re.search(r"(?:replica_groups|source_target_pairs)=\{(\{[\d,{}]*\})\}", line)
    if explicit:
        return [[int(device) for device in group.split(",")] for group in re.findall(r"\{([\d,]+)\}", explicit[1])]
    iota = re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line)
    if iota:
        return _numbered(iota[3], iota[4]).reshape(int(iota[1]), int(iota[2])).tolist()
    by_axis = re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? "
                        r"\{([^}]*)\}", line)
    if by_axis is None:
        return None
    sizes = {axis: int(size) for axis, size in re.findall(r"'(\w+)'=(\d+)", by_axis[1])}
    shape = ",".join(map(str, sizes.values()))
    devices = _numbered(by_axis[2] or shape, by_axis[3]).reshape(tuple(sizes.values()))
    group_axes = [list(sizes).index(axis) for axis in re.findall(r"'(\w+)'", by_axis[4])]
    count = math.prod(devices.shape[axis] for axis in group_axes)
    return np.moveaxis(devices, group_axes, range(-len(group_axes), 0)).reshape(-1, count).tolist()


def _numbered(shape: str, order: str | None) -> np.ndarray:
    """0, 1, 2, ... in that shape, its axes then in that order."""
    sizes = tuple(map(int, shape.split(",")))
    numbers = np.arange(math.prod(sizes)).reshape(sizes)
    return numbers.transpose(tuple(map(int, order.split(",")))) if order else numbers
