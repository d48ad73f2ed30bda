"""``jobledger web`` and ``jobledger web-token`` without a broker."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from jobledger.cli.main import main
from jobledger.cli.output import Exit
from jobledger.web import TokenFile
from tests.patience import PATIENCE

APP = 'from jobledger import App\napp = App("shop")\n\n@app.task\ndef add(a: int) -> int:\n    return a\n'


@pytest.fixture(autouse=True)
def _project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Use a working directory with an app, and a home folder without a broker."""
    for name in list(os.environ):
        if name.startswith("JOBLEDGER_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("JOBLEDGER_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("JOBLEDGER_BOOTSTRAP", "127.0.0.1:1")
    monkeypatch.setenv("COLUMNS", "300")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "web_shop.py").write_text(APP)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    yield
    sys.modules.pop("web_shop", None)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--listen", "0.0.0.0:0"], "is not a loopback address, and everybody could use the service: give --tokens"),
        (["--listen", "[::]:0"], "is not a loopback address"),
        (["--listen", "jobs.example.org:0"], "is not a loopback address"),
        (["--listen", "here"], "write a port, 0 to 65535"),
        (["--tokens", "none.json"], "there is no file of tokens none.json"),
        (["--proxy-header", "X-User"], "give the addresses of the proxy"),
        (["--proxy-address", "10.0.0.1"], "need --proxy-header"),
        (["--proxy-header", "X-User", "--proxy-address", "proxy"], "'proxy' is not the address or network"),
        (["--proxy-header", "X-User", "--proxy-address", "::1", "--proxy-role", "boss"], "'boss' is not a role"),
        (["--prefix", "jobs"], "must begin with a slash"),
    ],
)
def test_a_service_that_would_be_open_or_wrong_does_not_start(
    words: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The error is one line that says what to give, with exit code 2."""
    assert main(["web", "web_shop:app", *words]) == Exit.USAGE
    shown = " ".join(capsys.readouterr().err.split())
    assert expected in shown


def test_a_port_in_use_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    """The error names the option."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert main(["web", "web_shop:app", "--listen", str(port)]) == Exit.ERROR
    assert f"--listen 127.0.0.1:{port}" in capsys.readouterr().err


def test_tokens_are_added_listed_and_revoked(capsys: pytest.CaptureFixture[str]) -> None:
    """Only `add` shows the token, and only on standard output."""
    file = ["--tokens", "tokens.json"]
    assert main(["web-token", "add", "ann", "--role", "operate", *file]) == 0
    shown = capsys.readouterr()
    text = shown.out.strip()
    assert text not in shown.err
    user = TokenFile("tokens.json").user_of(text)
    assert user is not None
    assert user.name == "ann"
    assert main(["web-token", "add", "bob", "--role", "read", *file, "--json"]) == 0
    bob = json.loads(capsys.readouterr().out)
    assert main(["web-token", "list", *file, "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert [(each["name"], each["role"]) for each in listed] == [("ann", "operate"), ("bob", "read")]
    assert main(["web-token", "revoke", bob["id"], *file]) == 0
    assert TokenFile("tokens.json").user_of(bob["token"]) is None
    assert main(["web-token", "list", *file]) == 0
    assert "bob" not in capsys.readouterr().out.splitlines()[-1]
    assert main(["web-token", "add", "eve", "--role", "boss", *file]) == Exit.USAGE
    assert main(["web-token", "revoke", "nope", *file]) == Exit.ERROR


def test_the_service_answers_and_ends_at_sigterm() -> None:
    """On a free port of this machine, also without a broker and without a table; the exit code is 0."""
    words = [sys.executable, "-m", "jobledger", "web", "web_shop:app", "--listen", "localhost:0", "--prefix", "/x"]
    process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        line = next(line for line in process.stderr if "serving" in line)
        address = line.split("serving ")[1].split()[0]
        began = time.monotonic()
        with urllib.request.urlopen(f"{address}/api/v1/me", timeout=60 * PATIENCE) as answer:
            assert json.load(answer)["role"] == "admin"
        assert time.monotonic() - began < 60 * PATIENCE
        process.send_signal(signal.SIGTERM)
        assert process.wait(60 * PATIENCE) == 0
    finally:
        process.kill()
        process.wait()
        if process.stderr is not None:
            process.stderr.close()
