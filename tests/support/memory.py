"""Builds a run's engine on every rank and measures what a plan predicts: bytes of tensors."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import torch
import yaml
from support.gloo import run_ranks

import megatron.mixing  # noqa: F401
from megatron.config import load_config, resolve_batch
from megatron.parallel.rng import DropoutRng
from megatron.parallel.topology import Topology
from megatron.training.layout import run_layout
from megatron.training.plan import make_plan

BASE: dict[str, Any] = {
    "num_layers": 6,
    "hidden_size": 192,
    "num_attention_heads": 6,
    "seq_length": 256,
    "vocab_size": 2000,
    "optimizer": {"type": "Adam", "params": {"lr": 1e-3}},
    "train_micro_batch_size_per_gpu": 2,
    "gradient_accumulation_steps": 2,
    "train_iters": 2,
    "domains": {"a": {"train": ["nowhere"]}, "b": {"train": ["nowhere"]}},
}


def write(folder: Path, **changes: Any) -> Path:
    """Write a configuration; data is named, but never opened.

    Whatever ``changes`` holds of ``zero_optimization`` is completed with small buckets.
    """
    content = {**BASE, **changes}
    zero = {"stage": 1, "reduce_bucket_size": 3_000_000, **content.get("zero_optimization", {})}
    path = folder / "memory.yml"
    path.write_text(yaml.safe_dump({**content, "zero_optimization": zero}))
    return path


def compare(file: Path, world_size: int) -> list[tuple[int, str, float, float]]:
    """Measure on ``world_size`` fresh ranks and return (stage, quantity, measured, predicted).

    Of a stage's ranks the one that holds most is taken, as plans do.
    """
    measured = run_ranks(measure, world_size, file, timeout=300)
    config = load_config([str(file)])
    plan = make_plan(config, run_layout(config, world_size), on_cpu=True)
    rows = []
    for stage in plan.stages:
        held, activations = stage.states, stage.activations
        predicted = {
            "weights": held.weights,
            "gradients": held.gradients,
            "master": held.master,
            "moments": held.moments,
            "bucket": held.bucket,
            "activations": activations.saved,
            "in_flight": activations.in_flight,
        }
        own = [found for found in measured if found["stage"] == stage.stage]
        for name, value in predicted.items():
            rows.append((stage.stage, name, max(found[name] for found in own), float(value)))
    return rows


def measure(rank: int, world_size: int, file: Path) -> dict[str, float]:
    """Return bytes on this rank: states, buckets, activations; and micro-batches in flight."""
    meter = _build(rank, world_size, file)
    found = meter.activations()
    found.update(meter.step())
    found.update(meter.states())
    found["stage"] = meter.topology.stage
    return found


def traffic(rank: int, world_size: int, file: Path) -> dict[str, tuple[float, float]]:
    """Return the bytes that this rank sends in a step: (counted, planned) by axis of the layout.

    Counted is what torch's collectives are handed, sent as rings do; messages of less than a
    KiB (norms, shapes, flags) are no part of it.
    """
    meter = _build(rank, world_size, file)
    layout = meter.topology.layout
    counter = _Counter(layout)
    engine = meter.engine
    with counter:
        engine.train_step(1, iter(meter._batches()), lr=1e-3)
    plan = make_plan(meter.config, layout, on_cpu=True)
    sent = plan.stages[meter.topology.stage].sent
    planned = {
        "tensor": sent.get("tensor", 0.0),
        "data": sent.get("gradients", 0.0) + sent.get("weights", 0.0),
        "pipe": sent.get("pipeline", 0.0) + sent.get("tied embedding", 0.0),
    }
    return {axis: (counter.sent.get(axis, 0.0), value) for axis, value in planned.items()}


def _build(rank: int, world_size: int, file: Path) -> _Meter:
    from megatron.engine.runtime import start_runtime
    from megatron.training.engines import Batch, build_engine

    start_runtime(deterministic=False)
    config = load_config([str(file)])
    layout = run_layout(config, world_size)
    topology = Topology.create(layout, rank, sequence_parallel=config.parallel.sequence_parallel)
    batch = Batch(*resolve_batch(config.batch, layout.data_size))
    engine = build_engine(config, topology, batch, lambda *_: None)  # type: ignore[arg-type]
    return _Meter(engine, config, topology, batch)


class _Counter:
    """Counts what goes through torch.distributed while it is entered."""

    # Name, which argument says how much, and the share of it that a ring of k sends:
    # factor × (k − 1) / k of a tensor that is handed in (or, for gathers, comes out) whole.
    _RINGS: ClassVar = {
        "all_reduce": (0, 2),
        "all_gather_into_tensor": (0, 1),
        "all_gather_single": (0, 1),
        "reduce_scatter_tensor": (1, 1),
        "reduce_scatter_single": (1, 1),
        "all_gather": (0, 1),
        "_all_gather_base": (0, 1),
        "_reduce_scatter_base": (1, 1),
    }

    def __init__(self, layout: Any) -> None:
        self.sent: dict[str, float] = {}
        self.calls: dict[str, int] = {}
        self._layout = layout
        self._undo: list[Any] = []
        self._inside = False

    def __enter__(self) -> None:
        import deepspeed.comm.comm as backend
        import torch.distributed as dist

        from megatron.parallel import sequence

        for name, (argument, factor) in self._RINGS.items():
            if hasattr(dist, name):
                self._wrap(dist, name, self._ring(getattr(dist, name), argument, factor))
        for name, argument in (("_ALL_GATHER", 0), ("_REDUCE_SCATTER", 1)):
            self._wrap(sequence, name, self._ring(getattr(sequence, name), argument, 1))
        # DeepSpeed holds on to these two by themselves.
        for name, argument in (("all_gather_function", 0), ("reduce_scatter_function", 1)):
            held = self._ring(getattr(backend.cdb, name), argument, 1)
            self._wrap(backend.cdb, name, held)
        for name in ("send", "isend"):
            self._wrap(dist, name, self._message(getattr(dist, name)))

    def __exit__(self, *_: object) -> None:
        for module, name, original in self._undo:
            setattr(module, name, original)

    def _wrap(self, module: Any, name: str, wrapper: Any) -> None:
        self._undo.append((module, name, getattr(module, name)))
        setattr(module, name, wrapper)

    def _ring(self, original: Any, argument: int, factor: int) -> Any:
        import torch.distributed as dist

        def counted(*arguments: Any, **named: Any) -> Any:
            names = (
                ("tensor", "output_tensor", "output")
                if argument == 0
                else ("input_tensor", "input")
            )
            value = arguments[argument] if len(arguments) > argument else None
            if value is None:
                value = next(named[name] for name in names if name in named)
            size = sum(map(_bytes, value)) if isinstance(value, list) else _bytes(value)
            members = dist.get_process_group_ranks(named.get("group") or dist.group.WORLD)
            self._count(members, size, factor)
            return self._once(original, arguments, named)

        return counted

    def _message(self, original: Any) -> Any:
        def counted(*arguments: Any, **named: Any) -> Any:
            import torch.distributed as dist

            tensor = arguments[0] if arguments else named["tensor"]
            target = arguments[1] if len(arguments) > 1 else named["dst"]
            self._count([dist.get_rank(), target], _bytes(tensor), None)
            return self._once(original, arguments, named)

        return counted

    def _once(self, original: Any, arguments: Any, named: Any) -> Any:
        # One name of a collective may call another: it is still one.
        outer, self._inside = self._inside, True
        try:
            return original(*arguments, **named)
        finally:
            self._inside = outer

    def _count(self, members: list[int], size: float, factor: int | None) -> None:
        if self._inside or size < 1024:
            return
        axis = next(
            (
                name
                for name in ("tensor", "data", "pipe")
                if self._lies_in(members, getattr(self._layout, f"{name}_groups")())
            ),
            "other",
        )
        share = 1.0 if factor is None else factor * (len(members) - 1) / len(members)
        self.sent[axis] = self.sent.get(axis, 0.0) + share * size

    def _lies_in(self, members: list[int], groups: list[list[int]]) -> bool:
        return len(members) > 1 and any(set(members) <= set(ranks) for ranks in groups)


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


class _Meter:
    def __init__(self, engine: Any, config: Any, topology: Any, batch: Any) -> None:
        self.engine, self.config, self.topology, self.batch = engine, config, topology, batch
        self.deepspeed = engine._engine
        self.optimizer = self.deepspeed.optimizer
        self.parameters = list(engine.module.parameters())

    def states(self) -> dict[str, float]:
        """Bytes of weights, master weights and moments, after a step."""
        whole = hasattr(self.optimizer, "fp32_partitioned_groups_flat")
        weights = [one.ds_tensor if whole else one for one in self.parameters]
        master = next(
            getattr(self.optimizer, name)
            for name in (
                "fp32_partitioned_groups_flat",
                "single_partition_of_fp32_groups",
                "fp32_groups_flat_partition",
            )
            if hasattr(self.optimizer, name)
        )
        held = _storages(weights)
        state = self.optimizer.optimizer.state.values()
        moments = [value for one in state for value in one.values() if _many(value)]
        return {
            "weights": sum(held.values()),
            "master": sum(size for key, size in _storages(master).items() if key not in held),
            "moments": sum(_storages(moments).values()),
        }

    def step(self) -> dict[str, float]:
        """Bytes of accumulated gradients and of buckets, and micro-batches in flight."""
        found = {"gradients": 0.0, "bucket": 0.0, "in_flight": 0.0}
        self._watch_buckets(found)
        if self.topology.pipe_size > 1:
            self._watch_pipeline(found)
            self.engine.train_step(1, iter(self._batches()), lr=1e-3)
            return found
        for micro, (tokens, labels) in enumerate(self._batches()):
            self.engine._before_micro_batch(1, micro)
            self.engine._engine.backward(self.engine._engine(tokens, labels))
            if micro == 0:
                found["gradients"] = sum(_storages(self._gradients()).values())
            self.engine._engine.step()
        found["in_flight"] = 1.0
        return found

    def activations(self) -> dict[str, float]:
        """Bytes that one micro-batch's forward pass keeps: storages saved, each once."""
        seen: dict[int, tuple[int, torch.Tensor]] = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            own = {one.data.untyped_storage().data_ptr() for one in self.parameters}
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                # The tensor is kept, so that its address means nothing else meanwhile.
                seen.setdefault(storage.data_ptr(), (storage.nbytes(), tensor))
            return tensor

        def recomputed(rng: Any, function: Any, *inputs: torch.Tensor) -> Any:
            for value in inputs:
                keep(value)
            return original(rng, function, *inputs)

        original = DropoutRng.recomputed
        DropoutRng.recomputed = recomputed  # type: ignore[method-assign, assignment]
        value, labels = self._first_input()
        for tensor in (value, *labels[:2]):
            keep(tensor)
        self.engine._before_micro_batch(1, 0)
        try:
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                output = self._forward(value, labels)
        finally:
            DropoutRng.recomputed = original  # type: ignore[method-assign]
        kept = float(sum(size for size, _ in seen.values()))
        if not self.topology.is_last_stage:
            # DeepSpeed keeps it in parts where all tensor ranks hold the same.
            alike = 1 if self.topology.splits_sequence else self.topology.tensor_size
            kept += _bytes(output) / alike
        return {"activations": kept}

    def _forward(self, value: torch.Tensor, labels: Any) -> Any:
        if self.topology.pipe_size == 1:
            self.deepspeed.train()
            return self.deepspeed(value, labels)
        stage = self.engine.module
        output = stage(value)
        return stage.loss_fn(output, labels) if self.topology.is_last_stage else output

    def _first_input(self) -> tuple[torch.Tensor, Any]:
        tokens, labels = self._batches()[0]
        if self.topology.is_first_stage:
            return tokens, labels
        model = self.config.model
        length = model.context_length
        if self.config.parallel.sequence_parallel:
            length //= self.topology.tensor_size
        shape = (self.batch.micro, length, model.hidden_size)
        dtype = self.parameters[0].dtype
        return torch.randn(shape, dtype=dtype, requires_grad=True), labels

    def _batches(self) -> list[Any]:
        model, micro = self.config.model, self.batch.micro
        generator = torch.Generator().manual_seed(1)
        batches = []
        for _ in range(self.batch.accumulation):
            drawn = torch.randint(
                0, model.vocab_size, (micro, model.context_length + 1), generator=generator
            )
            labels = (
                drawn[:, 1:].contiguous(),
                torch.ones(micro, model.context_length),
                torch.zeros(micro, dtype=torch.int64),
                torch.full((micro,), 1.0 / (self.batch.total * model.context_length)),
            )
            batches.append((drawn[:, :-1].contiguous(), labels))
        return batches

    def _gradients(self) -> Iterator[torch.Tensor]:
        flat = getattr(self.optimizer, "grad_partitions_flat_buffer", None)
        if flat is not None:
            yield flat
            return
        if hasattr(self.optimizer, "fp32_groups_gradients_flat"):
            yield from self.optimizer.fp32_groups_gradients_flat
            return
        for one in self.parameters:
            if one.grad is not None:
                yield one.grad
        for groups in (self.optimizer.all_grad_tensors, self.optimizer.averaged_gradients):
            for group in groups.values():
                yield from group or ()

    def _watch_buckets(self, found: dict[str, float]) -> None:
        def note() -> None:
            buffers = [one.buffer for one in getattr(self.optimizer, "ipg_buckets", {}).values()]
            flat = [
                tensor
                for buffer in buffers
                for tensor in (buffer if isinstance(buffer, list) else [buffer])
                if tensor is not None
            ]
            found["bucket"] = max(found["bucket"], sum(_storages(flat).values()))

        setup = getattr(self.optimizer, "setup_buckets", None)
        if setup is None:
            note()
            return

        def noted() -> None:
            setup()
            note()

        self.optimizer.setup_buckets = noted

    def _watch_pipeline(self, found: dict[str, float]) -> None:
        engine, flying = self.deepspeed, 0
        forward, backward = engine._exec_forward_pass, engine._exec_backward_pass
        reduce = self.optimizer.reduce_gradients

        def forward_noted(engine: Any, *arguments: Any, **named: Any) -> None:
            nonlocal flying
            flying += 1
            found["in_flight"] = max(found["in_flight"], flying)
            forward(*arguments, **named)

        def backward_noted(engine: Any, *arguments: Any, **named: Any) -> None:
            nonlocal flying
            flying -= 1
            backward(*arguments, **named)

        def reduce_noted(*arguments: Any, **named: Any) -> None:
            found["gradients"] = sum(_storages(self._gradients()).values())
            reduce(*arguments, **named)

        self.optimizer.reduce_gradients = reduce_noted
        table = dict(type(engine)._INSTRUCTION_MAP)
        for instruction in table:
            if instruction.__name__ == "ForwardPass":
                table[instruction] = forward_noted
            elif instruction.__name__ == "BackwardPass":
                table[instruction] = backward_noted
        engine._INSTRUCTION_MAP = table


def _many(value: Any) -> bool:
    return torch.is_tensor(value) and value.numel() > 1


def _storages(tensors: Iterable[torch.Tensor]) -> dict[int, int]:
    """Return the bytes of every storage that the tensors lie in, by address."""
    found = {}
    for tensor in tensors:
        storage = tensor.untyped_storage()
        found[storage.data_ptr()] = storage.nbytes()
    return found
