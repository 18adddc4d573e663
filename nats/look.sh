#!/usr/bin/env bash
# Looks into the broker: with the nats CLI if it is installed, else with Python alone.
#   nats/look.sh streams NATS_URL MONITOR_URL
#   nats/look.sh consumers NATS_URL MONITOR_URL STREAM
#   nats/look.sh peek NATS_URL MONITOR_URL STREAM COUNT
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

fail() { printf 'error: %s\n' "$*" >&2; exit 1; }
dim() { if [ -t 1 ]; then printf '\033[2m%s\033[0m\n' "$*"; else printf '%s\n' "$*"; fi; }

case ${1:-}:$# in
  streams:3 | consumers:4 | peek:5) ;;
  *) fail "usage: nats/look.sh streams|consumers|peek NATS_URL MONITOR_URL [STREAM [COUNT]]" ;;
esac
what=$1 nats_url=$2 monitor_url=$3 stream=${4:-} count=${5:-1}
[[ $count =~ ^[1-9][0-9]{0,3}$ ]] || fail "the count must be a number from 1 to 9999, not '$count'"
command -v python3 >/dev/null || fail "python3 is not found: install it"

# Asked in any case: it knows whether the broker runs and the stream exists, and where its newest messages begin.
table=$(python3 "$here/monitor.py" "$what" "$monitor_url" "$stream" "$count")

case $what in
  streams) command=(stream ls) ;;
  consumers) command=(consumer report "$stream") ;;
  peek)
    read -r first found <<<"$table"
    if [ "$found" = 0 ]; then
      echo "$stream is empty."
      exit
    fi
    if [ -t 0 ] && [ -t 1 ] && [ "$found" -lt 25 ]; then
      # One more than there are: after a full page it would ask for the next.
      command=(stream view "$stream" "$((found + 1))" --id "$first")
    else
      # `stream view` needs a terminal and shows 25 at a time.
      command=(subscribe --stream "$stream" --direct --start-sequence "$first" --count "$found")
    fi
    ;;
esac
command=(nats --server "$nats_url" "${command[@]}")

if command -v nats >/dev/null; then
  dim "+ ${command[*]}"
  exec "${command[@]}"
fi
dim "The nats CLI (https://github.com/nats-io/natscli, or the Docker image natsio/nats-box) shows it with: ${command[*]}"
echo
case $what in
  peek) exec python3 "$here/peek.py" "$nats_url" "$stream" "$first" "$found" ;;
  *) printf '%s\n' "$table" ;;
esac
