#!/usr/bin/env bash
# Runs an example beside the running stack, with a database of its own, until Ctrl-C.
#   recipes/example.sh points [ARGUMENTS OF THE EXAMPLE ...]
# GOZON_DIR and GOZON_PORT_OFFSET select the stack, as for ./dev.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/env.sh"

name=${1:-}
case $name in
  points) shift ;;
  *) fail "usage: ./dev example points" ;;
esac
secrets=$GOZON_DIR/secrets.json
[ -r "$secrets" ] || fail "there is no stack in $GOZON_DIR: ./dev up starts one"
secret() { python3 -c 'import json, sys; print(json.load(open(sys.argv[1]))[sys.argv[2]])' "$secrets" "$1"; }
setup_tools
port=$((15432 + ${GOZON_PORT_OFFSET:-0}))
(exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null ||
  fail "PostgreSQL does not answer at 127.0.0.1:$port: ./dev up starts everything"

# In the environment, because every user of the machine can see arguments.
PGPASSWORD=$(secret postgres_superuser)
export PGPASSWORD
as_superuser() { psql --host=127.0.0.1 --port="$port" --username=postgres --dbname=postgres --quiet "$@"; }
password=$(secret nats_reader)
if ! as_superuser --tuples-only --command "SELECT 1 FROM pg_database WHERE datname = '$name'" | grep -q 1; then
  as_superuser --command "CREATE ROLE $name LOGIN PASSWORD '$password'" --command "CREATE DATABASE $name OWNER $name"
fi

cd "$repo"
cargo build --quiet --locked --workspace --bins
export DATABASE_URL=postgres://$name:$password@127.0.0.1:$port/$name
export NATS_URL=nats://127.0.0.1:$((4222 + ${GOZON_PORT_OFFSET:-0})) NATS_USER=reader NATS_PASSWORD=$password
say "Beside it: PGPASSWORD=... psql -h 127.0.0.1 -p $port -U $name $name -c 'SELECT * FROM $name'"
exec "${CARGO_TARGET_DIR:-$repo/target}/debug/$name" "$@"
