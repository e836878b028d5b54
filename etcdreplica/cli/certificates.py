"""When certificates expire, read from the PEM itself: the standard library tells that of a peer's certificate only."""

from __future__ import annotations

import datetime
import re
import ssl

_PEM = re.compile(r"-----BEGIN CERTIFICATE-----.+?-----END CERTIFICATE-----", re.DOTALL)
_UTC_TIME, _VERSION = 0x17, 0xA0


def expiry(pem: str) -> float:
    """Return when the first certificate of these to expire does, as Unix time. Raises ValueError or IndexError for none."""
    found = [_expiry(ssl.PEM_cert_to_DER_cert(text)) for text in _PEM.findall(pem)]
    if not found:
        raise ValueError("there is no certificate in it")
    return min(found)


def _expiry(der: bytes) -> float:
    """Certificate: SEQUENCE of TBSCertificate, a SEQUENCE of [version], serial, algorithm, issuer, validity (X.509, 4.1)."""
    _, certificate, _ = _next(der)
    _, rest, _ = _next(certificate)
    fields = []
    for _ in range(5):
        tag, value, rest = _next(rest)
        fields.append((tag, value))
    validity = fields[4 if fields[0][0] == _VERSION else 3][1]
    _, _, after = _next(validity)
    tag, text, _ = _next(after)
    form = "%y%m%d%H%M%SZ" if tag == _UTC_TIME else "%Y%m%d%H%M%SZ"
    return datetime.datetime.strptime(text.decode(), form).replace(tzinfo=datetime.UTC).timestamp()


def _next(data: bytes) -> tuple[int, bytes, bytes]:
    """Return tag, value and what follows."""
    length, at = data[1], 2
    if length & 0x80:
        at += length & 0x7F
        length = int.from_bytes(data[2:at])
    return data[0], data[at : at + length], data[at + length :]
