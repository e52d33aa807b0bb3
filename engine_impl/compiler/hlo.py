"""Reads the optimised HLO text of a compiled TPU or GPU program: what it copies, calls, launches and communicates.

The text is what `jax.stages.Compiled.as_text()` gives. Executions are those of every step: a loop's body counts as
often as the loop runs, the branches of a conditional do not count (ours are for slots that sample).
"""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass

_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-<>]+) .*\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)$")
_ARRAY = re.compile(r"\b([a-z]+\d*\w*)\[([\d,]*)\](?:\{([^}]*)\})?")
_CALLEES = re.compile(
    r"(?:body|condition|to_apply|calls|called_computation|branch_computations)=\{?%?([\w.\-]+(?:, ?%[\w.\-]+)*)"
)
_ALIASED = re.compile(r"\{(\d*)\}: \((\d+), \{\}\)")  # an output and the operand whose place it takes
_BITS = re.compile(r"\d+")

Taint = set[tuple[str, str, int]]
"""(computation, instruction, index of the array in its result)"""

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")

_COPYING = {
    "copy", "copy-start", "transpose", "reshape", "slice", "slice-start", "dynamic-slice", "gather", "concatenate",
    "pad", "convert", "select", "reverse", "broadcast", "fusion", "async-start",
}  # fmt: skip
_FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "while", "conditional", "call",
    "async-start",
}  # fmt: skip
_UPDATING = {"dynamic-update-slice", "scatter"}
_LAUNCHED = {"fusion", "custom-call", "copy", "transpose", "sort"}


@dataclass(frozen=True)
class Array:
    """One array of an instruction's result."""

    dtype: str
    shape: tuple[int, ...]
    layout: str

    @property
    def bytes(self) -> int:
        """Without tile padding."""
        bits = _BITS.search(self.dtype)
        return math.prod(self.shape) * (int(bits[0]) if bits else 8) // 8

    @property
    def is_on_chip(self) -> bool:
        """In VMEM (memory space 1), or in CMEM (3), the 128 MiB between VMEM and HBM that a v4 has."""
        return "S(1)" in self.layout or "S(3)" in self.layout


@dataclass(frozen=True)
class Instruction:
    """One line."""

    name: str
    opcode: str
    result: tuple[Array, ...]
    operands: tuple[str, ...]
    callees: tuple[str, ...]
    is_root: bool
    text: str


class Program:
    """A parsed module: computations by name, their instructions in order."""

    def __init__(self, hlo_text: str) -> None:
        self.computations: dict[str, dict[str, Instruction]] = {}
        self.entry = ""
        current: dict[str, Instruction] | None = None
        for line in hlo_text.splitlines():
            if current is None:
                header = _HEADER.match(line)
                if header and "->" in line:
                    current = self.computations[header[2]] = {}
                    self.entry = header[2] if header[1] else self.entry
            elif line == "}" or line.startswith("}, execution_thread="):  # other lines may start with a brace, too
                current = None
            elif parsed := _parse(line):
                current[parsed.name] = parsed

    def pallas_calls(self) -> dict[str, int]:
        """Executions of each Pallas kernel, by the kernel's name without its sizes."""
        calls: Counter[str] = Counter()
        for instruction, times in self._executed():
            if instruction.opcode == "custom-call" and '"tpu_custom_call"' in instruction.text:
                calls[re.split(r"[_.]\d|\.", instruction.name)[0]] += times
        return dict(calls)

    def operations(self) -> int:
        """Executions of whatever a chip is started for: fusions, kernels, copies, collectives; an asynchronous one
        counts once."""
        return sum(
            times
            for instruction, times in self._executed()
            if instruction.opcode not in _FREE and not instruction.opcode.endswith("-done")
        )

    def collectives(self) -> dict[str, int]:
        """Executions of each collective operation."""
        counts: Counter[str] = Counter()
        for instruction, times in self._executed():
            opcode = instruction.opcode.removesuffix("-start")
            if opcode in COLLECTIVES:
                counts[opcode] += times
        return dict(counts)

    def estimated_cycles(self) -> int:
        """Sum of the compiler's own estimates. It knows fusions only, neither Pallas calls nor collectives, and is off
        by a factor of about two: for comparing two versions of one program."""
        estimate = re.compile(r'"estimated_cycles":"(\d+)"')
        found = ((estimate.search(instruction.text), times) for instruction, times in self._executed())
        return sum(int(match[1]) * times for match, times in found if match and int(match[1]) < 2**40)

    def launches(self) -> tuple[int, int]:
        """(Kernels that a GPU program starts outside loops of an unknown number of turns, those in one turn of each).

        Before each turn of such a loop, and once more to leave it, the host waits for the loop's condition.
        """
        looped: dict[str, int] = {}
        for instruction, times in self._executed():
            if instruction.opcode == "while" and self._known_trips(instruction) is None:
                inside: defaultdict[str, int] = defaultdict(int)
                for callee in instruction.callees:
                    self._count(callee, times, inside)
                looped |= {name: looped.get(name, 0) + count for name, count in inside.items()}
        total = sum(times for instruction, times in self._executed() if instruction.opcode in _LAUNCHED)
        turns = sum(
            times
            for name, times in looped.items()
            for instruction in self.computations[name].values()
            if instruction.opcode in _LAUNCHED
        )
        return total - turns, turns

    def floats_of(self, shape: tuple[int, ...]) -> list[str]:
        """Instructions whose result is an array of floats with these dimensions, in any order, in HBM or VMEM."""
        wanted = sorted(shape)
        return [
            instruction.name
            for instruction, _ in self._executed()
            for array in instruction.result
            if array.dtype in ("bf16", "f16", "f32") and sorted(n for n in array.shape if n > 1) == wanted
        ]

    def loop_slices(self, threshold_bytes: int) -> list[str]:
        """Instructions in loops that do nothing but take a slice of at least so many bytes out of an array, for another
        to work on: a product that reads its layer's weights from the stack has no need of one."""
        return [
            instruction.name
            for instruction, times in self._executed()
            if times > 1 and self._is_slice(instruction) and instruction.result[0].bytes >= threshold_bytes
        ]

    def _is_slice(self, instruction: Instruction) -> bool:
        """A dynamic slice, or a fusion of one with bitcasts."""
        if instruction.opcode == "fusion":
            body = self.computations[instruction.callees[0]]
            result = next(i for i in body.values() if i.is_root)
            while result.opcode == "bitcast":
                result = body[result.operands[0]]
            return result.opcode == "dynamic-slice"
        return instruction.opcode == "dynamic-slice"

    def copies_of(self, shape: tuple[int, ...], threshold_bytes: int, *, on_chip: bool = False) -> list[str]:
        """Instructions that copy, transpose, slice or relayout the parameter of this shape, or what came of it.

        Counted are results in HBM of at least `threshold_bytes`. An update in place is no copy; nor is a result in
        VMEM or CMEM, which is the compiler's prefetch, unless `on_chip` asks for these too: a kernel that fetches its
        own part of the parameter needs none.
        """
        tainted = self._taint(shape, threshold_bytes)
        fused = {
            name for c in self.computations.values() for i in c.values() if i.opcode == "fusion" for name in i.callees
        }
        found = []
        for computation, instructions in self.computations.items():
            if computation in fused:
                continue
            for instruction in instructions.values():
                comes_from_it = any((computation, operand, 0) in tainted for operand in instruction.operands)
                made = [array for array in _made(instruction) if on_chip or not array.is_on_chip]
                large = any(array.bytes >= threshold_bytes for array in made)
                if (
                    instruction.opcode in _COPYING
                    and comes_from_it
                    and large
                    and not self._updates_in_place(instruction)
                ):
                    found.append(instruction.name)
        return found

    def _updates_in_place(self, instruction: Instruction) -> bool:
        """A fusion that ends in an update of one of its own parameters, seen through bitcasts and fusions that give
        their operand back (as XLA puts them around an int8 array with a kernel's tiles)."""
        if instruction.opcode != "fusion":
            return False
        body = self.computations[instruction.callees[0]]
        result = next(i for i in body.values() if i.is_root)
        while result.opcode == "bitcast":
            result = body[result.operands[0]]
        if result.opcode not in _UPDATING:
            return False
        target = body[result.operands[0]]
        while target.opcode == "bitcast" or "output_to_operand_aliasing={{}: (0, {})}" in target.text:
            target = body[target.operands[0]]
        return target.opcode == "parameter"

    def _taint(self, shape: tuple[int, ...], threshold_bytes: int) -> Taint:
        """All that comes from the parameter and is large."""
        tainted = {
            (self.entry, i.name, 0)
            for i in self.computations[self.entry].values()
            if i.opcode == "parameter" and len(i.result) == 1 and i.result[0].shape == shape
        }
        size = 0
        while len(tainted) != size:
            size = len(tainted)
            for computation, instructions in self.computations.items():
                for instruction in instructions.values():
                    tainted |= self._flow(computation, instruction, tainted, threshold_bytes)
        return tainted

    def _flow(self, computation: str, instruction: Instruction, tainted: Taint, threshold_bytes: int) -> Taint:
        """What one instruction taints, given what is tainted already."""

        def of(operand: str) -> set[int]:
            return {i for i in range(_width(instructions, operand)) if (computation, operand, i) in tainted}

        instructions, name, opcode = self.computations[computation], instruction.name, instruction.opcode
        if opcode == "tuple":
            return {(computation, name, k) for k, operand in enumerate(instruction.operands) if of(operand)}
        if opcode == "get-tuple-element":
            match = re.search(r"index=(\d+)", instruction.text)
            assert match
            return {(computation, name, 0)} if int(match[1]) in of(instruction.operands[0]) else set()
        if opcode in ("while", "conditional", "call"):
            return self._flow_into(computation, instruction, of, tainted)
        if '"tpu_custom_call"' in instruction.text:  # what a kernel makes of the array is its own, unless in place
            aliased = [(out or "0", int(operand)) for out, operand in _ALIASED.findall(instruction.text)]
            return {(computation, name, int(out)) for out, operand in aliased if of(instruction.operands[operand])}
        if not any(of(operand) for operand in instruction.operands):
            return set()
        return {(computation, name, k) for k, array in enumerate(instruction.result) if array.bytes >= threshold_bytes}

    def _flow_into(
        self, computation: str, instruction: Instruction, of: Callable[[str], set[int]], tainted: Taint
    ) -> Taint:
        """Operands become the callees' parameters, the callees' roots the result; a loop's carry keeps its places."""
        found = set()
        for k, callee in enumerate(instruction.callees):
            parameters = [i.name for i in self.computations[callee].values() if i.opcode == "parameter"]
            given = instruction.operands[k + 1 : k + 2] if instruction.opcode == "conditional" else instruction.operands
            for parameter, operand in zip(parameters, given, strict=False):
                found |= {(callee, parameter, index) for index in of(operand)}
            if instruction.opcode != "while":
                root = next(i.name for i in self.computations[callee].values() if i.is_root)
                found |= {
                    (computation, instruction.name, index)
                    for where, at, index in tainted
                    if (where, at) == (callee, root)
                }
        if instruction.opcode == "while":
            found |= {(computation, instruction.name, index) for index in of(instruction.operands[0])}
        return found

    def _executed(self) -> Iterator[tuple[Instruction, int]]:
        """Every instruction outside fusions with the number of its executions."""
        times: defaultdict[str, int] = defaultdict(int)
        self._count(self.entry, 1, times)
        for computation, count in times.items():
            for instruction in self.computations[computation].values():
                yield instruction, count

    def _count(self, computation: str, count: int, times: defaultdict[str, int]) -> None:
        times[computation] += count
        for instruction in self.computations[computation].values():
            if instruction.opcode in ("while", "call", "async-start"):
                inner = count * (self._trips(instruction) if instruction.opcode == "while" else 1)
                for callee in instruction.callees:
                    self._count(callee, inner, times)

    def _trips(self, loop: Instruction) -> int:
        """How often a while loop runs; once, where nobody knows."""
        known = self._known_trips(loop)
        return 1 if known is None else known

    def _known_trips(self, loop: Instruction) -> int | None:
        """What XLA found out, else the largest bound in its condition, if there is one."""
        known = re.search(r"known_trip_count[^0-9]*(\d+)", loop.text)
        if known:
            return int(known[1])
        condition = re.search(r"condition=%?([\w.\-]+)", loop.text)
        assert condition
        bounds = [
            int(match[1])
            for instruction in self.computations[condition[1]].values()
            if (match := re.search(r" constant\((\d+)\)", instruction.text))
        ]
        return max(bounds, default=None)


def _made(instruction: Instruction) -> tuple[Array, ...]:
    """What an instruction makes. The start of an asynchronous one has its operand in its result too."""
    if instruction.opcode == "slice-start":
        return instruction.result[1:2]
    return instruction.result[:1] if instruction.opcode.endswith("-start") else instruction.result


def _width(instructions: dict[str, Instruction], name: str) -> int:
    return len(instructions[name].result) if name in instructions else 0


def _parse(line: str) -> Instruction | None:
    match = _INSTRUCTION.match(line)
    if match is None:
        return None
    root, name, result, opcode, rest = match.groups()
    inside, attributes = _split_at_closing(rest)
    callees = [callee.strip().lstrip("%") for group in _CALLEES.findall(attributes) for callee in group.split(",")]
    return Instruction(
        name=name,
        opcode=opcode,
        result=tuple(
            Array(dtype, tuple(int(n) for n in shape.split(",") if n), layout or "")
            for dtype, shape, layout in _ARRAY.findall(result)
        ),
        operands=tuple(re.findall(r"%([\w.\-]+)", inside)),
        callees=tuple(callees),
        is_root=bool(root),
        text=line,
    )


def _split_at_closing(text: str) -> tuple[str, str]:
    """What stands before the parenthesis that closes the operands, and what after."""
    depth = 1
    for position, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if not depth:
            return text[:position], text[position + 1 :]
    return text, ""
