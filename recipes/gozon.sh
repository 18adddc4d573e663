#!/usr/bin/env bash
# Runs the operator's tool `gozon` on the stack of this checkout, with its databases and passwords.
#   recipes/gozon.sh ARGUMENTS ...
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/env.sh"

secrets=$GOZON_DIR/secrets.json
[ -r "$secrets" ] || { say "error: there is no stack in $GOZON_DIR: ./dev up starts one"; exit 2; }
secret() { python3 -c 'import json, sys; print(json.load(open(sys.argv[1]))[sys.argv[2]])' "$secrets" "$1"; }
offset=${GOZON_PORT_OFFSET:-0}
port=$((15432 + offset))
GOZON_ORDERS_DATABASE_URL=postgres://orders:$(secret postgres_orders)@127.0.0.1:$port/orders
GOZON_PAYMENTS_DATABASE_URL=postgres://payments:$(secret postgres_payments)@127.0.0.1:$port/payments
NATS_URL=nats://127.0.0.1:$((4222 + offset))
NATS_OPS_PASSWORD=$(secret nats_ops)
export GOZON_ORDERS_DATABASE_URL GOZON_PAYMENTS_DATABASE_URL NATS_URL NATS_OPS_PASSWORD

# The newest build. A debug build is brought up to date first, with the whole workspace: alone, the
# tool would be compiled with other features of its dependencies.
target=${CARGO_TARGET_DIR:-$repo/target}
gozon=$(ls -t "$target/release/gozon" "$target/debug/gozon" 2>/dev/null | head -n 1 || true)
if [ "$gozon" != "$target/release/gozon" ]; then
  cargo build --quiet --locked --workspace --bins --manifest-path "$repo/Cargo.toml"
  gozon=$target/debug/gozon
fi
exec "$gozon" "$@"
