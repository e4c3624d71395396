"""``generate.py``: a run's model writes to a file, or answers at the keyboard."""

from __future__ import annotations

import io
import json
import os
import select
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from megatron.checkpoint.files import remove_tree
from megatron.config import Config
from megatron.config.evaluation import GenerationConfig
from megatron.engine.runtime import Runtime
from megatron.errors import RunError
from megatron.inference.crew import Crew, Decoding
from megatron.inference.sample import Sampling
from megatron.inference.samples import Sample, write_samples
from megatron.launch.keyboard import PROMPTS_VARIABLE
from megatron.launch.stop import StopFlag
from megatron.training.inference import OpenModel
from megatron.training.inference_options import (
    Say,
    check_generation,
    read_prompts,
    run_tokenizer,
)

FOLDER = "generation"
_ASK = "Context prompt >>> "


def decoding_of(options: GenerationConfig, *, seed: int, stop_token: int) -> Decoding:
    """Return how tokens are drawn, as GPT-NeoX reads its keys.

    Greedy decoding needs ``temperature``, ``top_k`` and ``top_p`` to be 0; with one of the latter
    a temperature of 0 leaves the logits as they are.
    """
    draws = options.top_k > 0 or options.top_p > 0
    return Decoding(
        sampling=Sampling(
            temperature=options.temperature or (1.0 if draws else 0.0),
            top_k=options.top_k,
            top_p=options.top_p,
            seed=seed,
        ),
        stop=options.stop_strings,
        stop_token=stop_token,
        recompute=options.recompute,
        logits=options.return_logits,
    )


def generate_run(config: Config, runtime: Runtime, stop: StopFlag, say: Say) -> int:
    """Write what the configuration asks for; collective.

    Args:
        config: of the run.
        runtime: ranks and device.
        stop: ends the work after a group of samples, or at the keyboard.
        say: takes a line for the console, on rank 0.

    Returns:
        The exit code: 0, or the stop flag's.

    Raises:
        NeomixError: the checkpoint, the tokenizer or the prompts do not fit.
    """
    check_generation(config)
    options = config.generation
    cache = Path(config.run_dir) / FOLDER / "model"
    tokenizer = run_tokenizer(config, "generation")
    opened = OpenModel.create(
        config, runtime, rows=options.generation_batch_size, cache=cache, say=say
    )
    model, _ = opened.load(config.checkpoint.iteration)
    if runtime.rank == 0 and cache.exists():
        remove_tree(cache)  # whole parameters with their moments, which nobody needs any more
    decoding = decoding_of(options, seed=config.training.seed, stop_token=tokenizer.eod)
    crew = opened.crew(model, tokenizer)
    if options.text_gen_type == "interactive":
        crew.lead(lambda crew: _converse(crew, options, decoding, stop))
    else:
        crew.lead(lambda crew: write_file(crew, options, decoding, stop, say))
    return stop.exit_code if any(runtime.gather(stop.requested)) else 0


def write_file(
    crew: Crew, options: GenerationConfig, decoding: Decoding, stop: StopFlag, say: Say
) -> None:
    """Write samples to the output file, line by line.

    Raises:
        RunError: it cannot be written.
    """
    conditional = options.text_gen_type == "input-file"
    prompts = read_prompts(options) if conditional else [""]
    default = f"{options.sample_input_file}.output.jsonl" if conditional else "samples.txt"
    path = Path(options.sample_output_file or default)
    samples = write_samples(
        crew,
        prompts,
        decoding,
        maximum_tokens=options.maximum_tokens,
        repeats=options.num_samples,
    )
    count = 0
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", encoding="utf-8") as file:
            for sample in samples:
                file.write(json.dumps(sample.line()) + "\n")
                count += 1
                if stop.requested:
                    break
    except OSError as error:
        raise RunError(f"{path}: cannot be written: {error.strerror}") from error
    say(f"{count} samples: {path}")


def _converse(crew: Crew, options: GenerationConfig, decoding: Decoding, stop: StopFlag) -> None:
    """Answer prompts until there are no more."""
    with _keyboard() as source:
        asked = _asked(source, options.prompt_end, lambda: stop.requested)
        for number, prompt in enumerate(asked):
            for sample in write_samples(
                crew,
                [prompt],
                decoding,
                maximum_tokens=options.maximum_tokens,
                repeats=options.num_samples,
                first=number * options.num_samples,
            ):
                print(_shown(sample), flush=True)


def _shown(sample: Sample) -> str:
    text = f"Generated Text: {sample.text}"
    return text if sample.message is None else f"{text}\n({sample.message})"


def _keyboard() -> IO[bytes]:
    """Open where prompts are typed: what deepy.py passes on, or standard input."""
    path = os.environ.get(PROMPTS_VARIABLE)
    return open(path, "rb", buffering=0) if path else io.FileIO(sys.stdin.fileno(), closefd=False)


def _asked(source: IO[bytes], end: str, stopped: Callable[[], bool]) -> Iterator[str]:
    """Yield the prompts that are typed, each up to ``end``."""
    typed, ended, ending = b"", False, end.encode()
    print(_ASK, end="", flush=True)
    while not ended and not stopped():
        ready, _, _ = select.select([source], [], [], 0.5)
        if not ready:
            continue
        data = source.read(65536)
        ended = not data
        typed += data
        while ending in typed:
            prompt, _, typed = typed.partition(ending)
            yield prompt.decode("utf-8", errors="replace").strip("\n")
            print(_ASK, end="", flush=True)
    if ended and typed.strip():
        yield typed.decode("utf-8", errors="replace").strip("\n")
    print(flush=True)
