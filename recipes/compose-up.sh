#!/usr/bin/env bash
# Builds and starts the containers, waits until all are healthy, and prints their addresses.
#   recipes/compose-up.sh [OPTIONS OF compose up, such as --scale orders=2 ...]
set -euo pipefail

fail() { printf 'error: %s\n' "$*" >&2; exit 1; }

repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
compose() { "$repo/recipes/compose.sh" "$@"; }

compose build
compose up --detach "$@"
deadline=$((SECONDS + 180))
waiting="no container"
healthy() {
  local states
  # shellcheck disable=SC2046
  states=$(docker inspect --format '{{ .Name }} {{ if .State.Health }}{{ .State.Health.Status }}{{ else }}{{ .State.Status }}{{ end }}' \
    $(compose ps --all --quiet)) || return 1
  waiting=$(grep -v ' healthy$' <<<"$states" || true)
  [ -z "$waiting" ]
}
until healthy; do
  [ $SECONDS -lt $deadline ] || fail "not healthy: ${waiting//$'\n'/, }; docker compose logs shows why"
  sleep 0.5
done
echo "Everything is healthy."
echo "  page, API  http://$(compose port gateway 8080)"
echo "  monitor    http://$(compose port nats 8222)"
