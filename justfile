# Recipes for running, looking into and checking Gozon on one machine. `./dev RECIPE` runs them with the tools found.

set minimum-version := "1.40.0"

offset := env("GOZON_PORT_OFFSET", "0")
gateway := "http://127.0.0.1:" + shell('echo $((8080 + $1))', offset)
nats := "nats://viewer:viewer@127.0.0.1:" + shell('echo $((4222 + $1))', offset)

# Show the recipes
[private]
default:
    @{{ just_executable() }} --list --unsorted

# Start everything; -d returns when ready, --release for speed
[group('run')]
up *arguments:
    ./dev up {{ arguments }}

# Stop everything; the data stays
[group('run')]
down:
    ./dev down

# Show how everything is
[group('run')]
status *arguments:
    ./dev status {{ arguments }}

# Follow the logs of all parts, or of one
[group('run')]
logs name='*':
    tail -n 20 -F ${GOZON_DIR:-.gozon}/logs/{{ name }}.log

# Delete all local data; stop everything first
[confirm("Delete all local data? [y/N]")]
[group('run')]
reset:
    ./dev down
    rm -rf ${GOZON_DIR:-.gozon}

# The same in containers: build, start, wait until everything is healthy
[group('docker')]
up-docker *arguments:
    recipes/compose-up.sh {{ arguments }}

# Stop the containers; the data stays in its volumes (--volumes deletes it)
[group('docker')]
down-docker *arguments:
    recipes/compose.sh --profile tools down {{ arguments }}

# Follow the logs of all containers, or of one
[group('docker')]
logs-docker *arguments:
    recipes/compose.sh logs --follow --tail 20 {{ arguments }}

# Build the containers, kill them while orders are placed, and see that the books are right
[group('docker')]
compose-test:
    recipes/compose-test.sh

# Place an order, with an account and money for it, and watch it end
[group('use')]
order amount='1299' user='alice':
    @recipes/order.sh {{ gateway }} {{ user }} {{ amount }}

# Twenty orders while payments is killed, messages come twice and the broker is wiped; on a stack of its own
[group('use')]
demo:
    @cargo build --locked --quiet --workspace --bins
    @./dev env ${CARGO_TARGET_DIR:-target}/debug/demo

# Open psql on the database of orders or payments
[group('look')]
psql database='orders' *arguments:
    ./dev env recipes/psql.sh {{ database }} {{ arguments }}

# Check that orders, decisions, debits and balances fit together; exit code 1 if not
[group('look')]
audit *arguments:
    @./dev env recipes/gozon.sh audit {{ arguments }}

# The operator's tool; --help tells all it can do
[group('look')]
gozon *arguments='--help':
    @./dev env recipes/gozon.sh {{ arguments }}

# List the streams
[group('look')]
streams *arguments: (shown_as "stream ls")
    @./dev env recipes/gozon.sh streams {{ arguments }}

# List the consumers of a stream, with their lag
[group('look')]
consumers stream='ORDERS' *arguments: (shown_as "consumer report " + stream)
    @./dev env recipes/gozon.sh consumers {{ stream }} {{ arguments }}

# Show the newest messages of a stream
[group('look')]
peek stream='ORDERS' count='10' *arguments: (shown_as "stream view " + stream + " " + count)
    @./dev env recipes/gozon.sh peek {{ stream }} {{ count }} {{ arguments }}

# Follow a stream
[group('look')]
tail stream='ORDERS' *arguments: (shown_as "subscribe --stream " + stream + " --new")
    @./dev env recipes/gozon.sh tail {{ stream }} {{ arguments }}

# How far streams and consumers are from what this version would make; --apply changes them
[group('look')]
topology *arguments: (shown_as "stream info ORDERS")
    @./dev env recipes/gozon.sh topology {{ arguments }}

# What waits to be published; `resend --since TIME` publishes again
[group('look')]
outbox *arguments: (shown_as "stream subjects ORDERS")
    @./dev env recipes/gozon.sh outbox {{ arguments }}

# Everything that both databases hold about an order
[group('look')]
trace id *arguments: (shown_as "stream view ORDERS  (look for ce-subject: " + id + ")")
    @./dev env recipes/gozon.sh order {{ id }} {{ arguments }}

# Messages that were not applied: ls, show ID, replay [--dry-run] [ID ...], drop ID
[group('look')]
dlq *arguments='ls': (shown_as "stream view DLQ")
    @./dev env recipes/gozon.sh dlq {{ arguments }}

# The same with the nats CLI.
[private]
shown_as command:
    @printf '# nats --server %s %s\n' {{ quote(nats) }} {{ quote(command) }} >&2

# Formatting, lints and all tests; arguments go to cargo test
[group('check')]
test *arguments: check
    @./dev env recipes/test.sh {{ arguments }}

# Formatting and lints, without running anything
[group('check')]
check:
    cargo fmt --all --check
    cargo clippy --locked --workspace --all-targets -- -D warnings

# Kill, fail and freeze every process at every named place; NAME selects some
[group('check')]
kill-matrix *arguments:
    cargo build --locked --workspace --bins
    ./dev env ${CARGO_TARGET_DIR:-target}/debug/kill-matrix {{ arguments }}

# Take away one guard after the other; a test must notice each time; NAME selects some
[group('check')]
bounty *arguments:
    cargo build --locked --workspace --bins
    ./dev env ${CARGO_TARGET_DIR:-target}/debug/bounty {{ arguments }}

# Try out everything that can happen in the protocol: at least 50 million states; --small, --threads N, --ways
[group('check')]
model *arguments:
    cargo run --locked --release --quiet --package protocol-model -- {{ arguments }}

# Break everything while customers order, as a seed decides: --seed N [--seconds S] [--report FOLDER]
[group('check')]
chaos *arguments:
    cargo build --locked --workspace --bins
    ./dev env ${CARGO_TARGET_DIR:-target}/debug/chaos {{ arguments }}

# Check the API with tools that know nothing of our code: documents linted, Postman collection run, a short fuzz run
[group('check')]
api:
    ./dev env recipes/api.sh all

# Test the web page in a real browser: every view, what a reload or a lost connection does, accessibility; words of names select some
[group('check')]
[positional-arguments]
test-web *arguments:
    @./dev env recipes/web.sh "$@"

# Fuzz the API: schemathesis against a stack of its own, with so many examples per operation and phase
[group('check')]
fuzz examples='100':
    ./dev env recipes/api.sh fuzz {{ examples }}

# Send five times as many orders as can be taken: quick answers, nothing lost, as quick as before afterwards
[group('check')]
overload *arguments:
    cargo build --locked --release --bin orders --bin payments --bin gateway --bin stack --bin overload
    ./dev env ${CARGO_TARGET_DIR:-target}/release/overload {{ arguments }}

# Run the Postman collection against the running stack
[group('check')]
postman:
    ./dev env recipes/api.sh postman {{ gateway }}

# Measure the speed on a stack of its own; `--report docs/bench` writes the report
[group('check')]
bench *arguments:
    cargo build --locked --release --bin orders --bin payments --bin gateway --bin stack --bin bench
    @./dev env ${CARGO_TARGET_DIR:-target}/release/bench {{ arguments }}

# The same end to end and for a backlog, with 5 million old orders in the tables against empty ones
[group('check')]
bench-full-tables orders='5000000' *arguments: (bench '--only' 'backlog,saturation' '--prefilled' orders arguments)

# 100 orders a second for so many seconds: the memory of no service grows
[group('check')]
soak seconds='600' *arguments: (bench '--only' 'soak' '--runs' '1' '--seconds' seconds arguments)

# Format the code
[group('check')]
fmt:
    cargo fmt --all

# Make the OpenAPI documents anew after a change of the API
[group('check')]
openapi:
    GOZON_UPDATE_SNAPSHOTS=1 cargo test --locked -q -p orders -p payments openapi
    GOZON_UPDATE_SNAPSHOTS=1 cargo test --locked -q -p gateway openapi

# Make the JSON Schemas and the AsyncAPI document anew after a change of the events
[group('check')]
schemas:
    GOZON_UPDATE_SNAPSHOTS=1 cargo test --locked -q -p shared-contracts schemas

# The newest code documentation, in the browser
[group('check')]
doc:
    cargo doc --locked --workspace --no-deps --open
