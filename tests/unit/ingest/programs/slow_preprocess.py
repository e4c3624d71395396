"""preprocess_data.py with small chunks and a pause after each, so that a kill can hit any point.

Usage: slow_preprocess.py CHUNK_BYTES PAUSE_SECONDS [arguments of preprocess_data.py]
"""

import sys
import time

from megatron.data.ingest import chunks, pipeline
from megatron.errors import run_command
from tools import preprocess_data

chunks.CHUNK_BYTES = int(sys.argv[1])
pause = float(sys.argv[2])
write = pipeline._Run._write


def slow_write(self, done, *rest):
    write(self, done, *rest)
    time.sleep(pause)


pipeline._Run._write = slow_write

if __name__ == "__main__":
    sys.exit(run_command(lambda: preprocess_data.main(sys.argv[3:])))
