"""One of two ranks: saves small DeepSpeed checkpoints of every ZeRO stage and precision."""

import os
import sys
from pathlib import Path

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator

folder = Path(sys.argv[1])
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
# DeepSpeed refuses fp16 on a CPU; what it saves there is what it saves on a GPU.
get_accelerator().is_fp16_supported = lambda: True
deepspeed.init_distributed(dist_backend="gloo")

PRECISIONS = {
    "fp32": (torch.float32, {}),
    "bf16": (torch.bfloat16, {"bf16": {"enabled": True}}),
    "fp16": (torch.float16, {"fp16": {"enabled": True, "initial_scale_power": 4}}),
    "fp16_static": (torch.float16, {"fp16": {"enabled": True, "loss_scale": 8}}),
}
for stage in (1, 2, 3):
    for precision, (dtype, options) in PRECISIONS.items():
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.LayerNorm(8))
        engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=torch.optim.AdamW(model.parameters(), lr=1e-3),
            config={
                "train_micro_batch_size_per_gpu": 2,
                "zero_optimization": {"stage": stage},
                "gradient_clipping": 1.0,
                **options,
            },
        )
        loss = engine(torch.ones(2, 8, dtype=dtype)).float().pow(2).mean()
        engine.backward(loss)
        engine.step()
        state = {"neomix": {"text": "x", "numbers": [1, 2.5, None, True]}}
        engine.save_checkpoint(
            str(folder / f"{stage}_{precision}"),
            tag="global_step1",
            save_latest=False,
            client_state=state,
        )
        torch.distributed.barrier()
        engine.destroy()
sys.stdout.flush()
os._exit(0)
