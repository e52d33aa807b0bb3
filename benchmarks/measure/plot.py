"""Curves in a file, by matplotlib."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...engine_impl.errors import RefusedError

SUFFIXES = (".svg", ".png")
DPI = 72
"""Pixels per inch of a PNG: a panel is 324 pixels wide."""


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One pair of axes: each series has its x and y."""

    title: str
    x: str
    y: str
    series: Mapping[str, tuple[Sequence[float], Sequence[float | None]]]


def check_plot(path: Path) -> None:
    """Raises RefusedError for a file that cannot be drawn, before anything is measured for it."""
    if path.suffix not in SUFFIXES:
        raise RefusedError(f"plot={str(path)!r} must end in one of {', '.join(SUFFIXES)}")
    if not path.absolute().parent.is_dir():
        raise RefusedError(f"plot={str(path)!r}: the folder {path.absolute().parent} does not exist")
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise RefusedError("--plot needs matplotlib: pip install 'slipstream-llm[bench]'") from error


def draw(path: Path, panels: Sequence[Panel]) -> None:
    """The panels side by side, y from zero. An SVG's texts stay text, with few ticks, so that the file is small."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.5 * len(panels), 3.6), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)  # no display needed
    for panel, axes in zip(panels, figure.subplots(1, len(panels), squeeze=False)[0], strict=True):
        for name, (x, y) in panel.series.items():
            axes.plot(x, [float("nan") if value is None else value for value in y], marker="o", label=name)
        axes.set(title=panel.title, xlabel=panel.x, ylabel=panel.y)
        axes.set_ylim(bottom=0)
        axes.locator_params(nbins=5)
        axes.grid(axis="y", alpha=0.3)
        if len(panel.series) > 1:
            axes.legend()
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        figure.savefig(path)


def plot_loads(path: Path, pattern: str, results: Sequence[dict[str, Any]]) -> None:
    """Latency and throughput against load; of two servers, both."""
    x_name = "requests in flight" if pattern == "closed" else "requests / s"
    loads = [result["load"] for result in results]
    sides = {"": results}
    if "versus" in results[0]:
        sides = {"": results, "versus ": [result["versus"] for result in results]}
    panels = [
        Panel(
            title=title,
            x=x_name,
            y="ms",
            series={
                f"{side}{q}": (loads, [row[name][q] for row in rows])
                for side, rows in sides.items()
                for q in ("p50", "p90", "p99")
            },
        )
        for title, name in (
            ("Time to first token", "ttft_ms"),
            ("Time per output token", "tpot_ms"),
            ("End to end", "e2e_ms"),
        )
    ]
    speed = {f"{side}tokens / s": (loads, [row["tokens_per_second"] for row in rows]) for side, rows in sides.items()}
    draw(path, [*panels, Panel(title="Throughput", x=x_name, y="tokens / s", series=speed)])
