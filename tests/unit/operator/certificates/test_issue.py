"""
The whole of: what authorities and leaves are made of, and when new ones are due.

Called from: pytest.
"""

import dataclasses
import datetime
from datetime import UTC, timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.x509 import verification
from hypothesis import given
from hypothesis import strategies as st

from pillion_operator.certificates import issue
from pillion_operator.certificates.issue import Due

NOW = datetime.datetime(2026, 11, 24, 12, 0, tzinfo=UTC)
NAMES = ("pillion-webhook.system.svc", "pillion-home.system.svc")
AUTHORITY = issue.make_authority(NOW)
LEAF = issue.make_leaf(AUTHORITY, NAMES, NOW)
NEXT = issue.make_authority(NOW + timedelta(days=1), before=AUTHORITY)


def trusts(bundle: str, leaf: issue.Leaf, name: str, now: datetime.datetime) -> bool:
    """Whether whoever trusts `bundle` takes a leaf for a server of that name."""
    store = verification.Store(x509.load_pem_x509_certificates(bundle.encode()))
    verifier = verification.PolicyBuilder().store(store).time(now).build_server_verifier(x509.DNSName(name))
    chain = x509.load_pem_x509_certificates(leaf.chain.encode())
    try:
        verifier.verify(chain[0], chain[1:])
    except verification.VerificationError:
        return False
    return True


def test_nothing_is_due_once_all_is_made() -> None:
    """A fresh authority and leaf are kept."""
    assert issue.decide(AUTHORITY, LEAF, NAMES, NOW) is Due.KEEP


@pytest.mark.parametrize("name", NAMES)
def test_a_leaf_is_trusted_by_its_authority_for_each_name(name: str) -> None:
    """A strict verifier takes the leaf for each of the names, and for no other."""
    bundle = issue.bundle(AUTHORITY, NOW)
    assert trusts(bundle, LEAF, name, NOW)
    assert not trusts(bundle, LEAF, f"other-{name}", NOW)


@given(st.floats(0, 1, exclude_max=True))
def test_a_leaf_is_renewed_when_a_third_of_its_life_is_left(part: float) -> None:
    """Before two thirds of the life nothing is due, afterwards a leaf is, and never while it could not be used any more."""
    begins = NOW - issue.BACKDATED
    now = begins + (issue.LEAF_LIFE + issue.BACKDATED) * part
    expected = Due.KEEP if part < issue.RENEW_AT else Due.RENEW_LEAF
    assert issue.decide(AUTHORITY, LEAF, NAMES, now) is expected


@given(st.floats(0, 1, exclude_max=True))
def test_an_authority_is_renewed_when_a_third_of_its_life_is_left(part: float) -> None:
    """Before two thirds of its life it signs leaves that end before it does; afterwards it is renewed, while it still counts."""
    now = NOW - issue.BACKDATED + (issue.AUTHORITY_LIFE + issue.BACKDATED) * part
    if part >= issue.RENEW_AT:
        assert issue.decide(AUTHORITY, LEAF, NAMES, now) is Due.RENEW_AUTHORITY
        return
    leaf = issue.make_leaf(AUTHORITY, NAMES, now)
    assert issue.decide(AUTHORITY, leaf, NAMES, now) is Due.KEEP
    ends, authority_ends = issue.ends(leaf.chain), issue.ends(AUTHORITY.certificate)
    assert ends is not None
    assert authority_ends is not None
    assert ends < authority_ends


def test_a_clock_before_its_beginning_makes_it_anew() -> None:
    """A certificate that begins in the future was made by a wrong clock; it is not waited for."""
    early = NOW - timedelta(days=2)
    assert issue.decide(AUTHORITY, LEAF, NAMES, early) is Due.RENEW_AUTHORITY


def test_a_leaf_is_renewed_for_a_name_it_lacks() -> None:
    """Another name to be served makes a new leaf; a name less does not."""
    assert issue.decide(AUTHORITY, LEAF, [*NAMES, "home.example.org"], NOW) is Due.RENEW_LEAF
    assert issue.decide(AUTHORITY, LEAF, NAMES[:1], NOW) is Due.KEEP


def test_a_leaf_can_be_for_an_address() -> None:
    """An IP address goes in as one, and is found again."""
    names = ("127.0.0.1", "::1")
    assert issue.decide(AUTHORITY, issue.make_leaf(AUTHORITY, names, NOW), names, NOW) is Due.KEEP


def test_a_leaf_of_another_authority_is_renewed() -> None:
    """The authority decides, whatever else is well with the leaf."""
    assert issue.decide(issue.make_authority(NOW), LEAF, NAMES, NOW) is Due.RENEW_LEAF


def test_a_key_that_does_not_fit_is_noticed() -> None:
    """A certificate without its own key is of no use, and neither is one with a key of a kind that we do not make."""
    other = issue.make_leaf(AUTHORITY, NAMES, NOW)
    foreign = rsa.generate_private_key(65537, 2048).private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    for key in (other.key, foreign.decode(), ""):
        assert issue.decide(AUTHORITY, dataclasses.replace(LEAF, key=key), NAMES, NOW) is Due.RENEW_LEAF
        assert issue.decide(dataclasses.replace(AUTHORITY, key=key), LEAF, NAMES, NOW) is Due.RENEW_AUTHORITY


def cut(text: str) -> st.SearchStrategy[str]:
    """The beginning of a text, without its last line."""
    return st.integers(0, len(text) - 40).map(lambda at: text[:at])


@given(st.one_of(st.text(max_size=40), cut(AUTHORITY.certificate)), st.one_of(st.text(max_size=40), cut(AUTHORITY.key)))
def test_what_somebody_else_broke_is_made_anew(certificate: str, key: str) -> None:
    """No text in place of a certificate or key raises; what can be made of it can be used."""
    broken = issue.Authority(certificate=certificate, key=key, previous=(key,), cross=certificate)
    assert issue.decide(AUTHORITY, issue.Leaf(chain=certificate, key=key), NAMES, NOW) is Due.RENEW_LEAF
    assert issue.decide(broken, LEAF, NAMES, NOW) is Due.RENEW_AUTHORITY
    anew = issue.make_authority(NOW, before=broken, trusted=key)
    leaf = issue.make_leaf(anew, NAMES, NOW)
    assert issue.decide(anew, leaf, NAMES, NOW) is Due.KEEP
    assert trusts(issue.bundle(anew, NOW, trusted=certificate), leaf, NAMES[0], NOW)


def test_an_old_authority_stays_trusted_until_it_ends() -> None:
    """A bundle holds the new authority first and the old one while it lasts, so that old leaves go on being served."""
    now = NOW + timedelta(days=1)
    bundle = issue.bundle(NEXT, now)
    assert issue.split(bundle) == [NEXT.certificate, AUTHORITY.certificate]
    assert trusts(bundle, LEAF, NAMES[0], now)
    assert trusts(bundle, issue.make_leaf(NEXT, NAMES, now), NAMES[0], now)
    late = NOW + issue.AUTHORITY_LIFE + timedelta(hours=1)
    assert issue.split(issue.bundle(NEXT, late)) == [NEXT.certificate]


def test_whoever_trusts_the_old_authority_trusts_a_new_leaf() -> None:
    """The chain leads from a new leaf to the old authority: pods that were injected before the change go on calling home."""
    now = NOW + timedelta(days=1)
    leaf = issue.make_leaf(NEXT, NAMES, now)
    assert trusts(AUTHORITY.certificate, leaf, NAMES[1], now)
    unrelated = issue.make_leaf(issue.make_authority(now), NAMES, now)
    assert not trusts(AUTHORITY.certificate, unrelated, NAMES[1], now)


def test_an_authority_whose_key_is_lost_stays_trusted() -> None:
    """With nothing left but what is trusted now, the new authority is trusted beside it, without a chain between them."""
    anew = issue.make_authority(NOW, trusted=AUTHORITY.certificate)
    assert anew.cross == ""
    assert issue.split(issue.bundle(anew, NOW)) == [anew.certificate, AUTHORITY.certificate]


def test_a_bundle_does_not_grow_for_ever() -> None:
    """Of many authorities the newest few are trusted, each once."""
    last = AUTHORITY
    for _ in range(issue.MAX_PREVIOUS + 3):
        last = issue.make_authority(NOW, before=last, trusted=last.certificate)
    found = issue.split(issue.bundle(last, NOW, trusted=AUTHORITY.certificate))
    assert len(found) == len(set(found)) == issue.MAX_PREVIOUS + 1
    assert found[0] == last.certificate


def test_the_end_of_a_chain_is_that_of_its_first_certificate() -> None:
    """What is shown as the end is the leaf's, and nothing where there is none."""
    assert issue.ends(LEAF.chain + AUTHORITY.certificate) == NOW + issue.LEAF_LIFE
    assert issue.ends("") is None
    assert issue.fingerprint("") == ""
    assert len(issue.fingerprint(LEAF.chain)) == 16
