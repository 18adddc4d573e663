#!/usr/bin/env bash
# Opens psql on the database of orders or payments, as the role of that service.
#   recipes/psql.sh orders|payments [ARGUMENTS OF psql ...]
# GOZON_DIR and GOZON_PORT_OFFSET select the stack, as for ./dev.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/env.sh"

database=${1:-}
case $database in
  orders | payments) shift ;;
  *) fail "usage: recipes/psql.sh orders|payments [ARGUMENTS OF psql ...]" ;;
esac
secrets=$GOZON_DIR/secrets.json
port=$((15432 + ${GOZON_PORT_OFFSET:-0}))

setup_tools
command -v python3 >/dev/null || fail "python3 is not found: install it"
[ -e "$secrets" ] || fail "$secrets does not exist: ./dev up creates it; GOZON_DIR names another folder"
[ -r "$secrets" ] || fail "$secrets can be read only by the user who started the stack"
read_password='import json, sys; print(json.load(open(sys.argv[1]))["postgres_" + sys.argv[2]])'
password=$(python3 -c "$read_password" "$secrets" "$database" 2>/dev/null) ||
  fail "$secrets contains no password for $database"
(exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null ||
  fail "PostgreSQL does not answer at 127.0.0.1:$port: ./dev up starts everything, ./dev status shows what runs"

# In the environment, because every user of the machine can see arguments.
PGPASSWORD=$password exec psql --host=127.0.0.1 --port="$port" --username="$database" --dbname="$database" "$@"
