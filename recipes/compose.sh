#!/usr/bin/env bash
# Runs Docker Compose on docker-compose.yml: `docker compose` or the older docker-compose.
#   recipes/compose.sh ARGUMENTS ...
set -euo pipefail

fail() { printf 'error: %s\n' "$*" >&2; exit 1; }

command -v docker >/dev/null || fail "docker is not found: install it, or start without Docker: ./dev up"
docker info >/dev/null 2>&1 || fail "the Docker engine does not answer: start it, or give your user access to it (docker info shows the reason)"
# For versions in which BuildKit is not the default.
export DOCKER_BUILDKIT=1 COMPOSE_DOCKER_CLI_BUILD=1
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if docker compose version >/dev/null 2>&1; then
  exec docker compose "$@"
elif command -v docker-compose >/dev/null; then
  exec docker-compose "$@"
fi
fail "Docker Compose is not found: install the plugin docker-compose-plugin (Debian: apt install docker-compose)"
