"""The one string that ``osqbox certs token`` prints and ``cmdctl login`` takes. Pure.

It says where to go (``url`` of the agents listener), whom to find there (SHA-256 of the server's certificate: checked
before anything is sent, so that nobody in between gets the secret) and what to bring (the one-time ``secret`` of
`login.create_token`).

    POST {url}/api/v1/certificates  {"token": secret, "csr": PEM}
    200  {"certificate": PEM, "ca": PEM, "jobs": "HOST:PORT"}
"""

from __future__ import annotations

import base64
import binascii
import json
from dataclasses import asdict, dataclass

from osqbox.errors import BadUsage

PREFIX = "osqbox1."
TOKEN_CHARS = 4096


@dataclass(frozen=True, slots=True)
class LoginToken:
    url: str
    """``https://HOST:PORT``."""
    server: str
    """SHA-256 of the server's certificate (DER), in hex."""
    secret: str

    def pack(self) -> str:
        text = json.dumps(asdict(self), separators=(",", ":"))
        return PREFIX + base64.urlsafe_b64encode(text.encode()).decode().rstrip("=")

    @staticmethod
    def unpack(text: str) -> LoginToken:
        """Raises BadUsage, which quotes nothing of the token."""
        wrong = BadUsage("expected the token that `osqbox certs token NAME` printed, whole", hint="cmdctl login TOKEN")
        if not text.startswith(PREFIX) or len(text) > TOKEN_CHARS or not text.isascii():
            raise wrong
        packed = text.removeprefix(PREFIX)
        try:
            found = json.loads(base64.b64decode(packed + "=" * (-len(packed) % 4), altchars=b"-_", validate=True))
            token = LoginToken(found["url"], found["server"], found["secret"])
        except (ValueError, KeyError, TypeError, RecursionError, binascii.Error):
            raise wrong from None
        if not all(isinstance(each, str) and each for each in (token.url, token.server, token.secret)):
            raise wrong
        if not token.url.startswith("https://"):
            raise wrong
        return token
