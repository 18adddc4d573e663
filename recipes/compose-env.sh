#!/usr/bin/env bash
# Writes settings for docker-compose.yml with random passwords, based on .env.example.
#   recipes/compose-env.sh [FILE]        default .env
set -euo pipefail

fail() { printf 'error: %s\n' "$*" >&2; exit 1; }

[ $# -le 1 ] || fail "usage: recipes/compose-env.sh [FILE]"
repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
file=${1:-$repo/.env}
[ ! -e "$file" ] || fail "$file exists already, and existing databases keep their passwords"

# 128 bits. A letter first: nats-server parses a value of digits as a number.
random() { printf p; od -An -N16 -tx1 /dev/urandom | tr -d ' \n'; }

umask 077
while IFS= read -r line; do
  case $line in
    *_PASSWORD=*) line=${line%%=*}=$(random) ;;
  esac
  printf '%s\n' "$line"
done <"$repo/.env.example" >"$file"
echo "Written: $file, with random passwords."
