"""
Tests of which errno the text of a store's error becomes, and what of it a person sees.

Called from: pytest.
"""

import errno

import pytest

from pillion_sidecar.storage import object_errors

URL = "s3://bucket/run"


def text(status: str, body: str = "") -> str:
    """An error as obstore 0.12.1 words it."""
    return (
        "Generic S3 error: Error performing PUT https://bucket.example/run?X-Amz-Signature=abc&sig=hidden in 1.2s, after 3 retries,"
        f" max_retries: 3, retry_timeout: 30s  - Server returned non-2xx status code: {status}: {body}"
        '\n\nDebug source:\nGeneric {\n    store: "S3",\n}'
    )


@pytest.mark.parametrize(
    ("said", "number"),
    [
        (text("503 Service Unavailable", "<Code>SlowDown</Code>"), errno.EAGAIN),
        (text("429 Too Many Requests"), errno.EAGAIN),
        (text("500 Internal Server Error"), errno.EAGAIN),
        (text("507 Insufficient Storage"), errno.ENOSPC),
        (text("403 Forbidden", "<Code>QuotaExceeded</Code>"), errno.ENOSPC),
        (text("400 Bad Request", "<Code>ExpiredToken</Code>"), errno.EACCES),
        (text("400 Bad Request", "<Code>InvalidArgument</Code>"), errno.EINVAL),
        (text("404 Not Found", "<Code>NoSuchBucket</Code>"), object_errors.NO_BUCKET),
        (text("416 Range Not Satisfiable"), errno.ENODATA),
        ("Generic GCS error: Wanted range starting at 9, but object was only 5 bytes long", errno.ENODATA),
        (
            "Generic S3 error: Error performing PUT http://169.254.169.254/latest/api/token in 5s - HTTP error: error sending request",
            errno.EACCES,
        ),
        (
            "Generic S3 error: Received redirect without LOCATION, this normally indicates an incorrectly configured region",
            errno.EINVAL,
        ),
        (
            "Generic S3 error: Error performing GET https://x in 4s - HTTP error: body error\n\nDebug source:\nTimedOut",
            errno.ETIMEDOUT,
        ),
        (
            "Generic S3 error: Error performing GET https://x in 4s - HTTP error: error sending request",
            errno.EHOSTUNREACH,
        ),
        ("Generic S3 error: something new", errno.EIO),
    ],
)
def test_each_error_has_an_errno_and_the_url(said: str, number: int) -> None:
    """What everything above storage decides by is the errno; what a person needs is the URL."""
    err = object_errors.error_of(said, URL)
    assert (err.errno, err.filename) == (number, URL)


def test_no_secret_and_no_flood_gets_into_a_message() -> None:
    """The query of an address, which may hold a signature, the debug text and what is too long are left out; one line stays."""
    err = object_errors.error_of(text("503 Service Unavailable", "<Message>\n" + "x" * 5000), URL)
    assert "Signature" not in str(err)
    assert "hidden" not in str(err)
    assert "Debug" not in str(err)
    assert "503 Service Unavailable" in str(err)
    assert "\n" not in str(err)
    assert len(str(err)) < 2 * object_errors.MAX_TEXT


def test_the_answer_of_a_store_is_repeated_without_its_xml_declaration() -> None:
    """The declaration has question marks as a query has, and says nothing to a person; the element behind it is what counts."""
    answer = '<?xml version="1.0" encoding="UTF-8"?>\n<Error><Code>AccessDenied</Code></Error>'
    said = str(object_errors.error_of(text("403 Forbidden", answer), URL))
    assert "<Error><Code>AccessDenied</Code></Error>" in said
    assert "version=" not in said
    assert "encoding=" not in said


@pytest.mark.parametrize("scheme", ["s3", "gs", "az"])
def test_credentials_that_are_refused_say_what_to_do(scheme: str) -> None:
    """The error names the variables or the role of this very kind of store."""
    err = object_errors.error_of(text("400 Bad Request", "<Code>ExpiredToken</Code>"), f"{scheme}://bucket/run")
    assert object_errors.REMEDIES[scheme] in str(err)


def test_a_text_of_a_credential_source_that_fails_for_a_moment_is_no_refusal() -> None:
    """A token service that answers 503 is asked again, as a store is."""
    said = "Generic S3 error: Error performing POST https://sts.eu-central-1.amazonaws.com/ in 1s - Server returned non-2xx status code: 503: "
    assert object_errors.error_of(said, URL).errno == errno.EAGAIN
