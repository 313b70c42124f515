"""What `helm test` runs in the cluster; see templates/tests/admission.yaml. Standard library only."""

import json
import os
import ssl
import sys
import urllib.error
import urllib.request

ACCOUNT = "/var/run/secrets/kubernetes.io/serviceaccount"
TIMEOUT_S = 15


def ask(url: str, body: object, headers: dict[str, str], context: ssl.SSLContext) -> tuple[int, str]:
    """POST a JSON document; status and text of the answer, whatever they are. The warnings come first."""
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"} | headers)
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_S, context=context) as answer:
            return answer.status, "\n".join([*answer.headers.get_all("Warning", []), answer.read().decode()])
    except urllib.error.HTTPError as err:
        return err.code, err.read().decode()


def main() -> int:
    with open(f"{ACCOUNT}/token", encoding="ascii") as file:
        token = file.read()
    host, port = os.environ["KUBERNETES_SERVICE_HOST"], os.environ["KUBERNETES_SERVICE_PORT"]
    trusted = ssl.create_default_context(cafile=f"{ACCOUNT}/ca.crt")
    # The authorities of some clusters lack an Authority Key Identifier, which client-go accepts.
    trusted.verify_flags &= ~getattr(ssl, "VERIFY_X509_STRICT", 0)
    pod = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "pillion-test", "annotations": {"pillion.dev/policy": "pillion-test-there-is-none"}},
        "spec": {"containers": [{"name": "main", "image": "pillion-test"}]},
    }
    url = f"https://{host}:{port}/api/v1/namespaces/{os.environ['TEST_NAMESPACE']}/pods?dryRun=All"
    status, text = ask(url, pod, {"Authorization": f"Bearer {token}"}, trusted)
    # With failurePolicy Ignore, such a pod is admitted with a warning of the same reason.
    if "PolicyMissing" not in text:
        print(f"webhook: expected PolicyMissing, as a refusal or a warning, got {status}: {text}")
        return 1
    print(f"webhook: a pod that names a missing policy gets PolicyMissing ({status})")
    # The API server checks the certificate in its part of the test; this part tests the path to the leader.
    anyone = ssl.create_default_context()
    anyone.check_hostname, anyone.verify_mode = False, ssl.CERT_NONE
    status, text = ask(f"{os.environ['HOME_URL']}/v1/report", {}, {}, anyone)
    if status != 401:
        print(f"controller: expected 401 for a report without a token, got {status}: {text}")
        return 1
    print("controller: a report without a token is refused")
    return 0


if __name__ == "__main__":
    sys.exit(main())
