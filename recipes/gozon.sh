#!/usr/bin/env bash
# Runs the operator's tool `gozon` on the stack of this checkout: its databases, its passwords.
set -euo pipefail
secrets=${GOZON_DIR:-.gozon}/secrets.json
[ -r "$secrets" ] || { echo "error: there is no stack in ${GOZON_DIR:-.gozon}: ./dev up starts one" >&2; exit 2; }
secret() { python3 -c 'import json, sys; print(json.load(open(sys.argv[1]))[sys.argv[2]])' "$secrets" "$1"; }
port=$((54320 + ${GOZON_PORT_OFFSET:-0}))
GOZON_ORDERS_DATABASE_URL=postgres://orders:$(secret postgres_orders)@127.0.0.1:$port/orders
GOZON_PAYMENTS_DATABASE_URL=postgres://payments:$(secret postgres_payments)@127.0.0.1:$port/payments
NATS_URL=nats://127.0.0.1:$((4222 + ${GOZON_PORT_OFFSET:-0}))
NATS_OPS_PASSWORD=$(secret nats_ops)
export GOZON_ORDERS_DATABASE_URL GOZON_PAYMENTS_DATABASE_URL NATS_URL NATS_OPS_PASSWORD

# As `./dev up` built it last. With the whole workspace, since cargo would compile the tool alone with other features anew.
target=${CARGO_TARGET_DIR:-target}
gozon=$(ls -t "$target/release/gozon" "$target/debug/gozon" 2>/dev/null | head -n 1 || true)
if [ "$gozon" != "$target/release/gozon" ]; then
  cargo build --quiet --locked --workspace --bins
  gozon=$target/debug/gozon
fi
exec "$gozon" "$@"
