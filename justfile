# Recipes to run, inspect and check Gozon on one machine.
# `./dev RECIPE` runs one with the pinned tools.

set minimum-version := "1.40.0"
# Recipes read their arguments as "$@", which keeps quotes: ./dev psql orders -c 'select 1'
set positional-arguments

offset := env("GOZON_PORT_OFFSET", "0")
gateway := "http://127.0.0.1:" + shell('echo $((8080 + $1))', offset)
nats := "nats://viewer:viewer@127.0.0.1:" + shell('echo $((4222 + $1))', offset)

# List the recipes
[private]
default:
    @{{ just_executable() }} --list --unsorted

# Start everything; -d returns when all is ready, --release builds with optimisation
[group('run')]
up *arguments:
    ./dev up "$@"

# Stop everything; the data is kept
[group('run')]
down:
    ./dev down

# Show the state of every part
[group('run')]
status *arguments:
    ./dev status "$@"

# Follow the logs of all parts, or of one
[group('run')]
logs name='*':
    tail -n 20 -F "${GOZON_DIR:-.gozon}"/logs/$1.log

# Stop everything and delete all local data
[confirm("Delete all local data? [y/N]")]
[group('run')]
reset:
    ./dev down
    rm -rf "${GOZON_DIR:-.gozon}"

# Build and start the containers, and wait until all are healthy
[group('docker')]
up-docker *arguments:
    ./dev up-docker "$@"

# Stop the containers; the volumes are kept (--volumes deletes them)
[group('docker')]
down-docker *arguments:
    ./dev down-docker "$@"

# Follow the logs of all containers, or of one
[group('docker')]
logs-docker *arguments:
    ./dev logs-docker "$@"

# Build the containers, kill them while orders are placed, and audit the result
[group('docker')]
compose-test:
    ./dev compose-test

# Place an order, with an account and enough money for it, and wait until it is final
[group('use')]
[no-exit-message]
order amount='1299' user='alice':
    @recipes/order.sh {{ gateway }} "$2" "$1"

# Place twenty orders while payments is killed, messages are duplicated and the broker is wiped
[group('use')]
[no-exit-message]
demo:
    @cargo build --locked --quiet --workspace --bins
    @./dev env ${CARGO_TARGET_DIR:-target}/debug/demo

# Run an example beside the running stack: `example points` awards a point for every finished order
[group('use')]
[no-exit-message]
example name='points' *arguments:
    @recipes/example.sh "$@"

# Open psql on the database of orders or payments; more arguments go to psql
[group('inspect')]
[no-exit-message]
psql database='orders' *arguments:
    @recipes/psql.sh "$@"

# Check that orders, decisions, debits, balances and messages are consistent; exit code 1 if not
[group('inspect')]
[no-exit-message]
audit *arguments:
    @recipes/gozon.sh audit "$@"

# Run the operator's tool; --help lists its commands
[group('inspect')]
[no-exit-message]
gozon *arguments:
    @recipes/gozon.sh "${@:---help}"

# List the streams
[group('inspect')]
[no-exit-message]
streams *arguments: (nats_cli "stream ls")
    @recipes/gozon.sh streams "$@"

# List the consumers of a stream, with their lag
[group('inspect')]
[no-exit-message]
consumers stream='ORDERS' *arguments: (nats_cli "consumer report " + stream)
    @recipes/gozon.sh consumers "$@"

# Show the newest messages of a stream
[group('inspect')]
[no-exit-message]
peek stream='ORDERS' count='10' *arguments: (nats_cli "stream view " + stream + " " + count)
    @recipes/gozon.sh peek "$@"

# Follow a stream
[group('inspect')]
[no-exit-message]
tail stream='ORDERS' *arguments: (nats_cli "subscribe --stream " + stream + " --new")
    @recipes/gozon.sh tail "$@"

# Show how streams and consumers differ from what this version would create; --apply changes them
[group('inspect')]
[no-exit-message]
topology *arguments: (nats_cli "stream info ORDERS")
    @recipes/gozon.sh topology "$@"

# Show how many messages are unpublished; `resend --since TIME` publishes old ones again
[group('inspect')]
[no-exit-message]
outbox *arguments: (nats_cli "stream subjects ORDERS")
    @recipes/gozon.sh outbox "$@"

# Show all rows about an order, from both databases
[group('inspect')]
[no-exit-message]
trace id *arguments: (nats_cli "stream view ORDERS  (search for ce-subject: " + id + ")")
    @recipes/gozon.sh order "$@"

# Dead letters: ls, show ID, replay [--dry-run] [ID ...], drop ID
[group('inspect')]
[no-exit-message]
dlq *arguments: (nats_cli "stream view DLQ")
    @recipes/gozon.sh dlq "${@:-ls}"

# Print the command of the nats CLI that shows the same.
[private]
nats_cli command:
    @printf '# nats --server %s %s\n' {{ quote(nats) }} {{ quote(command) }} >&2

# Check formatting, run lints and all tests; arguments go to cargo test
[group('check')]
test *arguments: check
    @./dev env recipes/test.sh "$@"

# Run the full forms of tests that `test` runs with small numbers; FILTERS select some
[group('check')]
test-long *filters:
    @GOZON_LONG=1 ./dev env recipes/test.sh -- --test-threads=1 --show-output ${@:-bulkheads f64 f65 f66 f67 f68}

# Check formatting and run lints only
[group('check')]
check:
    cargo fmt --all --check
    cargo clippy --locked --workspace --all-targets -- -D warnings

# Kill, fail and freeze every process at every failpoint; NAME selects some
[group('check')]
kill-matrix *arguments:
    cargo build --locked --workspace --bins
    ./dev env ${CARGO_TARGET_DIR:-target}/debug/kill-matrix "$@"

# Remove one guard after the other; a test must fail each time; NAME selects some
[group('check')]
bounty *arguments:
    cargo build --locked --workspace --bins
    ./dev env ${CARGO_TARGET_DIR:-target}/debug/bounty "$@"

# Check the protocol's model exhaustively, over 50 million states; --small, --threads N, --ways
[group('check')]
model *arguments:
    cargo run --locked --release --quiet --package protocol-model -- "$@"

# Inject every kind of fault under load: --seed N [--seconds S] [--report FOLDER]
[group('check')]
chaos *arguments:
    cargo build --locked --workspace --bins
    ./dev env ${CARGO_TARGET_DIR:-target}/debug/chaos "$@"

# Build the older commit OLD and upgrade it under load to this version, process by process
[group('check')]
upgrade-test *arguments:
    cargo build --locked --workspace --bins
    ./dev env ${CARGO_TARGET_DIR:-target}/debug/upgrade-test "$@"

# Run the long checks one after the other and write e2e/reports/long.md; NAMES select some
[group('check')]
long *names:
    recipes/long.sh "$@"

# Lint the OpenAPI documents, run the Postman collection, fuzz the API for half a minute
[group('check')]
api:
    ./dev env recipes/api.sh all

# Test the web page in Chromium; words of test names select some
[group('check')]
test-web *arguments:
    @./dev env recipes/web.sh "$@"

# Fuzz the API with schemathesis, this many examples per operation and phase
[group('check')]
fuzz examples='100':
    ./dev env recipes/api.sh fuzz "$1"

# Send five times the orders that the system can process, and check that it does not collapse
[group('check')]
overload *arguments:
    cargo build --locked --release --bin orders --bin payments --bin gateway --bin stack --bin overload
    ./dev env ${CARGO_TARGET_DIR:-target}/release/overload "$@"

# Run the Postman collection against the running stack
[group('check')]
postman:
    ./dev env recipes/api.sh postman {{ gateway }}

# Measure the speed on a stack of its own; `--report docs/bench` writes the report
[group('check')]
bench *arguments:
    cargo build --locked --release --bin orders --bin payments --bin gateway --bin stack --bin bench
    @./dev env ${CARGO_TARGET_DIR:-target}/release/bench "$@"

# Measure with 5 million old orders in the tables, compared with empty tables
[group('check')]
bench-full-tables orders='5000000' *arguments:
    @./dev bench --only backlog,saturation --prefilled "$@"

# Place 100 orders per second for this many seconds; fails if memory grows
[group('check')]
soak seconds='600' *arguments:
    @./dev bench --only soak --runs 1 --seconds "$@"

# Format the code
[group('check')]
fmt:
    cargo fmt --all

# Regenerate the OpenAPI documents after a change of the API
[group('check')]
openapi:
    GOZON_UPDATE_SNAPSHOTS=1 cargo test --locked -q -p orders -p payments openapi
    GOZON_UPDATE_SNAPSHOTS=1 cargo test --locked -q -p gateway openapi

# Regenerate the JSON Schemas and the AsyncAPI document after a change of the events
[group('check')]
schemas:
    GOZON_UPDATE_SNAPSHOTS=1 cargo test --locked -q -p shared-contracts schemas

# Build the code documentation and open it in the browser
[group('check')]
doc:
    cargo doc --locked --workspace --no-deps --open
