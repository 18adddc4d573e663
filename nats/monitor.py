"""Tells what the server's monitor knows: monitor.py streams|consumers|peek MONITOR_URL STREAM COUNT

`streams` and `consumers` are tables. `peek` is where the newest COUNT messages begin, and how many there are.
"""

import json
import sys
import urllib.request


def fail(message):
    sys.exit(f"error: {message}")


def ask(url):
    try:
        with urllib.request.urlopen(f"{url.rstrip('/')}/jsz?streams=true&consumers=true&config=true", timeout=5) as answer:
            accounts = json.load(answer).get("account_details") or []
    except (OSError, ValueError):
        fail(f"NATS does not answer at {url}: ./dev up starts everything, ./dev status shows what runs")
    streams = [stream for account in accounts for stream in account.get("stream_detail") or []]
    return sorted(streams, key=lambda stream: stream["name"])


def pick(streams, name):
    for stream in streams:
        if stream["name"] == name:
            return stream
    known = ", ".join(stream["name"] for stream in streams) or "none yet"
    fail(f"there is no stream {name!r}; there is {known}")


def size(count):
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"


def when(timestamp):
    """Whole seconds; the monitor says the year 1 for never."""
    return "-" if not timestamp or timestamp.startswith("0001") else timestamp[:19].replace("T", " ")


def table(rows):
    """The first row is the heading; numbers stand to the right."""
    widths = [max(len(str(row[column])) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        cells = []
        for column, (cell, width) in enumerate(zip(row, widths)):
            right = isinstance(rows[-1][column], int)
            cells.append(str(cell).rjust(width) if right else str(cell).ljust(width))
        print("  ".join(cells).rstrip())


def show_streams(streams):
    rows = [("stream", "subjects", "messages", "size", "at most", "consumers", "oldest (UTC)", "newest (UTC)")]
    for stream in streams:
        state, config = stream["state"], stream["config"]
        rows.append((
            stream["name"], " ".join(config.get("subjects", [])), state["messages"], size(state["bytes"]),
            size(config["max_bytes"]), state["consumer_count"], when(state["first_ts"]), when(state["last_ts"]),
        ))
    table(rows)


def show_consumers(stream):
    state = stream["state"]
    print(f"{stream['name']}: messages {state['messages']}, newest #{state['last_seq']}")
    rows = [("consumer", "takes", "lag", "unacked", "redelivered", "acked up to", "last delivery (UTC)")]
    for consumer in stream.get("consumer_detail") or []:
        rows.append((
            consumer["name"], consumer["config"].get("filter_subject", "everything"), consumer["num_pending"],
            consumer["num_ack_pending"], consumer["num_redelivered"], consumer["ack_floor"]["stream_seq"],
            when(consumer["delivered"].get("last_active")),
        ))
    table(rows) if len(rows) > 1 else print("No consumers.")


def main(what, url, name, count):
    streams = ask(url)
    if what == "streams":
        show_streams(streams)
        return
    stream = pick(streams, name)
    if what == "consumers":
        show_consumers(stream)
        return
    state = stream["state"]
    found = min(int(count), state["messages"])
    print(state["last_seq"] - found + 1, found)


main(*sys.argv[1:])
