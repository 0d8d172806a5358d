"""What errors of remote storage mean: whether another try can help, and what a person can do about one.

Every filesystem has exceptions of its own and none of their packages need be installed, so classes are known by name.
"""

import json
import os
import re
from collections.abc import Iterator, Mapping

_CREDENTIALS = {
    "CredentialRetrievalError",
    "NoAuthTokenError",
    "NoCredentialsError",
    "PartialCredentialsError",
    "ProfileNotFound",
    "SSOTokenLoadError",
    "TokenRetrievalError",
    "UnauthorizedSSOTokenError",
}
_LASTING = _CREDENTIALS | {"FileExpired", "InvalidEndpointConfigurationError", "ParamValidationError"}
_NETWORK = {"ClientError", "HTTPError", "RequestException", "TransportError"}
"""Base classes of aiohttp, requests, httpx and botocore."""
_PASSING_STATUS = {408, 409, 425, 429}
"""HTTP answers below 500 that another try may change."""
_CHANGED_STATUS = {412, 416}
_ENDPOINTS = {"s3": ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"), "s3a": ("AWS_ENDPOINT_URL",), "hf": ("HF_ENDPOINT",)}
_HUB_REPOSITORY = re.compile(r"hf://((?:datasets/|spaces/)?[^/@]+/[^/@]+)")
_HUB_LOGIN = "log in with `hf auth login`, or set HF_TOKEN"
_S3_KEYS = (
    "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE; for a public bucket set "
    "`storage_options: {anon: true}`"
)


def is_lasting(error: Exception) -> bool:
    """Whether the next try must fail as well."""
    if isinstance(error, TimeoutError | json.JSONDecodeError):  # a proxy's page in place of an answer is no JSON
        return False
    if isinstance(error, FileNotFoundError | PermissionError | ValueError | NotImplementedError | ImportError):
        return True
    status = _status(error)
    refused = status is not None and 400 <= status < 500 and status not in _PASSING_STATUS
    return refused or bool(_LASTING & _names(error))


def is_of_the_network(error: Exception) -> bool:
    """Whether it is about a service, not about the content of a file."""
    known = any(isinstance(each, ConnectionError | TimeoutError) for each in _chain(error))
    return known or _status(error) is not None or bool(_NETWORK & _names(error))


def explain(path: str, error: Exception) -> str:
    """What is wrong with a path and what to do about it, in one line."""
    names, status = _names(error), _status(error)
    if "FileExpired" in names or status in _CHANGED_STATUS:
        return "was written again while it was being read; run the command again"
    scheme = _scheme(path)
    found = None
    if scheme == "hf":
        found = _explain_hub(path, error, names, status)
    elif scheme in ("s3", "s3a"):
        found = _explain_s3(error, names, status)
    if found is None and isinstance(error, FileNotFoundError):
        # The file alone is missing, or a service says more: the whole bucket is.
        found = "is not there any more" if error.__cause__ is None else describe(error)
    if found is None and (isinstance(error, PermissionError) or status in (401, 403)):
        found = f"access denied: {describe(error)}"
    return found or describe(error)


def describe(error: BaseException) -> str:
    """Class and text of an error, in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def endpoint_note(path: str) -> str:
    """Where requests for a path go, when an environment variable says so; "" otherwise."""
    for name in _ENDPOINTS.get(_scheme(path), ()):
        if value := os.environ.get(name):
            return f" ({name} is {value})"
    return ""


def _explain_s3(error: Exception, names: set[str], status: int | None) -> str | None:
    if names & _CREDENTIALS:
        return f"no usable S3 credentials ({describe(error)}): {_S3_KEYS}"
    if isinstance(error, PermissionError) or status in (401, 403):
        return f"S3 denies access ({describe(error)}): wrong keys, or they may not list and read this; {_S3_KEYS}"
    return None


def _explain_hub(path: str, error: Exception, names: set[str], status: int | None) -> str | None:
    match = _HUB_REPOSITORY.search(path)
    repository = match[1] if match else path
    by_library = "DatasetNotFoundError" in names  # of `datasets`, which drops what led to it
    if "GatedRepoError" in names or (by_library and "gated dataset" in str(error)):
        endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
        return f"gated: accept its terms at {endpoint}/{repository} with your account, then {_HUB_LOGIN}"
    if "DisabledRepoError" in names:
        return f"{repository} is disabled on the Hub"
    if "RevisionNotFoundError" in names:
        return f"{repository} has no such revision; write it as hf://datasets/OWNER/NAME@REVISION/..."
    if "RepositoryNotFoundError" in names or by_library:
        hint = "" if repository.startswith("datasets/") else "; datasets are written hf://datasets/OWNER/NAME/..."
        return f"the Hub has no {repository}, or it is private: {_HUB_LOGIN}{hint}"
    if status in (401, 403):
        return f"the Hub denies access ({status}): {_HUB_LOGIN}"
    return None


def _scheme(path: str) -> str:
    return path.rpartition("::")[2].partition("://")[0]


def _chain(error: BaseException) -> Iterator[BaseException]:
    """An error and what led to it."""
    seen: set[int] = set()
    each: BaseException | None = error
    while each is not None and id(each) not in seen:
        seen.add(id(each))
        yield each
        each = each.__cause__ or each.__context__


def _names(error: BaseException) -> set[str]:
    return {kind.__name__ for each in _chain(error) for kind in type(each).__mro__}


def _status(error: BaseException) -> int | None:
    """The HTTP status of the answer that an error is about."""
    for each in _chain(error):
        response = getattr(each, "response", None)
        if isinstance(response, Mapping):  # botocore
            status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        else:  # requests, httpx; aiohttp has it on the error itself
            status = getattr(response, "status_code", getattr(each, "status", None))
        if isinstance(status, int):
            return status
    return None
