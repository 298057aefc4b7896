"""A look at the compiled form of a warp-specialized kernel for a fault that no interpreter shows."""

import re


def halved_ranges(ttgir: str) -> tuple[int, int]:
    """Return how many row ranges warp specialization starts in the middle, and to how many it adds that offset again.

    Triton 3.7.1 halves a row block by starting its ranges in the middle, and adds the same offset to the row coordinate
    of the descriptors - in every use of that value. Rows computed as coordinate + range so lie half a block too far:
    their targets are read, and their sums written, where another block's are. No interpreter shows it.
    """
    num_halved = num_moved_twice = 0
    for partition in re.split(r"\n\s*partition\d+\(", ttgir)[1:]:
        offsets = re.findall(r"tt\.make_range .*start = ([1-9]\d*) ", partition)
        num_halved += len(offsets)
        for offset in set(offsets):
            moved = set(re.findall(rf"(%\S+) = arith\.addi %\S+, %c{offset}_i32", partition))
            num_moved_twice += sum(name in moved for name in re.findall(r"tt\.splat (%[^\s:]+)", partition))
    return num_halved, num_moved_twice
