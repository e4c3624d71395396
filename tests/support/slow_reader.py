"""``train.py``, with rank 1 held for ever in the reader at step 4."""

import os
import runpy
import sys
import time
from pathlib import Path

from megatron.training import reading

read = reading.PlanReader.read


def held(self, planned):
    for number, batch in enumerate(read(self, planned)):
        if planned.step == 4 and number == 0 and os.environ["RANK"] == "1":
            time.sleep(3600)
        yield batch


reading.PlanReader.read = held
root = Path(__file__).resolve().parents[2]
sys.argv[0] = str(root / "train.py")
runpy.run_path(sys.argv[0], run_name="__main__")
