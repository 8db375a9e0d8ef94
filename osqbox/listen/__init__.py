"""The listeners: from an accepted socket to a handler or an ASGI application, and tidily back.

A connection is one Trio task. It shakes hands under a deadline, learns who is at the other end from the verified
certificate, and then goes one of two ways: ordinary HTTP/1.x of agents is answered inline (`inline.py`), HTTP/2,
WebSockets and everything of the operator go to Hypercorn's protocol classes, repaired (`hypercorn_repairs.py`).
Nothing in Hypercorn is assigned globally: other projects' test suites import us.
"""

from __future__ import annotations

from .accept import Listener
from .asgi import ASGIApp, agents_asgi
from .connection import Limits, Statistics, current_peer
from .tls import (
    CertificateIdentity,
    certificate_identity,
    probe_tls_minimum,
    refusal_of_certificate,
    rotate_certificate,
    server_context,
)

__all__ = [
    "ASGIApp",
    "CertificateIdentity",
    "Limits",
    "Listener",
    "Statistics",
    "agents_asgi",
    "certificate_identity",
    "current_peer",
    "probe_tls_minimum",
    "refusal_of_certificate",
    "rotate_certificate",
    "server_context",
]
