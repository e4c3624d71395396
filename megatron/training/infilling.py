"""From a configuration to what rearranges its training windows.  No torch in here."""

from __future__ import annotations

from megatron.config import Config
from megatron.data.infilling import Codec, Infilling
from megatron.data.sidecar import read_sidecar
from megatron.errors import ConfigError, DataError
from megatron.tokenizer import Tokenizer, build_tokenizer


def run_infilling(config: Config) -> Infilling | None:
    """Return how a run fills in the middle; None where it does not.

    Raises:
        ConfigError: a token is not one of the vocabulary.
        DataError: the tokenizer cannot be read.
    """
    data = config.data
    if not data.fim_rate:
        return None
    tokenizer = None
    if config.tokenizer.tokenizer_type is not None:
        tokenizer = build_tokenizer(
            config.tokenizer.tokenizer_type,
            vocab_file=config.tokenizer.vocab_file,
            merge_file=config.tokenizer.merge_file,
            fast=False,
        )
    codec = None
    if data.fim_level == "character":
        assert tokenizer is not None, "the configuration is checked for it"
        codec = Codec(encode=tokenizer.encode, decode=tokenizer.decode)
    prefix, suffix, middle = (
        _token(config, key, getattr(data, key), tokenizer)
        for key in ("fim_prefix_token", "fim_suffix_token", "fim_middle_token")
    )
    return Infilling(
        rate=data.fim_rate,
        spm_rate=data.fim_spm_rate,
        prefix=prefix,
        suffix=suffix,
        middle=middle,
        level=data.fim_level,
        unit=data.fim_unit,
        seed=config.training.seed,
        eod=_document_end(config, tokenizer),
        codec=codec,
    )


def _token(config: Config, key: str, token: int | str, tokenizer: Tokenizer | None) -> int:
    known = tokenizer.vocab_size if tokenizer is not None else None
    size = config.model.vocab_size or known
    if isinstance(token, str):
        assert tokenizer is not None, "the configuration is checked for it"
        ids = tokenizer.encode(token)
        if len(ids) != 1 or tokenizer.decode(ids) not in (token, ""):
            source = config.tokenizer.vocab_file or "the tokenizer"
            raise ConfigError(
                f"{key}: '{token}' is not a token of {source} (it becomes {len(ids)}); add it to "
                "the vocabulary, or name another token or an id"
            )
        token = ids[0]
    if size is not None and token >= size:
        raise ConfigError(f"{key}: {token} is outside the vocabulary of {size} tokens")
    return token


def _document_end(config: Config, tokenizer: Tokenizer | None) -> int | None:
    """Return the end-of-document token: the configuration's, the data's, or the tokenizer's."""
    if config.model.eod_token_id is not None:
        return config.model.eod_token_id
    for domain in config.trained.values():
        for prefix in domain.train:
            sidecar = read_sidecar(prefix)
            if sidecar is not None:
                return sidecar.eod_id if sidecar.append_eod else None
    try:
        return None if tokenizer is None else tokenizer.eod
    except DataError:
        return None
