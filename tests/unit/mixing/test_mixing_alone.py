"""Every controller is built and stepped where NumPy is the only library."""

from __future__ import annotations

from support.isolated import run_isolated

CODE = """
import json, sys, tempfile
from pathlib import Path
import numpy as np
from data_sampling_utils import (
    Observation, RunContext, available_methods, build_mixer, count_loss
)

names, steps, folder = ["a", "b", "c"], 8, Path(tempfile.mkdtemp())
shares = {"a": 0.5, "b": 0.3, "c": 0.2}
rows = [{"step": step, "probability": shares} for step in range(1, steps + 1)]
(folder / "mixture.jsonl").write_text("".join(json.dumps(row) + "\\n" for row in rows))
losses = {"step": steps, "valid_loss": {"a": 1.0, "b": 2.0, "c": 3.0}}
(folder / "metrics.jsonl").write_text(json.dumps(losses) + "\\n")
needed = {
    "aioli": {"lp_rounds": 1, "lp_steps": 1, "update_every": 5},
    "auto": {"first_update": 2},
    "doremi": {"reference": "runs/reference"},
    "dynamic_loading": {"targets_from": str(folder)},
    "velocitune": {"targets_from": str(folder)},
    "replay": {"ledger": str(folder)},
    "average_of_ledger": {"ledger": str(folder)},
}
def count(tokens):
    assert tokens.tolist() == [256.0] * 3
    return [count_loss(text(seed), 50).loss for seed in range(3)]

def text(seed):
    return np.random.default_rng(seed).integers(0, 2 + 20 * seed, (12, 32))

context = RunContext(
    total_steps=steps, tokens_per_step=96, samples_per_step=12, draws_per_step=12, vocab_size=50,
    count_losses=count,
)

def train(mixer, first, last):
    for step in range(first, last + 1):
        decision = mixer.decide(step=step)
        if decision.validate:
            nothing = [0.0] * 3
            mixer.observe(
                Observation(
                    step - 1, loss_sum=nothing, token_count=nothing, valid_loss=[3.0, 2.0, 1.5]
                )
            )
            decision = mixer.decide(step=step)
        told = dict(
            loss_sum=[90.0 / step, 60.0, 30.0], token_count=[32, 32, 32],
            loss_square_sum=[40.0, 20.0, 5.0], sample_count=[4, 4, 4],
            excess_loss=[0.5, 0.2, 0.1], reference_loss=[2.0, 1.5, 1.0],
            batch_valid_loss=[3.0, 2.0, 1.0], gradient_alignment=[0.1, 0.2, 0.3],
            sampling_weights=decision.sampling_weights, learning_rate=1e-3,
        )
        if decision.measure:
            decision = mixer.foresee(Observation(step, **told))
        mixer.observe(Observation(step, **told))
    return mixer.decide(step=last + 1)

def build(method):
    return build_mixer(method, domains=names, context=context, **needed.get(method, {}))

for method in available_methods():
    whole, first, second = (build(method) for _ in range(3))
    train(first, 1, 4)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    one, other = train(whole, 1, steps), train(second, 5, steps)
    assert one.sampling_weights.tobytes() == other.sampling_weights.tobytes(), method
    assert abs(one.sampling_weights.sum() - 1) < 1e-9 and whole.step == steps, method
    print(method)
assert not {"torch", "yaml", "pydantic"} & sys.modules.keys()
"""


def test_every_method_is_built_stepped_and_resumed_with_numpy_alone():
    from data_sampling_utils import available_methods

    done = run_isolated(CODE, allowed=["numpy"])
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == available_methods()
