"""Shows messages of a stream without the nats CLI: peek.py NATS_URL STREAM FIRST COUNT

A NATS client of the few words that this takes: it logs in, asks for a message by its sequence, and reads the answer.
"""

import json
import signal
import socket
import sys
import urllib.parse
import uuid

TIMEOUT_SECONDS = 5


def fail(message):
    sys.exit(f"error: {message}")


class Nats:
    """A connection. Speaks https://docs.nats.io/reference/reference-protocols/nats-protocol"""

    def __init__(self, url):
        url = urllib.parse.urlsplit(url)
        self.socket = socket.create_connection((url.hostname, url.port or 4222), TIMEOUT_SECONDS)
        self.lines = self.socket.makefile("rb")
        self.inbox = f"_INBOX.{uuid.uuid4().hex}"
        login = {"user": url.username, "pass": url.password, "headers": True, "no_responders": True, "verbose": False}
        self.send(f"CONNECT {json.dumps(login)}\r\nSUB {self.inbox} 1\r\n")

    def send(self, text):
        self.socket.sendall(text.encode())

    def request(self, subject, body):
        """Status of the answer (empty if it is a message), its headers and its body."""
        self.send(f"PUB {subject} {self.inbox} {len(body)}\r\n{body}\r\n")
        while True:
            line = self.lines.readline()
            if not line:
                fail("NATS closed the connection")
            words = line.decode().split()
            if words[0] == "PING":
                self.send("PONG\r\n")
            elif words[0] == "-ERR":
                fail(f"NATS says {line.decode().strip()[5:]}")
            elif words[0] in ("MSG", "HMSG"):
                content = self.lines.read(int(words[-1]) + 2)[:-2]
                head = int(words[-2]) if words[0] == "HMSG" else 0
                status, *headers = content[:head].decode(errors="replace").split("\r\n")
                headers = [tuple(header.split(": ", 1)) for header in headers if ": " in header]
                return status.removeprefix("NATS/1.0").strip(), headers, content[head:]


def printable(text):
    """Control characters could do things to the terminal."""
    return "".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in text)


def show(sequence, headers, body):
    broker = dict(headers)
    print(f"#{sequence}  {broker.get('Nats-Time-Stamp', '')[:23]}  {printable(broker.get('Nats-Subject', ''))}")
    for name, value in sorted(headers, key=lambda header: header[0].lower()):
        # What the broker adds is in the line above or of no interest.
        if not name.startswith("Nats-") or name == "Nats-Msg-Id":
            print(f"    {printable(name)}: {printable(value)}")
    try:
        text = json.dumps(json.loads(body), indent=2, ensure_ascii=False)
    except ValueError:
        text = body.decode(errors="replace")
    print("    " + printable(text).replace("\n", "\n    ") + "\n")


def main(url, stream, first, count):
    messages = []
    try:
        nats = Nats(url)
        for sequence in range(int(first), int(first) + int(count)):
            status, headers, body = nats.request(f"$JS.API.DIRECT.GET.{stream}", json.dumps({"seq": sequence}))
            if not status:
                messages.append((sequence, headers, body))
            # 404: evicted since.
            elif not status.startswith("404"):
                fail(f"NATS answers {status}")
    except OSError as error:
        fail(f"NATS does not answer ({error}): ./dev up starts everything, ./dev status shows what runs")
    # Ends quietly when piped into `head`.
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    for message in messages:
        show(*message)


main(*sys.argv[1:])
