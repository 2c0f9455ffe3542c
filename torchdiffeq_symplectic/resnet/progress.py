"""Progress bars for what takes long with deep networks; none where nobody looks."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import rich.progress

__all__ = ["Progress", "showing"]


class Progress:
    """Stages of work, each with a bar.

    Args:
        bars: where they are drawn, or None.
    """

    def __init__(self, bars: rich.progress.Progress | None) -> None:
        self._bars = bars

    @contextlib.contextmanager
    def stage(self, name: str, total: int) -> Iterator[Callable[[], None]]:
        """A stage of ``total`` parts; what is yielded is called after each of them."""
        bars = self._bars
        if bars is None:
            yield lambda: None
            return
        task = bars.add_task(name, total=total)
        yield lambda: bars.advance(task)


@contextlib.contextmanager
def showing(wanted: bool | None) -> Iterator[Progress]:
    """Progress on the standard error, if ``wanted``; by default where that is a terminal and rich is installed."""
    if wanted is None:
        wanted = sys.stderr is not None and sys.stderr.isatty() and _has_rich()
    if not wanted:
        yield Progress(None)
        return
    from rich.console import Console
    from rich.progress import Progress as Bars

    with Bars(console=Console(stderr=True)) as bars:
        yield Progress(bars)


def _has_rich() -> bool:
    try:
        import rich  # noqa: F401
    except ModuleNotFoundError:
        return False
    return True
