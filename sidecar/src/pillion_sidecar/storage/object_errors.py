"""
Translates an error of obstore to an OSError with an errno, which all code above this package can handle. Pure.

obstore gives a class and a text, and no status. The class counts first. If it says nothing, the text is read, here and nowhere else.
Source: obstore 0.12.1, `obstore.exceptions`; object_store 0.14, `RetryError`, whose text has the status and the body of the answer.

Called from: `storage.object_requests`.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

NO_BUCKET: Final = errno.ENODEV
"""Errno for a bucket that does not exist. It is not ENOENT: a typo in the name must never look like a root without checkpoints."""
MAX_TEXT: Final = 400
"""Maximum of characters of an error's text that a message repeats: the status and the beginning of the answer."""

_DEBUG: Final = "\n\nDebug source:"
_STATUS: Final = re.compile(r"status code: (\d{3})")
_XML_DECLARATION: Final = re.compile(r"<\?xml[^>]*>")
_QUERY: Final = re.compile(r"\?\S+")
_CREDENTIAL_SOURCE: Final = re.compile(
    r"169\.254\.|token request|AssumeRole|Account must be specified|metadata\.google|//sts\."
)
_BAD_CREDENTIAL: Final = re.compile(
    r"ExpiredToken|InvalidToken|InvalidAccessKeyId|RequestTimeTooSkewed|AuthenticationFailed|SignatureDoesNotMatch"
)
_OUT_OF_RANGE: Final = re.compile(r"Wanted range starting at \d+, but object was only")
_NO_ROOM: Final = re.compile(r"QuotaExceeded|InsufficientStorage|EntityTooLarge|\bNoSpace\b")
_LATER: Final = re.compile(r"SlowDown|ServerBusy|TooManyRequests|RequestTimeout")
_TIMEOUT: Final = re.compile(r"timed? ?out|TimedOut|kind: Timeout", re.IGNORECASE)
_ERRNO_OF_STATUS: Final = {
    400: errno.EINVAL,
    401: errno.EACCES,
    403: errno.EACCES,
    404: NO_BUCKET,
    408: errno.EAGAIN,
    413: errno.EFBIG,
    429: errno.EAGAIN,
    500: errno.EAGAIN,
    502: errno.EAGAIN,
    503: errno.EAGAIN,
    504: errno.EAGAIN,
    507: errno.ENOSPC,
}

REMEDIES: Final = {
    "s3": "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (files in ~/.aws are not read), or give the pod a role",
    "gs": "set GOOGLE_APPLICATION_CREDENTIALS, or give the pod a workload identity",
    "az": "set AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY, or give the pod a workload identity",
}
"""Remedies for missing or refused credentials, by the scheme of the URL."""


class NotThere(OSError):
    """The store answered 404: there is no such object, or no such bucket. Only a listing shows which. Its errno is NO_BUCKET."""


class Conflict(OSError):
    """
    The store did not write. Its errno is EBUSY.

    There are three reasons: the condition of the request does not hold; another request was there at the same time (409); or an earlier try of
    this request was applied. Only a read of the object shows which.
    """


class OutOfRange(OSError):
    """The object ends before the requested range begins. Its errno is ENODATA."""


@contextmanager
def translated(url: str) -> Iterator[None]:
    """
    Translate an error of obstore inside the block to an OSError with the URL as its filename.

    Raises:
        NotThere, Conflict, OutOfRange: see the classes.
        OSError: EACCES for missing or refused credentials; EAGAIN for a store that fails or asks for a pause; ETIMEDOUT, EHOSTUNREACH; ENOSPC
            for a quota; NO_BUCKET; EINVAL for a request or URL that the store refuses; EIO for any other error.
    """
    from obstore import exceptions

    try:
        yield
    except (exceptions.AlreadyExistsError, exceptions.PreconditionError) as err:
        raise Conflict(errno.EBUSY, shown(str(err)), url) from None
    except (exceptions.PermissionDeniedError, exceptions.UnauthenticatedError) as err:
        if _NO_ROOM.search(str(err)):  # Ceph refuses by 403 what is beyond a quota
            raise OSError(errno.ENOSPC, shown(str(err)), url) from None
        raise OSError(errno.EACCES, f"{_remedy(url)} ({shown(str(err))})", url) from None
    except FileNotFoundError as err:
        raise NotThere(NO_BUCKET, f"there is no such bucket, or no such object ({shown(str(err))})", url) from None
    except exceptions.BaseError as err:
        raise error_of(str(err), url) from None
    except ValueError as err:
        raise OSError(errno.EINVAL, shown(str(err)), url) from None


def error_of(text: str, url: str) -> OSError:
    """Return the OSError for an error text of obstore that has no class."""
    status = _STATUS.search(text)
    code = int(status[1]) if status else 0
    if code == 416 or _OUT_OF_RANGE.search(text):
        return OutOfRange(errno.ENODATA, "the object is too short", url)
    said = shown(text)
    if _BAD_CREDENTIAL.search(text) or (_CREDENTIAL_SOURCE.search(text) and code < 500):
        return OSError(errno.EACCES, f"{_remedy(url)} ({said})", url)
    if _NO_ROOM.search(text):
        return OSError(errno.ENOSPC, said, url)
    if _LATER.search(text):
        return OSError(errno.EAGAIN, said, url)
    if code == 404:
        return OSError(NO_BUCKET, f"there is no such bucket ({said})", url)
    if code in _ERRNO_OF_STATUS:
        return OSError(_ERRNO_OF_STATUS[code], said, url)
    if "redirect" in text:
        return OSError(errno.EINVAL, f"the bucket is in another region: set the region, or AWS_REGION ({said})", url)
    if _TIMEOUT.search(text):
        return OSError(errno.ETIMEDOUT, said, url)
    if "kind: Connect" in text or "error sending request" in text:
        return OSError(errno.EHOSTUNREACH, said, url)
    return OSError(errno.EIO, said, url)


def shown(text: str) -> str:
    """
    Return an error's text for a message, as one line.

    It leaves out the query of a URL, which may have a signature or a token. It also leaves out the declaration of an XML document, whose question
    marks do not begin a query.
    """
    said = " ".join(_QUERY.sub("", _XML_DECLARATION.sub("", text.split(_DEBUG)[0])).split())
    return said if len(said) <= MAX_TEXT else f"{said[:MAX_TEXT]}..."


def _remedy(url: str) -> str:
    remedy = REMEDIES.get(url.partition(":")[0], "")
    return f"no credentials, or the store refuses them: {remedy}"
