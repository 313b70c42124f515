"""
The whole of: one bucket of a test's object store, and what a client needs to reach it.

Called from: `servers`, `fault_proxy`, and whoever tests with an object store.
Must never: name a host but the loopback.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import TYPE_CHECKING, Final, Literal, assert_never

from obstore.store import AzureStore, GCSStore, S3Store

from support.deadlines import Deadline

if TYPE_CHECKING:
    # Of obstore's stubs alone.
    from obstore.store import ClientConfig, RetryConfig

Kind = Literal["s3", "gcs", "azure"]
Client = S3Store | GCSStore | AzureStore

REGION: Final = "us-east-1"
_PAUSE: Final = timedelta(milliseconds=20)
"""Between two tries of a client: a test has no time for the pauses of production."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """
    A bucket (Azure: a container) of a server on the loopback, by plain HTTP.
    """

    kind: Kind
    port: int
    bucket: str
    account: str
    """Access key of S3, account of Azure; GCS has none."""
    secret: str

    @property
    def endpoint(self) -> str:
        """
        Where requests go. The address of Azure's emulator has the account in its path.
        """
        base = f"http://127.0.0.1:{self.port}"
        return f"{base}/{self.account}" if self.kind == "azure" else base

    @property
    def url(self) -> str:
        """
        The bucket as a person writes it.
        """
        schemes: Mapping[Kind, str] = {"s3": "s3", "gcs": "gs", "azure": "az"}
        return f"{schemes[self.kind]}://{self.bucket}"

    @property
    def environment(self) -> dict[str, str]:
        """
        The credentials as the clouds' own tools read them.
        """
        if self.kind == "s3":
            return {"AWS_ACCESS_KEY_ID": self.account, "AWS_SECRET_ACCESS_KEY": self.secret, "AWS_REGION": REGION}
        if self.kind == "azure":
            return {"AZURE_STORAGE_ACCOUNT_NAME": self.account, "AZURE_STORAGE_ACCOUNT_KEY": self.secret}
        return {"GOOGLE_SERVICE_ACCOUNT_KEY": self.service_account_key}

    @property
    def service_account_key(self) -> str:
        """
        For GCS: a key that proves nothing, and names the endpoint; nobody is asked for a token.
        """
        unsigned = {"client_email": "", "private_key": "", "private_key_id": ""}
        return json.dumps({"gcs_base_url": self.endpoint, "disable_oauth": True, **unsigned})

    def behind(self, port: int) -> "Place":
        """
        The same bucket, reached by another port of the loopback.
        """
        return replace(self, port=port)

    def client(self, *, prefix: str = "", timeout_s: float | None = None, max_retries: int = 3) -> Client:
        """
        A client of obstore, for tests of the tests' own tools and for looking behind the product's back.

        Args:
            prefix: in front of each key.
            timeout_s: for one request; as set, without it a deadline's.
            max_retries: tries after the first.
        """
        options: ClientConfig = {
            "allow_http": True,
            "timeout": timedelta(seconds=Deadline.REPLY.s if timeout_s is None else timeout_s),
        }
        retries: RetryConfig = {
            "max_retries": max_retries,
            "retry_timeout": timedelta(seconds=Deadline.COMMITTED.s),
            "backoff": {"init_backoff": _PAUSE, "max_backoff": _PAUSE * 4},
        }
        match self.kind:
            case "s3":
                return S3Store(
                    self.bucket,
                    prefix=prefix or None,
                    endpoint=self.endpoint,
                    access_key_id=self.account,
                    secret_access_key=self.secret,
                    region=REGION,
                    virtual_hosted_style_request=False,
                    client_options=options,
                    retry_config=retries,
                )
            case "gcs":
                return GCSStore(
                    self.bucket,
                    prefix=prefix or None,
                    service_account_key=self.service_account_key,
                    client_options=options,
                    retry_config=retries,
                )
            case "azure":
                return AzureStore(
                    self.bucket,
                    prefix=prefix or None,
                    endpoint=self.endpoint,
                    account_name=self.account,
                    account_key=self.secret,
                    client_options=options,
                    retry_config=retries,
                )
            case _:
                assert_never(self.kind)
