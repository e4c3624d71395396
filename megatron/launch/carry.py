"""What of the environment goes along to other hosts."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from megatron.errors import ConfigError

ENVIRONMENT_FILE = ".deepspeed_env"

_PREFIXES = (
    "NCCL_",
    "TORCH",
    "PYTORCH_",
    "CUDA_",
    "CUBLAS_",
    "CUDNN_",
    "PYTHON",
    "OMP_",
    "MKL_",
    "KMP_",
    "GOMP_",
    "OPENBLAS_",
    "GLOO_",
    "TP_",
    "UCX_",
    "FI_",
    "EFA_",
    "MASTER_",
    "DS_",
    "DEEPSPEED_",
    "HF_",
    "HUGGING",
    "TRANSFORMERS_",
    "TOKENIZERS_",
    "WANDB_",
    "COMET_",
    "TRITON_",
    "HIP_",
    "HSA_",
    "ROCR_",
    "RCCL_",
    "NVIDIA_",
    "NEOMIX_",
    "LC_",
    "XDG_CACHE",
)
_NAMES = frozenset(
    {
        "PATH",
        "LD_LIBRARY_PATH",
        "LD_PRELOAD",
        "LIBRARY_PATH",
        "VIRTUAL_ENV",
        "CONDA_PREFIX",
        "LANG",
        "TZ",
        "SSL_CERT_FILE",
        "REQUESTS_CA_BUNDLE",
        "http_proxy",
        "https_proxy",
        "no_proxy",
        "HTTP_PROXY",
        "HTTPS_PROXY",
        "NO_PROXY",
    }
)
# They describe this machine or this process, and would be wrong on another host.
_HERE_ALONE = frozenset({"NEOMIX_SUPERVISOR", "NEOMIX_REEXEC", "PYTHONSAFEPATH", "MASTER_PORT"})
_SECRET = re.compile(r"(TOKEN|KEY|SECRET|PASSWORD|PASSWD|CREDENTIAL)S?$")


def carried(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that ranks on other hosts need as they are here.

    ``CUDA_VISIBLE_DEVICES`` goes along only where it says that there are none: the numbers
    of this machine's devices mean nothing elsewhere.
    """
    chosen = {}
    for name, value in environ.items():
        wanted = name in _NAMES or (name.startswith(_PREFIXES) and name not in _HERE_ALONE)
        if name == "CUDA_VISIBLE_DEVICES":
            wanted = value.strip() in ("", "-1")
        # A shell function's name, say, is no name that could be exported again.
        if wanted and re.fullmatch(r"[A-Za-z_]\w*", name):
            chosen[name] = value
    return dict(sorted(chosen.items()))


def secret(name: str) -> bool:
    """Tell whether a variable's name says that its value is nobody else's business."""
    return _SECRET.search(name.upper()) is not None


def environment_files(home: Path, folder: Path) -> tuple[Path, ...]:
    """Return where a ``.deepspeed_env`` may be; a later file overrides an earlier one."""
    places = dict.fromkeys([home / ENVIRONMENT_FILE, folder / ENVIRONMENT_FILE])
    return tuple(places)


def read_environment_files(files: Iterable[Path]) -> dict[str, str]:
    """Return the variables of those ``.deepspeed_env`` files that exist.

    Lines are ``NAME=VALUE``; blank lines and lines that start with ``#`` are skipped, a
    leading ``export`` and quotes around the value are taken off.

    Raises:
        ConfigError: a file cannot be read, or a line has another form.
    """
    found: dict[str, str] = {}
    for file in files:
        if not file.is_file():
            continue
        try:
            lines = file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{file} cannot be read: {error}") from error
        for number, line in enumerate(lines, start=1):
            content = line.strip().removeprefix("export ").strip()
            if not content or content.startswith("#"):
                continue
            match = re.fullmatch(r"([A-Za-z_]\w*)=(.*)", content)
            if match is None:
                # Not shown: it may hold a password.
                raise ConfigError(f"{file}, line {number}: should be NAME=VALUE")
            value = match.group(2)
            if len(value) > 1 and value[0] == value[-1] and value[0] in "\"'":
                value = value[1:-1]
            found[match.group(1)] = value
    return found
