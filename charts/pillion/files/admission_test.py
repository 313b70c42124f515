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
    # Some clusters' authorities lack an Authority Key Identifier, as client-go does not mind.
    trusted.verify_flags &= ~getattr(ssl, "VERIFY_X509_STRICT", 0)
    pod = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "pillion-test", "annotations": {"pillion.dev/policy": "pillion-test-there-is-none"}},
        "spec": {"containers": [{"name": "main", "image": "pillion-test"}]},
    }
    url = f"https://{host}:{port}/api/v1/namespaces/{os.environ['TEST_NAMESPACE']}/pods?dryRun=All"
    status, text = ask(url, pod, {"Authorization": f"Bearer {token}"}, trusted)
    # With failurePolicy Ignore, such a pod is let through with a warning that says the same.
    if "PolicyMissing" not in text:
        print(f"webhook: expected PolicyMissing, as a refusal or a warning, got {status}: {text}")
        return 1
    print(f"webhook: asked about a pod without its policy, it answers in our words ({status})")
    # Whether the certificate is right is the API server's part of the test; this is about the way to the leader.
    anyone = ssl.create_default_context()
    anyone.check_hostname, anyone.verify_mode = False, ssl.CERT_NONE
    status, text = ask(f"{os.environ['HOME_URL']}/v1/report", {}, {}, anyone)
    if status != 401:
        print(f"call-home: expected 401 for a call without a token, got {status}: {text}")
        return 1
    print("call-home: a call without a token is refused")
    return 0


if __name__ == "__main__":
    sys.exit(main())
