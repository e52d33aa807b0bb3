"""Reads a kernel's final program as the TPU compiler dumps it: VLIW bundles, one a cycle, and the branches among them.

The dump is libtpu's, asked for by `--xla_jf_dump_to=DIR --xla_jf_dump_llo_text=true
--xla_jf_dump_llo_pass_label_regex=final`. A Pallas kernel is one loop over its grid, XLA's own programs may nest them.
What a loop does conditionally is a region that a forward branch jumps over; the bundles right behind a branch, its
delay slots, run either way.

Bundles count what is issued. Waiting for a DMA or for a semaphore comes on top, and is not in the text.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

_BUNDLE = re.compile(r"^\s*(?:0x[0-9a-f]+|0)\s+(?:LH|LB|LE|PB|PF|CT)?\s*: [> ]*\{")
_BRANCH = re.compile(r"sbr\.rel (\(!?%p\w+\) )?target = \$region(\d+)")
_FILE = re.compile(r"\d+-(.+?)(?:\.\d+)?-\d+-final_bundles\.txt")


@dataclass(frozen=True)
class Region:
    """Bundles [start, end) that the branch at `branch` can jump over."""

    branch: int
    start: int
    end: int


@dataclass(frozen=True)
class LloProgram:
    """One kernel. The loop, over the grid of a Pallas kernel, is its bundles [start, end)."""

    bundles: tuple[str, ...]
    start: int
    end: int
    regions: tuple[Region, ...]
    """of the loop, in the order of the program"""

    def of(self, operation: str) -> tuple[Region, ...]:
        """The innermost regions that hold an operation, given by how its name begins: "vmat" for a matrix product."""
        issues = re.compile(rf"= {operation}|\b{operation}\w*\.")
        holding = [r for r in self.regions if any(issues.search(text) for text in self.bundles[r.start : r.end])]
        return tuple(r for r in holding if not any(r.start <= inner.start < r.end for inner in holding if inner != r))

    def count(self, operation: str) -> int:
        """How often one round of the loop issues an operation, given by how its name begins."""
        issues = re.compile(rf"(?<!for )%\w+ = {operation}")  # a check of its bounds names it too: "for %7 = dma..."
        return sum(len(issues.findall(text)) for text in self.bundles[self.start : self.end])

    def stages(self) -> set[Region]:
        """The outermost regions: the pipeline's stages, jumped over only in the grid's first or last rounds."""
        return {r for r in self.regions if not any(o.start <= r.start < o.end for o in self.regions if o != r)}

    def issued(self, entered: Iterable[Region]) -> int:
        """Bundles of one round of the loop that enters these regions and jumps over the others."""
        entered = set(entered)
        jumps = {r.branch: r for r in self.regions if r not in entered}
        count, at = 0, self.start
        while at < self.end:
            jump = jumps.get(at)
            count += 1 if jump is None else jump.start - at
            at = at + 1 if jump is None else jump.end
        return count


def parse(text: str, delay_slots: int, loop_of: str = "") -> LloProgram:
    """The program in the text of a `*-final_bundles.txt`, for a chip with so many delay slots behind a branch.

    Of several loops the innermost that issues the operation `loop_of`.

    Raises ValueError unless there is exactly one such loop, which is what a Pallas grid becomes, that ends behind those
    slots.
    """
    bundles: list[str] = []
    for line in text.splitlines():
        if _BUNDLE.match(line):
            bundles.append(line)
        elif bundles:  # a DMA's description goes on over several lines
            bundles[-1] += "\n" + line
    branches = [(at, match[2]) for at, bundle in enumerate(bundles) if (match := _BRANCH.search(bundle))]
    targets = {name: _start_of(bundles, name) for _, name in branches}
    back = [(at, targets[name]) for at, name in branches if targets[name] <= at]
    back = [(at, to) for at, to in back if any(loop_of in text for text in bundles[to:at])]
    back = [loop for loop in back if not any(loop[1] < to and at < loop[0] for at, to in back)]
    if len(back) != 1:
        raise ValueError(
            f"{len(back)} loops in a program of {len(bundles)} bundles and {len(branches)} branches, not 1"
        )
    ((last, start),) = back
    end = last + 1 + delay_slots
    if "End region" not in bundles[end - 1]:
        raise ValueError(f"no end of a region {delay_slots=} behind the loop's last branch, at bundle {last:#x}")
    regions = [
        Region(at, at + 1 + delay_slots, targets[name])
        for at, name in branches
        if start <= at and at + 1 + delay_slots < targets[name] <= end
    ]
    return LloProgram(tuple(bundles), start, end, tuple(regions))


def _start_of(bundles: list[str], region: str) -> int:
    label = re.compile(rf"(?:Start|Start/End empty) region {region}\b")
    for at, bundle in enumerate(bundles):
        if label.search(bundle):
            return at
    raise ValueError(f"a branch goes to {region=}, which starts nowhere")


def programs(dump: Path) -> dict[str, str]:
    """The text of every final program in a dump, by the name of its HLO instruction without the number at its end."""
    return {
        match[1]: path.read_text(errors="replace")
        for path in sorted(dump.iterdir())
        if (match := _FILE.fullmatch(path.name))
    }
