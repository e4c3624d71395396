"""Whether this machine can compile what ``torch.compile`` writes, asked before anything is opened.

torch itself finds out in the first step, in a traceback of its own.  No torch is imported.
"""

from __future__ import annotations

import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from megatron.errors import ConfigError

_REMEDY = "or set torch_compile: false"
_CPU_SOURCE = (
    "#include <Python.h>\n#include <omp.h>\nint threads() { return omp_get_max_threads(); }\n"
)
_GPU_SOURCE = "#include <Python.h>\nint version(void) { return PY_MAJOR_VERSION; }\n"


def check_compiler(*, on_cpu: bool) -> None:
    """Try the compiler that torch will take on a few lines; a fraction of a second.

    Args:
        on_cpu: whether the blocks run there; on a GPU Triton compiles them, and C code to call
            what it has compiled.

    Raises:
        ConfigError: there is none, or it lacks something.
    """
    if not on_cpu and importlib.util.find_spec("triton") is None:
        raise ConfigError(
            "torch_compile needs the package triton on a GPU, which is not installed; install "
            f"it as this torch asks for it, {_REMEDY}"
        )
    language = "C++" if on_cpu else "C"
    command = _cpp_compiler() if on_cpu else _c_compiler()
    if command is None or shutil.which(command[0]) is None:
        variable, usual = ("CXX", "g++") if on_cpu else ("CC", "gcc or clang")
        asked = f" ({variable} is {command[0]})" if command and variable in os.environ else ""
        raise ConfigError(
            f"torch_compile needs a {language} compiler, and none is found{asked}; install "
            f"{usual}, name another in the variable {variable}, {_REMEDY}"
        )
    trouble = _trouble(command, ".cpp" if on_cpu else ".c", _CPU_SOURCE if on_cpu else _GPU_SOURCE)
    if trouble is not None:
        headers = "Python's headers (python3-dev)" + (" and OpenMP" if on_cpu else "")
        raise ConfigError(
            f"torch_compile needs a {language} compiler with {headers}, and {command[0]} cannot "
            f"compile a file that includes them ({trouble}); install them, {_REMEDY}"
        )


def _cpp_compiler() -> list[str]:
    """Return what torch's inductor calls."""
    own = "clang++" if sys.platform == "darwin" else "g++"
    return shlex.split(os.environ.get("CXX", "")) or [own]


def _c_compiler() -> list[str] | None:
    """Return what Triton calls."""
    named = shlex.split(os.environ.get("CC", ""))
    if named:
        return named
    return next(([name] for name in ("clang", "gcc") if shutil.which(name)), None)


def _trouble(command: list[str], suffix: str, source: str) -> str | None:
    """Compile a source; return the first line of complaint, or None if there is nothing wrong."""
    openmp = ["-fopenmp"] if suffix == ".cpp" and sys.platform != "darwin" else []
    headers = sysconfig.get_paths()["include"]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / f"probe{suffix}"
        file.write_text(source, encoding="utf-8")
        words = [*command, "-shared", "-fPIC", *openmp, f"-I{headers}", str(file)]
        try:
            ended = subprocess.run(
                [*words, "-o", str(file.with_suffix(".so"))],
                capture_output=True,
                text=True,
                check=False,
                timeout=60,
            )
        except (OSError, subprocess.SubprocessError) as error:
            return str(error)
    if ended.returncode == 0:
        return None
    lines = [line for line in ended.stderr.splitlines() if "error" in line] or ["no message"]
    return lines[0].strip()
