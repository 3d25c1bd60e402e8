"""huggingface_hub's errors, told in one sentence each: what happened and what to do.

Told apart by the names of their classes, because huggingface_hub changed its HTTP library twice and kept those.
"""

from __future__ import annotations

import errno

_NOT_FOUND = (
    "{repo!r} is no folder here and {endpoint} knows no such repository, or it is private; check the name, and for a "
    "private one run `hf auth login` or pass --token."
)

_BY_CLASS = {
    "OfflineModeIsEnabled": (
        "{repo} is not completely in the cache {cache} and HF_HUB_OFFLINE forbids to download it; unset "
        "HF_HUB_OFFLINE, name another --cache-dir, or name a folder."
    ),
    "RevisionNotFoundError": (
        "{repo} has no revision {revision!r}; --revision takes a branch, a tag or a full commit hash."
    ),
    "GatedRepoError": (
        "{repo} is gated: accept its licence at {endpoint}/{repo}, then run `hf auth login` or pass the --token of "
        "that account."
    ),
    "RepositoryNotFoundError": _NOT_FOUND,
    "HFValidationError": (
        "{repo!r} is neither a folder, nor a GGUF file, nor an id on the hub, which looks like organisation/name."
    ),
    "ConnectError": (
        "{endpoint} cannot be reached ({reason}) and {repo} is not completely in the cache; check the network, "
        "HF_ENDPOINT and the proxy settings, or name a folder."
    ),
    "TransportError": (
        "The connection to {endpoint} broke again and again while {repo} was downloaded ({reason}); run the command "
        "again, complete files are kept."
    ),
    "LocalEntryNotFoundError": "{repo} is not in the cache and cannot be downloaded ({reason}); check the network.",
    "FileMetadataError": "{endpoint} does not speak the hub's API ({reason}); check HF_ENDPOINT and proxies.",
}
"""Name of a class of error, the narrower before the wider -> sentence."""

_BY_STATUS = {
    401: "{endpoint} refuses the access token (401); pass a valid --token, or renew HF_TOKEN or `hf auth login`.",
    403: "{endpoint} forbids access to {repo} (403); pass a --token that may read it, or ask its owner for access.",
    404: _NOT_FOUND,
    429: "{endpoint} gets too many requests from here (429); wait some minutes, or pass --token.",
}
_OTHER_STATUS = "{endpoint} answered {status} for {repo}; try again later."

_BY_ERRNO = {
    errno.ENOSPC: "The disk is full while {repo} is downloaded to {cache}; free space or name another --cache-dir.",
    errno.EDQUOT: "The disk quota is used up while {repo} is downloaded to {cache}; name another --cache-dir.",
}
_OTHER_ERRNO = "{repo} cannot be stored in {cache} ({reason}); check the folder or name another --cache-dir."


def is_a(error: BaseException, name: str) -> bool:
    """Whether the error is of a class of that name, or of one derived from it."""
    return any(base.__name__ == name for base in type(error).__mro__)


def is_broken_transfer(error: BaseException) -> bool:
    """Whether a transfer began and stopped half-way, so that trying again can help."""
    if is_a(error, "TransportError"):
        return not is_a(error, "ConnectError") and not is_a(error, "ConnectTimeout")
    return isinstance(error, OSError) and str(error).startswith("Consistency check failed")


def is_xet(error: BaseException) -> bool:
    """Whether the error comes from hf_xet, whose own exceptions are few and whose network errors are RuntimeErrors."""
    return isinstance(error, RuntimeError) or type(error).__module__.startswith("hf_xet")


def explain(error: BaseException, *, repo: str, revision: str | None, endpoint: str, cache: str) -> str | None:
    """Return the sentence for an error of huggingface_hub, or None for one that is not known here."""
    while is_a(error, "LocalEntryNotFoundError") and error.__cause__:
        error = error.__cause__  # "not in the cache either": the reason why it was not downloaded says more
    sentence = _sentence(error)
    return sentence and sentence.format(
        repo=repo,
        revision=revision,
        endpoint=endpoint,
        cache=cache,
        reason=one_line(error),
        status=getattr(getattr(error, "response", None), "status_code", None),
    )


def _sentence(error: BaseException) -> str | None:
    for name, sentence in _BY_CLASS.items():
        if is_a(error, name):
            return sentence
    if is_a(error, "HfHubHTTPError"):
        status = getattr(getattr(error, "response", None), "status_code", None)
        return _BY_STATUS.get(status, _OTHER_STATUS) if isinstance(status, int) else None
    if is_broken_transfer(error):
        return _BY_CLASS["TransportError"]
    if isinstance(error, OSError) and error.errno is not None:
        return _BY_ERRNO.get(error.errno, _OTHER_ERRNO)
    return None


def one_line(error: BaseException) -> str:
    """Return the error's message on one line of bounded length."""
    return " ".join(str(error).split())[:200] or type(error).__name__
