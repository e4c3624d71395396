"""Publishing a Hugging Face folder on the hub, or on whatever ``HF_ENDPOINT`` names."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from megatron.errors import CheckpointError, ConfigError, MissingExtraError, RunError
from megatron.exchange.shards import FolderTensors

_HUB = "https://huggingface.co"


def upload(folder: Path, repository: str, branch: str, *, private: bool, message: str) -> str:
    """Upload a folder as one commit; the repository and the branch are made where missing.

    Args:
        folder: a Hugging Face folder, as ``tools/convert_checkpoint.py --to hf`` writes it.
        repository: ``name`` or ``organisation/name``.
        branch: of the repository.
        private: whether a repository that is made here is private.
        message: of the commit.

    Returns:
        The commit's address.

    Raises:
        CheckpointError: the folder is no Hugging Face model, or lacks weights.
        ConfigError: there is no token, or a name is none that the hub knows.
        MissingExtraError: ``huggingface_hub`` is not installed.
        RunError: the hub cannot be reached, or refuses.
    """
    _check(folder)
    try:
        import huggingface_hub
        from huggingface_hub import errors
    except ImportError:
        raise MissingExtraError("huggingface_hub", "eval", "uploading") from None
    token = huggingface_hub.get_token()
    if not token:
        raise ConfigError(
            "there is no token for the hub: set HF_TOKEN, or log in with `hf auth login` (a token "
            f"with write permission, from {_HUB}/settings/tokens)"
        )
    endpoint = os.environ.get("HF_ENDPOINT", _HUB).rstrip("/")
    api = huggingface_hub.HfApi(endpoint=endpoint, token=token)
    try:
        made = api.create_repo(repository, exist_ok=True, private=private or None)
        if branch != "main":
            api.create_branch(made.repo_id, branch=branch, exist_ok=True)
        commit = api.upload_folder(
            repo_id=made.repo_id, folder_path=folder, revision=branch, commit_message=message
        )
    except errors.HFValidationError as error:
        raise ConfigError(f"{repository!r} is no repository's name: {error}") from error
    except errors.HfHubHTTPError as error:
        raise RunError(_refused(error, endpoint, repository)) from error
    except errors.OfflineModeIsEnabled as error:
        raise RunError(f"{error}; unset HF_HUB_OFFLINE to upload") from error
    except Exception as error:
        if not _is_network(error):
            raise
        raise RunError(
            f"cannot reach {endpoint} ({type(error).__name__}: {error}); nothing was committed: "
            "look at the network, or set HF_ENDPOINT, and upload again"
        ) from error
    return str(commit.commit_url)


def _check(folder: Path) -> None:
    if not (folder / "config.json").is_file():
        raise CheckpointError(
            f"{folder} is no Hugging Face folder (config.json is not there); make one of a "
            "checkpoint with tools/convert_checkpoint.py --to hf"
        )
    FolderTensors(folder)


def _refused(error: Any, endpoint: str, repository: str) -> str:
    response = getattr(error, "response", None)
    status = getattr(response, "status_code", None)
    reason = {
        401: "the token is not valid; make a new one, with write permission",
        403: f"the token may not write to {repository}; use one with write permission there",
        404: "there is no such namespace, or the token may not see it",
        413: "a file is too large for the hub; export with a smaller --max_shard_size",
    }.get(status or 0, str(error).splitlines()[0])
    return f"{endpoint} refuses the upload (status {status}): {reason}"


def _is_network(error: BaseException) -> bool:
    """Tell whether an error is the connection's, whichever library of that kind raises it."""
    names = {one.__name__ for one in type(error).__mro__}
    return isinstance(error, OSError) or not names.isdisjoint({"TransportError", "ConnectionError"})
