#!/usr/bin/env bash
# Tests docker-compose.yml: builds and starts it as a separate project (ports, passwords, volumes),
# kills services, the broker and a database while orders are placed, and checks that every order
# becomes final and the audit finds nothing.
set -euo pipefail

say() { printf '\n== %s\n' "$*"; }
fail() { printf 'error: %s\n' "$*" >&2; exit 1; }

repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
for program in curl python3; do
  command -v "$program" >/dev/null || fail "$program is not found: install it"
done
work=$(mktemp -d)
mkdir "$work/orders"
placing=
export COMPOSE_PROJECT_NAME=gozon-compose-test
compose() { "$repo/recipes/compose.sh" "$@"; }

clean_up() {
  local status=$?
  [ -z "$placing" ] || kill "$placing" 2>/dev/null || true
  if [ $status -ne 0 ]; then
    compose ps || true
    compose logs --tail 30 || true
  fi
  compose --profile tools down --volumes --rmi local --remove-orphans >"$work/down.log" 2>&1 || cat "$work/down.log"
  rm -rf "$work"
  exit $status
}

until_true() { # until_true SECONDS COMMAND ...
  local until=$((SECONDS + $1))
  shift
  until "$@"; do
    [ $SECONDS -lt $until ] || fail "not true in time: $*"
    sleep 0.2
  done
}

container() { compose ps --quiet "$1" | head -n 1; }
gateway() { printf 'http://%s' "$(compose port gateway 8080)"; }
field() { python3 -c 'import json, sys; print(json.load(sys.stdin)[sys.argv[1]])' "$1"; }

post() { # post PATH KEY BODY: may be repeated with the same key
  curl --silent --fail --max-time 10 --header 'Content-Type: application/json' --header "Idempotency-Key: $2" \
    --data "$3" "$address$1"
}

# Places orders of 10, one after the other, and retries each until it is placed: services are killed
# meanwhile.
place() { # place USER FIRST LAST
  local number deadline=$((SECONDS + 300))
  for number in $(seq "$2" "$3"); do
    until post /v1/orders "order-$number" "{\"user_id\":\"$1\",\"amount\":10,\"description\":\"\"}" >"$work/answer"; do
      [ $SECONDS -lt $deadline ] || return 1
      sleep 0.1
      # GOZON_HTTP_PORT is a range: Docker may give a restarted gateway another port of it.
      address=$(gateway 2>/dev/null || echo "$address")
    done
    mv "$work/answer" "$work/orders/$number"
  done
}
placed() { [ "$(find "$work/orders" -type f | wc -l)" -ge "$1" ]; }

# Kills the process from outside, so that the restart policy starts it again. `docker kill` is only
# the fallback if the process cannot be reached: Docker does not restart a container that it was
# told to kill, so it is started by hand.
crash() { # crash SERVICE
  local id pid
  id=$(container "$1")
  pid=$(docker inspect --format '{{ .State.Pid }}' "$id")
  if grep -qs "$id" "/proc/$pid/cgroup" && kill -KILL "$pid" 2>/dev/null; then
    until_true 60 restarted "$id"
    echo "$1 was killed, and its restart policy brought it back"
  else
    docker kill "$id" >/dev/null
    docker start "$id" >/dev/null
    echo "$1 was killed and started again"
  fi
}
restarted() { [ "$(docker inspect --format '{{ .RestartCount }}' "$1")" -ge 1 ]; }

ended() { # ended NUMBER: whether this order is final; its status is written to a file
  local id
  id=$(field id <"$work/orders/$1")
  # Without an answer, the order counts as not final.
  { curl --silent --fail --max-time 40 "$address/v1/orders/$id?wait=30" | field status >"$work/status"; } 2>/dev/null \
    && ! grep -q NEW "$work/status"
}

settle() { # settle FIRST LAST WANTED-FINISHED WANTED-CANCELLED
  local number result
  for number in $(seq "$1" "$2"); do
    until_true 180 ended "$number"
    cat "$work/status"
  done | sort | uniq -c >"$work/result"
  result=$(awk '{ print $1, $2 }' "$work/result" | paste -sd, -)
  [ "$result" = "$4 CANCELLED,$3 FINISHED" ] || [ "$4:$result" = "0:$3 FINISHED" ] || fail "$3 orders must end FINISHED and $4 CANCELLED, not $result"
  echo "$result"
}

audit() { compose run --rm gozon audit 2>"$work/audit.log" || { cat "$work/audit.log"; fail "the audit has findings"; }; }

trap clean_up EXIT

"$repo/recipes/compose-env.sh" "$work/env" >/dev/null
# Free ports: two consecutive ones for two gateways.
python3 - >>"$work/env" <<'PY'
import random, socket

def is_free(port):
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True

while True:
    port = random.randrange(20000, 32000)
    if all(is_free(port + n) for n in range(3)):
        break
print(f"GOZON_HTTP_PORT={port}-{port + 1}\nGOZON_MONITOR_PORT={port + 2}")
PY
# Takes precedence over a .env of this checkout.
set -a
# shellcheck source=/dev/null
. "$work/env"
set +a

say "The compose file against its schema"
compose config --quiet
if python3 -m venv "$work/venv" >/dev/null 2>&1 && "$work/venv/bin/pip" install --quiet check-jsonschema 2>/dev/null; then
  "$work/venv/bin/check-jsonschema" --builtin-schema vendor.compose-spec "$repo/docker-compose.yml"
else
  echo "Compose itself accepts it; the published schema was not checked, because check-jsonschema could not be installed."
fi
# shellcheck disable=SC2016
diff <(grep -o '\${[A-Z_]*:-[^}]*}' "$repo/docker-compose.yml" | sed 's/[${}]//g; s/:-/=/' | sort --unique) \
  <(grep '^[A-Z_]*=' "$repo/.env.example" | sort) || fail "docker-compose.yml and .env.example disagree about settings or their defaults"

say "Build, start, wait until healthy"
compose --profile tools build gozon >/dev/null
"$repo/recipes/compose-up.sh"
address=$(gateway)

say "Only two ports are published, on loopback; no container runs as root or can write"
for service in gateway orders payments orders-db payments-db nats; do
  published=$(docker inspect --format '{{ range .NetworkSettings.Ports }}{{ range . }}{{ .HostIp }} {{ end }}{{ end }}' "$(container $service)")
  case $service in
    gateway | nats) wanted="127.0.0.1 " ;;
    *) wanted= ;;
  esac
  [ "$published" = "$wanted" ] || fail "$service is published on '$published', not on '$wanted'"
  state=$(docker inspect --format '{{ .HostConfig.ReadonlyRootfs }} {{ .HostConfig.CapDrop }} {{ .HostConfig.SecurityOpt }} {{ .Config.User }}' "$(container $service)")
  case $state in
    "true [ALL] [no-new-privileges:true] postgres" | "true [ALL] [no-new-privileges:true] 65532:65532") echo "$service: $state" ;;
    *) fail "$service is not hardened: $state" ;;
  esac
done
curl --silent --fail "http://$(compose port nats 8222)/jsz" | grep -q '"sync_always": true' || fail "NATS runs without sync_always"
for path in / /assets/main.js /assets/vendor/htm-preact.js /swagger/ /openapi.json /readyz; do
  curl --silent --fail --location --output /dev/null "$address$path" || fail "$address$path does not answer"
done

say "Place orders; kill payments, the broker, orders, a database and the gateway meanwhile"
post /v1/accounts account '{"user_id":"alice"}' >/dev/null
post /v1/accounts/alice/deposits deposit '{"amount":2000}' >/dev/null
place alice 1 300 &
placing=$!
until_true 120 placed 40
crash payments
until_true 120 placed 80
broker=$(container nats)
docker kill "$broker" >/dev/null
until_true 120 placed 160
echo "nats was killed, and $(find "$work/orders" -type f | wc -l) orders are placed"
docker start "$broker" >/dev/null
crash orders
until_true 120 placed 200
crash payments-db
until_true 120 placed 240
crash gateway
wait "$placing" || fail "not every order was placed"
placing=

say "Live events"
curl --silent --no-buffer --max-time 60 "$(gateway)/v1/orders/events?user_id=bob" >"$work/live" &
listening=$!
address=$(gateway)
until_true 20 grep --quiet . "$work/live"
post /v1/orders live '{"user_id":"bob","amount":10,"description":""}' >/dev/null
until_true 20 grep --quiet '"status":"CANCELLED"' "$work/live"
kill "$listening"
grep '^data' "$work/live"

say "All orders become final: money for 200 of 300"
address=$(gateway)
settle 1 300 200 100
audit

say "Stop: SIGTERM ends every service in time"
for service in gateway orders payments; do
  id=$(container $service)
  started=$SECONDS
  docker stop --time 20 "$id" >/dev/null
  code=$(docker inspect --format '{{ .State.ExitCode }}' "$id")
  [ "$code" = 0 ] && [ $((SECONDS - started)) -le 10 ] || fail "$service ended after $((SECONDS - started)) s with code $code"
done
compose down >/dev/null 2>&1

say "Start again with two of each service: the data is still there"
"$repo/recipes/compose-up.sh" --scale gateway=2 --scale orders=2 --scale payments=2
address=$(gateway)
[ "$(curl --silent --fail "$address/v1/accounts/alice" | field balance)" = 0 ] || fail "the balance of alice is not 0"
post /v1/accounts/alice/deposits another '{"amount":1000}' >/dev/null
place alice 301 400
settle 301 400 100 0
second="http://$(compose port --index 2 gateway 8080)"
[ "$second" != "$address" ] || fail "both gateways are at $address"
[ "$(curl --silent --fail "$second/v1/accounts/alice" | field balance)" = 0 ] || fail "the second gateway shows another balance"
audit

say "Down"
compose down --volumes >/dev/null 2>&1
left=$(docker ps --all --quiet --filter "label=com.docker.compose.project=$COMPOSE_PROJECT_NAME"; docker volume ls --quiet --filter "label=com.docker.compose.project=$COMPOSE_PROJECT_NAME")
[ -z "$left" ] || fail "not removed: $left"
echo "Docker Compose works: built, started, killed, settled, audited, scaled, gone."
