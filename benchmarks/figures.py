"""What a file of results says, arranged for reading: by op, direction and size, the ways side by side."""

import math
import re
from typing import Any, NamedTuple

DIRECTIONS = ("forward", "forward+backward")


class Case(NamedTuple):
    """One op at one size, timed several ways."""

    op: str
    direction: str
    size: str
    """"512x3x64x64", or whatever tells the case from others."""
    layout: str
    """"channels_last", "contiguous" or ""."""
    ways: dict[str, dict[str, Any]]
    """Way -> figures: "median seconds", "share" of the ceiling, ..."""

    @property
    def elements(self) -> int:
        return math.prod(int(number) for number in re.findall(r"\d+", self.size))


def cases(results: dict[str, dict[str, Any]]) -> list[Case]:
    """The ops that were timed alone, way by way, in the order of the file."""
    found: dict[tuple[str, str, str, str], dict[str, dict[str, Any]]] = {}
    for name, figures in results.items():
        if "way" in figures and "share" in figures:
            test, _, rest = name.removesuffix("]").partition("[")
            words = re.sub(rf"(^|-){re.escape(figures['way'])}(?=-|$)", "", rest, count=1).strip("-").split("-")
            direction = next((word for word in words if word in DIRECTIONS), "forward")
            layout = next((word for word in words if word in ("channels_last", "contiguous")), "")
            size = "-".join(word for word in words if word not in (direction, layout))
            key = (test.removeprefix("test_"), direction, size, layout)
            found.setdefault(key, {})[figures["way"]] = figures
    return [Case(*key, ways) for key, ways in found.items()]


def headlines(results: dict[str, dict[str, Any]], direction: str) -> list[Case]:
    """Of each op the largest size, as the networks lay it out: channels_last where both layouts were timed."""
    best: dict[str, Case] = {}
    for case in cases(results):
        if case.direction == direction:
            other = best.get(case.op)
            if other is None or (case.elements, case.layout == "channels_last") > (
                other.elements,
                other.layout == "channels_last",
            ):
                best[case.op] = case
    return list(best.values())


def table(content: dict[str, Any]) -> str:
    """Ops alone: time and share of the ceiling; then the paired comparisons: ratio to the way they are held against."""
    results = content["results"]
    lines = ["", f"{content['machine'].get('GPU 0', content['machine']['CPU'])}, {content['commit']}"]
    for name in ("test_copy", "test_matmul", "test_convolution"):
        rates = [f"{results[name][unit]:.4g} {unit}" for unit in ("GB/s", "TFLOP/s") if unit in results.get(name, {})]
        lines += [f"ceiling, {name.removeprefix('test_')}: {rate}" for rate in rates]
    for direction in DIRECTIONS:
        chosen = headlines(results, direction)
        if chosen:
            lines += ["", f"{direction}: microseconds (share of the ceiling)"]
        for case in chosen:
            ways = "  ".join(
                f"{way} {figures['median seconds'] * 1e6:.4g} ({figures['share']:.0%})"
                for way, figures in case.ways.items()
            )
            lines.append(f"  {case.op:<18} {' '.join(filter(None, (case.size, case.layout))):<28} {ways}")
    paired = {name: figures for name, figures in results.items() if "ratios" in figures}
    if paired:
        lines += ["", "in place: time over that of the way that is 1"]
    for name, figures in paired.items():
        ratios = "  ".join(f"{way} {ratio:.2f}" for way, ratio in figures["ratios"].items())
        lines.append(f"  {name.removeprefix('test_'):<48} {ratios}")
    return "\n".join(lines)
