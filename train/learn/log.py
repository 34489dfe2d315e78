"""What a run says while it goes on: a line of JSON a step, a line for people, TensorBoard's events.

TensorBoard is used where it is installed; nothing is said where it is not.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from types import TracebackType
from typing import Any, Protocol, Self

from manifests import paths
from train.learn.lines import Lines

LOG = "log.jsonl"
MEASURED = (
    *("seconds", "tokens_per_s", "images_per_s", "mfu", "hfu"),
    *("data_seconds", "checkpoint_seconds", "memory_bytes"),
)
"""Fields of a step's line that differ from run to run: clocks and memory."""
Entry = dict[str, Any]
Say = Callable[[str], None]

_NO_SCALARS = ("step", "dropped_reasons")
_GIB = 2**30


class ScalarWriter(Protocol):
    """What TensorBoard's SummaryWriter is here."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> None:
        """Write a point of a curve."""

    def close(self) -> None:
        """Write what is left."""


class RunLog:
    """The log of a run, written by rank 0. As a context, it is whole at its end.

    total: steps of the whole run. steps_done: those of earlier attempts. every_seconds: between two
    lines for people; the first step and the last are always told.
    """

    def __init__(
        self,
        out: str,
        total: int,
        *,
        steps_done: int = 0,
        say: Say | None = None,
        every_seconds: float = 10.0,
    ) -> None:
        self._lines = Lines(out, LOG)
        self._scalars = tensorboard_writer(out, steps_done)
        self._total = total
        self._say = say
        self._every = every_seconds
        self._started = time.monotonic()
        self._steps_done = steps_done
        self._told = 0.0
        self._since: list[Entry] = []

    def add(self, entry: Entry) -> None:
        """Write what is known of a step."""
        self._lines.add([entry])
        if self._scalars is not None:
            for tag, value in scalars(entry):
                self._scalars.add_scalar(tag, value, entry["step"])
        self._since.append(entry)
        if self._say is not None and self._is_due(entry["step"]):
            self._say(line_of(self._since, self._total, self._seconds_left(entry["step"])))
            self._told, self._since = time.monotonic(), []

    def flush(self) -> None:
        """Put all steps where others can read them, on an object store too."""
        self._lines.flush()

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        """Write what is left."""
        self.flush()
        if self._scalars is not None:
            self._scalars.close()

    def _is_due(self, step: int) -> bool:
        is_edge = step in (self._steps_done, self._total - 1)
        return is_edge or time.monotonic() - self._told >= self._every

    def _seconds_left(self, step: int) -> float:
        per_step = (time.monotonic() - self._started) / (step + 1 - self._steps_done)
        return per_step * (self._total - step - 1)


def line_of(entries: list[Entry], total: int, seconds_left: float) -> str:
    """Return a line for people of the last steps: losses and rates are over all of them."""
    last = entries[-1]
    seconds = sum(one["seconds"] for one in entries)
    labels = sum(one["labels"] for one in entries)
    loss = sum(one["loss"] * one["labels"] for one in entries) / labels
    tokens, images, dropped = (
        sum(one[name] for one in entries) for name in ("tokens", "images", "dropped")
    )
    told = [
        f"step {last['step'] + 1}/{total}",
        f"loss {loss:.4f} ({_named(_latest_losses(entries), '.3f')})",
        f"{tokens / seconds:,.0f} tokens/s",
        f"{images / seconds:,.1f} images/s",
        f"MFU {sum(one['mfu'] * one['seconds'] for one in entries) / seconds:.1%}",
        f"padding {last['padding_share']:.1%}",
        *([f"{dropped} dropped"] if dropped else []),
        f"{last['memory_bytes'] / _GIB:.1f} GiB",
        f"gradient {_named(last['grad_norm'], '.3g')}",
        f"lr {_named(last['lr'], '.2g')}",
        f"{clock(seconds_left)} left",
    ]
    return ", ".join(told)


def scalars(entry: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, float]]:
    """Yield the curves' points of a step: (tag, value), e.g. ("loss_by_source/scans", 2.1)."""
    for name, value in entry.items():
        if isinstance(value, Mapping) and name not in _NO_SCALARS:
            yield from scalars(value, f"{above}{name}/")
        elif isinstance(value, int | float) and name not in _NO_SCALARS:
            yield f"{above}{name}", float(value)


def tensorboard_writer(out: str, steps_done: int) -> ScalarWriter | None:
    """Return a writer of events in a run's folder; None without TensorBoard or on a remote folder.

    Points of steps that come again, from steps_done on, replace those that are there.
    """
    if not paths.is_local(out):
        return None
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    writer: ScalarWriter = SummaryWriter(
        paths.join(paths.filesystem(out)[1], "events"), purge_step=steps_done
    )
    return writer


def clock(seconds: float) -> str:
    """Return a time in two units, e.g. 3 h 12 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min"


def _latest_losses(entries: list[Entry]) -> dict[str, float]:
    """Return each source's loss in the last step that had it."""
    return {name: loss for one in entries for name, loss in sorted(one["loss_by_source"].items())}


def _named(values: Mapping[str, float], form: str) -> str:
    return ", ".join(f"{name} {value:{form}}" for name, value in values.items())
