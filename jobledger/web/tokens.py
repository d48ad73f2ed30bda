"""The file of tokens: users of the HTTP API with their roles. The file has no token, only a hash of each.

A token is 256 random bits, so a plain SHA-256 is enough: a slow hash protects secrets that can be guessed.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import hashlib
import hmac
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

import msgspec

from jobledger.errors import ConfigError
from jobledger.process.file_lock import locked
from jobledger.web.access import Role, User, role_of

#: The form of the file.
VERSION = 1
#: The text at the beginning of each token, by which scanners for secrets recognise it.
PREFIX = "jl"
#: Bytes of randomness in a token, and in its id.
SECRET_BYTES, ID_BYTES = 32, 4
#: Seconds to wait for another process that changes the file.
LOCK_S = 10.0


class Token(msgspec.Struct, frozen=True):
    """A token as the file has it. ``sha256``: of the secret part, in hexadecimal digits."""

    id: str
    name: str
    role: str
    sha256: str
    created_at: str


class _Document(msgspec.Struct):
    version: int
    tokens: list[Token] = []


class TokenFile:
    """The tokens in a file. The file is read again when it has changed, so an added token is accepted, and a revoked one
    refused, at once.

    ``path``: the file; `add` creates it. Every method raises `ConfigError` for a file that cannot be used.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._seen: tuple[int, int, int] | None = None
        self._users: dict[str, tuple[bytes, User]] = {}

    def check(self) -> None:
        """Read the file. Raises `ConfigError` if there is none, or if others may change it."""
        self._refresh()

    def user_of(self, text: str) -> User | None:
        """Return the user of this token; None if the file does not have the token."""
        self._refresh()
        prefix, _, rest = text.partition("_")
        number, _, secret = rest.partition("_")
        known, user = self._users.get(number, (b"\0" * 32, None))
        same = hmac.compare_digest(known, hashlib.sha256(secret.encode("utf-8", "replace")).digest())
        return user if same and prefix == PREFIX else None

    def tokens(self) -> list[Token]:
        """Return the tokens, the oldest first."""
        return self._read().tokens

    def add(self, name: str, role: Role) -> tuple[Token, str]:
        """Add a token. Return it as the file has it, and its text, which is stored nowhere."""
        User(name, role)  # checks the name
        number, secret = secrets.token_hex(ID_BYTES), secrets.token_urlsafe(SECRET_BYTES)
        created = dt.datetime.now(dt.UTC).isoformat(timespec="seconds")
        token = Token(number, name, role.name.lower(), hashlib.sha256(secret.encode()).hexdigest(), created)
        with self._changing():
            document = self._read() if self.path.exists() else _Document(VERSION)
            document.tokens.append(token)
            self._write(document)
        return token, f"{PREFIX}_{number}_{secret}"

    def revoke(self, token_id: str) -> Token:
        """Remove the token with this id, and return it. Raises `ConfigError` for an unknown id."""
        with self._changing():
            document = self._read()
            gone = [each for each in document.tokens if each.id == token_id]
            if not gone:
                known = ", ".join(each.id for each in document.tokens) or "none"
                raise ConfigError(f"{self.path} has no token with the id {token_id!r}; its ids: {known}")
            document.tokens = [each for each in document.tokens if each.id != token_id]
            self._write(document)
        return gone[0]

    @contextlib.contextmanager
    def _changing(self) -> Iterator[None]:
        try:
            with locked(self.path.with_name(f"{self.path.name}.lock"), LOCK_S):
                yield
        except (OSError, TimeoutError) as exc:
            raise ConfigError(f"the file of tokens {self.path} cannot be changed: {exc}") from exc

    def _refresh(self) -> None:
        try:
            stat = self.path.stat()
        except FileNotFoundError:
            raise ConfigError(
                f"there is no file of tokens {self.path}: `jobledger web-token add NAME --role read --tokens "
                f"{self.path}` creates it"
            ) from None
        except OSError as exc:
            raise ConfigError(f"the file of tokens {self.path} cannot be read: {exc}") from exc
        seen = (stat.st_mtime_ns, stat.st_ino, stat.st_size)
        if seen == self._seen:
            return
        if stat.st_mode & 0o022:
            raise ConfigError(
                f"the file of tokens {self.path} may be changed by other users of this machine: chmod 600 {self.path}"
            )
        users: dict[str, tuple[bytes, User]] = {}
        for token in self._read().tokens:
            try:
                users[token.id] = (bytes.fromhex(token.sha256), User(token.name, role_of(token.role)))
            except ValueError:
                raise ConfigError(f"the file of tokens {self.path}: the hash of token {token.id} is not one") from None
        self._users, self._seen = users, seen

    def _read(self) -> _Document:
        try:
            document = msgspec.json.decode(self.path.read_bytes(), type=_Document)
        except FileNotFoundError:
            raise ConfigError(f"there is no file of tokens {self.path}") from None
        except (OSError, msgspec.MsgspecError, UnicodeDecodeError) as exc:
            raise ConfigError(f"the file of tokens {self.path} cannot be read: {exc}") from exc
        if document.version != VERSION:
            raise ConfigError(
                f"the file of tokens {self.path} has version {document.version}, but this Jobledger reads {VERSION}"
            )
        return document

    def _write(self, document: _Document) -> None:
        """Replace the file in one step, so that a reader, and the next process after a crash, find either the old or the new
        tokens."""
        beside = self.path.with_name(f".{self.path.name}.{secrets.token_hex(8)}")
        handle = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(msgspec.json.format(msgspec.json.encode(document), indent=2) + b"\n")
                file.flush()
                os.fsync(file.fileno())
            os.replace(beside, self.path)
        except BaseException:
            beside.unlink(missing_ok=True)
            raise
