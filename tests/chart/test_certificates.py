"""
The whole of: the chain of trust that cert-manager is asked for.

Called from: pytest.
Must never: need cert-manager; what it makes of these objects is its own affair.
"""

from chart.variants import CERT_MANAGER, PROVIDED, VARIANTS
from pillion_operator import settings
from support import helm


def test_the_authority_outlives_the_certificates_that_it_signs() -> None:
    """
    A sidecar gets the authority when its pod is made: a renewal changes neither the authority's key nor, for years, its certificate.
    """
    objects = helm.render(CERT_MANAGER)
    authority = helm.one(objects, "Certificate", "pillion-authority")["spec"]
    serving = helm.one(objects, "Certificate", "pillion")["spec"]
    assert authority["isCA"] is True
    assert authority["privateKey"]["rotationPolicy"] == "Never"
    assert authority["duration"] == "87600h"
    assert "isCA" not in serving
    signer = helm.one(objects, serving["issuerRef"]["kind"], serving["issuerRef"]["name"])["spec"]
    assert signer == {"ca": {"secretName": authority["secretName"]}}
    assert helm.one(objects, "Issuer", authority["issuerRef"]["name"])["spec"] == {"selfSigned": {}}


def test_no_two_makers_write_one_secret() -> None:
    """cert-manager's authority is not the Secret of the mode Self, which may still be there after a change of the mode."""
    made = {each["spec"]["secretName"] for each in helm.of_kind(helm.render(CERT_MANAGER), "Certificate")}
    assert len(made) == 2
    assert settings.Settings().authority_secret_name not in made


def test_an_issuer_of_the_users_is_used_as_it_is() -> None:
    """With `issuerRef` there is one Certificate, signed by that issuer, and no authority of the chart's own."""
    objects = helm.render(VARIANTS["cert-manager-issuer"])
    (certificate,) = helm.of_kind(objects, "Certificate")
    assert certificate["spec"]["issuerRef"] == {"kind": "ClusterIssuer", "name": "private"}
    assert helm.of_kind(objects, "Issuer") == []


def test_who_provides_a_certificate_gets_none_made() -> None:
    """With the mode Provided, the chart makes no Secret and no Certificate."""
    assert helm.of_kind(helm.render(PROVIDED), "Secret", "Certificate", "Issuer") == []
