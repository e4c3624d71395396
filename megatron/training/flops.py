"""The floating-point operations of one step, counted as torch runs them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from megatron.config.profiling import FlopsProfilerConfig
from megatron.engine.observer import StepOutcome

_WHOLE = "Global"


class FlopsProfiler:
    """Counts one step; see :class:`megatron.engine.observer.StepObserver`."""

    def __init__(self, model: nn.Module, asked: FlopsProfilerConfig, file: Path) -> None:
        """Say what is counted.

        Args:
            model: whose modules are told apart (this rank's part of it).
            asked: which step, and how much is told.
            file: takes the profile.
        """
        self._model, self._asked, self._file = model, asked, file
        self._counter: FlopCounterMode | None = None

    def begin(self, step: int, *, loss_scale: float) -> None:
        """Start before the step that is asked for."""
        if step == self._asked.profile_step:
            self._counter = FlopCounterMode(display=False)
            self._counter.__enter__()  # type: ignore[no-untyped-call]

    def end(self, step: int, outcome: StepOutcome) -> Mapping[str, float]:
        """Write the profile after it."""
        if self._counter is None:
            return {}
        self._counter.__exit__(None, None, None)  # type: ignore[no-untyped-call]
        counts = {
            name: {str(operation): int(count) for operation, count in by_operation.items()}
            for name, by_operation in self._counter.get_flop_counts().items()
        }
        self._counter = None
        self._file.parent.mkdir(parents=True, exist_ok=True)
        text = "\n".join(profile_lines(counts, type(self._model).__name__, step, self._asked))
        self._file.write_text(text + "\n", encoding="utf-8")
        return {}


def profile_lines(
    counts: Mapping[str, Mapping[str, int]], model: str, step: int, asked: FlopsProfilerConfig
) -> Iterator[str]:
    """Yield a profile's lines.

    Args:
        counts: operations by module's dotted name (``Global`` is all) and by kind.
        model: name of the model's class, with which those names begin.
        step: that was counted.
        asked: how much is told.
    """
    whole = sum(counts.get(_WHOLE, {}).values())
    yield f"floating-point operations of step {step} on rank 0 (all micro-batches, forward,"
    yield "recomputation and backward; an addition and a multiplication are two)"
    yield f"total {whole:,}"
    sizes = {
        name.removeprefix(f"{model}."): sum(kinds.values())
        for name, kinds in counts.items()
        if name not in (_WHOLE, model)
    }
    depths = sorted({name.count(".") for name in sizes})
    shown = [depth for depth in depths if asked.module_depth < 0 or depth < asked.module_depth]
    for depth in shown:
        level = [name for name in sizes if name.count(".") == depth]
        level.sort(key=lambda name: (-sizes[name], name))
        yield ""
        yield f"most expensive at depth {depth + 1}"
        for name in level[: asked.top_modules]:
            yield f"  {name} {sizes[name]:,} ({_share(sizes[name], whole)})"
    if asked.detailed:
        yield ""
        yield "every module"
        yield from _detail(counts, model, whole, shown)


def _detail(
    counts: Mapping[str, Mapping[str, int]], model: str, whole: int, depths: list[int]
) -> Iterator[str]:
    for name, kinds in counts.items():
        own = name.removeprefix(f"{model}.")
        if name in (_WHOLE, model) or own.count(".") not in depths:
            continue
        total = sum(kinds.values())
        yield f"  {own} {total:,} ({_share(total, whole)})"
        for kind, count in sorted(kinds.items()):
            yield f"    {kind} {count:,}"


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if whole else "–"
